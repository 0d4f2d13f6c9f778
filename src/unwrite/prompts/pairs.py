"""Which two prompts are compared, and what is asked of them?

The base prompt is the one that is run and patched; the source prompt is where the values come from. Both have the same
number of tokens, so that a position means the same in both.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from unwrite.errors import TokensError, counted, shown
from unwrite.prompts.answers import answers
from unwrite.prompts.encode import need
from unwrite.prompts.given import given
from unwrite.prompts.texts import read_text
from unwrite.prompts.tokens import Tokens, read_rows, spelled

_ANY_VOCABULARY = 2**31
_MADE = "uw.pairs(…, tokenizer=lm.tokenizer)"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source prompts of equal lengths, with the answer, what it is compared to, and the row that is read."""

    base: Tokens
    source: Tokens
    answer: Int[np.ndarray, " pair"]
    against: Int[np.ndarray, " pair"] | None
    row: Int[np.ndarray, " pair"]

    def __post_init__(self) -> None:
        for name in ("base", "source", "answer", "against", "row"):
            part, ids = getattr(self, name), name not in ("base", "source")
            if name == "against" and part is None:
                continue
            fits = isinstance(part, np.ndarray) and part.dtype.kind in "iu" and part.ndim == 1
            fits = fits if ids else isinstance(part, Tokens)
            if not fits or len(part) != len(self.base):
                expected = "one integer for each pair" if ids else "Tokens, a prompt for each pair"
                raise TokensError(f"pairs need {name} of another kind", got=shown(part), expected=expected, fix=_MADE)

    def __len__(self) -> int:
        return len(self.base)

    @cached_property
    def first(self) -> Int[np.ndarray, " pair"]:
        """The first position at which the two prompts differ; before it no node of one differs from the other's."""
        differs = (self.base.ids != self.source.ids) & (np.arange(self.base.length) < self.base.lengths[:, None])
        return np.where(differs.any(1), differs.argmax(1), self.base.lengths)

    def check(self, vocabulary: int, context: int | None) -> None:
        """Raise TokensError unless a model with this many embedding rows and positions can read and answer."""
        for part in (self.base, self.source):
            part.check(vocabulary, context)
        for name, ids in (("answer", self.answer), ("against", self.against)):
            if ids is not None and (ids >= vocabulary).any():
                raise TokensError(f"{name} is outside the vocabulary", got=ids.max(), expected=f"0 to {vocabulary - 1}")

    def words(self, tokenizer: Any) -> dict[str, list[str]]:
        """The prompts up to the row that is read, and the tokens that are asked for, as texts, pair by pair."""
        if tokenizer is not None:
            need(tokenizer, "what tokens say")
        asked = {"answer": self.answer} | ({} if self.against is None else {"against": self.against})
        words = {name: [spelled([i], tokenizer) for i in ids] for name, ids in asked.items()}
        for name, tokens in (("base_text", self.base), ("source_text", self.source)):
            words[name] = [spelled(ids[: n + 1], tokenizer) for ids, n in zip(tokens.written, self.row, strict=True)]
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
        for part in parts:
            sha.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        named = {"source": f"{len(self)} pairs", "prompts": len(self), "length": self.base.length, "notes": []}
        return {**named, "hash": sha.hexdigest(), "base": self.base.about(), "values": self.source.about()}


def pairs(
    base: Any, source: Any, answer: Any, against: Any = None, position: Any = -1, tokenizer: Any = None, bos: Any = None
) -> Pairs:
    """Pairs of prompts for `uw.effects`, `uw.paths` and `uw.bound`.

    Arguments: `base` and `source` strings (one, or a list), chats, what a tokenizer returned, or LongTensors [pair,
    position]; `answer` and `against` a token each, or one for every pair: its id, or the text that continues the base
    prompt by it, such as " Paris" or "s"; `position` the row that is read, one number or one for every pair (without
    padding; −1: the last token); `tokenizer` as transformers has it (`lm.tokenizer`), for texts; `bos` as in `uw.text`.
    Raises TokensError, naming the pair, for prompts of unequal token counts, a token that is not one token, and a row
    outside the prompt.

    Example: `uw.pairs("The Eiffel Tower is in", "The Colosseum is in", " Paris", " Rome", tokenizer=lm.tokenizer)`
    """
    if tokenizer is not None:
        need(tokenizer, "text")
    read, other = (given(part, tokenizer, bos=bos, files=False) for part in (base, source))
    _require_equal(read, other, tokenizer)
    row = read_rows(position, read)
    ids = [
        answers(token, read, row, name, tokenizer, _ANY_VOCABULARY)
        for token, name in ((answer, "answer"), (against, "against"))
    ]
    if ids[0] is None:
        raise TokensError("pairs need an answer", expected="a token, or one for every pair")
    if ids[1] is not None and (ids[0] == ids[1]).any():
        raise TokensError("answer and against are the same token", got=f"pair {int((ids[0] == ids[1]).argmax())}")
    return Pairs(read, other, ids[0], ids[1], row)


