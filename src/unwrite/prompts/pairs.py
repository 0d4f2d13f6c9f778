"""Which two prompts are compared, and what is asked of them?

The base prompt is the one that is run and patched; the source prompt is where the values come from. Both have the same
number of tokens, so that a position means the same in both, unless roles say which token of one is which of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from unwrite.errors import NumericError, TokensError, counted, number, one_of, plain, shown, whole
from unwrite.prompts.answers import answers, several
from unwrite.prompts.encode import need
from unwrite.prompts.given import given
from unwrite.prompts.positions import END, RoleNames, Roles, asked_roles, roles_of
from unwrite.prompts.tokens import Tokens, array_of, read_rows, spelled

_ANY_VOCABULARY = 2**31
MADE = "uw.pairs(…, tokenizer=lm.tokenizer)"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source prompts, with the answer, what it is compared to, and the row that is read.

    `roles` name one token of every base prompt, `source_roles` the one of the source prompt that it corresponds to (by
    default the same row); "end" is the row that is read. Only prompts all of whose roles are named in both may have
    unequal numbers of tokens. `template` is a label of each pair: pairs of one template are no independent evidence.
    `choices` are the tokens that an answer is chosen from, itself among them.
    """

    base: Tokens
    source: Tokens
    answer: Int[np.ndarray, " pair"]
    against: Int[np.ndarray, " pair"] | None
    row: Int[np.ndarray, " pair"]
    roles: Roles = field(default_factory=dict)
    source_roles: Roles = field(default_factory=dict)
    template: tuple[str, ...] | None = None
    choices: Int[np.ndarray, "pair option"] | None = None

    def __post_init__(self) -> None:
        for name in ("base", "source", "answer", "against", "row"):
            part, ids = getattr(self, name), name not in ("base", "source")
            if name == "against" and part is None:
                continue
            fits = isinstance(part, np.ndarray) and part.dtype.kind in "iu" and part.ndim == 1
            fits = fits if ids else isinstance(part, Tokens)
            if not fits or len(part) != len(self.base):
                expected = "one integer for each pair" if ids else "Tokens, a prompt for each pair"
                raise TokensError(f"pairs need {name} of another kind", got=shown(part), expected=expected, fix=MADE)
        read_rows(self.row, self.base)
        self._place_roles()
        _require_labels(self.template, len(self))
        _require_choices(self.choices, self.answer)

    def _place_roles(self) -> None:
        """Every role, and "end", as a row of base and source prompts. Raises TokensError where one has none."""
        given = roles_of("roles", self.roles, self.base)
        roles = given | {END: self.row}
        there = roles_of("source_roles", self.source_roles, self.source)
        if (given.get(END, self.row) != self.row).any():
            raise TokensError("end is the row that is read", got="another role of this name", fix="leave this role out")
        for name, rows in roles.items():
            if (late := np.flatnonzero(rows > self.row)).size:
                got = f"row {rows[late[0]]} of pair {late[0]}, which is read at {self.row[late[0]]}"
                raise TokensError(f"the role {name} lies behind the row that is read", got=got)
        if odd := [name for name in there if name not in roles]:
            raise TokensError("source_roles are of other names than roles", got=odd[0], expected=", ".join(roles))
        end = self.row + self.source.lengths - self.base.lengths
        missing = [name for name in roles if name not in there and name != END]
        if (missing and not self.aligned) or (end < 0).any():
            unequal = int((self.base.lengths != self.source.lengths).argmax())
            got = f"{self.base.lengths[unequal]} and {self.source.lengths[unequal]} in pair {unequal}"
            raise TokensError(
                "roles of prompts with unequal numbers of tokens are named in both", got=got,
                expected=f"source_roles with {', '.join(missing) or END}",
            )  # fmt: skip
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "source_roles", {**roles, END: end, **there})

    def __len__(self) -> int:
        return len(self.base)

    @cached_property
    def aligned(self) -> bool:
        """Have base and source prompts equal numbers of tokens?"""
        return bool((self.base.lengths == self.source.lengths).all())

    @cached_property
    def first(self) -> Int[np.ndarray, " pair"]:
        """The first position at which the two prompts differ; before it no node of one differs from the other's."""
        width = min(self.base.length, self.source.length)
        differs = self.base.ids[:, :width] != self.source.ids[:, :width]
        shared = np.minimum(self.base.lengths, self.source.lengths)
        differs &= np.arange(width) < shared[:, None]
        return np.where(differs.any(1), differs.argmax(1), shared)

    def rows(self, at: RoleNames) -> tuple[Int[np.ndarray, "pair role"], Int[np.ndarray, "pair role"]] | None:
        """The rows of base and of source prompts that roles name; None where `at` is one of the words for positions.

        Raises NumericError for a role that these pairs lack, and for two that are one row of a base prompt and two of
        its source; TokensError for a word for positions where prompts have unequal numbers of tokens.
        """
        roles = asked_roles(at, [*self.roles])
        if not roles:
            if not self.aligned:
                raise TokensError(
                    "a position means another token in prompts of unequal numbers of tokens", got=f"at={at!r}",
                    expected=f"a role: {', '.join(self.roles)}",
                )  # fmt: skip
            return None
        base, source = (np.stack([part[role] for role in roles], 1) for part in (self.roles, self.source_roles))
        clash = (base[:, :, None] == base[:, None]) & (source[:, :, None] != source[:, None])
        if clash.any():
            pair, one, other = np.argwhere(clash)[0].tolist()
            raise NumericError(
                f"{roles[one]} and {roles[other]} are one token of the base prompt, and two of its source",
                got=f"pair {pair}, row {base[pair, one]}", fix="ask for one of them at a time",
            )  # fmt: skip
        return base, source

    def take(self, pairs: Sequence[int] | Sequence[bool] | np.ndarray) -> Pairs:
        """Some of the pairs, by their numbers or by a truth for each. Raises TokensError for anything else, and none.

        Example: `pairs.take([label == "t0" for label in pairs.template])`
        """
        listed = array_of(np.array(pairs, dtype=object) if _truths(pairs) else pairs)
        is_mask = listed is not None and listed.shape == (len(self),) and _truths(listed.tolist())
        kept: Any = np.flatnonzero(np.asarray(listed, dtype=bool)) if is_mask else pairs
        base, source = self.base.take(kept), self.source.take(kept)
        kept = np.asarray(array_of(kept))
        rows = {"answer": self.answer, "against": self.against, "row": self.row, "choices": self.choices}
        own = {name: None if part is None else part[kept] for name, part in rows.items()}
        return replace(
            self, base=base, source=source, **own,
            roles={name: part[kept] for name, part in self.roles.items()},
            source_roles={name: part[kept] for name, part in self.source_roles.items()},
            template=self.template and tuple(self.template[i] for i in kept),
        )  # fmt: skip

    def split(self, by: str | Sequence[str] = "template", share: float = 0.5, seed: int = 0) -> tuple[Pairs, Pairs]:
        """Two parts that have no label in common: one to fit or to choose by, one to judge by.

        Arguments: `by` "template", "pair" (each by itself), or a label for each pair; `share` of the labels that the
        first part has, rounded, at least one; `seed` of their order. Raises NumericError for other settings,
        TokensError where there are fewer than two labels.
        """
        first = parted(self, by, share, seed)
        return self.take(first), self.take(~first)

    def _labels(self, by: Any) -> Sequence[str]:
        if isinstance(by, str) and by == "pair":
            return [f"{i:09}" for i in range(len(self))]
        if isinstance(by, str) and by == "template" and self.template is not None:
            return self.template
        if not isinstance(by, (list, tuple)) or len(by) != len(self) or not all(isinstance(part, str) for part in by):
            known = "pair" if self.template is None else "template, pair"
            raise NumericError("by says what is kept together", got=shown(by), expected=f"{known}, or a label for each")
        return by

    @property
    def chance(self) -> float:
        """How often a guess among the choices, or between answer and `against`, is right; 0 of the whole vocabulary."""
        if self.choices is not None:
            return 1 / self.choices.shape[1]
        return 0.0 if self.against is None else 0.5

    @cached_property
    def cluster(self) -> Int[np.ndarray, " pair"]:
        """Pairs of one cluster are no independent evidence: those of a template, where there are several."""
        if self.template is None or len(set(self.template)) < 2:
            return np.arange(len(self))
        return np.unique(np.array(self.template, dtype=object).astype(str), return_inverse=True)[1]

    def require_differences(self) -> None:
        """Raise TokensError naming the first pair whose prompts are the same up to the row that is read."""
        if (same := np.flatnonzero(self.first > self.row)).size:
            raise TokensError(
                f"base and source prompt of pair {same[0]} are the same up to the row that is read",
                got=f"row {self.row[same[0]]}", fix="leave this pair out, or take values from elsewhere by source=",
            )  # fmt: skip

    def check(self, vocabulary: int, context: int | None) -> None:
        """Raise TokensError unless a model with this many embedding rows and positions can read and answer."""
        for part in (self.base, self.source):
            part.check(vocabulary, context)
        for name, ids in (("answer", self.answer), ("against", self.against), ("a choice", self.choices)):
            if ids is not None and (ids >= vocabulary).any():
                raise TokensError(f"{name} is outside the vocabulary", got=ids.max(), expected=f"0 to {vocabulary - 1}")

    def words(self, tokenizer: Any) -> dict[str, list[str]]:
        """The prompts up to the row that is read, and the tokens that are asked for, as texts, pair by pair."""
        if tokenizer is not None:
            need(tokenizer, "what tokens say")
        asked = {"answer": self.answer} | ({} if self.against is None else {"against": self.against})
        words = {name: [spelled([i], tokenizer) for i in ids] for name, ids in asked.items()}
        for name, tokens, rows in (
            ("base_text", self.base, self.row),
            ("source_text", self.source, self.source_roles[END]),
        ):
            words[name] = [spelled(ids[: n + 1], tokenizer) for ids, n in zip(tokens.written, rows, strict=True)]
        return words

    def each(self, tokenizer: Any) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
        """What stands at each [pair, position] of both prompts, up to the row that is read; "" behind it.

        Raises TokensError for what is no tokenizer.
        """
        if tokenizer is not None:
            need(tokenizer, "what tokens say")
        found = {}
        for name, tokens in (("token", self.base), ("source_token", self.source)):
            said = {i: spelled([i], tokenizer) for i in np.unique(tokens.written).tolist()}
            words = np.array([[said[i] for i in ids] for ids in tokens.written.tolist()], dtype=object)
            behind = np.arange(tokens.length) > self.row[:, None]
            found[name] = (("pair", "position"), np.where(behind, "", words))
        return found

    def about(self) -> dict[str, Any]:
        """What a result says about the pairs."""
        parts = [self.answer, self.row] if self.against is None else [self.answer, self.row, self.against]
        sha = hashlib.sha256((self.base.hash + self.source.hash).encode())
        for name in sorted(set(self.roles) - {END}):
            sha.update(f"\0{name}\0".encode())
            parts += [self.roles[name], self.source_roles[name]]
        parts += [] if self.choices is None else [self.choices]
        for part in parts:
            sha.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        sha.update("\0".join(self.template or ()).encode())
        named = {"source": f"{len(self)} pairs", "prompts": len(self), "length": self.base.length, "notes": []}
        return {**named, "hash": sha.hexdigest(), "base": self.base.about(), "values": self.source.about()}


