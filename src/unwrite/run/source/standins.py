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
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.fold import Folded, centre
from unwrite.model.view import Model
from unwrite.model.writes import Writes, write_of
from unwrite.nodes import PROJECTED, Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.stream import Batch
from unwrite.run.source.rotations import rotation

_Write = Float[Tensor, "prompt position d_model"]


class Others:
    """What nodes write in other prompts, one for each; how much that is in the rows that are `kept`, is found once."""

    def __init__(self, lm: Model, folded: Sequence[Folded], writes: Writes, kept: Bool[Tensor, "prompt position"]):
        self._lm, self._folded, self._writes, self._kept = lm, folded, writes, kept
        self._energy: dict[Node, Tensor] = {}
        self._near: dict[int, tuple[list[Node], Tensor]] = {}

    def near(self, layer: int) -> tuple[list[Node], Float[Tensor, "node prompt d_model"]]:
        """The nodes of a layer and of those beside it, and the energy that each writes in every channel."""
        if layer not in self._near:
            nodes = [node for node in self._lm.parts if abs(node.layer - layer) <= 1 and node.kind != "bias"]
            self._near[layer] = nodes, torch.stack([self._written(node) for node in nodes])
        return self._near[layer]

    def _written(self, node: Node) -> Float[Tensor, "prompt d_model"]:
        if node not in self._energy:
            write = write_of(self._lm, self._folded, self._writes, node)
            self._energy[node] = (write.pow(2) * self._kept[..., None]).sum(1)
        return self._energy[node]

    def mix(self, nodes: Sequence[Node], times: Float[Tensor, "node prompt"]) -> _Write:
        """What nodes write, each so many times, summed up; all heads of a layer in one product."""
        found: Any = 0.0
        for layer in dict.fromkeys(node.layer for node in nodes):
            if heads := [i for i, node in enumerate(nodes) if node.layer == layer and node.kind in PROJECTED]:
                each = self._writes.z[layer] * times[heads[0] : heads[-1] + 1].t()[:, None, :, None]
                found += each.flatten(-2) @ self._folded[layer].w_o.flatten(0, 1)
        for i, node in enumerate(nodes):
            if node.kind not in PROJECTED:
                found += times[i][:, None, None] * self._writes.vectors[node]
        return found


def others_of(tokens: Tokens, skip: int, batch: Batch) -> Int[Tensor, "prompt position"]:
    """Another prompt for each of a batch: the next one; where that is shorter, its tokens once more."""
    rows = []
    for i in range(len(batch.ids)):
        donor = (batch.first + min(i, batch.real - 1) + 1) % len(tokens)
        length = int(tokens.lengths[donor])
        at = np.arange(batch.ids.shape[1])
        again = skip + (at - length) % max(length - skip, 1)
        rows.append(tokens.ids[donor][np.where(at < length, at, again)])
    return torch.from_numpy(np.stack(rows))


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
    nodes, energy = place.other.near(place.node.layer)
    drawn = torch.randn(len(nodes), generator=generator, dtype=torch.float64).to(place.write)
    drawn[nodes.index(place.node)] = 0.0
    size = (energy * weight).sum(-1).sqrt()
    return place.other.mix(nodes, torch.where(size > 0, drawn[:, None] / size, 0.0))


def _signs(place: Stead, generator: torch.Generator, _: Tensor) -> _Write:
    return place.write * (1 - 2 * torch.randint(0, 2, (place.lm.d_model,), generator=generator)).to(place.write)


def _rotated(place: Stead, generator: torch.Generator, _: Tensor) -> _Write:
    return place.write @ rotation(place.lm.d_model, generator).to(place.write)


CONTROLS: Mapping[str, Callable[[Stead, torch.Generator, Tensor], _Write]] = {
    "typical": _typical, "signs": _signs, "rotated": _rotated,
}  # fmt: skip
