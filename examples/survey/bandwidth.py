"""What does the width of a stream change, and when in training does erasure appear? Tables of docs/bandwidth.md.

From what `survey.py` found of the models of examples/pretrain/sweep.py, their checkpoints and the bundled model, and
from what was kept of their training. A number is the mean over seeds, with the lowest and the highest seed in brackets
where there are several.
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

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "examples" / "pretrain" / "results"
SHIPPED = ROOT / "src" / "unwrite" / "bundled" / "training.json"
BUNDLED = "bundled"


def training(name: str) -> dict[str, Any]:
    """Settings, loss curve and loss on held-out books of the run that a model or a checkpoint is of."""
    found = trained(name)
    file = TRAINING / f"w{found['width']}-s{found['seed']}.json" if found else SHIPPED
    return json.loads(file.read_text())


@cache
def rows() -> pd.DataFrame:
    """Every writer before the last layer of every such model, with its run, its seed and the tokens seen by then."""
    own = [one for one in every() if trained(one["name"]) or one["name"] == BUNDLED]
    frame = strongest(writers(own)).merge(pd.DataFrame([_known(one["name"]) for one in own]), on="model")
    return frame[frame["layer"] < frame["layers"] - 1].sort_values(
        ["width", "shipped", "tokens, millions"], kind="stable"
    )


def _known(name: str) -> dict[str, Any]:
    """Millions of tokens are those that were seen."""
    record, found = training(name), trained(name) or {}
    settings = record["settings"]
    millions = int(found.get("step") or record["step"]) * settings["batch"] * settings["context"] / 1e6
    run, shipped = f"width {settings['width']}", name == BUNDLED
    known = {"model": name, "run": run + ", bundled" * shipped, "seed": settings["seed"]}
    return known | {"width": settings["width"], "shipped": shipped, "tokens, millions": round(millions, 2)}


Column = Callable[[pd.DataFrame], float]


def _median(name: str) -> Column:
    return lambda part: part.loc[part["kind"] == "head", name].median()


def _counted(name: str) -> Column:
    """Of a text, in the mean."""
    return lambda part: part.loc[part["kind"] == "head", name].sum() / part["text"].nunique()


def _of_positions(name: str) -> Column:
    return lambda part: part.loc[part["writer"] == "pos_embed", name].mean()


HEADS: dict[str, Column] = {
    "material heads": lambda part: (part["kind"] == "head").sum() / part["text"].nunique(),
    "survives": _median("end"),
    "ordinary": _median("ordinary"),
    "surely below": _counted("below"),
    "surely above": _counted("above"),
    "decided": _counted("decided"),
    "heads act on them": _median("heads"),
    "MLPs act on them": _median("mlps"),
}
POSITIONS: dict[str, Column] = {
    "survives": _of_positions("end"),
    "ordinary": _of_positions("ordinary"),
    "texts on which it is surely below": _of_positions("below"),
    "decided": _of_positions("decided"),
    "heads act on it": _of_positions("heads"),
    "MLPs act on it": _of_positions("mlps"),
}


def by_width(columns: dict[str, Column]) -> pd.DataFrame:
    """At the end of training, with the loss on held-out books."""
    ends = rows()[~rows()["model"].str.fullmatch(r"w\d+-s\d+-\d+")]
    table = frame(ends, ["run", "tokens, millions"], columns)
    losses = ends.groupby(["run", "tokens, millions"], sort=False)["model"].unique()
    table.insert(0, "loss", [_cell([_loss(name) for name in names]) for names in losses])
    return table


def by_tokens(columns: dict[str, Column]) -> pd.DataFrame:
    """Along training."""
    return frame(rows(), ["run", "tokens, millions"], columns)


def _loss(name: str) -> float:
    return float(np.mean([*training(name)["held_out"].values()]))


def frame(found: pd.DataFrame, by: list[str], columns: dict[str, Column]) -> pd.DataFrame:
    """One row for each run and age, one number of each seed in every cell."""
    table = {}
    for name, part in found.groupby(by, sort=False):
        seeds = [own for _, own in part.groupby("seed")]
        table[name] = {"seeds": str(len(seeds))} | {
            said: _cell([column(own) for own in seeds]) for said, column in columns.items()
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(by)


def _cell(values: list[float]) -> str:
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "–"
    middle = f"{np.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}, {max(values):.2f}]"


def figure() -> alt.FacetChart:
    """What survives of every write beside ordinary writes, on the first text, by what the model has seen; all seeds."""
    found = rows()[rows()["text"] == 0]
    kept = found[["run", "tokens, millions", "seed", "writer", "kind", "gap", "verdict"]]
    words = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    points = alt.Chart(kept).mark_point(filled=True, size=30, stroke="#777", strokeWidth=0.3, opacity=0.9).encode(
        x=alt.X("tokens, millions:O", title="tokens seen, millions"), xOffset="kind:N",
        shape=alt.Shape("kind:N", title=None),
        y=alt.Y("gap:Q", title="survives − ordinary", scale=alt.Scale(domain=[-1.5, 1.5], clamp=True)),
        color=alt.Color("verdict:N", scale=words, title=None), tooltip=["writer", "seed", "gap", "verdict"],
    ).properties(width=150, height=200)  # fmt: skip
    columns = alt.Column("run:N", title=None, sort=[*found["run"].unique()])
    return points.facet(columns).resolve_scale(x="independent").configure_legend(orient="bottom")
