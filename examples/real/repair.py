"""How much of direct effects is not missed in a real language model, and is it repair, or had it been erased?

    python examples/real/repair.py MODEL BOOKS --name NAME --work FOLDER

MODEL is a folder or a hub name, BOOKS a folder of books; of each so many windows are read, and the logit of the token
that comes next is asked about, less the mean of some tokens drawn by chance (nearly a centred logit), as Rushing and
Nanda 2024 (arXiv 2402.15390) do with writes of other prompts in the place of a node's own. What was found is kept as
`results/NAME-repair.json` beside this file, from which docs/self-repair.md is made, with what erasure.py found of the
same writers beside it. A run that was stopped goes on from FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from erasure import frames, keep, kept, rounded

import unwrite as uw

BOOKS, WINDOWS, LENGTH, BESIDE, TOP = 24, 4, 33, 64, 0.1
PARTS = ("all", "norm", "filled_in", "erased")
# Layers with a part beyond this have no direct effect to speak of.
FAR = 2
EARLY = ("heads before the last layer", "mlps before the last layer")


def measured(model: str, folder: Path, work: Path) -> dict[str, Any]:
    """Of every node what is not missed on its largest direct effects, and of groups of nodes."""
    lm = uw.load(model, dtype="float32")
    texts = [file.read_text("utf-8") for file in sorted(folder.glob("*.txt"))[:BOOKS]]
    tokens = uw.text(texts, lm.tokenizer, n=len(texts) * WINDOWS, length=LENGTH)
    random = np.random.default_rng(0).choice(lm.vocabulary, BESIDE, replace=False)
    found = uw.dla(
        lm, tokens, tokens.ids[:, -1].tolist(), [random.tolist()] * len(tokens), LENGTH - 2, "position", "resample",
        checkpoint=work,
    )  # fmt: skip
    made = uw.self_repair(found, TOP).data
    record, prompts = found.provenance, np.isfinite(found["total"].values).all(1)
    return {
        "model": {key: record["model"][key] for key in ("family", "layers", "heads", "d_model", "weights")},
        "versions": record["versions"], "hash": tokens.hash, "prompts": int(prompts.sum()), "books": len(texts),
        "top": TOP, "nodes": [line(made.sel(node=node), "share") for node in made["node"].values],
        "groups": [line(made.sel(group=group), "group_share") for group in made["group"].values],
        "every": every(found.data),
    }  # fmt: skip


def line(one: Any, name: str) -> dict[str, Any]:
    """Of a node, or of a group: parts of direct with their intervals."""
    means = {part: float(one[part]) for part in ("mean_direct", "mean_total") if one[part].ndim == 0}
    shares = {part: [float(one[f"{name}{end}"].sel(part=part)) for end in ("", "_low", "_high")] for part in PARTS}
    counted = int(one["counted"].sum()) if one["counted"].ndim == 1 else None
    return {"name": str(one["node" if name == "share" else "group"].item()), **means, "counted": counted, **shares}


def every(data: Any) -> dict[str, list[float]]:
    """Σ over prompts of direct, total and each part, of the absolute direct effects of all nodes of a layer: no choice.

    The sign is that of direct, so that what is repaired counts alike for and against the answer.
    """
    sign, why = np.sign(data["why"].sel(part="direct")), data["why"]
    early = data["layer"] < data["layer"].max()
    sums = {name: (sign * why.sel(part=name)).where(early).sum(("prompt", "node")) for name in why["part"].values}
    return {str(name): float(part) for name, part in sums.items()}


# What docs/self-repair.md is made of.


def groups(found: dict[str, Any]) -> pd.DataFrame:
    """Heads and MLPs before the last layer, and heads by layer: which part of direct is not missed, and why."""
    return pd.DataFrame([
        {"nodes": one["name"], "not missed": said(one["all"]), "norm": said(one["norm"]),
         "filled in": said(one["filled_in"]), "erased": said(one["erased"])}
        for one in found["groups"] if one["name"] in EARLY
    ]).set_index("nodes")  # fmt: skip


def said(part: list[float | None]) -> str:
    """A share with its interval."""
    middle, low, high = part
    if middle is None:
        return ""
    return f"{middle:.2f}" if low is None else f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def nodes(found: dict[str, Any], name: str) -> pd.DataFrame:
    """A line for each node with a direct effect; survival at the end and the verdict as the first set of books said."""
    left = frames(kept(name))[0]
    lines = []
    for one in found["nodes"]:
        if one["all"][0] is not None:
            survives = left["end"].get(one["name"], np.nan), left["verdict"].get(one["name"], "")
            shares = {part: one[part][0] for part in PARTS}
            means = {part: one[f"mean_{part}"] for part in ("direct", "total")}
            lines.append({"node": one["name"], **means, **shares, "survives": survives[0], "verdict": survives[1]})
    return pd.DataFrame(lines).set_index("node")


def scatter(frame: pd.DataFrame, title: str) -> alt.LayerChart:
    """Each point a head: what the logit loses without its write over its direct effect; on the line nothing repairs."""
    shown = frame[frame.index.str.contains("H")].reset_index()
    shown["layer"] = shown["node"].str.extract(r"L(\d+)", expand=False).astype(int)
    most = float(shown["direct"].max())
    x, y = alt.X("direct:Q", title="direct effect (logits)"), alt.Y("total:Q", title="lost without the write (logits)")
    even = alt.Chart(pd.DataFrame({"direct": [0.0, most], "total": [0.0, most]}))
    points = alt.Chart(shown).mark_circle(size=30, opacity=0.8).encode(x=x, y=y, color="layer:Q")
    return alt.layer(even.mark_line(strokeDash=[3, 3], color="gray").encode(x=x, y=y), points).properties(
        width=280, height=260, title=title
    )


def layers(found: dict[str, Any], title: str) -> alt.Chart:
    """Of the heads of each layer, which part of direct is not missed, and why."""
    said = {"norm": "norm", "filled_in": "filled in", "erased": "erased"}
    lines = [
        {"layer": int(one["name"][1:].partition(".")[0]), "part": name, "share": one[part][0]}
        for one in found["groups"] if one["name"] not in EARLY and abs(one["all"][0]) <= FAR
        and max(abs(one[part][0]) for part in said) <= FAR for part, name in said.items()
    ]  # fmt: skip
    colour = alt.Color("part:N", title=None, sort=None, scale=alt.Scale(range=["#888888", "#d1751f", "#1f6fb2"]))
    encoded = (
        alt.Chart(pd.DataFrame(lines))
        .mark_bar()
        .encode(x=alt.X("layer:O"), y=alt.Y("share:Q", title="part of direct"), color=colour)
    )
    return encoded.properties(width=300, height=180, title=title)


def without_choice(found: dict[str, Any]) -> dict[str, str]:
    """Over all prompts and nodes before the last layer: parts of Σ |direct|, none of them chosen."""
    every = found["every"]
    return {
        "total": f"{sum(every.values()) / every['direct']:.2f}",
        **{part.replace("_", " "): f"{-every[part] / every['direct']:.2f}" for part in PARTS[1:]},
    }


def erased(frame: pd.DataFrame, names: Any) -> pd.DataFrame:
    """What self-repair says of some writers, beside what survives of them."""
    shown = frame.loc[[*names]]
    return shown.rename(columns={"all": "not missed", "filled_in": "filled in"}).round(2)


def agreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Over heads: Spearman's correlation of what survives at the end with each part of what is not missed."""
    heads = frame[frame.index.str.contains("H")].dropna()
    corr = heads[[*PARTS, "survives"]].corr("spearman")["survives"].drop("survives")
    return corr.rename(f"with survival, {len(heads)} heads").round(2).to_frame().T


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("books", type=Path)
    asked.add_argument("--name", required=True)
    asked.add_argument("--work", type=Path, required=True)
    given = asked.parse_args()
    result = rounded(measured(given.model, given.books, given.work))
    keep(f"{given.name}-repair", result)
