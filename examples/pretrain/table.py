"""What did the sweep find, and what the checkpoints of the bundled model's run? Tables in Markdown, and a figure.

    python examples/pretrain/table.py [--figure docs/bandwidth.png]

Reads `results/` beside this file, which `sweep.py` and `bundle.py` fill. Writers are the heads before the last layer; a
number is the mean over seeds, with the lowest and the highest seed in brackets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from sweep import CONFIGURATIONS, RESULTS

VERDICTS = {
    "erased": "#b2182b", "filled in": "#ef8a62", "decays like anything": "#bdbdbd", "kept": "#67a9cf",
    "amplified": "#2166ac",
}  # fmt: skip


def runs() -> list[dict[str, Any]]:
    """All runs of the sweep, in its own order."""
    order = list(CONFIGURATIONS)
    found = [run for run in _results() if "configuration" in run]
    return sorted(found, key=lambda run: (order.index(run["configuration"]), run["seed"]))


def steps() -> list[dict[str, Any]]:
    """The checkpoints along the bundled model's run, first to last."""
    return sorted((run for run in _results() if "configuration" not in run), key=lambda run: run["step"])


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def heads(run: dict[str, Any]) -> pd.DataFrame:
    """The rows of the heads."""
    rows = pd.DataFrame(run["writers"])
    return rows[rows["writer"].str.contains("H")]


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "loss": lambda run: np.mean(list(run["held_out"].values())),
    "survival": lambda run: heads(run)["survival"].median(),
    "generic": lambda run: heads(run)["generic"].median(),
    "gap": lambda run: heads(run)["gap"].median(),
    "erased": lambda run: (heads(run)["verdict"] == "erased").sum(),
    "filled in": lambda run: (heads(run)["verdict"] == "filled in").sum(),
    "kept or amplified": lambda run: heads(run)["verdict"].isin(["kept", "amplified"]).sum(),
    "erased by heads": lambda run: heads(run)["erased_by_heads"].mean(),
    "erased by MLPs": lambda run: heads(run)["erased_by_mlps"].mean(),
    "filled in by heads": lambda run: heads(run)["filled_in_by_heads"].mean(),
    "filled in by MLPs": lambda run: heads(run)["filled_in_by_mlps"].mean(),
    "MLP0 / heads of layer 0": lambda run: _norm(run, "MLP0") / np.mean([_norm(run, f"L0H{h}") for h in range(8)]),
}


def _norm(run: dict[str, Any], writer: str) -> float:
    return next(row["relative_norm"] for row in run["writers"] if row["writer"] == writer)


def markdown(found: list[dict[str, Any]], by: str) -> str:
    """One row for each configuration or step."""
    lines = ["| " + " | ".join([by, *COLUMNS]) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in dict.fromkeys(run[by] for run in found):
        same = [run for run in found if run[by] == name]
        cells = [_cell([column(run) for run in same]) for column in COLUMNS.values()]
        lines.append("| " + " | ".join([str(name), *cells]) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    middle = f"{np.mean(values):.3g}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.3g}, {max(values):.3g}]"


def figure(found: list[dict[str, Any]]) -> alt.Chart:
    """Survival minus generic of every head, by configuration."""
    rows = pd.concat([heads(run).assign(configuration=run["configuration"], seed=run["seed"]) for run in found])
    rows["layer"] = rows["writer"].str.slice(0, 2)
    order = list(dict.fromkeys(run["configuration"] for run in found))
    points = alt.Chart(rows).mark_circle(size=28, opacity=0.8).encode(
        x=alt.X("layer:N", title=None), xOffset="jitter:Q",
        y=alt.Y("gap:Q", title="survival − generic", scale=alt.Scale(domain=[-2, 2], clamp=True)),
        color=alt.Color("verdict:N", scale=alt.Scale(domain=list(VERDICTS), range=list(VERDICTS.values())), title=None),
    ).transform_calculate(jitter="random()").properties(width=90, height=220)  # fmt: skip
    return points.facet(alt.Column("configuration:N", sort=order, title=None)).configure_legend(orient="bottom")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    print(markdown(runs(), "configuration"), markdown(steps(), "step"), sep="\n\n")
    if asked.figure:
        figure(runs()).save(asked.figure, scale_factor=2)
