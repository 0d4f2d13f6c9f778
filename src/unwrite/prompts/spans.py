"""Which tokens of a prompt hold a text? Found in what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unwrite.errors import TokensError, shown
from unwrite.prompts.encode import need
from unwrite.prompts.tokens import bare, spelled

IdRow = Sequence[int | np.integer] | np.ndarray
# What a tokenizer writes for the first bytes of a character whose others are still to come.
_HALF = "\ufffd"


def ends(ids: IdRow, tokenizer: Any) -> tuple[str, list[int]]:
    """What the tokens say together, and how many of its characters the first 1, 2, … of them say."""
    need(tokenizer, "a text inside of a prompt")
    whole = said_by(ids, tokenizer)
    # Of a character that is begun nothing counts, so the token that ends it holds it.
    return whole, [len(said_by(ids[: i + 1], tokenizer).rstrip(_HALF)) for i in range(len(ids))]


def holding(text: str, ids: IdRow, tokenizer: Any, name: str) -> range:
    """The rows whose tokens hold a text that stands in the prompt once; `name` is what messages call the prompt.

    Raises TokensError for a text that is not there, or more than once.
    """
    if not isinstance(text, str) or not text.strip():
        raise TokensError("a place in a prompt is named by a text of it", got=shown(text), expected="some of its words")
    said, end = ends(ids, tokenizer)
    if (found := said.count(text)) != 1:
        raise TokensError(
            f"{shown(text)} stands in {name} {found} times", got=shown(said), expected="once",
            fix="name more of what is around it, or give a position" if found else "give words as the prompt has them",
        )  # fmt: skip
    start = said.index(text)
    return range(row_of(end, start), row_of(end, start + len(text) - 1) + 1)


def row_of(end: Sequence[int], character: int) -> int:
    """The row of the token that says a character."""
    return next(row for row, said in enumerate(end) if said > character)


def placeholder(given: Any, ids: IdRow, tokenizer: Any) -> int:
    """The row of the one token that holds a place, given as its text or id.

    Raises TokensError where no token says just that, or more than one does.
    """
    if isinstance(given, str) and given.strip():
        need(tokenizer, "a placeholder's text", "pass its id")
        rows = [i for i, token in enumerate(ids) if said_by([token], tokenizer).strip() == given.strip()]
    elif isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        rows = [i for i, token in enumerate(ids) if token == given]
    else:
        raise TokensError("a placeholder is one token", got=shown(given), expected="its text, or its id")
    if len(rows) == 1:
        return rows[0]
    written = isinstance(given, str) and given.strip() in said_by(ids, tokenizer)
    cut = [spelled([i], tokenizer) for i in bare(given.strip(), tokenizer)] if isinstance(given, str) else []
    raise TokensError(
        f"the placeholder {shown(given)} is {len(rows)} tokens of the prompt that it stands in",
        got=f"a text of several tokens, such as {', '.join(map(shown, cut))}" if written and not rows else len(rows),
        expected="one token, once", fix="write the prompt with another placeholder",
    )  # fmt: skip


def said_by(ids: IdRow, tokenizer: Any) -> str:
    """What tokens say, as it is; without a tokenizer their numbers."""
    numbers = [int(i) for i in ids]
    if tokenizer is None:
        return " ".join(map(str, numbers))
    return tokenizer.decode(numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False)
