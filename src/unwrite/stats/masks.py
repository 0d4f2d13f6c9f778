"""Which nodes does a mask choose, how sure is that, and what would other nodes of the same layers have done?"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import wilson

SETS = ("none", "all", "chosen", "complement", "random")
# A node is chosen whose gain is above this.
HALF = 0.5
FOUND, NOTHING, UNDECIDED = "found", "nothing found", "undecided"
# The rule of each word; `low` and `high` are the 95 % interval of the matches of the chosen set on held-out pairs.
WORDS = {
    NOTHING: "no node is chosen, or high ≤ the matches without a patch or of random sets on average",
    FOUND: "low > the matches without a patch and of random sets on average",
    UNDECIDED: "anything else, and always where fewer than three clusters of pairs have no interval",
}


def jaccard(chosen: Bool[np.ndarray, "seed cell"]) -> float:
    """Mean over pairs of seeds of |both| / |either|; 1 where neither chooses anything, NaN of one seed."""
    found = [
        1.0 if not (one | other).any() else float((one & other).sum() / (one | other).sum())
        for one, other in combinations(chosen, 2)
    ]
    return float(np.mean(found)) if found else np.nan


def alike(
    chosen: Bool[np.ndarray, "node place"], group: Int[np.ndarray, " node"], draws: int, seed: int
) -> Bool[np.ndarray, "draw node place"]:
    """Random sets with as many nodes of each group, such as a layer, at each place as the chosen ones."""
    made = np.zeros((draws, *chosen.shape), dtype=bool)
    for draw, own in enumerate(np.unique(group)[None].repeat(draws, 0)):
        rng = np.random.default_rng([seed, draw])
        for one in own:
            members = np.flatnonzero(group == one)
            for place in np.flatnonzero(chosen[members].any(0)):
                made[draw, rng.permutation(members)[: chosen[members, place].sum()], place] = True
    return made


def compared(
    chosen: Bool[np.ndarray, "penalty node place"], group: Int[np.ndarray, " node"], draws: int
) -> Bool[np.ndarray, "set node place"]:
    """No node, all, for each penalty the chosen ones, then the others, then random sets like the chosen one."""
    random = [alike(one, group, draws, i) for i, one in enumerate(chosen)]
    none = np.zeros_like(chosen[:1])
    return np.concatenate([none, ~none, chosen, ~chosen, *random])


def repeated(sets: Bool[np.ndarray, "set node place"], penalties: int) -> Bool[np.ndarray, "penalty draw"]:
    """Which random sets of `compared` ones are the chosen set itself, which compare it with nothing."""
    chosen, random = sets[2 : 2 + penalties], sets[2 + 2 * penalties :]
    return (random.reshape(penalties, -1, *sets.shape[1:]) == chosen[:, None]).all((2, 3))


def arranged(
    found: Float[np.ndarray, "set pair"], penalties: int
) -> tuple[Float[np.ndarray, "penalty 4 pair"], Float[np.ndarray, "penalty draw pair"]]:
    """What was found of `compared` sets, by penalty: of none, all, chosen and complement; of each random set."""
    both, rest = found[:2], found[2:]
    chosen, others = rest[:penalties], rest[penalties : 2 * penalties]
    whole = np.broadcast_to(both[None], (penalties, *both.shape))
    random = rest[2 * penalties :].reshape(penalties, -1, found.shape[1])
    return np.concatenate([whole, chosen[:, None], others[:, None]], 1), random


def matched(
    hits: Bool[np.ndarray, "*rest pair"], cluster: Int[np.ndarray, " pair"], looks: int = 1
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Rates of hits, with the wider of Wilson's interval over pairs and of the jackknife's over clusters of them.

    The jackknife has no width where all clusters agree, and Wilson's takes pairs of one template for independent. NaN
    for fewer than three clusters. Of several `looks` so wide that all of them hold together.
    """
    above = np.moveaxis(hits.astype(float), -1, 0)
    rate, low, high = ratio(above, np.ones(len(above)), cluster, looks)
    counts = hits.sum(-1)
    ends = np.array([wilson(int(n), hits.shape[-1], looks) for n in counts.ravel()]).reshape(*counts.shape, 2)
    return rate, np.maximum(np.minimum(low, ends[..., 0]), 0.0), np.minimum(np.maximum(high, ends[..., 1]), 1.0)


def foremost(rate: Float[np.ndarray, " penalty"], size: Int[np.ndarray, " penalty"]) -> int:
    """The penalty with the most matches; of several the one with the fewest nodes."""
    return min(range(len(rate)), key=lambda i: (-rate[i], size[i]))


def word(low: float, high: float, size: int, none: float, random: float) -> str:
    """What matches of a chosen set say, by `WORDS` in their order; `random` is the mean of random sets, NaN of none."""
    others = none if np.isnan(random) else max(none, random)
    if size == 0 or high <= others:
        return NOTHING
    return FOUND if low > others else UNDECIDED
