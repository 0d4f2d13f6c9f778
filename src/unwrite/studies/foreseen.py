"""How long will each stage take on so many prompts? From one short trial of the model itself, before anything is run.

A scan and a survival are tried on a few random tokens: one batch more costs so much, all else is spent once. What
verify and dla consist of is known in passes of blocks, and a pass is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unwrite.errors import whole
from unwrite.methods.readers import DRAWS, HELD_OUT
from unwrite.methods.scan import scan
from unwrite.methods.survival import stand_ins
from unwrite.model import readers
from unwrite.model.fold import fold
from unwrite.model.onednn import fast
from unwrite.model.placed import decode
from unwrite.model.view import Model
from unwrite.nodes import Node, choose
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.run.loop.stream import Listener, Progress, batch_size
from unwrite.run.loop.trial import Taken, clock
from unwrite.run.replay.read import PARTS
from unwrite.run.replay.removed import behind
from unwrite.run.tally.foretold import looked_at, per_prompt
from unwrite.run.tally.survives import ALONE, Removals
from unwrite.run.tally.without import READ_ROTATIONS, ROTATIONS
from unwrite.studies.audit import ASKED, FOUND, MOST, REMOVED_FROM, SHORT, controls_of, demonstration

# Tokens of one trial, and of the shortest pass that is timed, whose cost is that of a call.
TRIED, FEW = 128, 8
# So many prompts say which writes are material.
SEEN = 4
# Prompts that fill every batch.
_MANY = 4096
# A prompt's readings in `uw.dla`, in passes; and what a changed run costs beside its blocks, there, in `uw.verify` and
# in `uw.readers`.
_READINGS, _SWEPT, _RECORDED, _PROJECTED = 10, 1.3, 1.75, 4.0
# Where only one row of a run is new, every so many rows before it, which it attends to, cost as much as that row.
_ATTENDED = 40
# What stands in for one writer that is looked at closely, and the write itself.
_BESIDE = 1 + sum(ALONE.values())


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block: for calling it, and for each row that goes through it."""

    call: float
    row: float

    def seconds(self, rows: int | float, blocks: int | float) -> float:
        """Of so many blocks that so many rows go through at once."""
        return blocks * (self.call + rows * self.row)


def foreseen(lm: Model, n: int, length: int, writers: int | Iterable[object] | None = None) -> dict[str, float]:
    """Seconds by stage for n prompts of `length` tokens: scan, survival of all writers, verify of one, dla of a prompt;
    and an audit, of as many writers as are material on a text that every Python carries.

    `writers` as in `stages`.
    """
    taken, able = stages(lm, length, writers), len(spread(lm, writers))
    each = {name: taken[name].seconds(1 if name == "dla" else n) for name in ("scan", "survival", "verify", "dla")}
    count = able
    if writers is None and lm.tokenizer is not None:
        count = material(lm, demonstration(lm, SEEN, length))
    survival = taken["survival"]
    of_some = {**taken, "survival": Taken(survival.once, survival.each * count / able)}
    return {**each, "audit": sum(of_audit(of_some, n, count).values())}


def material(lm: Model, tokens: Tokens) -> int:
    """How many nodes write anything material on some prompts."""
    tally, _ = looked_at(lm, tokens)
    return max(1, sum(node.kind not in ("bias", "embed") for node in tally.material()))


def of_audit(taken: Mapping[str, Taken], n: int, writers: int) -> dict[str, float]:
    """Seconds of what an audit of n prompts consists of, by name, told by `stages` of the writers that it takes out, so
    many."""
    half = n / 2
    few, asked = min(half, REMOVED_FROM), min(ASKED, half)
    # One run for the write itself and one for each stand-in, of which an audit makes fewer.
    runs = 1 + controls_of(writers)["decoys"], 1 + sum(stand_ins(writers).values())
    return {
        "scan": taken["scan"].seconds(half),
        f"survival of {writers}": taken["survival"].once + few * taken["survival"].each * runs[0] / runs[1],
        f"verify of {MOST}": MOST * taken["verify"].seconds(half),
        f"readers of {MOST}": MOST * taken["steps"].seconds(few),
        "search": taken["verify"].seconds(half) / 2,
        "dla": min(FOUND, asked) * taken["dla found"].each + max(asked - FOUND, 0) * taken["dla short"].each,
    }  # fmt: skip


