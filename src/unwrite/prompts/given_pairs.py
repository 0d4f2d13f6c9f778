"""What did a person hand over as pairs, and which are they? Mappings, tuples, and files, errors naming the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unwrite.errors import TokensError, shown
from unwrite.prompts.pairs import MADE, Pairs, pairs
from unwrite.prompts.texts import read_text


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
        expected="what uw.pairs returns, or (base, source, answer)", fix=MADE,
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
