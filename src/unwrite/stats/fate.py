"""What became of a write's direct effect, in one word? Read off the exact account of the executed total.

negligible   direct and total are both below 5 % of the prompt's largest total
direct       total is direct, to a quarter
indirect     direct is less than a quarter of total
reversed     total has the other sign and is at least a quarter of direct
erased, filled_in, norm   total falls short of direct, and this part takes away most of what is missing
mixed        none of these
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

FATES = ("negligible", "direct", "indirect", "reversed", "erased", "filled_in", "norm", "mixed")
NEGLIGIBLE = 0.05
QUARTER = 0.25


def fates(why: Float[np.ndarray, "prompt node 4"], total: Float[np.ndarray, "prompt node"], at: str) -> np.ndarray:
    """A word for every cell; empty unless at="position": elsewhere a write also moves what other rows write."""
    words = np.full(total.shape, "", dtype=object)
    if at != "position":
        return words
    largest = np.nan_to_num(np.abs(total)).max(1, keepdims=True)
    for cell in np.ndindex(total.shape):
        if np.isfinite(total[cell]):
            words[cell] = _fate(why[cell], float(total[cell]), float(largest[cell[0], 0]))
    return words


def _fate(why: Float[np.ndarray, " part"], total: float, largest: float) -> str:
    direct, erased, filled_in, norm = map(float, why)
    if max(abs(direct), abs(total)) <= NEGLIGIBLE * largest:
        return "negligible"
    if abs(total - direct) <= QUARTER * abs(direct):
        return "direct"
    if abs(direct) < QUARTER * abs(total):
        return "indirect"
    if total * direct < 0 and abs(total) >= QUARTER * abs(direct):
        return "reversed"
    sign = np.sign(direct)
    taken = {name: -sign * part for name, part in (("erased", erased), ("filled_in", filled_in), ("norm", norm))}
    missing = sign * (direct - total)
    name = max(taken, key=lambda part: taken[part])
    return name if missing > 0 and taken[name] > missing / 2 else "mixed"


def input_blind(
    direct: Float[np.ndarray, "prompt node"], other: Float[np.ndarray, "prompt replaced node quartile"]
) -> Bool[np.ndarray, "prompt node"]:
    """Does direct stay what it is, to a quarter, for half of all other texts, whichever way they come in?"""
    within = np.abs(other - direct[:, None, :, None]) <= QUARTER * np.abs(direct)[:, None, :, None]
    return within.all(axis=(1, 3)) & (direct != 0)
