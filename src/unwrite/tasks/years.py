"""Which year comes later? Greater-than (Hanna et al. 2023, arXiv 2305.00586)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from unwrite.errors import TokensError
from unwrite.prompts.encode import need
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import bare
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

TEMPLATES = (
    "The {span} lasted from the year 17{year} to the year 17",
    "The {span} began in 17{year} and ended in 17",
    "The {span} went on from 17{year} until 17",
)


def _scene(pieces: int, draw: Draw) -> Scene:
    """A year whose last `pieces` digits are one token: it has later and earlier ones in its century."""
    template = draw.turn(range(len(TEMPLATES)))
    low, high = (2, 8) if pieces == 1 else (12, 88)
    year = int(draw.rng.integers(low, high))
    later, earlier = int(draw.rng.integers(year + 1, 10**pieces)), int(draw.rng.integers(0, year))
    text = (
        TEMPLATES[template]
        if pieces == 2
        else TEMPLATES[template].replace("{year}", f"{{year}}{draw.rng.integers(2, 9)}")
    )
    written = tuple(f"{number:0{pieces}}" for number in (year, later, earlier))
    return Scene(f"t{template}", text, {"span": draw.one("span"), "year": written[0]}, written[1:])


def _first(pieces: int, scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"year": f"{1:02}" if pieces == 2 else "0"}, scene.options[1]


def _task(pieces: int) -> Task:
    first = Change(
        "the year is the first of its century or decade: every later one is right", ("year",), partial(_first, pieces)
    )
    says = "Something lasted from a year to a year: a later one?"
    return Task("greater_than", says, ("span",), {"first": first}, partial(_scene, pieces))


TASK = _task(2)


def greater_than(
    n: int, tokenizer: Any, seed: int = 0, change: str = "first", *, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """A span of years: "The war lasted from the year 1732 to the year 17" → a later year.

    Three templates. The year's last two digits are asked for where the tokenizer has them as one token, else the decade
    alone; the answer is one of the later ones and `against`, the only other choice, one of the earlier ones, so a pair
    is solved where the later one is preferred. Roles: "span", "year" (that token), "end". Arguments as in
    `uw.tasks.ioi`; `change` "first": under it both are right; `words` of the kind "span".
    Raises as `uw.tasks.ioi` does. Source: Hanna et al. 2023, arXiv 2305.00586.

    Example: `uw.tasks.greater_than(50, lm.tokenizer)`
    """
    need(tokenizer, "the task greater_than")
    return made(_task(_pieces(tokenizer)), n, tokenizer, seed, change, words, bos)


def _pieces(tokenizer: Any) -> int:
    """How many digits of a year are one token behind its century."""
    before = bare(" the year 17", tokenizer)
    for pieces, written in ((2, [f"{year:02}" for year in range(1, 100)]), (1, [f"{ten}5" for ten in range(10)])):
        found = [bare(f" the year 17{year}", tokenizer) for year in written]
        if all(ids[: len(before)] == before and len(ids) == len(before) + 3 - pieces for ids in found):
            return pieces
    raise TokensError(
        "this tokenizer cannot fill year of greater_than", got="years whose last digits are cut otherwise",
        expected="a token of two digits, or each digit its own", fix="take another task",
    )  # fmt: skip
