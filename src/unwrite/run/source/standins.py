"""What is put in the place of a write, to see what would have become of another one? Same place, same size, other way.

`typical`  a random mix of what the other nodes of the layers around it write, at the same position of another prompt
`signs`    the write itself with a random sign for every channel
`rotated`  the write itself, turned at random

Each is as large as the write at every position, as the weights of the question measure it. (facts: erasure on real
models, §2: a random direction is no ordinary write, so rotations alone are the wrong control)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.view import Folded, Model, centre
from unwrite.model.writes import Writes, write_of
from unwrite.nodes import Node
from unwrite.run.source.rotations import rotation

_Write = Float[Tensor, "prompt position d_model"]


class Others:
    """What nodes write in another prompt; how much that is, is asked of every node again and again, and found once."""

    def __init__(self, lm: Model, folded: Sequence[Folded], writes: Writes):
        self._lm, self._folded, self._writes = lm, folded, writes
        self._energy: dict[Node, Tensor] = {}

    def size(self, node: Node, weight: Float[Tensor, " d_model"]) -> Float[Tensor, ""]:
        """Root of the energy that a node writes, as the weights measure it."""
        if node not in self._energy:
            self._energy[node] = write_of(self._lm, self._folded, self._writes, node).pow(2).sum((0, 1))
        size = (self._energy[node] * weight).sum().sqrt()
        return size.clamp_min(torch.finfo(size.dtype).tiny)

    def mix(self, times: Mapping[Node, Tensor], like: _Write) -> _Write:
        """What nodes write, each so many times, summed up; all heads of a layer in one product."""
        found = torch.zeros_like(like)
        for layer in dict.fromkeys(node.layer for node in times):
            heads = [times.get(Node("head", layer, head)) for head in range(self._lm.n_heads)]
            if any(head is not None for head in heads):
                each = torch.stack([found.new_zeros(()) if head is None else head for head in heads])
                found += (self._writes.z[layer] * each[:, None]).flatten(-2) @ self._folded[layer].w_o.flatten(0, 1)
        for node, many in times.items():
            if node.kind != "head":
                found += many * self._writes.vectors[node]
        return found


@dataclass(frozen=True, eq=False)
class Stead:
    """Where a stand-in is needed: for the write of a node, beside what nodes write in another prompt."""

    lm: Model
    node: Node
    write: _Write
    other: Others


def stand_in(place: Stead, control: str, draw: int, weight: Float[Tensor, " d_model"]) -> _Write:
    """Draw number `draw` of a control: the same whenever it is asked for, and for every prompt."""
    seed = [place.lm.parts.index(place.node), list(CONTROLS).index(control), draw]
    generator = torch.Generator().manual_seed(sum(part * 1_000_003**i for i, part in enumerate(seed)) % 2**63)
    found = centre(CONTROLS[control](place, generator, weight), place.lm)
    return found * _ratio((place.write.pow(2) * weight).sum(-1), (found.pow(2) * weight).sum(-1))[..., None]


def _ratio(energy: Tensor, own: Tensor) -> Tensor:
    return torch.where(own > 0, (energy / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt(), 0.0)


def _typical(place: Stead, generator: torch.Generator, weight: Float[Tensor, " d_model"]) -> _Write:
    """Each node's part is as large as any other's, as the weights measure it: a mix of writes as they are would be that
    of the largest MLP, which may be the very write whose place it takes."""
    around = range(place.node.layer - 1, place.node.layer + 2)
    near = [node for node in place.lm.parts if node.layer in around and node.kind != "bias"]
    drawn = {node: torch.randn((), generator=generator, dtype=torch.float64).to(place.write) for node in near}
    times = {node: drawn[node] / place.other.size(node, weight) for node in near if node != place.node}
    return place.other.mix(times, place.write)


def _signs(place: Stead, generator: torch.Generator, _: Tensor) -> _Write:
    return place.write * (1 - 2 * torch.randint(0, 2, (place.lm.d_model,), generator=generator)).to(place.write)


def _rotated(place: Stead, generator: torch.Generator, _: Tensor) -> _Write:
    return place.write @ rotation(place.lm.d_model, generator).to(place.write)


CONTROLS: Mapping[str, Callable[[Stead, torch.Generator, Tensor], _Write]] = {
    "typical": _typical, "signs": _signs, "rotated": _rotated,
}  # fmt: skip
