"""What survives of every write, compared with what becomes of ordinary writes at the same place? By executed runs.

survival_k = Σ⟨x_k − x_k^{−w}, o_w⟩_m / Σ⟨o_w, o_w⟩_m, x^{−w} the run in which o_w was taken out right after it was
written (Dao, Lau, Rager and Janiak 2023, arXiv 2310.07325, Fig. 3, for all writers at once); ⟨a, b⟩_m = Σ m_i a_i b_i
weighs channels as those read them that come after the write, since a few dimensions that hardly anybody reads hold most
of the energy of some models. What a survival means is said by decoys, which are run exactly as writes are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NumericError, counted, one_of, require, seconds, several, shown, whole
from unwrite.model import readers
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.onednn import fast
from unwrite.model.view import Model
from unwrite.nodes import Node, choose
from unwrite.prompts.tokens import Tokens, array_of
from unwrite.result import Result, build, over_documents, quantity
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Listener, admit, batch_size, fitting, stream
from unwrite.run.loop.trial import clock
from unwrite.run.source.standins import CONTROLS
from unwrite.run.tally.foretold import looked_at, per_prompt
from unwrite.run.tally.survives import FEWER, Removals, SurvivalTally
from unwrite.run.tally.written import MATERIAL, Written, all_written
from unwrite.stats.verdicts import (
    BOUNDS,
    CRITERIA,
    Judged,
    by_document,
    cuts,
    estimate,
    judge,
    left_out,
    parted,
    ratio,
    together,
)

WEIGHTS = ("readers", "raw", "unembed")
CONTROLLED = ("typical", "signs")
# Stages before all others, of survival as they are; the second where there is a budget.
_FIRST = "survival (material)"
_PLAN = "survival (plan)"
# So many prompts say which writes are material, and what one costs.
_SEEN = 4
CUTS = ("nodes", "blocks")
# Decoys of each writer; and of all together so many that a q of a tenth can be reached by a few writers, in a small
# model by one: k that stand out alike have 1 / (k · decoys).
_FEWEST, _MOST, _ALL = 4, 16, 400


@torch.no_grad()
def survival(
    lm: Model,
    tokens: Any,
    writers: Iterable[object] | None = None,
    weigh: Any = "readers",
    controls: Sequence[str] = CONTROLLED,
    decoys: int | None = None,
    skip: int = 1,
    *,
    budget: int | float | str | None = None,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What survives of each write at every later location, who acts on it, and whether that is out of the ordinary.

    Arguments: `tokens`, `mask`, `bos`, `skip` and `checkpoint` as in `uw.scan`; `writers` names of nodes, by default
    all whose write is material (at least 5 % of the stream right after it, in the median); `weigh` how channels count:
    "readers" (as later readers read them), "unembed" (as the unembedding alone does), "raw" (all alike, as in the
    paper), or d_model numbers; `controls` what stands in for a write, the first of them being the decoys: "typical" (a
    mix of what other nodes write there in another prompt), "signs" (a random sign for each channel), "rotated";
    `decoys` of these for each writer (by default 4, or up to 16 until there are 400 in all), and half as many of the
    other controls; `budget` a time (seconds, or "20m"): as many prompts, of as many documents, as a trial says fit in.
    Returns a Result: `survival[writer, location, weigh]` with `survival_low` and `survival_high` (95 % t interval over
    documents), `end` the same at the end of the stream and `median_survival` its median over positions;
    `ordinary[writer, control, bound]`, what becomes of stand-ins (5 %, median, 95 %), `gap` = `end` − that median with
    its interval; `q` and `q_above` by target–decoy competition over all writers: which part of those as low, or high,
    would be so by chance; `verdict`, undecided where it `hangs` on the three channels (`loudest`) that hold most of all
    that is written; `without_loudest`, `end` without these, and `without_sinks`, without rows at which the stream is
    ten times as long as usual. `acts[writer, node]` = what a later node writes along the write because it is there,
    with interval, and its parts `erased` and `filled_in`, which `erased_by[writer, cut]` and `filled_in_by` sum up over
    nodes and whole blocks; `energy_top3`, `participation` of its channels; `rescaled`, mean of log(‖x‖ / ‖x^{−w}‖).
    Raises NodeError for an unknown writer; NumericError where no write is material, for an unknown weight or control, a
    budget that is too small for one prompt; TokensError as `uw.scan`. Example: `uw.survival(lm, tokens).table()`
    """
    read, controls = admit(lm, tokens, mask, skip, bos, sees=True), _require(controls, decoys)
    named, size = choose(writers, lm.parts) if writers is not None else None, _size(lm, read, batch)
    allowed = None if budget is None else seconds("budget is a time", budget)
    asked = {"controls": controls, "decoys": decoys, "skip": skip, "batch": batch, "budget": allowed}
    settings = {"writers": None if named is None else [*map(str, named)], "weigh": _named(lm, weigh), **asked}
    with opened(checkpoint, listener) as job:
        if done := job.begin("survival", lm, {"": read.hash}, settings, in_parts=allowed is None):
            return done
        fit = partial(fitted, lm, writers=named, weigh=weigh, controls=controls, decoys=decoys, skip=skip)
        read = read if allowed is None else _within(read, partial(fit, budget=allowed), job)
        seen = all_written(lm, read, skip, _FIRST, listener, job)
        chosen, loudest = _material(seen, named), seen.loudest(CRITERIA.channels)
        question = _question(lm, read, skip, chosen, weigh, controls, decoys, loudest)
        tally = SurvivalTally(question, job)
        stream(lm, read, tally, size, f"survival of {len(chosen)}", listener, job, divided=True)
        job.together()
        data = _Found(question, tally.whole()).dataset()
        return job.signed(build("survival", data, settings, provenance(lm), {"": read.about()}))


