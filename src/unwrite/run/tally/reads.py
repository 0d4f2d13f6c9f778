"""Who reads one write, and through what? Each later head's queries, keys and values, and each MLP, without it alone.

Sums of every prompt, for the write and for typical ones in its place: Σ‖out(x) − out(x − w)‖² and Σ‖out(x)‖², w missing
from that reader's input alone, out a query, key or value in the head's own coordinates, or what a head or an MLP
writes, as later readers weigh channels. (facts: systems on real models, §2.6)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.capture import run as writes_of
from unwrite.model.fold import Folded
from unwrite.model.view import Layer, Model
from unwrite.nodes import MLPS, Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch
from unwrite.run.replay.clean import Clean, clean
from unwrite.run.replay.edited import one_reader
from unwrite.run.replay.read import PARTS, Readers, changed_pattern, reading
from unwrite.run.source.standins import Others, Stead, others_of, stand_in

TYPICAL = "typical"
# What changes of a reader: what it makes of the stream, what it writes or hands to W_O, and what it attends to.
_CHANGED = ("read", "wrote", "turned")


@dataclass(frozen=True, eq=False)
class Asking:
    """Whose write is asked about, in which tokens, beside so many typical `draws` as large as `weight` measures it.

    `weigh` says of every reader how channels of what it writes count.
    """

    lm: Model
    folded: tuple[Folded, ...]
    tokens: Tokens
    skip: int
    writer: Node
    weight: Float[Tensor, " d_model"]
    weigh: dict[Node, Float[Tensor, " d_model"]]
    draws: int

    @property
    def layers(self) -> list[Layer]:
        """Those whose heads or mixers come behind the write."""
        behind = (layer for layer in self.lm.layers if layer.index > self.writer.layer)
        return [layer for layer in behind if layer.attends or layer.mixes]

    @property
    def mlps(self) -> list[Node]:
        """Those that read the write."""
        return [node for node in self.lm.parts if node.kind in MLPS and self.lm.can_read(node, self.writer)]

    def puts(self, run: Clean, batch: Batch) -> list[Float[Tensor, "prompt position d_model"]]:
        """The write where it counts, and every typical one in its place."""
        lm, kept = self.lm, batch.beyond(self.skip).to(self.lm.device)
        own = run.write(self.writer) * kept[..., None]
        elsewhere = writes_of(lm, others_of(self.tokens, self.skip, batch), self.folded)
        place = Stead(lm, self.writer, own, Others(lm, self.folded, elsewhere, kept))
        return [own, *(stand_in(place, TYPICAL, draw, self.weight) for draw in range(self.draws))]


class ReadingTally:
    """Sums of every prompt, filled in batch by batch."""

    def __init__(self, asked: Asking, job: Job):
        self._asked, self._job = asked, job
        self._rows = Rows(self._measured)
        self.kept, self.step, self.whole = self._rows.kept, self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> Arrays:
        of = _Measuring(self._asked, batch)
        steps = (len(self._asked.layers) + 1) * len(of.vectors)
        for done, what in enumerate(of.all(), 1):
            self._job.tick(self.kept, done / steps, what)
        batch.require_sums(of.found.values(), "what reads the stream without a write")
        return {name: part.cpu().numpy() for name, part in of.found.items()}


class _Measuring:
    """One batch of prompts, one clean run of it, and every reader with something missing from its input."""

    def __init__(self, asked: Asking, batch: Batch):
        self.asked, self.lm = asked, asked.lm
        self.kept = batch.beyond(asked.skip).to(self.lm.device)
        self.run = clean(self.lm, batch.ids, asked.folded, with_patterns=True)
        self.vectors = asked.puts(self.run, batch)
        each, nodes, ways = len(batch.ids), len(self.lm.parts), len(PARTS)
        exact = {"dtype": torch.float64, "device": self.lm.device}
        self.found = {
            **{name: torch.zeros(each, len(self.vectors), nodes, ways, **exact) for name in _CHANGED},
            "made": torch.zeros(each, nodes, ways, **exact), "written": torch.zeros(each, nodes, **exact),
            "rows": self.kept.sum(1).double(),
        }  # fmt: skip

    def all(self) -> Iterator[str]:
        """Measure everything; says what is done."""
        with reading(self.run) as readers:
            for layer in self.asked.layers:
                yield from (f"layer {layer.index}" for _ in self._heads(layer, readers(layer)))
        yield from ("MLPs" for _ in self._mlps())

    def _squares(self, vectors: Float[Tensor, "prompt position ... d"]) -> Float[Tensor, "prompt ..."]:
        """Σ over the rows that count, and over the last axis."""
        there = self.kept.view(*self.kept.shape, *[1] * (vectors.dim() - 2))
        return (vectors.to(self.lm.compute_dtype) * there).square().sum(-1, dtype=torch.float64).sum(1)

    def _energy(
        self, z: Float[Tensor, "prompt position head d_head"], gram: Float[Tensor, "head d_head d_head"]
    ) -> Float[Tensor, "prompt head"]:
        rows = z.to(self.lm.compute_dtype) * self.kept[..., None, None]
        energy = (torch.einsum("pthk,hkj->pthj", rows, gram) * rows).sum(1).sum(-1, dtype=torch.float64)
        return energy.clamp_min(0)  # rounding leaves of nothing less than nothing

    def _heads(self, layer: Layer, readers: Readers) -> Iterator[int]:
        found, first = self.found, self.lm.parts.index(Node(layer.kind, layer.index, 0))
        heads = slice(first, first + layer.heads)
        plain, folds = readers.clean, self.asked.folded[layer.index]
        # ‖o‖² of a head is zᵀ G z, as later readers weigh channels.
        gram = torch.einsum("hkd,d,hjd->hkj", folds.w_o, self.asked.weigh[self.lm.parts[first]], folds.w_o)
        found["written"][:, heads] = found["made"][:, heads, 0] = self._energy(plain.z, gram)
        for way in readers.ways:
            found["made"][:, heads, PARTS.index(way)] = self._squares(plain.made[way])
        for put, vector in enumerate(self.vectors):
            for way, change, other in readers.without(vector):
                at = PARTS.index(way)
                wrote = found["wrote"][:, put, heads, at] = self._energy(other.z - plain.z, gram)
                found["read"][:, put, heads, at] = wrote if way == PARTS[0] else self._squares(change)
                if (turned := changed_pattern(plain, other, way)) is not None:
                    found["turned"][:, put, heads, at] = (turned.movedim(1, 2) * self.kept[..., None]).double().sum(1)
            yield put

    def _mlps(self) -> Iterator[int]:
        mlps, found = self.asked.mlps, self.found
        for mlp in mlps:
            at, weight = self.lm.parts.index(mlp), self.asked.weigh[mlp].sqrt()
            found["written"][:, at] = found["made"][:, at, 0] = self._squares(self.run.record.vectors[mlp] * weight)
        for put, vector in enumerate(self.vectors):
            there = vector.ne(0).any(-1, keepdim=True)  # elsewhere the difference is rounding
            for mlp, change in one_reader(self.run, vector, mlps).items():
                at = self.lm.parts.index(mlp)
                energy = self._squares(change * there * self.asked.weigh[mlp].sqrt())
                found["read"][:, put, at, 0] = found["wrote"][:, put, at, 0] = energy
            yield put
