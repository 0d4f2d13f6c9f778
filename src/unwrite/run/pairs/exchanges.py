"""What do runs say in which a site holds another value at one row? Pairs in groups that run alike, and sets of values.

A set is a value for every pair: the source prompt's along a basis or one of its parts, as far along random directions;
or, to see what directions are enough for, the base prompt's own along them and its mean in all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.logits import at_once
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.answer.metrics import Metric, metric_of
from unwrite.run.backward.learn import sloped
from unwrite.run.edit.slots import Slot
from unwrite.run.edit.subspace import Basis, along, as_far, drawn, exchanged
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.stream import Batch, alike, parts
from unwrite.run.replay.clean import Base, base_of
from unwrite.run.replay.soft import Interchange, interchange
from unwrite.run.replay.sweep import placed
from unwrite.run.source.values import donor

# Rows (runs × positions) that are run at once.
_ROWS = 4096
Sets = Mapping[str, Float[Tensor, "draw pair d"]]


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs in the order of the rows that their runs bring: `number` is that of each among those that were given.

    `row` is where the site is in the base prompt, `there` in the source prompt; `odd` are the same pairs with arbitrary
    tokens as answers.
    """

    pairs: Pairs
    odd: Pairs
    number: Int[np.ndarray, " pair"]
    row: Int[np.ndarray, " pair"]
    there: Int[np.ndarray, " pair"]

    @staticmethod
    def of(pairs: Pairs, which: Int[np.ndarray, " _"], role: str, odd: Mapping[int, int]) -> Sample:
        """Some pairs by their numbers, at the row of a role; `odd` is the arbitrary token for each that answers."""
        pairs = pairs.take(which)
        rows = pairs.rows([role])
        assert rows is not None  # noqa: S101 (a role)
        order = np.lexsort((rows[0][:, 0], pairs.row))
        pairs = pairs.take(order)
        answer, against = (
            None if ids is None else np.array([odd[i] for i in ids.tolist()]) for ids in (pairs.answer, pairs.against)
        )
        assert answer is not None  # noqa: S101 (pairs always have one)
        other = replace(pairs, answer=answer, against=against, choices=None)
        return Sample(pairs, other, which[order], rows[0][order, 0], rows[1][order, 0])

    def batches(self, most: int) -> Iterator[Batch]:
        """Pairs whose runs bring the same rows, at most so many at a time."""
        yield from alike(self.pairs, zip(self.pairs.row.tolist(), self.row.tolist(), strict=True), most)


