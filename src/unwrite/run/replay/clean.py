"""What would the later layers do if the stream were different? One clean run, continued from any layer under an edit.

Only the layers from the edited one on are run again, with the arguments that their blocks were called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.model.attention import Patterns, patterns
from unwrite.model.capture import Recording, recording
from unwrite.model.hooks import Call, Visit, after, called, first_of, hooked, read_of, reading
from unwrite.model.values import through_values, value_scale
from unwrite.model.view import Folded, Layer, Model, centre
from unwrite.model.writes import blocks, expand, write_of
from unwrite.nodes import Node


@dataclass(frozen=True)
class Clean:
    """A clean run of one batch: what it recorded, how each block was called, and patterns where they were asked for."""

    lm: Model
    folded: Sequence[Folded]
    record: Recording
    calls: Mapping[int, Call]
    patterns: Patterns

    def written(self, record: Recording) -> Iterator[Float[Tensor, "node prompt position d_model"]]:
        """What every node wrote in this run or in one continued from it: in write order, a block at a time."""
        rows = next(iter(record.z.values())).shape[:2]
        writes = record.writes.map(lambda part: part.expand(rows[0], *part.shape[1:]).flatten(0, 1))
        for among in blocks(self.lm):
            yield expand(self.lm, tuple(self.folded), writes, among=among).unflatten(1, rows)

    def write(self, node: Node) -> Float[Tensor, "prompt position d_model"]:
        """What one node wrote in this run."""
        own = write_of(self.lm, self.folded, self.record.writes, node)
        return own.expand(*self.record.z[0].shape[:2], -1)

    def input(self, layer: int) -> Float[Tensor, "prompt position d_model"]:
        """The stream as this layer's block was given it, wherever the layer before it computes."""
        return read_of(self.calls[layer])

    def scale(self, layer: Layer) -> Tensor | None:
        """The frozen scale of the norm before this layer's values."""
        return value_scale(self.lm, layer, self.record.stream[layer.reads])

    def carried(self, layer: int, vector: Tensor) -> Float[Tensor, "prompt position head d_model"]:
        """C of eq. 3: what this layer's heads write because `vector` is in the stream, pattern and norms held."""
        block = self.lm.layers[layer]
        through = through_values(self.lm, block, self.patterns[layer], vector, self.scale(block))
        return torch.einsum("bthk,hkd->bthd", self.post_scaled(block, through), self.folded[layer].w_o)

    def post_scaled(self, layer: Layer, z: Tensor) -> Tensor:
        """A part of z times the frozen scale of a post-norm, where there is one."""
        gain = self.record.gain.get(layer.index)
        return z if gain is None else z * gain[..., None, None]


@torch.no_grad()
def clean(
    lm: Model, ids: Int[Tensor, "prompt position"], folded: Sequence[Folded], with_patterns: bool = False
) -> Clean:
    """Run the base model once over left-aligned prompts. With patterns, its attention is computed openly."""
    calls: dict[int, Call] = {}
    with ExitStack() as stack:
        found = stack.enter_context(patterns(lm) if with_patterns else nullcontext({}))
        record = stack.enter_context(recording(lm, folded, truth=True))
        stack.enter_context(hooked(called(layer.block, partial(calls.__setitem__, layer.index)) for layer in lm.layers))
        lm.decoder(input_ids=ids.to(lm.device), use_cache=False)
    return Clean(lm, folded, record, calls, dict(found))


@torch.no_grad()
def added(run: Clean, node: Node, change: Float[Tensor, "prompt position d_model"]) -> Recording:
    """The run in which `change` is added to the stream right after `node` has written.

    Returns a Recording that is complete: what lies before the edit is that of the clean run.
    """
    if node.layer < 0:
        return _continued(run, 0, change, {})
    layer = run.lm.layers[node.layer]
    module = layer.mlp_end if node.kind == "mlp" else layer.attention_end
    return _continued(run, node.layer, None, {module: partial(_plus, run.lm, lambda: change)})


@torch.no_grad()
def hidden(run: Clean, vector: Float[Tensor, "prompt position d_model"], layers: Sequence[int]) -> Recording:
    """The run in which `vector` is taken out of the value input of all heads in some layers, and of nothing else.

    Norms before these values and post-norms after them keep the scale of the clean run; queries and keys of these
    layers, and all layers after them, run freely. (Dao et al. 2023, Fig. 3)
    """
    lm = run.lm
    if not layers:
        return run.record
    taken: dict[int, Tensor] = {}
    with patterns(lm) as found:

        def carried(layer: Layer) -> Tensor:
            through = through_values(lm, layer, found[layer.index], vector, run.scale(layer))
            taken[layer.index] = run.post_scaled(layer, through)
            return -torch.einsum("bthk,hkd->btd", taken[layer.index], run.folded[layer.index].w_o)

        edited = [lm.layers[index] for index in layers]
        visits = {_attention_end(lm, layer): partial(_plus, lm, partial(carried, layer)) for layer in edited}
        record = _continued(run, min(layers), None, visits)
    for index, part in taken.items():
        record.z[index] = record.z[index] - part  # recorded before it was taken out
    return record


@torch.no_grad()
def each_block(run: Clean, change: Callable[[int, Tensor], Tensor]) -> Clean:
    """Every block by itself on its own clean input, changed; no block sees what another made of it.

    Attention post-norms keep the scale of the clean run.
    """
    lm = run.lm
    with recording(lm, run.folded) as record:
        for layer in lm.layers:
            _block(run, layer, change(layer.index, run.input(layer.index)))
    for index, gain in record.gain.items():
        held = run.record.gain[index]
        record.z[index] = record.z[index] * (held / gain)[..., None, None]
        record.gain[index] = held
    return replace(run, record=_completed(run.record, record))


def _block(run: Clean, layer: Layer, x: Tensor) -> Tensor:
    args, kwargs = reading(run.calls[layer.index], x)
    return first_of(layer.block(*args, **kwargs))


def _attention_end(lm: Model, layer: Layer) -> nn.Module:
    """Where a layer's attention write can be changed and its pattern is already known."""
    if not lm.row.interface:  # the pattern comes out with the attention module's output
        return layer.attention
    return layer.attention_end


def _plus(lm: Model, change: Callable[[], Tensor], written: Tensor) -> Tensor:
    """What a module writes with something added, in units of the stream, which it reaches scaled."""
    return written + (change() / lm.residual_scale).reshape(written.shape).to(written)


def _continued(run: Clean, start: int, change: Tensor | None, visits: Mapping[nn.Module, Visit]) -> Recording:
    """Run the blocks from `start` on, with edits of what some modules put out."""
    lm = run.lm
    with ExitStack() as stack:
        # Edits first: what a block's own nodes hand on after an edit is what is recorded.
        stack.enter_context(hooked(after(module, visit) for module, visit in visits.items()))
        record = stack.enter_context(recording(lm, run.folded, truth=True))
        x = run.input(start)
        x = x if change is None else x + change.to(x)
        for layer in lm.layers[start:]:
            x = _block(run, layer, x)
    record.stream[lm.states[-1]] = centre(x.to(lm.device, lm.compute_dtype), lm)
    return _completed(run.record, record)


def _completed(base: Recording, record: Recording) -> Recording:
    return Recording(
        {**base.z, **record.z},
        {**base.gain, **record.gain},
        {**base.vectors, **record.vectors},
        {**base.stream, **record.stream},
        {**base.attention, **record.attention},
    )
