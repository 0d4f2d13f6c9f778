"""What does an edge do to an answer? By traced passes of the model itself, one pair alone, every edit by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

import unwrite as uw
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs

Edits = list[uw.Edit]


class Edged:
    """One pair of prompts without padding, and the logits' difference at the row that is read."""

    def __init__(self, lm: Model, given: Pairs, pair: int):
        assert given.against is not None
        n = given.base.lengths[pair]
        self.lm, self.row = lm, int(given.row[pair])
        self.base, self.source = (
            torch.from_numpy(part.ids[pair : pair + 1, :n]) for part in (given.base, given.source)
        )
        self.asked = int(given.answer[pair]), int(given.against[pair])

    @property
    def end(self) -> str:
        return f"resid_post{len(self.lm.layers) - 1}"

    @torch.no_grad()
    def run(self, edits: Edits, wanted: Sequence[str] = (), of: Tensor | None = None) -> tuple[float, Mapping]:
        """The difference, and what is at some sites, in a run of the base prompt or of another."""
        with uw.trace(self.lm, *wanted, edits=edits) as t:
            logits = self.lm.hf(self.base if of is None else of).logits[0, self.row]
        return float(logits[self.asked[0]] - logits[self.asked[1]]), {name: t[name] for name in wanted}

    @cached_property
    def clean(self) -> float:
        return self.run([])[0]

    def more(self, sender: str) -> Tensor:
        """What a sender writes more in a base run in which it alone has its source value."""
        site = "resid_pre0" if sender == "embed" else f"{sender}.z" if sender[0] == "L" else sender
        value = self.run([], [site], self.source)[1][site]
        shown = f"L{sender[1]}.attn_out" if sender[0] == "L" else site
        changed, own = (self.run(edits, [shown])[1][shown] for edits in ([uw.Edit.set(site, value)], []))
        return changed - own

    def reads(self, receiver: str) -> str:
        """The state that a receiver reads."""
        if receiver == "logits":
            return self.end
        is_late = receiver.startswith("MLP") and not self.lm.parallel
        return f"resid_mid{layer_of(receiver)}" if is_late else f"resid_pre{layer_of(receiver)}"

    def through(self, receiver: str, changes: Sequence[Tensor], before: Edits) -> list[uw.Edit]:
        """What sets a receiver to what it is when it alone reads the stream of a run and, each time, a change."""
        reads = self.reads(receiver)
        if receiver == "logits":
            return [uw.Edit.add(self.end, change) for change in changes]
        site = f"{receiver}.z" if receiver[0] == "L" and "." not in receiver else receiver
        stream = self.run(before, [reads])[1][reads]
        became = [self.run([*before, uw.Edit.set(reads, stream + change)], [site])[1] for change in changes]
        return [uw.Edit.set(site, one[site]) for one in became]

    def slope(self, change: Tensor, receiver: str, before: Edits, step: float = 1e-4) -> float:
        """The derivative of the difference when a receiver reads so much more of the change."""
        edits = self.through(receiver, [step * change, -step * change], before)
        there, back = (self.run([*before, edit])[0] for edit in edits)
        return (there - back) / (2 * step)

    def circuit(self, senders: Sequence[str], cut: Mapping[str, Sequence[str]]) -> float:
        """The difference when each receiver reads what its cut senders write in the source run.

        `cut` names them by receiver, in the order in which a pass reaches these.
        """
        written = self.run([], senders, self.source)[1]
        edits: Edits = []
        for receiver, gone in cut.items():
            if gone:
                live = self.run(edits, gone)[1]
                edits += self.through(
                    receiver, [torch.stack([written[name] - live[name] for name in gone]).sum(0)], edits
                )
        return self.run(edits)[0]


def layer_of(name: str) -> int:
    return int(name[3] if name[0] == "M" else name[1])
