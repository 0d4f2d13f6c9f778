"""What did every node write in one forward pass? The factors of all writes, seen by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from unwrite.model.families import REST
from unwrite.model.fold import Folded, centre, outside
from unwrite.model.hooks import Handle, after, before, hooked, kept
from unwrite.model.inside import text_config
from unwrite.model.norms import norm_scale
from unwrite.model.placed import decode
from unwrite.model.view import Layer, Model
from unwrite.model.writes import Writes
from unwrite.nodes import MLPS, Location, Node


@dataclass
class Recording:
    """What one forward pass showed. `writes` always; the rest, by which the certificate judges it, on request.

    `only`: of which prompts it is kept what nodes write (None: of all). `shape`: prompts and positions of the pass.
    """

    z: dict[int, Tensor] = field(default_factory=dict)
    gain: dict[int, Tensor] = field(default_factory=dict)
    vectors: dict[Node, Tensor] = field(default_factory=dict)
    stream: dict[Location, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    only: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @property
    def writes(self) -> Writes:
        """The nodes' writes with rows [prompt, position]."""
        z, gain = ({layer: part[layer] for layer in sorted(part)} for part in (self.z, self.gain))
        return Writes(z, gain, self.vectors)


@contextmanager
def recording(lm: Model, folded: Sequence[Folded], truth: bool = False) -> Iterator[Recording]:
    """Inside the `with`, a forward pass of `lm.decoder` or `lm.hf` fills the recording (each pass anew).

    With `truth`, also the stream at every location and what each attention block really added. Everything is kept on
    the model's own device, wherever a layer computes. The hooks copy what they keep: some blocks (Falcon's) go on to
    add into the very tensor that a module returned.
    """
    record = Recording()
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        stack.enter_context(hooked(_hooks(lm, folded, record, truth)))
        yield record


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Inside the `with`, compiled parts run as they are written: compiled code calls no hook that came after it."""
    compiled = any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, no module trains, none is compiled, and outputs have names; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    # transformers cannot run most of its own models whose configuration says return_dict=False.
    bare = [config for config in _configs(model) if config.return_dict is False]
    try:
        for module in training:
            module.training = False
        for config in bare:
            config.return_dict = True
        with uncompiled(model):
            yield
    finally:
        for module in training:
            module.training = True
        for config in bare:
            config.return_dict = False


def _configs(model: nn.Module) -> tuple[Any, ...]:
    config: Any = getattr(model, "config", None)
    return () if config is None else (config, text_config(config))


def _hooks(lm: Model, folded: Sequence[Folded], record: Recording, truth: bool) -> Iterator[Handle]:
    yield from _start_hooks(lm, record)
    for layer, fold in zip(lm.layers, folded, strict=True):
        yield from _layer_hooks(lm, layer, fold, record)
        if truth:
            yield from _truth_hooks(lm, layer, record)


def _start_hooks(lm: Model, record: Recording) -> Iterator[Handle]:
    begin = lm.to_end(lm.states[0])
    scales = {"embed": lm.row.embed_scale(lm.config) * begin, "pos_embed": begin}
    for kind, path in (("embed", lm.row.embed), ("pos_embed", lm.row.pos_embed)):
        if path == REST:
            yield from _rest_hooks(lm, Node(kind), record)
        elif path is not None:
            yield after(_module(lm, path), _keep(record.vectors, Node(kind), lm, scales[kind]))


def _rest_hooks(lm: Model, node: Node, record: Recording) -> Iterator[Handle]:
    """Keeps what the first block reads and no other node wrote, in passes that begin with tokens and not at a block."""
    begun: dict[str, Tensor] = {}

    def keep_rest(state: Tensor) -> None:
        if begun.pop("tokens", None) is not None:
            _keep(record.vectors, node, lm, lm.to_end(lm.states[0]))(state)
            if node.kind == "pos_embed":
                record.vectors[node] = record.vectors[node] - record.vectors[Node("embed")]

    yield after(lm.hf.get_input_embeddings(), kept(begun, "tokens"))
    yield before(lm.layers[0].block, keep_rest)


def _module(lm: Model, path: str) -> nn.Module:
    return lm.decoder.get_submodule(path)


def _layer_hooks(lm: Model, layer: Layer, fold: Folded, record: Recording) -> Iterator[Handle]:
    def keep_z(z: Tensor) -> None:
        z, record.shape = z.detach(), (z.shape[0], z.shape[1])
        z = _part(z.clone() if record.only is None else z, record.only).to(lm.device, lm.compute_dtype)
        z = z.unflatten(-1, (layer.heads, layer.head_dim))
        record.z[layer.index] = z if fold.constant is None else z - fold.constant

    def keep_gain(attention: Tensor, norm: nn.Module) -> None:
        scale = norm_scale(
            _part(attention.detach(), record.only).to(lm.device, lm.compute_dtype), norm, lm.row.layer_norm
        )
        record.gain[layer.index] = scale
        record.z[layer.index] *= scale[..., None, None]

    if layer.heads:
        yield before(layer.out_proj, keep_z)
        if (norm := layer.post_attention_norm) is not None:
            yield before(norm, lambda attention: keep_gain(attention, norm))
    for kind in (kind for kind in MLPS if kind in layer.modules):
        keep_mlp = _keep(record.vectors, Node(kind, layer.index), lm, layer.into)
        # OPT flattens prompts and positions before its MLP.
        yield after(layer.end(kind), lambda output, keep=keep_mlp: keep(_like(output, record), record.only))


def _truth_hooks(lm: Model, layer: Layer, record: Recording) -> Iterator[Handle]:
    yield before(layer.block, _keep(record.stream, layer.reads, lm, layer.to_end))
    # In a parallel block too: it must read what attention reads.
    yield from inside(lm, layer, record)
    if layer.index == len(lm.layers) - 1:
        yield before(lm.final_norm, _keep(record.stream, Location("post", layer.index), lm))
    if layer.heads:
        keep, more = _keep(record.attention, layer.index, lm, layer.into), outside(lm, layer)
        yield after(layer.attention_end, lambda written: keep(written if more is None else written.to(more) + more))


def inside(lm: Model, layer: Layer, record: Recording) -> Iterator[Handle]:
    """Keeps the stream between a layer's attention and its MLP, and after that, where a module reads it there."""
    for state, module in (("mid", layer.mid), ("late", layer.late)):
        if module is not None:
            location = Location(state, layer.index)
            keep = _keep(record.stream, location, lm, lm.to_end(location))
            yield before(module, lambda x, keep=keep: keep(_like(x, record)))


