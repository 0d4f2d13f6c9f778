"""What happens if one node is set to its value in another run? Executed for many nodes, and nothing is run twice.

A patch at position t of layer l changes nothing before: the stream up to layer l, and keys and values of positions
before t, are those of the base run. So a patched run begins as one row of layer l, and goes on from layer l + 1 with
rows t and later. All patches that begin at one position go up together, those of a later layer joining those of
earlier ones. (facts: attribution, §6)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unwrite.model.continued import Calls
from unwrite.model.hooks import after, before, hooked
from unwrite.model.view import Model
from unwrite.prompts.positions import rows_at
from unwrite.run.edit.slots import Slot, Values, visiting
from unwrite.run.replay.clean import Base
from unwrite.run.replay.walk import ROWS, Runs


@dataclass(frozen=True, eq=False)
class Jobs:
    """Patches of one slot that begin at the same position: of which pair, of which of the slot's units."""

    slot: Slot
    pair: Int[Tensor, " patch"]
    unit: Int[Tensor, " patch"]

    def part(self, rows: slice) -> Jobs:
        """Some of them."""
        return Jobs(self.slot, self.pair[rows], self.unit[rows])


def differing(base: Base, source: Values, at: str = "all") -> dict[Slot, Bool[Tensor, "pair position _unit"]]:
    """Where a node's value is another one, `at` rows that the read row can see: elsewhere a patch does nothing."""
    position = torch.arange(base.ids.shape[1], device=base.row.device)
    seen = rows_at(at, base.row, position)[:, :, None]
    return {slot: (source[slot] != own).any(-1) & seen.to(own.device) for slot, own in base.values.items()}


def placed(
    own: Values, taken: Mapping[Slot, Float[Tensor, "pair role _unit _d"]], rows: Int[np.ndarray, "pair role"]
) -> dict[Slot, Float[Tensor, "pair position _unit _d"]]:
    """A run's own values, but at the rows of base prompts that roles name the values that were taken for them."""
    at = torch.from_numpy(rows)
    made = {slot: own[slot].clone() for slot in taken}
    for slot, part in taken.items():
        made[slot][torch.arange(len(at))[:, None], at] = part.to(made[slot])
    return made


def patches(base: Base, source: Values, at: str) -> Iterator[tuple[int, list[Jobs]]]:
    """The patches that change anything, by the position where they begin, which goes up.

    `at` "each" position by itself, "all" at once, or the "last" one, which is read.
    """
    where = differing(base, source, at)
    first = torch.stack([changes.any(-1) for changes in where.values()]).any(0).int().argmax(1)
    for start in range(base.ids.shape[1]):
        if at == "all":
            chosen = {slot: changes.any(1) & (first == start)[:, None] for slot, changes in where.items()}
        else:
            chosen = {slot: changes[:, start] for slot, changes in where.items()}
        if jobs := [Jobs(slot, *part.nonzero(as_tuple=True)) for slot, part in chosen.items() if part.any()]:
            yield start, jobs


def forwards(
    lm: Model, slots: Sequence[Slot], row: np.ndarray, first: np.ndarray, at: str | Int[np.ndarray, "pair role"]
) -> float:
    """How many full passes over one prompt a sweep is worth, per pair; values that do not change are not deducted.

    `at` as `patches` has it, or the rows that roles name.
    """
    layers, work, length = len(lm.layers), 0.0, float(row.max() + 1)
    for pair, (start, end) in enumerate(zip(np.minimum(first, row), row + 1, strict=True)):
        named = {"each": np.arange(start, end), "last": np.array([end - 1]), "all": np.array([start])}
        begins = named[at] if isinstance(at, str) else np.unique(at[pair])
        for slot in slots:
            inside = 0 if slot.at is None else 1
            alone = (
                inside if not (isinstance(at, str) and at == "all") and not slot.lasting else inside * (end - begins)
            )
            work += len(slot.units) * float(((end - begins) * (layers - slot.layer - inside) + alone).sum())
    return 2 + work / (layers * length * len(row))


