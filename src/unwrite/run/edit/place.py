"""How is a site seen in a tensor of a pass, and changed there?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.fold import Folded, folded
from unwrite.model.hooks import Point
from unwrite.model.view import Layer, Model


@dataclass(frozen=True)
class Inner:
    """A tensor [prompt, head, …] that attention of a layer sees or computes, by the kind of the sites in it."""

    layer: int
    kind: str


@dataclass
class Pass:
    """One forward pass under way: prompts × positions that it brings, how many came before, and what was kept."""

    prompts: int
    positions: int
    past: int
    kept: dict[Point, Tensor] = field(default_factory=dict)
    seen: set[Point | Inner] = field(default_factory=set)
    _weights: dict[int, Folded] = field(default_factory=dict)

    def weights(self, lm: Model, layer: Layer) -> Folded:
        """What makes writes of a layer's z, in the graph of autograd: a removed write takes its gradients with it."""
        if layer.index not in self._weights:
            self._weights[layer.index] = folded(lm, layer, detach=False)
        return self._weights[layer.index]

    def rows(self, tensor: Tensor) -> Float[Tensor, "prompt position d"]:
        """Prompts and positions as two axes: position embeddings come out once for all prompts."""
        tensor = by_row(tensor, self.prompts)
        return tensor.expand(self.prompts, *tensor.shape[1:])


def by_row(tensor: Tensor, prompts: int) -> Float[Tensor, "prompt position d"]:
    """Prompts and positions as two axes: OPT flattens them before its MLP."""
    return tensor.unflatten(0, (prompts, -1)) if tensor.dim() == 2 else tensor


def as_one(tensor: Tensor, prompts: int) -> Float[Tensor, "prompt position 1 d"]:
    """A tensor as one unit."""
    return by_row(tensor, prompts)[:, :, None]


View = Callable[[Tensor, int], Float[Tensor, "prompt position unit d"]]


@dataclass(frozen=True)
class Place:
    """Where a site is: in the tensor at `point`, which `view` shows by units and can be written through.

    `unit` takes the site's own out of the view. Where the site is computed, `shown(tensor, pass)` gives it, a change is
    added to the tensor, which reaches the stream `scale` times, or `put(tensor, x, x', pass)` gives the tensor with x'.
    `keep`: points whose tensors the pass must have kept; `adds`: a change is added to what a module writes, so dropout
    behind it would make it another one; `editable`: it can be changed.
    """

    point: Point | Inner
    view: View = as_one
    unit: Callable[[Tensor], Tensor] = lambda view: view[:, :, 0]
    shown: Callable[[Tensor, Pass], Tensor] | None = None
    put: Callable[[Tensor, Tensor, Tensor, Pass], Tensor] | None = None
    scale: float = 1.0
    keep: tuple[Point, ...] = ()
    adds: bool = False
    editable: bool = True

    def read(self, tensor: Tensor, now: Pass) -> Tensor:
        """What is at the site."""
        return self.unit(self.view(tensor, now.prompts)) if self.shown is None else self.shown(tensor, now)

    def write(self, tensor: Tensor, old: Tensor, new: Tensor, now: Pass) -> Tensor:
        """The tensor that has `new` there instead of `old`."""
        if self.put is not None:
            return self.put(tensor, old, new, now)
        if self.shown is None:
            changed = tensor.clone(memory_format=torch.contiguous_format)
            self.unit(self.view(changed, now.prompts)).copy_(new)
            return changed
        change = (new - old) / self.scale
        return (tensor + (change.flatten(0, 1) if tensor.dim() == 2 else change)).to(tensor.dtype)