def pairs(
    base: Any, source: Any, answer: Any, against: Any = None, position: Any = -1, tokenizer: Any = None,
    bos: Any = None, *, roles: Mapping[str, Any] | None = None, source_roles: Mapping[str, Any] | None = None,
    template: Sequence[str] | None = None, choices: Any = None,
) -> Pairs:  # fmt: skip
    """Pairs of prompts for `uw.effects`, `uw.paths` and `uw.bound`.

    Arguments: `base` and `source` strings (one, or a list), chats, what a tokenizer returned, or LongTensors [pair,
    position]; `answer` and `against` a token each, or one for every pair: its id, or the text that continues the base
    prompt by it, such as " Paris" or "s"; `position` the row that is read, one number or one for every pair (without
    padding; −1: the last token); `tokenizer` as transformers has it (`lm.tokenizer`), for texts; `bos` as in `uw.text`;
    `roles` a row of the base prompts by its name, one number or one for every pair, and `source_roles` of the source
    prompts, where it is another one; `template` a label for every pair; `choices` the tokens that an answer is chosen
    from, a list for all pairs or one for each.
    Raises TokensError, naming the pair, for prompts of unequal token counts (unless `source_roles` names every role),
    a token that is not one token, a row outside the prompt, and an answer that is none of its choices.

    Example: `uw.pairs("The Eiffel Tower is in", "The Colosseum is in", " Paris", " Rome", tokenizer=lm.tokenizer)`
    """
    if tokenizer is not None:
        need(tokenizer, "text")
    read, other = (given(part, tokenizer, bos=bos, files=False) for part in (base, source))
    _require_equal(read, other, tokenizer, source_roles)
    row = read_rows(position, read)
    ids = [
        answers(token, read, row, name, tokenizer, _ANY_VOCABULARY)
        for token, name in ((answer, "answer"), (against, "against"))
    ]
    if ids[0] is None:
        raise TokensError("pairs need an answer", expected="a token, or one for every pair")
    if ids[1] is not None and (ids[0] == ids[1]).any():
        raise TokensError("answer and against are the same token", got=f"pair {int((ids[0] == ids[1]).argmax())}")
    chosen = None if choices is None else several(choices, read, row, "a choice", tokenizer, _ANY_VOCABULARY)
    named, theirs = (
        {} if part is None else roles_of(name, part, tokens)
        for name, part, tokens in (("roles", roles, read), ("source_roles", source_roles, other))
    )
    labels: Any = tuple(template) if isinstance(template, list) else template
    return Pairs(read, other, ids[0], ids[1], row, named, theirs, labels, chosen)


