"""Do two columns of numbers put their cells into the same order? Spearman's correlation, and its interval.

Spearman's is Pearson's of mid-ranks. In a draw of a bootstrap a cell is there as often as its cluster is, so its rank
is another one: (weight of all smaller cells) + half the weight of its equals, from one sort for all draws.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from unwrite.stats.bootstrap import draws, fit, moments, percentiles

# Numbers that differ by less than this part of the largest do not vary.
_ROUNDING = 1e-12


def pearson(
    x: Float[np.ndarray, " cell"], y: Float[np.ndarray, " cell"], weight: Float[np.ndarray, " cell"] | None = None
) -> float:
    """Correlation of cells; NaN where one of the columns does not vary."""
    if not len(x):
        return np.nan
    weight = np.ones(len(x)) if weight is None else weight
    cells = moments(standard(x)[:, None], standard(y)[:, None])
    return float(fit((weight @ cells[..., 0].T)[:, None, None])[0][0])


def standard(x: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Numbers about their mean and within ±1, of which sums of squares are exact; zeros where they do not vary."""
    size = np.abs(x).max(initial=0.0)
    if not size > 0:
        return np.zeros(len(x))
    centred = x / size - (x / size).mean()
    spread = np.abs(centred).max()
    return centred / spread if spread > _ROUNDING else np.zeros(len(x))


def spearman(x: Float[np.ndarray, " cell"], y: Float[np.ndarray, " cell"]) -> float:
    """Correlation of the ranks of cells; NaN where one of the columns does not vary."""
    return pearson(*(_ranks(np.unique(part, return_inverse=True)[1], np.ones(len(part))) for part in (x, y)))


def spearman_interval(
    x: Float[np.ndarray, " cell"], y: Float[np.ndarray, " cell"], cluster: Int[np.ndarray, " cell"]
) -> tuple[float, float]:
    """95 % interval of Spearman's correlation: percentile bootstrap over clusters 0, 1, 2, … of cells."""
    clusters = int(cluster.max()) + 1 if len(cluster) else 0
    if clusters < 2:
        return np.nan, np.nan
    x, y = (np.unique(part, return_inverse=True)[1] for part in (x, y))
    drawn = []
    for times in draws(clusters):
        weight = times[cluster].astype(float)
        drawn.append(pearson(_ranks(x, weight), _ranks(y, weight), weight))
    return percentiles(np.array(drawn))


def _ranks(level: Int[np.ndarray, " cell"], weight: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Mid-ranks of cells whose values are `level` 0, 1, 2, … in order, each cell being there `weight` times."""
    if not len(level):
        return np.zeros(0)
    mass = np.bincount(level, weight)
    return (np.cumsum(mass) - mass / 2)[level]
