"""What did every node write? The factors of all writes, and the vectors that they make up, all or a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.fold import Folded
from unwrite.model.view import Model
from unwrite.nodes import PROJECTED, Node, parse_node


@dataclass(frozen=True)
class Writes:
    """What every node adds to the stream at some rows (prompts × positions, or sums over them), as factors.

    `z[layer]`, of layers with heads, is already multiplied by a post-norm's frozen scale, `gain[layer]` is that scale
    (none: 1), by which the bias is multiplied; `vectors` are embed, pos_embed and the MLPs.
    """

    z: Mapping[int, Float[Tensor, "*rows head d_head"]]
    gain: Mapping[int, Float[Tensor, "*rows"]]
    vectors: Mapping[Node, Float[Tensor, "*rows d_model"]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Writes:
        """Apply a function of the leading row axes (a slice, a sum) to every factor."""
        return Writes(
            {layer: change(z) for layer, z in self.z.items()},
            {layer: change(gain) for layer, gain in self.gain.items()},
            {node: change(vector) for node, vector in self.vectors.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All factors by name."""
        scales = {f"gain{layer}": gain for layer, gain in self.gain.items()}
        vectors = {str(node): vector for node, vector in self.vectors.items()}
        return {f"z{layer}": z for layer, z in self.z.items()} | scales | vectors

    @staticmethod
    def of_tensors(named: Mapping[str, Tensor]) -> Writes:
        """What `tensors` was made of."""
        vectors = {parse_node(name): part for name, part in named.items() if name[0] != "z" and name[:4] != "gain"}
        z, gain = ({int(name.removeprefix(kind)): part for name, part in named.items() if name.startswith(kind)}
                   for kind in ("z", "gain"))  # fmt: skip
        return Writes(dict(sorted(z.items())), dict(sorted(gain.items())), vectors)

    def __add__(self, other: Writes) -> Writes:
        z, gain = ({layer: part + theirs[layer] for layer, part in own.items()}
                   for own, theirs in ((self.z, other.z), (self.gain, other.gain)))  # fmt: skip
        return Writes(z, gain, {node: vector + other.vectors[node] for node, vector in self.vectors.items()})


def write_of(lm: Model, folded: Sequence[Folded], writes: Writes, node: Node) -> Float[Tensor, "*rows d_model"]:
    """What one node adds to the stream, in full, from the factors of all writes."""
    if node.kind in PROJECTED:
        return writes.z[node.layer][..., node.head, :] @ folded[node.layer].w_o[node.head]
    if node.kind == "bias":
        bias, gain = folded[node.layer].bias, writes.gain.get(node.layer)
        return bias.expand(*writes.z[node.layer].shape[:-2], -1) if gain is None else gain[..., None] * bias
    return writes.vectors[node]


def expand(
    lm: Model,
    folded: tuple[Folded, ...],
    writes: Writes,
    count: Float[Tensor, " row"] | float = 1.0,
    among: slice = slice(None),
) -> Float[Tensor, "node row d_model"]:
    """The nodes' writes in full, in write order, from factors with one row axis.

    `count`: how many rows each row sums up; a bias without post-norm is written once per row. `among`: which nodes, one
    of `blocks`.
    """
    row, parts = writes.vectors[Node("embed")], lm.parts[among]
    out = row.new_empty(len(parts), row.shape[0], lm.d_model)
    for at, node in enumerate(parts):
        if node.kind in PROJECTED and node.head == 0:
            z, w_o = writes.z[node.layer], folded[node.layer].w_o
            torch.bmm(z.transpose(0, 1), w_o, out=out[at : at + len(w_o)])
        elif node.kind == "bias":
            gain, bias = writes.gain.get(node.layer), folded[node.layer].bias
            times = torch.as_tensor(count if gain is None else gain, dtype=out.dtype, device=out.device)
            out[at] = times.reshape(-1, 1) * bias
        elif node.kind not in PROJECTED:
            out[at] = writes.vectors[node]
    return out


def blocks(lm: Model) -> Iterator[slice]:
    """Which nodes are of the input, and of each block: so few can be had in full where all would be too many."""
    start = 0
    for _, nodes in groupby(lm.parts, lambda node: node.layer):
        end = start + len(list(nodes))
        yield slice(start, end)
        start = end
