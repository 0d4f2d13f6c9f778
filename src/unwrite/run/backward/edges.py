"""How large is the effect of an edge, as slopes guess it? All edges of a prompt by one backward pass, or a few.

EAP (Syed, Rager and Conmy 2023, arXiv 2310.10348): ⟨Δ_u, ∂metric/∂x_v⟩, Δ_u what sender u writes more at its source
value, x_v the stream as receiver v alone reads it, before its norm. So it is the derivative of the executed edge
(`replay/paths`, "frozen") along Δ_u. EAP-IG (Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806) takes the mean of
slopes on the way from source to base: ⟨Δ_u, 1/m Σ_{k=1…m} ∂metric/∂x_v at e_source + k/m (e_base − e_source)⟩, e the
embeddings; the last of these runs is the base run, so one step is EAP. (facts: attribution, §2.2, §4.1)

What v alone passes on is asked of the graph of the run: between the stream and v's own tensor there is nothing else. So
no receiver needs a run, or a copy of its input, and slopes and writes meet in one product for each layer's receivers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.errors import NodeError
from unwrite.model.view import Model
from unwrite.run.backward.estimates import embedded
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import MetricOf, backward, reading
from unwrite.run.edit.slots import Slot, Values, values_of
from unwrite.run.replay.edges import LOGITS, Ends, Write, moved, read_at

_KEYS_AND_VALUES = ("k", "v", "shared_k", "shared_v")
Scores = Float[Tensor, "pair sender receiver"]


@dataclass(frozen=True, eq=False)
class EdgeContrast:
    """Base prompts of some pairs, the edges that are asked for, and the metric of what the final norm gives."""

    ids: Int[Tensor, "pair position"]
    ends: Ends
    metric: MetricOf


def require_read(ends: Ends) -> None:
    """Raise NodeError for a receiver of which no layer's graph says what it makes of the stream."""
    for site in (site for sites in ends.receivers.values() for site in sites if site.kind in _KEYS_AND_VALUES):
        if (of := ends.lm.layers[site.layer].values_of) is not None:
            raise NodeError(
                f"slopes of {site} are those of layer {of.index}, whose keys and values its layer looks at",
                fix="use method='exact', or receivers=['q', 'mlp_out', 'logits']",
            )


def attributed_edges(
    asked: EdgeContrast,
    sources: Callable[[Values], Iterable[Values]],
    source_ids: Int[Tensor, "pair position"],
    steps: int,
) -> list[Scores]:
    """EAP-IG of every edge in so many steps, EAP in one, for each of the sources; 0 where there is no edge.

    `sources` gives what senders are set to, from values of the base run; `source_ids` are the prompts whose embeddings
    steps begin at.
    """
    run = _run(asked)
    deltas = [_Deltas.of(asked.ends, run.values, source) for source in sources(run.values)]
    total, end = _products(run, deltas), run.embedded
    del run  # a graph at a time
    start = end if steps == 1 else embedded(asked.ends.lm, source_ids)
    for k in range(steps - 1, 0, -1):
        found = _products(_run(asked, start + (end - start) * (k / steps)), deltas)
        total = [more + part for more, part in zip(total, found, strict=True)]
    return [one.of_ends(part / steps) for one, part in zip(deltas, total, strict=True)]


