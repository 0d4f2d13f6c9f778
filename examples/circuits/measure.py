"""How few nodes keep indirect object identification in a real model, by which order, and which are used elsewhere?

    python examples/circuits/measure.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as `results/NAME.json`
beside this file, from which docs/circuits.md is made. Orders are made of 8 pairs, and judged by 10 others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

import unwrite as uw

RESULTS = Path(__file__).parent / "results"
NODES = ["heads", "mlp_out"]
ORDERS = ("relp", "atp", "ig", "direct")
SIZES = (10, 20, 40, 80, 160)
TOP = (0.05, 0.1)


def measured(model: str) -> dict[str, Any]:
    """Curves without and with what decides alone, and the heads that other tasks share."""
    lm = uw.load(model, dtype="float32")
    ranking, judged = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((8, 0), (10, 1)))
    orders = {name: uw.effects(lm, ranking, NODES, at="all", method=name, steps=5) for name in ORDERS}
    free = uw.circuit(lm, judged, orders, SIZES, draws=3)
    gates = [*filter(None, free.data.attrs["gates"].split(", "))]
    held = uw.circuit(lm, judged, orders, SIZES, given=gates, draws=3, gates=False) if gates else free
    about = free.provenance["model"]
    return {
        "model": {name: about[name] for name in ("family", "layers", "heads", "d_model", "weights")},
        "certificate": lm.certificate.explain(), "versions": free.provenance["versions"],
        "gates": {name: free["gate"].sel(node=name).item() for name in gates}, "solves": free.data.attrs["solves"],
        "metric": [free["base"].mean().item(), free["empty"].mean().item()], "clusters": free.data.attrs["clusters"],
        "free": curves(free), "held": curves(held), "overlap": overlaps(lm),
    }  # fmt: skip


def curves(found: uw.Result) -> list[dict[str, Any]]:
    """A line for each order and sign, and one for each order of chance."""
    lines = []
    for order in found.data["order"].values:
        for by in found.data["by"].values:
            one = found.data.sel(order=order, by=by)
            ends = {
                part: one[f"faithfulness{part}"].sel(size=list(SIZES)).values.tolist() for part in ("", "_low", "_high")
            }
            numbers = {name: one[name].item() for name in ("smallest", "area", "distance")}
            lines.append(
                {"order": f"{order}, {by}", "f": ends[""], "low": ends["_low"], "high": ends["_high"], **numbers}
            )
    for draw in range(found.data.sizes["draw"]):
        one = found.data.isel(draw=draw)
        lines.append({"order": f"random {draw}", "f": one["random"].sel(size=list(SIZES)).values.tolist()})
    return lines


def overlaps(lm: Any) -> list[dict[str, Any]]:
    """Heads by RelP of each task beside those of ioi, 8 pairs each."""
    tasks = uw.tasks
    made = {
        "ioi, other pairs": tasks.ioi(8, lm.tokenizer, 5, bos=False),
        "laundry list of 2": tasks.laundry(8, lm.tokenizer, 0, k=2, bos=False),
        "capitals": tasks.capitals(8, lm.tokenizer, 0, bos=False),
        "docstring": tasks.docstring(8, lm.tokenizer, 0, bos=False),
        "agreement": tasks.agreement(8, lm.tokenizer, 0, bos=False),
    }
    own = uw.effects(lm, tasks.ioi(8, lm.tokenizer, 0, bos=False), at="all", method="relp")
    lines = []
    for name, pairs in made.items():
        found = uw.overlap(own, uw.effects(lm, pairs, at="all", method="relp"), TOP).data.isel(stage=0)
        numbers = ("shared", "union", "jaccard", "expected", "p", "ceiling_a", "ceiling_b")
        lines.append({"task": name, **{part: found[part].values.tolist() for part in numbers}})
        lines[-1] |= {"both": str(found["both"].values[0]), "spearman": found["spearman"].item()}
    return lines


def kept(name: str) -> dict[str, Any]:
    """What was found of a model."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def kept_curves(found: dict[str, Any], which: str) -> pd.DataFrame:
    """Faithfulness by how many nodes are kept, with its 95 % interval."""
    lines = {}
    for one in found[which]:
        cells = [said(f) for f in one["f"]]
        if "low" in one:
            ends = zip(cells, one["low"], one["high"], strict=True)
            cells = [f"{cell} [{said(low)}, {said(high)}]" for cell, low, high in ends]
        few = [f"{one['smallest']:.0f}", f"{one['area']:.2f}", f"{one['distance']:.2f}"] if "area" in one else [""] * 3
        lines[one["order"]] = [*cells, *few]
    return pd.DataFrame(lines, index=[*(f"{size} kept" for size in SIZES), "fewest for .85", "CPR", "CMD"]).T


def said(value: float) -> str:
    """Two digits, and no zero with a sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def kept_overlaps(found: dict[str, Any]) -> pd.DataFrame:
    """Jaccard with ioi's largest heads at both parts, beside chance and the halves of each task's own pairs."""
    lines = {}
    for one in found["overlap"]:
        cells = [f"{j:.2f} (p {p:.1g})" for j, p in zip(one["jaccard"], one["p"], strict=True)]
        halves = [f"{a:.2f}, {b:.2f}" for a, b in zip(one["ceiling_a"], one["ceiling_b"], strict=True)]
        lines[one["task"]] = [cells[0], halves[0], cells[1], halves[1], f"{one['spearman']:.2f}"]
    names = [word for top in TOP for word in (f"top {top:.0%} of heads", f"own halves, {top:.0%}")]
    return pd.DataFrame(lines, index=[*names, "ranks of all"]).T


def main() -> None:
    """Measure a model and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(measured(asked.model), indent=1)
    (RESULTS / f"{asked.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
