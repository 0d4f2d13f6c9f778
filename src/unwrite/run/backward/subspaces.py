"""Which directions, exchanged between two runs, make the base prompt say what it must say then? Learned, all at once.

Distributed alignment search (Geiger et al. 2023, arXiv 2303.02536): x' = x + BᵀB (source − x), B orthonormal, found by
descent on softplus(ℓ[answer] − ℓ[against]), the cross-entropy of the two tokens. What a fit is to make of a final
stream is handed in, so that one can be asked for arbitrary tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.run.backward.learn import Parameters, Problem, Sloped, sloped
from unwrite.run.edit.subspace import along, drawn, orthonormal
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.stream import Batch, parts
from unwrite.run.replay.soft import Interchange

# Rows (runs × positions) of which a graph is held.
_ROWS = 1024
# ℓ[answer] − ℓ[against] of final streams, `pair` that of each run.
Told = Callable[[Float[Tensor, "run d_model"], Int[Tensor, " run"]], Float[Tensor, " run"]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """Some pairs to learn from: their runs, what each fit is to turn round in them, and what the pairs are called."""

    batch: Batch
    runs: Interchange
    differences: Sequence[Told]
    names: Sequence[str]


def aligning(lessons: Sequence[Lesson], k: int, seeds: Sequence[int], tick: Callable[[], object]) -> Problem:
    """The problem of k directions, one fit for each seed; `tick` is called whenever a part of the loss is done."""
    like = lessons[0].runs.own
    start = torch.stack([drawn(k, like, seed) for seed in seeds])
    return Problem({"basis": start}, partial(_loss, lessons, tick), _allowed)


def _allowed(parameters: Parameters) -> Parameters:
    return {name: orthonormal(part) for name, part in parameters.items()}


def _loss(lessons: Sequence[Lesson], tick: Callable[[], object], parameters: Parameters) -> Iterator[Sloped]:
    total = sum(lesson.batch.real for lesson in lessons)
    for lesson in lessons:
        each = max(1, _ROWS // (len(parameters["basis"]) * lesson.runs.rows))
        for first in range(0, lesson.batch.real, each):
            some = lesson.batch.part(slice(first, min(first + each, lesson.batch.real)))
            yield from (found for _, found in parts(some, partial(_sloped, lesson, total, parameters)))
            tick()


def _sloped(lesson: Lesson, total: int, parameters: Parameters, batch: Batch) -> Sloped:
    """What some pairs of a lesson add to the loss of every fit, and its slope."""
    at = torch.arange(batch.real, device=lesson.runs.own.device) + batch.first - lesson.batch.first

    def loss(part: Parameters) -> Float[Tensor, " fit"]:
        fits = len(part["basis"])
        # Orthonormal inside of the loss, so that no slope leads along the length of a direction.
        changed = lesson.runs.own[at] + along(lesson.runs.change[at], orthonormal(part["basis"]))
        finals = lesson.runs.finals(changed.flatten(0, 1), at.repeat(fits)).unflatten(0, (fits, -1))
        value = torch.stack([of(one, at) for of, one in zip(lesson.differences, finals, strict=True)])
        names = [lesson.names[int(i)] for i in at]
        require_finite(value.isfinite().all(0), "the answer of {pair} is not finite where it is patched", pair=names)
        return torch.nn.functional.softplus(value).sum(1) / total

    return sloped(parameters, loss)


def cost(fits: int, steps: int, tails: Float[np.ndarray, " pair"]) -> float:
    """Passes over one prompt that learning is worth, forward and backward, of runs that are such parts of a pass."""
    return float(2 * fits * steps * tails.sum())
