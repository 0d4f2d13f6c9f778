"""What is the slope of a metric at every node of a run? One forward and one backward pass, under any rules.

The graph of the base run is kept, so that other backward passes through parts of it (GradDrop) cost no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import NumericError
from unwrite.model.capture import evaluating
from unwrite.model.hooks import before, hooked, kept, leaf
from unwrite.model.view import Model
from unwrite.model.weights import reloading
from unwrite.run.backward.rules import Rules, put
from unwrite.run.edit.slots import SCORED, Slot, between_blocks, values_of, watching

Slopes = dict[Slot, Float[Tensor, "pair position _unit _d"]]


@dataclass(frozen=True, eq=False)
class Graph:
    """A run of base prompts in autograd's graph: the metric of each pair, values of the slots, and their slopes.

    `stream[l]` is what block l read, `stream[L]` the final stream, `cotangents` the slope of the metric there.
    """

    metric: Float[Tensor, " pair"]
    values: Mapping[Slot, Float[Tensor, "pair position _unit _d"]]
    slopes: Slopes
    cotangents: Sequence[Float[Tensor, "pair position d_model"]]
    _tensors: Mapping[Slot, Tensor]
    _stream: Sequence[Tensor]
    _scale: float

    def without(self, layer: int) -> Slopes:
        """Slopes at what lies before this layer when none enters what the layer writes: one variant of GradDrop.

        The cotangent passes the block by the skip alone, so before it it is the one behind it (AtP*, §3.2).
        """
        before = [slot for slot in self._tensors if slot.layer < layer or (slot.at is None and slot.layer == layer)]
        tensors = [self._tensors[slot] for slot in before]
        behind = self.cotangents[layer + 1]
        found: Sequence[Tensor | None] = ()
        if tensors:
            read = self._stream[layer]
            found = torch.autograd.grad(read, tensors, behind.to(read.device), retain_graph=True, allow_unused=True)
        between = [slot for slot in self._tensors if slot.joined and slot.layer == layer]
        slopes = [*found, *(behind * self._scale for _ in between)]
        tensors += [self._tensors[slot] for slot in between]
        return _named([*before, *between], tensors, slopes, self.metric)


def graph(
    lm: Model,
    ids: Int[Tensor, "pair position"],
    slots: Sequence[Slot],
    rules: Rules,
    metric: Callable[[Float[Tensor, "pair position d_model"]], Float[Tensor, " pair"]],
    embedded: Float[Tensor, "pair position d_model"] | None = None,
    keep: bool = False,
) -> Graph:
    """Run prompts and go back once under `rules`; `metric` reads what the final norm gives.

    `embedded` stands in for the state before the first block; with `keep`, further backward passes can follow.
    """
    stream: dict[int, Tensor] = {}
    with torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        stack.enter_context(reloading(lm.hf))
        stack.enter_context(hooked(put(lm, rules)))
        stack.enter_context(hooked([before(lm.layers[0].block, leaf(embedded))]))
        stack.enter_context(hooked(before(module, kept(stream, i)) for i, module in enumerate(between_blocks(lm))))
        tensors = stack.enter_context(watching(lm, slots))
        value = metric(lm.decoder(input_ids=ids.to(lm.device), use_cache=False).last_hidden_state.to(lm.device))
        if not value.requires_grad:
            raise NumericError("the metric has no slope", fix="use method='exact', or make it of torch's own functions")
        tensors = {slot: tensors[slot] for slot in slots}
        inputs = [stream[index] for index in range(len(lm.layers) + 1)]
        # Rows do not mix, so the slope of the sum is every pair's own.
        found = torch.autograd.grad(value.sum(), [*tensors.values(), *inputs], retain_graph=keep, allow_unused=True)
    values = values_of(lm, tensors, inputs, len(ids))
    slopes = _named(list(tensors), list(tensors.values()), found[: len(tensors)], value)
    if rules.attention != "free":
        slopes |= {slot: torch.zeros_like(slopes[slot]) for slot in slots if slot.kind in SCORED}
    cotangents = [_zero_if_none(part, x).to(lm.device) for part, x in zip(found[len(tensors) :], inputs, strict=True)]
    scale = lm.residual_scale
    return Graph(value.detach(), values, slopes, cotangents, tensors if keep else {}, inputs if keep else (), scale)


def _zero_if_none(slope: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if slope is None else slope


def _named(slots: Sequence[Slot], tensors: Sequence[Tensor], found: Sequence[Tensor | None], metric: Tensor) -> Slopes:
    """Slopes in the slots' own view, of the units that are asked for, where the metric is."""
    named: Slopes = {}
    for slot, tensor, slope in zip(slots, tensors, found, strict=True):
        whole = slot.view(_zero_if_none(slope, tensor).to(metric.device), len(metric))
        named[slot] = whole.index_select(2, slot.units.to(whole.device))
    return named
