"""What is the slope of a metric at every node of a run? One forward and one backward pass, under any rules.

The graph of the base run is kept, so that other backward passes through parts of it (GradDrop) cost no forward pass.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.errors import ModelError, NumericError
from unwrite.model.capture import evaluating
from unwrite.model.hooks import before, first_of, hooked, kept, leaf
from unwrite.model.placed import decode
from unwrite.model.projections import require_slopes
from unwrite.model.view import Layer, Model
from unwrite.model.weights import followed, reloading
from unwrite.nodes import Location
from unwrite.run.backward.rules import Rules, put
from unwrite.run.edit.slots import SCORED, Slot, between_blocks, values_of, watching

Slopes = dict[Slot, Float[Tensor, "pair position _unit _d"]]
# Of what the final norm gives.
MetricOf = Callable[[Float[Tensor, "pair position d_model"]], Float[Tensor, " pair"]]
Watched = AbstractContextManager[Mapping[Any, Tensor]]


def backward(
    lm: Model,
    ids: Int[Tensor, "pair position"],
    rules: Rules,
    metric: MetricOf,
    watched: Watched,
    embedded: Float[Tensor, "pair position d_model"] | None = None,
    keep: bool = False,
) -> tuple[Float[Tensor, " pair"], dict[Any, Tensor], dict[Any, Tensor]]:
    """The metric of each pair, the tensors that `watched` shows of a forward pass, and the metric's slope at each.

    One forward and one backward pass under `rules`; no parameter's gradient is computed or stored. `embedded` stands in
    for the state before the first block; with `keep`, further backward passes can follow. Raises NumericError for a
    metric that has no slope, ModelError where a part of the model has none.
    """
    require_slopes(lm, lm.hf)
    with sloping(lm), ExitStack() as stack:
        stack.enter_context(hooked(put(lm, rules)))
        # What was embedded begins the graph, whether or not the parameters have gradients.
        stack.enter_context(hooked([before(lm.layers[0].block, leaf(embedded))]))
        shown = stack.enter_context(watched)
        value = metric(first_of(decode(lm, ids, use_cache=False)).to(lm.device))
        if not value.requires_grad:
            raise NumericError("the metric has no slope", fix="use method='exact', or make it of torch's own functions")
        tensors = dict(shown)
        # Rows do not mix, so the slope of the sum is every pair's own.
        found = torch.autograd.grad(value.sum(), [*tensors.values()], retain_graph=keep, allow_unused=True)
    slopes = [torch.zeros_like(x) if slope is None else slope for x, slope in zip(tensors.values(), found, strict=True)]
    return value, tensors, dict(zip(tensors, slopes, strict=True))


@contextmanager
def sloping(lm: Model) -> Iterator[None]:
    """Inside the `with`, passes leave autograd's graph. Raises ModelError where a part of the model has no slope."""
    with torch.enable_grad(), evaluating(lm.hf), reloading(lm.hf), followed(lm.hf), _differentiable():
        yield


@contextmanager
def _differentiable() -> Iterator[None]:
    """Torch, and kernels written for it, raise NotImplementedError where there is no derivative."""
    try:
        yield
    except NotImplementedError as error:
        raise ModelError(
            "a part of this model has no slope", got=error, expected="a model that autograd goes through",
            fix="use what needs no slope, such as method='exact', or load it with attn_implementation='sdpa'",
        ) from error  # fmt: skip


def cotangents(
    lm: Model, ids: Int[Tensor, "pair position"], rules: Rules, metric: MetricOf
) -> tuple[Float[Tensor, " pair"], dict[Location, Float[Tensor, "pair position d_model"]]]:
    """The metric, and its slope under `rules` at every state of the stream, per unit of what arrives at the end."""
    modules: dict[Location, nn.Module] = {layer.reads: layer.block for layer in lm.layers}
    modules[lm.states[-1]] = lm.final_norm
    if not lm.parallel:
        modules |= {Location("mid", layer.index): layer.mid for layer in lm.layers if layer.mid is not None}
    modules |= {Location("late", layer.index): layer.late for layer in lm.layers if layer.late is not None}
    value, _, found = backward(lm, ids, rules, metric, _read_by(modules))
    shape = (len(ids), ids.shape[1], lm.d_model)
    slopes = {state: part.reshape(shape).to(lm.device, lm.compute_dtype) for state, part in found.items()}
    return value.detach(), {state: slope / lm.to_end(state) for state, slope in slopes.items()}


