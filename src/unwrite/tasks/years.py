"""Which year comes later? Greater-than (Hanna et al. 2023, arXiv 2305.00586)."""

from __future__ import annotations

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


# Fewer years of two digits are too few to draw from.
_FEWEST = 30


def _scene(years: tuple[str, ...], draw: Draw) -> Scene:
    """A year of which the last digits, or the decade, are one of `years`, and a later and an earlier one of these."""
    template, at = draw.turn(range(len(TEMPLATES))), int(draw.rng.integers(1, len(years) - 1))
    later, earlier = int(draw.rng.integers(at + 1, len(years))), int(draw.rng.integers(0, at))
    text = TEMPLATES[template]
    if len(years[0]) == 1:  # the last digit is a token by itself, and not asked for
        text = text.replace("{year}", f"{{year}}{draw.rng.integers(2, 9)}")
    return Scene(f"t{template}", text, {"span": draw.one("span"), "year": years[at]}, (years[later], years[earlier]))


def _task(years: tuple[str, ...]) -> Task:
    first = Change(
        "the first year of the century: every later one is right", ("year",),
        lambda scene, _: ({"year": years[0]}, scene.options[1]),
    )  # fmt: skip
    says = "Something lasted from a year to a year: a later one?"
    return Task("greater_than", says, ("span",), {"first": first}, partial(_scene, years))


TASK = _task(tuple(f"{year:02}" for year in range(1, 100)))


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
    return made(_task(_years(tokenizer)), n, tokenizer, seed, change, words, bos)


def _years(tokenizer: Any) -> tuple[str, ...]:
    """Last digits of years that are one token behind their century: two of them, or else the decade's."""
    before = bare(" the year 17", tokenizer)

    def behind(year: str) -> int:
        ids = bare(f" the year 17{year}", tokenizer)
        return len(ids) - len(before) if ids[: len(before)] == before else 0

    two = tuple(year for year in (f"{number:02}" for number in range(1, 100)) if behind(year) == 1)
    one = tuple(str(ten) for ten in range(10) if behind(f"{ten}5") == 2)
    if len(two) < _FEWEST and len(one) < 10:
        raise TokensError(
            "this tokenizer cannot fill year of greater_than", got="years whose last digits are cut otherwise",
            expected="a token of two digits, or each digit its own", fix="take another task",
        )  # fmt: skip
    return two if len(two) >= _FEWEST else one
