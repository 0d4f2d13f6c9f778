"""What does a write do to a logit difference? Told by runs in which it was really replaced, many of them in one batch.

total = measure(clean) − measure(the write replaced), executed, and its exact account at the read row (account.py). Of
every run only what its nodes do to the difference at the read row is kept, block by block as it goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.cache import Past
from unwrite.model.capture import Recording
from unwrite.model.continued import Calls
from unwrite.model.view import Model
from unwrite.run.account.readings import Asked, Direct
from unwrite.run.answer.logits import measure
from unwrite.run.replay.removed import Changed, alone, at_once, begins, changed, in_order
from unwrite.run.source.writes import Replaced

# Told after every block how many chunks of runs are done, and which part of all the work.
Tick = Callable[[int, float], object]
# Rows of keys and values that runs of few rows look up, for every row that goes up in runs of all.
_PAST = 8


@dataclass(frozen=True, eq=False)
class One:
    """A run: of which prompt, by which replacement of which node's write."""

    name: str
    node: int
    prompt: int


@dataclass(frozen=True, eq=False)
class Alike:
    """Runs that bring the same rows, from `start` to before `end`, and how blocks are called for them.

    `of` are prompts by replacement; in all of them every node's write is replaced.
    """

    of: Mapping[str, Sequence[int]]
    start: int
    end: int
    calls: Calls
    kept: Sequence[Past]

    def chunks(self, lm: Model) -> Iterator[list[One]]:
        """The runs that go up together, in the order in which they begin."""
        order, length = in_order(lm, lm.parts), self.end - self.start
        runs = [One(name, node, prompt) for node in order for name, those in self.of.items() for prompt in those]
        size = max(1, min(at_once(length, lm.device), _PAST * at_once(self.end, lm.device)))
        for start in range(0, len(runs), size):
            yield runs[start : start + size]


def totals(asked: Asked, replaced: Mapping[str, Replaced], found: Mapping[str, Tensor], done: int, tick: Tick) -> None:
    """Fill in `found`: by replacement, `total NAME` [prompt, node] and `why NAME` [prompt, node, part].

    The first `done` chunks of runs are there already. A node whose write is replaced by itself has 0, without a run.
    """
    lm, account = asked.lm, _Account(asked)
    chunks = [(alike, runs) for alike in _alike(asked, replaced) for runs in alike.chunks(lm)]
    layers = len(lm.layers)
    blocks = [sum(layers + 1 - begins(lm, lm.parts[one.node]) for one in runs) for _, runs in chunks]
    work = np.cumsum([0, *((of.end - of.start) * n for (of, _), n in zip(chunks, blocks, strict=True))])
    for index, (alike, runs) in enumerate(chunks[done:], done):
        changing = _changing(asked, replaced, alike, runs)
        runs = [one for one, _ in changing]
        reached = int(work[index])

        def told(rows: int, index: int = index) -> None:
            nonlocal reached
            reached += rows
            tick(index, reached / work[-1])

        value = account.of(alike, runs, torch.stack([part for _, part in changing]), told) if runs else {}
        for name in dict.fromkeys(one.name for one in runs):
            own = [i for i, one in enumerate(runs) if one.name == name]
            place = [runs[i].prompt for i in own], [runs[i].node for i in own]
            for kind, part in value.items():
                found[f"{kind} {name}"][place] = part[own]
        tick(index + 1, float(work[index + 1] / work[-1]))


def _alike(asked: Asked, replaced: Mapping[str, Replaced]) -> Iterator[Alike]:
    """All runs, by the row from which on they differ, if those before it can be looked up."""
    first: dict[int, dict[str, list[int]]] = {}
    for name, one in replaced.items():
        for prompt in (one.rows.any(1) & one.known).nonzero()[:, 0].tolist():
            start = int(one.rows[prompt].nonzero()[0])
            first.setdefault(start, {}).setdefault(name, []).append(prompt)
    base = asked.base
    if not base.kept:
        whole = {name: [p for those in first.values() for p in those.get(name, ())] for name in replaced}
        yield Alike(whole, 0, asked.ids.shape[1], alone(asked.lm, asked.ids), ())
        return
    for start, of in sorted(first.items()):
        end = int(asked.row[sorted({prompt for those in of.values() for prompt in those})].max()) + 1
        yield Alike(of, start, end, base.calls(start, end), base.kept)


def _changing(
    asked: Asked, replaced: Mapping[str, Replaced], alike: Alike, runs: list[One]
) -> list[tuple[One, Float[Tensor, "row d_model"]]]:
    """The runs that change anything, and what is taken away in each."""
    found = []
    for (name, node), those in groupby(runs, lambda one: (one.name, one.node)):
        change = replaced[name].change(asked.lm.parts[node])[:, alike.start : alike.end]
        some = change.flatten(1).any(1).tolist()
        found += [(one, change[one.prompt]) for one in those if some[one.prompt]]
    return found


@dataclass(frozen=True, eq=False)
class _Account:
    """What nodes do to the difference in changed runs, less what they do in the clean one."""

    asked: Asked

    @cached_property
    def direct(self) -> Direct:
        """What a write does to the difference."""
        return Direct(self.asked)

    @cached_property
    def difference(self) -> Float[Tensor, " prompt"]:
        """The clean logit difference."""
        return self.asked.measure(self.asked.run.record)

    @cached_property
    def clean(self) -> list[Float[Tensor, "node prompt"]]:
        """What the nodes of each block do to the difference in the clean run."""
        asked, prompt = self.asked, torch.arange(len(self.asked.row), device=self.asked.row.device)
        of = partial(self.direct.of, record=asked.run.record, at=asked.at_row, prompt=prompt)
        return [of(layer) for layer in range(len(asked.lm.layers))]

    def of(
        self, alike: Alike, runs: list[One], change: Tensor, told: Callable[[int], object]
    ) -> dict[str, Float[Tensor, "run ..."]]:
        """`total` and `why` of these runs."""
        asked, lm, device = self.asked, self.asked.lm, self.asked.row.device
        prompt = torch.tensor([one.prompt for one in runs], device=device)
        row, n = asked.row[prompt] - alike.start, torch.arange(len(runs), device=device)
        r, constant = (part[prompt] for part in self.direct.linear)
        direct = (change[n, row] * r).sum(-1)
        sign = torch.where(direct < 0, -1.0, 1.0).to(direct)
        split = direct.new_zeros(2, len(runs))

        def seen(layer: int, first: int, record: Recording) -> None:
            # What the node itself writes is recorded before the change, which is `direct`.
            now = self.direct.of(layer, record, lambda x: x[n[:first], row[:first]], prompt[:first])
            a, b = self.clean[layer][:, prompt[:first]] * sign[:first], now * sign[:first]
            split[0, :first] += (a.clamp(max=0) - b.clamp(max=0)).sum(0)
            split[1, :first] += (a.clamp(min=0) - b.clamp(min=0)).sum(0)
            told(first * change.shape[1])

        whole = Changed([lm.parts[one.node] for one in runs], prompt, -change)
        final = changed(asked.run, alike.calls, whole, seen, alike.kept, alike.start)[n, row]
        measured = measure(lm, asked.question.of(prompt), final)
        norm = (final * r).sum(-1) + constant - measured
        why = torch.stack([direct, *(split * sign), norm], -1)
        return {"total": self.difference[prompt] - measured, "why": why}
