"""What does a task ask of a model? Scenes drawn by a seed, in words that a tokenizer has, and what else they could be.

A scene is a text with named slots and the words in them, each one token; every slot is a role of the pairs. A change
says which words of a scene become others, so that a source prompt differs from its base prompt there and nowhere else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

import numpy as np

from unwrite.errors import TokensError, counted, one_of, plain, shown, whole
from unwrite.prompts.encode import need, prompts
from unwrite.prompts.pairs import Pairs, pairs
from unwrite.prompts.tokens import Tokens, bare

# A word, or several that belong together.
Filler = str | tuple[str, ...]
Words = Mapping[str, Sequence[Any]]
_TRIES, _MOST = 50, 100_000
# After this text a word is one token or is not.
_BEFORE = "the"


@dataclass(frozen=True)
class Scene:
    """A prompt: `text` with {slots}, the `words` in them, and the `options` to go on with, the right one first.

    `label` says of which template it is.
    """

    label: str
    text: str
    words: Mapping[str, str]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A counterfactual: what it `says`, which roles it `moves`, and how.

    `make` gives the words that become others and, as a text that goes on, what the base prompt must say once what
    differs has its source value.
    """

    says: str
    moves: tuple[str, ...]
    make: Callable[[Scene, Draw], tuple[Mapping[str, str], str]]


@dataclass(eq=False)
class Draw:
    """What chance gives to pair number `index` of a task."""

    task: str
    rng: np.random.Generator
    words: Mapping[str, Sequence[Filler]]
    index: int = 0

    def turn(self, values: Sequence[Any]) -> Any:
        """One of some values, each as often as the others; several turns go through all combinations."""
        self.index, place = divmod(self.index, len(values))
        return values[place]

    def some(self, kind: str, k: int, without: Sequence[Filler] = ()) -> list[Any]:
        """Different fillers of a kind, or of two ("female|male"). Raises TokensError where there are not as many."""
        listed = [part for one in kind.split("|") for part in self.words[one]]
        known = [part for part in listed if part not in without]
        if len(known) < k:
            raise TokensError(
                f"{self.task} needs words of the kind {kind} that are one token each",
                got=f"{len(listed)} for this tokenizer", expected=f"{k + len(listed) - len(known)}",
                fix=f"give others by words={{{kind.split('|')[0]!r}: […]}}",
            )  # fmt: skip
        return [known[i] for i in self.rng.permutation(len(known))[:k]]

    def one(self, kind: str, without: Sequence[Filler] = ()) -> Any:
        """A filler of a kind."""
        return self.some(kind, 1, without)[0]

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        """The values in another order."""
        return [values[i] for i in self.rng.permutation(len(values))]


@dataclass(frozen=True)
class Task:
    """A task: what it `says`, the `kinds` of words that it takes, its `changes`, and how a `scene` of it is drawn."""

    name: str
    says: str
    kinds: tuple[str, ...]
    changes: Mapping[str, Change]
    scene: Callable[[Draw], Scene] = field(repr=False)

    def example(self, seed: int = 0) -> str:
        """A prompt of it with what goes on, in words of which no tokenizer has been asked."""
        scene = self.scene(Draw(self.name, np.random.default_rng([seed, 0]), _listed(self, None)))
        return scene.text.format_map(scene.words) + scene.options[0]


def made(
    task: Task, n: int, tokenizer: Any, seed: int, change: str, words: Words | None, bos: int | bool | None
) -> Pairs:
    """`n` different pairs of a task. Pair i is the same whatever `n` is.

    Raises NumericError for an unknown change, TokensError where this tokenizer cannot fill the template.
    """
    whole("n is a number of pairs", n, 1, _MOST)
    whole("seed is a number", seed, 0)
    one_of("change", change, [*task.changes])
    need(tokenizer, f"the task {task.name}")
    lists = _listed(task, words)
    single = {kind: _single(part, tokenizer) for kind, part in lists.items()}
    drawn = _drawn(task, n, seed, change, single)
    kept = ", ".join(f"{len(single[kind])} of {len(part)} words of the kind {kind}" for kind, part in lists.items())
    named = {"source": f"{task.name} ({change}, seed {seed})", "notes": (f"one token each: {kept}",)}
    scenes, others = [scene for scene, *_ in drawn], [other for _, other, _ in drawn]
    base, source = (
        replace(prompts([_told(scene)[0] for scene in part], tokenizer, bos), **named) for part in (scenes, others)
    )
    return pairs(
        base, source, [scene.options[0] for scene in scenes], [against for *_, against in drawn], tokenizer=tokenizer,
        roles=_roles(task, base, scenes, tokenizer), source_roles=_roles(task, source, others, tokenizer),
        template=[scene.label for scene in scenes], choices=[list(scene.options) for scene in scenes],
    )  # fmt: skip


