"""Which outputs of which projections in a mixer are its values? Asked of the module itself, by its slopes.

A value reaches one channel of z, and later positions: a query, key, B or C reaches all channels of its head, a gate
its own position alone, and Δ is a constant. Where each of two factors would do (LFM2's B ⊙ x), the last is the value
and the other its gate, as they are called there. Euler's theorem is the judge: along what it reads and the biases on
the way, the slope of a linear map is what it gives. A mixer of which that is not true shows no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unwrite.model.hooks import Call, after, calls_kept, hooked, read_of
from unwrite.model.layers import Layer
from unwrite.model.mixers import Frozen, handed, sloped_z
from unwrite.model.projections import projections_in, sizes
from unwrite.model.traced import lent, some_ids
from unwrite.model.view import Columns, Model

# Relative: how far slopes of one channel are from multiples of each other, and what Euler's theorem gives from z.
_SAME, EXACT = 1e-4, 1e-4
# What a norm of heads takes away of all channels alike, through which each value reaches every channel of its head.
_CENTRE = ("mean",)
_Slopes = Float[Tensor, "prompt position output"]


def shown_values(lm: Model) -> dict[int, Columns]:
    """Layer -> which outputs of its mixer's projections are values, for every mixer that shows them in a short pass."""
    mixers = [layer for layer in lm.layers if layer.mixes]
    if not mixers:
        return {}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        for inside in lent(lm.hf):
            stack.enter_context(inside)
        with torch.no_grad(), calls_kept({layer.index: layer.attention for layer in mixers}) as calls:
            lm.decoder(input_ids=some_ids(lm.hf), use_cache=False)
        found: dict[int, Columns] = {}
        for layer in mixers:
            found[layer.index] = _shown(layer, calls[layer.index], found.values())
    return {index: values for index, values in found.items() if values}


def _shown(layer: Layer, call: Call, others: Iterable[Columns]) -> Columns:
    """Its values: where they are in another mixer of the same make, or else by its own slopes; none without proof."""
    parts = _parts(layer)
    alike = next((other for other in others if [*map(sizes, other)] == [*map(sizes, parts)]), {})
    try:
        if alike and _is_linear(layer, call, values := dict(zip(parts, alike.values(), strict=True))):
            return values
        every = (_values(layer, call, held) for held in ((), _CENTRE))
        return next((values for values in every if _is_linear(layer, call, values)), {})
    except Exception:  # noqa: BLE001 - whatever a module does that no slope goes through, its values are not shown
        return {}


def _parts(layer: Layer) -> list[nn.Module]:
    return [part for part in projections_in(layer.attention) if part is not layer.out_proj]


def _is_linear(layer: Layer, call: Call, values: Columns) -> bool:
    z, slope = (part.unflatten(-1, (layer.heads, -1)) for part in sloped_z(layer, values, call, read_of(call), True))
    return euler(z, slope) <= EXACT  # NaN is not


def euler(z: Float[Tensor, "*rows head d_head"], slope: Float[Tensor, "*rows head d_head"]) -> float:
    """Worst ‖slope − z‖ of a head, relative to its largest z."""
    size = z.norm(dim=-1).flatten(0, -2).amax(0).clamp_min(torch.finfo(z.dtype).tiny)
    error = (slope - z).norm(dim=-1) / size
    return float(error.amax()) if error.isfinite().all() else float("nan")


def _values(layer: Layer, call: Call, held: tuple[str, ...]) -> Columns:
    """Which outputs reach one channel of z from earlier positions; of several that reach the same, the last.

    Results of functions that are `held` are taken as they are.
    """
    values: dict[nn.Module, Tensor] = {part: torch.zeros(sizes(part)[1], dtype=torch.bool) for part in _parts(layer)}
    of_channel: dict[int, tuple[nn.Module, int]] = {}
    for part, channels in _reached(layer, call, held):
        of_channel |= {channel: (part, output) for output, channel in enumerate(channels.tolist()) if channel >= 0}
    for part, output in of_channel.values():
        values[part][output] = True
    return values


def _reached(layer: Layer, call: Call, held: tuple[str, ...]) -> Iterator[tuple[nn.Module, Int[Tensor, " output"]]]:
    """Each projection, and which one channel of z its outputs reach from earlier positions; −1 for several or none."""
    leaves: dict[nn.Module, Tensor] = {}

    def cut(part: nn.Module, made: Tensor) -> Tensor:
        leaves[part] = made.detach().requires_grad_()
        return leaves[part]

    with torch.enable_grad(), Frozen(besides=held), hooked(after(part, partial(cut, part)) for part in _parts(layer)):
        z = handed(layer, call)
    draw = torch.Generator().manual_seed(0)
    position, marks = (0.5 + torch.rand(count, generator=draw).to(z) for count in z.shape[1:])
    numbers = torch.arange(z.shape[-1]).to(z) + 1
    sums = [torch.einsum("btc,t,c->", z, position, by) for by in (torch.ones_like(marks), numbers, marks)]
    every = [_slopes_of(one, leaves) for one in (*sums, z[:, -1].sum())]
    for part in leaves:
        whole, numbered, marked, last = (slopes[part].reshape(*z.shape[:2], -1) for slopes in every)
        yield part, _channels(whole, numbered, marked, last, marks)


def _slopes_of(one: Tensor, leaves: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
    found = torch.autograd.grad(one, [*leaves.values()], retain_graph=True, allow_unused=True)
    slopes = zip(leaves, found, strict=True)
    return {part: torch.zeros_like(leaves[part]) if slope is None else slope for part, slope in slopes}


def _channels(
    whole: _Slopes, numbered: _Slopes, marked: _Slopes, last: _Slopes, marks: Float[Tensor, " channel"]
) -> Int[Tensor, " output"]:
    """Which channel outputs reach, from slopes of the sum of all, of all times a number or a mark, and of the last row.

    The slopes of one channel are multiples of each other at all positions: by its number, and by its mark.
    """
    number, by_number = _multiple(numbered, whole)
    mark, by_mark = _multiple(marked, whole)
    channel = number.nan_to_num().round().long().sub(1).clamp(0, len(marks) - 1)
    single = by_number & by_mark & ((mark - marks.double()[channel]).abs() <= _SAME)
    return torch.where(single & last[:, :-1].ne(0).flatten(0, 1).any(0), channel, -1).cpu()


def _multiple(some: _Slopes, whole: _Slopes) -> tuple[Float[Tensor, " output"], Bool[Tensor, " output"]]:
    """How often slopes are others, and whether they are that at every position."""
    some, whole = (part.double().flatten(0, 1) for part in (some, whole))
    times = (some * whole).sum(0) / whole.square().sum(0)
    return times, (some - times * whole).norm(dim=0) <= _SAME * some.norm(dim=0)
