"""What if nodes are anywhere between their values in two runs? A gain for each node and place, and its slope.

x' = x + g · (source − x), g from 0 (what the node is in the run under way) to 1 (its source value). With m = 1 − g it
is the mask of Prakash et al. 2024 (arXiv 2402.14811).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.continued import Calls
from unwrite.model.fold import centre
from unwrite.run.edit.slots import Slot, Values
from unwrite.run.replay.clean import Base
from unwrite.run.replay.walk import Runs, Setting, settled


@dataclass(frozen=True, eq=False)
class _Tail:
    """Base runs of which rows from `start` to `end` are run again, in which blocks are called by `calls`."""

    base: Base
    start: int
    end: int
    calls: Calls

    @property
    def rows(self) -> int:
        """Rows that each run brings."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Blend(_Tail):
    """Base runs, and what the nodes of `source` may be set to in them, as `placed` has it.

    `gate` says which place each row of a base prompt is, −1: none, where nothing is ever set. Only rows from the first
    such row on are run.
    """

    source: Values
    gate: Int[Tensor, "pair position"]

    def finals(self, gain: Float[Tensor, "run node place"], pair: Int[Tensor, " run"]) -> Float[Tensor, "run d_model"]:
        """The final stream, at the read row, of runs of these pairs with these gains, part of their graph.

        Nodes are in the order of the slots, and of the units of each.
        """
        layer = min(slot.layer for slot in self.source)
        runs = Runs(self.base, pair, [layer] * len(pair), self.start, self.end, self.calls)
        # The last place is that of all rows that are none.
        whole = torch.cat([gain, gain.new_zeros(*gain.shape[:2], 1)], -1)
        place = self.gate[pair, self.start : self.end] % whole.shape[-1]
        at = whole.gather(-1, place[:, None].expand(-1, whole.shape[1], -1)).transpose(1, 2)
        parts = at.split([len(slot.units) for slot in self.source], -1)
        settings = [
            Setting(slot, part, partial(runs.of_base, self.source[slot], len(pair)))
            for slot, part in zip(self.source, parts, strict=True)
        ]
        return settled(runs, settings)


def blend(base: Base, source: Values, gate: Int[Tensor, "pair position"]) -> Blend:
    """What all runs share whose nodes lie between base and source values at the places that `gate` says."""
    gate = gate.to(base.row.device)
    start, end = base.begin(int((gate >= 0).any(0).int().argmax())), base.end(base.row)
    return Blend(base, start, end, base.calls(start, end), source, gate)


@dataclass(frozen=True, eq=False)
class Interchange(_Tail):
    """Base runs of some pairs in which the units of a slot may be set at one row each, `row`, to any value.

    Values are [coordinate], those of all units behind one another: `own` what they are in the base run, `there` in the
    source run, as a trace shows them (in the stream of some models without their mean, which nothing reads). Only rows
    from the first of these to the last that is read are run.
    """

    slot: Slot
    row: Int[Tensor, " pair"]
    own: Float[Tensor, "pair coordinate"]
    there: Float[Tensor, "pair coordinate"]

    @property
    def change(self) -> Float[Tensor, "pair coordinate"]:
        """What another one of the source prompt is at the site."""
        return self.there - self.own

    def finals(self, value: Float[Tensor, "run coordinate"], pair: Int[Tensor, " run"]) -> Float[Tensor, "run d_model"]:
        """The final stream, at the read row, of runs of these pairs with these values, part of their graph."""
        runs = Runs(self.base, pair, [self.slot.layer] * len(pair), self.start, self.end, self.calls)
        here = torch.arange(self.start, self.end, device=pair.device) == self.row[pair, None]
        units = len(self.slot.units)
        values = value.view(len(pair), 1, units, -1).expand(-1, self.rows, -1, -1)
        return settled(runs, [Setting(self.slot, here[..., None].expand(-1, -1, units), lambda: values)])


def interchange(base: Base, source: Values, row: Int[Tensor, " pair"]) -> dict[Slot, Interchange]:
    """The runs of a base in which a slot is set at a row of each pair, by slot; `source` as `placed` has it."""
    row = row.to(base.row.device)
    start, end = base.begin(int(row.min())), base.end(base.row)
    calls, pair = base.calls(start, end), torch.arange(len(row), device=row.device)
    made = {}
    for slot in source:
        own, there = (part[slot][pair, row].to(base.lm.compute_dtype) for part in (base.values, source))
        if slot.streams:
            own, there = (centre(part, base.lm) for part in (own, there))
        made[slot] = Interchange(base, start, end, calls, slot, row, own.flatten(1), there.flatten(1))
    return made
