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
from unwrite.run.edit.slots import Values
from unwrite.run.replay.clean import Base
from unwrite.run.replay.walk import Runs, Setting, settled


@dataclass(frozen=True, eq=False)
class Blend:
    """Base runs, and what the nodes of `source` may be set to in them, as `placed` has it.

    `gate` says which place each row of a base prompt is, −1: none, where nothing is ever set. Only rows from the first
    such row, `start`, to `end` are run, in which blocks are called by `calls`.
    """

    base: Base
    source: Values
    gate: Int[Tensor, "pair position"]
    start: int
    end: int
    calls: Calls

    @property
    def rows(self) -> int:
        """Rows that each run brings."""
        return self.end - self.start

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
    return Blend(base, source, gate, start, end, base.calls(start, end))
