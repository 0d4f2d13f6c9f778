"""How sure is a correlation or a slope? From sums of moments over clusters, and draws of whole clusters."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_DRAWS = 999
_LEVELS = (0.025, 0.975)
# Numbers whose spread is below this part of their size, or energy, do not vary.
ROUNDING = 1e-12
# Of draws × clusters × columns numbers at a time.
_BLOCK = 2**22


def moments(
    x: Float[np.ndarray, "row column"], y: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "6 row column"]:
    """1, x, y, x², y², xy of every cell: sums of them give correlation and slope."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])


def fit(sums: Float[np.ndarray, "moment draw k"]) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """Correlation of x and y, and slope of y on x, from summed moments; each column k about its own means."""
    n, x, y, xx, yy, xy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        of_x, of_y = _spread(n, x, xx), _spread(n, y, yy)
        both = np.nansum(xy - x * y / n, -1)
        return both / np.sqrt(of_x * of_y), both / of_x


def _spread(n: np.ndarray, x: np.ndarray, xx: np.ndarray) -> Float[np.ndarray, " draw"]:
    """Σ (x − its column's mean)²; NaN where that is only rounding, as in a draw of one prompt over and over."""
    found = np.nansum(xx - x * x / n, -1)
    return np.where(found > ROUNDING * np.nansum(xx, -1), found, np.nan)


def interval(sums: Float[np.ndarray, "moment cluster k"]) -> tuple[float, float]:
    """95 % interval of the correlation: percentile bootstrap, a draw being how often each cluster is taken."""
    clusters, columns = sums.shape[1:]
    if clusters < 2:
        return np.nan, np.nan
    times, step = draws(clusters), max(1, _BLOCK // (clusters * columns))
    drawn = [fit(np.einsum("dc,mck->mdk", times[i : i + step], sums))[0] for i in range(0, len(times), step)]
    return percentiles(np.concatenate(drawn))


def draws(clusters: int) -> Int[np.ndarray, "draw cluster"]:
    """How often each cluster is taken in each draw of a bootstrap."""
    return np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=_DRAWS)


def percentiles(drawn: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The 95 % interval of what draws gave; those in which nothing varies are left out."""
    known = drawn[np.isfinite(drawn)]
    low, high = np.quantile(known, _LEVELS) if len(known) else (np.nan, np.nan)
    return float(low), float(high)
