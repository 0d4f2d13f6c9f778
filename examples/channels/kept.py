"""Where is what these examples measured, and of which model was it? One file for each, beside this one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unwrite as uw

RESULTS = Path(__file__).parent / "results"


def keep(doc: str, measured: Callable[[str], dict[str, Any]], what: str) -> None:
    """Measure the model that the command line names, and keep `what` was found of it."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    found = measured(asked.model)
    RESULTS.mkdir(exist_ok=True)
    _file(asked.name, what).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def kept(name: str, what: str) -> dict[str, Any]:
    """`what` was found of a model."""
    return json.loads(_file(name, what).read_text("utf-8"))


def model_of(found: uw.Result) -> dict[str, Any]:
    """Which model a result is of, and by what it was read."""
    record = found.provenance
    model = {name: record["model"][name] for name in ("family", "layers", "heads", "d_model", "weights")}
    return {"model": model, "versions": record["versions"]}


def alike(lm: Any, pairs: uw.Pairs, most: int = 32) -> Iterator[tuple[np.ndarray, torch.Tensor, Any]]:
    """Pairs whose base prompts are of one length: which, their ids, and what is kept of all but the last token."""
    for length in np.unique(pairs.base.lengths):
        every = np.flatnonzero(pairs.base.lengths == length)
        for rows in np.split(every, range(most, len(every), most)):
            ids = torch.from_numpy(pairs.base.ids[rows, :length])
            yield rows, ids, lm.decoder(input_ids=ids[:, :-1], use_cache=True).past_key_values


def _file(name: str, what: str) -> Path:
    return RESULTS / f"{name}-{what}.json"