def _products(run: _Run, deltas: Sequence[_Deltas]) -> list[Float[Tensor, "pair write site"]]:
    """⟨Δ, slope⟩ of all writes, at every site that reads them."""
    found = [one.delta.new_zeros(*one.delta.shape[:2], len(_columns(one.ends))) for one in deltas]
    at = 0
    for place, slope in run.read():
        for one, part in zip(deltas, found, strict=True):
            n = bisect_right(one.places, place)
            part[:, :n, at : at + slope.shape[1]] = one.delta[:, :n] @ slope[:, :, one.start :].flatten(2).mT
        at += slope.shape[1]
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    """A run in autograd's graph: tensors of slots and of states that are read (by their place), and slopes there."""

    ends: Ends
    n: int
    tensors: Mapping[Any, Tensor]
    found: Mapping[Any, Tensor]

    @property
    def embedded(self) -> Float[Tensor, "pair position d_model"]:
        """What the first block read."""
        return self.tensors[0].detach().to(self.ends.lm.device, self.ends.lm.compute_dtype)

    @property
    def values(self) -> Values:
        """What senders, and heads, were."""
        slots = (*self.ends.sent, *self.ends.z.values())
        return values_of(self.ends.lm, {slot: self.tensors[slot] for slot in slots}, {}, self.n)

    def read(self) -> Iterator[tuple[int, Float[Tensor, "pair unit position d_model"]]]:
        """By the place where they read it, slopes at the stream through receivers alone, a slot after the other.

        Per unit of what arrives at the end.
        """
        lm = self.ends.lm
        for slot in self.ends.received:
            place = read_at(lm, slot.sites[0])
            every = [self._through(slot, unit, place) for unit in slot.units.tolist()]
            yield place, torch.stack(every, 1) / _state(lm, place)[1]
        if LOGITS in _columns(self.ends):
            place = 3 * len(lm.layers)
            yield place, self._home(self.found[place])[:, None]

    def _through(self, slot: Slot, unit: int, place: int) -> Float[Tensor, "pair position d_model"]:
        """The slope at the state that comes back from one unit of a slot."""
        slope = self.found[slot]
        own = torch.zeros_like(slope, memory_format=torch.contiguous_format)
        slot.view(own, self.n)[:, :, unit] = slot.view(slope, self.n)[:, :, unit]
        # What does not read the stream there has no slope.
        ask = {"retain_graph": True, "materialize_grads": True}
        return self._home(*torch.autograd.grad(self.tensors[slot], self.tensors[place], own, **ask))

    def _home(self, slope: Tensor) -> Float[Tensor, "pair position d_model"]:
        return slope.reshape(self.n, -1, self.ends.lm.d_model).to(self.ends.lm.device, self.ends.lm.compute_dtype)


def _run(asked: EdgeContrast, start: Tensor | None = None) -> _Run:
    """A run from what is embedded, or from another `start`, and its slopes."""
    ends, lm = asked.ends, asked.ends.lm
    places = {0, *(read_at(lm, site) for sites in ends.receivers.values() for site in sites)}
    # Later runs are asked for slopes alone.
    slots = ends.received if start is not None else (*ends.sent, *ends.z.values(), *ends.received)
    watched = reading(lm, {place: _state(lm, place)[0] for place in places}, slots)
    _, tensors, found = backward(lm, asked.ids, RULES["gradient"], asked.metric, watched, start, keep=True)
    return _Run(ends, len(asked.ids), tensors, found)


def _state(lm: Model, place: int) -> tuple[nn.Module, float]:
    """What reads the stream at a place, and by what that state is multiplied on its way to the end."""
    index, between = divmod(place, 3)
    if index == len(lm.layers):
        return lm.final_norm, 1.0
    layer = lm.layers[index]
    return (layer.mid, layer.mid_to_end) if between and layer.mid is not None else (layer.block, layer.to_end)


def _columns(ends: Ends) -> dict[Any, int]:
    """Sites of all receivers, in the order in which slopes come, LOGITS last."""
    sites: list[Any] = [site for slot in ends.received for site in slot.sites]
    logits = any(site.kind == LOGITS for own in ends.receivers.values() for site in own)
    return {site: i for i, site in enumerate([*sites, *([LOGITS] if logits else [])])}


@dataclass(frozen=True, eq=False)
class _Deltas:
    """What every write puts into the stream more, in the order in which they join it: `delta` from row `start` on."""

    ends: Ends
    writes: Sequence[Write]
    places: Sequence[int]
    delta: Float[Tensor, "pair write _"]
    start: int

    @staticmethod
    def of(ends: Ends, base: Values, source: Values) -> _Deltas:
        """From values of the base run and of the source."""
        every = dict.fromkeys(write for writes in ends.senders.values() for write in writes)
        writes = sorted(every, key=lambda write: write.place(ends.lm))
        exact = ends.lm.compute_dtype
        whole = torch.stack([moved(ends, base, source, write).to(exact) for write in writes], 1)
        other = (whole != 0).any(-1).flatten(0, 1).any(0).nonzero()
        start = int(other[0]) if len(other) else whole.shape[2]
        places = [write.place(ends.lm) for write in writes]
        return _Deltas(ends, writes, places, whole[:, :, start:].flatten(2), start)

    def of_ends(self, found: Float[Tensor, "pair write site"]) -> Scores:
        """Sums over the writes of each sender, and the sites of each receiver."""
        row, column = {write: i for i, write in enumerate(self.writes)}, _columns(self.ends)
        senders = [[row[write] for write in writes] for writes in self.ends.senders.values()]
        receivers = [
            [column[LOGITS if site.kind == LOGITS else site] for site in sites]
            for sites in self.ends.receivers.values()
        ]
        by_sender = torch.stack([found[:, own].sum(1) for own in senders], 1)
        return torch.stack([by_sender[:, :, own].sum(2) for own in receivers], 2)
