"""What do masks learn, and what do their nodes do to pairs that they have not seen? All masks of a call at once.

A gain for each node and place moves it from its value in the base run to its source value; sets of nodes whose gain is
above ½ are then patched whole, beside none, all, the others, and random ones of the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.projections import require_slopes
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.logits import at_once
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.answer.metrics import Metric, metric_of
from unwrite.run.backward.learn import Learning, Parameters, Problem, Sloped, sloped
from unwrite.run.backward.slopes import sloping
from unwrite.run.edit.slots import Slot
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, alike, parts
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.soft import Blend, blend
from unwrite.run.replay.sweep import placed
from unwrite.run.source.values import Donor
from unwrite.stats.masks import HALF, compared, repeated

# Rows (runs × positions) of which a graph is held.
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Side:
    """Pairs, sorted by the rows that their runs bring, with the donor of their values, and which place each row is.

    `number` is that of each pair among those that were given.
    """

    pairs: Pairs
    number: Int[np.ndarray, " pair"]
    donor: Donor
    rows: Int[np.ndarray, "pair role"] | None
    gate: Int[np.ndarray, "pair position"]

    def groups(self, size: int) -> Iterator[Batch]:
        """Pairs whose runs bring the same rows, at most `size` at a time."""
        begins = (self.gate >= 0).argmax(1)
        yield from alike(self.pairs, zip(self.pairs.row.tolist(), begins.tolist(), strict=True), size)


@dataclass(frozen=True, eq=False)
class Piece:
    """Some pairs of a side, and all that their blended runs need."""

    batch: Batch
    blend: Blend
    metric: Metric
    clean: Float[Tensor, " pair"]
    number: Int[np.ndarray, " pair"]

    def called(self, batch: Batch) -> list[str]:
        """What some of these pairs are called."""
        first = batch.first - self.batch.first
        return [f"pair {i}" for i in self.number[first : first + batch.real]]


@dataclass(frozen=True, eq=False)
class Masks:
    """What is asked: learned on the sides `learned` of pairs that change and that are kept, judged by `judged`.

    `places` are an axis and the names on it; without a name of its own the axis has one place alone.
    """

    lm: Model
    slots: tuple[Slot, ...]
    places: tuple[str, Sequence[Any]]
    learned: tuple[Side, ...]
    judged: tuple[Side, ...]
    penalty: tuple[float, ...]
    seeds: int
    steps: int
    lr: float
    draws: int

    @property
    def names(self) -> list[str]:
        """Names of the nodes, in the order in which a pass reaches them."""
        return [name for slot in self.slots for name in slot.names]

    @property
    def layer(self) -> Int[np.ndarray, " node"]:
        """The number of the slot that each node is of."""
        return np.repeat(np.arange(len(self.slots)), [len(slot.units) for slot in self.slots])

    @property
    def fits(self) -> int:
        """Masks that are learned."""
        return len(self.penalty) * self.seeds

    def weight(self, side: int) -> Float[np.ndarray, "fit pair"]:
        """How often each fit looks at a pair, over their number: the first seed once at all, others at a draw."""
        n = len(self.learned[side].pairs)
        drawn = [np.random.default_rng([seed, side]).multinomial(n, np.full(n, 1 / n)) for seed in range(1, self.seeds)]
        return np.tile(np.stack([np.ones(n), *drawn]) / n, (len(self.penalty), 1))


def cost(request: Masks) -> float:
    """Passes over one prompt, forward ones and backward ones; sets that turn out alike are not deducted."""
    lm, sets = request.lm, 2 + len(request.penalty) * (2 + request.draws)

    def tail(side: Side) -> float:
        """What a run of each pair is worth, together."""
        rows = side.pairs.row + 1 - (side.gate >= 0).argmax(1)
        depth = 1 - min(slot.layer for slot in request.slots) / len(lm.layers)
        return float((rows / (side.pairs.row + 1)).sum()) * depth

    whole = sum(2 * len(side.pairs) for side in (*request.learned, *request.judged))
    learned = sum(2 * request.steps * request.fits * tail(side) for side in request.learned)
    return whole + learned + sets * sum(tail(side) for side in request.judged)


class MaskTally:
    """All masks, learned at once, and how they do on held-out pairs."""

    def __init__(self, request: Masks, size: int, job: Job):
        self._request, self._size, self._job = request, size, job
        places = len(request.places[1])
        gain = torch.zeros(request.fits, len(request.names), places, dtype=request.lm.compute_dtype)
        start = {"gain": gain.to(request.lm.device)}
        self._learning = Learning(Problem(start, self._loss, _clamped), request.steps, request.lr)
        self._learned: list[list[Piece]] = []
        self.found: Arrays = {}
        self.kept = Ledger({"found": self.found, "learning": self._learning.kept})

    def step(self, batch: Batch) -> None:
        """All pairs are one batch."""
        request = self._request
        require_slopes(request.lm, request.lm.hf)
        self._learned = [self._pieces(side) for side in request.learned]
        with sloping(request.lm), torch.no_grad():
            best, losses = self._learning.run(self._tick)
        gain = best["gain"].unflatten(0, (len(request.penalty), request.seeds)).double().cpu().numpy()
        solved = [_solved(piece) for piece in self._learned[0]]
        self._learned = []  # before others are held
        judged = self._judged(gain)
        solved = np.concatenate([*solved, judged["solved"]])
        self.found |= {**judged, "gain": gain, "loss": losses.double().cpu().numpy(), "solved": solved}

    def _tick(self, done: int, what: str = "steps") -> None:
        # Learning is most of it.
        self._job.tick(self.kept, done / self._request.steps, f"{done}/{self._request.steps} {what}")

    def _pieces(self, side: Side) -> list[Piece]:
        """Base runs of a side, and the values that may be put there."""
        made = partial(_made, self._request, side)
        return [piece for batch in side.groups(self._size) for _, piece in parts(batch, made)]

    def _loss(self, parameters: Parameters) -> Iterator[Sloped]:
        """The loss of every mask in parts, as many runs at once as a graph should hold."""
        request = self._request
        for side, pieces in enumerate(self._learned):
            weight = torch.from_numpy(request.weight(side)).to(parameters["gain"])
            for piece in pieces:
                each = max(1, _ROWS // (request.fits * piece.blend.rows))
                for start in range(0, piece.batch.real, each):
                    some = piece.batch.part(slice(start, start + each))
                    of = partial(_sloped, request, piece, weight, bool(side), parameters)
                    yield from (found for _, found in parts(some, of))
                    self._tick(self._learning.done)
        price = parameters["gain"].new_tensor(np.repeat(request.penalty, request.seeds))
        yield sloped(parameters, lambda part: price * part["gain"].sum((1, 2)))

    def _judged(self, gain: Float[np.ndarray, "penalty seed node place"]) -> Arrays:
        """What is patched at last, and what that does to held-out pairs."""
        request, chosen = self._request, gain.mean(1) > HALF
        every = compared(chosen, request.layer, request.draws)
        sets, number = np.unique(every, axis=0, return_inverse=True)
        found = {"chosen": chosen, "own": repeated(every, len(chosen))}
        for name, side in zip(("", "kept_"), request.judged, strict=False):
            pieces, order = self._pieces(side), np.argsort(side.number)
            measured = [_measured(request, piece, torch.from_numpy(sets), self._looked) for piece in pieces]
            whole = {key: np.concatenate([one[key] for one in measured], -1)[:, order] for key in measured[0]}
            found |= {f"{name}{key}": part[number.reshape(-1)] for key, part in whole.items()}
            if not name:
                found["solved"] = np.concatenate([_solved(piece) for piece in pieces])
        return found

    def _looked(self) -> None:
        self._tick(self._learning.done, "steps, and held-out pairs")


def _solved(piece: Piece) -> Bool[np.ndarray, " pair"]:
    return piece.metric.solved(final_normed(piece.metric.lm, piece.blend.base.final)).cpu().numpy()


def _clamped(parameters: Parameters) -> Parameters:
    return {name: part.clamp(0, 1) for name, part in parameters.items()}


def _made(request: Masks, side: Side, batch: Batch) -> Piece:
    """Some pairs of a side: run once, with the values of their nodes elsewhere."""
    rows = slice(batch.first, batch.first + batch.real)
    base, given = base_of(request.lm, side.pairs, rows, request.slots), side.donor.values(rows)
    source = given if side.rows is None else placed(base.values, given, side.rows[rows])
    metric = metric_of(request.lm, side.pairs, "logit_diff", rows)
    clean = metric(base.final)
    piece = Piece(batch, blend(base, source, torch.from_numpy(side.gate[rows])), metric, clean, side.number[rows])
    require_finite(clean.isfinite(), "the metric of {pair} is not finite", pair=piece.called(batch))
    return piece


def _sloped(
    request: Masks, piece: Piece, weight: Float[Tensor, "fit pair"], keep: bool, parameters: Parameters, batch: Batch
) -> Sloped:
    """What some pairs of a piece add to the loss of every mask that looks at them, and its slope."""
    own = weight[:, batch.first : batch.first + batch.real]
    fit, pair = own.nonzero(as_tuple=True)
    at = pair + batch.first - piece.batch.first

    def loss(part: Parameters) -> Float[Tensor, " fit"]:
        value = piece.metric(piece.blend.finals(part["gain"][fit], at), at)
        finite = ~torch.isin(torch.arange(batch.real, device=at.device), pair[~value.isfinite()])
        require_finite(finite, "the metric of {pair} is not finite where nodes are set", pair=piece.called(batch))
        # Without a corner at no change, where rounding alone would have a slope.
        value = torch.nn.functional.smooth_l1_loss(value, piece.clean[at], reduction="none") if keep else value
        return own.new_zeros(len(own)).index_add(0, fit, own[fit, pair] * value)

    return sloped(parameters, loss)


@torch.no_grad()
def _measured(
    request: Masks, piece: Piece, sets: Bool[Tensor, "set node place"], looked: Callable[[], object]
) -> dict[str, Float[np.ndarray, "set pair"]]:
    """What is said, and how much rather than the base prompt's answer, with each of these sets patched."""
    found: list[dict[str, Tensor]] = []
    each = max(1, min(_ROWS // piece.blend.rows, at_once(request.lm)) // piece.batch.real)
    for some in sets.split(each):
        of = partial(_said, piece, some.to(piece.clean))
        halves = [one for _, one in parts(piece.batch, of)]
        found.append({name: torch.cat([one[name] for one in halves], 1) for name in halves[0]})
        looked()
    return {name: torch.cat([one[name] for one in found]).double().cpu().numpy() for name in found[0]}


def _said(piece: Piece, gain: Float[Tensor, "set node place"], batch: Batch) -> dict[str, Tensor]:
    metric = piece.metric
    own = torch.arange(batch.real, device=gain.device) + batch.first - piece.batch.first
    pair, at = own.repeat(len(gain)), torch.arange(len(gain), device=gain.device).repeat_interleave(len(own))
    logits = metric.logits(final_normed(metric.lm, piece.blend.finals(gain[at], pair)))
    finite = logits.isfinite().all(-1).view(len(gain), -1).all(0)
    require_finite(finite, "a logit of {pair} is not finite", pair=piece.called(batch))
    answer = metric.answer[pair, None]
    against = answer if metric.against is None else metric.against[pair, None]
    others = answer if metric.choices is None else torch.cat([answer, metric.choices[pair]], 1)
    said, old = (logits.gather(1, ids)[:, 0] for ids in (against, answer))
    best = logits.gather(1, others).masked_fill(others == against, -torch.inf).amax(1)
    top = logits.argmax(1)
    found = {"match": top == against[:, 0], "restricted": said > best, "difference": said - old, "top": top}
    return {name: part.view(len(gain), -1) for name, part in found.items()}
