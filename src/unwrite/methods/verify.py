"""What survives of a write, and who removes it because of it? Answered by executed runs without the write.

level = background + survival, survival_k = Σ⟨x_k − x_k^{−w}, o_w⟩ / Σ‖o_w‖², x^{−w} the run in which o_w is subtracted
right after it is written. Any vector decays, so survival is compared with that of randomly rotated writes (generic).
erased_e = min(a, 0) − min(b, 0) and filled_in_e = max(a, 0) − max(b, 0), with a, b the share of e onto the clean o_w
with and without the write; they sum to survival − 1. Beside it the algebra of eq. 3 and the paper's intervention
(Fig. 3) of Dao, Lau, Rager and Janiak 2023 (arXiv 2310.07325).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import stats

from unwrite.errors import NumericError, counted
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.readers import weights
from unwrite.model.view import Model
from unwrite.nodes import MLPS, Node, choose, parse_node, require_readers
from unwrite.prompts.tokens import Tokens, spelled
from unwrite.result import QUANTILES, Result, build, quantity
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit, admit_floor, batch_size, fitting, stream
from unwrite.run.tally.by_position import EXAMPLES, SHOWN, first_of_groups
from unwrite.run.tally.decodable import RIDGE
from unwrite.run.tally.survives import ALONE, FEWER, Removals, SurvivalTally
from unwrite.run.tally.without import CONDITIONS, READ_ROTATIONS, ROTATIONS, WithoutTally
from unwrite.run.tally.written import all_written
from unwrite.stats import verdicts
from unwrite.stats.jackknife import FEWEST
from unwrite.stats.verdicts import CRITERIA, Judged, judge

BOUNDS = ("low", "mean", "high")
# The paper's erasers: later nodes whose median PR is at most this.
OPPOSES = -0.05
_FEWEST = 3
_LOWER = "give more text, or a lower floor"
# A share below this is no finding, however significant.
MATERIAL_SHARE = 0.02


@torch.no_grad()
def verify(
    lm: Model,
    tokens: Any,
    writer: object,
    erasers: Iterable[object] | None = None,
    skip: int = 1,
    floor: float = 1e-4,
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What survives of one node's write, from executed runs without it, and which later nodes act because of it.

    Arguments: as `uw.scan`; `writer` one node; `erasers` the nodes whose layers the writer is hidden from in the
    paper's view, by default later nodes with a median PR of at most −0.05, or the three lowest. Use other prompts than
    those that chose the writer.
    Returns a Result: `survival`, `background`, `generic` (low, mean, high over rotations) and `gap` = survival −
    generic, by location; `erased`, `filled_in`, `share`, `share_without`, `class` by later node; `verdict`, a word by
    the rules of `uw.survival` but for q; `weighed`, survival at the end as later readers weigh channels, with
    interval, and `ordinary`, that of stand-ins in its place (5 %, median, 95 %); through values (pattern, norms and
    gates frozen) `v_pr`, `v_share`, `v_survival`, `causal_share` = `caused` / `opposed` and `opposed_pr`, quantiles of
    the erasers' summed ratio; the paper's view `pr`, `level`, clean and patched; `space`, the stream's energy in the
    head's own output space, `into_space` that of every node's write; `read`, the part of a node's energy that it
    writes because it reads the write (heads and mixers through values; MLPs one-reader: D = MLP(x) − MLP(x − o_w)),
    `read_generic` the same for turned writes, `readers` the nodes above that (below six documents none: `read_note`);
    `one_reader_share` of MLPs, D along the write; `decodable`, held-out R² of a linear map of the write's token part
    (NaN: `decodable_note`); `level_at` and `survival_at` the end, by groups of positions from `place` on;
    `strip_level` and `strip_survival`, by token (`strip_token`), at each `example`.
    Raises NodeError for an unknown writer, or an eraser that could not read it; NumericError for one that never writes.

    Example: `uw.verify(lm, tokens, "L0H2")["survival"]`
    """
    tokens = admit(lm, tokens, mask, skip, bos, sees=True)
    node = choose([parse_node(writer)], lm.parts)[0]
    named = None if erasers is None else require_readers(choose(erasers, lm.parts), node, lm.carriers(node))
    size, floor = batch_size(lm, tokens, batch, whole_only=True), admit_floor(floor)
    asked = {"writer": str(node), "skip": skip, "floor": floor, "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("verify", lm, {"": tokens.hash}, {**asked, "erasers": named and [*map(str, named)]}):
            return done
        tally = WithoutTally(lm, tokens, node, skip, floor, job)
        stream(lm, tokens, tally.executed(named or ()), size, f"verify {node}", listener, job)
        if not tally.n_positions:
            raise NumericError(f"{node} never writes on this text: no position is above the floor", fix=_LOWER)
        if not (chosen := named):
            chosen = _default(tally)
            stream(lm, tokens, tally.hiding(chosen), size, f"verify {node}, hidden", listener, job)
        found = _among_others(lm, tokens, node, skip, listener, job)
        data = _beside_others(_judged(_dataset(tally), tally, chosen), found)
        asked["erasers"] = [str(e) for e in chosen]
        return job.signed(build("verify", data, asked, provenance(lm), {"": tokens.about()}))


def _among_others(lm: Model, tokens: Tokens, node: Node, skip: int, listener: Listener | None, job: Job) -> Judged:
    """The writer beside ordinary writes in its place, as `uw.survival` judges all of them."""
    read = fitting(lambda: weights(lm, [node]), "finding who reads the stream")
    every = all_written(lm, tokens, skip, f"verify {node}, all writes", listener, job)
    loudest = every.loudest(CRITERIA.channels)
    beside = Removals(lm, fold(lm), tokens, skip, [node], {"readers": read}, ALONE, loudest)
    among = SurvivalTally(beside, job)
    stream(lm, tokens, among, 1, f"verify {node}, beside others", listener, job)
    whole = among.whole()
    return judge(beside.sums(whole), replace(CRITERIA, q=1.0), beside.sums(whole, FEWER))


def _default(tally: WithoutTally) -> tuple[Node, ...]:
    median = tally.ratios["clean"].quantiles((0.5,))[: len(tally.lm.parts), 0]
    later = [(median[i], node) for i, node in enumerate(tally.lm.parts) if node.kind == "head" and tally.later(node)]
    ranked = sorted(later, key=lambda pair: pair[0])
    return tuple(node for value, node in ranked if value <= OPPOSES) or tuple(node for _, node in ranked[:_FEWEST])


def _dataset(tally: WithoutTally) -> xr.Dataset:
    value, error = tally.shares()
    lm = tally.lm
    after = np.array([state.holds(tally.writer, lm.parallel) for state in lm.states])
    later = np.array([tally.later(node) for node in lm.parts])
    at, by, (unseen, behind) = ("location",), ("node",), tally.unseen()
    survival, generic = value["survival"], np.stack([value[f"rotation {k}"] for k in range(ROTATIONS)])
    spread = np.quantile(generic, (0.025, 0.975), axis=0)
    with_, without = value["share"], value["share_without"]
    own = {
        "survival": quantity(at, np.where(after, survival, np.nan), "1", "Σ⟨x − x^{−w}, o_w⟩ / Σ‖o_w‖²"),
        "survival_se": quantity(at, np.where(after, error["survival"], np.nan), "1", "clustered by prompt"),
        "background": quantity(at, value["level"] - np.where(after, survival, 0), "1", "level − survival"),
        "level_share": quantity(at, value["level"], "1", "Σ⟨x, o_w⟩ / Σ‖o_w‖²"),
        "generic": quantity(
            ("location", "bound"),
            np.where(after[:, None], np.stack([spread[0], generic.mean(0), spread[1]], 1), np.nan),
            "1",
            "survival of the write under 20 fixed random rotations: 2.5 %, mean, 97.5 %",
        ),
        "gap": quantity(at, np.where(after, survival - generic.mean(0), np.nan), "1", "survival − generic"),
        "gap_se": quantity(at, np.where(after, tally.gap_error(generic, error), np.nan), "1", "of a new draw"),
        "share": quantity(by, with_, "1", "a = Σ⟨o_e, o_w⟩ / Σ‖o_w‖²"),
        "share_without": quantity(by, np.where(later, without, with_), "1", "b = the same without the write"),
        "erased": quantity(
            by, np.where(later, np.minimum(with_, 0) - np.minimum(without, 0), 0.0), "1", "min a − min b"
        ),
        "filled_in": quantity(
            by, np.where(later, np.maximum(with_, 0) - np.maximum(without, 0), 0.0), "1", "max a − max b"
        ),
        "acts": quantity(by, np.where(later, with_ - without, 0.0), "1", "a − b"),
        "acts_se": quantity(by, error["acts"], "1", "clustered by prompt"),
        "v_share": quantity(by, np.where(unseen, np.nan, value["v_share"]), "1", "Σ⟨C, o_w⟩ / Σ‖o_w‖², C of eq. 3"),
        "v_share_se": quantity(by, np.where(unseen, np.nan, error["v_share"]), "1", "clustered by prompt"),
        "v_survival": quantity(
            at, np.where(after & ~behind, value["v_survival"], np.nan), "1", "1 + Σ v_net up to here"
        ),
    }
    shown = {**_used(tally, value, error), **_quantiles(tally), **_places(tally), **_strips(tally)}
    return xr.Dataset({**own, **shown}, _coordinates(tally))


def _used(tally: WithoutTally, value: dict[str, np.ndarray], error: dict[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Who reads the write, who uses the space that the head writes into, and where its token part can be decoded."""
    (read, draws), (into, space), later = tally.reads(), tally.spaces(), tally.can_read()
    mlps = later & np.array([node.kind in MLPS for node in tally.lm.parts])
    mean, deviation = draws.mean(0), draws.std(0, ddof=1)
    # Beyond this, of all later nodes together, lies the reading of one turned write in twenty.
    t = float(stats.t.ppf(1 - 0.05 / max(int(later.sum()), 1), READ_ROTATIONS - 1))
    reach = t * deviation * np.sqrt(1 + 1 / READ_ROTATIONS)
    generic = np.stack([np.maximum(mean - reach, 0), mean, mean + reach], 1)
    by, at = ("node",), ("location",)
    return {
        "read": quantity(
            by,
            np.where(tally.unseen()[0], np.nan, read),
            "1",
            "Σ‖C‖² / Σ‖o_e‖², C of eq. 3; of an MLP one-reader Σ‖D‖² / Σ‖o_e‖²",
        ),
        "read_generic": quantity(
            (*by, "bound"),
            np.where(later[:, None], generic, np.nan),
            "1",
            f"read of the write under {READ_ROTATIONS} of the rotations: mean, and where a new draw lies below low or "
            "above high at any of the later nodes once in 20",
        ),
        "one_reader_share": quantity(
            by,
            np.where(mlps, value["one_reader"], np.nan),
            "1",
            "one-reader Σ⟨D, o_w⟩ / Σ‖o_w‖², D = MLP(x) − MLP(x − o_w)",
        ),
        "one_reader_share_se": quantity(by, np.where(mlps, error["one_reader"], np.nan), "1", "clustered by prompt"),
        "into_space": quantity(by, into, "1", "Σ‖P o_e‖² / Σ‖o_e‖², P onto the writer's W_O"),
        "space": quantity(at, space, "1", "Σ‖P x‖² / Σ‖x‖²; by chance d_head / d_model"),
        "decodable": quantity(
            at, tally.decoding.found(), "1", f"held-out R² of the write's token part, ridge {RIDGE} · mean eigenvalue"
        ),
    }


def _quantiles(tally: WithoutTally) -> dict[str, xr.Variable]:
    n = len(tally.lm.parts)
    both = np.stack([tally.ratios[condition].quantiles(QUANTILES) for condition in CONDITIONS])
    values = np.where(tally.unseen()[0][:, None], np.nan, tally.ratios["values"].quantiles(QUANTILES))
    return {
        "opposed_pr": quantity(
            ("quantile",), tally.ratios["opposed"].quantiles(QUANTILES)[0], "1", "⟨Σ over erasers of o_e, o_w⟩ / ‖o_w‖²"
        ),
        "v_pr": quantity(("node", "quantile"), values, "1", "⟨C, o_w⟩ / ‖o_w‖²"),
        "pr": quantity(("condition", "node", "quantile"), both[:, :n], "1", "⟨o_e, clean o_w⟩ / ‖o_w‖²"),
        "level": quantity(("condition", "location", "quantile"), both[:, n:], "1", "⟨x, clean o_w⟩ / ‖o_w‖²"),
    }


def _places(tally: WithoutTally) -> dict[str, xr.Variable]:
    value, error = tally.places()
    equation = {"level": "Σ⟨x, o_w⟩ / Σ‖o_w‖²", "survival": "Σ⟨x − x^{−w}, o_w⟩ / Σ‖o_w‖²"}
    found = {}
    for row, (name, text) in enumerate(equation.items()):
        found[f"{name}_at"] = quantity(("place",), value[row], "1", f"{text} at the end, over these positions")
        found[f"{name}_at_se"] = quantity(("place",), error[row], "1", "clustered by prompt")
    return found


def _strips(tally: WithoutTally) -> dict[str, Any]:
    """A few prompts, token by token."""
    shown, (level, survival, energy) = tally.strips()
    n = min(SHOWN, shown.length)
    words = [[spelled([i], tally.lm.tokenizer) for i in row[:n]] for row in shown.written]
    words = np.where(np.arange(n) < shown.lengths[:, None], np.array(words, dtype=object), "")
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = {"level": level / energy, "survival": survival / energy}
    says = {"level": "⟨x, o_w⟩ / ‖o_w‖² at the end", "survival": "⟨x − x^{−w}, o_w⟩ / ‖o_w‖² at the end"}
    axes = ("example", "position")
    finite = {name: np.where(np.isfinite(part), part, np.nan)[:, :n] for name, part in parts.items()}
    strips = {f"strip_{name}": quantity(axes, part, "1", says[name]) for name, part in finite.items()}
    return {**strips, "strip_token": (axes, words)}


def _coordinates(tally: WithoutTally) -> dict[str, Any]:
    return {
        "node": list(tally.lm.nodes),
        "location": list(tally.lm.locations),
        "bound": list(BOUNDS),
        "condition": list(CONDITIONS),
        "quantile": list(QUANTILES),
        "place": first_of_groups(tally.tokens.length),
        "example": list(EXAMPLES),
    }


def _judged(data: xr.Dataset, tally: WithoutTally, erasers: tuple[Node, ...]) -> xr.Dataset:
    names = [str(node) for node in erasers]
    t = float(stats.t.ppf(0.975, max(tally.n_clusters - 1, 1)))
    value, error = tally.eraser_sums()
    settled = abs(value["opposed"]) > max(t * error["opposed"], MATERIAL_SHARE)
    causal_share = value["caused"] / value["opposed"] if settled else np.nan
    return data.assign(
        {
            "opposed": quantity((), np.asarray(value["opposed"]), "1", "Σ over erasers of share"),
            "opposed_se": quantity((), np.asarray(error["opposed"]), "1", "clustered by prompt"),
            "caused": quantity((), np.asarray(value["caused"]), "1", "Σ over erasers of v_share"),
            "caused_se": quantity((), np.asarray(error["caused"]), "1", "clustered by prompt"),
            "causal_share": quantity((), np.asarray(causal_share), "1", "caused / opposed"),
            "class": ("node", np.array(list(_classes(data, tally, t)), dtype=object)),
        }
    ).assign_attrs(
        writer=str(tally.writer),
        erasers=" ".join(names),
        readers="" if (few := _too_few(tally.n_clusters)) else _readers(data),
        read_note=few,
        decodable_note=tally.decoding.note,
        n_positions=tally.n_positions,
        n_clusters=tally.n_clusters,
        causal_share_note=""
        if settled
        else f"the erasers' summed share is below {MATERIAL_SHARE} or its interval touches 0",
    )


def _too_few(documents: int) -> str:
    """Why nobody is called a reader: what is read of a write differs between documents as it does between turns."""
    return f"{counted(documents, 'document')}, at least {FEWEST} are needed" if documents < FEWEST else ""


def _readers(data: xr.Dataset) -> str:
    """Nodes that read the write more than a turned one, the strongest first. Below MATERIAL_SHARE nothing is said."""
    read, names = data["read"].values, data["node"].values
    above = (read > data["read_generic"].sel(bound="high").values) & (read >= MATERIAL_SHARE)
    return " ".join(str(names[i]) for i in np.argsort(-read) if above[i])


def _beside_others(data: xr.Dataset, found: Judged) -> xr.Dataset:
    """The verdict by the rules that hold for all writers; of one alone there is no q."""
    places = [part.range[0] for part in found.ordinary.values()]
    interval, own = "95 % t interval over documents", found.survival
    weighed = {
        "weighed": quantity((), own.value.reshape(()), "1", "survival at the end as later readers weigh channels"),
        "weighed_low": quantity((), own.low.reshape(()), "1", interval),
        "weighed_high": quantity((), own.high.reshape(()), "1", interval),
        "ordinary": quantity(("control", "range"), np.stack(places), "1", "of stand-ins: 5 %, median, 95 %"),
    }
    return (
        data.assign(weighed)
        .assign_coords(control=list(found.ordinary), range=list(verdicts.BOUNDS))
        .assign_attrs(verdict=found.verdict[0])
    )


def _classes(data: xr.Dataset, tally: WithoutTally, t: float) -> Iterator[str]:
    """How each later node comes to act on the write. Below MATERIAL_SHARE nothing is said."""

    def is_there(name: str, i: int) -> bool:
        size = abs(data[name].values[i])
        return bool(size >= MATERIAL_SHARE and size > t * data[f"{name}_se"].values[i])

    unseen, _ = tally.unseen()
    for i, node in enumerate(tally.lm.parts):
        if not tally.later(node):
            yield ""
        elif is_there("v_share", i):
            yield "reads it through values"
        elif is_there("acts", i):
            yield "reads it" if unseen[i] else "reads it another way"
        else:
            yield "acts without it" if abs(data["share"].values[i]) >= MATERIAL_SHARE else ""
