"""What happens if one node is set to its value in another run? Executed for many nodes, and nothing is run twice.

A patch at position t of layer l changes nothing before: the stream up to layer l, and keys and values of positions
before t, are those of the base run. So a patched run begins as one row of layer l, and goes on from layer l + 1 with
rows t and later. All patches that begin at one position go up together, those of a later layer joining those of
earlier ones. (facts: attribution, §6)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unwrite.model.cache import Kept, empty, kept_of, remembering, with_past
from unwrite.model.capture import evaluating
from unwrite.model.hooks import Call, after, before, called, first_of, hooked, kept, reading
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import rows_at
from unwrite.run.edit.slots import Slot, Values, between_blocks, values_of, visiting, watching

Calls = Mapping[int, Call]
# Rows (runs × positions) that go through a block at once.
ROWS = 4096


@dataclass(frozen=True, eq=False)
class Base:
    """A clean run of base prompts, and all that a patched one can take from it.

    `inputs[l]` is what block l read, `inputs[L]` the final stream; `kept` are keys and values, where each layer's
    attention is, everything else on the model's own device; `values` those of slots.
    """

    lm: Model
    ids: Int[Tensor, "pair position"]
    row: Int[Tensor, " pair"]
    inputs: Sequence[Float[Tensor, "pair position d_model"]]
    kept: Sequence[Kept]
    values: Values

    @property
    def final(self) -> Float[Tensor, "pair d_model"]:
        """The final stream at the rows that are read."""
        return self.inputs[-1][torch.arange(len(self.row), device=self.row.device), self.row]


@torch.no_grad()
def base_run(lm: Model, ids: Int[Tensor, "pair position"], row: Int[Tensor, " pair"], slots: Sequence[Slot]) -> Base:
    """Run left-aligned base prompts once and keep what patched runs will need."""
    calls: dict[int, Tensor] = {}
    cache = empty()
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        found = stack.enter_context(watching(lm, slots))
        # Copies: some blocks add into what they were given.
        keep = (before(module, kept(calls, i, copied=True)) for i, module in enumerate(between_blocks(lm)))
        stack.enter_context(hooked(keep))
        lm.decoder(input_ids=ids.to(lm.device), use_cache=True, past_key_values=cache)
    inputs = [calls[index].to(lm.device) for index in range(len(lm.layers) + 1)]
    return Base(lm, ids.to(lm.device), row, inputs, kept_of(cache), values_of(lm, found, inputs, len(ids)))


def base_of(lm: Model, pairs: Pairs, rows: slice, slots: Sequence[Slot]) -> Base:
    """The base run of some of the pairs."""
    row = torch.from_numpy(pairs.row[rows]).to(lm.device)
    return base_run(lm, torch.from_numpy(pairs.base.ids[rows]), row, slots)


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


def forwards(lm: Model, slots: Sequence[Slot], row: np.ndarray, first: np.ndarray, at: str) -> float:
    """How many full passes over one prompt a sweep is worth, per pair; values that do not change are not deducted."""
    layers, work, length = len(lm.layers), 0.0, float(row.max() + 1)
    for start, end in zip(np.minimum(first, row), row + 1, strict=True):
        begins = {"each": np.arange(start, end), "last": np.array([end - 1]), "all": np.array([start])}[at]
        for slot in slots:
            inside = 0 if slot.at is None else 1
            alone = inside if at != "all" and not slot.lasting else inside * (end - begins)
            work += len(slot.units) * float(((end - begins) * (layers - slot.layer - inside) + alone).sum())
    return 2 + work / (layers * length * len(row))


@torch.no_grad()
def patched(
    base: Base, source: Values, jobs: Sequence[Jobs], start: int, every_row: bool
) -> Iterator[tuple[Jobs, Float[Tensor, "patch d_model"]]]:
    """The final stream, at the read row, of each run in which one node is set to its value in the source run.

    At position `start`, or with `every_row` there and at all later ones. In as many waves as memory asks for.
    """
    end = int(torch.cat([base.row[part.pair] for part in jobs]).max()) + 1
    first, later = (calls_of(base, start, stop) for stop in (start + 1, end))
    for wave in _waves(jobs, max(1, ROWS // (end - start))):
        yield from zip(wave, _wave(base, source, wave, (start, end, every_row), first, later), strict=True)


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


def _wave(
    base: Base, source: Values, wave: Sequence[Jobs], span: tuple[int, int, bool], first: Calls, later: Calls
) -> list[Tensor]:
    """Final streams at the read rows, of the jobs in order."""
    start, end, every_row = span
    runs: list[Tensor] = []
    x, pair = base.inputs[0][:0, start:end], base.row[:0]

    def join(part: Jobs, made: Tensor) -> None:
        nonlocal x, pair
        x, pair = torch.cat([x, made]), torch.cat([pair, part.pair])
        runs.append(part.pair)

    for index in range(min(part.slot.layer for part in wave), len(base.lm.layers) + 1):
        here = [part for part in wave if part.slot.layer == index]
        for part in here:
            if part.slot.at is None:
                join(part, _set_state(base, source, part, start, end, every_row))
        if index == len(base.lm.layers):
            break
        if len(pair):
            last = index + 1 == len(base.lm.layers)
            with _one_row(base.lm.layers[index].mlp, base.row[pair] - start) if last else nullcontext():
                x = through_block(base, index, x, pair, start, later)
        for part in here:
            if part.slot.at is not None:
                alone = not every_row and not part.slot.lasting
                calls, stop = (first, start + 1) if alone else (later, end)
                out = _set_inside(base, source, part, (start, stop, every_row), calls)
                whole = base.inputs[index + 1][part.pair, start:end].clone()
                whole[:, : stop - start] = out
                join(part, whole)
    return list(x[torch.arange(len(pair), device=x.device), base.row[pair] - start].split([len(p) for p in runs]))


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
        whole[run.to(first.device), row.to(first.device)] = first[:, 0]
        return whole

    with hooked([before(mlp, narrow), after(mlp, widen)]):
        yield


def _set_state(base: Base, source: Values, part: Jobs, start: int, end: int, every_row: bool) -> Tensor:
    x = base.inputs[part.slot.layer][part.pair, start:end].clone()
    stop = end if every_row else start + 1
    x[:, : stop - start] = source[part.slot][part.pair, start:stop, 0].to(x.dtype)
    return x


def _set_inside(base: Base, source: Values, part: Jobs, span: tuple[int, int, bool], calls: Calls) -> Tensor:
    """What the slot's block puts out for rows start … stop when one node is another at the first, or at every, row."""
    start, stop, every_row = span
    slot, pair = part.slot, part.pair
    x = base.inputs[slot.layer][pair, start:stop]
    put_in = source[slot][pair, start : stop if every_row else start + 1, part.unit]
    if slot.joined:
        put_in = put_in - base.inputs[slot.layer][pair, start : start + put_in.shape[1]] / base.lm.residual_scale
    rows = torch.arange(put_in.shape[1], device=pair.device)
    # Attention sees the keys and values of earlier positions too.
    seen_rows = rows + start if slot.sees_past else rows
    unit = slot.units[part.unit]
    with visiting(base.lm, {slot: lambda tensor: slot.put(tensor, unit, seen_rows, put_in)}):
        return through_block(base, slot.layer, x, pair, start, calls)


