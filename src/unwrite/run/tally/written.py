"""How large is what every node writes, beside the stream right after it? One pass; medians over positions."""

from __future__ import annotations

from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.fold import fold
from unwrite.model.view import Model
from unwrite.model.writes import blocks, expand
from unwrite.nodes import Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, Listener, batch_size, forward, stream
from unwrite.stats.mergeable import LENGTH, Histogram

# A write is material if its norm is at least this fraction of the stream's, right after it, in the median.
MATERIAL = 0.05


def all_written(lm: Model, tokens: Tokens, skip: int, stage: str, listener: Listener | None, job: Job) -> Written:
    """Of all prompts, in every part of a run: it decides about the rest, and names what is no number by its prompt."""
    tally = Written(lm, tokens, skip)
    stream(lm, tokens, tally, batch_size(lm, tokens), stage, listener, job, everywhere=True)
    return tally


class Written:
    """A tally of ‖o_w‖ / ‖x right after‖ of every node, and of the energy that it writes into each channel."""

    def __init__(self, lm: Model, tokens: Tokens, skip: int):
        self._lm, self._skip, self._folded = lm, skip, fold(lm)
        counted = int(np.maximum(tokens.lengths - skip, 0).sum())
        self._sizes = Histogram(len(lm.parts), LENGTH, counted, lm.device)
        self._energy = torch.zeros(len(lm.parts), lm.d_model, dtype=torch.float64, device=lm.device)
        self.kept = Ledger({"sizes": self._sizes, "energy": self._energy})

    def step(self, batch: Batch) -> None:
        """Count one batch."""
        lm, counted = self._lm, batch.beyond(self._skip)
        for part, writes in forward(lm, batch, self._folded):
            prompt, place = counted[part].nonzero(as_tuple=True)
            if not len(prompt):
                continue
            rows, found = writes.map(itemgetter((prompt, place))), []
            before = torch.zeros(len(prompt), lm.d_model, dtype=lm.compute_dtype, device=lm.device)
            for among in blocks(lm):
                nodes = expand(lm, self._folded, rows, among=among)
                batch.require_finite(lm, nodes.isfinite().all(-1).t(), prompt + part.start, place)
                found.append(self._relative(nodes, before, lm.parts[among]))
                self._energy[among] += nodes.square().sum(1)
                before = before + nodes.sum(0)
            self._sizes.add(torch.cat(found).t())

    def _relative(
        self, nodes: Float[Tensor, "node row d_model"], before: Float[Tensor, "row d_model"], names: tuple[Node, ...]
    ) -> Float[Tensor, "node row"]:
        lm, after = self._lm, [self._lm.after(node) for node in names]
        size = {}
        for state in dict.fromkeys(after):
            written = [i for i, node in enumerate(names) if state.holds(node, lm.parallel)]
            size[state] = (before + nodes[written].sum(0)).norm(dim=-1)
        return nodes.norm(dim=-1) / torch.stack([size[state] for state in after])

    def loudest(self, n: int) -> tuple[int, ...]:
        """The channels that hold most of what nodes write, each material write's energy being 1; the largest first."""
        energy = self._energy[torch.from_numpy(self.relative_norm() >= MATERIAL).to(self._energy.device)]
        shares = (energy / energy.sum(1, keepdim=True)).nansum(0)
        return tuple(shares.topk(min(n, len(shares))).indices.tolist())

    def relative_norm(self) -> Float[np.ndarray, " node"]:
        """Medians over positions."""
        return self._sizes.quantiles((0.5,))[:, 0]

    def material(self) -> tuple[Node, ...]:
        """Nodes whose write is not tiny beside the stream."""
        parts = zip(self._lm.parts, self.relative_norm(), strict=True)
        return tuple(node for node, part in parts if part >= MATERIAL)