@torch.no_grad()
def patched(
    base: Base, source: Values, jobs: Sequence[Jobs], start: int, every_row: bool
) -> Iterator[tuple[Jobs, Float[Tensor, "patch d_model"]]]:
    """The final stream, at the read row, of each run in which one node is set to its value in the source run.

    At position `start`, or with `every_row` there and at all later ones. In as many waves as memory asks for.
    """
    begin, end = base.begin(start), base.end(torch.cat([base.row[part.pair] for part in jobs]))
    first, later = (base.calls(begin, stop) for stop in (start + 1, end))
    for wave in _waves(jobs, max(1, ROWS // (end - begin))):
        pair = torch.cat([part.pair for part in wave])
        runs = Runs(base, pair, [part.slot.layer for part in wave for _ in part.pair], begin, end, later)
        final = runs.finals(partial(_step, runs, first, source, wave, slice(start, end if every_row else start + 1)))
        yield from zip(wave, final.split([len(part.pair) for part in wave]), strict=True)


def _waves(jobs: Sequence[Jobs], size: int) -> Iterator[list[Jobs]]:
    """Jobs in the order of their layers, at most `size` patches at a time."""
    wave: list[Jobs] = []
    for part in sorted(jobs, key=lambda part: part.slot.layer):
        at = 0
        while at < len(part.pair):
            room = size - sum(len(other.pair) for other in wave)
            wave.append(part.part(slice(at, at + room)))
            at += room
            if room == len(wave[-1].pair):
                yield wave
                wave = []
    if wave:
        yield wave


def _step(runs: Runs, first: Calls, source: Values, wave: Sequence[Jobs], rows: slice, index: int, x: Tensor) -> Tensor:
    """One block: of the runs under way, and of those that begin at it, each with its node set at some rows."""
    here = [part for part in wave if part.slot.layer == index]
    states, inside = ([part for part in here if (part.slot.at is None) is state] for state in (True, False))
    n, at = len(x) - _count(inside), len(x) - _count(here)
    for part in states:
        x[at : at + len(part.pair), _own(runs, rows)] = source[part.slot][part.pair, rows, part.unit].to(x.dtype)
        at += len(part.pair)
    if index == len(runs.base.lm.layers):
        return x
    found = [x[:0]]
    if n:
        last = index + 1 == len(runs.base.lm.layers)
        row = runs.base.row[runs.pair[:n]] - runs.start
        layer = runs.base.lm.layers[index]
        with _one_row(layer.mlp, row) if last and layer.has_mlp else nullcontext():
            found.append(runs.block(index, x[:n]))
    for part in inside:
        # Where later rows of the block do not see it, they are not run.
        alone = bool(runs.base.kept) and rows.stop - rows.start == 1 and not part.slot.lasting
        out = _set_inside(runs.of(part.pair, first if alone else runs.calls, alone), source, part, rows)
        behind = runs.base.inputs[index + 1][part.pair, runs.start + out.shape[1] : runs.end]
        found.append(torch.cat([out, behind], 1))
    return torch.cat(found)


def _count(jobs: Sequence[Jobs]) -> int:
    return sum(len(part.pair) for part in jobs)


def _own(runs: Runs, rows: slice) -> slice:
    """Rows of prompts, among those that runs bring."""
    return slice(rows.start - runs.start, rows.stop - runs.start)


@contextmanager
def _one_row(mlp: nn.Module, row: Int[Tensor, " run"]) -> Iterator[None]:
    """Inside the `with`, an MLP computes one row of each run and gives 0 for the others.

    Of the last block only the row that is read is looked at, and an MLP sees each row by itself.
    """
    run = torch.arange(len(row), device=row.device)
    shape: list[torch.Size] = []

    def narrow(x: Tensor) -> Tensor | None:
        shape.append(x.shape)
        return x[run.to(x.device), row.to(x.device)][:, None] if x.dim() == 3 else None

    def widen(first: Tensor) -> Tensor | None:
        if len(shape[-1]) != 3:
            return None
        whole = first.new_zeros(*shape[-1][:2], first.shape[-1])
        whole[run.to(first.device), row.to(first.device)] = first.flatten(0, -2)
        # Some mixtures of experts give the rows of all prompts in one list.
        return whole if first.dim() == 3 else whole.flatten(0, 1)

    with hooked([before(mlp, narrow), after(mlp, widen)]):
        yield


def _set_inside(runs: Runs, source: Values, part: Jobs, rows: slice) -> Tensor:
    """What a slot's block puts out for the rows of runs in which one node is another at some of them."""
    slot, lm = part.slot, runs.base.lm
    x, put_in = runs.of_base(runs.base.inputs[slot.layer], len(part.pair)), source[slot][part.pair, rows, part.unit]
    if slot.joined:
        put_in = put_in - x[:, _own(runs, rows)] / lm.layers[slot.layer].residual_scale
    # Attention sees the keys and values of earlier positions too.
    own = rows if slot.sees_past else _own(runs, rows)
    at, unit = torch.arange(own.start, own.stop, device=part.pair.device), slot.units[part.unit]
    with visiting(lm, {slot: lambda tensor: slot.put(tensor, unit, at, put_in)}):
        return runs.block(slot.layer, x)
