"""How do changed runs go up the layers, and what if many nodes are set to other values at once? Many runs in one pass.

Runs leave a base run at a block each and bring only the rows from the first one that differs on; what lies before is
that of the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.cache import Handed
from unwrite.model.continued import Calls, block_from
from unwrite.run.edit.slots import Slot, Visit, visiting
from unwrite.run.replay.clean import Base

# Rows (runs × positions) that go through a block at once.
ROWS = 4096
# What is made of the stream that block i reads, rows of the runs that have begun: what it puts out, i = L excepted.
Step = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of base prompts `pair[i]` that leave the base run at block `layer[i]`, in ascending order.

    They bring rows `start` … `end` of the prompts; `calls` is how blocks are called for them, `handed` what these hand
    on to later ones beside the stream as the runs go up, once.
    """

    base: Base
    pair: Int[Tensor, " run"]
    layer: Sequence[int]
    start: int
    end: int
    calls: Calls
    handed: Handed = field(default_factory=Handed)

    def part(self, rows: slice) -> Runs:
        """Some of the runs."""
        return Runs(self.base, self.pair[rows], self.layer[rows], self.start, self.end, self.calls)

    def of(self, pair: Int[Tensor, " run"], calls: Calls, alone: bool) -> Runs:
        """Runs of these pairs, of all rows or (`alone`) of the first, in which blocks are called so."""
        return Runs(self.base, pair, (), self.start, self.start + 1 if alone else self.end, calls)

    def of_base(self, values: Float[Tensor, "pair position *rest"], n: int) -> Float[Tensor, "run row *rest"]:
        """Values of the base run, for the rows of the first `n` runs."""
        return values[self.pair[:n], self.start : self.end]

    def block(self, index: int, x: Float[Tensor, "_ row d"], at: Int[Tensor, " _"] | None = None) -> Tensor:
        """What a block puts out for the first runs, or for some (`at`) of them."""
        pair, handed = (self.pair[: len(x)], self.handed) if at is None else (self.pair[at], self.handed.of(at))
        return block_from(self.base.lm, self.base.kept, index, x, pair, self.start, self.calls, handed)

    def finals(self, step: Step) -> Float[Tensor, "run d_model"]:
        """The final stream of each run at the row that is read."""
        x = self.base.inputs[0][:0, self.start : self.end]
        for index in range(min(self.layer), len(self.base.lm.layers) + 1):
            n = sum(layer <= index for layer in self.layer)
            begun = self.base.inputs[index][self.pair[len(x) : n], self.start : self.end]
            x = step(index, torch.cat([x, begun]))
        return x[torch.arange(len(self.pair), device=x.device), self.base.row[self.pair] - self.start]

    def rows_of(self, slot: Slot, tensor: Tensor, n: int) -> Float[Tensor, "run row unit d"]:
        """A slot's tensor of `n` runs as a view of their rows: attention sees earlier keys and values too."""
        past = self.start if slot.sees_past else 0
        return slot.view(tensor, n)[:, past : past + self.end - self.start]


def runs_of(base: Base, pair: Int[Tensor, " run"], layer: Sequence[int], start: int) -> Runs:
    """Runs of pairs, whose rows begin at `start`, or before it where runs must be whole."""
    start, end = base.begin(start), base.end(base.row)
    return Runs(base, pair, layer, start, end, base.calls(start, end))


@dataclass(frozen=True, eq=False)
class Setting:
    """To what units of a slot are set, and in which of the runs, at which of their rows.

    `where` is a truth, or a gain: 0 leaves a unit as it is, 1 sets it, and between the two it lies between.
    """

    slot: Slot
    where: Bool[Tensor, "run _ unit"] | Float[Tensor, "run _ unit"]
    values: Callable[[], Float[Tensor, "run row unit d"]]

    def put(self, own: Float[Tensor, "run row unit d"], values: Float[Tensor, "run row unit d"]) -> Tensor:
        """What units of the first runs are, whose own values these were."""
        where, values = self.where[: len(own), ..., None], values.to(own.dtype)
        # Exact at both ends, as x + g · (source − x) is not.
        return torch.where(where, values, own) if where.dtype == torch.bool else own.lerp(values, where.to(own.dtype))


def set_in(runs: Runs, settings: Sequence[Setting], index: int, x: Float[Tensor, "run row d"]) -> Tensor:
    """The stream that a block reads with the states set that lie there."""
    for one in settings:
        if one.slot.at is None and one.slot.layer == index:
            x = one.put(x[:, :, None], one.values()[: len(x)])[:, :, 0]
    return x


def setting(
    runs: Runs, settings: Sequence[Setting], index: int, x: Float[Tensor, "run row d"]
) -> AbstractContextManager[None]:
    """Inside the `with`, the nodes inside a block are set, if it is run for the first runs on `x`."""
    visits = visits_of(runs, settings, index, x)
    return visiting(runs.base.lm, visits) if visits else nullcontext()


def visits_of(
    runs: Runs, settings: Sequence[Setting], index: int, x: Float[Tensor, "run row d"]
) -> Mapping[Slot, Visit]:
    """What happens at the slots of a block."""
    here = [one for one in settings if one.slot.at is not None and one.slot.layer == index]
    # A gain of 0 has a slope.
    moves = [one for one in here if one.where.requires_grad or bool(one.where[: len(x)].any())]
    return {one.slot: partial(_put, runs, one, x) for one in moves}


def _put(runs: Runs, one: Setting, x: Float[Tensor, "run row d"], tensor: Tensor) -> Tensor:
    changed, n = tensor.clone(memory_format=torch.contiguous_format), len(x)
    rows, units = runs.rows_of(one.slot, changed, n), one.slot.units
    values = one.values()[:n]
    if one.slot.joined:  # a state between attention and MLP, set by what attention writes
        values = values - x[:, :, None] / runs.base.lm.layers[one.slot.layer].residual_scale
    rows[:, :, units] = one.put(rows[:, :, units], values)
    return changed


def settled(runs: Runs, settings: Sequence[Setting]) -> Float[Tensor, "run d_model"]:
    """The final stream, at the read row, of runs in which nodes are set; with slopes where their gains have some.

    A later node that reads an earlier one reads what it was set to, and is then set itself.
    """

    def step(index: int, x: Tensor) -> Tensor:
        x = set_in(runs, settings, index, x)
        if index == len(runs.base.lm.layers):
            return x
        with setting(runs, settings, index, x):
            return runs.block(index, x)

    return runs.finals(step)


@torch.no_grad()
def patched_together(
    base: Base,
    source: Mapping[Slot, Float[Tensor, "pair position _unit _d"]],
    chosen: Mapping[Slot, Bool[Tensor, "run position _unit"]],
    pair: Int[Tensor, " run"],
    start: int,
) -> Float[Tensor, "run d_model"]:
    """The final stream, at the read row, of runs in which many nodes are set to their source values at once.

    `chosen` says which, at which positions from `start` on.
    """
    first = min(slot.layer for slot in chosen)
    runs = runs_of(base, pair, [first] * len(pair), start)
    settings = [
        Setting(slot, where[:, runs.start : runs.end], partial(runs.of_base, source[slot], len(pair)))
        for slot, where in chosen.items()
    ]
    return settled(runs, settings)
