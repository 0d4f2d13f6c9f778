"""Where is what these examples measured, and of which model was it? One file for each, beside this one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unwrite as uw

sys.path.append(str(Path(__file__).parents[1] / "circuits"))

import measure
from measure import model_of

__all__ = ["alike", "keep", "kept", "model_of"]
RESULTS = Path(__file__).parent / "results"


def keep(doc: str | None, measured: Callable[[str], dict[str, Any]], what: str) -> None:
    """Measure the model that the command line names, and keep `what` was found of it."""
    asked = measure.model_and_name(doc)
    measure.write(measured(asked.model), asked.name, what, RESULTS)


def kept(name: str, what: str) -> dict[str, Any]:
    """`what` was found of a model."""
    return measure.kept(name, what, RESULTS)


def alike(lm: Any, pairs: uw.Pairs, most: int = 32) -> Iterator[tuple[np.ndarray, torch.Tensor, Any]]:
    """Pairs whose base prompts are of one length: which, their ids, and what is kept of all but the last token."""
    for length in np.unique(pairs.base.lengths):
        every = np.flatnonzero(pairs.base.lengths == length)
        for rows in np.split(every, range(most, len(every), most)):
            ids = torch.from_numpy(pairs.base.ids[rows, :length])
            yield rows, ids, lm.decoder(input_ids=ids[:, :-1], use_cache=True).past_key_values
