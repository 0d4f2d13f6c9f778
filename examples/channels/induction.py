"""Do weights alone say which head an induction head reads? Patterns name the heads, and weights are asked afterwards.

    python examples/channels/induction.py MODEL --name NAME

MODEL is a folder or a hub name, or a run of examples/circuits/toy.py. What was found is kept as
`results/NAME-induction.json` beside this file, from which docs/channels.md is made. On tokens drawn by chance and then
repeated, an induction head looks behind where its token stood before (Olsson et al. 2022, arXiv 2209.11895); a
previous-token head looks one token back. The first reads the second by its keys. *Rank* is the place among all earlier
heads of the previous-token head that comes first. The toy is asked on its own scenes: a thing stands before the letter
of its box, is asked for, and the letter is to be said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from kept import keep, model_of
from toy import WHERE, batch

import unwrite as uw

PROMPTS, LENGTH, FIRST, SCENES = 8, 24, 300, 64
# A head is one or the other where it gives so much of its attention to that.
BACK, AGAIN = 0.5, 0.4


def measured(model: str) -> dict[str, Any]:
    """The heads of both kinds by their patterns, and how each side of an induction head reads by weights."""
    run = Path(model) / "run.json"
    lm = uw.load(Path(model) / "model" if run.exists() else model, dtype="float32")
    back, again, offset = in_scenes(lm) if run.exists() else looking(lm)
    previous, inducing = ([*part[part >= least].index] for part, least in ((back, BACK), (again, AGAIN)))
    made = uw.channels(lm, readers=inducing, offset=offset)
    lines = [line for reader in inducing for line in of_reader(made, reader, previous, float(again[reader]))]
    return {**model_of(made), "previous": {head: float(back[head]) for head in previous}, "lines": lines}


def looking(lm: Any) -> tuple[pd.Series, pd.Series, int]:
    """How much of its attention each head gives to the token before, and to that behind the same token earlier.

    Also how many tokens lie between the two.
    """
    drawn = torch.Generator().manual_seed(0)
    half = torch.randint(FIRST, lm.vocabulary, (PROMPTS, LENGTH), generator=drawn)
    start = torch.full((PROMPTS, 1), lm.tokenizer.bos_token_id or 0)
    looks = uw.attention(lm, torch.cat([start, half, half], 1))["weight"]
    query = np.arange(LENGTH + 1, 2 * LENGTH)
    names = [str(head) for head in looks["head"].values]
    back, again = (looks.values[:, :, query, query - far].mean((0, 2)) for far in (1, LENGTH - 1))
    return pd.Series(back, names), pd.Series(again, names), LENGTH - 1


def in_scenes(lm: Any) -> tuple[pd.Series, pd.Series, int]:
    """The same of the toy: from letters to the thing before them, and from a thing that is asked for to its letter."""
    ids, (end,) = batch(np.random.default_rng(0), SCENES, np.array([WHERE]))
    query, scene = end - 1, np.arange(SCENES)
    label = (ids[:, :query] == ids[:, [query]]).int().argmax(1).numpy() + 1
    looks = uw.attention(lm, ids[:, :end])["weight"]
    names = [str(head) for head in looks["head"].values]
    back, again = (looks.values[scene, :, at, to].mean(0) for at, to in ((label, label - 1), (query, label)))
    return pd.Series(back, names), pd.Series(again, names), round(float((query - label).mean()))


def of_reader(made: uw.Result, reader: str, previous: list[str], again: float) -> list[dict[str, Any]]:
    """A line for each side: of previous-token heads before it, the one that scores most, and its ranks."""
    lines = []
    for side in made.data["side"].values:
        one = made.data.sel(reader=reader, side=side)
        best, whole = (one[name].to_series().dropna() for name in ("best", "whole"))
        before = [head for head in previous if head in best.index]
        if not before:
            continue
        first = str(best[before].idxmax())
        lines.append({
            "reader": reader, "again": again, "side": str(side), "writers": len(best), "previous": len(before),
            "first": first, "score": float(best[first]), "rank": int((best > best[first]).sum()) + 1,
            "rank_whole": int(whole.rank(ascending=False)[before].min()),
            "random": float(one["generic_best"].sel(quantile=0.95)),
        })  # fmt: skip
    return lines


def kept_induction(found: dict[str, Any]) -> pd.DataFrame:
    """A line for each induction head: by keys who is read, and the ranks by its other sides beside it."""
    lines = {}
    for one in found["lines"]:
        line = lines.setdefault(one["reader"], {"induction head": one["reader"], "looks there": f"{one['again']:.2f}"})
        if one["side"] == "k":
            line |= {
                "previous-token head": one["first"], "score": f"{one['score']:.2f}", "random": f"{one['random']:.2f}",
                "rank by keys": f"{one['rank']} of {one['writers']}", "by whole heads": one["rank_whole"],
            }  # fmt: skip
        else:
            line[f"rank by {'queries' if one['side'] == 'q' else 'values'}"] = one["rank"]
    return pd.DataFrame(lines.values())


if __name__ == "__main__":
    keep(__doc__ or "", measured, "induction")
