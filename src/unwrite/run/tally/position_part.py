"""How much of a share is there at a position whatever the prompt says? The exact split into position and token part.

With S_x(t) = Σ_p o_x(p, t): P = Σ_t [⟨S_e, S_w⟩ − Σ_p ⟨o_e, o_w⟩] / (n_t − 1) is the sum over rows of what the write
of e at the same position of every *other* prompt has along o_w; the position part of a share is P / Σ‖o_w‖², the token
part the rest. Writes are linear in their factors, so S is summed as factors: d_model numbers per layer, not per head.
Where even that is too much, neighbouring positions share a bucket. (facts: measuring erasure, §4)
"""

from __future__ import annotations

from operator import add

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.model.fold import Folded
from unwrite.model.view import Model
from unwrite.model.writes import Writes, expand
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.ledger import Ledger
from unwrite.stats.mergeable import Tree

_BYTES = 2**30


class Positions:
    """Sums of all writes over prompts, position by position (or bucket by bucket)."""

    def __init__(
        self, lm: Model, folded: tuple[Folded, ...], writers: Tensor, tokens: Tokens, skip: int, n_batches: int
    ):
        self.lm, self.folded, self.writers = lm, folded, writers
        length = tokens.length
        self.buckets = _buckets(lm, length, n_batches)
        self.bucket = torch.arange(length) * self.buckets // length
        lengths = torch.from_numpy(tokens.lengths)
        position = torch.arange(length)
        counted = (position < lengths[:, None]) & (position >= skip)
        # Rows of every prompt in every bucket: with one position per bucket, 0 or 1.
        rows = torch.zeros(len(lengths), self.buckets).index_add_(1, self.bucket, counted.float()).double()
        pairs = rows.sum(0) ** 2 - (rows**2).sum(0)
        self._pair_weight = torch.where(pairs > 0, rows.sum(0) / pairs.clamp_min(1), 0.0)
        self._count = rows.sum(0)
        self._exact = self.buckets == length
        self.weights = self._pair_weight[self.bucket] if self._exact else torch.zeros(length, dtype=torch.float64)
        self._open: Writes | None = None
        self._within: Tensor | None = None
        self._sums = Tree[Writes](add, Writes.tensors, Writes.of_tensors, lm.device)
        self._products = Tree[Tensor](add, device=lm.device)
        self.kept = Ledger({"sums": self._sums, "products": self._products})

    def add(self, writes: Writes, counted: Bool[Tensor, "prompt position"]) -> None:
        """Add a part of a batch."""
        counted = counted.to(writes.z[0].device)
        sums = writes.map(lambda factor: self._bucketed(_total(factor, counted)))
        self._open = sums if self._open is None else self._open + sums
        if not self._exact:
            for prompt in range(len(counted)):
                alone, kept = _take(writes, slice(prompt, prompt + 1)), counted[prompt, None]
                own = alone.map(lambda factor, kept=kept: self._bucketed(_total(factor, kept)))
                self.subtract(self._gram(own, self._bucketed(kept[0].double())))

    def subtract(self, products: Float[Tensor, "node writer"]) -> None:
        """Take out what prompts have with themselves: Σ ⟨o_e, o_w⟩, weighted by `weights`."""
        products = products.double()
        self._within = products if self._within is None else self._within + products

    def close(self, batch: int) -> None:
        """End a batch: its sums take their place among those of the other batches."""
        if self._open is not None and self._within is not None:
            self._sums.add(batch, self._open)
            self._products.add(batch, self._within)
        self._open, self._within = None, None

    def split(self) -> Float[Tensor, "node writer"]:
        """P, the summed position part of every pair, in float64."""
        return self._gram(self._sums.total(), self._count) - self._products.total()

    def _gram(self, sums: Writes, count: Tensor) -> Float[Tensor, "node writer"]:
        """Σ over buckets of weight · ⟨S_e, S_w⟩."""
        total = torch.zeros(len(self.lm.parts), len(self.lm.parts), dtype=torch.float64, device=self.lm.device)
        for bucket in torch.arange(self.buckets).split(64):
            root = self._pair_weight[bucket].sqrt().to(sums.z[0])
            scaled = _take(sums, bucket).map(lambda factor, root=root: torch.einsum("b...,b->b...", factor, root))
            nodes = expand(self.lm, self.folded, scaled, count[bucket].to(root) * root).flatten(1)
            total += (nodes @ nodes.t()).double()
        return total[:, self.writers]

    def _bucketed(self, factor: Tensor) -> Tensor:
        if self._exact:
            return factor
        # A product, since sums over an index are made in any order by an accelerator.
        belongs = (self.bucket[:, None] == torch.arange(self.buckets)).to(factor)
        return torch.einsum("tk,t...->k...", belongs, factor)


def _buckets(lm: Model, length: int, n_batches: int) -> int:
    numbers = (2 * len(lm.layers) + 2) * lm.d_model
    alive = n_batches.bit_length() + 2
    return max(1, min(length, _BYTES * 8 // (numbers * alive * torch.finfo(lm.compute_dtype).bits)))


def _total(factor: Float[Tensor, "prompt position ..."], counted: Bool[Tensor, "prompt position"]) -> Tensor:
    return torch.einsum("bt...,bt->t...", factor, counted.to(factor.dtype))


def _take(writes: Writes, rows: Tensor | slice) -> Writes:
    return writes.map(lambda factor: factor[rows])
