"""Which heads carry what indirect object identification turns on: where a name stood, and which name it is?

    python examples/circuits/masks.py MODEL --name NAME --first 15

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct); heads are those of layers --first and later. What
was found is kept as `results/NAME-masks.json` beside this file, from which docs/masks.md is made.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
from measure import model_of, write

import unwrite as uw

# What source prompts have otherwise: other names in other places, and other names in the same places.
CHANGES = ("names+order", "names")
PAIRS, STEPS = 96, 45
SETS = ("none", "all", "chosen", "complement", "random")


def measured(model: str, first: int) -> dict[str, Any]:
    """A path over penalties for each change, judged on templates that were not learned from."""
    lm = uw.load(model, dtype="float32")
    heads = heads_from(lm, first)
    lines, about = [], {}
    for change in CHANGES:
        pairs = uw.tasks.ioi(PAIRS, lm.tokenizer, change=change, bos=False)
        found = uw.mask(lm, pairs, heads, "end", steps=STEPS)
        lines += paths(change, found)
        about |= {change: {"solves": found.data.attrs["solves"], "found": found.data.attrs["found"]}}
    return told(found, heads, about, lines)


def heads_from(lm: Any, first: int) -> list[str]:
    """Those of this layer and of later ones."""
    return [node for node in lm.nodes if "H" in node and int(node[1:].partition("H")[0]) >= first]


def told(found: uw.Result, heads: list[str], about: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is kept of a model; `found` is one of its masks."""
    return {
        **model_of(found), "nodes": len(heads), "learned_from": int(found.data.attrs["learned_from"]),
        "held": found.data.sizes["pair"], "about": about, "paths": lines,
    }  # fmt: skip


def paths(change: str, found: uw.Result) -> list[dict[str, Any]]:
    """A line for each penalty."""
    lines = []
    for penalty in found.data["penalty"].values:
        one = found.data.sel(penalty=penalty)
        rates = {which: [one[f"rate{end}"].sel(set=which).item() for end in ("", "_low", "_high")] for which in SETS}
        logits = {which: one["mean_difference"].sel(set=which).item() for which in SETS}
        chosen = [str(node) for node in one["node"].values[one["chosen"].values]]
        lines.append({
            "change": change, "penalty": float(penalty), "chosen": chosen, "rates": rates, "logits": logits,
            "random_most": one["random_match"].max().item(), "stable": one["stable"].item(),
        })  # fmt: skip
    return lines


def kept_paths(found: dict[str, Any]) -> pd.DataFrame:
    """Matches on held-out pairs by change and penalty, beside all heads, all others, and random ones."""
    lines = []
    for one in found["paths"]:
        rate, low, high = one["rates"]["chosen"]
        rates = {which: one["rates"][which][0] for which in ("all", "complement", "random")}
        lines.append({
            "pairs": one["change"], "penalty": one["penalty"], "heads": len(one["chosen"]),
            "match": f"{rate:.2f} [{low:.2f}, {high:.2f}]",
            "logits": f"{one['logits']['none']:+.1f} → {one['logits']['chosen']:+.1f}",
            "all heads": f"{rates['all']:.2f}", "the others": f"{rates['complement']:.2f}",
            "random (to the most)": f"{rates['random']:.2f} ({one['random_most']:.2f})",
            "stable": f"{one['stable']:.2f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def main() -> None:
    """Measure a model and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    write(measured(asked.model, asked.first), asked.name, "masks")


if __name__ == "__main__":
    main()