def stages(lm: Model, length: int, writers: int | Iterable[object] | None = None) -> Mapping[str, Taken]:
    """What each stage takes once and for each prompt of `length` tokens, so that a number of prompts can be chosen; of
    dla also where only the last row is asked about, of whole prompts and of such as an audit makes short.

    `writers` as in `spread`. A stage of several writers is all of them in survival, and one of them, in the middle, in
    verify. Seconds are those of `clock`: of the processor where one thread does all.
    """
    chosen, now = spread(lm, writers), clock(lm)
    short = max(1, min(length, TRIED))
    scale = length / short
    ids = trial_ids(lm, 2 * max(1, TRIED // short), short)
    with fast(lm.hf):
        with torch.no_grad():
            one = _pass(lm, ids[: len(ids) // 2], now)
        survived = _survival(lm, from_ids(ids[:2]), scale, chosen, now)
    scanned = _tried(lambda tell: scan(lm, ids, batch=len(ids) // 2, listener=tell), len(ids) // 2, now)
    return {
        "scan": Taken(scanned.once, scale * scanned.each),
        "survival": survived,
        "verify": _verify(lm, length, chosen, one),
        "steps": _steps(lm, length, chosen, one),
        "dla": _dla(lm, length, length, one),
        "dla found": _dla(lm, length, 1, one),
        "dla short": _dla(lm, min(SHORT, length), 1, one),
    }


def spread(lm: Model, writers: int | Iterable[object] | None) -> list[Node]:
    """Nodes by their names; so many, spread over all layers; or for None all that are no bias."""
    able = [node for node in lm.parts if node.kind != "bias"]
    if writers is None:
        return able
    if isinstance(writers, (int, np.integer)):
        count = whole("writers is a number of nodes, or their names", writers, 1, len(able))
        return [able[i * len(able) // count] for i in range(count)]
    return list(choose(writers, lm.parts))


def _pass(lm: Model, ids: Tensor, now: Callable[[], float]) -> BlockTime:
    """From a pass over many rows and one over few."""
    few, many = ids[:1, :FEW], ids
    short, long = (min(_passed(lm, part, now) for _ in range(2)) for part in (few, many))
    rows = many.numel() - few.numel()
    row = max(long - short, 0.0) / max(rows, 1) if rows else short / few.numel()
    blocks = len(lm.layers)
    return BlockTime(max(short - row * few.numel(), 0.0) / blocks, row / blocks)


def _passed(lm: Model, ids: Tensor, now: Callable[[], float]) -> float:
    start = now()
    decode(lm, ids, use_cache=False)[0].sum().item()
    return now() - start


def _tried(work: Callable[[Listener], Any], prompts: int, now: Callable[[], float]) -> Taken:
    """Of a method that is told of two batches of so many prompts: the second shows what a prompt costs."""
    told: list[float] = []

    def tell(progress: Progress) -> None:
        if not progress.begun:
            told.append(now())

    start = now()
    work(tell)
    took, second = now() - start, told[-1] - told[-2]
    return Taken(max(took - 2 * second, 0.0), second / prompts)


@torch.no_grad()
def _survival(lm: Model, tokens: Tokens, scale: float, writers: list[Node], now: Callable[[], float]) -> Taken:
    """Who reads the stream is found once; what is written is looked at in a pass of its own."""
    start = now()
    weights = {"readers": readers.weights(lm, writers), "raw": torch.ones(len(writers), lm.d_model)}
    weights = {name: part.to(lm.device, lm.compute_dtype) for name, part in weights.items()}
    asked = Removals(lm, fold(lm), tokens, 1, writers, weights, stand_ins(len(writers)))
    once = now() - start
    return Taken(once, scale * (per_prompt(asked) + looked_at(lm, tokens)[1]))


def _verify(lm: Model, length: int, writers: list[Node], one: BlockTime) -> Taken:
    """Four clean runs, one without the write, one for every rotation, and MLPs that alone read it, or a turned one;
    and beside two runs of each prompt those without the write, and without what stands in for it."""
    blocks, part = len(lm.layers), behind(lm, writers) / max(len(writers), 1)
    runs = 4 * blocks + (1 + ROTATIONS + (1 + READ_ROTATIONS) * 2 / 3) * part
    together = batch_size(lm, from_ids(torch.zeros(_MANY, length, dtype=torch.long)), whole_only=True)
    shown = 5 * one.seconds(length, blocks + part)
    beside = 2 * one.seconds(length, blocks) + _SWEPT * one.seconds(_BESIDE * length, part)
    return Taken(_RECORDED * shown, _RECORDED * one.seconds(together * length, runs) / together + beside)


def _steps(lm: Model, length: int, writers: list[Node], one: BlockTime) -> Taken:
    """Every layer without the write and without every typical one, in each way of reading; and the clean run and those
    without erasers, in which all nodes' writes are projected."""
    part = behind(lm, writers) / max(len(writers), 1)
    runs = (1 + DRAWS) * len(PARTS) + _PROJECTED * (2 + HELD_OUT)
    return Taken(0.0, one.seconds(length, runs * part))


def _dla(lm: Model, length: int, rows: int, one: BlockTime) -> Taken:
    """Every node replaced, by nothing and by its mean, in so many last rows, beside the readings."""
    swept = 2 * behind(lm, lm.parts) * (rows + (length - rows) / _ATTENDED) * one.row
    return Taken(0.0, _SWEPT * swept + _READINGS * one.seconds(length, len(lm.layers)))


def trial_ids(lm: Model, prompts: int, length: int) -> Tensor:
    """Random tokens for a trial."""
    return torch.randint(lm.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(0))
