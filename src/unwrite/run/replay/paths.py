"""What does a node do to an answer through one receiver alone? Path patching, in its two meanings.

"recompute" (Wang et al. 2022, arXiv 2211.00593, as commonly used): the base run with the sender set to its source value
and every other head's output held at base, while MLPs and norms answer; what the receiver becomes there is put into an
otherwise plain base run. "frozen": only the direct edge. The receiver reads x + Δ, Δ what the sender writes more, its
norm evaluated anew, in an otherwise plain base run; no pass is needed up to there. (facts: attribution, §1.5)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.model.continued import Calls
from unwrite.model.view import Model
from unwrite.run.edit.slots import Slot, Values, Visit, visiting
from unwrite.run.replay.clean import Base
from unwrite.run.replay.edges import LOGITS, Ends, Write, moved, read_at, to_end
from unwrite.run.replay.walk import ROWS, Runs, Setting, visits_of

MODES = ("recompute", "frozen")


@torch.no_grad()
def effects_of_edges(
    base: Base, source: Values, ends: Ends, mode: str
) -> Iterator[tuple[Int[Tensor, " run"], Int[Tensor, " run"], Int[Tensor, " run"], Float[Tensor, "run d_model"]]]:
    """(pair, sender, receiver, final stream at the read row) of every edge's runs.

    Edges that do not exist, and senders that write the same in both runs, are not run and not handed out.
    """
    names, n_pairs = list(ends.senders), len(base.row)
    start = first_change(base, source)
    if start is None:
        return
    start, end = base.begin(start), base.end(base.row)
    calls = base.calls(start, end)
    each = max(1, ROWS // (n_pairs * (end - start)))
    for at in range(0, len(names), each):
        sent = {i: ends.senders[names[i]] for i in range(at, min(at + each, len(names)))}
        # In a fixed order: sums round by it.
        writes = dict.fromkeys(write for part in sent.values() for write in part)
        deltas = {write: moved(ends, base.values, source, write)[:, start:end] for write in writes}
        asked = _Sent(base, ends, sent, deltas, start, calls)
        yield from asked.through_receivers(mode)


def first_change(base: Base, source: Values) -> int | None:
    """The first row at which a sender's value is another one, in any pair that can see it."""
    position = torch.arange(base.ids.shape[1], device=base.row.device)
    seen = position <= base.row[:, None]
    changed = [((own != base.values[slot]).flatten(2).any(2) & seen).any(0) for slot, own in source.items()]
    rows = torch.stack(changed).any(0).nonzero()
    return int(rows[0]) if len(rows) else None


