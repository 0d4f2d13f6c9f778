"""How few edges keep indirect object identification in a real model, and are the slopes that choose them right?

    python examples/circuits/edges.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-edges.json` beside this file, from which docs/circuits.md is made. Pairs are those of measure.py: 8 make
orders, 10 others judge them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from measure import NODES, about, curves, keep, said
from scipy.stats import spearmanr

import unwrite as uw

SIZES = (100, 300, 1000, 3000, 10000, 30000)
SLOPES = ("eap-ig", "eap")
# Orders of nodes: each edge has the number of its sender.
SENDERS = ("relp", "atp", "direct")
TOP = 20


def measured(model: str) -> dict[str, Any]:
    """Curves of edges by slopes, by the numbers of senders and by chance; and the largest edges executed."""
    lm = uw.load(model, dtype="float32")
    ranking, judged = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((8, 0), (10, 1)))
    guessed = {name: uw.paths(lm, ranking, "all", "all", method=name) for name in SLOPES}
    orders = dict(guessed)
    for name in SENDERS:
        effects = uw.effects(lm, ranking, ["embed", *NODES], at="all", method=name)
        orders[f"{name} of senders"] = of_senders(guessed["eap-ig"], effects)
    found = uw.circuit(lm, judged, orders, SIZES, draws=3)
    return {
        **about(lm, found),
        "metric": [found["base"].mean().item(), found["empty"].mean().item()], "clusters": found.data.attrs["clusters"],
        "edges": int(found.data.attrs["of"]), "curves": curves(found, SIZES), "notes": found.data.attrs["notes"],
        "executed": executed(lm, ranking, guessed),
    }  # fmt: skip


def of_senders(edges: uw.Result, nodes: uw.Result) -> uw.Result:
    """An order of edges in which each has the effect of its sender."""
    effect = nodes["effect"].rename(node="sender").reset_coords(drop=True).sel(sender=edges["sender"])
    return uw.Result(edges.data.assign(effect=effect.where(edges["effect"].notnull())))


def executed(lm: Any, pairs: Any, guessed: dict[str, uw.Result]) -> dict[str, Any]:
    """All edges into the receivers of the largest ones by EAP-IG, executed on the same pairs; and the largest alone."""
    means = {name: one["mean"] for name, one in guessed.items()}
    flat = abs(means["eap-ig"]).stack(edge=("sender", "receiver")).dropna("edge")
    top = [tuple(edge) for edge in flat.edge.values[np.argsort(-flat.values, kind="stable")[:TOP]]]
    receivers = [*dict.fromkeys(receiver for _, receiver in top)]
    exact = uw.paths(lm, pairs, "all", receivers, "frozen")
    there = exact["mean"].notnull().values
    agree = {}
    for name, mean in means.items():
        both = mean.sel(receiver=receivers).values[there], exact["mean"].values[there]
        agree[name] = {"r": float(np.corrcoef(*both)[0, 1]), "spearman": float(spearmanr(*both).statistic)}
    lines = []
    for sender, receiver in top:
        at = {"sender": sender, "receiver": receiver}
        ends = {
            name: [one[f"mean{end}"].sel(at).item() for end in ("", "_low", "_high")]
            for name, one in {**guessed, "executed": exact}.items()
        }
        lines.append({"edge": f"{sender} → {receiver}", **ends})
    return {"receivers": receivers, "edges": int(there.sum()), "pairs": len(pairs), "agree": agree, "top": lines}


def kept_executed(found: dict[str, Any]) -> pd.DataFrame:
    """The largest edges by EAP-IG: the guesses beside what was executed, with 95 % intervals."""
    lines = {}
    for one in found["executed"]["top"]:
        cells = {name: [said(value) for value in one[name]] for name in (*SLOPES, "executed")}
        lines[one["edge"]] = {name: f"{mean} [{low}, {high}]" for name, (mean, low, high) in cells.items()}
    return pd.DataFrame(lines).T


if __name__ == "__main__":
    keep(__doc__, measured, "edges")