def _keep(store: dict[Any, Tensor], key: Any, lm: Model, scale: float = 1.0) -> Callable[..., None]:
    def keep(output: Tensor, only: Tensor | None = None) -> None:
        write = _part(output.detach(), only).to(lm.device, lm.compute_dtype)
        write = centre(write if scale == 1.0 else write * scale, lm)
        store[key] = write.clone() if write.data_ptr() == output.data_ptr() else write

    return keep


def _part(whole: Tensor, only: Tensor | None) -> Tensor:
    return whole if only is None else whole[only.to(whole.device)]


def _like(output: Tensor, record: Recording) -> Tensor:
    return output if output.dim() == 3 else output.reshape(*record.shape, -1)


@torch.no_grad()
def run(
    lm: Model, ids: Int[Tensor, "prompt position"], folded: Sequence[Folded], device: torch.device | None = None
) -> Writes:
    """All writes of one pass of the base model over left-aligned prompts; logits are never computed."""
    with recording(lm, folded) as record:
        decode(lm, ids, device, use_cache=False)
    return _rows(record.writes, ids)


def _rows(writes: Writes, ids: Tensor) -> Writes:
    """Position embeddings come out once for all prompts: give every prompt its view."""
    return writes.map(lambda factor: factor.expand(len(ids), *factor.shape[1:]))