@dataclass(frozen=True, eq=False)
class _Sent:
    """Some senders of all pairs, what they write more, and the rows where they do."""

    base: Base
    ends: Ends
    sent: Mapping[int, tuple[Write, ...]]
    deltas: Mapping[Write, Float[Tensor, "pair row d_model"]]
    start: int
    calls: Calls

    @property
    def end(self) -> int:
        return self.base.end(self.base.row)

    def runs(self, pair: Tensor, layer: Sequence[int]) -> Runs:
        """Runs over the rows where something changes."""
        return Runs(self.base, pair, layer, self.start, self.end, self.calls)

    def more(self, sender: Int[Tensor, " run"], pair: Int[Tensor, " run"], low: int, high: int) -> Tensor | None:
        """Σ Δ over what joins the stream at places low … high, run by run, as it is there; None where nothing does."""
        total: Tensor | None = None
        for write, delta in self.deltas.items():
            if not low <= write.place(self.base.lm) <= high:
                continue
            owners = sender.new_tensor([i for i, writes in self.sent.items() if write in writes])
            rows = torch.isin(sender, owners).nonzero()[:, 0]
            if len(rows):
                total = delta.new_zeros(len(sender), *delta.shape[1:]) if total is None else total
                total[rows] += delta[pair[rows]]
        return None if total is None else total / to_end(self.base.lm, high)

    def changed(self) -> Bool[Tensor, "sender pair"]:
        """Which senders write anything else, at rows that the read row can see."""
        rows = torch.arange(self.start, self.end, device=self.base.row.device) <= self.base.row[:, None]
        others = {write: ((delta != 0).any(-1) & rows).any(1) for write, delta in self.deltas.items()}
        found = self.base.row.new_zeros(len(self.ends.senders), len(rows), dtype=torch.bool)
        for i, writes in self.sent.items():
            found[i] = torch.stack([others[write] for write in writes]).any(0)
        return found

    def through_receivers(self, mode: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Patched base runs, in waves of as many rows as memory allows, runs that begin late among the last."""
        changed = self.changed()
        joined = torch.from_numpy(self.ends.joins).to(changed.device)
        sender, receiver, pair = (joined[:, :, None] & changed[:, None]).nonzero(as_tuple=True)
        if not len(pair):
            return
        first = [min(site.layer for site in sites) for sites in self.ends.receivers.values()]
        layer = torch.tensor(first, device=receiver.device)[receiver]
        order = layer.argsort(stable=True)
        became = self._recomputed(changed) if mode == "recompute" else None
        for rows in order.split(max(1, ROWS // (self.end - self.start))):
            edges = _Edges(self, self.runs(pair[rows], layer[rows].tolist()), sender[rows], receiver[rows])
            final = edges.live() if became is None else edges.fixed(became)
            yield pair[rows], sender[rows], receiver[rows], final

    def _recomputed(self, changed: Bool[Tensor, "sender pair"]) -> _Became:
        """What receivers become when a sender is set, all other heads are held, and MLPs answer."""
        sender, pair = changed.nonzero(as_tuple=True)
        places = {i: min(write.place(self.base.lm) for write in writes) for i, writes in self.sent.items()}
        layer = torch.tensor([places[int(i)] // 3 for i in sender], device=sender.device)
        order = layer.argsort(stable=True)
        sender, runs = sender[order], self.runs(pair[order], layer[order].tolist())
        became = _Became.empty(self, changed, sender, runs.pair)

        def step(index: int, x: Tensor) -> Tensor:
            n = len(x)
            some = sender[:n], runs.pair[:n]
            if (joining := self.more(*some, 3 * index, 3 * index)) is not None:
                x = x + joining.to(x.dtype)
            if index == len(self.base.lm.layers):
                return x
            held = runs.of_base(self.base.values[self.ends.held[index]], n)[:, :, 0]
            scale = self.base.lm.layers[index].residual_scale
            if (between := self.more(*some, 3 * index + 1, 3 * index + 1)) is not None:
                held = held + (between / scale).to(held.dtype)
            keep = {slot: partial(became.keep, runs, slot) for slot in self.ends.received if slot.layer == index}
            hold: dict[Slot, Visit] = {self.ends.held[index]: lambda tensor: held.reshape(tensor.shape)}
            # An MLP that is a sender is set: it does not answer, and what it writes more joins behind it.
            behind = self.more(*some, 3 * index + 2, 3 * index + 2)
            silent = visits_of(runs, self._senders_held(runs, sender, index, behind), index, x)
            with visiting(self.base.lm, {**keep, **hold}), visiting(self.base.lm, silent):
                return runs.block(index, x)

        became.final.copy_(runs.finals(step) - self.base.final[runs.pair])
        return became

    def _senders_held(
        self, runs: Runs, sender: Int[Tensor, " run"], index: int, behind: Tensor | None
    ) -> list[Setting]:
        """The MLP of a layer at base, or with what joins right `behind` it, in the runs of senders that hold it."""
        slot = next((one for one in self.ends.sent if one.kind == "mlp" and one.layer == index), None)
        if slot is None:
            return []
        owners = [i for i, writes in self.sent.items() if Write("mlp", index) in writes]
        where = torch.isin(sender, sender.new_tensor(owners))[:, None, None]

        def values() -> Tensor:
            held, n = runs.of_base(self.base.values[slot], len(sender)), 0 if behind is None else len(behind)
            more = held.new_zeros(held.shape)
            more[:n] += 0 if behind is None else behind[:, :, None] / self.base.lm.layers[index].residual_scale
            return held + more

        return [Setting(slot, where, values)]


@dataclass(frozen=True, eq=False)
class _Became:
    """What receivers became in the runs of senders: `of[sender, pair]` is the row of `kept` and of `final`."""

    of: Int[Tensor, "sender pair"]
    kept: Mapping[Slot, Float[Tensor, "run row unit d"]]
    final: Float[Tensor, "run d_model"]

    @staticmethod
    def empty(asked: _Sent, changed: Tensor, sender: Tensor, pair: Tensor) -> _Became:
        """Everything as in the base run."""
        of = torch.full(changed.shape, -1, device=changed.device)
        of[sender, pair] = torch.arange(len(sender), device=changed.device)
        base = asked.base
        kept = {slot: base.values[slot][pair, asked.start : asked.end].clone() for slot in asked.ends.received}
        return _Became(of, kept, torch.zeros_like(base.final)[pair])

    def keep(self, runs: Runs, slot: Slot, tensor: Tensor) -> Tensor:
        """Note what the slot's units are in the runs that have begun."""
        n = sum(layer <= slot.layer for layer in runs.layer)
        self.kept[slot][:n] = runs.rows_of(slot, tensor, n)[:, :, slot.units]
        return tensor


@dataclass(frozen=True, eq=False)
class _Edges:
    """Base runs into which receivers are put, each run one edge."""

    asked: _Sent
    runs: Runs
    sender: Int[Tensor, " run"]
    receiver: Int[Tensor, " run"]

    @property
    def _lm(self) -> Model:
        return self.asked.base.lm

    def _taken(self, slot: Slot) -> Bool[Tensor, "run unit"]:
        return self.asked.ends.takes(slot)[self.receiver]

    def _at_end(self) -> Bool[Tensor, "run 1"]:
        names = [any(site.kind == LOGITS for site in sites) for sites in self.asked.ends.receivers.values()]
        return torch.tensor(names, device=self.receiver.device)[self.receiver][:, None]

    def fixed(self, became: _Became) -> Float[Tensor, "run d_model"]:
        """Receivers are what they became."""
        row = became.of[self.sender, self.runs.pair]
        settings = [
            Setting(slot, self._taken(slot)[:, None], lambda slot=slot: became.kept[slot][row])
            for slot in self.asked.ends.received
        ]

        def step(index: int, x: Tensor) -> Tensor:
            if index == len(self._lm.layers):
                return x
            with visiting(self._lm, visits_of(self.runs, settings, index, x)):
                return self.runs.block(index, x)

        return self.runs.finals(step) + torch.where(self._at_end(), became.final[row], 0)

    def live(self) -> Float[Tensor, "run d_model"]:
        """Receivers read the stream of their own run and, alone, what the sender writes more."""
        return self.runs.finals(self._live_step)

    def _more(self, at: Int[Tensor, " run"], high: int) -> Tensor | float:
        found = self.asked.more(self.sender[at], self.runs.pair[at], 0, high)
        return 0.0 if found is None else found

    def _live_step(self, index: int, x: Tensor) -> Tensor:
        n, every = len(x), torch.arange(len(x), device=x.device)
        if index == len(self._lm.layers):
            return x + torch.where(self._at_end()[:n, None], self._more(every, 3 * index), 0)
        here = [slot for slot in self.asked.ends.received if slot.layer == index]
        settings = self._attended(index, x, [slot for slot in here if slot.kind != "mlp"])
        mlp = next((slot for slot in here if slot.kind == "mlp"), None)
        reads = self._taken(mlp)[:n, 0].nonzero()[:, 0] if mlp is not None else every[:0]
        if mlp is None or not len(reads):
            with visiting(self._lm, visits_of(self.runs, settings, index, x)):
                return self.runs.block(index, x)
        held, found = self.asked.ends.held[index], {}
        with visiting(self._lm, {held: _keep(held, found), mlp: _keep(mlp, found)}), ExitStack() as stack:
            stack.enter_context(visiting(self._lm, visits_of(self.runs, settings, index, x)))
            out = self.runs.block(index, x).clone()
        attention = held.view(found[held], n)[reads]
        branch = x[reads] + self._more(reads, read_at(self._lm, mlp.sites[0]))
        hold: dict[Slot, Visit] = {held: lambda tensor: attention.reshape(tensor.shape)}
        again: dict[Slot, Tensor] = {}
        with visiting(self._lm, {**hold, mlp: _keep(mlp, again)}):
            self.runs.block(index, branch, reads)
        change = mlp.view(again[mlp], len(reads)) - mlp.view(found[mlp], n)[reads]
        own = self._lm.layers[index]
        if own.late is None:
            out[reads] += change[:, :, 0] * own.residual_scale * own.gain
            return out
        whole = mlp.view(found[mlp], n)[:, :, 0].clone()
        whole[reads] += change[:, :, 0]
        with visiting(self._lm, {mlp: lambda tensor: whole.reshape(tensor.shape)}), ExitStack() as stack:
            stack.enter_context(visiting(self._lm, visits_of(self.runs, settings, index, x)))
            return self.runs.block(index, x)

    def _attended(self, index: int, x: Tensor, here: Sequence[Slot]) -> list[Setting]:
        """Heads, or their queries, keys and values, as they are when they read more."""
        if not here:
            return []
        taken = {slot: self._taken(slot)[: len(x)] for slot in here}
        reads = torch.stack([part.any(1) for part in taken.values()]).any(0).nonzero()[:, 0]
        if not len(reads):
            return []
        branch, found = x[reads] + self._more(reads, 3 * index), {}
        with visiting(self._lm, {slot: _keep(slot, found) for slot in here}):
            self.runs.block(index, branch, reads)
        settings = []
        for slot, where in taken.items():
            rows = self.runs.rows_of(slot, found[slot], len(reads))[:, :, slot.units]
            whole = rows.new_zeros(len(x), *rows.shape[1:])
            whole[reads] = rows
            settings.append(Setting(slot, where[:, None], lambda whole=whole: whole))
        return settings


def _keep(slot: Slot, found: dict[Slot, Tensor]) -> Visit:
    def visit(tensor: Tensor) -> Tensor:
        found[slot] = tensor.clone()
        return tensor

    return visit
