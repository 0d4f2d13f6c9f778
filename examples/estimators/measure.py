"""How well do AtP, AtP*, RelP and integrated gradients predict executed patches of a real model?

    python examples/estimators/measure.py default TEXT                       a model by name or folder, a text or folder
    python examples/estimators/measure.py ../shared/models/stories260K ../shared/corpus/tinystories.txt
    python examples/estimators/measure.py --table                            what results/ holds

A pair is a window of the text and the same window with one of its last tokens exchanged for the token that another
window has there. It is asked for the model's own first choice after the base prompt, against that after the source
prompt (where these are the same, against the second choice); nodes are patched one position at a time. Each model's
numbers, by kind of node, go to results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import unwrite as uw
from unwrite.run.edit.sites import mlp_width

RESULTS = Path(__file__).parent / "results"
KINDS = ("resid", "attn_out", "mlp_out", "heads", "q", "k", "v", "neurons")
# Name of the estimator here -> method, and which of its readings is correlated with the executed effect.
ESTIMATORS = {
    "AtP": ("atp", "effect"), "AtP*": ("atp*", "signed"), "RelP": ("relp", "effect"), "IG": ("ig", "effect"),
}  # fmt: skip
PAIRS, LENGTH, LAST = 24, 24, 8


def pairs(lm: Any, text: Path, seed: int) -> uw.Pairs:
    """Windows with one exchanged token, and the model's own choices."""
    windows = uw.text(text, lm.tokenizer, n=2 * PAIRS, length=LENGTH).ids
    draw = np.random.default_rng(seed)
    base, other = windows[:PAIRS], windows[PAIRS : 2 * PAIRS]
    source = base.copy()
    for row, place in enumerate(draw.integers(LENGTH - LAST, LENGTH - 1, size=len(base))):
        source[row, place] = next(part[place] for part in np.roll(other, row, 0) if part[place] != base[row, place])
    with torch.no_grad():
        top = [lm.hf(torch.from_numpy(ids).to(lm.device)).logits[:, -1].topk(2).indices.cpu() for ids in (base, source)]
    answer = top[0][:, 0]
    against = torch.where(top[1][:, 0] == answer, top[0][:, 1], top[1][:, 0])
    return uw.pairs(torch.from_numpy(base), torch.from_numpy(source), answer, against)


def measured(lm: Any, asked: uw.Pairs, kind: str) -> dict[str, Any]:
    """Correlations of every estimator with the executed effects of one kind of nodes, and what each costs."""
    nodes = some_neurons(lm) if kind == "neurons" else kind
    exact = uw.effects(lm, asked, nodes)
    found: dict[str, Any] = {"exact": {"passes": exact.data.attrs["cost"]}}
    for name, (method, reading) in ESTIMATORS.items():
        guess = uw.effects(lm, asked, nodes, method=method)
        both = uw.agree(guess, exact).data.sel(reading=reading, group="all")
        numbers = {key: float(both[key]) for key in ("pearson", "pearson_low", "pearson_high", "spearman", "same_sign")}
        found[name] = numbers | {"passes": guess.data.attrs["cost"], "cells": int(both["n"])}
    return found


def some_neurons(lm: Any) -> list[str]:
    """Every 17th neuron of every layer: all of them are too many to patch."""
    return [f"MLP{layer.index}.act[{i}]" for layer in lm.layers for i in range(0, mlp_width(lm, layer), 17)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what results/ holds")
    given = parser.parse_args()
    if given.table or given.model is None:
        print(frame("pearson").to_string())
        return
    lm = uw.load(given.model)
    asked = pairs(lm, given.text, given.seed)
    about = {
        "model": Path(given.model).name,
        "text": given.text.name,
        "seed": given.seed,
        "hash": asked.about()["hash"],
    }
    found = about | {"pairs": len(asked), "length": LENGTH, "kinds": {}}
    for kind in KINDS:
        found["kinds"][kind] = measured(lm, asked, kind)
        print(
            kind, {name: round(part.get("pearson", 1.0), 3) for name, part in found["kinds"][kind].items()}, flush=True
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{found['model']}.json").write_text(json.dumps(found, indent=1) + "\n")


def frame(number: str) -> pd.DataFrame:
    """One number of every estimator, with its interval over pairs where it has one: a row for each model and kind."""
    rows = []
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        for kind, parts in found["kinds"].items():
            cells = {name: _said(parts[name], number) for name in ESTIMATORS}
            rows.append({"model": found["model"], "nodes": kind, **cells})
    return pd.DataFrame(rows).set_index(["model", "nodes"])


def passes() -> pd.DataFrame:
    """How many passes over a prompt each takes, of heads at every position."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows = [{name: f"{part['passes']:.0f}" for name, part in one["kinds"]["heads"].items()} for one in found]
    return pd.DataFrame(rows, [one["model"] for one in found]).rename_axis("passes, of heads")


def _said(part: dict[str, float], number: str) -> str:
    low, high = part.get(f"{number}_low"), part.get(f"{number}_high")
    return f"{part[number]:.3f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


if __name__ == "__main__":
    main()
