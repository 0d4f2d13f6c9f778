"""How do all writes lie to each other? One pass over prompts; per position, the Gram matrix of the nodes' writes.

G[e, w] = ⟨o_e, o_w⟩ gives PR(o_e, o_w) = G[e, w] / G[w, w], and its running sum over e in write order the level of
every state along every write (Dao et al. 2023, eq. 2, for all nodes and locations at once). G itself is never kept:
ratios go into histograms, products into sums over prompts and over positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.fold import fold
from unwrite.model.view import Model
from unwrite.model.writes import Writes, expand
from unwrite.nodes import Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, forward
from unwrite.run.tally.position_part import Positions
from unwrite.stats.mergeable import LENGTH, RATIO, ClusterSums, Histogram, Largest, Tree

# What a chunk's vectors and products take: what a processor's cache holds; an accelerator wants more at a time.
_CHUNK_BYTES, ON_DEVICE = 2**25, 32
# Where writers are at most one in so many nodes, products of pairs without a writer are not computed.
FEW = 4
_KEPT = ("ratios", "dilution", "sizes", "sums", "skipped", "stream_energy", "largest")


@dataclass(frozen=True)
class Products:
    """⟨row, o_w⟩ at some positions, ‖o_w‖² and ‖stream‖² there."""

    dot: Float[Tensor, "position row writer"]
    energy: Float[Tensor, "position writer"]
    stream: Float[Tensor, "position location"]


@dataclass(frozen=True)
class Plan:
    """Which products are kept: rows are nodes, then locations, then `change` (end − right after); columns writers."""

    holds: Float[Tensor, "location node"]
    writers: Int[Tensor, " writer"]
    after: Int[Tensor, " writer"]  # the first location that holds each writer's write

    @staticmethod
    def of(lm: Model, writers: Sequence[Node]) -> Plan:
        """The plan for some of the model's nodes as writers."""
        holds = lm.holds().to(lm.device)
        index = torch.tensor([lm.parts.index(writer) for writer in writers], device=lm.device)
        return Plan(holds.to(lm.compute_dtype), index, holds.int().argmax(0)[index])

    @property
    def rows(self) -> int:
        """Number of nodes, locations and the change."""
        return sum(self.holds.shape) + 1

    def complete(self, nodes: Float[Tensor, "*some node writer"]) -> Float[Tensor, "*some row writer"]:
        """Rows for the nodes, and from them those of the locations (sums in write order) and of the change."""
        return self._join(nodes, self.holds.to(nodes.dtype) @ nodes)

    def products(self, nodes: Float[Tensor, "node position d_model"]) -> tuple[Products, Bool[Tensor, "position node"]]:
        """Everything kept of the writes at some positions, and which of them are finite."""
        if FEW * len(self.writers) <= len(nodes):
            return self._of_few(nodes.transpose(0, 1))
        gram = gram_matrix(nodes)
        levels = self.holds @ gram
        stream = (levels * self.holds).sum(-1).clamp_min_(0)
        energy = gram.diagonal(dim1=1, dim2=2)
        finite = energy.isfinite()
        if len(self.writers) < gram.shape[-1]:
            gram, levels, energy = gram[..., self.writers], levels[..., self.writers], energy[:, self.writers]
        return Products(self._join(gram, levels), energy, stream), finite

    def _of_few(self, nodes: Float[Tensor, "position node d_model"]) -> tuple[Products, Bool[Tensor, "position node"]]:
        """The same for few writers, of whom the Gram matrix has few columns."""
        dot = torch.bmm(nodes, nodes[:, self.writers].transpose(1, 2))
        energy = dot[:, self.writers, torch.arange(len(self.writers), device=dot.device)]
        stream = (self.holds @ nodes).pow(2).sum(-1)
        return Products(self._join(dot, self.holds @ dot), energy, stream), nodes.pow(2).sum(-1).isfinite()

    def _join(self, nodes: Tensor, levels: Tensor) -> Tensor:
        after = levels.gather(-2, self.after.expand(*levels.shape[:-2], 1, -1))
        return torch.cat([nodes, levels, levels[..., -1:, :] - after], dim=-2)


