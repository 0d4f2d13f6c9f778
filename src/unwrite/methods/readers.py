"""Who reads one write, through what, and is its space used again once it is erased? Two measurements of one writer.

read_i = √(Σ‖out_i(x) − out_i(x − w)‖² / Σ‖out_i(x)‖²), the write w missing from the input of reader i alone: the size
of what a head's query, key or value, or an MLP, makes of it, beside typical writes in its place. use_e = Σ‖P o_e‖² /
Σ‖o_w‖², P onto what the writer can write but for the direction that it writes; freed_e = use_e − use_e where what its
erasers write along the write is held out. (facts: systems on real models, §2.6; measuring erasure, §8)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from unwrite.model import readers as weighing
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import Node
from unwrite.prompts.tokens import Tokens
from unwrite.result import Result, build, over_documents, quantity
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, batch_size, fitting, stream
from unwrite.run.replay.read import PARTS
from unwrite.run.tally.reads import Asking, ReadingTally
from unwrite.run.tally.space import Freed, SpaceTally
from unwrite.stats.reading import read, reused
from unwrite.stats.verdicts import by_document, estimate, left_out, ratio

# Typical writes beside the write itself: with so many, a q of a tenth can be reached by a single reader.
DRAWS = 16
# As many held out beside the write itself, of which each costs a run of all later blocks.
HELD_OUT = 8


@torch.no_grad()
def read_by(
    lm: Model, tokens: Tokens, writer: Node, skip: int = 1, *, batch: int | None = None, checkpoint: Job | None = None,
    listener: Listener | None = None,
) -> Result:  # fmt: skip
    """By how much every reader of a write changes when it is missing from that reader's input alone.

    Returns a Result: `wrote[node, way]`, the change of what the node writes through this way alone, with interval, and
    `typical_wrote`, the median of typical writes; `read` and `typical_read`, the same of the query, key or value
    itself; `turned` and `typical_turned`, what of the pattern goes elsewhere (total variation, mean over queries);
    `read_q`, `reads`.
    """
    with opened(checkpoint, listener) as job:
        settings = {"writer": str(writer), "skip": skip, "batch": batch}
        if done := job.begin("readers (read)", lm, {"": tokens.hash}, settings):
            return done
        later = [node for node in lm.parts if lm.can_read(node, writer)]
        asked = _asking(lm, tokens, writer, skip, later, DRAWS)
        tally, size = ReadingTally(asked, job), batch_size(lm, tokens, batch, held=2)
        stream(lm, tokens, tally, size, f"readers of {writer}", listener, job)
        return job.signed(
            build("readers (read)", _read(asked, tally.whole()), settings, provenance(lm), {"": tokens.about()})
        )


@torch.no_grad()
def reused_by(
    lm: Model, tokens: Tokens, writer: Node, erasers: Sequence[Node], skip: int = 1, *, batch: int | None = None,
    checkpoint: Job | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """What later nodes write into a head's space, and how much of that because erasers freed it."""
    with opened(checkpoint, listener) as job:
        settings = {"writer": str(writer), "erasers": [*map(str, erasers)], "skip": skip, "batch": batch}
        if done := job.begin("readers (reused)", lm, {"": tokens.hash}, settings):
            return done
        asked = Freed(_asking(lm, tokens, writer, skip, (), HELD_OUT), tuple(erasers))
        tally, size = SpaceTally(asked, job), batch_size(lm, tokens, batch, held=2)
        stream(lm, tokens, tally, size, f"space of {writer}", listener, job)
        data = _used(asked, tally.whole())
        return job.signed(build("readers (reused)", data, settings, provenance(lm), {"": tokens.about()}))


def _asking(lm: Model, tokens: Tokens, writer: Node, skip: int, readers: Sequence[Node], draws: int) -> Asking:
    weigh = fitting(partial(weighing.weights, lm, [writer, *readers]), "finding who reads the stream")
    own, *others = weigh.to(lm.device, lm.compute_dtype)
    return Asking(lm, fold(lm), tokens, skip, writer, own, dict(zip(readers, others, strict=True)), draws)


@dataclass(frozen=True)
class _Places:
    """The readers that are asked about: a node and a way, as rows and columns of [node, way]."""

    node: np.ndarray
    way: np.ndarray

    def spread(self, part: np.ndarray, shape: tuple[int, int], fill: Any = np.nan) -> np.ndarray:
        """Of every node and way; where nobody was asked, nothing."""
        whole = np.full((*part.shape[:-1], *shape), fill, dtype=part.dtype)
        whole[..., self.node, self.way] = part
        return whole


