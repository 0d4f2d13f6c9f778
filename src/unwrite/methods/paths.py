"""What does a node do to an answer through one receiver alone, when it is set to its value in another run?

Path patching in its two meanings, which differ wherever MLPs lie between sender and receiver: Wang et al. 2022
(arXiv 2211.00593), where MLPs recompute, and the direct edge alone (Goldowsky-Dill et al. 2023, arXiv 2304.05969).
(facts: attribution, §1.5)
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

from unwrite.errors import NumericError, one_of
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import names_of
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import RoleNames
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.answer.metrics import Custom, known, metric_of, name_of, parts_of_mean, unit_of_base, unless_own
from unwrite.run.edit.slots import Values
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit_pairs, batch_size, stream
from unwrite.run.replay.clean import Base, base_of
from unwrite.run.replay.edges import Ends, ends
from unwrite.run.replay.paths import MODES, effects_of_edges
from unwrite.run.replay.sweep import placed
from unwrite.run.source.values import Donor, donor
from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import said

_EQUATIONS = {
    "recompute": "metric(base run with the receiver set to what it is when the sender has its source value, all other "
    "heads are held at base, and MLPs and norms recompute) − metric(base run)",
    "frozen": "metric(base run in which the receiver alone reads x + Δ, Δ = the sender's write at its source value − "
    "its write, and its norm of x + Δ) − metric(base run)",
}


@dataclass(frozen=True, eq=False)
class _Request:
    lm: Model
    pairs: Pairs
    ends: Ends
    mode: str
    at: RoleNames
    rows: Int[np.ndarray, "pair role"] | None
    metric: str | Custom
    donor: Donor

    @property
    def cells(self) -> tuple[str, ...]:
        """The axes of an effect."""
        return ("pair", "sender", "receiver", *([] if isinstance(self.at, str) else ["role"]))


@torch.no_grad()
def paths(
    lm: Model,
    pairs: Any,
    senders: str | Iterable[str] = "heads",
    receivers: str | Iterable[str] = "logits",
    mlps: str = "recompute",
    metric: str | Custom = "logit_diff",
    source: str | Model = "source",
    *,
    at: RoleNames = "all",
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What each sender, set to its value in a source run, does to a metric through each receiver alone.

    `mlps` "recompute" (Wang et al. 2022 as commonly used): in a base run the sender has its source value, every other
    head's output is held, MLPs and norms recompute; what the receiver is there is put into a base run in which all that
    follows runs freely. "frozen": the receiver alone reads x + Δ, Δ what the sender writes more, its norm evaluated
    anew; everything else in between stays, so this is the direct edge, and needs no pass up to the receiver. The two
    are one where no MLP lies between.

    Arguments: `pairs` and `bos` as in `uw.effects`; `senders` "heads", "mlp_out", "attn_out", "embed", or names
    ("L0H1", "MLP0", "L0.attn_out", "embed"); `receivers` "heads", "q", "k", "v", "mlp_out", "logits", or names ("L2H3",
    "L2H3.q", "L2KV1.k", "MLP2", "logits": the stream that the final norm reads). "L1H0+MLP2" are several nodes set, or
    reading, at once, as one end. `metric` and `source` as in `uw.effects`; `at`: senders are set at "all" positions at
    once, at the "last", at a role of the pairs ("S2"), or at several, each by itself; receivers read everywhere.
    Returns a Result with `effect[pair, sender, receiver]` (and role, where several are named) in units of the metric;
    its `mean` over pairs with an interval, `base` and `solved` are those of `uw.effects`. An edge that does not exist,
    the receiver lying before the sender or beside it (attention and MLP of a parallel block), is NaN.
    Raises NodeError for a node that is not there or cannot be such an end, and where none of the edges asked for
    exists; NumericError for unknown settings; TokensError for pairs that this model cannot read.

    Example: `uw.paths(lm, pairs, "heads", ["L9H9.q", "logits"], mlps="frozen").table()`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    named = [
        [part] if isinstance(part, str) else names_of(what, part)
        for what, part in (("senders", senders), ("receivers", receivers))
    ]
    found = ends(lm, *named)
    request = _request(lm, pairs, found, mlps, at, metric, source)
    settings = {
        "at": at if isinstance(at, str) else [*at], "senders": named[0], "receivers": named[1], "mlps": mlps,
        "metric": name_of(metric), "source": request.donor.name, "batch": batch,
    }  # fmt: skip
    size, read = batch_size(lm, pairs.base, batch, held=4), pairs.about()
    with opened(unless_own(checkpoint, metric), listener) as job:
        if done := job.begin("paths", lm, {"": read["hash"], **request.donor.read_by}, settings):
            return done
        rows = Rows(partial(_measured, request))
        stream(lm, pairs.base, rows, size, f"paths {mlps}", listener, job)
        data = _dataset(request, rows.whole(), name_of(metric))
        return job.signed(build("paths", data, settings, provenance(lm), {"": read}))


def _request(lm: Model, pairs: Pairs, found: Ends, mlps: str, at: Any, metric: Any, source: Any) -> _Request:
    """Also positions are roles: "last" is the one that is read."""
    if isinstance(at, str) and at == "each":
        raise NumericError(
            "at each position is a run of its own for every edge", got="each", fix="name roles, or 'all'"
        )
    one_of("mlps", mlps, MODES)
    rows = pairs.rows(at)
    if isinstance(at, str) and at == "last":
        rows = pairs.row[:, None], pairs.row[:, None]
    given = donor(lm, pairs, found.sent, source, rows and rows[1])
    return _Request(
        lm, pairs, found, mlps, at if isinstance(at, str) else [*at], rows and rows[0], known(metric, pairs), given
    )


def _sources(request: _Request, rows: slice, base: Base) -> Iterator[Values]:
    """What senders are set to: at all positions, or at one role after the other."""
    given = request.donor.values(rows)
    if request.rows is None:
        yield given
        return
    for role in range(request.rows.shape[1]):
        one = {slot: part[:, role : role + 1] for slot, part in given.items()}
        yield placed(base.values, one, request.rows[rows, role : role + 1])


def _measured(request: _Request, batch: Batch) -> dict[str, np.ndarray]:
    """All edges of a batch of pairs."""
    lm, pairs, rows = request.lm, request.pairs, slice(batch.first, batch.first + batch.real)
    base = base_of(lm, pairs, rows, request.ends.slots)
    metric = metric_of(lm, pairs, request.metric, rows, base.final)
    clean = metric(base.final)
    require_finite(clean.isfinite(), "the metric of {pair} is not finite", pair=batch.first)
    senders, receivers = request.ends.senders, request.ends.receivers
    joins = torch.from_numpy(request.ends.joins).to(clean.device)
    says = "the effect of {pair} from {sender} through {receiver} is not finite"
    every = []
    for source in _sources(request, rows, base):
        found = torch.where(joins, 0.0, torch.nan).to(clean.dtype).repeat(len(base.row), 1, 1)
        for pair, sender, receiver, final in effects_of_edges(base, source, request.ends, request.mode):
            found[pair, sender, receiver] = metric(final, pair) - clean[pair]
        require_finite(found.isfinite() | ~joins, says, pair=batch.first, sender=[*senders], receiver=[*receivers])
        every.append(found)
    effect = torch.stack(every, -1) if len(request.cells) == 4 else every[0]
    solved = metric.solved(final_normed(lm, base.final))
    return {
        name: part.double().cpu().numpy() for name, part in (("base", clean), ("solved", solved), ("effect", effect))
    }


def _dataset(request: _Request, whole: dict[str, np.ndarray], unit: str) -> xr.Dataset:
    """Everything that was found, named."""
    pairs, solved = request.pairs, whole["solved"] > 0
    above, below = parts_of_mean(request.metric, whole["base"], whole["effect"])
    variables: dict[str, Any] = {
        "base": quantity(("pair",), whole["base"], unit_of_base(request.metric), "metric of the base run"),
        "effect": quantity(request.cells, above / below.mean(), unit, _EQUATIONS[request.mode]),
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
    return data.assign_attrs(solves=said(int(solved.sum()), len(solved), pairs.chance))