@dataclass(frozen=True)
class Fitted:
    """So many prompts, of which so many writes are taken out, and the seconds that it takes."""

    n: int
    writers: int
    seconds: float


@torch.no_grad()
def fitted(
    lm: Model,
    tokens: Tokens,
    writers: Iterable[object] | None = None,
    weigh: Any = "readers",
    controls: Sequence[str] = CONTROLLED,
    decoys: int | None = None,
    skip: int = 1,
    budget: float | None = None,
) -> Fitted:
    """Of how many of these prompts `survival` finds what survives in a budget of seconds, told by a trial on a few.

    Without a budget, what all take. Raises NumericError where not even one prompt fits, and as `survival`.
    """
    few, now = tokens.spread(_SEEN), clock(lm)
    begun = now()
    named = choose(writers, lm.parts) if writers is not None else None
    with fast(lm.hf):
        seen, look = looked_at(lm, few, skip)
        chosen = _material(seen, named)
        loudest = seen.loudest(CRITERIA.channels)
        taken = look + per_prompt(_question(lm, few, skip, chosen, weigh, _require(controls, decoys), decoys, loudest))
    once = now() - begun
    n = len(tokens) if budget is None else min(len(tokens), int((budget - once) / taken))
    if n < 1:
        raise NumericError(
            "the budget is too small for one prompt", got=f"{budget:.0f} s",
            expected=f"about {once + taken:.0f} s for one of {counted(tokens.length, 'token')} and "
            f"{counted(len(chosen), 'writer')}", fix="allow more, name fewer writers, or read shorter prompts",
        )  # fmt: skip
    return Fitted(n, len(chosen), once + n * taken)


def _within(tokens: Tokens, fit: Callable[[Tokens], Fitted], job: Job) -> Tokens:
    """The prompts that a budget allows; a run that goes on has those that it began with."""
    n = np.zeros(1, dtype=np.int64)
    kept = Ledger({"prompts": n})
    stage = job.stage(_PLAN, 1, tokens.hash)
    if stage.resume(kept):
        n[0] = fit(tokens).n
        stage.done(kept, 0, now=True)
    return tokens.spread(int(n[0]))


def _question(
    lm: Model, tokens: Tokens, skip: int, chosen: Sequence[Node], weigh: Any, controls: Sequence[str],
    decoys: int | None, loudest: tuple[int, ...],
) -> Removals:  # fmt: skip
    draws = stand_ins(len(chosen), controls, decoys)
    return Removals(lm, fold(lm), tokens, skip, chosen, _weights(lm, chosen, weigh), draws, loudest)


