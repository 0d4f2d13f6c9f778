"""When does a subspace carry a variable, and when is it an illusion? Rules as data, from pairs that it was not made of.

An effect is a part of the clean difference, Σ (clean − patched) / Σ clean of ℓ[answer] − ℓ[against]: 1 where it is
gone, above where it is turned (FLDD / 100); a share is a part of the subspace's own effect. Intervals are the
jackknife's over templates, so wide that those of all subspaces of a call hold together. (facts: systems, §1; on real
models, §3.2)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unwrite.errors import NumericError
from unwrite.stats.jackknife import ratio
from unwrite.stats.masks import matched

PARTS = ("row", "null")
# What is patched, the subspace beside its bounds, its parts, other directions, and controls.
PATCHES = (
    "clean", "full", "subspace", "row", "null", "row_raw", "null_raw", "mean", "gradient", "random", "arbitrary",
    "untrained",
)  # fmt: skip
CONTROLS = ("random", "arbitrary", "untrained")
CARRIED, ILLUSION, NOTHING, MIXED, UNDECIDED = "carried", "illusion", "nothing", "mixed", "undecided"


def _rule(value: float, why: str) -> Any:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Bounds:
    """What the words ask for."""

    effect: float = _rule(0.1, "an effect that is above all controls by less than this is none, however sure")
    part: float = _rule(0.5, "of an effect that is carried, whole value and row part keep at least this share")
    dormant: float = _rule(0.5, "values vary along a dormant row part by less than this part of the null part's spread")


BOUNDS = Bounds()
# What a verdict says, in the order in which it is asked; the first that holds is said. Sure: by the interval.
WORDS = {
    NOTHING: "surely less than a tenth of the clean difference more than some control does",
    UNDECIDED: "fewer than three templates to judge by, not surely more than every control; or none of what follows, "
    "for want of sureness",
    ILLUSION: "the row part surely keeps less than half of the effect, where all that reads the site is known; or the "
    "whole value surely less than half, and values vary along the row part by less than half of the null part's spread",
    CARRIED: "the whole value surely has at least half of the effect, and so has the row part where one is known; and "
    "`against` is surely said more often than under every control",
    MIXED: "surely more than every control, of whole value, row part and matches (surely a tenth more than under every "
    "control or surely not) all sure, and none of these",
}


@dataclass(frozen=True, eq=False)
class Numbers:
    """A number of each patch with its interval."""

    value: Float[np.ndarray, " patch"]
    low: Float[np.ndarray, " patch"]
    high: Float[np.ndarray, " patch"]

    def of(self, patch: str) -> tuple[float, float, float]:
        """Value, low and high."""
        i = PATCHES.index(patch)
        return float(self.value[i]), float(self.low[i]), float(self.high[i])


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that a verdict is said of.

    `effect` and `share` of each patch, `above` the effect of the subspace less that of each patch, `rate` how often
    `against` is the top of the vocabulary; `spread` of values along row and null part; `complete`: is all that reads
    the site known?
    """

    effect: Numbers
    share: Numbers
    above: Numbers
    rate: Numbers
    spread: Float[np.ndarray, " part"]
    complete: bool


def evidence(
    turned: Float[np.ndarray, "patch pair"],
    clean: Float[np.ndarray, " pair"],
    match: Float[np.ndarray, "patch pair"],
    cluster: Int[np.ndarray, " pair"],
    spread: Float[np.ndarray, " part"],
    complete: bool,
    looks: int,
) -> Evidence:
    """From what each patch takes from the difference that its own run had (`turned`), and from what is said then."""
    own = turned[PATCHES.index("subspace")]
    with np.errstate(divide="ignore", invalid="ignore"):
        effect, above = (Numbers(*ratio(part.T, clean, cluster, looks)) for part in (turned, own - turned))
        share = Numbers(*ratio(turned.T, own, cluster, looks))
    return Evidence(effect, share, above, _rates(match, cluster, looks), spread, complete)