@contextmanager
def _read_by(modules: Mapping[Any, nn.Module]) -> Iterator[Mapping[Any, Tensor]]:
    """Inside the `with`, what modules read: the stream's own tensors, which the skip path uses, too."""
    found: dict[Any, Tensor] = {}
    with hooked(before(module, kept(found, key)) for key, module in modules.items()):
        yield found


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
    _layers: Sequence[Layer]

    def without(self, layer: int) -> Slopes:
        """Slopes at what lies before this layer when none enters what the layer writes: one variant of GradDrop.

        The cotangent passes the block by the skip alone, so before it it is the one behind it (AtP*, §3.2).
        """
        earlier = {
            slot: tensor for slot, tensor in self._tensors.items()
            if slot.layer < layer or (slot.at is None and slot.layer == layer)
        }  # fmt: skip
        between = {slot: tensor for slot, tensor in self._tensors.items() if slot.joined and slot.layer == layer}
        block, read = self._layers[layer], self._stream[layer]
        behind = self.cotangents[layer + 1] * block.gain
        found: Sequence[Tensor | None] = ()
        if earlier:
            asked, slope = [*earlier.values()], behind.to(read.device)
            found = torch.autograd.grad(read, asked, slope, retain_graph=True, allow_unused=True)
        return _named({**earlier, **between}, [*found, *(behind * block.residual_scale for _ in between)], self.metric)


def graph(
    lm: Model,
    ids: Int[Tensor, "pair position"],
    slots: Sequence[Slot],
    rules: Rules,
    metric: MetricOf,
    embedded: Float[Tensor, "pair position d_model"] | None = None,
    keep: bool = False,
) -> Graph:
    """Run prompts and go back once under `rules`; `embedded` and `keep` as in `backward`."""
    watched = reading(lm, dict(enumerate(between_blocks(lm))), slots)
    value, tensors, found = backward(lm, ids, rules, metric, watched, embedded, keep)
    own, inputs = {slot: tensors[slot] for slot in slots}, [tensors[i] for i in range(len(lm.layers) + 1)]
    slopes = _named(own, [found[slot] for slot in own], value)
    if rules.attention != "free":
        slopes |= {slot: torch.zeros_like(slopes[slot]) for slot in slots if slot.kind in SCORED}
    cotangents = [found[i].to(lm.device) for i in range(len(inputs))]
    return Graph(
        value.detach(), values_of(lm, own, inputs, len(ids)), slopes, cotangents,
        own if keep else {}, inputs if keep else (), lm.layers,
    )  # fmt: skip


@contextmanager
def reading(lm: Model, modules: Mapping[Any, nn.Module], slots: Sequence[Slot]) -> Iterator[Mapping[Any, Tensor]]:
    """Inside the `with`, a pass leaves what modules read of the stream, by their keys, and the tensors of slots."""
    with _read_by(modules) as stream, watching(lm, slots) as tensors:
        yield ChainMap(tensors, stream)  # pyright: ignore[reportArgumentType]


def _named(tensors: Mapping[Slot, Tensor], found: Iterable[Tensor | None], metric: Tensor) -> Slopes:
    """Slopes in the slots' own view, of the units that are asked for, where the metric is."""
    named: Slopes = {}
    for (slot, tensor), slope in zip(tensors.items(), found, strict=True):
        own = torch.zeros_like(tensor) if slope is None else slope
        whole = slot.view(own.to(metric.device), len(metric))
        named[slot] = whole.index_select(2, slot.units.to(whole.device))
    return named
