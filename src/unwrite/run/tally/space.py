"""Is the space that a write took used again, because it was freed? What others write there, with and without erasers.

Sums of every prompt of ‖P o_e‖² / ‖o_w‖², P onto what the writer can write but for the direction that it does write,
channels as later readers weigh them: in the clean run, in the run in which what the erasers write along the write is
held out, so that it stays, and in runs in which as much is added of a typical write. The same for spaces of the other
heads of its layer. (facts: measuring erasure, §8)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.capture import Recording
from unwrite.nodes import Node
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch
from unwrite.run.replay.clean import clean
from unwrite.run.replay.edited import added_to_all
from unwrite.run.tally.reads import Asking


@dataclass(frozen=True, eq=False)
class Freed:
    """Whose space is asked about, and who erases the write."""

    of: Asking
    erasers: tuple[Node, ...]


class SpaceTally:
    """Sums of every prompt, filled in batch by batch."""

    def __init__(self, asked: Freed, job: Job):
        self._asked, self._job = asked, job
        self._spans = spans(asked.of)
        self._rows = Rows(self._measured)
        self.kept, self.step, self.whole = self._rows.kept, self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> Arrays:
        of = _Measuring(self._asked, self._spans, batch)
        for done, what in enumerate(of.all(), 1):
            self._job.tick(self.kept, done / (len(of.vectors) + 1), what)
        batch.require_sums(of.found.values(), "what is written where erasers are held out")
        return {name: part.cpu().numpy() for name, part in of.found.items()}


def spans(asked: Asking) -> Float[Tensor, "head d_model rank"]:
    """Orthonormal bases of what each head of the writer's layer can write, channels weighed; the writer's own first."""
    folds, root = asked.folded[asked.writer.layer], asked.weight.sqrt()
    order = [asked.writer.head, *(head for head in range(len(folds.w_o)) if head != asked.writer.head)]
    return torch.linalg.qr((folds.w_o[order] * root).mT).Q


class _Measuring:
    """One batch of prompts, one clean run of it, and the runs in which erasers are held out."""

    def __init__(self, asked: Freed, bases: Float[Tensor, "head d_model rank"], batch: Batch):
        of = asked.of
        self.asked, self.lm, self.bases, self.root = asked, of.lm, bases, of.weight.sqrt()
        self.kept = batch.beyond(of.skip).to(self.lm.device)
        self.run = clean(self.lm, batch.ids, of.folded)
        self.vectors = of.puts(self.run, batch)
        write = self.vectors[0] * self.root
        energy = write.square().sum(-1, keepdim=True)
        safe = energy.clamp_min(torch.finfo(write.dtype).tiny)
        self.along = torch.where(energy > 0, write / safe.sqrt(), 0.0)
        # What each eraser writes along the write, as a part of it.
        onto = {node: (self.run.write(node) * self.root * write).sum(-1, keepdim=True) for node in asked.erasers}
        self.part = {node: torch.where(energy > 0, part / safe, 0.0) for node, part in onto.items()}
        self.found: dict[str, Tensor] = {"energy": energy.sum((1, 2), dtype=torch.float64)}

    def all(self) -> Iterator[str]:
        """Measure everything; says what is done."""
        self.found["use"], self.found["space"] = self._nodes(self.run.record), self._states(self.run.record)
        yield "the clean run"
        held = []
        for put, vector in enumerate(self.vectors):
            changes = {node: -part * vector for node, part in self.part.items()}
            record = added_to_all(self.run, changes) if changes else self.run.record
            if put == 0:
                self.found["held"], self.found["space_held"] = self._nodes(record), self._states(record)
            else:
                held.append(self._nodes(record, 1)[:, 0])
            yield "erasers held out" if put == 0 else f"typical write {put}"
        self.found["held_typical"] = torch.stack(held, 1)

    def _nodes(self, record: Recording, heads: int | None = None) -> Float[Tensor, "prompt head node"]:
        """Σ‖P o_e‖² of every node in the spaces of the first heads, or of all, but along the write."""
        return torch.cat([self._inside(part, heads) for part in self.run.written(record)], -1)

    def _states(self, record: Recording) -> Float[Tensor, "prompt head location"]:
        """The same of every state of the stream."""
        return torch.cat([self._inside(record.stream[state][None]) for state in self.lm.states], -1)

    def _inside(
        self, vectors: Float[Tensor, "some prompt position d_model"], heads: int | None = None
    ) -> Float[Tensor, "prompt head some"]:
        weighed = vectors * self.root
        other = weighed - (weighed * self.along).sum(-1, keepdim=True) * self.along
        found = []
        for basis in self.bases[:heads]:
            energy = (other @ basis).square().sum(-1) * self.kept
            found.append(energy.sum(-1, dtype=torch.float64).t())
        return torch.stack(found, 1)
