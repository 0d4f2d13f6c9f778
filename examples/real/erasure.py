"""Who survives, and who erases whom, in a real language model? One set of books, and every finding again on two others.

    python examples/real/erasure.py MODEL BOOKS BOOKS BOOKS --name NAME --work FOLDER

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct, google/gemma-3-270m), each BOOKS a folder of
books, of which a window in the middle is read. What was found is kept as `results/NAME.json` beside this file, from
which docs/real.md is made. A run that was stopped goes on from FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

import unwrite as uw

RESULTS = Path(__file__).parent / "results"
DOCUMENTS, LENGTH = 6, 40
SPECIAL = ("erased", "reduced", "filled in", "kept", "amplified")
# Of the writers that are lost most surely so many are looked at closely.
CLOSELY = 3
# What a node does to a write is kept from this share of it on.
ACTS = 0.03


def books(folder: Path, lm: Any) -> Any:
    """A window in the middle of each of the folder's first books."""
    files = sorted(folder.glob("*.txt"))[:DOCUMENTS]
    texts = [file.read_text("utf-8") for file in files]
    middles = [text[len(text) // 2 :][: 40 * LENGTH] for text in texts]
    return uw.text(middles, lm.tokenizer, n=DOCUMENTS, length=LENGTH).named(", ".join(file.stem for file in files))


def measured(model: str, folders: list[Path], work: Path) -> dict[str, Any]:
    """What survives of every material write on each set of books, and of a few all that can be said."""
    lm = uw.load(model, dtype="float32")
    found = []
    for i, folder in enumerate(folders):
        # Turned writes only to show on one set what they would have said.
        controls = ("typical", "signs", "rotated") if i == 0 else ("typical", "signs")
        found.append(uw.survival(lm, books(folder, lm), controls=controls, checkpoint=work / f"books{i}"))
        found[-1].save(work / f"books{i}")
    record = found[0].provenance
    closely = {}
    for writer in lost(found)[:CLOSELY]:
        # By other books than those that chose it.
        proof = uw.verify(lm, books(folders[1], lm), writer, checkpoint=work / writer)
        proof.save(work / writer)
        closely[writer] = described(found[0].data.sel(writer=writer), proof.data)
    return {
        "model": {name: record["model"][name] for name in ("family", "layers", "heads", "d_model", "weights")},
        "certificate": lm.certificate.explain(), "versions": record["versions"],
        "texts": [about(one) for one in found],
        "writers": [rows(one.data) for one in found],
        "closely": closely,
    }  # fmt: skip


def about(found: uw.Result) -> dict[str, Any]:
    """Which text it was, and how much of it."""
    text = found.provenance["tokens"][""]
    counts = {name: int(found.data.attrs[name]) for name in ("documents", "rows", "sinks")}
    return {"books": text["source"], "hash": text["hash"], **counts}


def rows(data: xr.Dataset) -> list[dict[str, Any]]:
    """Of every writer what survives, beside what is ordinary, and who acts on it."""
    names = ("end", "end_low", "end_high", "without_sinks", "gap", "gap_low", "gap_high", "q", "q_above", "verdict")
    found = []
    for i, writer in enumerate(data["writer"].values):
        one = data.isel(writer=i)
        found.append({
            "writer": str(writer), **{name: one[name].item() for name in names},
            "raw": float(one["survival"].sel(weigh="raw")[-1]), "top3_raw": float(one["energy_top3"].sel(weigh="raw")),
            "top3": float(one["energy_top3"].sel(weigh="readers")),
            "ordinary": {str(c): one["ordinary"].sel(control=c).values.tolist() for c in data["control"].values},
            "acts": acting(one),
        })  # fmt: skip
    return found


def acting(one: xr.Dataset) -> dict[str, list[float]]:
    """What each node does to a write, with its interval, the strongest first."""
    strong = [i for i in np.argsort(-np.abs(one["acts"].values)) if abs(one["acts"].values[i]) >= ACTS]
    return {str(one["node"].values[i]): [float(one[f"acts{end}"][i]) for end in ("", "_low", "_high")] for i in strong}


def lost(found: list[uw.Result]) -> list[str]:
    """Writers that are erased on the most sets of books, then those that are reduced; the farthest below first."""
    order = {"erased": 0, "reduced": 1, "filled in": 2}
    verdict = [dict(zip(one["writer"].values, one["verdict"].values, strict=True)) for one in found]
    rank = {writer: sum(order.get(str(own.get(writer)), 3) for own in verdict) for writer in verdict[0]}
    gap = found[0]["gap"].to_series()
    return [str(writer) for writer in sorted(rank, key=lambda w: (rank[w], gap[w])) if rank[writer] < 3 * len(found)]


def described(one: xr.Dataset, proof: xr.Dataset) -> dict[str, Any]:
    """One writer's way through the stream, and what `uw.verify` found on other books."""
    way = {
        name: one[name].sel(weigh="readers").values.tolist() for name in ("survival", "survival_low", "survival_high")
    }
    numbers = ("weighed", "weighed_low", "weighed_high", "caused", "opposed", "decodable")
    return {
        "location": [str(place) for place in one["location"].values], **way,
        "verified": {name: float(proof[name]) for name in numbers if name in proof and not proof[name].dims},
        "verdict": proof.attrs["verdict"], "erasers": proof.attrs["erasers"], "readers": proof.attrs["readers"],
    }  # fmt: skip


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Three digits behind the point, nothing for what is no number: what another machine finds, too."""
    whole = json.dumps(found)
    return json.loads(whole, parse_float=lambda text: round(float(text), 3), parse_constant=lambda _: None)


def keep(name: str, found: dict[str, Any]) -> None:
    """Leave what was found."""
    (RESULTS / f"{name}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


# What docs/real.md is made of.


def kept(name: str) -> dict[str, Any]:
    """What was found of a model."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def frames(found: dict[str, Any]) -> list[pd.DataFrame]:
    """The writers of every set of books."""
    return [pd.DataFrame(one).set_index("writer") for one in found["writers"]]


def verdicts(found: dict[str, Any]) -> pd.DataFrame:
    """How many writers each word was said of, by set of books."""
    counts = {f"books {i}": one["verdict"].value_counts() for i, one in enumerate(frames(found))}
    return pd.DataFrame(counts).fillna(0).astype(int).rename_axis("verdict")


def special(found: dict[str, Any]) -> pd.DataFrame:
    """Writers that are out of the ordinary on some set of books, with what was found on each."""
    sets = frames(found)
    names = [name for name in sets[0].index if any(name in f.index and f["verdict"][name] in SPECIAL for f in sets)]
    table = {}
    for name in names:
        line = {}
        for i, frame in enumerate(sets):
            if name not in frame.index:
                continue
            one = frame.loc[name]
            q = min(part for part in (one["q"], one["q_above"], math.inf) if part == part and part is not None)
            line |= {
                f"survives, books {i}": f"{one['end']:.2f} [{one['end_low']:.2f}, {one['end_high']:.2f}]",
                f"ordinary {i}": f"{one['ordinary']['typical'][1]:.2f}", f"q {i}": f"{q:.2f}",
                f"verdict {i}": one["verdict"],
            }  # fmt: skip
        table[name] = line
    return pd.DataFrame.from_dict(table, orient="index").fillna("–").rename_axis("writer")


def compared(found: dict[str, Any]) -> pd.DataFrame:
    """How sets of books agree, and what other weights and stand-ins would have said."""
    first, *others = frames(found)
    said = {}
    for i, other in enumerate(others, 1):
        a, b = first.align(other, join="inner", axis=0)
        decided = (a["verdict"] != "undecided") & (b["verdict"] != "undecided")
        said[f"r of survival, books 0 and {i}"] = f"{_r(a['end'], b['end']):.2f}"
        said[f"decided verdicts that agree, books 0 and {i}"] = (
            f"{(a['verdict'] == b['verdict'])[decided].sum()} of {decided.sum()}"
        )
    said["r of survival as readers weigh it, and raw"] = f"{_r(first['end'], first['raw']):.2f}"
    for control in first["ordinary"].iloc[0]:
        below = sum(one["end"] < one["ordinary"][control][0] for _, one in first.iterrows())
        said[f"writers below the 5 % of {control} stand-ins"] = f"{below} of {len(first)}"
    return pd.DataFrame.from_dict(said, orient="index", columns=[""])


def _r(a: pd.Series, b: pd.Series) -> float:
    """Survivals beyond ±3 count as such."""
    return float(np.corrcoef(a.clip(-3, 3), b.clip(-3, 3))[0, 1])


def weighed_otherwise(found: dict[str, Any], n: int = 6) -> pd.DataFrame:
    """The writers of which survival as readers weigh it and raw differ most."""
    first = frames(found)[0]
    most = (first["end"].clip(-3, 3) - first["raw"].clip(-3, 3)).abs().nlargest(n).index
    columns = {"end": "survives", "raw": "raw", "top3": "in three channels", "top3_raw": "in three channels, raw"}
    return first.loc[most, [*columns]].rename(columns=columns).round(2)


def acts(found: dict[str, Any], writer: str, n: int = 6) -> pd.DataFrame:
    """Who acts most on a writer, on each set of books."""
    sets = [frame.loc[writer, "acts"] for frame in frames(found) if writer in frame.index]
    cells = [{node: f"{a:+.2f} [{low:+.2f}, {high:+.2f}]" for node, (a, low, high) in one.items()} for one in sets]
    strongest = [*sets[0]][:n]
    columns = {f"books {i}": [one.get(node, "–") for node in strongest] for i, one in enumerate(cells)}
    return pd.DataFrame(columns, index=pd.Index(strongest, name=f"on {writer}"))


def overview(found: dict[str, Any]) -> alt.LayerChart:
    """Every material writer in its place, coloured by what survives of it; what is out of the ordinary is named."""
    data = frames(found)[0].reset_index()
    data["layer"] = data["writer"].str.extract(r"(\d+)")[0].fillna(-1).astype(int)
    data["head"] = data["writer"].str.extract(r"H(\d+)")[0].fillna(data["writer"].str.extract("([a-zA-Z]+)")[0])
    order = [*sorted({h for h in data["head"] if h.isdigit()}, key=int), "MLP", "embed", "pos"]
    data = data[["writer", "layer", "head", "end", "verdict"]]
    base = alt.Chart(data).encode(
        x=alt.X("head:N", sort=order, title="head, MLP, embedding"), y=alt.Y("layer:O", sort="descending")
    )
    scale = alt.Scale(scheme="redblue", domain=[-1, 1], domainMid=0, clamp=True)
    cells = base.mark_rect().encode(color=alt.Color("end:Q", title="survives", scale=scale), tooltip=["writer", "end"])
    named = base.transform_filter(alt.FieldOneOfPredicate("verdict", [*SPECIAL])).mark_text(fontSize=8)
    return (cells + named.encode(text="verdict:N")).properties(width=420)


def way(found: dict[str, Any]) -> alt.Chart:
    """What survives of the clearest erased writes, from location to location."""
    lines = [
        pd.DataFrame({
            "writer": writer, "location": one["location"], "survives": one["survival"],
            "low": one["survival_low"], "high": one["survival_high"],
        }).dropna(subset="survives")
        for writer, one in found["closely"].items()
    ]  # fmt: skip
    data = pd.concat(lines)
    order = [*dict.fromkeys(next(iter(found["closely"].values()))["location"])]
    base = alt.Chart(data).encode(
        x=alt.X("location:N", sort=order, title=None), color=alt.Color("writer:N", title=None)
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title="survives"), y2="high:Q")
    return (band + base.mark_line().encode(y="survives:Q")).properties(width=600)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("books", nargs=3, type=Path)
    asked.add_argument("--name", required=True)
    asked.add_argument("--work", type=Path, required=True)
    given = asked.parse_args()
    result = rounded(measured(given.model, given.books, given.work))
    RESULTS.mkdir(exist_ok=True)
    keep(given.name, result)
    print(special(result).to_string())
    print(compared(result).to_string())
