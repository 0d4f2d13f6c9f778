"""What does a node do to an answer through one receiver alone, when it is set to its value in another run?

Path patching in its two meanings, which differ wherever MLPs lie between sender and receiver: Wang et al. 2022
(arXiv 2211.00593), where MLPs recompute, and the direct edge alone (Goldowsky-Dill et al. 2023, arXiv 2304.05969).
The second as slopes guess it, all edges at once: EAP (Syed et al. 2023, arXiv 2310.10348) and EAP-IG (Hanna et al.
2024, arXiv 2403.17806). (facts: attribution, §1.5, §2.2, §4.1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from unwrite.errors import NumericError, one_of, whole
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
from unwrite.run.backward.edges import EdgeContrast, attributed_edges, require_read
from unwrite.run.edit.slots import Values
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, Progress, admit_pairs, batch_size, stream
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edges import Ends, ends
from unwrite.run.replay.paths import MODES, effects_of_edges
from unwrite.run.replay.sweep import placed
from unwrite.run.source.values import Donor, donor, require_way
from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import said

_EQUATIONS = {
    "recompute": "metric(base run with the receiver set to what it is when the sender has its source value, all other "
    "heads are held at base, and MLPs and norms recompute) − metric(base run)",
    "frozen": "metric(base run in which the receiver alone reads x + Δ, Δ = the sender's write at its source value − "
    "its write, and its norm of x + Δ) − metric(base run)",
    "eap": "⟨Δ, ∂metric/∂x⟩, x the stream as the receiver alone reads it, before its norm, Δ = the sender's write at "
    "its source value − its write; the derivative of the executed edge along Δ",
    "eap-ig": "⟨Δ, 1/m Σ_{k=1…m} ∂metric/∂x in a run on e_source + k/m (e_base − e_source)⟩, e the embeddings, x and "
    "Δ as in eap",
}
SLOPES = ("eap", "eap-ig")
METHODS = ("exact", *SLOPES)


@dataclass(frozen=True, eq=False)
class _Request:
    lm: Model
    pairs: Pairs
    ends: Ends
    method: str
    mlps: str
    steps: int
    at: RoleNames
    rows: Int[np.ndarray, "pair role"] | None
    metric: str | Custom
    donor: Donor

    @property
    def is_exact(self) -> bool:
        """Are edges executed?"""
        return self.method == "exact"

    @property
    def cells(self) -> tuple[str, ...]:
        """The axes of an effect."""
        return ("pair", "sender", "receiver", *([] if isinstance(self.at, str) else ["role"]))


@torch.inference_mode(False)  # backward passes may be needed, also where the caller has none in mind
@torch.no_grad()
def paths(
    lm: Model,
    pairs: Any,
    senders: str | Iterable[str] = "heads",
    receivers: str | Iterable[str] = "logits",
    mlps: str | None = None,
    metric: str | Custom = "logit_diff",
    source: str | Model = "source",
    *,
    method: str = "exact",
    steps: int = 5,
    at: RoleNames = "all",
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What each sender, set to its value in a source run, does to a metric through each receiver alone.

    `mlps` "recompute" (Wang et al. 2022 as commonly used; the default where edges are executed): in a base run the
    sender has its source value, every other head's output is held, MLPs and norms recompute; what the receiver is there
    is put into a base run in which all that follows runs freely. "frozen": the receiver alone reads x + Δ, Δ what the
    sender writes more, its norm evaluated anew; all between stays: the direct edge. They are one where no MLP lies
    between. `method` "exact" executes edges; "eap" (Syed et al. 2023) and "eap-ig" in `steps` (Hanna et al. 2024) guess
    direct ones by slopes, all for a few passes: ⟨Δ, ∂metric/∂x⟩, the slope at the base run, or its mean over runs on
    e_source + k/m (e_base − e_source), k = 1…m.

    Arguments: `pairs` and `bos` as in `uw.effects`; `senders` "heads", "mlp_out", "attn_out", "embed", or names
    ("L0H1", "MLP0", "L0.attn_out"); `receivers` "heads", "q", "k", "v", "mlp_out", "logits", or names ("L2H3",
    "L2H3.q", "L2KV1.k", "MLP2", "logits": the stream that the final norm reads); "all" of both: every single node, and
    what each reads, keys and values once for heads that share them. "L1H0+MLP2" are several nodes set, or reading, at
    once. `metric` and `source` as in `uw.effects`; `at`: senders are set at "all" positions at once, at the "last", at
    a role of the pairs ("S2"), or at several, each by itself; receivers read everywhere.
    Returns a Result with `effect[pair, sender, receiver]` (and role, where several are named) in units of the metric;
    its `mean` over pairs with an interval, `base` and `solved` are those of `uw.effects`; the attributes `cost` and
    `readers` (how many receivers). An edge that does not exist, the receiver lying before the sender or beside it (in a
    parallel block), is NaN.
    Raises NodeError for a node that is not there or cannot be such an end, and where none of the edges asked for
    exists; NumericError for unknown settings; TokensError for pairs that this model cannot read.

    Example: `uw.paths(lm, pairs, "all", "all", method="eap-ig").table()`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    names = {"senders": senders, "receivers": receivers}
    asked = {what: [one] if isinstance(one, str) else names_of(what, one) for what, one in names.items()}
    request = _request(lm, pairs, ends(lm, *asked.values()), (method, mlps, steps), at, metric, source)
    size, read = batch_size(lm, pairs.base, batch, _held(request)), pairs.about()
    settings = asked | _settings(request) | {"batch": batch}
    with opened(unless_own(checkpoint, metric), listener) as job:
        if done := job.begin("paths", lm, {"": read["hash"], **request.donor.read_by}, settings):
            return done
        data = _found(request, size, job, listener)
        return job.signed(build("paths", data, settings, provenance(lm), {"": read}))


def _settings(request: _Request) -> dict[str, Any]:
    """What was asked, as a result keeps it."""
    return {
        "at": request.at, "method": request.method, "mlps": request.mlps, "steps": request.steps,
        "metric": name_of(request.metric), "source": request.donor.name,
    }  # fmt: skip


def _found(request: _Request, size: int, job: Job, listener: Listener | None) -> xr.Dataset:
    tally, cost, base = Rows(partial(_measured, request)), _cost(request), request.pairs.base
    # What it will take is said before it starts.
    stage = f"paths {request.mlps if request.is_exact else request.method}, {cost:,.0f} passes"
    if listener is not None:
        listener(Progress(stage, 0, len(base), 0, 0.0))
    stream(request.lm, base, tally, size, stage, listener, job)
    return _dataset(request, tally.whole(), name_of(request.metric)).assign_attrs(cost=cost)


def _request(
    lm: Model, pairs: Pairs, found: Ends, how: tuple[Any, Any, Any], at: Any, metric: Any, source: Any
) -> _Request:
    """Also positions are roles: "last" is the one that is read."""
    if isinstance(at, str) and at == "each":
        raise NumericError(
            "at each position is a run of its own for every edge", got="each", fix="name roles, or 'all'"
        )
    method, mlps, steps = how
    one_of("method", method, METHODS)
    mlps = _mlps(method, mlps)
    steps = whole("steps is a number of steps", steps, 1)
    steps = steps if method == "eap-ig" else 1
    if method != "exact":
        require_slope(metric, method, method == "eap" or steps == 1)
        require_read(found)
    if method == "eap-ig":
        require_way(pairs, source, method)
    rows = pairs.rows(at)
    if isinstance(at, str) and at == "last":
        rows = pairs.row[:, None], pairs.row[:, None]
    where, metric = at if isinstance(at, str) else [*at], known(metric, pairs)
    given = donor(lm, pairs, found.sent, source, rows and rows[1])
    return _Request(lm, pairs, found, method, mlps, steps, where, rows and rows[0], metric, given)


def _mlps(method: str, mlps: Any) -> str:
    """What MLPs do. Raises NumericError for what is unknown, and for what slopes do not say."""
    mlps = ("recompute" if method == "exact" else "frozen") if mlps is None else mlps
    one_of("mlps", mlps, MODES)
    if method != "exact" and mlps != "frozen":
        raise NumericError(
            f"{method} guesses direct edges, past all MLPs between", got=f"mlps={mlps!r}", expected="mlps='frozen'",
            fix="leave mlps out, or use method='exact'",
        )  # fmt: skip
    return mlps


def _held(request: _Request) -> int:
    """How many runs' worth of writes a batch holds: of a guess what each sender writes more, twice as it is put up."""
    return 4 if request.is_exact else 4 + 2 * len(request.ends.senders) // (2 * len(request.lm.layers) + 2)


