"""What did every node write? The factors of all writes, and the vectors that they make up, all or a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.view import Folded, Model
from unwrite.nodes import Node, parse_node


@dataclass(frozen=True)
class Writes:
    """What every node adds to the stream at some rows (prompts × positions, or sums over them), as factors.

    `z[layer]` is already multiplied by a post-norm's frozen scale, `gain[layer]` is that scale (None: 1), by which the
    bias is multiplied; `vectors` are embed, pos_embed and the MLPs.
    """

    z: tuple[Float[Tensor, "*rows head d_head"], ...]
    gain: tuple[Float[Tensor, "*rows"] | None, ...]
    vectors: Mapping[Node, Float[Tensor, "*rows d_model"]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Writes:
        """Apply a function of the leading row axes (a slice, a sum) to every factor."""
        return Writes(
            tuple(map(change, self.z)),
            tuple(None if gain is None else change(gain) for gain in self.gain),
            {node: change(vector) for node, vector in self.vectors.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All factors by name."""
        scales = {f"gain{i}": gain for i, gain in enumerate(self.gain) if gain is not None}
        vectors = {str(node): vector for node, vector in self.vectors.items()}
        return {f"z{i}": z for i, z in enumerate(self.z)} | scales | vectors

    @staticmethod
    def of_tensors(named: Mapping[str, Tensor]) -> Writes:
        """What `tensors` was made of."""
        layers = range(sum(name.startswith("z") for name in named))
        vectors = {parse_node(name): part for name, part in named.items() if name[0] != "z" and name[:4] != "gain"}
        return Writes(tuple(named[f"z{i}"] for i in layers), tuple(named.get(f"gain{i}") for i in layers), vectors)

    def __add__(self, other: Writes) -> Writes:
        gain = tuple(None if a is None or b is None else a + b for a, b in zip(self.gain, other.gain, strict=True))
        vectors = {node: vector + other.vectors[node] for node, vector in self.vectors.items()}
        return Writes(tuple(a + b for a, b in zip(self.z, other.z, strict=True)), gain, vectors)


def write_of(lm: Model, folded: Sequence[Folded], writes: Writes, node: Node) -> Float[Tensor, "*rows d_model"]:
    """What one node adds to the stream, in full, from the factors of all writes."""
    if node.kind == "head":
        return writes.z[node.layer][..., node.head, :] @ folded[node.layer].w_o[node.head]
    if node.kind == "bias":
        bias, gain = folded[node.layer].bias, writes.gain[node.layer]
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
    row, parts = writes.z[0], lm.parts[among]
    out = row.new_empty(len(parts), row.shape[0], lm.d_model)
    for at, node in enumerate(parts):
        if node.kind == "head" and node.head == 0:
            torch.bmm(writes.z[node.layer].transpose(0, 1), folded[node.layer].w_o, out=out[at : at + lm.n_heads])
        elif node.kind == "bias":
            gain, bias = writes.gain[node.layer], folded[node.layer].bias
            times = torch.as_tensor(count if gain is None else gain, dtype=out.dtype, device=out.device)
            out[at] = times.reshape(-1, 1) * bias
        elif node.kind != "head":
            out[at] = writes.vectors[node]
    return out


def blocks(lm: Model) -> Iterator[slice]:
    """Which nodes are of the input, and of each block: so few can be had in full where all would be too many."""
    start = 0
    for _, nodes in groupby(lm.parts, lambda node: node.layer):
        end = start + len(list(nodes))
        yield slice(start, end)
        start = end
