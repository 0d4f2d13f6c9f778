"""What does a model say when everything outside a set of nodes is set to another run's values? Many sets in one pass.

Nodes of the set are computed from what is set before them; the others are set, wherever they read something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.run.edit.slots import Slot, Values
from unwrite.run.replay.clean import Base
from unwrite.run.replay.sweep import differing
from unwrite.run.replay.walk import ROWS, patched_together


@dataclass(frozen=True, eq=False)
class Outside:
    """Runs of base prompts in which the nodes outside of sets are set to `source`.

    Sets say what is kept, [set, node, place] with the nodes of `slots` one after the other: a place is a role, which is
    the token `rows` of each pair, and the last one is everywhere else. `asked` of which pairs a set is run.
    """

    base: Base
    source: Values
    slots: tuple[Slot, ...]
    rows: Int[Tensor, "pair role"]

    def parts(
        self, kept: Bool[Tensor, "set node place"], asked: Bool[Tensor, "set pair"]
    ) -> Iterator[tuple[Int[Tensor, " run"], Int[Tensor, " run"]]]:
        """The runs that go up together, as sets and pairs, in a fixed order: those that leave the base run at once."""
        begins = self._first_layers(kept)
        each = max(1, ROWS // (int(self.base.row.max()) + 1 - self._start))
        for layer in begins.unique().tolist():
            one, pair = (asked & (begins == layer)[:, None]).nonzero(as_tuple=True)
            yield from zip(one.split(each), pair.split(each), strict=True) if len(one) else ()

    def final(self, kept: Bool[Tensor, "run node place"], pair: Int[Tensor, " run"]) -> Float[Tensor, "run d_model"]:
        """The final stream of runs that keep these, at the row that is read; that keep everything, the base run's."""
        where = self._replaced(kept, pair)
        return patched_together(self.base, self.source, where, pair, self._start) if where else self.base.final[pair]

    def _first_layers(self, kept: Bool[Tensor, "set node place"]) -> Int[Tensor, " set"]:
        """The first layer of each set in which something is replaced: before it a run is the base run."""
        sizes = [len(slot.units) for slot in self.slots]
        replaced = torch.stack([~part.flatten(1).all(1) for part in kept.split(sizes, 1)], 1)
        layers = torch.tensor([slot.layer for slot in self.slots], device=kept.device)
        return torch.where(replaced, layers, len(self.base.lm.layers)).amin(1)

    def _replaced(
        self, kept: Bool[Tensor, "run node place"], pair: Int[Tensor, " run"]
    ) -> dict[Slot, Bool[Tensor, "run position _unit"]]:
        """Where each node is set; slots with none are left out. Of roles at one token, one that keeps is enough."""
        whole = kept[:, None, :, -1].repeat(1, self.base.ids.shape[1], 1)
        run, rows = torch.arange(len(kept), device=kept.device), self.rows[pair]
        for role in range(rows.shape[1]):
            whole[run, rows[:, role]] = False
        for role in range(rows.shape[1]):
            whole[run, rows[:, role]] |= kept[:, :, role]
        parts = zip(self.slots, (~whole).split([len(slot.units) for slot in self.slots], -1), strict=True)
        return {slot: where for slot, where in parts if bool(where.any())}

    @cached_property
    def _start(self) -> int:
        """The first row that can change in any run."""
        rows = torch.stack([part.flatten(2).any(-1).any(0) for part in differing(self.base, self.source).values()])
        return int(rows.any(0).int().argmax())
