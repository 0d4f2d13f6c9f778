"""Do heads that one task's circuit names, made to attend elsewhere, repair another task that the model half does?

    python examples/circuits/reuse.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-reuse.json` beside this file, from which docs/circuits.md is made. L20H0 and L19H2 attend to the repeated
name of indirect object identification, and inhibit it; in a Laundry List they are made to attend, from the last token,
to the items that were bought (Merullo, Eickhoff and Pavlick 2024, arXiv 2310.08744, on other tasks). Lists come in two
halves that share no template and no item. Which of the heads, and how far their attention is moved there, is chosen on
some lists of one half and judged on the other half, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from measure import about, keep
from scipy.stats import binomtest

import unwrite as uw

INHIBITORS = ("L20H0", "L19H2")
OTHERS = tuple(f"L20H{i}" for i in range(1, 9))
# How much of a head's attention goes to the bought items; the rest of it stays as it is.
PARTS = (0.25, 0.5, 0.75, 1.0)
COUNTS, CHOSEN_OF, JUDGED_BY, BATCH = (2, 3, 4), 60, 120, 60  # lists of each template
ITEMS = (
    ("milk", "bread", "cheese", "sugar", "coffee", "fish", "rice", "butter", "fruit", "salt"),
    ("chicken", "tea", "honey", "beer", "wine", "corn", "chocolate", "juice", "meat", "soup"),
)
TEMPLATES = (("t0", "t2"), ("t1", "t3"))


@dataclass(frozen=True, eq=False)
class Override:
    """These heads give `part` of their attention from the last token to the rows, 1/n each; without rows, to nothing.

    A head that attends to nothing writes nothing there.
    """

    heads: tuple[str, ...]
    rows: np.ndarray | None
    part: float = 1.0

    def edits(self, rows: slice | np.ndarray, length: int) -> list[uw.Edit]:
        """For these prompts, of which the last token alone is read."""
        if self.rows is None:
            return [uw.Edit.set(head, 0.0) for head in self.heads]
        own = torch.from_numpy(self.rows[rows])
        weight = torch.zeros(len(own), length).scatter_(1, own, 1 / own.shape[1])
        return [uw.Edit.set(f"{head}.pattern", partial(moved, weight, self.part)) for head in self.heads]


def moved(weight: torch.Tensor, part: float, pattern: torch.Tensor) -> torch.Tensor:
    """A pattern [prompt, 1, key], a part of which lies elsewhere."""
    return (1 - part) * pattern + part * weight[:, None].to(pattern)


def lists(lm: Any, n: int, k: int, half: int, seed: int) -> uw.Pairs:
    """n lists of k items of each of the two templates of a half, in its own items."""
    pairs = uw.tasks.laundry(4 * n, lm.tokenizer, seed, k=k, words={"item": ITEMS[half]}, bos=False)
    return pairs.take([label in TEMPLATES[half] for label in pairs.template])


def measured(model: str) -> dict[str, Any]:
    """What is chosen on each half, and what that does to the lists of the other."""
    lm = uw.load(model, dtype="float32")
    lines, chosen = [], []
    for k in COUNTS:
        for half in (0, 1):
            best, tried = choice(lm, lists(lm, CHOSEN_OF, k, half, 2 + half), k)
            chosen.append({"items": k, "half": half, "heads": [*best.heads], "part": best.part, "tried": tried})
            judged = lists(lm, JUDGED_BY, k, 1 - half, 1 - half)
            lines += [{"items": k, "half": 1 - half, **one} for one in judge(lm, judged, k, best)]
    first = lists(lm, 1, 2, 0, 0)
    return about(lm, uw.attention(lm, first.base, heads=[*INHIBITORS])) | {"chosen": chosen, "lines": lines}


def choice(lm: Any, pairs: uw.Pairs, k: int) -> tuple[Override, list[dict[str, Any]]]:
    """The inhibitors and the part with most right answers, of several the smallest change; and all that were tried."""
    rows = bought(pairs, k)
    asked = [
        Override(heads, rows, part) for part in PARTS for heads in (*((one,) for one in INHIBITORS), INHIBITORS)
    ]  # fmt: skip
    right = answered(lm, pairs, {"none": None, **{str(i): one for i, one in enumerate(asked)}})
    counts = [int(right[str(i)].sum()) for i in range(len(asked))]
    tried = [{"heads": [*one.heads], "part": one.part, "right": n} for one, n in zip(asked, counts, strict=True)]
    nothing = {"heads": [], "part": 0.0, "right": int(right["none"].sum()), "of": len(pairs)}
    return asked[int(np.argmax(counts))], [nothing, *tried]


def judge(lm: Any, pairs: uw.Pairs, k: int, best: Override) -> list[dict[str, Any]]:
    """A line for each override and template: how many lists are right, repaired and broken."""
    drawn, rows = np.random.default_rng(0), bought(pairs, k)
    before = [[row for row in range(end) if row not in own] for end, own in zip(pairs.row, rows, strict=True)]
    random = np.stack([drawn.choice(other, k - 1, replace=False) for other in before])
    asked = {
        "none": None, "chosen on the other half": Override(best.heads, rows, best.part),
        "the same, random tokens": Override(best.heads, random, best.part),
        "L20H0, all of it": Override(("L20H0",), rows), "the chosen heads removed": Override(best.heads, None),
        **{f"{head} instead": Override((head,), rows, best.part) for head in OTHERS},
    }  # fmt: skip
    right, label = answered(lm, pairs, asked), np.array(pairs.template)
    return [
        {"template": str(one), **line(name, now[label == one], right["none"][label == one])}
        for name, now in right.items() for one in np.unique(label)
    ]  # fmt: skip


def bought(pairs: uw.Pairs, k: int) -> np.ndarray:
    """Rows of the bought items [pair, item]."""
    return np.stack([pairs.roles[f"bought{i}"] for i in range(1, k)], 1)


def line(name: str, now: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """A paired sign test: of lists of which the override changes whether they are right, are half repaired?"""
    repaired, broken = int((now & ~before).sum()), int((before & ~now).sum())
    p = binomtest(repaired, repaired + broken).pvalue if repaired + broken else 1.0
    low, high = gained(repaired, broken, len(now))
    return {
        "override": name, "right": int(now.sum()), "of": len(now), "repaired": repaired, "broken": broken, "p": p,
        "low": low, "high": high,
    }  # fmt: skip


def gained(repaired: int, broken: int, n: int) -> tuple[float, float]:
    """95 % interval of what the rate gains, of pairs (Agresti and Min 2005, Stat. Med. 24: half a list more a cell)."""
    b, c, m = repaired + 0.5, broken + 0.5, n + 2
    mean, se = (b - c) / m, np.sqrt(b + c - (b - c) ** 2 / m) / m
    return float(mean - 1.96 * se), float(mean + 1.96 * se)


@torch.no_grad()
def answered(lm: Any, pairs: uw.Pairs, asked: Mapping[str, Override | None]) -> dict[str, np.ndarray]:
    """Does each pair's answer beat its other choices, by override? All but the last token is read once for all."""
    right = {name: np.zeros(len(pairs), dtype=bool) for name in asked}
    for rows, end in alike(pairs):
        ids = torch.from_numpy(pairs.base.ids[rows, : end + 1])
        read = lm.hf(ids[:, :end], use_cache=True).past_key_values
        for name, override in asked.items():
            with uw.trace(lm, edits=override.edits(rows, end + 1) if override else []):
                logits = lm.hf(ids[:, end:], cache=deepcopy(read)).logits[:, 0]
            right[name][rows] = best_is_answer(pairs.take(rows), logits)
    return right


