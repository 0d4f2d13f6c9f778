"""Which outputs of which projections in a mixer are its values? Asked of the module itself, by its slopes.

A value reaches one channel of z, and later positions: a query, key, B or C reaches all channels of its head, a gate
its own position alone, and Δ is a constant. Where each of two factors would do (LFM2's B ⊙ x), the last is the value
and the other its gate, as they are called there. Euler's theorem is the judge: along what it reads and the biases on
the way, the slope of a linear map is what it gives. A mixer of which that is not true shows no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.model.hooks import Call, after, calls_of, hooked, read_of
from unwrite.model.layers import Layer
from unwrite.model.mixers import Held, handed, sloped_z
from unwrite.model.projections import projections_in
from unwrite.model.traced import lent, some_ids
from unwrite.model.view import Columns, Model

# Relative: how far slopes of one channel are from multiples of each other, and what Euler's theorem gives from z.
_SAME, _EXACT = 1e-3, 1e-4


def values_of(lm: Model) -> dict[int, Columns]:
    """Layer -> which outputs of its mixer's projections are values, for every mixer that shows them in a short pass."""
    mixers = [layer for layer in lm.layers if layer.mixes]
    if not mixers:
        return {}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        for inside in lent(lm.hf):
            stack.enter_context(inside)
        with torch.no_grad(), calls_of({layer.index: layer.attention for layer in mixers}) as calls:
            lm.hf(input_ids=some_ids(lm.hf), use_cache=False)
        shown = {layer.index: _shown(layer, calls[layer.index]) for layer in mixers}
    return {index: values for index, values in shown.items() if values}


def _shown(layer: Layer, call: Call) -> Columns:
    try:
        values = _values(layer, call)
        z, slope = (
            part.unflatten(-1, (layer.heads, -1)) for part in sloped_z(layer, values, call, read_of(call), True)
        )
    except Exception:  # noqa: BLE001 - whatever a module does that no slope goes through, its values are not shown
        return {}
    # Written so that NaN is no proof.
    return values if euler(z, slope) <= _EXACT else {}


def euler(z: Float[Tensor, "*rows head d_head"], slope: Float[Tensor, "*rows head d_head"]) -> float:
    """Worst ‖slope − z‖ of a head, relative to its largest z."""
    size = z.norm(dim=-1).flatten(0, -2).amax(0).clamp_min(torch.finfo(z.dtype).tiny)
    error = (slope - z).norm(dim=-1) / size
    return float(error.amax()) if error.isfinite().all() else float("nan")


def _values(layer: Layer, call: Call) -> Columns:
    """Which outputs reach one channel of z from earlier positions; of several that reach the same, the last."""
    values, of_channel = {}, {}
    for part, slopes in _slopes(layer, call):
        values[part] = torch.zeros(slopes.shape[-1], dtype=torch.bool)
        for output, channel in _channels(slopes):
            of_channel[channel] = part, output
    for part, output in of_channel.values():
        values[part][output] = True
    return values if of_channel else {}


def _slopes(layer: Layer, call: Call) -> Iterator[tuple[nn.Module, Float[Tensor, "3 prompt position output"]]]:
    """Slopes at what each projection puts out, all between them held.

    Of the sum of all z, each position with a weight; of the same with every channel as often as its number says; of the
    last position's sum.
    """
    leaves: dict[nn.Module, Tensor] = {}

    def cut(part: nn.Module, made: Tensor) -> Tensor:
        leaves[part] = made.detach().requires_grad_()
        return leaves[part]

    parts = [part for part in projections_in(layer.attention) if part is not layer.out_proj]
    with torch.enable_grad(), Held(), hooked(after(part, lambda made, part=part: cut(part, made)) for part in parts):
        z = handed(layer, call)
    weights = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(0)).to(z)[..., None] + 0.5
    numbers = torch.arange(1, z.shape[-1] + 1).to(z)
    last = (torch.arange(z.shape[1]) == z.shape[1] - 1).to(z)[:, None]
    sums = [(z * weights).sum(), (z * weights * numbers).sum(), (z * last).sum()]
    every = [torch.autograd.grad(one, [*leaves.values()], retain_graph=True, allow_unused=True) for one in sums]
    for part, *found in zip(leaves, *every, strict=True):
        if all(slope is not None for slope in found):
            yield part, torch.stack([slope.reshape(*z.shape[:2], -1) for slope in found])


def _channels(slopes: Float[Tensor, "3 prompt position output"]) -> Iterator[tuple[int, int]]:
    """Outputs that reach one channel of z, also from an earlier position; and the number of that channel."""
    one, numbered = slopes[:2].double().flatten(1, 2)
    number = (one * numbered).sum(0) / one.square().sum(0)
    single = (numbered - number * one).norm(dim=0) <= _SAME * numbered.norm(dim=0)
    earlier = slopes[2, :, :-1].ne(0).flatten(0, 1).any(0)
    for output in (single & earlier).nonzero().flatten().tolist():
        yield output, round(float(number[output]))
