"""Does a head that one task's circuit names, made to attend elsewhere, repair another task that the model half does?

    python examples/circuits/reuse.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-reuse.json` beside this file, from which docs/circuits.md is made. L20H0 attends to the repeated name of
indirect object identification, and inhibits it; in a Laundry List it is made to attend, from the last token, to the
items that were bought (Merullo, Eickhoff and Pavlick 2024, arXiv 2310.08744, on other tasks). It was chosen on neither
half of the lists: these share no template and no item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from measure import about, keep
from scipy.stats import binomtest

import unwrite as uw

HEAD, SECOND, REMOVED = "L20H0", "L19H2", "L20H0 removed"
OTHERS = tuple(f"L20H{i}" for i in range(1, 9))
COUNTS, PAIRS, BATCH = (2, 3), 120, 60
ITEMS = (
    ("milk", "bread", "cheese", "sugar", "coffee", "fish", "rice", "butter", "fruit", "salt"),
    ("chicken", "tea", "honey", "beer", "wine", "corn", "chocolate", "juice", "meat", "soup"),
)
TEMPLATES = (("t0", "t2"), ("t1", "t3"))


def measured(model: str) -> dict[str, Any]:
    """Which lists are answered rightly, with no override and with each; two halves of each length."""
    lm = uw.load(model, dtype="float32")
    lines = []
    for k in COUNTS:
        for half, (items, templates) in enumerate(zip(ITEMS, TEMPLATES, strict=True)):
            pairs = uw.tasks.laundry(2 * PAIRS, lm.tokenizer, half, k=k, words={"item": items}, bos=False)
            pairs = pairs.take([label in templates for label in pairs.template])
            lines += [{"items": k, "half": half, **one} for one in overridden(lm, pairs, k)]
    return about(lm, uw.attention(lm, pairs.base.take([0]), heads=[HEAD])) | {"lines": lines}


def overridden(lm: Any, pairs: Any, k: int) -> list[dict[str, Any]]:
    """A line for each override: how many lists are right, and how many that were wrong, or right, are not now."""
    drawn = np.random.default_rng(0)
    bought = np.stack([pairs.roles[f"bought{i}"] for i in range(1, k)], 1)
    before = [[row for row in range(end) if row not in own] for end, own in zip(pairs.row, bought, strict=True)]
    random = np.stack([drawn.choice(rows, k - 1, replace=False) for rows in before])
    asked: dict[str, dict[str, np.ndarray | None]] = {
        "none": {}, HEAD: {HEAD: bought}, "the same head, random tokens": {HEAD: random}, REMOVED: {HEAD: None},
        SECOND: {SECOND: bought}, f"{HEAD} and {SECOND}": {HEAD: bought, SECOND: bought},
        **{head: {head: bought} for head in OTHERS},
    }  # fmt: skip
    right = {name: correct(lm, pairs, override) for name, override in asked.items()}
    return [line(name, now, right["none"]) for name, now in right.items()]


def line(name: str, now: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """A paired sign test: of lists of which the override changes whether they are right, are half repaired?"""
    repaired, broken = int((now & ~before).sum()), int((before & ~now).sum())
    p = binomtest(repaired, repaired + broken).pvalue if repaired + broken else 1.0
    return {
        "override": name, "right": int(now.sum()), "of": len(now), "repaired": repaired, "broken": broken, "p": p,
    }  # fmt: skip


@torch.no_grad()
def correct(lm: Any, pairs: Any, override: dict[str, np.ndarray | None]) -> np.ndarray:
    """Does each pair's answer beat its other choices, where heads attend from the last token to these rows alone?

    A head of no rows writes nothing there.
    """
    right = []
    for first in range(0, len(pairs), BATCH):
        part = slice(first, first + BATCH)
        ids, end = torch.from_numpy(pairs.base.ids[part]), torch.from_numpy(pairs.row[part])
        edits = [edit(head, None if rows is None else rows[part], end, ids.shape[1]) for head, rows in override.items()]
        with uw.trace(lm, edits=edits):
            mask = torch.arange(ids.shape[1]) <= end[:, None]
            logits = lm.hf(ids, attention_mask=mask.long()).logits[torch.arange(len(ids)), end]
        choices = torch.from_numpy(pairs.choices[part])
        answer = torch.from_numpy(pairs.answer[part])[:, None]
        best = choices[torch.arange(len(ids)), logits.gather(1, choices).argmax(1)]
        right.append((best == answer[:, 0]).numpy())
    return np.concatenate(right)


def edit(head: str, rows: np.ndarray | None, end: torch.Tensor, length: int) -> uw.Edit:
    """1/n of the attention of the last token on each of n rows; or nothing of what the head writes there."""
    if rows is None:
        return uw.Edit.set(head, 0.0, at=end)
    weight = torch.zeros(len(rows), length).scatter_(1, torch.from_numpy(rows), 1 / rows.shape[1])
    return uw.Edit.set(f"{head}.pattern", weight, at=end)


def kept_repairs(found: dict[str, Any]) -> pd.DataFrame:
    """Rates by number of items and half, with how many lists each override repairs and breaks."""
    lines: dict[str, dict[str, str]] = {}
    for one in [*found["lines"], *_others(found["lines"])]:
        if one["override"] in OTHERS:
            continue
        changed = f" (+{one['repaired']} −{one['broken']}, p {one['p']:.1g})" if one["override"] != "none" else ""
        cell = f"{one['right'] / one['of']:.2f}{changed}"
        lines.setdefault(one["override"], {})[f"{one['items']} items, half {'AB'[one['half']]}"] = cell
    return pd.DataFrame(lines).T


def _others(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the other heads of the layer the one that repairs most, and its p by as many tests (Bonferroni)."""
    cells = dict.fromkeys((one["items"], one["half"]) for one in lines)
    best = [
        max((one for one in lines if (one["items"], one["half"]) == cell and one["override"] in OTHERS),
            key=lambda one: one["right"])
        for cell in cells
    ]  # fmt: skip
    return [{**one, "override": "best of 8 other heads", "p": min(1.0, len(OTHERS) * one["p"])} for one in best]


if __name__ == "__main__":
    keep(__doc__, measured, "reuse")