def alike(pairs: uw.Pairs) -> Iterator[tuple[np.ndarray, int]]:
    """Some prompts that end at the same row, and which that is."""
    for end in np.unique(pairs.row):
        same = np.flatnonzero(pairs.row == end)
        for first in range(0, len(same), BATCH):
            yield same[first : first + BATCH], int(end)


def best_is_answer(pairs: uw.Pairs, logits: torch.Tensor) -> np.ndarray:
    """Is the answer above the other choices?"""
    choices = np.asarray(pairs.choices)
    best = logits.gather(1, torch.from_numpy(choices)).argmax(1).numpy()
    return choices[np.arange(len(choices)), best] == pairs.answer


# --- tables -----------------------------------------------------------------------------------------------------------


def kept_choices(found: dict[str, Any]) -> pd.DataFrame:
    """What was chosen on each half, of so many tried, with the right answers there."""
    lines = {}
    for one in found["chosen"]:
        nothing, *tried = one["tried"]
        most = max(part["right"] for part in tried)
        lines[f"{one['items']} items, half {'AB'[one['half']]}"] = {
            "heads": " and ".join(one["heads"]), "part of their attention": one["part"], "tried": len(tried),
            "right there": f"{nothing['right']} → {most} of {nothing['of']}",
        }  # fmt: skip
    return pd.DataFrame(lines).T


def kept_repairs(found: dict[str, Any]) -> pd.DataFrame:
    """By length and template what an override that was chosen on the other half does, beside its controls."""
    lines = {}
    for (k, template), own in by_list(found["lines"]).items():
        none, best = own["none"], own["chosen on the other half"]
        others = [one for name, one in own.items() if name.endswith("instead")]
        other = max(others, key=lambda one: one["right"])
        lines[f"{k} items, {template}"] = {
            "right": rate(none), "chosen on the other half": rate(best), "gain": gain(best),
            "repaired, broken": f"+{best['repaired']} −{best['broken']}, p {best['p']:.1g}",
            "L20H0 alone": gain(own["L20H0, all of it"]), "random tokens": gain(own["the same, random tokens"]),
            "removed": gain(own["the chosen heads removed"]), f"best of {len(others)} other heads": gain(other),
        }  # fmt: skip
    return pd.DataFrame(lines).T


def by_list(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, str], dict[str, dict[str, Any]]]:
    """Lines by length and template, then by override."""
    made: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for one in sorted(lines, key=lambda one: (one["items"], one["template"])):
        made.setdefault((one["items"], one["template"]), {})[one["override"]] = one
    return made


def rate(one: Mapping[str, Any]) -> str:
    """Wilson's 95 % interval."""
    low, high = binomtest(one["right"], one["of"]).proportion_ci(method="wilson")
    return f"{one['right'] / one['of']:.2f} [{low:.2f}, {high:.2f}]"


def gain(one: Mapping[str, Any]) -> str:
    """What the rate gains, with its interval."""
    return f"{(one['repaired'] - one['broken']) / one['of']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"


if __name__ == "__main__":
    keep(__doc__, measured, "reuse")
