"""When is a write read, and its space used again? Rules as data: effect, interval, typical writes, many readers.

Every reader is asked the same of typical writes in the write's place; how many of those that stand out would do so by
chance is what these say, by target–decoy competition over all readers. Documents are independent, prompts of one are
not. (facts: erasure on real models, §2 and §3)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from unwrite.stats.verdicts import Interval, estimate, from_others, left_out, ratio, special


@dataclass(frozen=True)
class Enough:
    """What is asked for before it is said that something is read, or used again."""

    documents: int = field(default=5, metadata={"why": "documents are independent: fewer give no interval"})
    size: float = field(default=0.1, metadata={"why": "a reader whose write changes by less than a tenth is none"})
    times: float = field(default=1.5, metadata={"why": "and surely by half as much again as without a typical write"})
    use: float = field(default=0.02, metadata={"why": "what fills the space has this part of the write's energy"})
    q: float = field(default=0.2, metadata={"why": "of five that are named one may be so by chance"})


ENOUGH = Enough()
_NONE = -1e9


@dataclass(frozen=True, eq=False)
class StandsOut:
    """A number for everything that was asked, with its interval, beside that of typical writes."""

    found: Interval
    typical: Float[np.ndarray, " asked"]
    q: Float[np.ndarray, " asked"]
    surely: Bool[np.ndarray, " asked"]


def read(
    change: Float[np.ndarray, "document put asked"], whole: Float[np.ndarray, "document asked"], rules: Enough = ENOUGH
) -> StandsOut:
    """√(Σ‖change‖² / Σ‖whole‖²), `put` being the write itself and then typical ones: who surely reads it?"""
    sets = np.sqrt(ratio(left_out(change), left_out(whole)[:, None]))
    found, level = estimate(sets[:, 0]), np.median(sets[:, 1:], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(sets[0])
        apart, others = logs[0] - np.median(logs[1:], 0), from_others(logs[1:].T)
    # A change that is too small for a reader competes with none, whosever it is.
    q = _competition(*(np.where(size >= rules.size, part, _NONE)
                       for size, part in ((sets[0, 0], apart), (sets[0, 1:].T, others))))  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        more = estimate(sets[:, 0] - rules.times * level)
    surely = (len(change) >= rules.documents) & (found.value >= rules.size) & (more.low > 0) & (q <= rules.q)
    return StandsOut(found, level[0], q, surely)


def reused(
    use: Float[np.ndarray, "document asked"],
    held: Float[np.ndarray, "document put asked"],
    energy: Float[np.ndarray, " document"],
    elsewhere: Float[np.ndarray, "document asked"],
    rules: Enough = ENOUGH,
) -> StandsOut:
    """By how much more is written into the space because it was freed: who surely uses it again?

    `use` is written there in the clean run, `held` where erasers' parts along the write are held out, and then along
    typical ones; `elsewhere` is the change in spaces of other heads. All in units of the write's `energy`.
    """
    over = left_out(energy)
    freed = ratio(left_out(use)[:, None] - left_out(held), over[:, None, None])
    others = ratio(left_out(elsewhere), over[:, None])
    found, more = estimate(freed[:, 0]), estimate(freed[:, 0] - others)
    q = _competition(freed[0, 0], freed[0, 1:].T)
    surely = (len(use) >= rules.documents) & (found.value >= rules.use) & (found.low > 0) & (more.low > 0)
    return StandsOut(found, np.median(freed[0, 1:], 0), q, surely & (q <= rules.q))


def _competition(
    own: Float[np.ndarray, " asked"], decoys: Float[np.ndarray, "asked draw"]
) -> Float[np.ndarray, " asked"]:
    """q of everything that is asked: the larger the rarer."""
    finite = np.where(np.isfinite(own), own, np.nan)
    return special(-finite, -decoys[np.isfinite(decoys)])