def _read(asked: Asking, whole: Arrays) -> xr.Dataset:
    """Everything that was found about readers, named."""
    of = {name: by_document(part, asked.tokens.cluster) for name, part in whole.items()}
    shape = (len(asked.lm.parts), len(PARTS))
    # Heads are judged by each way of reading, what has only one by that.
    several = (of["made"][..., 1:].sum(0) > 0).any(-1)
    able = (of["made"].sum(0) > 0) & ~(several[:, None] & (np.arange(len(PARTS)) == 0))
    at = _Places(*np.nonzero(able))
    found = read(of["wrote"][..., at.node, at.way], of["written"][:, at.node])
    axes, (value, low, high) = ("node", "way"), found.found.ends
    made = {
        name: _size(of[name], of["made"] if name == "read" else of["written"][..., None]) for name in ("read", "wrote")
    }
    turned = of["turned"].sum(0) / of["rows"].sum()
    shown = np.array([node.kind == "head" for node in asked.lm.parts])[:, None] & (np.array(PARTS) != "v")
    turned = np.where(shown & (of["turned"].sum((0, 1)) > 0), turned, np.nan)
    typical = f"the same of typical writes, median of {asked.draws}"
    text = "√(Σ‖o_i(x) − o_i(x − w)‖² / Σ‖o_i‖²), w missing from what is read this way alone"
    variables = {
        **over_documents(axes, "wrote", (at.spread(value, shape), at.spread(low, shape), at.spread(high, shape)), text),
        "wrote_all": quantity(("node",), made["wrote"][0][:, 0], "1", "w missing from all that the node reads"),
        "typical_wrote": quantity(axes, at.spread(found.typical, shape), "1", typical),
        "read": quantity(axes, made["read"][0], "1", "the same of the query, key or value in the head's coordinates"),
        "typical_read": quantity(axes, np.median(made["read"][1:], 0), "1", typical),
        "turned": quantity(axes, turned[0], "1", "½ Σ_j |A_ij − A'_ij|, mean over queries i"),
        "typical_turned": quantity(axes, np.median(turned[1:], 0), "1", typical),
        "read_q": quantity(axes, at.spread(found.q, shape), "1", "target–decoy competition over all readers"),
        "reads": quantity(axes, at.spread(found.surely, shape, False), "", "surely more than a typical write"),
    }  # fmt: skip
    coordinates = {"node": [*asked.lm.nodes], "way": [*PARTS]}
    return xr.Dataset(variables, coordinates).assign_attrs(
        documents=len(of["rows"]), asked=int(able.sum()), draws=asked.draws
    )


def _size(change: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.sqrt(ratio(change.sum(0), np.broadcast_to(whole.sum(0), change.shape[1:])))


def _used(asked: Freed, whole: Arrays) -> xr.Dataset:
    """Everything that was found about the space, named."""
    of = {name: by_document(part, asked.of.tokens.cluster) for name, part in whole.items()}
    lm, elsewhere = asked.of.lm, (of["use"] - of["held"])[:, 1:].mean(1)
    held = np.concatenate([of["held"][:, :1], of["held_typical"]], 1)
    later = np.arange(len(lm.parts)) > max(map(lm.parts.index, asked.erasers), default=len(lm.parts))
    found = reused(of["use"][:, 0], held, of["energy"], elsewhere)
    energy, others = of["energy"].sum(), "mean over the spaces of the layer's other heads"
    by, at = ("node",), ("location",)
    use = estimate(ratio(left_out(of["use"][:, 0]), left_out(of["energy"])[:, None]))
    space = estimate(ratio(left_out(of["space"][:, 0]), left_out(of["energy"])[:, None]))
    variables = {
        **over_documents(by, "use", use.ends, "Σ‖P o_e‖² / Σ‖o_w‖², P onto the writer's space but along the write"),
        "use_elsewhere": quantity(by, of["use"][:, 1:].sum(0).mean(0) / energy, "1", others),
        **over_documents(by, "freed", found.found.ends, "use − use with erasers held out"),
        "freed_typical": quantity(by, found.typical, "1", "the same with a typical write held out, median"),
        "freed_elsewhere": quantity(by, elsewhere.sum(0) / energy, "1", f"freed, {others}"),
        "freed_q": quantity(by, found.q, "1", "target–decoy competition over all nodes"),
        "reuses": quantity(by, found.surely & later, "", "surely writes there because it was freed"),
        **over_documents(at, "space", space.ends, "Σ‖P x‖² / Σ‖o_w‖²: what else is in the space"),
        "space_held": quantity(at, of["space_held"][:, 0].sum(0) / energy, "1", "the same with erasers held out"),
        "space_elsewhere": quantity(at, of["space"][:, 1:].sum(0).mean(0) / energy, "1", others),
    }  # fmt: skip
    return xr.Dataset(variables, {"node": [*lm.nodes], "location": [*lm.locations]})
