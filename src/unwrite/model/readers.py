"""Who reads the stream, and how much of each channel? The matrices of all readers, found in one pass of the model.

A reader is a projection whose input is the stream as a norm leaves it (or the bare stream, where no norm is before it):
queries, keys, values, the first matrices of an MLP; and the unembedding. Which modules these are is seen, not
listed: what they are given is what the norm put out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.errors import NumericError
from unwrite.model.capture import evaluating
from unwrite.model.fold import gain_of
from unwrite.model.hooks import Handle, after, before, hooked, kept
from unwrite.model.norms import is_norm
from unwrite.model.projections import matrix_of
from unwrite.model.unembedding import unembedding
from unwrite.model.view import Layer, Model
from unwrite.nodes import MLPS, Location, Node

# The experts of a mixture are one stack [expert, output, input], which no module is called with.
_STACK = 3


@dataclass(frozen=True, eq=False)
class Reader:
    """A projection: which state of the stream it reads, and the part of its squared weights on each channel (Σ = 1)."""

    name: str
    reads: Location
    energy: Float[Tensor, " d_model"]


@torch.no_grad()
def readers(lm: Model) -> tuple[Reader, ...]:
    """All readers of the stream, in the order of their blocks, the unembedding last: without one, what is put out.

    Raises NumericError where a weight is no number.
    """
    norms: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        stack.enter_context(hooked(_watching(lm, norms, inputs)))
        lm.decoder(input_ids=lm.vocabulary // 2 + torch.arange(2, device=lm.device)[None], use_cache=False)
    if not all(read.isfinite().all() for read in (*norms.values(), *inputs.values())):
        raise NumericError("an activation is not finite where readers are looked for", fix="load the model in float32")
    return (*(reader for layer in lm.layers for reader in _of_layer(lm, layer, norms, inputs)), _last(lm))


def weights(lm: Model, writers: Sequence[Node], unembedding_only: bool = False) -> Float[Tensor, "writer d_model"]:
    """m, by which ⟨a, b⟩_m = Σ m_i a_i b_i weighs channels as those read them that can read a write; Σ m = d_model.

    m_i = d · mean over readers of Σ_j (γ_i R_ij)² / Σ_ij (γ_i R_ij)², γ the gain of the norm before the matrix R. With
    `unembedding_only` as if it were the only reader.
    """
    if unembedding_only:
        lm.require("logits")
    found = (_last(lm),) if unembedding_only else readers(lm)
    behind = [[one.energy for one in found if one.reads.order >= lm.after(node).order] for node in writers]
    return lm.d_model * torch.stack([torch.stack(part).mean(0) for part in behind])


@torch.no_grad()
def _last(lm: Model) -> Reader:
    """The unembedding, or what reads all that is put out alike."""
    if not lm.has_head:
        return _reader(lm, "output", lm.states[-1], torch.eye(lm.d_model, device=lm.device), lm.final_norm)
    return _reader(lm, "unembedding", lm.states[-1], unembedding(lm)[0].t(), lm.final_norm)


def _watching(lm: Model, norms: dict[nn.Module, Tensor], inputs: dict[nn.Module, Tensor]) -> Iterator[Handle]:
    for layer in lm.layers:
        for source, _ in _sources(lm, layer):
            keep = kept(norms, source, copied=True)
            yield after(source, keep) if is_norm(source, lm.d_model) else before(source, keep)
        for _, module in _projections(lm, layer):
            yield before(module, kept(inputs, module))


def _sources(lm: Model, layer: Layer) -> Iterator[tuple[nn.Module, Location]]:
    """What stands between the stream and its readers in a block: its norms, or what is given the bare stream."""
    mid = layer.reads if lm.parallel else Location("mid", layer.index)
    norms = [module for module in layer.block.children() if is_norm(module, lm.d_model)]
    for norm in norms:
        yield norm, Location("late", layer.index) if norm is layer.late else mid if norm is layer.mid else layer.reads
    if layer.input_norm is None:
        yield layer.block, layer.reads
    if layer.mid is not None and not is_norm(layer.mid, lm.d_model):
        yield layer.mid, mid
    if layer.late is not None and not is_norm(layer.late, lm.d_model):
        yield layer.late, Location("late", layer.index)


def _projections(lm: Model, layer: Layer) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a block that take vectors of the stream's width through a matrix; an adapter is one with its parts."""
    found: list[str] = []
    for name, module in layer.block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and _width(module) == lm.d_model:
            found.append(name)
            yield name, module


def _width(module: nn.Module) -> int | None:
    if isinstance(width := getattr(module, "in_features", None), int):
        return width
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]


def _of_layer(
    lm: Model, layer: Layer, norms: dict[nn.Module, Tensor], inputs: dict[nn.Module, Tensor]
) -> Iterator[Reader]:
    projections = [(name, module) for name, module in _projections(lm, layer) if module in inputs]
    for source, reads in _sources(lm, layer):
        norm = source if is_norm(source, lm.d_model) else None
        for name, module in projections:
            if torch.equal(inputs[module].flatten(0, -2).to(lm.device), norms[source].flatten(0, -2).to(lm.device)):
                yield _reader(lm, f"{layer.index}.{name}", reads, matrix_of(lm, module), norm)
    for name, stack in _stacks(lm, layer):
        norm = layer.input_norm if layer.mid is None else layer.mid if is_norm(layer.mid, lm.d_model) else None
        reads = layer.reads if lm.parallel else Location("mid", layer.index)
        yield _reader(lm, f"{layer.index}.{name}", reads, stack.flatten(0, 1).t(), norm)


def _stacks(lm: Model, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    mlps = (layer.modules[kind] for kind in MLPS if kind in layer.modules)
    for name, weight in (pair for module in mlps for pair in module.named_parameters()):
        if weight.dim() == _STACK and weight.shape[-1] == lm.d_model and "down" not in name:
            yield name, weight


def _reader(
    lm: Model, name: str, reads: Location, matrix: Float[Tensor, "input output"], norm: nn.Module | None
) -> Reader:
    """A matrix's squared entries, spread over what it reads through the gain of a norm and its centring."""
    read, gain = matrix.to(lm.device, lm.compute_dtype), gain_of(norm, lm)
    if lm.row.layer_norm:
        read = read if gain is None else read * gain[:, None]
        energy = torch.linalg.vector_norm(read - read.mean(0), dim=1).pow(2)
    else:
        energy = (torch.linalg.vector_norm(read, dim=1) * (1.0 if gain is None else gain)).pow(2)
    if not energy.isfinite().all():
        raise NumericError(f"the weights of {name}, or of the norm before it, are not finite", fix="load other weights")
    return Reader(name, reads, energy / energy.sum())
