"""How few nodes keep indirect object identification in a real model, by which order, and which are used elsewhere?

    python examples/circuits/measure.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as `results/NAME.json`
beside this file, from which docs/circuits.md is made. Orders are made of 8 pairs, and judged by 10 others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import unwrite as uw

RESULTS = Path(__file__).parent / "results"
NODES = ["heads", "mlp_out"]
ORDERS = ("relp", "atp", "ig", "direct")
SIZES = (10, 20, 40, 80, 160)
TOP = (0.05, 0.1)
# So many of the largest executed effects are looked at, curves at so many nodes, and other draws of ranking pairs.
LARGEST, FIRST, SEEDS = 30, 80, (0, 2, 3, 4, 5)


def measured(model: str) -> dict[str, Any]:
    """Curves without and with what decides alone, and the heads that other tasks share."""
    lm = uw.load(model, dtype="float32")
    ranking, judged = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((8, 0), (10, 1)))
    orders = {name: uw.effects(lm, ranking, NODES, at="all", method=name, steps=5) for name in ORDERS}
    free = uw.circuit(lm, judged, orders, SIZES, draws=3)
    gates = [*filter(None, free.data.attrs["gates"].split(", "))]
    held = uw.circuit(lm, judged, orders, SIZES, given=gates, draws=3, gates=False) if gates else free
    return {
        **about(lm, free),
        "gates": {name: free["gate"].sel(node=name).item() for name in gates}, "solves": free.data.attrs["solves"],
        "metric": [free["base"].mean().item(), free["empty"].mean().item()], "clusters": free.data.attrs["clusters"],
        "free": curves(free), "held": curves(held), "overlap": overlaps(lm),
        "signs": signs(lm, ranking, judged, orders),
    }  # fmt: skip


def curves(found: uw.Result, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """A line for each order and sign, and one for each order of chance."""
    lines = []
    for order in found.data["order"].values:
        for by in found.data["by"].values:
            one = found.data.sel(order=order, by=by)
            ends = {
                part: one[f"faithfulness{part}"].sel(size=list(sizes)).values.tolist() for part in ("", "_low", "_high")
            }
            numbers = {name: one[name].item() for name in ("smallest", "area", "distance")}
            lines.append(
                {"order": f"{order}, {by}", "f": ends[""], "low": ends["_low"], "high": ends["_high"], **numbers}
            )
    for draw in range(found.data.sizes["draw"]):
        one = found.data.isel(draw=draw)
        lines.append({"order": f"random {draw}", "f": one["random"].sel(size=list(sizes)).values.tolist()})
    return lines


def signs(lm: Any, ranking: uw.Pairs, judged: uw.Pairs, orders: dict[str, uw.Result]) -> dict[str, Any]:
    """Where the slope at the base run has another sign than what is executed, and what its signed order keeps then."""
    exact = uw.effects(lm, ranking, NODES, at="all", method="exact")
    helps = {name: -one["effect"].mean("pair").to_series() for name, one in {**orders, "executed": exact}.items()}
    places = helps["atp"].rank(ascending=False).astype(int)
    largest = helps["executed"].abs().sort_values(ascending=False).index[:LARGEST]
    wrong = [node for node in largest if helps["atp"][node] * helps["executed"][node] < 0]
    first = [*helps["atp"].sort_values(ascending=False).index[:FIRST]]
    one_more = {node: [*first, node] for node in wrong if node not in first}
    drawn = {
        f"seed {seed}": uw.effects(lm, uw.tasks.ioi(8, lm.tokenizer, seed, bos=False), NODES, at="all", method="atp")
        for seed in SEEDS
    }
    ask = {"by": "signed", "draws": 0, "gates": False, "choose": 1}
    added = kept_at(uw.circuit(lm, judged, {"none": first, **one_more}, [FIRST], **ask))
    by_seed = kept_at(uw.circuit(lm, judged, drawn, [FIRST], given=["MLP0"], **ask), FIRST)
    lines = []
    for node in wrong:
        per_pair = (-orders["atp"]["effect"].sel(node=node)).values.tolist()
        numbers = {name: float(one[node]) for name, one in helps.items()}
        ends = {end: -exact[f"mean_{other}"].sel(node=node).item() for end, other in (("low", "high"), ("high", "low"))}
        more = {"atp by pair": per_pair, "place": int(places[node]), "added": added.get(node)}
        lines.append({"node": node, **numbers, **ends, **more})
    return {"nodes": lines, "largest": LARGEST, "first": FIRST, "without": added["none"], "by seed": by_seed}


def kept_at(found: uw.Result, size: int | None = None) -> dict[str, float]:
    """What each order keeps at a size, or with all that it has."""
    curves = found["faithfulness"].isel(by=0)
    return {
        str(order): float(one.dropna("size").isel(size=-1) if size is None else one.sel(size=size))
        for order, one in zip(curves["order"].values, curves, strict=True)
    }


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
    own = tasks.ioi(8, lm.tokenizer, 0, bos=False)
    two = apart(lm)
    both = {name: (own, pairs) for name, pairs in made.items()} | {"ioi, halves with other templates and names": two}
    lines = []
    for name, each in both.items():
        found = uw.overlap(*(uw.effects(lm, pairs, at="all", method="relp") for pairs in each), TOP).data.isel(stage=0)
        numbers = ("shared", "union", "jaccard", "expected", "p", "ceiling_a", "ceiling_b")
        lines.append({"task": name, **{part: found[part].values.tolist() for part in numbers}})
        lines[-1] |= {"both": str(found["both"].values[0]), "spearman": found["spearman"].item()}
    return lines


def apart(lm: Any) -> tuple[uw.Pairs, uw.Pairs]:
    """Two sets of 8 pairs of ioi that share neither a template nor a name that is asked about."""
    pairs = uw.tasks.ioi(280, lm.tokenizer, 6, bos=False)
    names = sorted({*pairs.answer.tolist(), *pairs.against.tolist()})
    first, label = {*names[::2]}, [int(str(one)[1:]) < 4 for one in pairs.template]
    sides = [
        [
            i
            for i, early in enumerate(label)
            if early == side and (pairs.answer[i] in first, pairs.against[i] in first) == (side,) * 2
        ]
        for side in (True, False)
    ]
    one, other = (pairs.take(side[:8]) for side in sides)
    return one, other


def about(lm: Any, found: uw.Result) -> dict[str, Any]:
    """Which model it was, how exact, and by what it was read."""
    own = model_of(found)
    return {"model": own["model"], "certificate": lm.certificate.explain(), "versions": own["versions"]}


def model_of(found: uw.Result) -> dict[str, Any]:
    """Which model a result is of, and by what it was read."""
    record = found.provenance
    model = {name: record["model"][name] for name in ("family", "layers", "heads", "d_model", "weights")}
    return {"model": model, "versions": record["versions"]}


def keep(doc: str | None, measured: Callable[[str], dict[str, Any]], what: str = "") -> None:
    """Measure the model that the command line names, and keep `what` was found of it."""
    asked = model_and_name(doc)
    write(measured(asked.model), asked.name, what)


def model_and_name(doc: str | None) -> argparse.Namespace:
    """What the command line names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    return parser.parse_args()


