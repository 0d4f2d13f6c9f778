"""What ships in the package: a trained model, how it was made, and four prompts on which its attribution misleads.

    python examples/pretrain/bundle.py RUN --books BOOKS

Copies the model of RUN (`train.py`) into src/unwrite/bundled and writes `training.json` beside it (settings, hashes of
the text, time, loss curve, loss on the books that were held out) and `prompts.json`: of every erased writer, or of all
writers if none is, `uw.adversarial` searches these books, and `uw.dla` says what its readings and the truth are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from measure import measured, rounded
from train import HELD_OUT

import unwrite as uw

BUNDLED = Path(uw.__file__).parent / "bundled"
# Of each writer so many hits are looked at, in prompts of at most so many tokens.
CANDIDATES, LENGTH = 20, 32
KEPT = 4
READINGS = ("direct", "net", "relp", "gradient", "total")


def prompts(model: Path, books: Path, writers: list[str]) -> list[dict[str, Any]]:
    """The prompts whose reading overstates the effect most, no text twice."""
    lm = uw.load(model)
    texts = [(books / name).read_text("utf-8") for name in HELD_OUT]
    tokens = uw.text(texts, lm.tokenizer, n=1000, length=LENGTH)
    found = []
    for writer in writers:
        hits = uw.adversarial(lm, tokens, writer, n=CANDIDATES).data
        rate = hits["rate"].sel(text="searched")
        for hit in hits["hit"].values:
            one = hits.sel(hit=hit)
            ids = [int(i) for i in one["ids"].values if i >= 0][1:]  # without the BOS
            text = lm.tokenizer.decode(ids)
            if lm.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                continue
            answer, against = int(one["answer_id"]), int(one["against_id"])
            asked = uw.dla(lm, text, answer, against).data.isel(prompt=0)
            numbers = {name: rounded(float(asked[name].sel(node=writer))) for name in READINGS}
            found.append({
                "writer": writer, "text": text, "answer": lm.tokenizer.decode([answer]),
                "against": lm.tokenizer.decode([against]), "logit_diff": rounded(float(asked["logit_diff"])), **numbers,
                "rate": rounded(float(rate.sel(source="writer"))),
                "generic_rate": rounded(float(rate.sel(source="generic"))),
            })  # fmt: skip
    ranked = sorted(found, key=lambda one: abs(one["total"]) - abs(one["direct"]))
    first: dict[str, dict[str, Any]] = {}
    for one in ranked:
        first.setdefault(one["text"], one)
    return list(first.values())[:KEPT]


def main() -> None:
    """Copy, measure, search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--books", type=Path, required=True)
    asked = parser.parse_args()
    BUNDLED.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(asked.run / "model" / name, BUNDLED / name)
    record = json.loads((asked.run / "run.json").read_text()) | measured(BUNDLED, asked.books)
    (BUNDLED / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    named = [row["writer"] for row in record["writers"]]
    erased = [row["writer"] for row in record["writers"] if row["verdict"] == "erased"]
    found = prompts(BUNDLED, asked.books, erased or named)
    (BUNDLED / "prompts.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
