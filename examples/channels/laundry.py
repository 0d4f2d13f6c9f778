"""Does more of one head repair a list that a model loses as it grows? The Laundry List, by length and by factor.

    python examples/channels/laundry.py MODEL --name NAME

MODEL is a folder or a hub name (google/gemma-3-270m). What was found is kept as `results/NAME-laundry.json` beside this
file, from which docs/channels.md is made. The head, and the factor by which what it writes at the last token is
multiplied, are chosen on lists of other items in other templates than those on which they are shown; then the halves
change places (Merullo, Eickhoff and Pavlick 2024, arXiv 2406.09519, who moved a subspace of GPT-2's inhibition heads).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import torch
from kept import alike, keep, model_of

import unwrite as uw

ITEMS = (
    ("milk", "bread", "cheese", "sugar", "coffee", "fish", "rice", "butter", "fruit", "salt"),
    ("chicken", "tea", "honey", "beer", "wine", "corn", "chocolate", "juice", "meat", "soup"),
)
TEMPLATES = (("t0", "t2"), ("t1", "t3"))
COUNTS, FACTORS = (2, 3, 4, 6, 8), (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
# The head is chosen on lists of so many items, the factor on so many; neither sees the other half.
HEAD_AT, FACTOR_AT = 3, 6
PAIRS, FEW = 60, 24


def measured(model: str) -> dict[str, Any]:
    """Two folds: a head and a factor from one half, what they do to the other, beside all heads near that one."""
    lm = uw.load(model, dtype="float32")
    folds = [fold(lm, half) for half in (0, 1)]
    ioi = uw.tasks.ioi(PAIRS, lm.tokenizer)
    for one in folds:
        one["ioi"] = [rate(right(lm, ioi, [()])[0]), rate(right(lm, ioi, [scaled(one["head"], one["factor"])])[0])]
    return {**model_of(uw.solves(lm, ioi)), "folds": folds}


def fold(lm: Any, half: int) -> dict[str, Any]:
    """What is chosen on a half, and how often lists of the other half are right with it."""
    few = lists(lm, half, HEAD_AT, FEW)
    effects = uw.effects(lm, few, at="end")["effect"].mean("pair")
    order = effects.to_series().abs().sort_values(ascending=False)
    head = str(order.index[0])
    curve = [rate(one) for one in right(lm, lists(lm, half, FACTOR_AT, PAIRS), [scaled(head, c) for c in FACTORS])]
    factor = FACTORS[int(np.argmax(curve))]
    near = [node for node in lm.nodes if "H" in node and node != head and abs(layer(node) - layer(head)) <= 1]
    return {
        "head": head, "effect": float(effects.sel(node=head)), "next": [str(order.index[1]), float(order.iloc[1])],
        "curve": curve, "factor": factor, "near": near,
        "shown": [shown(lm, 1 - half, k, head, near, factor) for k in COUNTS],
    }  # fmt: skip


def shown(lm: Any, half: int, k: int, head: str, near: list[str], factor: float) -> dict[str, Any]:
    """Lists of one length: how many are right by each factor, and with each of the heads near it scaled."""
    pairs = lists(lm, half, k, PAIRS)
    every = right(lm, pairs, [*(scaled(head, c) for c in FACTORS), *(scaled(one, factor) for one in near)])
    plain, best = (every[FACTORS.index(c)] for c in (1.0, factor))
    return {
        "items": k, "lists": len(pairs), "factors": [rate(one) for one in every[: len(FACTORS)]],
        "repaired": int((best & ~plain).sum()), "broken": int((plain & ~best).sum()),
        "others": [rate(one) for one in every[len(FACTORS) :]],
    }  # fmt: skip


def lists(lm: Any, half: int, k: int, n: int) -> Any:
    """Lists of one half: its items, its templates."""
    pairs = uw.tasks.laundry(2 * n, lm.tokenizer, half, k=k, words={"item": ITEMS[half]})
    return pairs.take([label in TEMPLATES[half] for label in pairs.template])


def scaled(head: str, factor: float) -> tuple[uw.Edit, ...]:
    """What a head writes at the last token times a factor."""
    return () if factor == 1.0 else (uw.Edit.scale(head, factor, at=-1),)


@torch.no_grad()
def right(lm: Any, pairs: Any, every: list[tuple[uw.Edit, ...]]) -> list[np.ndarray]:
    """Under each of several edits: is the answer above all other choices? All that lies before the end is run once."""
    found = [np.zeros(len(pairs), bool) for _ in every]
    for rows, ids, before in alike(lm, pairs):
        for one, edits in zip(found, every, strict=True):
            with uw.trace(lm, edits=edits):
                logits = lm.hf(ids[:, -1:], past_key_values=copy.deepcopy(before), use_cache=True).logits[:, -1]
            choices = np.take_along_axis(logits.numpy(), np.asarray(pairs.choices)[rows], 1)
            one[rows] = choices[:, 0] > choices[:, 1:].max(1)
    return found


def rate(one: np.ndarray) -> float:
    """How many are right."""
    return float(one.mean())


def layer(node: str) -> int:
    """Of a head."""
    return int(node[1:].partition("H")[0])


def kept_lists(found: dict[str, Any]) -> pd.DataFrame:
    """By length and half: right without a change, with the factor of the other half, and with other heads scaled."""
    lines = []
    for one in found["folds"]:
        for part in one["shown"]:
            rates = dict(zip(FACTORS, part["factors"], strict=True))
            lines.append({
                "head and factor": f"{one['head']} ×{one['factor']:g}", "items": part["items"], "lists": part["lists"],
                "as it is": f"{rates[1.0]:.2f}", "scaled": f"{rates[one['factor']]:.2f}",
                "repaired, broken": f"{part['repaired']}, {part['broken']}", "removed": f"{rates[0.0]:.2f}",
                f"{len(one['near'])} heads near it scaled": f"{min(part['others']):.2f} to {max(part['others']):.2f}",
            })  # fmt: skip
    return pd.DataFrame(lines)


if __name__ == "__main__":
    keep(__doc__ or "", measured, "laundry")