@dataclass(frozen=True, eq=False)
class Group:
    """Some pairs of a sample, run once, with the runs in which each site may be set."""

    batch: Batch
    base: Base
    runs: Mapping[Slot, Interchange]
    metric: Metric
    odd: Metric
    names: list[str]

    def slopes(self, slot: Slot) -> Float[Tensor, "pair d"]:
        """The slope of each pair's answer at a site of its base run."""
        runs = self.runs[slot]

        def of(batch: Batch) -> Tensor:
            at = torch.arange(batch.real, device=runs.own.device) + batch.first - self.batch.first
            return sloped({"own": runs.own[at]}, lambda part: self.metric(runs.finals(part["own"], at), at))[1]["own"]

        return torch.cat([found for _, found in parts(self.batch, of)])

    def said(self, runs: Interchange, values: Float[Tensor, "set pair d"]) -> Arrays:
        """ℓ[answer] − ℓ[against], the same of arbitrary tokens, and the top of the vocabulary: each [set, pair]."""
        found: list[Arrays] = []
        each = max(1, min(_ROWS // runs.rows, at_once(self.base.lm)) // self.batch.real)
        for some in values.split(each):
            halves = [one for _, one in parts(self.batch, partial(self._said, runs, some))]
            found.append({name: np.concatenate([one[name] for one in halves], 1) for name in halves[0]})
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    @torch.no_grad()
    def _said(self, runs: Interchange, values: Tensor, batch: Batch) -> Arrays:
        at = torch.arange(batch.real, device=values.device) + batch.first - self.batch.first
        pair = at.repeat(len(values))
        normed = final_normed(self.base.lm, runs.finals(values[:, at].flatten(0, 1), pair))
        logits = self.metric.logits(normed)
        names = [self.names[int(i)] for i in at]
        finite = logits.isfinite().all(-1).view(len(values), -1).all(0)
        require_finite(finite, "a logit of {pair} is not finite where it is patched", pair=names)
        found = {"logit_diff": self.metric.of(normed, pair), "odd": self.odd.of(normed, pair), "top": logits.argmax(1)}
        return {name: part.view(len(values), -1).double().cpu().numpy() for name, part in found.items()}


def arbitrary(vocabulary: int, *every: Pairs) -> dict[int, int]:
    """A pseudo-random other token for each that answers anywhere, none of them an answer where there are enough."""
    ids = [part for pairs in every for part in (pairs.answer, pairs.against) if part is not None]
    answers, rng = np.unique(np.concatenate(ids)), np.random.default_rng(0)
    others = rng.permutation(np.setdiff1d(np.arange(vocabulary), answers))
    if len(others) < len(answers):
        answers = rng.permutation(answers)
        others = np.roll(answers, 1)
    return dict(zip(answers.tolist(), others.tolist(), strict=False))


def grouped(lm: Model, sites: Sequence[Slot], sample: Sample, most: int) -> list[Group]:
    """All groups of a sample, at most so many pairs in each."""
    made = partial(_group, lm, tuple(dict.fromkeys(sites)), sample)
    return [group for batch in sample.batches(most) for _, group in parts(batch, made)]


def _group(lm: Model, sites: tuple[Slot, ...], sample: Sample, batch: Batch) -> Group:
    rows = slice(batch.first, batch.first + batch.real)
    base = base_of(lm, sample.pairs, rows, sites)
    given = donor(lm, sample.pairs, sites, "source", sample.there[:, None]).values(rows)
    source = placed(base.values, given, sample.row[rows, None])
    metric, odd = (metric_of(lm, pairs, "logit_diff", rows) for pairs in (sample.pairs, sample.odd))
    names = [f"pair {i}" for i in sample.number[rows]]
    require_finite(metric(base.final).isfinite(), "the answer of {pair} is not finite", pair=names)
    for slot in sites:
        finite = torch.stack([part[slot].isfinite().flatten(1).all(1) for part in (base.values, source)]).all(0)
        require_finite(finite, f"{slot.sites[0]} of {{pair}} is not finite", pair=names)
    runs = interchange(base, source, torch.from_numpy(sample.row[rows]))
    return Group(batch, base, runs, metric, odd, names)


def interchanges(runs: Interchange, bases: Mapping[str, Basis], draws: int) -> Sets:
    """What each set of an interchange puts there; `bases` has the "subspace", its "row" and "null" as they are."""
    far = exchanged(runs.own, runs.there, bases["subspace"]) - runs.own
    random = [drawn(len(bases["subspace"]), runs.own, 1, draw) for draw in range(draws)]
    sets = {"clean": runs.own, "full": runs.there}
    for name, basis in bases.items():
        # Of a part of a basis as it is, directions are shorter than 1.
        raw = name.endswith("_raw")
        sets[name] = runs.own + along(runs.change, basis) if raw else exchanged(runs.own, runs.there, basis)
    made = {name: value[None] for name, value in sets.items()}
    drawn_ = [runs.own + as_far(along(runs.change, one), far) for one in random]
    return made | ({"random": torch.stack(drawn_)} if drawn_ else {})


def restrictions(runs: Interchange, basis: Basis, centre: Float[Tensor, " d"], draws: int) -> Sets:
    """The base prompt's own value along the first 0, 1, … directions alone, its mean in all others."""
    away, k = runs.own - centre, len(basis)
    random = [drawn(k, runs.own, 1, draw) for draw in range(draws)]
    sets = {
        name: torch.stack([centre + along(away, one[:rank]) for one in each for rank in range(k + 1)])
        for name, each in (("subspace", [basis]), ("random", random))
    }
    return {"clean": runs.own[None], **sets}
