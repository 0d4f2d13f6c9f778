"""What would the later layers do if the stream were different? One clean run, continued from any layer under an edit.

Only the layers from the edited one on are run again, with the arguments that their blocks were called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.model.attention import Patterns, patterns
from unwrite.model.capture import Recording, recording
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
    calls: Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]
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
        return _hidden_state(self.calls[layer])

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
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: calls.__setitem__(index, (args, kwargs))

    with ExitStack() as stack:
        found = stack.enter_context(patterns(lm) if with_patterns else nullcontext({}))
        record = stack.enter_context(recording(lm, folded, truth=True))
        for layer in lm.layers:
            stack.callback(layer.block.register_forward_pre_hook(keep(layer.index), with_kwargs=True).remove)
        lm.decoder(input_ids=ids.to(lm.device), use_cache=False)
    return Clean(lm, folded, record, calls, dict(found))


@torch.no_grad()
def added(run: Clean, node: Node, change: Float[Tensor, "prompt position d_model"]) -> Recording:
    """The run in which `change` is added to the stream right after `node` has written.

    Returns a Recording that is complete: what lies before the edit is that of the clean run.
    """
    if node.layer < 0:
        return _continued(run, 0, change, [])
    layer = run.lm.layers[node.layer]
    late = node.kind == "mlp"
    module = (layer.post_mlp_norm or layer.mlp) if late else (layer.post_attention_norm or layer.out_proj)
    return _continued(run, node.layer, None, [_addition(module, lambda: change, run.lm)])


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
        attach = [_addition(_attention_end(lm, layer), lambda layer=layer: carried(layer), lm) for layer in edited]
        record = _continued(run, min(layers), None, attach)
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
    args, kwargs = run.calls[layer.index]
    output = layer.block(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    return output if isinstance(output, Tensor) else output[0]


def _attention_end(lm: Model, layer: Layer) -> nn.Module:
    """Where a layer's attention write can be changed and its pattern is already known."""
    if not lm.row.interface:  # the pattern comes out with the attention module's output
        return layer.attention
    return layer.post_attention_norm or layer.out_proj


def _addition(module: nn.Module, change: Callable[[], Tensor], lm: Model) -> Callable[[], Any]:
    """Puts a hook that adds to what a module writes into the stream (before the residual scale)."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        written = output if isinstance(output, Tensor) else output[0]
        scaled = change() / lm.row.residual_scale(lm.config)
        edited = written + scaled.reshape(written.shape).to(written)
        return edited if written is output else (edited, *output[1:])

    return lambda: module.register_forward_hook(hook)


def _continued(run: Clean, start: int, change: Tensor | None, attach: Sequence[Callable[[], Any]]) -> Recording:
    """Run the blocks from `start` on, with edits in place that `attach` puts there."""
    lm = run.lm
    with ExitStack() as stack:
        # Edits first: what a block's own nodes hand on after an edit is what is recorded.
        for put in attach:
            stack.callback(put().remove)
        record = stack.enter_context(recording(lm, run.folded, truth=True))
        x = run.input(start)
        x = x if change is None else x + change.to(x)
        for layer in lm.layers[start:]:
            x = _block(run, layer, x)
    record.stream[lm.states[-1]] = centre(x.to(lm.device, lm.compute_dtype), lm)
    return _completed(run.record, record)


def _hidden_state(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _completed(base: Recording, record: Recording) -> Recording:
    return Recording(
        {**base.z, **record.z},
        {**base.gain, **record.gain},
        {**base.vectors, **record.vectors},
        {**base.stream, **record.stream},
        {**base.attention, **record.attention},
    )
