"""What holds over all models that were surveyed, and what does not? Tables and a figure from what is kept.

Reads `results/` beside this file, which `survey.py` fills; docs/survey.md is made of what is here, and `lines.py`
prints it. A row of `writers` is one writer on one text. Models that were trained by one recipe are one lineage: shares
over models are given with the t interval of a jackknife over lineages, shares within a model with Wilson's.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from survey import LOST, READINGS, RESULTS, depth
from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.stats.jackknife import ratio
from unwrite.stats.verdicts import CRITERIA

# The words in the order in which tables have them, and their colours.
COLOURS = {
    "erased": "#b2182b", "reduced": "#ef8a62", "filled in": "#fddbc7", "kept": "#67a9cf", "amplified": "#2166ac",
    "like others": "#bdbdbd", "undecided": "#e8e8e8",
}  # fmt: skip
ABOVE = ("kept", "amplified")
DEPTHS = ("embedding", "first third", "second third", "last third", "last layer")
# A model of examples/pretrain/sweep.py: its width, its seed, and the step of a checkpoint.
_TRAINED = re.compile(r"w(?P<width>\d+)-s(?P<seed>\d+)(-(?P<step>\d+))?")
_FIRST = ("bundled", "w32-s", "w64-s", "w128-s", "stories260K", "arthur", "smollm2-135m", "gemma3-270m")


@cache
def every() -> list[dict[str, Any]]:
    """All that is kept, checkpoints and all, in the order of tables."""
    found = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    return sorted(found, key=lambda one: (_rank(one["name"]), one["name"]))


def _rank(name: str) -> int:
    return next((i for i, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST))


def models() -> list[dict[str, Any]]:
    """The models, without their checkpoints."""
    return [one for one in every() if step_of(one["name"]) is None]


def trained(name: str) -> dict[str, str] | None:
    """Width, seed and step of a model of the sweep."""
    found = _TRAINED.fullmatch(name)
    return found.groupdict() if found else None


def step_of(name: str) -> int | None:
    """The step of a checkpoint."""
    found = trained(name)
    return int(found["step"]) if found and found["step"] else None


def lineage(name: str) -> str:
    """Models of one recipe and one text are no independent evidence."""
    return "examples/pretrain" if trained(name) or name == "bundled" else name


def writers(found: list[dict[str, Any]] | None = None) -> pd.DataFrame:
    """Every writer of every model on every text that it was material on.

    But for those that no later node reads, and for the embedding, without which the stream is empty.
    """
    rows = []
    for one in models() if found is None else found:
        for i, part in enumerate(one["writers"]):
            known = {"model": one["name"], "lineage": lineage(one["name"]), "text": i, "layers": one["model"]["layers"]}
            read = [row for row in part if (row["heads"] or row["mlps"]) and row["writer"] != "embed"]
            rows += [known | placed(row["writer"], one["model"]["layers"]) | row for row in read]
    frame = pd.DataFrame(rows)
    frame["below"], frame["above"] = frame["verdict"].isin(LOST), frame["verdict"].isin(ABOVE)
    frame["decided"] = frame["verdict"] != "undecided"
    frame["ordinary"] = frame["ordinary"].str[1]
    return frame


def placed(writer: str, layers: int) -> dict[str, Any]:
    """Of which kind a node is, and where."""
    node = parse_node(writer)
    kind = "head" if node.kind in PROJECTED else "MLP" if node.kind in MLPS else "embedding"
    return {"kind": kind, "layer": node.layer, "depth": "embedding" if node.layer < 0 else depth(node.layer, layers)}


def wilson(k: float, n: float) -> str:
    """k of n, and Wilson's 95 % interval of the share."""
    if not n:
        return "–"
    low, high = stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return f"{int(k)} of {int(n)} [{low:.2f}, {high:.2f}]"


def over_lineages(frame: pd.DataFrame, yes: str) -> str:
    """The part of rows of which something is so; t interval of a jackknife over lineages, cut off at 0 and 1."""
    sums = frame.groupby("lineage")[yes].agg(["sum", "count"])
    value, low, high = ratio(sums["sum"].to_numpy(float), sums["count"].to_numpy(float), np.arange(len(sums)))
    return f"{float(value):.2f} [{max(float(low), 0):.2f}, {min(float(high), 1):.2f}]"


# Tables.