def _cost(request: _Request) -> float:
    """Passes over one prompt that each pair takes, forward ones and backward ones: of whole prompts, at most.

    Of a guess those of the model. What goes from each receiver back to the stream is not counted.
    """
    if not request.is_exact:
        return float(3 if request.method == "eap" else 2 + 2 * request.steps)
    layers, joins = len(request.lm.layers), request.ends.joins
    behind = [layers - min(site.layer for site in sites) for sites in request.ends.receivers.values()]
    began = [layers - max(0, min(write.layer for write in own)) for own in request.ends.senders.values()]
    first = sum(began) if request.mlps == "recompute" else 0
    roles = 1 if request.rows is None else request.rows.shape[1]
    return 2 + roles * float(joins.sum(0) @ np.array(behind) + first) / layers


def _sources(request: _Request, rows: slice, base: Values) -> Iterator[Values]:
    """What senders are set to: at all positions, or at one role after the other."""
    given = request.donor.values(rows)
    if request.rows is None:
        yield given
        return
    for role in range(request.rows.shape[1]):
        one = {slot: part[:, role : role + 1] for slot, part in given.items()}
        yield placed(base, one, request.rows[rows, role : role + 1])


def _measured(request: _Request, batch: Batch) -> dict[str, np.ndarray]:
    """All edges of a batch of pairs, executed or guessed."""
    rows = slice(batch.first, batch.first + batch.real)
    clean, solved, every = _executed(request, rows) if request.is_exact else _guessed(request, rows)
    require_finite(clean.isfinite(), "the metric of {pair} is not finite", pair=batch.first)
    joins = torch.from_numpy(request.ends.joins).to(clean.device)
    names = {"sender": [*request.ends.senders], "receiver": [*request.ends.receivers]}
    says = "the effect of {pair} from {sender} through {receiver} is not finite"
    for found in every:
        require_finite(found.isfinite() | ~joins, says, pair=batch.first, **names)
    there = [found.masked_fill(~joins, torch.nan) for found in every]
    effect = torch.stack(there, -1) if len(request.cells) == 4 else there[0]
    return {name: part.double().cpu().numpy() for name, part in
            (("base", clean), ("solved", solved), ("effect", effect))}  # fmt: skip


