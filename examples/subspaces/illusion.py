"""Does a direction that turns answers carry where a name stood? The stream, and the MLPs behind the inhibitors.

    python examples/subspaces/illusion.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as `results/NAME.json`
beside this file, from which docs/subspaces.md is made. Directions are learned, as in the paper, of pairs of the first
two templates of indirect object identification, and judged on those of all others that the model solves; once more by
halves of the templates, as `uw.subspace` does by itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import unwrite as uw

sys.path.insert(0, str(Path(__file__).parents[1] / "circuits"))

from measure import model_of, write

RESULTS = Path(__file__).parent / "results"
# Seven templates have as many pairs each; names change places in the source prompts, so S stays and its place does not.
PAIRS, FEWER, CHANGE, FIRST = 224, 168, "order", ("t0", "t1")
STATE, MLPS = "resid_post21", ("MLP20.act", "MLP21.act", "MLP22.act")
# The heads whose queries say which of the two names is copied.
MOVERS = ("L23H0", "L23H1", "L23H2", "L23H5", "L23H7")
STATES = tuple(f"resid_post{layer}" for layer in range(16, 26))
RANKS = 16
# A template of which fewer pairs than this are solved says nothing of how the others are.
SOLVED = 0.9
# GPT-2 small, residual 8 and MLP8, from the result files of Makelov et al. 2023: FLDD and interchange accuracy, in %.
PUBLISHED = {
    "resid_post8": {"full": (121.5, 54.4), "subspace": (138.9, 73.7), "row": (126.0, 61.8), "null": (13.6, 0.6),
                    "mean": (119.3, 52.3), "gradient": (109.5, 43.1)},
    "MLP8.act": {"full": (-8.0, 0.3), "subspace": (45.9, 4.3), "row": (13.2, 0.7), "null": (0.0, 0.3)},
}  # fmt: skip
SHOWN = ("full", "subspace", "row", "null", "mean", "gradient", "random", "arbitrary", "untrained")


def measured(model: str) -> dict[str, Any]:
    """Learned directions of four sites with all controls, class means layer by layer, and queries kept in few."""
    lm = uw.load(model, dtype="float32")
    pairs, fewer = (solved(lm, n) for n in (PAIRS, FEWER))
    learned = [label in FIRST for label in pairs.template or ()]
    pairs, held = pairs.take(learned), pairs.take([not one for one in learned])
    queries = [f"{head}.q" for head in MOVERS]
    found, halves = (
        uw.subspace(lm, some, [STATE, *MLPS], readers=queries, held=judged)
        for some, judged in ((pairs, held), (fewer, "template"))
    )
    sweep = uw.subspace(lm, pairs, STATES, method="mean", controls=["random"], held=held)
    low = uw.subspace(lm, pairs, "+".join(queries), RANKS, method="svd", restrict=True, held=held)
    return {
        **model_of(found),
        **about(found),
        "sites": sites(found),
        "sweep": sites(sweep),
        "low": ranks(low),
        "halves": {**about(halves), "sites": sites(halves)},
    }


def about(found: uw.Result) -> dict[str, Any]:
    """Of how many pairs bases are, and by which templates they are judged."""
    own = {name: found.data.attrs[name] for name in ("learned_from", "templates", "solves", "looks", "cost")}
    return {**own, "held": found.data.sizes["pair"], "labels": sorted({*map(str, found["template"].values)})}


def solved(lm: Any, n: int) -> uw.Pairs:
    """Pairs of the templates that the model solves."""
    pairs = uw.tasks.ioi(n, lm.tokenizer, change=CHANGE, bos=False)
    rates = uw.solves(lm, pairs)["accuracy"].to_series()
    good = {str(label) for label, rate in rates.items() if rate >= SOLVED}
    return pairs.take([label in good for label in pairs.template or ()])


def sites(found: uw.Result) -> list[dict[str, Any]]:
    """Everything of each site that the page shows."""
    lines = []
    for name in found.data["site"].values:
        one = found.data.sel(site=name)
        patches = {
            str(patch): {
                part: [float(one[f"{part}{end}"].sel(patch=patch)) for end in ("", "_low", "_high")]
                for part in ("fldd", "rate", "share")
            }
            for patch in one["patch"].values
        }
        parts = {part: one[part].values.tolist() for part in ("norm", "spread", "moved")}
        learned = {"agreement": one["agreement"].values.tolist()} if "agreement" in one else {}
        most = {"random_most": float(np.abs(one["random_fldd"]).max())}
        said = {part: str(one[part].item()) for part in ("verdict", "because")}
        lines.append({"site": str(name), **said, "patches": patches, **parts, **learned, **most})
    return lines


def ranks(found: uw.Result) -> dict[str, Any]:
    """What few directions of the queries keep."""
    data = found.data
    names = ("kept", "kept_low", "kept_high", "top", "variance")
    return {
        "site": str(data.attrs["site"]), "d": data.sizes["coordinate"],
        **{name: data[name].values.tolist() for name in names},
        "logits": data["kept_diff"].mean("pair").values.tolist(),
        "random_mean": data["random_kept"].mean("draw").values.tolist(),
        "random_most": data["random_kept"].max("draw").values.tolist(),
    }  # fmt: skip


def table(found: dict[str, Any]) -> pd.DataFrame:
    """FLDD and interchange accuracy by site, beside what was published of GPT-2."""
    columns: dict[str, dict[str, str]] = {}
    for one in found["sites"]:
        cells = {patch: _cell(*(one["patches"][patch][part] for part in ("fldd", "rate"))) for patch in SHOWN}
        columns[one["site"]] = cells
    for name, numbers in PUBLISHED.items():
        columns[f"GPT-2 {name}"] = {
            patch: f"{numbers[patch][0]:.1f} / {numbers[patch][1]:.1f}" if patch in numbers else "" for patch in SHOWN
        }
    return pd.DataFrame(columns)


def layers(found: dict[str, Any]) -> pd.DataFrame:
    """The class-mean direction of each layer, beside the whole state."""
    lines = {}
    for one in found["sweep"]:
        kept = one["patches"]
        cells = {patch: _cell(kept[patch]["fldd"], kept[patch]["rate"]) for patch in ("full", "subspace")}
        lines[one["site"]] = {"whole state": cells["full"], "class means": cells["subspace"], "verdict": one["verdict"]}
    return pd.DataFrame(lines).T


def low_rank(found: dict[str, Any], shown: tuple[int, ...] = (0, 1, 2, 4, 8, 16)) -> pd.DataFrame:
    """What so many directions keep."""
    low, lines = found["low"], {}
    for rank in shown:
        ends = (low[f"kept{end}"][rank] for end in ("", "_low", "_high"))
        lines[rank] = {
            "kept": "{:.2f} [{:.2f}, {:.2f}]".format(*ends), "logits": f"{low['logits'][rank]:.2f}",
            "right answer": f"{low['top'][rank]:.2f}",
            "variance": f"{low['variance'][rank]:.2f}",
            "random (to the most)": f"{low['random_mean'][rank]:.2f} ({low['random_most'][rank]:.2f})",
        }  # fmt: skip
    return pd.DataFrame(lines).T.rename_axis("directions")


def _cell(fldd: list[float], rate: list[float]) -> str:
    if np.isnan(fldd[0]):
        return ""
    value, low, high = (round(one, digits) + 0.0 for one, digits in zip(fldd, (1, 0, 0), strict=True))
    return f"{value:.1f} [{low:.0f}, {high:.0f}] / {100 * rate[0]:.1f}"


def main() -> None:
    """Measure a model and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    write(measured(asked.model), asked.name, folder=RESULTS)


if __name__ == "__main__":
    main()