def counted() -> pd.DataFrame:
    """How many writers each word was said of, on each text."""
    said = dict(iter(writers().groupby("model")))
    rows = {}
    for one in models():
        shape, texts, frame = one["model"], one["texts"], said[one["name"]]
        words = [frame.loc[frame["text"] == i, "verdict"].value_counts() for i in range(len(texts))]
        rows[one["name"]] = {
            "layers × heads, width": f"{shape['layers']} × {shape['heads']}, {shape['d_model']}",
            "texts": " · ".join(text["text"] for text in texts),
            "documents": " · ".join(str(text["documents"]) for text in texts),
            "loss": " · ".join(f"{text['loss']:.2f}" for text in texts),
            "writers": " · ".join(str(part.sum()) for part in words),
            **{word: " · ".join(str(part.get(word, 0)) for part in words) for word in COLOURS},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def shares() -> pd.DataFrame:
    """Of all writers on all texts the part that each word was said of, and of those that are decided."""
    frame = writers()
    said = {word: frame.assign(said=frame["verdict"] == word) for word in COLOURS}
    table = {
        "of all": {word: over_lineages(part, "said") for word, part in said.items()},
        "of those that are decided": {
            word: over_lineages(part[part["decided"]], "said") for word, part in said.items() if word != "undecided"
        },
    }
    return pd.DataFrame(table).fillna("–").rename_axis("word")


@cache
def agreed() -> pd.DataFrame:
    """How a survey of the first text tells of others: of the same kind, and of another kind."""
    rows: dict[str, dict[str, str]] = {}
    frames = dict(iter(writers().groupby("model")))
    for one in models():
        first, *others = [part.set_index("writer") for _, part in frames[one["name"]].groupby("text")]
        names = [text["text"] for text in one["texts"]]
        for name, other in zip(names[1:], others, strict=True):
            kind = "same kind" if name.startswith(names[0]) else "other kind"
            said = _agreed(first, other)
            rows.setdefault(one["name"], {}).update({f"{column}, {kind}": value for column, value in said.items()})
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–").rename_axis("model")


def _agreed(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, str]:
    both = a.merge(b, left_index=True, right_index=True, suffixes=("", " b"))
    known = both[_known(both) & _known(both, " b")]
    decided = both[(both["verdict"] != "undecided") & (both["verdict b"] != "undecided")]
    special = both[both["verdict"].isin((*LOST, *ABOVE)) | both["verdict b"].isin((*LOST, *ABOVE))]
    again = special["verdict"] == special["verdict b"]
    side = np.sign(special["gap"]) == np.sign(special["gap b"])
    return {
        "r of survival": f"{_r(known):.2f}",
        "over so many": f"{len(known)} of {len(both)}",
        "r, all": f"{_r(both[both['end'].notna() & both['end b'].notna()]):.2f}",
        "same word": wilson((decided["verdict"] == decided["verdict b"]).sum(), len(decided)),
        "by chance": f"{_by_chance(decided):.2f}",
        "special on either, the same word": wilson(again.sum(), len(special)),
        "special on either, the same side": wilson(side.sum(), len(special)),
    }


def _known(both: pd.DataFrame, text: str = "") -> pd.Series:
    """Of which writers is survival known as well as a verdict asks for of ordinary writes?"""
    return both[f"end_high{text}"] - both[f"end_low{text}"] <= CRITERIA.wide


def _r(both: pd.DataFrame) -> float:
    """Survivals beyond ±3 count as such."""
    ends = both[["end", "end b"]].clip(-3, 3)
    return float(np.corrcoef(ends["end"], ends["end b"])[0, 1]) if len(ends) > 1 else np.nan


def _by_chance(decided: pd.DataFrame) -> float:
    """How often two that say each word as often as these do would say the same."""
    shares = [decided[name].value_counts(normalize=True) for name in ("verdict", "verdict b")]
    return float(sum(shares[0].get(word, 0) * shares[1].get(word, 0) for word in COLOURS))


def by_depth() -> pd.DataFrame:
    """By depth of the writer: median survival, that of ordinary writes, and how many are surely below and above."""
    rows = {}
    for (model, place), part in writers().groupby(["model", "depth"], sort=False):
        rows.setdefault(model, {})[place] = (
            f"{part['end'].median():.2f} ({part['ordinary'].median():.2f}), "
            f"−{part['below'].sum()} +{part['above'].sum()} of {len(part)}"
        )
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("–").rename_axis("model")
    return frame[[place for place in DEPTHS if place in frame]]


def acted() -> pd.DataFrame:
    """Who acts on writers that are lost on some text: heads or MLPs, how far behind; and which are lost."""
    rows = {}
    for model, part in by_writer().groupby("model", sort=False):
        lost, known = part[part["below"]], part[part["below"] & part["eraser"].notna()]
        of = {kind: part.loc[part["kind"] == kind, "below"] for kind in ("head", "MLP")}
        rows[model] = {
            **{f"lost, of {kind}s": wilson(which.sum(), len(which)) for kind, which in of.items()},
            "heads act on them": _middle(lost["heads"]), "MLPs act on them": _middle(lost["mlps"]),
            "an MLP acts most": wilson((known["eraser kind"] == "MLP").sum(), len(known)),
            "at most one layer behind": wilson((known["behind"] <= 1).sum(), len(known)),
            "position part, lost": _middle(lost["position"]), "position part, all": _middle(part["position"]),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def by_writer() -> pd.DataFrame:
    """Every writer once, as on the first text on which it is lost, or on the first of all: `below` is on some text."""
    frame = strongest()
    first = frame.sort_values(["below", "text"], ascending=[False, True], kind="stable")
    return first.drop_duplicates(["model", "writer"]).sort_index()


def strongest(frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """Beside every writer the node that surely acts against it most, its kind, and how many layers it lies behind."""
    frame = writers() if frame is None else frame
    first = [min(_against(acts), key=lambda node: acts[node][0], default=None) for acts in frame["acts"]]
    where = [placed(node, layers) if node else {} for node, layers in zip(first, frame["layers"], strict=True)]
    behind = [place.get("layer", np.nan) - layer for place, layer in zip(where, frame["layer"], strict=True)]
    return frame.assign(eraser=first, behind=behind, **{"eraser kind": [place.get("kind") for place in where]})


def _against(acts: dict[str, list[float]]) -> list[str]:
    return [node for node, (value, _, high) in acts.items() if value < 0 and high is not None and high < 0]


def _middle(part: pd.Series) -> str:
    return f"{part.median():+.2f}" if len(part) else "–"


def trusted() -> pd.DataFrame:
    """How each reading predicts what happens: the median model, a model being its mean over texts, and the range."""
    mean = correlations().groupby(["kind", "depth", "reading", "model"], sort=False)["r"].mean().reset_index()
    cell = mean.groupby(["kind", "depth", "reading"], sort=False)["r"].agg(_span).unstack("reading")
    order = [(kind, place) for kind in ("heads", "MLPs") for place in DEPTHS if (kind, place) in cell.index]
    return cell.loc[order, list(READINGS)]


def correlations() -> pd.DataFrame:
    """Of every model, text, kind, depth and reading."""
    return pd.DataFrame([
        {"model": one["name"], "lineage": lineage(one["name"]), "text": i, **row}
        for one in models() for i, part in enumerate(one["trust"]) for row in part
    ])  # fmt: skip


def _span(part: pd.Series) -> str:
    part = part.dropna()
    return f"{part.median():.2f} [{part.min():.2f}, {part.max():.2f}] of {len(part)}" if len(part) else "–"


def read() -> pd.DataFrame:
    """Of the writers that are lost most surely: who reads them, who erases them, and is their space used again?"""
    rows = []
    for one in models():
        for writer, steps in one["closely"].items():
            early = [line for line in steps["readers"] if line[-1] is not None and line[-1] < 0.5]
            first = ", ".join(f"{node}.{way}" for node, way, *_ in steps["readers"][:3])
            rows.append({
                "model": one["name"], "writer": writer, "survives": steps["end"], "verdict there": steps["verdict"],
                "readers": f"{len(steps['readers'])} of {steps['asked']}", "before half is erased": len(early),
                "the first": first or "–", "erasers": ", ".join(steps["erasers"].split()[:3]) or "–",
                "space used again": steps["reused"],
            })  # fmt: skip
    return pd.DataFrame(rows).set_index(["model", "writer"])


def hashes() -> pd.DataFrame:
    """Which weights, tokenizer and texts these are."""
    rows = {
        one["name"]: {
            "weights": one["model"]["weights"][:12], "tokenizer": one["tokenizer"][:12],
            "tokens": " · ".join(text["hash"][:12] for text in one["texts"]), "seconds": one["seconds"],
        }
        for one in models()
    }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def figure() -> alt.FacetChart:
    """What survives of every write on the first text, by depth, one picture for each model."""
    frame = writers()
    frame = frame[frame["text"] == 0]
    # What is out of the ordinary is drawn last, on top.
    frame = frame.iloc[np.argsort(-frame["verdict"].map([*COLOURS].index), kind="stable")]
    frame = frame.assign(depth=(frame["layer"] + 0.5).clip(lower=0) / frame["layers"])
    rows = frame[["model", "writer", "depth", "end", "verdict"]]
    colour = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    points = alt.Chart(rows).mark_circle(size=26, opacity=0.9, stroke="#777", strokeWidth=0.3).encode(
        x=alt.X("depth:Q", title="depth of the writer", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("end:Q", title="survives", scale=alt.Scale(domain=[-1, 2], clamp=True)),
        color=alt.Color("verdict:N", scale=colour, title=None), tooltip=["writer", "end", "verdict"],
    ).properties(width=130, height=130)  # fmt: skip
    order = [one["name"] for one in models()]
    return points.facet(alt.Facet("model:N", sort=order, title=None), columns=4).configure_legend(orient="bottom")


TABLES = (hashes, counted, shares, agreed, by_depth, acted, trusted, read)