def parted(
    pairs: Pairs, by: str | Sequence[str] = "template", share: float = 0.5, seed: int = 0
) -> Bool[np.ndarray, " pair"]:
    """Which pairs the first part has of a `Pairs.split`, which raises as this does."""
    number("share is a part of all labels", share, "above 0 and below 1", lambda share: 0 < share < 1)
    labels = np.array(pairs._labels(by), dtype=object)
    names = sorted(set(labels))
    if len(names) < 2:
        raise TokensError("pairs of one label cannot be split", got=shown(names), fix='split them by="pair"')
    order = np.random.default_rng(whole("seed is a number", seed, 0)).permutation(len(names))
    chosen = {names[i] for i in order[: min(max(1, round(share * len(names))), len(names) - 1)]}
    return np.array([label in chosen for label in labels])


# How the pairs that judge are chosen, where they are not other pairs.
HELD = ("template", "pair")


def learned_from(pairs: Pairs, held: Any, what: str, against: bool = True) -> Bool[np.ndarray, " pair"]:
    """Which pairs `what` is made of, so that the others, or the pairs `held`, judge it.

    Raises TokensError where none have `against`, if it takes that, or no template can be held out; NumericError for
    another way to choose them.
    """
    if against and any(part.against is None for part in (pairs, pairs if isinstance(held, str) else held)):
        raise TokensError(f"{what} of pairs that have against", got="none", fix="give it to uw.pairs")
    if not isinstance(held, str):
        return np.ones(len(pairs), dtype=bool)
    one_of("held", held, HELD, also="other pairs")
    if held == "template" and len({*(pairs.template or ())}) < 2:
        raise TokensError(
            "no template can be held out", got="pairs of one template, or of none", expected="two templates or more",
            fix='give template to uw.pairs, or held="pair", or other pairs as held',
        )  # fmt: skip
    return parted(pairs, held)


