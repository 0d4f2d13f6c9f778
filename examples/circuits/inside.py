"""Of what a head of a half-trained model lacks: does it look elsewhere, or fetch another thing when it looks there?

    python examples/circuits/inside.py TOY --name entity-tracking

TOY is what `toy.py` trained, whose groups of heads `tracking.py` kept as `results/NAME.json`. Queries, keys or values
of each head come from the other model, which reads the same prompt (CMAP by q, k and v of Prakash et al. 2024, arXiv
2402.14811); all else is the model's own. What was found is kept as `results/NAME-inside.json`, from which
docs/entity-tracking.md is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from measure import kept, model_and_name, write
from tracked import share
from tracking import JUDGED_BY, same, scenes

import unwrite as uw

SIDES = {"q": "its queries", "k": "its keys", "v": "its values", "": "what it writes"}


def measured(place: Path, name: str) -> dict[str, Any]:
    """Right answers by model, head and side, everywhere in the prompt at once."""
    models = {"young": uw.load(place / "young"), "model": uw.load(place / "model")}
    found, prompts = kept(name), same(scenes(models["model"], JUDGED_BY, 20, "position"))
    weights = {which: uw.solves(lm, prompts).provenance["model"]["weights"] for which, lm in models.items()}
    if weights != found["weights"]:
        raise SystemExit(f"{place} is not the run that {name} was found of")
    groups = found["found"]["model"]["groups"]
    heads = list(dict.fromkeys(one["head"] for part in groups.values() for one in part))
    return {
        "weights": weights, "pairs": len(prompts),
        "groups": {head: [group for group, part in groups.items() if head in [one["head"] for one in part]]
                   for head in heads},
        "right": {which: inside(lm, models["model" if which == "young" else "young"], prompts, heads)
                  for which, lm in models.items()},
    }  # fmt: skip


def inside(lm: Any, other: Any, prompts: uw.Pairs, heads: list[str]) -> dict[str, dict[str, float]]:
    """Part of the answers that are right with one side of one head from the other model; "" of none."""
    nodes = [head + (f".{side}" if side else "") for head in heads for side in SIDES]
    found = uw.effects(lm, prompts, nodes, "all", metric="top", source=other)
    own = float(found["base"].mean())
    effect = {str(node): float(found["mean"].sel(node=node)) for node in found["node"].values}
    made = {head: {side: own + effect[head + (f".{side}" if side else "")] for side in SIDES} for head in heads}
    return {"": {"": own}, **made}


def kept_inside(name: str) -> pd.DataFrame:
    """Right answers by head and side, of both models."""
    found = kept(name, "inside")
    lines = {}
    for which, other in (("young", "model"), ("model", "young")):
        for head, sides in found["right"][which].items():
            n, cells = found["pairs"], {}
            for side, part in sides.items():
                cells[SIDES[side] if head else "itself"] = share(part, n)
            label = f"{head} ({', '.join(found['groups'][head])})" if head else "none"
            lines[f"{which} with the {other}'s", label] = cells
    return pd.DataFrame(lines).T.fillna("")


if __name__ == "__main__":
    asked = model_and_name(__doc__)
    write(measured(Path(asked.model), asked.name), asked.name, "inside")
