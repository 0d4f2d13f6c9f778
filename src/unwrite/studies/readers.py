"""Who reads a write, who erases it, and is its space used again? The three steps, each executed, and in which order.

Who reads it: `methods/readers.py`; what survives of it and who acts against it: `uw.survival`; what it does to an
answer through each reader alone: `uw.paths`, direct edges. (Dao, Lau, Rager and Janiak 2023, arXiv 2310.07325, name
these steps; facts: systems on real models, §2.6)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from unwrite.errors import NodeError, NumericError, shown
from unwrite.methods.effects import effects
from unwrite.methods.paths import paths
from unwrite.methods.readers import read_by, reused_by
from unwrite.methods.survival import survival
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import MLPS, PROJECTED, Location, Node, choose, parse_node
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import Tokens
from unwrite.result import Result, build, quantity
from unwrite.run.answer.metrics import Custom, known, name_of, unless_own
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit, admit_pairs, batch_size
from unwrite.stats.jackknife import ratio
from unwrite.stats.reading import ENOUGH

# A node erases if it surely takes away at least this part of the write, by what it writes because the write is there.
ERASES = 0.02
# Verdicts of a write of which surely less is left than of ordinary ones.
LESS = ("erased", "reduced", "filled in")
SHOWN, NOT_SHOWN, UNDECIDED = "shown", "not shown", "undecided: too few documents"
NOT_MEASURED = "not measured: what is no head may write anywhere"
_OF_SURVIVAL = ("end", "end_low", "end_high", "ordinary", "gap", "gap_low", "gap_high", "survival", "acts", "acts_low",
                "acts_high", "erased", "filled_in")  # fmt: skip


@torch.no_grad()
def readers(
    lm: Model,
    prompts: Any,
    writer: object,
    metric: str | Custom | None = None,
    skip: int = 1,
    *,
    erasers: Sequence[object] | None = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """Who reads one write and through what, who erases it and when, and what uses its space afterwards.

    Arguments: `prompts` as `uw.scan` takes them, or Pairs, of which the base prompts are read and pairs of one template
    are one document; `writer` one node; `metric` of pairs, as in `uw.effects` (by default "logit_diff"); `erasers`
    nodes, by default those that surely take away at least 2 % of the write because it is there; `skip`, `bos`, `batch`
    and `checkpoint` as in `uw.scan`.
    Returns a Result. Reading: `wrote[node, way]` (q, k, v of a later head; "all" of an MLP or mixer), by how much what
    the node writes changes when the write is missing from what it reads that way alone, a part of its size, with
    interval, beside `typical_wrote`, the median of typical writes in its place; `read` the same of the query, key or
    value itself, `turned` what of the pattern goes elsewhere; `read_q` and `reads`: surely more than a typical write.
    Erasing: `survival[location]` and `end` as in `uw.survival`, `acts[node]`, `erases`; `left[node]`, what of the write
    is there where a node reads, `gone[node]`, which part of what the erasers take away is gone there. Using again
    (of heads): `use[node]`, what a later node writes into the writer's space but along the write, in units of the
    write's energy, `freed` how much of that only because the erasers made room, with interval, beside `freed_typical`
    and `freed_elsewhere`; `reuses`. With pairs `effect[node, way]`, the executed direct edge to each reader, its mean
    over pairs with interval; `total`, that of the write as a whole; `through`, their sum, and `rest` = total − through.
    Attributes `verdict` (survival's word), `read`, `erased`, `reused`: what could be shown of each step.
    Raises NodeError for an unknown writer or an eraser that cannot read it; NumericError for a metric without pairs;
    TokensError as `uw.scan` and `uw.pairs`. Example: `uw.readers(lm, tokens, "L20H0").table()`
    """
    tokens, pairs = _given(lm, prompts, skip, bos, metric)
    node, size = choose([parse_node(writer)], lm.parts)[0], batch_size(lm, tokens, batch)
    named = None if erasers is None else _able(lm, choose(erasers, lm.parts), node)
    asked = {"writer": str(node), "skip": skip, "batch": None if batch is None else size}
    settings = {**asked, "metric": metric and name_of(metric), "erasers": named and [*map(str, named)]}
    about = tokens.about() if pairs is None else pairs.about()
    with opened(unless_own(checkpoint, metric or ""), listener) as job:
        if done := job.begin("readers", lm, {"": about["hash"]}, settings):
            return done
        each: dict[str, Any] = {"skip": skip, "batch": asked["batch"], "checkpoint": job, "listener": listener}
        survived = survival(lm, tokens, [node], **each).data.isel(writer=0, drop=True)
        data = steps(lm, tokens, node, survived, named, **each)
        if pairs is not None:
            data = data.assign(_edges(lm, pairs, node, metric or "logit_diff", each))
        return job.signed(build("readers", data, settings, provenance(lm), {"": about}))


def steps(
    lm: Model, tokens: Tokens, writer: Node, survived: xr.Dataset, erasers: tuple[Node, ...] | None = None, **each: Any
) -> xr.Dataset:
    """All of this that needs no pairs, beside what `uw.survival` found of the writer in the same tokens."""
    chosen = _erasing(lm, survived) if erasers is None else erasers
    data = _together(lm, writer, survived, read_by(lm, tokens, writer, **each).data, chosen)
    if writer.kind in PROJECTED:
        data = data.assign(reused_by(lm, tokens, writer, chosen, **each).data.data_vars)
    return _said(data, chosen, writer.kind in PROJECTED)


def _given(lm: Model, prompts: Any, skip: int, bos: Any, metric: Any) -> tuple[Tokens, Pairs | None]:
    """What is read: text, or the base prompts of pairs, those of one template being one document."""
    if not isinstance(prompts, Pairs):
        if metric is not None:
            raise NumericError("a metric is asked of pairs", got=f"metric={shown(metric)} of text", fix="pass uw.pairs")
        return admit(lm, prompts, None, skip, bos, sees=True), None
    pairs = admit_pairs(lm, prompts, bos, sees=True)
    known(metric or "logit_diff", pairs)
    order = np.argsort(pairs.cluster, kind="stable")
    return admit(lm, replace(pairs.base.take(order), cluster=pairs.cluster[order]), None, skip, None, sees=True), pairs


def _able(lm: Model, erasers: tuple[Node, ...], writer: Node) -> tuple[Node, ...]:
    """`erasers` again. Raises NodeError for one that cannot know of the write."""
    if early := [str(node) for node in erasers if not lm.can_read(node, writer)]:
        raise NodeError(f"{', '.join(early)} cannot read {writer}", expected="nodes after it")
    return erasers


def _erasing(lm: Model, survived: xr.Dataset) -> tuple[Node, ...]:
    """Nodes that surely write against the write because it is there."""
    acts, high, erased = (survived[name].values for name in ("acts", "acts_high", "erased"))
    surely = (acts <= -ERASES) & (high < 0) & (erased <= -ERASES)
    return tuple(node for node, one in zip(lm.parts, surely, strict=True) if one)


def _together(lm: Model, writer: Node, survived: xr.Dataset, found: xr.Dataset, erasers: Sequence[Node]) -> xr.Dataset:
    """Reading and erasing by node, and which comes first."""
    places = [_reads_at(lm, node) if lm.can_read(node, writer) else None for node in lm.parts]
    there, acts = survived["survival"].isel(weigh=0).values, survived["acts"].values
    left = [np.nan if place is None else there[lm.states.index(place)] for place in places]
    gone = [np.nan if place is None else _gone(lm, place, acts, erasers) for place in places]
    by = ("node",)
    own: dict[str, xr.Variable] = {name: survived[name].variable for name in _OF_SURVIVAL} | {
        "left": quantity(by, np.array(left), "1", "survival where the node reads the stream"),
        "gone": quantity(by, np.array(gone), "1", "part of what erasers take away that is gone where the node reads"),
        "erases": quantity(by, np.array([node in erasers for node in lm.parts]), "", "an eraser"),
    }
    return found.assign(own).assign_attrs(writer=str(writer), verdict=str(survived["verdict"].item()))


def _reads_at(lm: Model, node: Node) -> Location | None:
    if node.layer < 0 or node.kind not in (*PROJECTED, *MLPS):
        return None
    layer = lm.layers[node.layer]
    return layer.reads if node.kind in PROJECTED or lm.parallel else Location("mid", node.layer)


def _gone(lm: Model, place: Location, acts: np.ndarray, erasers: Sequence[Node]) -> float:
    """Part of what the erasers take away that is gone at a place of the stream."""
    taken = {node: float(acts[lm.parts.index(node)]) for node in erasers}
    whole = sum(taken.values())
    gone = sum(part for node, part in taken.items() if place.holds(node, lm.parallel))
    return gone / whole + 0.0 if whole else np.nan


def _edges(lm: Model, pairs: Pairs, writer: Node, metric: str | Custom, each: dict[str, Any]) -> dict[str, xr.Variable]:
    """What the write does to the metric through each reader alone, and as a whole."""
    given = {name: each[name] for name in ("batch", "checkpoint", "listener")}
    edges = (
        paths(lm, pairs, [str(writer)], "all", mlps="frozen", metric=metric, **given)
        .data["effect"]
        .isel(sender=0, drop=True)
    )
    whole = effects(lm, pairs, [str(writer)], at="all", metric=metric, **given).data["effect"].isel(node=0, drop=True)
    names, cluster = [str(name) for name in edges["receiver"].values], pairs.cluster
    per_pair = np.concatenate([edges.transpose("pair", "receiver").values, whole.values[:, None]], 1)
    through = np.nansum(per_pair[:, :-1], 1)
    sums = np.column_stack([per_pair, through, whole.values - through])
    mean, low, high = ratio(sums, np.ones(len(sums)), cluster)
    ends = zip(("", "_low", "_high"), (mean, low, high), strict=True)
    found = {}
    for end, part in ends:
        says = "mean over pairs" if not end else "95 % interval, jackknife over templates or pairs"
        found[f"effect{end}"] = quantity(("reader",), part[:-3], "of the metric", f"direct edge, {says}")
        for name, i in (("total", -3), ("through", -2), ("rest", -1)):
            found[f"{name}{end}"] = quantity((), np.asarray(part[i]), "of the metric", f"{name} effect, {says}")
    return found | {"reader": xr.Variable(("reader",), names)}


def _said(data: xr.Dataset, erasers: Sequence[Node], heads: bool) -> xr.Dataset:
    """What could be shown of each of the three steps."""
    few = data.attrs["documents"] < ENOUGH.documents
    shown: dict[str, bool] = {"read": bool(data["reads"].any()), "erased": data.attrs["verdict"] in LESS}
    shown |= {"reused": bool(data["reuses"].any())} if heads else {}
    words = {step: SHOWN if yes else UNDECIDED if few else NOT_SHOWN for step, yes in shown.items()}
    words |= {} if heads else {"reused": NOT_MEASURED}
    return data.assign_attrs(words, erasers=" ".join(map(str, erasers)))
