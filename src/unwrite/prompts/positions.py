"""At which rows of its prompts? What a name means: "each" and "all" up to the row that is read, "last" this one.

A role is a name of the caller's own for one token of every prompt, such as "S2" or "subject"; "end" is the one that is
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from unwrite.errors import NumericError, TokensError, one_of, several, shown
from unwrite.prompts.tokens import Tokens, read_rows

AT = ("each", "all", "last")
END = "end"
# What `at` is: a word for positions, a role, or several.
RoleNames = str | Sequence[str]
# A role for each prompt of some tokens, by its name.
Roles = Mapping[str, Int[np.ndarray, " prompt"]]
# `uw.dla`, whose prompts are read at a position of their own, calls the last one by that.
_ALONE = ("last", "position")


def rows_at(at: str, read: Any, position: Any) -> Any:
    """Bool [prompt, position]: whether `at` means a position [position] of prompts that are `read` at a row [prompt].

    Of numpy or torch, as both are given.
    """
    return position == read[:, None] if at in _ALONE else position <= read[:, None]


def roles_of(name: str, given: Any, tokens: Tokens) -> dict[str, Int[np.ndarray, " prompt"]]:
    """Roles as rows of the prompts: one number for all or one each, from the end where it is negative.

    Raises TokensError for what is no mapping, a name that `at` has another meaning for, and a row outside its prompt.
    """
    if not isinstance(given, Mapping):
        raise TokensError(f"{name} are rows by their names", got=shown(given), expected='a mapping such as {"S2": 9}')
    for role in given:
        if not isinstance(role, str) or not role.isprintable() or not role.strip() or role in (*AT, *_ALONE):
            raise TokensError(f"{name} have names", got=shown(role), expected=f"words other than {', '.join(AT)}")
    return {role: read_rows(rows, tokens, f"role {role}") for role, rows in given.items()}


def asked_roles(at: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The roles that `at` names, one or several; none where it is one of the words for positions.

    Raises NumericError for anything else, with the roles that there are.
    """
    if isinstance(at, str) or not isinstance(at, (Sequence, np.ndarray)):
        one_of("at", at, (*AT, *known), also="several roles")
        return () if at in AT else (at,)
    listed = several("at is a name, or several roles", at, ", ".join(known), NumericError)
    for role in listed:
        one_of("at", role, known)
    if not listed or len({*listed}) < len(listed):
        raise NumericError("at names each role once", got=shown(at), expected=f"some of {', '.join(known)}")
    return tuple(listed)
