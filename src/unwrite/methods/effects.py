"""What does each node do to an answer, when it is set to its value in another run, or as far as a slope can guess?

effect = metric(base run with the node set to its value in the source run) − metric(base run). One quantity, several
estimators: executed (exact), AtP (Nanda 2023), AtP* (Kramár et al. 2024, arXiv 2403.00745), RelP (Jafari et al. 2025,
arXiv 2508.21258), integrated gradients (conductance). (facts: attribution)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import one_of, whole
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import names_of
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import RoleNames
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.answer.metrics import (
    Custom,
    known,
    metric_of,
    name_of,
    parts_of_mean,
    require_slope,
    unit_of_base,
    unless_own,
)
from unwrite.run.backward.estimates import Contrast, Summed, attributed, integrated, star
from unwrite.run.backward.rules import RULES, Rules
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Begun, Ledger
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, Progress, admit_pairs, batch_size, stream
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.sweep import forwards, patched, patches, placed
from unwrite.run.source.values import Donor, donor, require_way
from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import said

_RULED: Mapping[str, Rules] = {
    "atp": RULES["gradient"], "relp": RULES["relp"], "direct": RULES["direct"], "net": RULES["net"],
}  # fmt: skip
METHODS = ("exact", "atp", "atp*", "relp", "ig", "direct", "net")
_STEPS = 10
_EQUATION = "metric(base run with the node set to its source value) − metric(base run)"


@dataclass(frozen=True, eq=False)
class _Request:
    """What is asked: of which pairs, of which nodes, at which positions, by which estimator.

    `rows` of base prompts where `at` names roles.
    """

    lm: Model
    pairs: Pairs
    slots: tuple[Slot, ...]
    at: RoleNames
    rows: Int[np.ndarray, "pair role"] | None
    method: str | Rules
    metric: str | Custom
    donor: Donor
    steps: int

    @property
    def names(self) -> list[str]:
        """Names of the nodes, in the order in which a pass reaches them."""
        return [name for slot in self.slots for name in slot.names]

    @property
    def cells(self) -> tuple[str, ...]:
        """The axes of an effect."""
        if self.at == "each":
            return ("pair", "node", "position")
        return ("pair", "node") if isinstance(self.at, str) else ("pair", "node", "role")

    @property
    def each(self) -> bool:
        """Is every position, or every role, by itself?"""
        return self.at == "each" or self.rows is not None


@torch.inference_mode(False)  # backward passes are needed, also where the caller has none in mind
def effects(
    lm: Model,
    pairs: Any,
    nodes: str | Iterable[str] = "heads",
    at: RoleNames = "each",
    method: str | Rules = "exact",
    metric: str | Custom = "logit_diff",
    source: str | Model = "source",
    *,
    steps: int = _STEPS,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What replacing each node by its value in a source run does to a metric of the base run's logits.

    Arguments: `pairs` from `uw.pairs` or `uw.tasks`, or what `uw.pairs` takes as a tuple, a dict, a list of dicts or a
    file, read by the model's tokenizer with `bos` as in `uw.text`; `nodes` a kind ("heads": z, "q", "k", "v",
    "shared_k", "shared_v", "attn_out", "mlp_out", "neurons", "resid", "embed") or names ("L2H3", "L2H3.k", "L2KV1.k",
    "L2.attn_out", "MLP2", "MLP2.act[17]", "resid_mid2"); `at` "each" position by itself, "all" positions at once, the
    "last", which is the row that is read, or a role of the pairs ("S2"), or several, each by itself; `method` "exact"
    (executed), "atp", "atp*", "relp", "ig", "direct", "net", or `uw.Rules`; `metric` "logit_diff", "log_prob", "prob",
    "kl", "top", "match", "restricted", "centred", "fldd", or a function from logits [pair, vocabulary] to a number
    each; `source` where values come from: the pairs' "source" prompts, their "mean" over pairs, "zero", "resample" (the
    next pair's source prompt), or another model of the same shape, which reads the source prompts; `steps` of "ig";
    `checkpoint` as in `uw.scan`; an exact sweep keeps what is done inside a batch, too.
    Returns a Result with `effect[pair, node, position]` (no position unless at="each", then NaN behind the row that is
    read; a role instead where several are named) in units of the metric; unless at="each" its `mean` over pairs with
    `mean_low` and `mean_high` (95 %, jackknife over templates, or pairs); `base[pair]`, the metric of the base run;
    `solved[pair]`, whether its answer beats the choices, and the attribute `solves`, that in words; `row` and `first`
    (the first position at which the prompts differ). "top" counts right answers, "match" is the interchange accuracy,
    "restricted" the loss over the choices, "centred" the answer's logit less the mean of the choices', "fldd" 100 · (1
    − patched / clean logit difference). "atp*": `effect` is GradDrop's magnitude, `signed` AtP with the QK fix. "ig":
    `effect` is conductance, `inputs` the endpoints' difference times the mean slope. Numbers are a naive loop's, to
    rounding.
    Raises NodeError for a node that is not there, NumericError for unknown settings, TokensError for pairs that this
    model cannot read.

    Example: `uw.effects(lm, pairs, "heads", method="relp").table()`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    nodes = nodes if isinstance(nodes, str) else names_of("nodes", nodes)
    request = _request(lm, pairs, nodes, at, method, metric, source, steps)
    size, model, read = batch_size(lm, pairs.base, batch, held=4), provenance(lm), pairs.about()
    settings = {
        "nodes": nodes, "at": at if isinstance(at, str) else [*at], "method": name_of(method),
        "metric": name_of(metric), "source": request.donor.name, "steps": steps, "batch": batch,
    }  # fmt: skip
    asked = {**settings, "nodes": request.names}
    with opened(unless_own(checkpoint, metric), listener) as job:
        if done := job.begin("effects", lm, {"": read["hash"], **request.donor.read_by}, asked):
            return done
        data = _found(request, size, job, listener)
        return job.signed(build("effects", data, settings, model, {"": read}))


def _found(request: _Request, size: int, job: Job, listener: Listener | None) -> xr.Dataset:
    tally, cost, base = _Tally(request, job), _cost(request), request.pairs.base
    # What a sweep will take is said before it starts.
    is_long = request.method == "exact" and listener is not None
    stage = f"exact, {cost:,.0f} passes" if is_long else f"effects {name_of(request.method)}"
    if listener is not None:
        listener(Progress(stage, 0, len(base), 0, 0.0))
    stream(request.lm, base, tally, size, stage, listener, job)
    return _dataset(request, tally.whole()).assign_attrs(cost=cost)


def _request(
    lm: Model, pairs: Pairs, nodes: Any, at: RoleNames, method: Any, metric: Any, source: Any, steps: int
) -> _Request:
    rows = pairs.rows(at)
    _require_settings(method, metric, steps)
    moved = rows is not None and bool((rows[0] != rows[1]).any())
    # The same prompt at another row is another value.
    if isinstance(source, str) and source == "source" and not moved:
        pairs.require_differences()
    if method == "ig":
        require_way(pairs, source, method)
    asked, metric = slots(lm, nodes), known(metric, pairs)
    given = donor(lm, pairs, asked, source, rows and rows[1])
    where = at if isinstance(at, str) else [*at]
    return _Request(lm, pairs, asked, where, rows and rows[0], method, metric, given, steps)


def _require_settings(method: Any, metric: Any, steps: Any) -> None:
    if not isinstance(method, Rules):
        one_of("method", method, METHODS, also="uw.Rules")
    whole("steps is a number of steps", steps, 1)
    if method != "exact":
        require_slope(metric, name_of(method), method != "ig")


class _Tally:
    """Effects of all pairs, filled in batch by batch; of executed ones also those of the batch that is not done."""

    def __init__(self, request: _Request, job: Job):
        self._request, self._job = request, job
        self._rows = Rows(self._measured)
        self._begun = Begun()
        self.kept = Ledger({"done": self._rows.kept, "begun": self._begun.kept})
        self.step, self.whole = self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> Arrays:
        request, rows = self._request, slice(batch.first, batch.first + batch.real)
        made = self._executed(rows) if request.method == "exact" else _guessed(request, rows)
        found = {name: part.double().cpu().numpy() for name, part in made.items()}
        _require_finite(request, rows, found)
        return found

    @torch.no_grad()
    def _executed(self, rows: slice) -> dict[str, Tensor]:
        """Effects of really patched runs."""
        request, lm, pairs = self._request, self._request.lm, self._request.pairs
        base = base_of(lm, pairs, rows, request.slots)
        row = base.row
        metric = metric_of(lm, pairs, request.metric, rows, base.final)
        clean = metric(base.final)
        held, done = self._begun.held(
            _name(rows), {"effect": clean.new_zeros(len(row), pairs.base.length, len(request.names))}
        )
        found = held["effect"]
        offset = dict(zip(request.slots, np.cumsum([0, *(len(slot.units) for slot in request.slots)]), strict=False))
        source, at = request.donor.values(rows), "each" if request.each else str(request.at)
        if request.rows is not None:
            source = placed(base.values, source, request.rows[rows])
        for start, jobs in patches(base, source, at):
            if start < done:
                continue
            place = start if request.each else 0
            for part, final in patched(base, source, jobs, start, at == "all"):
                change = metric(final, part.pair) - clean[part.pair]
                found[part.pair, place, part.unit + int(offset[part.slot])] = change
            self._begun.keep(_name(rows), held, start + 1)
            length = found.shape[1]
            self._job.tick(self.kept, (start + 1) / length, f"{start + 1}/{length} positions")
        self._begun.clear()
        found = _taken(request, rows, row, found) if request.each else found[:, :1]
        solved = metric.solved(final_normed(lm, base.final))
        return {"base": clean, "solved": solved, "effect": _shaped(request, found, row)}


def _dataset(request: _Request, whole: Arrays) -> xr.Dataset:
    """Everything that was found, named."""
    pairs, unit = request.pairs, name_of(request.metric)
    solved, base = whole.pop("solved") > 0, whole.pop("base")
    variables: dict[str, Any] = {
        "base": quantity(("pair",), base, unit_of_base(request.metric), _equation(request, "base"))
    }
    for name, part in whole.items():
        above, below = parts_of_mean(request.metric, base, part)
        variables[name] = quantity(request.cells, above / below.mean(), unit, _equation(request, name))
        if name == "effect" and request.at != "each":
            words = ("Σ over pairs / their number, or Σ of base", *("its 95 % interval, jackknife over templates",) * 2)
            means = zip(("mean", "mean_low", "mean_high"), ratio(above, below, pairs.cluster), words, strict=True)
            variables |= {mean: quantity(request.cells[1:], found, unit, how) for mean, found, how in means}
    variables["solved"] = quantity(("pair",), solved, "1", "does the answer beat all choices in the base run?")
    variables |= {"row": ("pair", pairs.row), "first": ("pair", pairs.first)}
    variables |= {
        name: ("pair", np.array(words, dtype=object)) for name, words in pairs.words(request.lm.tokenizer).items()
    }
    axes = {
        "pair": np.arange(len(pairs)), "node": request.names, "position": np.arange(pairs.base.length),
        "role": [*request.at],
    }  # fmt: skip
    tokens = pairs.each(request.lm.tokenizer) if request.at == "each" else {}
    data = xr.Dataset(variables, {name: axes[name] for name in request.cells} | tokens)
    return data.assign_attrs(solves=said(int(solved.sum()), len(solved), pairs.chance))


def _require_finite(request: _Request, rows: slice, found: Mapping[str, np.ndarray]) -> None:
    """Raise NumericError naming the first pair, and node, whose number is none."""
    seen = np.arange(request.pairs.base.length) <= request.pairs.row[rows, None, None]
    place: tuple[str, Any] = ("position", 0) if request.at == "each" else ("role", [*request.at])
    for name, part in found.items():
        finite = np.isfinite(part) | (~seen if request.at == "each" and part.ndim == 3 else False)
        cell = " ".join(("{pair}", "with {node}", f"at {{{place[0]}}}")[: part.ndim])
        axes = dict([("pair", rows.start), ("node", request.names), place][: part.ndim])
        require_finite(finite, f"the {'metric' if name == 'base' else name} of {cell} is not finite", **axes)


def _equation(request: _Request, name: str) -> str:
    special = {"base": "metric of the base run", "signed": "AtP with the QK fix", "inputs": "Δ times the mean slope"}
    return special.get(
        name, _EQUATION if request.method == "exact" else f"{name_of(request.method)} estimate of {_EQUATION}"
    )


def _cost(request: _Request) -> float:
    """Passes over one prompt that each pair takes, forward ones and backward ones (to activations alone)."""
    layers = len(request.lm.layers)
    if request.method == "exact":
        at = str(request.at) if request.rows is None else request.rows
        return forwards(request.lm, request.slots, request.pairs.row, request.pairs.first, at)
    backwards = {"atp*": 1 + (layers - 1) / 2, "ig": request.steps}
    passes = {"atp*": 3, "ig": 2 * request.steps + 4}
    name = request.method if isinstance(request.method, str) else ""
    return float(passes.get(name, 2) + backwards.get(name, 1))


def _name(rows: slice) -> str:
    return f"pairs {rows.start} to {rows.stop}"


def _shaped(request: _Request, found: Float[Tensor, "pair place node"], row: Tensor) -> Tensor:
    """As a result has it: [pair, node], or by position (NaN behind the row that is read) or role."""
    if request.at == "each":
        behind = torch.arange(found.shape[1], device=row.device) > row[:, None]
        found = found.masked_fill(behind[..., None], torch.nan)
    return found.transpose(1, 2) if len(request.cells) == 3 else found.sum(1)


def _guessed(request: _Request, rows: slice) -> dict[str, Tensor]:
    """Effects as slopes have it."""
    lm, pairs = request.lm, request.pairs
    row = torch.from_numpy(pairs.row[rows]).to(lm.device)
    ids = torch.from_numpy(pairs.base.ids[rows])
    against_clean = isinstance(request.metric, str) and request.metric == "kl"
    clean = base_of(lm, pairs, rows, ()).final if against_clean else None
    metric = metric_of(lm, pairs, request.metric, rows, clean)
    place = torch.arange(len(row), device=row.device)
    seen: list[Tensor] = []

    solved: list[Tensor] = []

    def read(normed: Tensor) -> Tensor:
        solved.append(metric.solved(normed[place, row]))
        seen.append(metric.of(normed[place, row]))
        return seen[-1]

    asked = Contrast(lm, ids, request.slots, read)
    made = _estimates(request, rows, asked, row)
    shaped = {name: torch.cat([part[slot] for slot in request.slots], -1) for name, part in made.items()}
    base = {"base": seen[0].detach(), "solved": solved[0]}
    if request.method == "ig":  # its first pass is no base run
        with torch.no_grad():
            final = final_normed(lm, base_of(lm, pairs, rows, ()).final)
            base = {"base": metric.of(final), "solved": metric.solved(final)}
    return base | {name: _shaped(request, part, row) for name, part in shaped.items()}


def _estimates(request: _Request, rows: slice, asked: Contrast, row: Tensor) -> dict[str, Summed]:
    """By the name of the result's variable."""
    summed = partial(_taken, request, rows, row)
    if request.method == "ig":
        found = dict(zip(("effect", "inputs"), integrated(asked, request.donor.ids(rows), request.steps), strict=True))
        return {name: {slot: summed(part) for slot, part in one.items()} for name, one in found.items()}
    source = request.donor.values(rows)
    if request.rows is not None:  # what is not asked for is not looked at
        length = request.pairs.base.length
        nothing = {slot: part.new_zeros(len(part), length, *part.shape[2:]) for slot, part in source.items()}
        source = placed(nothing, source, request.rows[rows])
    if request.method == "atp*":
        magnitude, signed = star(asked, source, summed)
        return {"effect": magnitude, "signed": {slot: summed(part) for slot, part in signed.items()}}
    rules = request.method if isinstance(request.method, Rules) else _RULED[request.method]
    return {"effect": {slot: summed(part) for slot, part in attributed(asked, source, rules).items()}}


def _taken(
    request: _Request, rows: slice, row: Tensor, found: Float[Tensor, "pair position unit"]
) -> Float[Tensor, "pair _ unit"]:
    """RoleNames as they are asked for: each, the sum of all, the one that is read, or those of the roles."""
    pair = torch.arange(len(row), device=found.device)[:, None]
    if request.rows is not None:
        return found[pair, torch.from_numpy(request.rows[rows]).to(found.device)]
    if request.at == "each":
        return found
    return found.sum(1, keepdim=True) if request.at == "all" else found[pair, row[:, None]]
