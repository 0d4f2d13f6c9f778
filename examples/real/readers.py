"""Who reads a write, who erases it, who uses its space afterwards? The writers that erasure.py found lost most surely.

    python examples/real/readers.py MODEL BOOKS --name NAME --task L20H0 --work FOLDER

MODEL is a folder or a hub name, BOOKS a folder of books other than those that chose the writers, of which a window in
the middle is read. `--task` names a head that is looked at on indirect object identification as well. What was found is
kept as `results/NAME-readers.json` beside this file, from which docs/readers.md is made. A run that was stopped goes on
from FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import erasure
import pandas as pd
from erasure import keep, kept, rounded

import unwrite as uw
from unwrite.report.columns import Line
from unwrite.report.views import listings, view, words

# So many writers, each of which other books called erased or reduced; documents, and pairs of the task.
WRITERS, DOCUMENTS, PAIRS = 5, 12, 32
# Lines of each table that are kept.
SHOWN = 8


def measured(model: str, name: str, folder: Path, head: str, work: Path) -> dict[str, Any]:
    """The three steps of every writer on books, and of a head on the task."""
    lm = uw.load(model, dtype="float32")
    erasure.DOCUMENTS = DOCUMENTS
    tokens = erasure.books(folder, lm)
    found = {w: uw.readers(lm, tokens, w, checkpoint=work / w) for w in lost(name)}
    pairs = uw.tasks.ioi(PAIRS, lm.tokenizer, bos=False)
    on_task = uw.readers(lm, pairs, head, checkpoint=work / "ioi")
    record = on_task.provenance
    return {
        "model": {key: record["model"][key] for key in ("family", "layers", "heads", "d_model", "weights")},
        "versions": record["versions"], "books": tokens.source, "hash": tokens.hash, "documents": DOCUMENTS,
        "solves": uw.solves(lm, pairs).data.attrs["solves"], "writers": {w: steps(one) for w, one in found.items()},
        "task": {"head": head, "pairs": PAIRS, **steps(on_task)},
    }  # fmt: skip


def lost(name: str) -> list[str]:
    """Writers that were called erased or reduced on the most sets of books, heads and MLPs alike."""
    sets = erasure.frames(kept(name))
    said: dict[str, int] = {}
    for frame in sets:
        for writer in frame.index[frame["verdict"].isin(["erased", "reduced", "filled in"])]:
            said[writer] = said.get(writer, 0) + 1
    return sorted(said, key=lambda writer: (-said[writer], sets[0]["gap"].get(writer, 0)))[:WRITERS]


def steps(found: uw.Result) -> dict[str, Any]:
    """What is said of one writer, and the first lines of every table."""
    parts = listings(found)
    headers = {part.title: [column.short for column in part.columns] for part in parts}
    tables = {part.title: [list(row) for row in part.rows[:SHOWN]] for part in parts}
    lines = [part.words for part in view(found).parts(found) if isinstance(part, Line)]
    return {"words": words(found), "lines": lines, "headers": headers, "tables": tables}


# What docs/readers.md is made of.


def table(one: dict[str, Any], title: str, n: int = SHOWN) -> pd.DataFrame:
    """The first lines of one of the tables of a writer."""
    return pd.DataFrame(one["tables"][title][:n], columns=one["headers"][title]).set_index(one["headers"][title][0])


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("books", type=Path)
    asked.add_argument("--name", required=True)
    asked.add_argument("--task", required=True)
    asked.add_argument("--work", type=Path, required=True)
    given = asked.parse_args()
    result = rounded(measured(given.model, given.name, given.books, given.task, given.work))
    keep(f"{given.name}-readers", result)
    for one in [*result["writers"].values(), result["task"]]:
        print(one["words"])