def write(found: dict[str, Any], name: str, what: str = "", folder: Path = RESULTS) -> None:
    """Keep `what` was found of a model."""
    folder.mkdir(exist_ok=True)
    _file(name, what, folder).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def kept(name: str, what: str = "", folder: Path = RESULTS) -> dict[str, Any]:
    """`what` was found of a model."""
    return json.loads(_file(name, what, folder).read_text("utf-8"))


def _file(name: str, what: str, folder: Path) -> Path:
    return folder / f"{'-'.join(filter(None, (name, what)))}.json"


def kept_curves(found: dict[str, Any], which: str, sizes: tuple[int, ...] = SIZES) -> pd.DataFrame:
    """Faithfulness by how many nodes, or edges, are kept, with its 95 % interval."""
    lines = {}
    for one in found[which]:
        cells = [said(f) for f in one["f"]]
        if "low" in one:
            ends = zip(cells, one["low"], one["high"], strict=True)
            cells = [f"{cell} [{said(low)}, {said(high)}]" for cell, low, high in ends]
        few = [f"{one['smallest']:.0f}", f"{one['area']:.2f}", f"{one['distance']:.2f}"] if "area" in one else [""] * 3
        lines[one["order"]] = [*cells, *few]
    return pd.DataFrame(lines, index=[*(f"{size} kept" for size in sizes), "fewest for .85", "CPR", "CMD"]).T


def kept_signs(found: dict[str, Any]) -> pd.DataFrame:
    """Nodes of which AtP says another sign than what is executed: what each helps by each number."""
    lines, signs_ = {}, found["signs"]
    for one in signs_["nodes"]:
        right = sum(value * one["executed"] > 0 for value in one["atp by pair"])
        lines[one["node"]] = {
            "executed": f"{one['executed']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]",
            **{name: f"{one[name]:+.2f}" for name in ("ig", "relp", "atp")},
            "pairs with AtP's right sign": f"{right} of {len(one['atp by pair'])}",
            "place by sign": one["place"],
            f"f of the first {signs_['first']} and it": said(one["added"]) if one["added"] is not None else "in them",
        }
    return pd.DataFrame(lines).T


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


if __name__ == "__main__":
    keep(__doc__, measured)
