"""What does a long run consist of, how long will each stage take, and how many prompts fit into a budget?

Said before anything long is run: a few prompts show which writes are material, a trial of the model itself what they
cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unwrite.errors import NumericError
from unwrite.files import write
from unwrite.methods.survival import fitted
from unwrite.model.view import Model
from unwrite.prompts.given import by_name
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.trial import Taken
from unwrite.studies.foreseen import SEEN, material, of_audit, stages
from unwrite.studies.keep import PLAN

# An audit of so many prompts, the most that fit; who wants more says -n.
_SIZES = (12, 16, 24, 32, 48, 64, 96)
# Where not even the fewest of full length fit.
_SHORTER = (32, 24)


@dataclass(frozen=True)
class Planned:
    """Prompts and their length, how many writes are taken out, seconds by stage, and what was allowed (None: all)."""

    n: int
    length: int
    writers: int
    seconds: Mapping[str, float]
    budget: float | None = None

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def save(self, folder: str | Path | None) -> None:
        """Keep it in a run's folder, if it has one, so that the same command goes on with the same prompts."""
        if folder is not None:
            write(Path(folder) / PLAN, lambda place: place.write_text(json.dumps(asdict(self)), "utf-8"))


def kept(folder: str | Path | None, budget: float | None) -> Planned | None:
    """The plan that an earlier start of the same command kept; None where there is none that can be read."""
    try:
        found = None if folder is None else Planned(**json.loads((Path(folder) / PLAN).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found is not None and found.budget == budget else None


def planned(lm: Model, read: Callable[[int, int], Any], length: int, budget: float) -> Planned:
    """The largest audit of prompts of `length` tokens that a budget of seconds allows, of texts that `read` gives: so
    many prompts, so long. Where none of that length fits, prompts are shorter.

    Raises NumericError where not even the smallest fits.
    """
    lengths, least = [length, *(short for short in _SHORTER if short < length)], float("inf")
    for tokens in lengths:
        writers = material(lm, next(iter(by_name(read(SEEN, tokens)).values())))
        taken = stages(lm, tokens, writers)
        fits = [plan for size in _SIZES if (plan := _plan(size, tokens, writers, taken, budget)).total <= budget]
        if fits:
            return fits[-1]
        least = _plan(_SIZES[0], tokens, writers, taken, budget).total
    raise NumericError(
        "the budget is too small for an audit", got=f"{budget:.0f} s",
        expected=f"about {least:.0f} s for {_SIZES[0]} prompts of {lengths[-1]} tokens", fix="allow more with --budget",
    )  # fmt: skip


def _plan(n: int, length: int, writers: int, taken: Mapping[str, Taken], budget: float) -> Planned:
    return Planned(n, length, writers, of_audit(taken, n, writers), budget)


def removals(lm: Model, tokens: Tokens, budget: float | None, **asked: Any) -> Planned:
    """What `uw.survival` does with these prompts, or with as many of them as a budget of seconds allows.

    `asked` as there. Raises NumericError where not even one prompt fits.
    """
    found = fitted(lm, tokens, **asked, budget=budget)
    stage = {f"survival of {found.writers}": found.seconds}
    return Planned(found.n, tokens.length, found.writers, stage, budget)
