"""Which facts does an instruct model state of claims, layer by layer, and is its verdict right? Twelve claims.

    python examples/decoding/facts.py MODEL --name NAME --work FOLDER

MODEL is a folder or a hub name of a model with a chat template. What was found is kept as `results/NAME-facts.json` and
the whole result as `results/NAME-facts.nc` beside this file, from which docs/decoding.md is made. A run that was
stopped goes on from FOLDER.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from states import RESULTS, arguments, keep

import unwrite as uw
from unwrite.report.claimed import facts, parts
from unwrite.report.columns import Line
from unwrite.report.views import words

TOKENS, EVERY = 60, 6
CLAIMS = {
    "The capital of France is Paris.": True,
    "The capital of Italy is Madrid.": False,
    "Tokyo is a city in Japan.": True,
    "The Nile flows through Brazil.": False,
    "Shakespeare wrote Hamlet.": True,
    "Mozart painted the Mona Lisa.": False,
    "Water freezes at zero degrees Celsius.": True,
    "The Sun orbits the Earth.": False,
    "Gold is a metal.": True,
    "Whales are fish.": False,
    "Mount Everest is higher than Mont Blanc.": True,
    "Spiders have six legs.": False,
}


def measured(model: str, work: Path, path: Path) -> dict[str, Any]:
    """The claims in words, at every sixth state."""
    lm = uw.load(model, dtype="float32")
    places = ["resid_pre0", *(f"resid_post{i}" for i in range(EVERY - 1, len(lm.layers), EVERY))]
    places = list(dict.fromkeys([*places, f"resid_post{len(lm.layers) - 1}"]))
    found = uw.graph(lm, [*CLAIMS], [*CLAIMS.values()], locations=places, tokens=TOKENS, checkpoint=work)
    found.save(path)
    data, record = found.data, found.provenance
    return {
        "model": {key: record["model"][key] for key in ("family", "layers", "d_model", "weights")},
        "versions": record["versions"], "says": words(found),
        "lines": [part.words for part in parts(found) if isinstance(part, Line)],
        "claims": [
            {"claim": str(data["claim_text"].values[i]), "true": bool(data["label"].values[i]),
             "verdict": str(data["verdict"].values[i]), "facts": len([*facts(data, i, "answer")])}
            for i in range(data.sizes["claim"])
        ],
        "location": [row(data, data.isel(location=i)) for i in range(data.sizes["location"])],
    }  # fmt: skip


def row(data: Any, one: Any) -> dict[str, Any]:
    """One location of all claims; of its facts also how many repeat a predicate of the examples."""
    at = str(one["location"].item())
    return {
        "location": at, "parsed": int(one["parsed"].sum()), "facts": int(one["facts"].sum()),
        "of the examples": int((data["echo"].values & (data["at"].values == at)).sum()),
        "entities as in the answer": rounded(one["answer_nodes"]), "as before": rounded(one["new_nodes"]),
    }  # fmt: skip


def rounded(part: Any) -> float | None:
    """The mean over claims that have a number."""
    return round(float(part.mean(skipna=True)), 3) if bool(part.notnull().any()) else None


if __name__ == "__main__":
    told = arguments(__doc__)
    RESULTS.mkdir(exist_ok=True)
    keep(f"{told.name}-facts", measured(told.model, Path(told.work), RESULTS / f"{told.name}-facts.nc"))