def _executed(request: _Request, rows: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The metric of base runs, whether they solve it, and effects of every edge for each of the sources."""
    lm, every = request.lm, []
    base = base_of(lm, request.pairs, rows, request.ends.slots)
    metric = metric_of(lm, request.pairs, request.metric, rows, base.final)
    clean = metric(base.final)
    require_finite(clean.isfinite(), "the metric of {pair} is not finite", pair=rows.start)
    for source in _sources(request, rows, base.values):
        found = clean.new_zeros(len(base.row), *request.ends.joins.shape)
        for pair, sender, receiver, final in effects_of_edges(base, source, request.ends, request.mlps):
            found[pair, sender, receiver] = metric(final, pair) - clean[pair]
        every.append(found)
    return clean, metric.solved(final_normed(lm, base.final)), every


def _guessed(request: _Request, rows: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same by slopes; the base run is the first of those whose slopes are taken."""
    lm, pairs = request.lm, request.pairs
    row = torch.from_numpy(pairs.row[rows]).to(lm.device)
    place = torch.arange(len(row), device=row.device)
    against_clean = isinstance(request.metric, str) and request.metric == "kl"
    clean = base_of(lm, pairs, rows, ()).final if against_clean else None
    metric, seen = metric_of(lm, pairs, request.metric, rows, clean), []

    def read(normed: Tensor) -> Tensor:
        value = metric.of(normed[place, row])
        if not seen:
            seen.extend((value.detach(), metric.solved(normed[place, row])))
        return value

    asked = EdgeContrast(torch.from_numpy(pairs.base.ids[rows]), request.ends, read)
    every = attributed_edges(asked, partial(_sources, request, rows), request.donor.ids(rows), request.steps)
    return seen[0], seen[1], every


def _dataset(request: _Request, whole: dict[str, np.ndarray], unit: str) -> xr.Dataset:
    """Everything that was found, named."""
    pairs, solved = request.pairs, whole["solved"] > 0
    equation = _EQUATIONS[request.mlps if request.is_exact else request.method]
    above, below = parts_of_mean(request.metric, whole["base"], whole["effect"])
    variables: dict[str, Any] = {
        "base": quantity(("pair",), whole["base"], unit_of_base(request.metric), "metric of the base run"),
        "effect": quantity(request.cells, above / below.mean(), unit, equation),
        "solved": quantity(("pair",), solved, "1", "does the answer beat all choices in the base run?"),
        "row": ("pair", pairs.row), "first": ("pair", pairs.first),
    }  # fmt: skip
    words = ("Σ over pairs / their number, or Σ of base", *("its 95 % interval, jackknife over templates",) * 2)
    means = zip(("mean", "mean_low", "mean_high"), ratio(above, below, pairs.cluster), words, strict=True)
    variables |= {name: quantity(request.cells[1:], part, unit, how) for name, part, how in means}
    texts = pairs.words(request.lm.tokenizer)
    variables |= {name: ("pair", np.array(part, dtype=object)) for name, part in texts.items()}
    coordinates = {
        "pair": np.arange(len(pairs)), "sender": list(request.ends.senders), "receiver": list(request.ends.receivers),
        "role": [*request.at],
    }  # fmt: skip
    data = xr.Dataset(variables, {name: coordinates[name] for name in request.cells})
    return data.assign_attrs(
        solves=said(int(solved.sum()), len(solved), pairs.chance), readers=len(request.ends.receivers)
    )
