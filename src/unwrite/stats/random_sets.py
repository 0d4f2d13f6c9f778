"""What does a node do on average over random sets of the others, and how large may it still be?

For every node the mean of a value over the sets with it and over those without it, by Welford's running moments (two
chunks are merged as Chan et al. 1979 do). d̂ = m̄₁ − m̄₀, se² = s₁²/n₁ + s₀²/n₀, Welch's ν; what a node may still do is
|d̂| + t_{ν,1−α} · se. The null "some node does at least θ" is a union, so at the largest of these no correction for
their number is needed (an intersection–union test). (facts: attribution, §2.8)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import t as student


@dataclass(frozen=True)
class Contexts:
    """Running moments with (0) and without (1) each cell: how many sets, mean and Σ (value − mean)² of each pair."""

    n: Float[np.ndarray, "2 cell"]
    mean: Float[np.ndarray, "2 pair cell"]
    squares: Float[np.ndarray, "2 pair cell"]

    @staticmethod
    def empty(pairs: int, cells: int) -> Contexts:
        """Of no set yet."""
        return Contexts(np.zeros((2, cells)), np.zeros((2, pairs, cells)), np.zeros((2, pairs, cells)))

    @staticmethod
    def of(value: Float[np.ndarray, "set pair"], chosen: Bool[np.ndarray, "set cell"]) -> Contexts:
        """Of some sets: which cells each holds, and its value for each pair."""
        centre = value.mean(0)
        own, member = value - centre, np.stack([chosen, ~chosen]).astype(float)
        n = member.sum(1)
        some = np.maximum(n, 1)[:, None]
        mean = np.einsum("sp,gsc->gpc", own, member) / some
        squares = np.einsum("sp,gsc->gpc", own**2, member) - n[:, None] * mean**2
        return Contexts(n, mean + centre[:, None], np.maximum(squares, 0.0))

    def __add__(self, other: Contexts) -> Contexts:
        """Of the sets of both."""
        n = self.n + other.n
        part = (other.n / np.maximum(n, 1))[:, None]
        step = other.mean - self.mean
        mean = self.mean + step * part
        return Contexts(n, mean, self.squares + other.squares + step**2 * self.n[:, None] * part)

    def difference(self) -> Difference:
        """How much larger the value is with a cell than without it; NaN with less than two sets of either sort."""
        n = np.where(self.n > 1, self.n, np.nan)[:, None]
        error = self.squares / (n - 1) / n
        total = error.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            df = total**2 / (error**2 / (n - 1)).sum(0)
        # Values that do not vary leave no doubt.
        df = np.where(total == 0, np.inf, df)
        return Difference(np.where(np.isnan(total), np.nan, self.mean[0] - self.mean[1]), np.sqrt(total), df)


@dataclass(frozen=True)
class Difference:
    """d̂, its standard error, and Welch's degrees of freedom."""

    d: Float[np.ndarray, "pair cell"]
    se: Float[np.ndarray, "pair cell"]
    df: Float[np.ndarray, "pair cell"]

    def upper(self, alpha: float) -> Float[np.ndarray, "pair cell"]:
        """|d̂| + t_{ν,1−α} · se; their maximum is θ*, what the null of a node with more is rejected for at α."""
        return np.abs(self.d) + student.ppf(1 - alpha, self.df) * self.se

    def p_value(self, theta: float) -> Float[np.ndarray, " pair"]:
        """Of "some cell does at least `theta`": the largest over cells, each at the boundary |d| = θ."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nanmax(student.sf((theta - np.abs(self.d)) / self.se, self.df), axis=1)


def subset(seed: int, index: int, cells: int, p: float) -> Bool[np.ndarray, " cell"]:
    """The cells of one random set, each in it with probability `p`: the same, however sets are batched."""
    return np.random.default_rng([seed, index]).random(cells) < p