def pairs_of(source: Any, tokenizer: Any, bos: int | bool | None = None) -> Pairs:
    """Whatever a method was given, as Pairs.

    Arguments: `source` Pairs; what `pairs` takes, as a dict by name or a tuple in its order; a list of such dicts; a
    file as `read_pairs` takes it. Raises TokensError for anything else, and as these do.
    """
    if isinstance(source, Pairs):
        if bos is not None:
            raise TokensError("bos is for text, and these pairs are token ids", fix="pass bos to uw.pairs")
        return source
    if isinstance(source, (str, Path)):
        return read_pairs(source, tokenizer, bos)
    if isinstance(source, tuple) and 3 <= len(source) <= 5:
        return pairs(*source, tokenizer=tokenizer, bos=bos)
    if isinstance(source, Mapping):
        _require_names(source, [name for name in _NEEDED if name not in source], "this mapping")
        return pairs(**source, tokenizer=tokenizer, bos=bos)
    if isinstance(source, list) and source and all(isinstance(part, Mapping) for part in source):
        return _together([(f"pair {i}", part) for i, part in enumerate(source)], tokenizer, bos)
    raise TokensError(
        "these are no pairs of prompts", got=shown(source),
        expected="what uw.pairs returns, or (base, source, answer)", fix=_MADE,
    )  # fmt: skip


def read_pairs(path: str | Path, tokenizer: Any, bos: int | bool | None = None) -> Pairs:
    """Pairs from a CSV file (with a header) or from JSON lines: base, source, answer, and against and position or not.

    Raises TokensError, naming the line, for what is missing or unknown, and as `pairs` does.
    """
    file = Path(path)
    text = read_text(file)
    lines = _csv(text) if file.suffix == ".csv" else _json_lines(text)
    if not lines:
        raise TokensError(f"{file} holds no pair", expected="a line for each")
    return _together([(f"line {number} of {file}", line) for number, line in lines], tokenizer, bos)


def _together(lines: list[tuple[str, Mapping[str, Any]]], tokenizer: Any, bos: Any) -> Pairs:
    for place, line in lines:
        _require_pair(line, place)
    columns = {name: [line.get(name) for _, line in lines] for name in (*_NEEDED, "against")}
    against = [None if _missing(token) else token for token in columns["against"]]
    position = [_position(place, line.get("position")) for place, line in lines]
    asked = None if all(token is None for token in against) else against
    return pairs(columns["base"], columns["source"], columns["answer"], asked, position, tokenizer, bos)


def _require_pair(line: Mapping[str, Any], place: str) -> None:
    wrong = [name for name in _NEEDED if _missing(line.get(name))]
    wrong += [name for name in ("base", "source") if not isinstance(line.get(name, ""), (str, list, tuple))]
    _require_names(line, wrong, place)


def _require_names(line: Mapping[str, Any], missing: list[str], place: str) -> None:
    if wrong := missing or [name for name in line if name not in (*_NEEDED, *_OPTIONAL)]:
        expected = f"{', '.join(_NEEDED)}; and {' or '.join(_OPTIONAL)}"
        raise TokensError(f"{place} is not a pair", got=", ".join(map(str, wrong)), expected=expected)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


_NEEDED, _OPTIONAL = ("base", "source", "answer"), ("against", "position")
_Lines = list[tuple[int, dict[str, Any]]]


def _csv(text: str) -> _Lines:
    reader = csv.DictReader(io.StringIO(text))
    return [(reader.line_num, dict(line)) for line in reader]


def _json_lines(text: str) -> _Lines:
    found: _Lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                read = json.loads(line)
            except ValueError as error:
                raise TokensError(f"line {number} is not JSON", got=error, expected="an object on each line") from None
            if not isinstance(read, dict):
                raise TokensError(f"line {number} is no object", got=type(read).__name__, expected='{"base": …}')
            found.append((number, read))
    return found


def _position(place: str, given: Any) -> int:
    if given in (None, ""):
        return -1
    try:
        return int(given)
    except (TypeError, ValueError, OverflowError):
        raise TokensError(f"{place} has no position", got=shown(given), expected="an integer") from None


def _require_equal(base: Tokens, source: Tokens, tokenizer: Any) -> None:
    if len(base) != len(source):
        raise TokensError(
            "every base prompt needs one source prompt", got=f"{len(base)} and {counted(len(source), 'prompt')}"
        )
    for i in np.flatnonzero(base.lengths != source.lengths):
        texts = [spelled(part.written[i, : part.lengths[i]], tokenizer) for part in (base, source)]
        raise TokensError(
            f"the prompts of pair {i} have unequal numbers of tokens",
            got=f"{base.lengths[i]} ({texts[0]}) and {source.lengths[i]} ({texts[1]})",
            expected="equal numbers, so that a position means the same in both",
        )
