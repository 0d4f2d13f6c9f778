"""How well does a cheap reading predict what really happens in this model? Correlation with the executed total.

Three forms of one correlation over cells (prompt, node): `pooled`, over all cells; `within_node`, each node's mean
over prompts taken out (does the reading know on which prompts a node matters?); `within_prompt`, each prompt's mean
over nodes taken out (does it know which nodes matter on a prompt?). Intervals by leaving out clusters of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from unwrite.stats.bootstrap import fit, moments
from unwrite.stats.jackknife import interval
from unwrite.stats.ranks import same_sign

FORMS = ("pooled", "within_node", "within_prompt")


@dataclass(frozen=True)
class Trust:
    """Of one reading, group and form: correlation with `total` and its 95 % interval, slope, sign agreement, counts."""

    correlation: float
    low: float
    high: float
    slope: float
    same_sign: float
    n: int
    clusters: int


def trust(
    reading: Float[np.ndarray, "prompt node"],
    total: Float[np.ndarray, "prompt node"],
    cluster: Int[np.ndarray, " prompt"],
    form: str,
) -> Trust:
    """How `reading` predicts `total` over cells; prompts that have no total are left out.

    `slope` is that of total on reading: what a unit of the reading is worth.
    """
    kept = np.isfinite(total).all(1) & np.isfinite(reading).all(1)
    x, y = reading[kept], total[kept]
    if form == "within_prompt" and len(x):
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    sums = _sums(x, y, cluster[kept], per_node=form == "within_node")
    nothing = Trust(np.nan, np.nan, np.nan, np.nan, np.nan, int(x.size), sums.shape[1])
    # Centred on its own node or prompt, a single cell says nothing.
    if not len(x) or (form == "within_node" and len(x) < 2) or (form == "within_prompt" and x.shape[1] < 2):
        return nothing
    correlation, slope = (float(part[0]) for part in fit(sums.sum(1, keepdims=True)))
    low, high = interval(sums)
    prompt = np.repeat(np.arange(len(x)), x.shape[1])
    agree = same_sign(reading[kept].ravel(), total[kept].ravel(), prompt)
    return Trust(correlation, low, high, slope, agree, int(x.size), sums.shape[1])


def _sums(x: np.ndarray, y: np.ndarray, cluster: np.ndarray, per_node: bool) -> Float[np.ndarray, "moment cluster k"]:
    """Moments summed over the cells of every cluster (and of every node apart, if asked)."""
    cells = moments(x, y)
    owners, index = np.unique(cluster, return_inverse=True)
    sums = np.zeros((6, len(owners), x.shape[1]))
    for prompt, owner in enumerate(index):
        sums[:, owner] += cells[:, prompt]
    return sums if per_node else sums.sum(2, keepdims=True)
