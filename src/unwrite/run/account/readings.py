"""What does a node's write do to a logit difference, by four readings, and what did it do when it was really replaced?

total = measure(clean) − measure(the write replaced), executed. At the row that is read it has an exact account:
total = direct + Σ_e [direct(o_e clean) − direct(o_e without the write)] + norm, all but the last at the clean final
scale; the middle is split, with the sign of direct, into erased = min(a, 0) − min(b, 0) and filled_in = max(a, 0) −
max(b, 0), a and b what e does to the difference with and without the write. (facts: measuring erasure, §7)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.capture import Recording
from unwrite.model.fold import Folded
from unwrite.model.view import Model
from unwrite.model.writes import blocks, expand
from unwrite.nodes import PROJECTED, Location
from unwrite.run.answer.logits import Question, capped, linear, measure, normed_measure
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay.clean import Base, Clean, base_run
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

    @cached_property
    def base(self) -> Base:
        """The same run with keys and values, for runs of some rows."""
        return base_run(self.lm, self.ids, self.row, ())

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


@dataclass(frozen=True, eq=False)
class Direct:
    """What writes at the read row do to the difference of each prompt, directly and at the clean final scale."""

    asked: Asked

    @cached_property
    def linear(self) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
        """By which a vector at the read row is multiplied, and what no vector adds."""
        return linear(self.asked.lm, self.asked.question, self.asked.final(self.asked.run.record))

    @cached_property
    def nodes(self) -> dict[int, slice]:
        """Where the nodes of the input (−1) and of each block are."""
        return {self.asked.lm.parts[among.start].layer: among for among in blocks(self.asked.lm)}

    @cached_property
    def _heads(self) -> list[Float[Tensor, "prompt head d_head"]]:
        return [torch.einsum("hkd,pd->phk", one.w_o, self.linear[0]) for one in self.asked.folded]

    def of(
        self, layer: int, record: Recording, at: Callable[[Tensor], Tensor], prompt: Int[Tensor, " run"]
    ) -> Float[Tensor, "node run"]:
        """Of the nodes of a block in runs of these prompts; `at` takes every run's read row out of what is recorded."""
        r, found = self.linear[0][prompt], []
        for node in self.asked.lm.parts[self.nodes[layer]]:
            if node.kind in PROJECTED and node.head == 0:
                found.append(torch.einsum("nhk,nhk->hn", at(record.z[layer]), self._heads[layer][prompt]))
            elif node.kind == "bias":
                own, gain = r @ self.asked.folded[layer].bias, record.gain.get(layer)
                found.append((own if gain is None else own * at(gain))[None])
            elif node.kind not in PROJECTED:
                found.append((at(record.vectors[node]) * r).sum(-1)[None])
        return torch.cat(found)
