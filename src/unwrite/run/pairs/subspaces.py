"""Which directions of a site are judged, and by what? Bases from some pairs, executed on others, with their controls.

A basis is learned, or given, or made of the differences, slopes or values of pairs; beside it directions are learned of
arbitrary tokens, and in an untrained model. All sites of a call come one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.model.onednn import fast
from unwrite.model.projections import require_slopes
from unwrite.model.view import Model
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.backward.learn import Learning
from unwrite.run.backward.seen import seen
from unwrite.run.backward.slopes import sloping
from unwrite.run.backward.subspaces import Lesson, aligning
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.edit.subspace import Basis, halves, of_classes, size, spanned
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, fitting
from unwrite.run.pairs.exchanges import Group, Sample, grouped, interchanges, restrictions

# The model that is asked, and one of the same configuration.
OWN, UNTRAINED = "own", "untrained"
# The part of all work that is done when all bases are made.
_MADE = 0.9


@dataclass(frozen=True, eq=False)
class Subspaces:
    """What is asked: `k` directions of each site by a `method`, from pairs `learned`, tried on pairs `judged`.

    `units` are the nodes of each site; `label` is the class of each learned pair; `restrict`: is the rest of the site
    set to its mean, instead of an exchange along them?
    """

    models: Mapping[str, Model]
    sites: tuple[str, ...]
    units: tuple[tuple[str, ...], ...]
    learned: Sample
    judged: Sample
    label: Sequence[Hashable]
    k: int
    method: str
    basis: Basis | None
    readers: Sequence[str] | None
    controls: tuple[str, ...]
    restrict: bool
    seeds: int
    steps: int
    lr: float
    draws: int

    @property
    def lm(self) -> Model:
        """The model that is asked."""
        return self.models[OWN]

    @property
    def arbitrary(self) -> bool:
        """Are directions learned of arbitrary tokens, too?"""
        return "arbitrary" in self.controls and self.method == "das"

    @property
    def random(self) -> int:
        """How many random bases there are."""
        return self.draws if "random" in self.controls or self.restrict else 0

    @property
    def fits(self) -> dict[str, int]:
        """Bases that are learned of each site in each model; the last of its own may be of arbitrary tokens."""
        own = {OWN: self.seeds + self.arbitrary, UNTRAINED: 1}
        return {name: own[name] for name in self.models if self.method == "das"}

    @cached_property
    def slots(self) -> dict[str, tuple[Slot, ...]]:
        """The slot of each site, by model."""
        return {name: tuple(slots(lm, units)[0] for units in self.units) for name, lm in self.models.items()}


def cost(request: Subspaces) -> float:
    """Passes over one prompt, forward ones and backward ones."""
    layers = len(request.lm.layers)
    depth = np.array([1 - slot.layer / layers for slot in request.slots[OWN]])
    tails = [(s.pairs.row + 1 - s.row) / (s.pairs.row + 1) for s in (request.learned, request.judged)]
    sets = (request.k + 1) * (1 + request.draws) if request.restrict else 10 + request.draws
    learned = 2 * (1 + request.steps * sum(request.fits.values())) * tails[0].sum()
    clean = 2 * len(request.models) * sum(len(part) for part in tails)
    return float(clean + (learned + sets * tails[1].sum()) * depth.sum())


class SubspaceTally:
    """Bases of every site, and what they do to held-out pairs; `found` has arrays by the number of a site."""

    def __init__(self, request: Subspaces, most: int, job: Job):
        self._request, self._most, self._job = request, most, job
        self._now: Arrays = {}
        self.found: Arrays = {}
        self.kept = Ledger({"found": self.found, "learning": self._now})

    def step(self, batch: Batch) -> None:
        """All pairs are one batch."""
        sites = range(len(self._request.sites))
        with ExitStack() as stack:
            for name, lm in self._request.models.items():
                require_slopes(lm, lm.hf)
                stack.enter_context(sloping(lm))
                if name != OWN:
                    stack.enter_context(fast(lm.hf))
            stack.enter_context(torch.no_grad())
            groups = self._groups(self._request.learned)
            for i in sites:
                self._make(i, groups)
            groups = self._groups(self._request.judged)
            for i in sites:
                self._judge(i, groups)
        solved = [one.metric.solved(final_normed(self._request.lm, one.base.final)) for one in groups[OWN]]
        self.found["solved"] = torch.cat(solved).cpu().numpy()

    def of(self, i: int, name: str) -> np.ndarray:
        """What was found of a site."""
        return self.found[f"{i}/{name}"]

    def basis(self, i: int) -> Float[np.ndarray, "direction d"]:
        """The directions of a site that are judged: of those that were learned the ones with the least loss."""
        if self._request.method != "das":
            return self.of(i, self._request.method)
        seeds = self._request.seeds
        return self.of(i, f"{OWN} bases")[self.of(i, f"{OWN} losses")[:seeds].min(1).argmin()]

    def sets(self, i: int, model: str) -> dict[str, dict[str, Float[np.ndarray, "draw pair"]]]:
        """What was said of a site in a model, by what was put there, and there by `Group.said`."""
        names = self.of(i, f"{model} sets")
        what = ("logit_diff", "odd", "top")
        return {str(one): {part: self.of(i, f"{model} {part}")[names == one] for part in what} for one in names}

    def _groups(self, sample: Sample) -> dict[str, list[Group]]:
        request = self._request
        made = {name: grouped(lm, request.slots[name], sample, self._most) for name, lm in request.models.items()}
        self._tick("base runs", 0, 0.0, judges=sample is request.judged)
        return made

    def _tick(self, doing: str, i: int, part: float, judges: bool = False) -> None:
        # Making bases is most of it.
        done = (i + part) / len(self._request.sites)
        done = _MADE + (1 - _MADE) * done if judges else _MADE * done
        self._job.tick(self.kept, done, f"{self._request.sites[i]}: {doing}")

    def _keep(self, i: int, found: Mapping[str, Tensor | np.ndarray]) -> None:
        for name, part in found.items():
            self.found[f"{i}/{name}"] = part.double().cpu().numpy() if isinstance(part, Tensor) else part

    def _make(self, i: int, groups: Mapping[str, list[Group]]) -> None:
        """All bases of a site."""
        request, slot = self._request, self._request.slots[OWN][i]
        runs = [group.runs[slot] for group in groups[OWN]]
        own, change = (torch.cat([getattr(one, name) for one in runs]) for name in ("own", "change"))
        slopes = torch.cat([group.slopes(slot) for group in groups[OWN]])
        values = own if request.restrict else torch.cat([own, own + change])
        found = {
            "centre": own.mean(0), "mean": of_classes(change, request.label, request.k),
            "gradient": of_classes(-slopes, request.label, request.k),
        }  # fmt: skip
        if request.method == "svd":
            found["svd"] = spanned(values - values.mean(0))[: request.k]
        if request.basis is not None:
            found["given"] = request.basis
        self._require(i, change, found.get(request.method))
        if request.restrict:
            found["variance"] = _variance(own, found["centre"], found[request.method])
        self._keep(i, found)
        for name in request.fits:
            if f"{i}/{name} bases" not in self.found:
                self._learn(i, name, groups[name])

    def _require(self, i: int, change: Float[Tensor, "pair d"], basis: Tensor | None) -> None:
        """Raise TokensError for a site that is the same in both prompts, and for one that has not what is asked for."""
        request, site, d = self._request, self._request.sites[i], change.shape[1]
        if request.k > d:
            raise NumericError(f"k is more directions than {site} has", got=request.k, expected=f"at most {d}")
        if request.basis is not None and request.basis.shape[1] != d:
            got = f"d = {request.basis.shape[1]}"
            raise NodeError(f"the directions are not of {site}", got=got, expected=f"d = {d}")
        if not request.restrict and not change.any():
            raise TokensError(
                f"{site} is the same in base and source prompts, in all {len(change)} pairs",
                fix="ask for a site behind the first token that differs, at this row",
            )  # fmt: skip
        if basis is not None and len(basis) < request.k:
            raise NumericError(
                f"{request.method} finds fewer directions of {site} than k", got=f"{len(basis)}, k={request.k}",
                fix="ask for fewer, or give more pairs or classes",
            )  # fmt: skip

    def _learn(self, i: int, name: str, groups: Sequence[Group]) -> None:
        """The bases of a site that are learned in one of the models."""
        request, fits = self._request, self._request.fits
        slot, odd = request.slots[name][i], name == OWN and request.arbitrary
        before, whole = list(fits).index(name) / len(fits), request.steps * len(fits)

        def tick(done: int) -> None:
            self._tick(f"{done}/{request.steps} steps", i, before + done / whole)

        lessons = [
            Lesson(group.batch, group.runs[slot], [group.metric] * (fits[name] - odd) + [group.odd] * odd, group.names)
            for group in groups
        ]
        problem = aligning(lessons, request.k, range(fits[name]), lambda: tick(learning.done))
        learning = Learning(problem, request.steps, request.lr)
        learning.kept = self._now  # what another process began
        best, losses = learning.run(tick)
        self._keep(i, {f"{name} bases": best["basis"], f"{name} losses": losses})
        self._now.clear()

    def _judge(self, i: int, groups: Mapping[str, list[Group]]) -> None:
        """What is executed of a site, pairs in their own order."""
        request, slot = self._request, self._request.slots[OWN][i]
        like = groups[OWN][0].runs[slot].own
        bases = {"subspace": torch.from_numpy(self.basis(i)).to(like)}
        if not request.restrict:
            bases |= self._parts(i, slot, bases["subspace"], groups[OWN])
            bases |= {name: torch.from_numpy(self.of(i, name)).to(like) for name in ("mean", "gradient")}
        if request.arbitrary:
            bases["arbitrary"] = torch.from_numpy(self.of(i, f"{OWN} bases")[-1]).to(like)
        self._execute(i, OWN, bases, groups[OWN])
        if UNTRAINED in groups:
            basis = torch.from_numpy(self.of(i, f"{UNTRAINED} bases")[0]).to(like)
            self._execute(i, UNTRAINED, {"subspace": basis}, groups[UNTRAINED])

    def _execute(self, i: int, name: str, bases: Mapping[str, Basis], groups: Sequence[Group]) -> None:
        request, slot, every, names = self._request, self._request.slots[name][i], [], []
        for group in groups:
            runs = group.runs[slot]
            if request.restrict:
                centre = torch.from_numpy(self.of(i, "centre")).to(runs.own)
                sets = restrictions(runs, bases["subspace"], centre, request.random)
            else:
                sets = interchanges(runs, bases, request.random)
            names = [which for which, value in sets.items() for _ in value]
            every.append(group.said(runs, torch.cat([*sets.values()])))
            self._tick("held-out pairs", i, 1.0, judges=True)
        order = np.argsort(request.judged.number)
        whole = {part: np.concatenate([one[part] for one in every], -1)[:, order] for part in every[0]}
        self._keep(i, {f"{name} sets": np.array(names), **{f"{name} {part}": one for part, one in whole.items()}})

    def _parts(self, i: int, slot: Slot, basis: Basis, groups: Sequence[Group]) -> dict[str, Basis]:
        """The parts of a basis that readers see and do not see; how long they are and how values vary along them."""
        columns, who = fitting(lambda: seen(self._request.lm, slot, self._request.readers), "what readers see")
        numbers = {name: np.full(2, np.nan) for name in ("norm", "spread", "moved")}
        split: dict[str, Basis] = {}
        if columns is not None:
            made = halves(basis, columns)
            runs = [group.runs[slot] for group in groups]
            own, there = (torch.cat([getattr(one, name) for one in runs]) for name in ("own", "there"))
            for j, (unit, raw) in enumerate(((made.row, made.row_raw), (made.null, made.null_raw))):
                numbers["norm"][j] = size(raw)
                if len(unit):
                    numbers["spread"][j] = float((torch.cat([own, there]) @ unit.mT).std(0).pow(2).mean().sqrt())
                    numbers["moved"][j] = float(((there - own) @ unit.mT).norm(dim=-1).mean())
            split = {name: part for name, part in made._asdict().items() if len(getattr(made, name.split("_")[0]))}
        self._keep(i, {"who": np.array(who), **numbers})
        return split


def _variance(own: Float[Tensor, "pair d"], centre: Float[Tensor, " d"], basis: Basis) -> Float[Tensor, " rank"]:
    """The part of the values' energy about their mean that lies along the first 0, 1, … directions."""
    away = own - centre
    each = (away @ basis.mT).pow(2).sum(0) / away.pow(2).sum()
    return torch.cat([each.new_zeros(1), each.cumsum(0)])
