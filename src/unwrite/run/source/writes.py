"""What stands where a write is taken away? Nothing, the mean write at that position, or that of another prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.capture import run
from unwrite.model.fold import Folded
from unwrite.model.view import Model
from unwrite.model.writes import Writes, write_of
from unwrite.nodes import Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.stream import Batch, batch_size, batches, parts

REPLACEMENTS = ("zero", "mean", "resample")
# A mean over fewer texts is (nearly) the write itself.
_FEWEST = 2


@dataclass(frozen=True, eq=False)
class Replaced:
    """A batch's writes as nodes leave them and what stands in their place, at the rows that are replaced."""

    lm: Model
    folded: tuple[Folded, ...]
    clean: Writes
    instead: Writes | None
    rows: Bool[Tensor, "prompt position"]
    known: Bool[Tensor, " prompt"]

    def change(self, node: Node) -> Float[Tensor, "prompt position d_model"]:
        """write − replacement; 0 where nothing is replaced, also for prompts that have no replacement."""
        write = write_of(self.lm, self.folded, self.clean, node)
        if self.instead is not None:
            write = write - write_of(self.lm, self.folded, self.instead, node)
        return write * (self.rows & self.known[:, None])[..., None]


@dataclass(frozen=True, eq=False)
class Pool:
    """The texts that means and donors are taken from: the prompts themselves, or texts given beside them."""

    lm: Model
    folded: tuple[Folded, ...]
    tokens: Tokens
    own: bool

    def replaced(self, name: str, batch: Batch, clean: Writes, rows: Bool[Tensor, "prompt position"]) -> Replaced:
        """The replacement called `name` of a batch's writes at `rows`."""
        known = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if name == "zero":
            return Replaced(self.lm, self.folded, clean, None, rows, known)
        if name == "mean":
            mean, known = self._mean(rows)
            # What depends on positions alone is its own mean, also to rounding.
            own = {node: part for node, part in clean.vectors.items() if node.kind == "pos_embed"}
            mean = replace(mean, vectors={**mean.vectors, **own})
            return Replaced(self.lm, self.folded, clean, mean, rows & ~self._shared(batch.ids).to(rows.device), known)
        return Replaced(self.lm, self.folded, clean, *self._donor(batch, rows))

    def _shared(self, ids: Int[Tensor, "prompt position"]) -> Bool[Tensor, "prompt position"]:
        """Positions up to which a prompt and all texts read the same, so that the mean write is the write itself."""
        texts = torch.from_numpy(self.tokens.ids[:, : ids.shape[1]])
        same = torch.zeros(ids.shape, dtype=torch.bool)
        every = (texts == texts[0]).all(0)[: int(self.tokens.lengths.min())]
        same[:, : len(every)] = every & (ids.cpu()[:, : len(every)] == texts[0, : len(every)])
        return same.cumprod(1).bool()

    def _mean(self, rows: Tensor) -> tuple[Writes, Tensor]:
        mean, length = self._means.map(lambda part: part[: rows.shape[1]]), rows.shape[1]
        enough = torch.zeros(length, dtype=torch.bool, device=rows.device)
        has = self.has_mean[:length].to(rows.device)
        enough[: len(has)] = has
        short = length - len(has)
        mean = mean.map(lambda part: torch.cat([part, part.new_zeros(short, *part.shape[1:])]) if short > 0 else part)
        return mean.map(lambda part: part.expand(len(rows), *part.shape)), (enough | ~rows).all(1)

    def _donor(self, batch: Batch, rows: Tensor) -> tuple[Writes, Tensor, Tensor]:
        chosen = [self.donor(batch.first + min(i, batch.real - 1), row) for i, row in enumerate(rows)]
        known = torch.tensor([donor is not None for donor in chosen], device=rows.device)
        ids = torch.zeros_like(batch.ids)
        for i, donor in enumerate(chosen):
            if donor is not None:
                taken = torch.from_numpy(self.tokens.ids[donor][: ids.shape[1]])
                ids[i, : len(taken)] = taken
        return run(self.lm, ids, self.folded), rows, known

    def donor(self, prompt: int, row: Bool[Tensor, " position"]) -> int | None:
        """The next text that reaches the last replaced position; never the prompt itself."""
        need, n = int(row.nonzero().max()) + 1, len(self.tokens)
        order = [(prompt + 1 + step) % n for step in range(n)] if self.own else [(prompt + i) % n for i in range(n)]
        return next((i for i in order if self.tokens.lengths[i] >= need and not (self.own and i == prompt)), None)

    def mean(self, node: Node) -> Float[Tensor, "position d_model"]:
        """The mean write of a node at every position, over the texts that reach it."""
        return write_of(self.lm, self.folded, self._means, node)

    @property
    def has_mean(self) -> Bool[Tensor, " position"]:
        """Positions that enough texts reach: the mean of one text is its own write."""
        return self._count >= _FEWEST

    def others(self, prompt: int, row: int) -> Int[np.ndarray, " text"]:
        """Texts that reach position `row`, without the prompt itself."""
        reach = self.tokens.lengths > row
        if self.own:
            reach[prompt] = False
        return np.flatnonzero(reach)

    @cached_property
    def _means(self) -> Writes:
        return self._summed[0]

    @cached_property
    def _count(self) -> Int[Tensor, " position"]:
        return self._summed[1]

    @cached_property
    def _summed(self) -> tuple[Writes, Tensor]:
        """Mean factors of all writes at every position, over the texts that reach it."""
        counts = torch.from_numpy((np.arange(self.tokens.length) < self.tokens.lengths[:, None]).sum(0))
        weight = 1 / counts.clamp_min(1).double()
        size = batch_size(self.lm, self.tokens)
        weighed = (
            found
            for batch in batches(self.tokens, size)
            for _, found in parts(batch, lambda part: self._weighed(part, weight))
        )
        return reduce(add, weighed), counts

    def _weighed(self, batch: Batch, weight: Tensor) -> Writes:
        kept = (batch.counted * weight).to(self.lm.device)
        writes = run(self.lm, batch.ids, self.folded)
        # The embedding first: through attention what is none at one position reaches all, be its weight 0 there.
        for factor in (*writes.vectors.values(), *writes.z.values()):
            finite = factor.flatten(2).isfinite().all(-1)
            batch.require_numbers(finite | (kept == 0), "what a mean is taken over")
        return writes.map(lambda factor: torch.einsum("bt...,bt->t...", factor, kept.to(factor.dtype)))