def _drawn(
    task: Task, n: int, seed: int, change: str, words: Mapping[str, Sequence[Filler]]
) -> list[tuple[Scene, Scene, str]]:
    """Base and source scenes, and what is compared to, no pair twice."""
    found: dict[tuple[str, str], tuple[Scene, Scene, str]] = {}
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        for _ in range(_TRIES):
            draw = Draw(task.name, rng, words, index)
            scene = task.scene(draw)
            moved, against = task.changes[change].make(scene, draw)
            source = replace(scene, words={**scene.words, **moved})
            key = _told(scene)[0], _told(source)[0]
            if key not in found and key[0] != key[1]:
                found[key] = scene, source, against
                break
        else:
            raise TokensError(
                f"there are not so many different pairs of {task.name} ({change})", got=f"n={n}",
                expected=f"about {len(found)}", fix="ask for fewer, or give more words",
            )  # fmt: skip
    return list(found.values())


def _told(scene: Scene) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text of a scene, and from where to where in it the word of each slot goes, the space before it included."""
    text, spans = "", {}
    for literal, slot, _, _ in Formatter().parse(scene.text):
        text += literal
        if slot is not None:
            spans[slot] = len(text) - text.endswith(" "), len(text) + len(scene.words[slot])
            text += scene.words[slot]
    return text, spans


def _roles(task: Task, tokens: Tokens, scenes: Sequence[Scene], tokenizer: Any) -> dict[str, list[int]]:
    """The row of the one token of every slot. Raises TokensError for a word that is another number of tokens."""
    found: dict[str, list[int]] = {}
    for scene, length in zip(scenes, tokens.lengths.tolist(), strict=True):
        text, spans = _told(scene)
        ids = bare(text, tokenizer)
        for slot, (start, end) in spans.items():
            first, last = (bare(text[:place], tokenizer) for place in (start, end))
            if ids[: len(last)] != last or last[:-1] != first:
                raise TokensError(
                    f"this tokenizer cannot fill {slot} of {task.name}", got=f"{shown(plain(text[start:end]))} in "
                    f"“{plain(text[max(0, start - 20) : end + 10])}” is {counted(len(last) - len(first), 'token')}",
                    expected="one token of its own", fix="give words of which each is one token, or take another task",
                )  # fmt: skip
            found.setdefault(slot, []).append(length - len(ids) + len(last) - 1)
    return found


@cache
def _own() -> dict[str, tuple[Filler, ...]]:
    text = files("unwrite.tasks").joinpath("words.toml").read_text(encoding="utf-8")
    return {
        kind: tuple(tuple(part) if isinstance(part, list) else part for part in listed)
        for kind, listed in tomllib.loads(text).items()
    }


def _listed(task: Task, words: Any) -> dict[str, tuple[Filler, ...]]:
    """The words of every kind that a task takes, some of them the caller's own."""
    if words is not None and not isinstance(words, Mapping):
        raise TokensError("words are lists by their kind", got=shown(words), expected=", ".join(task.kinds))
    given = {} if words is None else dict(words)
    if odd := [kind for kind in given if kind not in task.kinds]:
        raise TokensError(f"{task.name} has no such kind of words", got=shown(odd[0]), expected=", ".join(task.kinds))
    return {kind: _checked(kind, given[kind]) if kind in given else _own()[kind] for kind in task.kinds}


def _checked(kind: str, listed: Any) -> tuple[Filler, ...]:
    """A caller's own words, in the shape of ours."""
    like = _own()[kind][0]
    number = 1 if isinstance(like, str) else len(like)
    rows: list[Any] = list(listed) if isinstance(listed, (list, tuple)) else [None]
    rows = [(row,) if isinstance(row, str) else row for row in rows]
    for row in rows:
        fits = isinstance(row, (list, tuple)) and len(row) == number
        if not fits or not all(isinstance(part, str) and part.isprintable() and part.split() == [part] for part in row):
            expected = "a list of words" if number == 1 else f"lists of {number} words, such as {shown(list(like))}"
            raise TokensError(f"words of the kind {kind} cannot be these", got=shown(listed), expected=expected)
    return tuple(dict.fromkeys(row[0] if number == 1 else tuple(row) for row in rows))


def _single(listed: Sequence[Filler], tokenizer: Any) -> list[Filler]:
    """Those of which every word is one token after a space."""
    before = bare(_BEFORE, tokenizer)

    def one(word: str) -> bool:
        ids = bare(f"{_BEFORE} {word}", tokenizer)
        return ids[:-1] == before

    return [part for part in listed if all(map(one, (part,) if isinstance(part, str) else part))]
