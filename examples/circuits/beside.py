"""What are the nodes of a real model's circuit for, and what would direct attribution have chosen instead?

    python examples/circuits/beside.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-beside.json` beside this file, from which docs/circuits.md is made. The circuit is RelP's of 8 pairs
(those of measure.py), looked into on 24 others.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pandas as pd
from measure import NODES, RESULTS, said

import unwrite as uw

SIZE = 40
NUMBERS = ("direct", "total", "executed", "score")
ENDS = ("total_low", "total_high", "executed_low", "executed_high")
WORDS = ("node", "chosen_by", "word", "looks", "part")


def measured(model: str) -> dict[str, Any]:
    """A line for each node of the circuit, and for those that direct attribution would have chosen in their place."""
    lm = uw.load(model, dtype="float32")
    ranking, judged = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((8, 0), (24, 1)))
    order = uw.effects(lm, ranking, NODES, at="all", method="relp")
    found = uw.circuit(lm, judged, {"relp": order}, [SIZE], by="absolute", draws=0, gates=False, choose=1)
    circuit = uw.Circuit.of_result(found, size=SIZE)
    dla = uw.dla(lm, judged.base, judged.answer, judged.against)
    effects = uw.effects(lm, judged, NODES, at="all", method="exact")
    table = uw.beside(circuit, dla, effects=effects, attention=uw.attention(lm, judged.base), pairs=judged)
    about = found.provenance["model"]
    lines = table.table()[[*WORDS, *NUMBERS, *ENDS]]
    return {
        "model": {name: about[name] for name in ("family", "layers", "heads", "d_model", "weights")},
        "certificate": lm.certificate.explain(), "versions": found.provenance["versions"], "pairs": len(judged),
        "solves": found.data.attrs["solves"], "size": SIZE, "nodes": json.loads(lines.to_json(orient="records")),
    }  # fmt: skip


def kept(name: str) -> dict[str, Any]:
    """What was found of a model."""
    return json.loads((RESULTS / f"{name}-beside.json").read_text("utf-8"))


def kept_nodes(found: dict[str, Any], direct_alone: bool = False) -> pd.DataFrame:
    """What each node helps, with intervals: the circuit's, or those that direct attribution alone would have chosen."""
    lines = {}
    for one in found["nodes"]:
        if (one["chosen_by"] == "direct alone") == direct_alone:
            ends = {
                name: f"{said(one[name])} [{said(one[f'{name}_low'])}, {said(one[f'{name}_high'])}]"
                for name in ("executed", "total")
            }
            lines[one["node"]] = {
                "set to source": ends["executed"], "is": one["word"], "set to zero": ends["total"],
                "direct": said(one["direct"]), "looks at": one["looks"], "part": one["part"],
            }  # fmt: skip
    return pd.DataFrame(lines).T


def main() -> None:
    """Measure a model and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    text = json.dumps(measured(asked.model), indent=1)
    (RESULTS / f"{asked.name}-beside.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
