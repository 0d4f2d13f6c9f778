"""Which facts does a text state? Predicates with arguments, in JSON that may be broken, as subject–predicate–object.

    CapitalOf(Germany, Berlin)       (Germany, CapitalOf, Berlin)
    Won(Curie, Physics, Chemistry)   (Curie, Won, Physics) and (Curie, Won, Chemistry)
    IsCapitalOf(Germany, Berlin)     (Berlin, IsCapitalOf, Germany): with is or has, the last comes first
    IsCity(Berlin)                   (Berlin, Is, City)
    ¬(A(x, y) ∧ B(x, z))             both, negated; so are ¬A(x, y), NotA(x, y) and A(x, y, False)

What is none of that is left out, and counted. The notation is that of Bronzini et al. 2024 (arXiv 2404.03623).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_BETWEEN = re.compile(r"[∧∨≠]|&&|\|\|")
_FACT = re.compile(r"(\w+)\s*\(([^()]*)\)")
_NEGATED = re.compile(r"(?:¬|~)\s*\(((?:[^()]|\([^()]*\))*)\)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+")
_OF_STATE = ("is", "has", "are", "have")
_CLOSES = {"{": "}", "[": "]"}


@dataclass(frozen=True)
class Triple:
    """A subject of which something is said, or (`negated`) denied."""

    subject: str
    predicate: str
    object: str
    negated: bool = False


@dataclass(frozen=True)
class Statement:
    """What a text told: its facts, its verdict if it has one, and how often it was mended; `whole` is whether it could
    be read at all, and `dropped` how many of its facts could not."""

    facts: tuple[Triple, ...] = ()
    label: bool | None = None
    repairs: int = 0
    whole: bool = False
    dropped: int = 0


def told(text: str) -> Statement:
    """What a text says as `{"label": true, "facts": ["Predicate(subject, object)", …]}`, mended at most three times."""
    read, repairs = _object(text)
    if read is None:
        return Statement(repairs=repairs)
    listed = read.get("facts", [])
    listed = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
    each = [triples(part) if isinstance(part, str) else [] for part in listed]
    label = read.get("label")
    return Statement(
        tuple(dict.fromkeys(fact for facts in each for fact in facts)), label if isinstance(label, bool) else None,
        repairs, True, sum(not facts for facts in each),
    )  # fmt: skip


def triples(text: str) -> list[Triple]:
    """The triples of one line of facts; none where it states none."""
    while (found := _NEGATED.search(text)) is not None:
        inside = _FACT.sub(lambda fact: f"{_denied(fact[1])}({fact[2]})", found[1])
        text = text[: found.start()] + inside + text[found.end() :]
    text = re.sub(r"[¬~]\s*(\w+)\s*\(", lambda fact: f"{_denied(fact[1])}(", text)
    return [
        triple for part in _BETWEEN.split(text) for fact in _FACT.finditer(part) for triple in _of(fact[1], fact[2])
    ]


def _denied(predicate: str) -> str:
    """A predicate with Not in front, behind a leading is or has; without it where it had one."""
    words = _words(predicate)
    at = int(words[0].lower() in _OF_STATE) if words else 0
    if words[at : at + 1] == ["Not"]:
        return "".join(words[:at] + words[at + 1 :])
    return "".join([*words[:at], "Not", *(word[:1].upper() + word[1:] for word in words[at:])])


def _words(name: str) -> list[str]:
    return _WORD.findall(name)


def _of(predicate: str, inside: str) -> Iterator[Triple]:
    """The triples of one predicate with its arguments."""
    given = [part.strip().strip("\"'").replace("_", " ").strip() for part in inside.split(",")]
    truths = [part.lower() for part in given if part.lower() in ("true", "false")]
    entities = [part for part in given if part and part.lower() not in ("true", "false") and not _vague(part)]
    words, negated = _words(predicate), truths.count("false") % 2 == 1
    if not entities or not words:
        return
    if "Not" in words:
        words, negated = [word for word in words if word != "Not"], not negated
    first, *rest = entities
    leads = words[0].lower() in _OF_STATE
    if not rest:
        verb, about = (words[0].capitalize(), words[1:]) if leads else ("Is", words)
        if about:
            yield Triple(first, verb, " ".join(about), negated)
        return
    swapped = any(word.lower() in _OF_STATE for word in words)
    for other in rest:
        yield Triple(*((other, "".join(words), first) if swapped else (first, "".join(words), other)), negated)


def _vague(argument: str) -> bool:
    return re.search(r"\betc\b|\.\.\.|…", argument.lower()) is not None


def _object(text: str) -> tuple[dict[str, Any] | None, int]:
    """What JSON there is, mended step by step, and after how many steps."""
    for repairs, mend in enumerate((lambda text: text, *_REPAIRS)):
        text = mend(text)
        try:
            read = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            continue
        if isinstance(read, dict):
            return read, repairs
    return None, len(_REPAIRS)


def _alone(text: str) -> str:
    """Without what stands before the first brace and, once all are closed, behind the last."""
    start = text.find("{")
    if start < 0:
        return text
    try:
        return text[start : start + json.JSONDecoder(strict=False).raw_decode(text[start:])[1]]
    except (ValueError, RecursionError):
        return text[start:]


def _closed(text: str) -> str:
    """With the quotes and brackets that are open closed, as where a text was cut off."""
    is_open, quoted, skip = [], False, False
    for character in text:
        if skip:
            skip = False
        elif character == "\\":
            skip = quoted
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in _CLOSES:
            is_open.append(_CLOSES[character])
        elif not quoted and is_open and character == is_open[-1]:
            is_open.pop()
    return text.rstrip(", \n") + '"' * quoted + "".join(reversed(is_open))


def _behind_quotes(text: str) -> str:
    """Without what stands behind the last text in quotes, then closed: an item that was never one."""
    return _closed(text[: text.rfind('"') + 1])


_REPAIRS: tuple[Callable[[str], str], ...] = (_alone, _closed, _behind_quotes)