def _rates(match: Float[np.ndarray, "patch pair"], cluster: Int[np.ndarray, " pair"], looks: int) -> Numbers:
    """How often each patch turns the answer; of random directions in the mean over draws."""
    found = np.stack(matched(match > 0, cluster, looks))
    random = PATCHES.index("random")
    found[:, random] = [part.item() for part in ratio(match[random], np.ones(len(cluster)), cluster, looks)]
    return Numbers(*np.where(np.isfinite(match).all(1), found, np.nan))


def word(found: Evidence, rules: Bounds = BOUNDS) -> str:
    """The verdict, by `WORDS` in their order."""
    controls = [name for name in CONTROLS if np.isfinite(found.effect.of(name)[0])]
    lows, highs = (np.array([found.above.of(name)[end] for name in controls]) for end in (1, 2))
    if len(controls) and np.isfinite(highs).all() and (highs < rules.effect).any():
        return NOTHING
    whole, row = found.share.of("full"), found.share.of("row")
    surely = np.array([*lows, found.effect.of("subspace")[1]])
    if not np.isfinite([*surely, whole[1]]).all() or (surely <= 0).any():
        return UNDECIDED
    known = bool(np.isfinite(row[0]))
    dormant = bool(found.spread[0] < rules.dormant * found.spread[1])
    if (found.complete and row[2] < rules.part) or (whole[2] < rules.part and dormant):
        return ILLUSION
    most = max(found.rate.of(name)[0] for name in ("clean", *controls))
    _, low, high = found.rate.of("subspace")
    if whole[1] >= rules.part and (not known or row[1] >= rules.part) and low > most:
        return CARRIED
    sides = [(whole[1] >= rules.part, whole[2] < rules.part), (low > most, high < most + rules.effect)]
    sides += [(row[1] >= rules.part, row[2] < rules.part)] * known
    return MIXED if all(yes or no for yes, no in sides) else UNDECIDED


def because(found: Evidence, who: str) -> str:
    """The numbers behind a verdict, in words."""
    controls = {name: found.effect.of(name) for name in CONTROLS if np.isfinite(found.effect.of(name)[0])}
    words = [
        f"takes {_part(found.effect.of('subspace'))} of the difference (whole value {_part(found.effect.of('full'))}; "
        + "; ".join(f"{name} {value[0]:.2f}" for name, value in controls.items())
        + ")",
        f"turns the answer in {_part(found.rate.of('subspace'))} of pairs (whole value "
        f"{found.rate.of('full')[0]:.2f}, without a patch {found.rate.of('clean')[0]:.2f})",
    ]
    if np.isfinite(found.share.of("row")[0]):
        words.append(
            f"its row part keeps {_part(found.share.of('row'))} of the effect; values vary by {found.spread[0]:.3g} "
            f"along it, {found.spread[1]:.3g} along the null part"
        )
    else:
        words.append(f"it is not told apart into what is read and what is not, since {who}")
    return "; ".join(words)


def _part(of: tuple[float, float, float]) -> str:
    value, low, high = of
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def classes_of(
    roles: Mapping[str, Int[np.ndarray, " pair"]], answers: Int[np.ndarray, "pair token"], given: list[Hashable] | None
) -> list[Hashable]:
    """A class for each pair: those that were given; else the order in which its roles stand, or what it answers.

    Raises NumericError for another number of classes.
    """
    if given is not None:
        if len(given) != len(answers) or not all(isinstance(one, (str, int)) for one in given):
            got = f"{len(given)} for {len(answers)} pairs"
            raise NumericError("classes are labels", got=got, expected="a text or an integer for each pair")
        return given
    order = [tuple(one) for one in np.argsort(np.stack([*roles.values()], 1), 1, kind="stable").tolist()]
    return [*order] if len({*order}) > 1 else [tuple(one) for one in answers.tolist()]