def stand_ins(
    writers: int, controls: Sequence[str] = CONTROLLED, decoys: int | None = None, fewest: int = _FEWEST
) -> dict[str, int]:
    """How many stand-ins of each control every one of so many writers gets."""
    each = decoys or min(max(fewest, -(-_ALL // writers)), _MOST)
    # Of the first control a median and a spread are asked for, of the others only the median.
    return {control: each if control == controls[0] else max(1, each // 2) for control in controls}


def _size(lm: Model, tokens: Tokens, batch: int | None) -> int:
    """Prompts at a time: one, whose runs alone fill the rows that go up together, unless somebody says otherwise."""
    return batch_size(lm, tokens, batch, held=2) if batch is not None else 1


def _require(controls: Any, decoys: Any) -> list[str]:
    known = f"some of {', '.join(CONTROLS)}"
    listed = several("controls are names", controls, known, NumericError)
    require(bool(listed), NumericError, "controls are names", listed, known)
    for control in listed:
        one_of("a control", control, tuple(CONTROLS))
    if decoys is not None:
        whole("decoys is a number of stand-ins", decoys, 1)
    return listed


def _named(lm: Model, weigh: Any) -> str | list[float]:
    if isinstance(weigh, str):
        one_of("weigh", weigh, WEIGHTS, also=f"{lm.d_model} numbers")
        return weigh
    numbers = array_of(weigh)
    right = numbers is not None and numbers.dtype.kind in "fiu" and numbers.shape == (lm.d_model,)
    if numbers is None or not right or not (np.isfinite(numbers) & (numbers >= 0)).all() or not numbers.any():
        raise NumericError(
            "weigh is a weight for every channel", got=shown(weigh if numbers is None else numbers),
            expected=f"{lm.d_model} finite numbers, none below 0 and not all 0, or one of {', '.join(WEIGHTS)}",
        )  # fmt: skip
    return [float(number) for number in numbers]


def _weights(lm: Model, writers: Sequence[Node], weigh: Any) -> dict[str, Float[Tensor, "writer d_model"]]:
    """The weights asked for, by their name, and the paper's own beside them."""
    return fitting(lambda: _weighed(lm, writers, weigh), "finding who reads the stream")


def _weighed(lm: Model, writers: Sequence[Node], weigh: Any) -> dict[str, Float[Tensor, "writer d_model"]]:
    even = torch.ones(len(writers), lm.d_model, dtype=lm.compute_dtype, device=lm.device)
    if isinstance(weigh, str) and weigh == "raw":
        return {"raw": even}
    if not isinstance(weigh, str):
        own = torch.as_tensor(np.asarray(_named(lm, weigh)), dtype=even.dtype, device=lm.device)
        return {"own": own.expand_as(even).contiguous(), "raw": even}
    return {weigh: readers.weights(lm, writers, unembedding_only=weigh == "unembed"), "raw": even}


def _material(seen: Written, named: tuple[Node, ...] | None) -> tuple[Node, ...]:
    """The writers that are named, or those whose write is not tiny beside the stream; a bias is none to ask about."""
    found = named or tuple(node for node in seen.material() if node.kind != "bias")
    if not found:
        raise NumericError(
            "no node writes anything material on this text",
            got=f"at most {np.nanmax(seen.relative_norm()):.3f} of the stream",
            expected=f"at least {MATERIAL}", fix="name writers=, or give other text",
        )  # fmt: skip
    return found


class _Found:
    """What was summed up, as a result has it."""

    def __init__(self, asked: Removals, whole: Arrays):
        self.asked, self.lm = asked, asked.lm
        cluster = asked.tokens.cluster
        self.of = {name: by_document(whole[name], cluster) for name in _BY_DOCUMENT}
        self.rows, self.channels = whole["rows"], whole["channels"].sum(0)
        self.sums, self.fewer = asked.sums(whole), asked.sums(whole, FEWER)

    def dataset(self) -> xr.Dataset:
        """Everything, named."""
        found = judge(self.sums, fewer=self.fewer)
        data = xr.Dataset({**self._survival(), **self._judged(found), **self._nodes(), **self._shape()}, self._axes())
        return data.assign_attrs(
            n_prompts=len(self.asked.tokens), documents=self.sums.documents, rows=int(self.of["counted"].sum()),
            sinks=int(self.of["sinks"].sum()), n_nodes=len(self.lm.parts), weigh=next(iter(self.asked.weights)),
        )  # fmt: skip

    def _axes(self) -> dict[str, Any]:
        asked, lm = self.asked, self.lm
        return {
            "writer": [*map(str, asked.writers)], "location": list(lm.locations), "weigh": list(asked.weights),
            "control": list(asked.draws), "bound": list(BOUNDS), "node": list(lm.nodes), "cut": list(CUTS),
        }  # fmt: skip

    def _survival(self) -> dict[str, xr.Variable]:
        axes, alone = ("writer", "location", "weigh"), ("writer",)
        kept = len(self.asked.weights)
        y, x = (left_out(self.of[name][:, :, 0, ..., :kept]) for name in ("y", "x"))
        fewer = [self.of[name][:, :, 0, ..., kept].sum(0) for name in ("y", "x")]
        plain = left_out(self.of["without_sinks"][:, :, 0])[0]
        rows = self.rows.swapaxes(0, 1).reshape(len(self.asked.writers), -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a writer that never writes has no rows
            median = np.nanmedian(rows, 1)
        each = "median over positions of ⟨x − x^{−w}, o_w⟩_m / ⟨o_w, o_w⟩_m"
        return {
            **over_documents(axes, "survival", estimate(ratio(y, x[:, :, None])).ends, _EQUATION),
            "median_survival": quantity(alone, median, "1", each),
            "without_sinks": quantity(alone, ratio(plain[:, 0], plain[:, 1]), "1", "`end` without rows that are sinks"),
            "without_loudest": quantity(
                alone, ratio(fewer[0][:, -1], fewer[1]), "1", "`end` without the channels that hold most of all writes"
            ),
        }

    def _judged(self, found: Judged) -> dict[str, Any]:
        first, alone = next(iter(self.asked.draws)), ("writer",)
        places = [part.range for part in found.ordinary.values()]
        text = f"of a writer's decoys the median, and 5 % to 95 % of the {CRITERIA.near} nearest decoys about theirs"
        return {
            **over_documents(alone, "end", found.survival.ends, f"{_EQUATION} at the end of the stream"),
            "ordinary": quantity(("writer", "control", "bound"), np.stack(places, 1), "1", text),
            **over_documents(alone, "gap", found.gap[first].ends, f"end − median of the writer's {first} decoys"),
            **{name: quantity(alone, getattr(found, name), "1", text) for name, text in _JUDGED.items()},
            "verdict": ("writer", np.array(found.verdict, dtype=object)),
            "hangs": quantity(alone, found.hangs, "", "another verdict without the loudest channels, so none is given"),
            "loudest": quantity(("rank",), np.array(self.asked.loudest), "channels", "Σ_w o_w,i² / ‖o_w‖², the most"),
        }

    def _nodes(self) -> dict[str, xr.Variable]:
        along, acts, x = (left_out(part) for part in (self.sums.along, self.sums.acts, self.sums.x[..., 0]))
        by, energy = ("writer", "node"), x[0][:, None]
        low, high = parted(along[0], acts[0])
        found = {
            **over_documents(
                by, "acts", estimate(ratio(acts, x[..., None])).ends, "a − b = Σ⟨o_e − o_e^{−w}, o_w⟩_m / Σ⟨o_w, o_w⟩_m"
            ),
            "share": quantity(
                by, ratio(along[0], energy), "1", "a = Σ⟨o_e, o_w⟩_m / Σ⟨o_w, o_w⟩_m of nodes after the write"
            ),
            "erased": quantity(by, ratio(low, energy), "1", "min(a, 0) − min(b, 0)"),
            "filled_in": quantity(by, ratio(high, energy), "1", "max(a, 0) − max(b, 0)"),
        }
        block = self.sums.block
        pair = [cuts(along, acts, x), cuts(together(along, block), together(acts, block), x)]
        for name, i in (("erased_by", 0), ("filled_in_by", 1)):
            sets = np.stack([cut[i] for cut in pair], -1)
            found |= over_documents(
                ("writer", "cut"), name, estimate(sets).ends, "summed over nodes, and over whole blocks"
            )
        return found

    def _shape(self) -> dict[str, xr.Variable]:
        axes = ("writer", "weigh")
        e = np.stack([self.channels * weights.cpu().numpy() for weights in self.asked.weights.values()], 1)
        total, three = e.sum(-1), np.sort(e, -1)[..., -3:].sum(-1)
        counted = self.of["counted"].sum()
        rescaled = (self.of["rescaled"] / counted).sum(0)
        return {
            "energy_top3": quantity(
                axes, ratio(three, total), "1", "part of Σ e_i in the three largest, e_i = m_i Σ o_w,i²"
            ),
            "participation": quantity(axes, ratio(total**2, (e**2).sum(-1)), "channels", "(Σ e_i)² / Σ e_i²"),
            "rescaled": quantity(("writer", "location"), rescaled, "1", "mean of log(‖x‖ / ‖x^{−w}‖)"),
        }


_BY_DOCUMENT = ("y", "x", "without_sinks", "rescaled", "sinks", "counted")
_EQUATION = "Σ⟨x − x^{−w}, o_w⟩_m / Σ⟨o_w, o_w⟩_m"
_JUDGED = {
    "z": "gap / scaled median absolute deviation of decoys about theirs, in the nearest layers",
    "q": "of the writers at least as low, the part that would be so by chance: target–decoy competition over all",
    "q_above": "the same of those at least as high",
    "cause": "−1: later nodes write against it because it is there; 1: they fill in when it is gone; 0: undecided",
}
