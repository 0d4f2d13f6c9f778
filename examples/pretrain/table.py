"""What did the sweep find, and what the checkpoints of the bundled model's run? Tables and a figure.

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

SHIPPED = Path(__file__).parents[2] / "src" / "unwrite" / "bundled" / "training.json"
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
    """The checkpoints along the bundled model's run, first to last; the last is the one that ships."""
    shipped = json.loads(SHIPPED.read_text())
    return sorted([run for run in _results() if "configuration" not in run] + [shipped], key=lambda run: run["step"])


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def heads(run: dict[str, Any]) -> pd.DataFrame:
    """The rows of the heads."""
    rows = pd.DataFrame(run["writers"])
    return rows[rows["writer"].str.contains("H")]


Column = Callable[[dict[str, Any]], float]


def _of_heads(name: str, how: str) -> Column:
    return lambda run: getattr(heads(run)[name], how)()


def _judged(*verdicts: str) -> Column:
    return lambda run: heads(run)["verdict"].isin(verdicts).sum()


def _of(writer: str, name: str) -> Column:
    return lambda run: next(row[name] for row in run["writers"] if row["writer"] == writer)


TABLES: dict[str, dict[str, Column]] = {
    "heads": {
        "loss": lambda run: np.mean(list(run["held_out"].values())),
        "survival": _of_heads("survival", "median"),
        "generic": _of_heads("generic", "median"),
        "gap": _of_heads("gap", "median"),
        "erased": _judged("erased"),
        "filled in": _judged("filled in"),
        "kept or amplified": _judged("kept", "amplified"),
        "MLP0 / a head of layer 0": lambda run: (
            _of("MLP0", "relative_norm")(run) / heads(run)["relative_norm"][heads(run)["writer"].str[:2] == "L0"].mean()
        ),
    },
    "who acts on heads": {
        "erased by heads": _of_heads("erased_by_heads", "mean"),
        "erased by MLPs": _of_heads("erased_by_mlps", "mean"),
        "filled in by heads": _of_heads("filled_in_by_heads", "mean"),
        "filled in by MLPs": _of_heads("filled_in_by_mlps", "mean"),
    },
    "position embedding": {
        "survival": _of("pos_embed", "survival"),
        "generic": _of("pos_embed", "generic"),
        "gap": _of("pos_embed", "gap"),
        "standard error of the gap": _of("pos_embed", "gap_se"),
        "runs in which it is erased": lambda run: float(_of("pos_embed", "verdict")(run) == "erased"),
        "erased by heads": _of("pos_embed", "erased_by_heads"),
        "erased by MLPs": _of("pos_embed", "erased_by_mlps"),
    },
}


def frame(found: list[dict[str, Any]], by: str, columns: dict[str, Column]) -> pd.DataFrame:
    """One row for each configuration or step."""
    rows = {}
    for name in dict.fromkeys(run[by] for run in found):
        same = [run for run in found if run[by] == name]
        label = f"{name} ({len(same)} seeds)" if len(same) > 1 else str(name)
        rows[label] = [_cell([column(run) for run in same]) for column in columns.values()]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).rename_axis(columns=by)


def _cell(values: list[float]) -> str:
    middle = f"{np.mean(values):.3g}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.3g}, {max(values):.3g}]"


def figure(found: list[dict[str, Any]]) -> alt.FacetChart:
    """Survival minus generic of every head and of the position embedding, by configuration; seeds side by side."""
    rows = pd.concat(
        [pd.DataFrame(run["writers"]).assign(configuration=run["configuration"], seed=run["seed"]) for run in found]
    )
    rows = rows[~rows["writer"].str.startswith("MLP")]
    rows["writers"] = np.where(rows["writer"] == "pos_embed", "position", rows["writer"].str[:2] + " heads")
    order = list(dict.fromkeys(run["configuration"] for run in found))
    points = alt.Chart(rows).mark_circle(size=28, opacity=0.8).encode(
        x=alt.X("writers:N", title=None, sort=["position"]), xOffset="seed:N",
        y=alt.Y("gap:Q", title="survival − generic", scale=alt.Scale(domain=[-2, 2], clamp=True)),
        color=alt.Color("verdict:N", scale=alt.Scale(domain=list(VERDICTS), range=list(VERDICTS.values())), title=None),
    ).properties(width=100, height=220)  # fmt: skip
    return points.facet(alt.Column("configuration:N", sort=order, title=None)).configure_legend(orient="bottom")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    for name, columns in TABLES.items():
        for found, by in ((runs(), "configuration"), (steps(), "step")):
            print(f"{name}\n{frame(found, by, columns).to_string()}\n")
    if asked.figure:
        figure(runs()).save(asked.figure, scale_factor=2)