class GramTally:
    """Everything that a scan keeps while prompts stream by; its size does not depend on how many there are."""

    def __init__(self, lm: Model, tokens: Tokens, writers: Sequence[Node], skip: int, floor: float, n_batches: int):
        self.lm, self.tokens, self.skip, self.floor = lm, tokens, skip, floor
        self.folded, self.plan = fold(lm), Plan.of(lm, writers)
        self.positions = Positions(lm, self.folded, self.plan.writers, tokens, skip, n_batches)
        counted, width = int(np.maximum(tokens.lengths - skip, 0).sum()), len(writers)
        self.n_skipped = int(np.minimum(tokens.lengths, skip).sum())
        self.ratios = Histogram(self.plan.rows * width, RATIO, counted, lm.device)
        self.dilution = Histogram(width, RATIO, counted, lm.device)
        self.sizes = Histogram(2 * width, LENGTH, counted, lm.device)
        self.sums = Tree[ClusterSums](add, ClusterSums.tensors, ClusterSums.of_tensors, lm.device)
        self.largest = Tree[Largest](add, Largest.tensors, Largest.of_tensors, lm.device)
        self.skipped, self.stream_energy = (Tree[Tensor](add, device=lm.device) for _ in range(2))
        self.kept = Ledger({**{name: vars(self)[name] for name in _KEPT}, "positions": self.positions.kept})

    def step(self, batch: Batch) -> None:
        """Count one batch: its counted positions everywhere, its first `skip` positions apart."""
        shape = (len(self.lm.parts), len(self.plan.writers))
        per_prompt = torch.zeros(len(batch.ids), *shape, dtype=torch.float64, device=self.lm.device)
        skipped, energy = torch.zeros_like(per_prompt[0]), per_prompt.new_zeros(())
        most = torch.zeros(len(batch.ids), shape[1], dtype=self.lm.compute_dtype, device=self.lm.device)
        at = torch.full_like(most, -1, dtype=torch.long)
        counted = batch.beyond(self.skip)
        for part, writes in forward(self.lm, batch, self.folded):
            self.positions.add(writes, counted[part])
            for prompt, place in _chunks(counted[part], self._chunk_rows()):
                products = self._products(writes, prompt, place, batch, part.start)
                self._count(products)
                energy += products.stream[:, -1].sum(dtype=torch.float64)
                self._sum(products, prompt, place, per_prompt[part])
                _keep_largest(products.energy, prompt, place, most[part], at[part])
            for prompt, place in _chunks(batch.counted[part] & ~counted[part], self._chunk_rows()):
                dot = self._products(writes, prompt, place, batch, part.start).dot
                skipped += dot[:, : len(skipped)].sum(0).double()
        self.sums.add(batch.index, reduce(add, self._prompts(batch, per_prompt)))
        found = enumerate(zip(most[: batch.real], at[: batch.real], strict=True), batch.first)
        self.largest.add(batch.index, reduce(add, (Largest.of(prompt, *one) for prompt, one in found)))
        self.skipped.add(batch.index, skipped)
        self.stream_energy.add(batch.index, energy)
        self.positions.close(batch.index)

    def _chunk_rows(self) -> int:
        nodes = len(self.lm.parts)
        floats = nodes * (self.lm.d_model + nodes) + 2 * self.plan.rows * len(self.plan.writers)
        room = _CHUNK_BYTES * (1 if self.lm.device.type == "cpu" else ON_DEVICE)
        return max(8, min(512, room * 8 // (floats * torch.finfo(self.lm.compute_dtype).bits)))

    def _products(self, writes: Writes, prompt: Tensor, place: Tensor, batch: Batch, start: int) -> Products:
        nodes = expand(self.lm, self.folded, writes.map(lambda factor: factor[prompt, place]))
        products, finite = self.plan.products(nodes)
        batch.require_finite(self.lm, finite, prompt + start, place)
        return products

    def _count(self, products: Products) -> None:
        energy, stream = products.energy, products.stream
        keep = energy > self.floor**2 * stream.amax(-1, keepdim=True)
        everything = bool(keep.all())
        if not everything:
            energy = energy.masked_fill(~keep, 1.0)
        ratios = products.dot / energy[:, None]
        flat_keep = None if everything else keep[:, None].expand_as(ratios).flatten(1)
        self.ratios.add(ratios.flatten(1), flat_keep)
        after = stream[:, self.plan.after].sqrt()
        size = energy.sqrt()
        self.sizes.add(torch.cat([size, size / after], 1), None if everything else keep.repeat(1, 2))
        self.dilution.add((after / stream[:, -1:].sqrt()).log(), None if everything else keep)

    def _sum(self, products: Products, prompt: Tensor, place: Tensor, per_prompt: Tensor) -> None:
        """Sum the products per prompt, and weighted by position, in one matrix product."""
        first, last = int(prompt[0]), int(prompt[-1])
        here = torch.arange(first, last + 1)[:, None] == prompt
        weights = torch.cat([here.to(products.dot.dtype), self.positions.weights[place][None].to(products.dot.dtype)])
        nodes = products.dot[:, : len(self.lm.parts)]
        sums = (weights.to(nodes.device) @ nodes.flatten(1)).unflatten(1, nodes.shape[1:])
        per_prompt[first : last + 1] += sums[:-1]
        self.positions.subtract(sums[-1])

    def _prompts(self, batch: Batch, per_prompt: Tensor) -> Iterator[ClusterSums]:
        columns = torch.arange(len(self.plan.writers), device=per_prompt.device)
        for cluster, sums in zip(self.tokens.cluster[batch.first :], per_prompt[: batch.real], strict=False):
            yield ClusterSums.of(int(cluster), self.plan.complete(sums), sums[self.plan.writers, columns])


def _keep_largest(energy: Float[Tensor, "row writer"], prompt: Tensor, place: Tensor, most: Tensor, at: Tensor) -> None:
    """Raise `most` [prompt, writer] to what was met at some rows, and say `at` which places."""
    for one in prompt.unique().tolist():
        rows = (prompt == one).nonzero()[:, 0]
        first = energy[rows].argmax(0)
        value = energy[rows].take_along_dim(first[None], 0)[0]
        larger = value > most[one]
        most[one] = torch.where(larger, value, most[one])
        at[one] = torch.where(larger, place[rows].to(at.device)[first], at[one])


def gram_matrix(nodes: Float[Tensor, "node row d_model"]) -> Float[Tensor, "row node node"]:
    """⟨o_i, o_j⟩ of all nodes at every row. Symmetric: the upper right quarter is copied, not computed."""
    rows, half = nodes.transpose(0, 1), len(nodes) // 2
    gram = rows.new_empty(rows.shape[0], len(nodes), len(nodes))
    gram[:, half:] = torch.bmm(rows[:, half:], rows.transpose(1, 2))
    gram[:, :half, :half] = torch.bmm(rows[:, :half], rows[:, :half].transpose(1, 2))
    gram[:, :half, half:] = gram[:, half:, :half].transpose(1, 2)
    return gram


def _chunks(counted: Bool[Tensor, "prompt position"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    prompt, place = counted.nonzero(as_tuple=True)
    yield from zip(prompt.split(size), place.split(size), strict=True) if len(prompt) else ()
