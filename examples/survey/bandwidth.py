"""What does the width of a stream change, and when in training does erasure appear? Tables of docs/bandwidth.md.

From what `survey.py` found of the models of examples/pretrain/sweep.py and their checkpoints, and from what was kept of
their training. A number is the mean over seeds, with the lowest and the highest seed in brackets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from table import COLOURS, every, strongest, trained, writers

TRAINING = Path(__file__).parents[1] / "pretrain" / "results"


@cache
def runs() -> list[dict[str, Any]]:
    """The models of the sweep at the end of their training and, of each, its checkpoints."""
    return [one for one in every() if trained(one["name"])]


def training(name: str) -> dict[str, Any]:
    """Settings, loss curve and loss on held-out books of a run."""
    return json.loads((TRAINING / f"{name}.json").read_text())


@cache
def rows() -> pd.DataFrame:
    """Every writer before the last layer of every such model, with its width, seed and step."""
    known = []
    for one in runs():
        part = trained(one["name"]) or {}
        step = part["step"] or training(f"w{part['width']}-s{part['seed']}")["step"]
        known.append({"model": one["name"], "width": int(part["width"]), "seed": int(part["seed"]), "step": int(step)})
    frame = strongest(writers(runs())).merge(pd.DataFrame(known), on="model")
    return frame[frame["layer"] < frame["layers"] - 1]


Column = Callable[[pd.DataFrame], float]


def _median(kind: str, name: str) -> Column:
    return lambda part: part.loc[part["kind"] == kind, name].median()


def _count(kind: str, name: str) -> Column:
    """Mean over texts."""
    return lambda part: part.loc[part["kind"] == kind, name].sum() / part["text"].nunique()


def _of(writer: str, name: str) -> Column:
    return lambda part: part.loc[part["writer"] == writer, name].mean()


HEADS: dict[str, Column] = {
    "material heads": lambda part: (part["kind"] == "head").sum() / part["text"].nunique(),
    "survives": _median("head", "end"),
    "ordinary": _median("head", "ordinary"),
    "surely below": _count("head", "below"),
    "surely above": _count("head", "above"),
    "undecided": lambda part: ((part["kind"] == "head") & ~part["decided"]).sum() / part["text"].nunique(),
    "heads act on them": _median("head", "heads"),
    "MLPs act on them": _median("head", "mlps"),
}
POSITIONS: dict[str, Column] = {
    "survives": _of("pos_embed", "end"),
    "ordinary": _of("pos_embed", "ordinary"),
    "surely below": _of("pos_embed", "below"),
    "heads act on it": _of("pos_embed", "heads"),
    "MLPs act on it": _of("pos_embed", "mlps"),
}


def by_width(columns: dict[str, Column]) -> pd.DataFrame:
    """At the end of training."""
    last = rows()[rows()["model"].str.fullmatch(r"w\d+-s\d+")]
    table = frame(last, "width", columns)
    seeds = [(width, sorted(part["seed"].unique())) for width, part in last.groupby("width")]
    table.insert(0, "loss", [_cell([_loss(width, seed) for seed in own]) for width, own in seeds])
    return table


def by_step(width: int, columns: dict[str, Column]) -> pd.DataFrame:
    """Along the training of one width."""
    return frame(rows()[rows()["width"] == width], "step", columns)


def _loss(width: int, seed: int) -> float:
    return float(np.mean([*training(f"w{width}-s{seed}")["held_out"].values()]))


def frame(found: pd.DataFrame, by: str, columns: dict[str, Column]) -> pd.DataFrame:
    """One row for each width or step, one number of each seed in every cell."""
    table = {}
    for name, part in found.groupby(by):
        seeds = [own for _, own in part.groupby("seed")]
        label = f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else str(name)
        table[label] = {said: _cell([column(own) for own in seeds]) for said, column in columns.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(columns=by)


def _cell(values: list[float]) -> str:
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "–"
    middle = f"{np.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}, {max(values):.2f}]"


def figure() -> alt.FacetChart:
    """What survives of every write on the first text, beside ordinary writes, by step; seeds and writers as points."""
    found = rows()[rows()["text"] == 0]
    points = alt.Chart(found[["width", "step", "seed", "writer", "kind", "gap", "verdict"]]).mark_point(
        filled=True, size=26, stroke="#777", strokeWidth=0.3, opacity=0.9
    ).encode(
        x=alt.X("step:O", title="step"), xOffset="kind:N",
        y=alt.Y("gap:Q", title="survives − ordinary", scale=alt.Scale(domain=[-1.5, 1.5], clamp=True)),
        color=alt.Color(
            "verdict:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), title=None
        ), shape="kind:N", tooltip=["writer", "seed", "gap", "verdict"],
    ).properties(width=180, height=200)  # fmt: skip
    return points.facet(alt.Column("width:O", title="width")).configure_legend(orient="bottom")
