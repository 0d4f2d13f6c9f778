"""Do two columns of numbers put their cells into the same order? Spearman's correlation with its interval, and signs.

Spearman's is Pearson's of mid-ranks. In a draw of a bootstrap a cell is there as often as its cluster is, so its rank
is another one: (weight of all smaller cells) + half the weight of its equals, from one sort for all draws.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from unwrite.stats.bootstrap import ROUNDING, draws, fit, moments, percentiles

# Signs are compared where a number is at least this part of the largest that belongs together with it.
MATERIAL = 0.05


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
    return centred / spread if spread > ROUNDING else np.zeros(len(x))


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


def by_size(
    values: Float[np.ndarray, "pair node *position"],
) -> tuple[Float[np.ndarray, " cell"], Int[np.ndarray, " cell"]]:
    """Mean size of every cell over pairs (NaN counts 0), and the cells in its order, the largest first."""
    size = np.nan_to_num(np.abs(values)).mean(0).ravel()
    return size, np.argsort(-size, kind="stable")


def same_sign(x: Float[np.ndarray, " cell"], y: Float[np.ndarray, " cell"], owner: Int[np.ndarray, " cell"]) -> float:
    """Part of the cells whose signs agree, of those whose `y` is material among its owner's; NaN without any."""
    size, largest = np.abs(y), np.zeros(int(owner.max(initial=-1)) + 1)
    np.maximum.at(largest, owner, size)
    material = (size >= MATERIAL * largest[owner]) & (size > 0)
    return float((np.sign(x) == np.sign(y))[material].mean()) if material.any() else np.nan


def _ranks(level: Int[np.ndarray, " cell"], weight: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Mid-ranks of cells whose values are `level` 0, 1, 2, … in order, each cell being there `weight` times."""
    if not len(level):
        return np.zeros(0)
    mass = np.bincount(level, weight)
    return (np.cumsum(mass) - mass / 2)[level]
