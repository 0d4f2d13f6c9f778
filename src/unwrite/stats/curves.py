"""How much of a behaviour do growing sets keep? Faithfulness, the area below its curve, and how far it is from 1.

f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), of means and never the mean of ratios (Wang et al. 2022, arXiv 2211.00593, in the
normalised form of Mueller et al. 2025, arXiv 2504.13151). CPR = ∫ f, CMD = ∫ |1 − f| over the part of nodes that is
kept, by trapezoids between the sizes that were executed. (facts: systems on real models, §3.2)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from unwrite.stats.jackknife import around, with_each_left_out


@dataclass(frozen=True)
class Shares:
    """A statistic of all pairs, and without each cluster of them."""

    whole: Float[np.ndarray, "..."]
    without: Float[np.ndarray, "cluster ..."]

    @property
    def interval(self) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """95 %, by the jackknife over clusters; NaN for fewer than three."""
        return around(self.whole, self.without)

    def shaped(self, *shape: int) -> Shares:
        """The same on other axes."""
        return Shares(self.whole.reshape(shape), self.without.reshape(len(self.without), *shape))

    def __sub__(self, other: Shares) -> Shares:
        return Shares(self.whole - other.whole, self.without - other.without)


def faithfulness(
    value: Float[np.ndarray, "pair ..."],
    empty: Float[np.ndarray, " pair"],
    whole: Float[np.ndarray, " pair"],
    cluster: Int[np.ndarray, " pair"],
) -> Shares:
    """f of values m(C) of each pair, `empty` m(∅) and `whole` m(M)."""
    above = value - empty.reshape(-1, *[1] * (value.ndim - 1))
    return Shares(*with_each_left_out(above, whole - empty, cluster))


def areas(part: Float[np.ndarray, " size"], f: Shares) -> tuple[Shares, Shares]:
    """CPR and CMD of curves f[…, size] over the kept `part` of nodes; NaN where a size was not executed."""
    both = [f.whole, f.without]
    return Shares(*(_area(part, one) for one in both)), Shares(*(_area(part, np.abs(1 - one)) for one in both))


def _area(x: Float[np.ndarray, " size"], y: Float[np.ndarray, "*axes size"]) -> Float[np.ndarray, "..."]:
    return np.asarray(((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(-1))


def between(sizes: Int[np.ndarray, " size"], enough: Bool[np.ndarray, " size"]) -> tuple[int, int] | None:
    """The executed sizes that bracket the first one that is enough: not enough, enough. None where none is."""
    if not enough.any():
        return None
    first = int(enough.argmax())
    return (int(sizes[first - 1]) if first else -1), int(sizes[first])


def falls_again(sizes: Int[np.ndarray, " size"], enough: Bool[np.ndarray, " size"]) -> int | None:
    """The first executed size that is not enough though a smaller one is; None for a curve that stays above."""
    later = np.flatnonzero(~enough & (np.cumsum(enough) > 0))
    return int(sizes[later[0]]) if len(later) else None