def through_block(base: Base, index: int, x: Tensor, pair: Int[Tensor, " run"], start: int, calls: Calls) -> Tensor:
    """What a block makes of rows `start` and later of runs that before them are base runs; `calls` from `calls_of`."""
    keys, remembered = (part[pair.to(part.device), :, :start] for part in base.kept[index])
    past = remembering({index: (keys, remembered)}, len(base.lm.layers))
    args, kwargs = reading(with_past(calls[index], past, len(pair)), x)
    with evaluating(base.lm.hf):
        return first_of(base.lm.layers[index].block(*args, **kwargs)).to(pair.device)


def calls_of(base: Base, start: int, end: int) -> Calls:
    """How the model calls each block for rows start … end of one prompt that follow on earlier ones."""
    calls: dict[int, Call] = {}
    past = {i: (keys[:1, :, :start], values[:1, :, :start]) for i, (keys, values) in enumerate(base.kept)}
    with ExitStack() as stack:
        stack.enter_context(evaluating(base.lm.hf))
        keep = (called(layer.block, partial(calls.__setitem__, layer.index)) for layer in base.lm.layers)
        stack.enter_context(hooked(keep))
        cache = remembering(past, len(base.lm.layers))
        base.lm.decoder(input_ids=base.ids[:1, start:end], use_cache=True, past_key_values=cache)
    return calls
