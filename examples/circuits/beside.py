"""What are the nodes of a real model's circuit for, and what would direct attribution have chosen instead?

    python examples/circuits/beside.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-beside.json` beside this file, from which docs/circuits.md is made. The circuit is RelP's of 8 pairs
(those of measure.py), looked into on 24 others.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
from measure import NODES, about, keep, said

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
    lines = table.table()[[*WORDS, *NUMBERS, *ENDS]]
    return {
        **about(lm, found), "pairs": len(judged),
        "solves": found.data.attrs["solves"], "size": SIZE, "nodes": json.loads(lines.to_json(orient="records")),
    }  # fmt: skip


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


if __name__ == "__main__":
    keep(__doc__, measured, "beside")
