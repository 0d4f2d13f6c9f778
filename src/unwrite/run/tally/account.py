"""What does a node's write do to a logit difference, by four readings, and what did it do when it was really replaced?

total = measure(clean) − measure(the write replaced), executed. At the row that is read it has an exact account:
total = direct + Σ_e [direct(o_e clean) − direct(o_e without the write)] + norm, all but the last at the clean final
scale; the middle is split, with the sign of direct, into erased = min(a, 0) − min(b, 0) and filled_in = max(a, 0) −
max(b, 0), a and b what e does to the difference with and without the write. (facts: measuring erasure, §7)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.capture import Recording
from unwrite.model.view import Folded, Model
from unwrite.model.writes import expand
from unwrite.nodes import Location
from unwrite.run.answer.logits import Question, capped, linear, measure, normed_measure
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay.clean import Clean
from unwrite.run.replay.edited import added
from unwrite.run.source.writes import Replaced

READINGS = tuple(RULES)
PARTS = ("direct", "erased", "filled_in", "norm")
Cotangents = Mapping[str, Mapping[Location, Float[Tensor, "prompt position d_model"]]]


@dataclass(frozen=True, eq=False)
class Asked:
    """A clean run of a batch, and what is asked about one row of each prompt."""

    run: Clean
    ids: Int[Tensor, "prompt position"]
    row: Int[Tensor, " prompt"]
    question: Question

    @property
    def lm(self) -> Model:
        """The model that is asked."""
        return self.run.lm

    @property
    def folded(self) -> tuple[Folded, ...]:
        """What turns factors into writes."""
        return tuple(self.run.folded)

    def at_row(self, x: Float[Tensor, "_ position ..."]) -> Float[Tensor, "prompt ..."]:
        """Every prompt's read row."""
        return x.expand(len(self.row), *x.shape[1:])[torch.arange(len(self.row), device=x.device), self.row]

    def final(self, record: Recording) -> Float[Tensor, "prompt d_model"]:
        """The final stream at the read rows."""
        return self.at_row(record.stream[self.lm.states[-1]])

    def writes(self, record: Recording) -> Float[Tensor, "node prompt d_model"]:
        """What every node wrote at the read rows."""
        return expand(self.lm, self.folded, record.writes.map(self.at_row))

    def measure(self, record: Recording) -> Float[Tensor, " prompt"]:
        """The logit difference of a run, before a soft-cap."""
        return measure(self.lm, self.question, self.final(record))

    def sums(self) -> dict[str, Float[Tensor, " prompt"]]:
        """The clean logit difference and how it is made up: Σ direct + constant + unexplained."""
        final, writes = self.final(self.run.record), self.writes(self.run.record)
        r, constant = linear(self.lm, self.question, final)
        difference = self.measure(self.run.record)
        return {
            "logit_diff": difference,
            "capped": capped(self.lm, self.question, final),
            "constant": constant,
            "unexplained": difference - torch.einsum("nbd,bd->nb", writes, r).sum(0) - constant,
        }

    def cotangents(self) -> Cotangents:
        """∂ difference / ∂ stream under the rules of every reading; a forward and a backward pass each."""

        def metric(normed: Tensor) -> Tensor:
            return normed_measure(self.lm, self.question, self.at_row(normed))

        return {name: cotangents(self.lm, self.ids, rules, metric)[1] for name, rules in RULES.items()}


def readings(asked: Asked, slopes: Cotangents, replaced: Replaced) -> dict[str, Float[Tensor, "prompt node"]]:
    """Every reading of what each node's replaced write does: Σ over rows of ⟨write − replacement, cotangent⟩."""
    lm = asked.lm
    found: dict[str, list[Tensor]] = {name: [] for name in slopes}
    for node in lm.parts:
        change, state = replaced.change(node), lm.after(node)
        for name, cotangent in slopes.items():
            found[name].append((change * cotangent[state]).sum((1, 2)))
    return {name: torch.stack(parts, 1) for name, parts in found.items()}


def totals(asked: Asked, replaced: Replaced) -> dict[str, Tensor]:
    """`total` [prompt, node] and `why` [prompt, node, part] of every node, each from one executed run without it."""
    clean, writes = asked.final(asked.run.record), asked.writes(asked.run.record)
    r, constant = linear(asked.lm, asked.question, clean)
    difference, along = asked.measure(asked.run.record), torch.einsum("nbd,bd->nb", writes, r)
    total, why = [], []
    for i, node in enumerate(asked.lm.parts):
        change = replaced.change(node)
        without = added(asked.run, node, -change)
        direct = (asked.at_row(change) * r).sum(-1)
        measured = asked.measure(without)
        indirect = torch.einsum("nbd,bd->nb", asked.writes(without), r)
        indirect[i] = along[i]  # what the node itself writes is `direct`
        norm = (asked.final(without) * r).sum(-1) + constant - measured
        total.append(difference - measured)
        sign = torch.where(direct < 0, -1.0, 1.0).to(direct)
        why.append(torch.stack([direct, *_split(along, indirect, sign), norm], -1))
    return {"total": torch.stack(total, 1), "why": torch.stack(why, 1)}


def _split(
    clean: Float[Tensor, "node prompt"], without: Float[Tensor, "node prompt"], sign: Float[Tensor, " prompt"]
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    a, b = clean * sign, without * sign
    erased = (a.clamp(max=0) - b.clamp(max=0)).sum(0)
    filled_in = (a.clamp(min=0) - b.clamp(min=0)).sum(0)
    return erased * sign, filled_in * sign
