"""Does a layer write the text of an image, and how sure is that? Shares of what all layers do together, and words."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import wilson

WRITES, PART, NOT, UNDECIDED = "writes the text", "takes part", "does not by itself", "undecided"
# A layer with more than this share is said to write the text.
HALF = 0.5
# Fewer prompts decide nothing.
FEWEST = 5
# The rule of each word; `low` and `high` are the 95 % interval of the share, all layers together.
RULES = {
    WRITES: "low > ½",
    PART: "low > 0",
    NOT: "high < ½",
    UNDECIDED: "anything else; always of fewer than five prompts, or where all layers together surely change nothing",
}


def shares(
    gain: Float[np.ndarray, "prompt layers"], whole: Float[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """Σ gain / Σ whole of each layer, and an interval of 95 % for all of them together.

    The wider one of the jackknife's, which has no width where all prompts agree, and of the part of prompts that may
    be otherwise though none was seen (Wilson's, for n of n). NaN where all layers together do nothing.
    """
    n, looks = gain.shape
    if not whole.sum():
        return np.full(looks, np.nan), np.full(looks, np.nan), np.full(looks, np.nan)
    share, low, high = ratio(gain, whole, np.arange(n), looks)
    unseen = 1 - wilson(n, n, looks)[0]
    return share, np.minimum(low, share - unseen), np.maximum(high, share + unseen)


def changes(whole: Float[np.ndarray, " prompt"]) -> tuple[float, float, float]:
    """Mean of what all layers together do, and its 95 % interval; NaN of fewer than three prompts."""
    mean, low, high = ratio(whole, np.ones(len(whole)), np.arange(len(whole)))
    return float(mean), float(low), float(high)


def word(low: float, high: float, prompts: int, moved: float) -> str:
    """What a share says, by `RULES` in their order; `moved` is the lower end of what all layers together do."""
    if prompts < FEWEST or not moved > 0:
        return UNDECIDED
    if low > HALF:
        return WRITES
    if low > 0:
        return PART
    return NOT if high < HALF else UNDECIDED
