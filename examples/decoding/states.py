"""What does a model itself say of a state, beside its lens, layer by layer? Names, capitals, and countries.

    python examples/decoding/states.py MODEL --name NAME --work FOLDER

MODEL is a folder or a hub name. What was found is kept as `results/NAME.json` beside this file, from which
docs/decoding.md is made. A run that was stopped goes on from FOLDER. Three questions, of every state between blocks:

next      indirect object identification, the state at the end, in a prompt that says words twice: the own next token
capital   "The capital of Canada is", the state at the end, in the same prompt: the capital
country   "The capital of Canada is", the state at the country, in a prompt that asks for a capital: the capital
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

import unwrite as uw

RESULTS = Path(__file__).parent / "results"
PROMPTS, TOKENS = 54, 4
ASKS = "Tokyo is the capital of Japan. Rome is the capital of Italy. The capital of x is"
ENDS = ("precision", "lower", "upper")
WAYS = {"match": "said first", "said": "said in the text", "lens_match": "lens"}


def measured(model: str, work: Path) -> dict[str, Any]:
    """The three questions."""
    lm = uw.load(model, dtype="float32")
    names, places = (make(PROMPTS, lm.tokenizer, bos=None) for make in (uw.tasks.ioi, uw.tasks.capitals))
    distinct = places.take(first_of_each(places.words(lm.tokenizer)["base_text"]))
    capitals = distinct.words(lm.tokenizer)["answer"]
    found = {
        "next": uw.decode(lm, names, tokens=1, checkpoint=work / "next"),
        "capital": uw.decode(lm, distinct, answer=capitals, tokens=TOKENS, checkpoint=work / "capital"),
        "country": uw.decode(
            lm, distinct, "country", ASKS, answer=capitals, tokens=TOKENS, checkpoint=work / "country"
        ),
    }  # fmt: skip
    record = found["next"].provenance
    return {
        "model": {key: record["model"][key] for key in ("family", "layers", "d_model", "weights")},
        "versions": record["versions"], "countries": len(set(capitals)),
        "into": {name: one.data.attrs["into"] for name, one in found.items()},
        "solves": {"next": uw.solves(lm, names).data.attrs["solves"],
                   "capital": uw.solves(lm, distinct).data.attrs["solves"]},
        **{name: rates(one) for name, one in found.items()},
    }  # fmt: skip


def first_of_each(texts: list[str]) -> list[int]:
    """The numbers of prompts that no earlier one is the same as."""
    return [texts.index(text) for text in dict.fromkeys(texts)]


def rates(found: uw.Result) -> dict[str, Any]:
    """How often each way is right by location, and what was said of the first prompt."""
    data = found.data
    each = {str(way): data.sel(way=way) for way in data["way"].values}
    ways = {way: {name: own[name].values.round(4).tolist() for name in ENDS} for way, own in each.items()}
    one = data.isel(prompt=0)
    return {
        "n": data.sizes["prompt"], "location": [*map(str, data["location"].values)], "ways": ways,
        "first": {name: [*map(str, one[name].values)] for name in ("text", "lens_token")} | {
            name: str(one[name].item()) for name in ("read", "answer")
        },
    }  # fmt: skip


def table(found: dict[str, Any]) -> pd.DataFrame:
    """Precision with its interval, location by location."""
    rows: dict[str, dict[str, str]] = {}
    for i, where in enumerate(found["location"]):
        ends = {way: [own[name][i] for name in ENDS] for way, own in found["ways"].items()}
        rows[where] = {WAYS[way]: "{:.2f} ({:.2f} to {:.2f})".format(*own) for way, own in ends.items()}
        rows[where]["of the first prompt"] = found["first"]["text"][i]
    return pd.DataFrame.from_dict(rows, orient="index")


def kept(name: str) -> dict[str, Any]:
    """What a run has left."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def keep(name: str, found: dict[str, Any]) -> None:
    """Leave what was found."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments(doc: str | None) -> argparse.Namespace:
    """What the command line names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for option in ("--name", "--work"):
        parser.add_argument(option, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    told = arguments(__doc__)
    keep(told.name, measured(told.model, Path(told.work)))