def _truths(values: Any) -> bool:
    """Are these truths, and nothing else?"""
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(isinstance(one, (bool, np.bool_)) for one in values)
    )


def _require_labels(template: Any, n: int) -> None:
    if template is None:
        return
    fits = isinstance(template, tuple) and len(template) == n and all(isinstance(part, str) for part in template)
    if not fits or any(plain(part) != part for part in template):
        raise TokensError("template is a label for each pair", got=shown(template), expected=f"{n} printable texts")


def _require_choices(choices: Any, answer: Int[np.ndarray, " pair"]) -> None:
    if choices is None:
        return
    fits = isinstance(choices, np.ndarray) and choices.dtype.kind in "iu" and choices.ndim == 2
    if not fits or len(choices) != len(answer) or choices.shape[1] < 2:
        raise TokensError("choices are tokens", got=shown(choices), expected="integers [pair, option], two or more")
    among: Bool[np.ndarray, "pair option"] = choices == answer[:, None]
    ordered = np.sort(choices, 1)
    wrong = np.flatnonzero((among.sum(1) != 1) | (ordered[:, 1:] == ordered[:, :-1]).any(1))
    if len(wrong):
        got = f"answer {answer[wrong[0]]}, choices {choices[wrong[0]].tolist()}"
        raise TokensError(f"choices of pair {wrong[0]} differ, and its answer is one of them", got=got)


def _require_equal(base: Tokens, source: Tokens, tokenizer: Any, source_roles: Any) -> None:
    if len(base) != len(source):
        raise TokensError(
            "every base prompt needs one source prompt", got=f"{len(base)} and {counted(len(source), 'prompt')}"
        )
    for i in np.flatnonzero(base.lengths != source.lengths) if source_roles is None else ():
        texts = [spelled(part.written[i, : part.lengths[i]], tokenizer) for part in (base, source)]
        raise TokensError(
            f"the prompts of pair {i} have unequal numbers of tokens",
            got=f"{base.lengths[i]} ({texts[0]}) and {source.lengths[i]} ({texts[1]})",
            expected="equal numbers, so that a position means the same in both, or roles and source_roles",
        )
