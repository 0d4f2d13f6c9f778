"""What is a metric where everything outside of sets is replaced? Of every pair, each set executed once.

Sets are [node, place] as `Outside` has them, or [sender, receiver] as `Cut` does; all that are new at a time go up in
one pass over the pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.errors import NumericError, TokensError, shown
from unwrite.model.view import Model
from unwrite.nodes import names_of
from unwrite.orders import Cells, Set, cells_at
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import asked_roles
from unwrite.run.answer.logits import normed
from unwrite.run.answer.metrics import Custom, Metric, metric_of, name_of
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Begun, Ledger
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, Progress, stream
from unwrite.run.replay.circuits import Outside
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edge_circuits import Cut, edge_table
from unwrite.run.replay.edges import Ends
from unwrite.run.source.values import Donor, donor
from unwrite.stats.curves import Shares, faithfulness

# Of so many pairs, the first ones, a set is run that few are asked of.
FEW = 2


@dataclass(frozen=True, eq=False)
class Replacing:
    """Runs of pairs in which nodes of `slots` are replaced, and what is asked; `rows` of roles in base prompts."""

    lm: Model
    pairs: Pairs
    slots: tuple[Slot, ...]
    roles: tuple[str, ...]
    rows: Int[np.ndarray, "pair role"]
    metric: str | Custom
    donor: Donor

    def cells(self, only: Mapping[str, Any] | None) -> Cells:
        """What sets are chosen from: nodes, at roles where there are some; of roles only those nodes that are named."""
        return cells_at(tuple(name for slot in self.slots for name in slot.names), self.roles, only)

    @property
    def nothing(self) -> Set:
        """The set that keeps nothing."""
        return np.zeros((sum(len(slot.units) for slot in self.slots), self.rows.shape[1] + 1), dtype=bool)

    def begun(self, rows: slice) -> Outside:
        """Those runs of some pairs."""
        roles = torch.from_numpy(self.rows[rows]).to(self.lm.device)
        base = base_of(self.lm, self.pairs, rows, self.slots)
        return Outside(base, self.donor.values(rows), self.slots, roles)


@dataclass(frozen=True, eq=False)
class Cutting:
    """Runs of pairs in which edges of a `table` carry what is written in another run, and what is asked."""

    lm: Model
    pairs: Pairs
    table: Ends
    metric: str | Custom
    donor: Donor
    roles: tuple[str, ...] = ()

    def cells(self, _: object) -> Cells:
        """What sets are chosen from: edges."""
        return Cells(tuple(self.table.senders), tuple(self.table.receivers), self.table.joins, edges=True)

    @property
    def nothing(self) -> Set:
        """The set that keeps nothing."""
        return np.zeros(self.table.joins.shape, dtype=bool)

    def begun(self, rows: slice) -> Cut:
        """Those runs of some pairs."""
        return Cut(base_of(self.lm, self.pairs, rows, self.table.sent), self.donor.values(rows), self.table)


def replacing(lm: Model, pairs: Pairs, nodes: Any, roles: Any, replace: Any, metric: str | Custom) -> Replacing:
    """In which runs of which pairs what is replaced. Raises as `uw.circuit` does."""
    _require_another_run(pairs, replace, metric)
    found = slots(lm, nodes if isinstance(nodes, str) else names_of("nodes", nodes))
    named = () if roles is None else asked_roles([*roles] if isinstance(roles, Mapping) else roles, [*pairs.roles])
    if roles is not None and not named:
        raise NumericError("roles are names of tokens", got=shown(roles), expected=", ".join(pairs.roles))
    rows = np.stack([pairs.roles[role] for role in named], 1) if named else np.zeros((len(pairs), 0), dtype=np.int64)
    return Replacing(lm, pairs, found, named, rows, metric, donor(lm, pairs, found, replace))


def cutting(lm: Model, pairs: Pairs, roles: Any, replace: Any, metric: str | Custom) -> Cutting:
    """The same of edges."""
    if roles is not None:
        raise NumericError("edges carry every position", got=shown(roles), fix="leave roles out")
    _require_another_run(pairs, replace, metric)
    table = edge_table(lm)
    return Cutting(lm, pairs, table, metric, donor(lm, pairs, table.sent, replace))


def _require_another_run(pairs: Pairs, replace: Any, metric: str | Custom) -> None:
    """A run that says something else, position by position, by a metric that has a difference."""
    if name_of(metric) == "fldd":
        raise NumericError("fldd is a part of a difference itself", got="fldd", fix="use metric='logit_diff'")
    if isinstance(replace, str) and replace == "source":
        pairs.require_differences()
    if not pairs.aligned:
        raise TokensError(
            "every position of a run is replaced by that of another", got="unequal numbers of tokens",
            expected="base and source prompts of equal numbers",
        )  # fmt: skip


class Executed:
    """Metrics of runs that keep sets, each set executed once, and all that are new at a time in one pass over pairs."""

    def __init__(self, asked: Replacing | Cutting, size: int, job: Job, listener: Listener | None):
        self.asked, self.size, self.job, self.listener = asked, size, job, listener
        self._known: dict[bytes, Float[np.ndarray, " pair"]] = {}
        self._few: dict[bytes, Float[np.ndarray, " pair"]] = {}
        self.about: Arrays = {}
        self.cost = 0
        self._last = _Last(asked)

    def execute(self, sets: Iterable[Set | None], stage: str, few: Iterable[Set] = ()) -> None:
        """Run those sets that are new; then the `few` that only the first pairs are asked of."""
        wanted = {one.tobytes(): one for one in sets if one is not None and one.tobytes() not in self._known}
        part = {one.tobytes(): one for one in few if one.tobytes() not in {*self._known, *wanted}}
        if not wanted and not part:
            return
        pairs = self.asked.pairs
        runs = len(wanted) * len(pairs) + len(part) * min(FEW, len(pairs))
        words = f"circuit {stage}, {runs:,} runs"
        if self.listener is not None:  # what it will take is said before it starts
            self.listener(Progress(words, 0, len(pairs), 0, 0.0))
        tally = _Tally(self._last, self.job, np.stack([*wanted.values(), *part.values()]), len(wanted))
        stream(self.asked.lm, pairs.base, tally, self.size, words, self.listener, self.job)
        found = tally.whole()
        self.about = self.about or {name: found[name] for name in ("base", "solved")}
        self._known |= {key: found["value"][:, i] for i, key in enumerate(wanted)}
        self._few |= {key: found["value"][:, len(wanted) + i] for i, key in enumerate(part)}
        self.cost += runs

    def value(self, one: Set) -> Float[np.ndarray, " pair"]:
        """The metric of each pair in runs of a set that was executed."""
        return self._known[one.tobytes()]

    def shares(self, sets: Sequence[Set | None], few: bool = False) -> Shares:
        """Faithfulness of sets that were executed, NaN of None; of the first pairs alone for a `few`."""
        pairs = slice(0, FEW if few else len(self.asked.pairs))
        nothing = np.full(len(self.about["base"]), np.nan)
        known = self._few | self._known if few else self._known
        each = [nothing if one is None else known[one.tobytes()] for one in sets]
        value = np.stack(each, 1) if each else np.zeros((len(nothing), 0))
        cluster = np.unique(self.asked.pairs.cluster[pairs], return_inverse=True)[1]
        empty = self._known[self.asked.nothing.tobytes()]
        return faithfulness(value[pairs], empty[pairs], self.about["base"][pairs], cluster)


@dataclass(frozen=True, eq=False)
class _Begun:
    """What runs of some pairs begin from."""

    outside: Outside | Cut
    metric: Metric
    clean: Float[Tensor, " pair"]
    solved: Bool[Tensor, " pair"]


class _Last:
    """What runs of some pairs begin from, held until others are asked for: of few pairs all stages begin from one."""

    def __init__(self, asked: Replacing | Cutting):
        self._asked = asked
        self._held: dict[tuple[int, int], _Begun] = {}

    def __call__(self, batch: Batch) -> _Begun:
        """Of the pairs of a batch."""
        if (key := (batch.first, batch.real)) not in self._held:
            self._held.clear()
            self._held[key] = self._begun(slice(batch.first, batch.first + batch.real))
        return self._held[key]

    def _begun(self, rows: slice) -> _Begun:
        asked = self._asked
        outside = asked.begun(rows)
        base = outside.base
        metric = metric_of(asked.lm, asked.pairs, asked.metric, rows, base.final)
        clean = metric(base.final)
        require_finite(clean.isfinite(), "the metric of {pair} is not finite", pair=rows.start)
        return _Begun(outside, metric, clean, metric.solved(normed(asked.lm, base.final)))


class _Tally:
    """The metric of every pair in runs that keep sets, of which the last ones are asked of the first pairs alone."""

    def __init__(self, last: _Last, job: Job, sets: Bool[np.ndarray, "set node place"], whole: int):
        self._last, self._job, self._sets, self._whole = last, job, torch.from_numpy(sets), whole
        self._rows, self._begun = Rows(self._measured), Begun()
        self.kept = Ledger({"done": self._rows.kept, "begun": self._begun.kept})
        self.step, self.whole = self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> Arrays:
        begun = self._last(batch)
        value = self._values(begun, batch)
        return {"base": _exact(begun.clean), "solved": _exact(begun.solved), "value": value}

    def _values(self, begun: _Begun, batch: Batch) -> Float[np.ndarray, "pair set"]:
        outside, metric = begun.outside, begun.metric
        sets = self._sets.to(outside.base.row.device)
        run = torch.ones(len(sets), batch.real, dtype=torch.bool, device=sets.device)
        run[self._whole :] = torch.arange(batch.first, batch.first + batch.real, device=sets.device) < FEW
        name = f"pairs {batch.first} to {batch.first + batch.real}"
        held, done = self._begun.held(
            name, {"value": torch.full((batch.real, len(sets)), torch.nan, dtype=torch.double)}
        )
        for i, (one, pair) in enumerate(outside.parts(sets, run)):
            if i < done:
                continue
            found = metric(outside.final(sets[one], pair), pair).double().cpu()
            finite = torch.ones(batch.real, dtype=torch.bool)
            finite[pair.cpu()[~found.isfinite()]] = False
            require_finite(finite, "the metric of {pair} is not finite where not all is kept", pair=batch.first)
            held["value"][pair.cpu(), one.cpu()] = found
            self._begun.keep(name, held, i + 1)
            part = float(held["value"].isfinite().sum()) / int(run.sum())
            self._job.tick(self.kept, part, f"{part:.0%} of the runs")
        self._begun.clear()
        return held["value"].numpy()


def _exact(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
