"""Which nodes can be the ends of a path, and which edges are there?

Places where something joins the stream, or is read: 3l the input of block l, 3l + 1 between its attention and its MLP,
3l + 2 behind this, where something reads it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.errors import NodeError
from unwrite.model.view import Layer, Model
from unwrite.nodes import GROUPS, KINDS, MLPS, PROJECTED, Site, parse_sites
from unwrite.run.edit.sites import all_named, named
from unwrite.run.edit.slots import Slot, Values, slots

LOGITS = "logits"
ALL = "all"
_SENDERS = ("heads", "attn_out", "mlp_out")
_RECEIVERS = ("heads", "q", "k", "v", "shared_k", "shared_v", "mlp_out")


@dataclass(frozen=True)
class Write:
    """What one layer's attention (all of it, or some heads), an MLP or the embeddings write."""

    kind: str
    layer: int
    heads: tuple[int, ...] = ()

    def place(self, lm: Model) -> int:
        """Where it joins the stream."""
        if self.kind == "embed":
            return 0
        behind = 2 if lm.layers[self.layer].late is not None and self.kind != "beside" else 3
        return 3 * self.layer + (1 if self.kind not in MLPS and not lm.parallel else behind)


@dataclass(frozen=True, eq=False)
class Ends:
    """Senders and receivers by name, and what they are made of: "L1H0+MLP2" are two nodes that act as one.

    `slots` hold senders, receivers and what the layers' attention makes; `joins[sender, receiver]` says which edges
    there are.
    """

    lm: Model
    senders: Mapping[str, tuple[Write, ...]]
    receivers: Mapping[str, tuple[Site, ...]]
    sent: tuple[Slot, ...]
    received: tuple[Slot, ...]
    held: Mapping[int, Slot]
    z: Mapping[int, Slot]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Everything that must be known of the base run."""
        return (*self.sent, *self.received, *self.held.values(), *self.z.values())

    @property
    def joins(self) -> Bool[np.ndarray, "sender receiver"]:
        """Does the receiver read what the sender writes?"""
        first = [min(write.place(self.lm) for write in writes) for writes in self.senders.values()]
        last = [max(read_at(self.lm, site) for site in sites) for sites in self.receivers.values()]
        return np.array(first)[:, None] <= np.array(last)

    def takes(self, slot: Slot) -> Bool[Tensor, "receiver unit"]:
        """Which units of a slot each receiver is made of."""
        found = [[site in sites for site in slot.sites] for sites in self.receivers.values()]
        return torch.tensor(found, device=self.lm.device)


def read_at(lm: Model, site: Site) -> int:
    """The place where a receiver reads the stream."""
    if site.kind == LOGITS:
        return 3 * len(lm.layers)
    return 3 * site.layer + (site.kind == "mlp" and not lm.parallel)


def to_end(lm: Model, place: int) -> float:
    """By which what is in the stream at a place is multiplied on its way to the end."""
    return lm.layers[place // 3].to_end if place // 3 < len(lm.layers) else 1.0


def moved(ends: Ends, base: Values, source: Values, write: Write) -> Float[Tensor, "pair position d_model"]:
    """What a write puts into the stream more, as it arrives at the end, when it is set to its source value."""
    slot = next(s for s in ends.sent if s.kind == write.kind and (write.kind == "embed" or s.layer == write.layer))
    if write.kind not in PROJECTED:
        lm, change = ends.lm, (source[slot] - base[slot])[:, :, 0]
        return change * (lm.to_end(lm.states[0]) if write.kind == "embed" else lm.layers[write.layer].into)
    own, before = ends.lm.layers[write.layer], base[ends.z[write.layer]]
    after = before.clone()
    for head in write.heads:
        after[:, :, head] = source[slot][:, :, slot.units.tolist().index(head)].to(after.dtype)
    return (_attention_end(own, after) - _attention_end(own, before)) * own.into


def _attention_end(layer: Layer, z: Float[Tensor, "pair position head d"]) -> Tensor:
    """What a layer's attention hands to the stream, before the residual scale. `forward`: no hook of anyone sees it."""
    out = layer.out_proj.forward(z.flatten(2))
    return (out if layer.post_attention_norm is None else layer.post_attention_norm.forward(out)).to(z.device)


def ends(lm: Model, senders: Sequence[str], receivers: Sequence[str]) -> Ends:
    """Senders and receivers by their names, or by kinds of nodes.

    Raises NodeError for what can be neither, for writes that hold each other, and where no asked edge exists.
    """
    senders, receivers = _every(senders, ["embed", "heads", "mlp_out"]), _every(receivers, _read(lm))
    sent = {name: _sites(lm, name, "send") for name in _spread(lm, senders, _SENDERS)}
    got = {name: _sites(lm, name, "receive") for name in _spread(lm, receivers, _RECEIVERS)}
    every = [[str(site) for sites in part.values() for site in sites if site.kind != LOGITS] for part in (sent, got)]
    received = slots(lm, every[1]) if every[1] else ()
    held, z = ({slot.layer: slot for slot in slots(lm, kind)} for kind in ("attn_out", "heads"))
    writes = {name: _writes(name, sites) for name, sites in sent.items()}
    found = Ends(lm, writes, got, slots(lm, every[0]), received, held, z)
    if not found.joins.any():
        edge = f"{', '.join([*sent][:3])} → {', '.join([*got][:3])}"
        raise NodeError("no such edge: the receiver does not read what the sender writes", got=edge)
    return found


def _every(names: Sequence[str], every: Sequence[str]) -> Sequence[str]:
    """Names, with "all" written out."""
    listed = [names] if isinstance(names, str) else names
    return [one for name in listed for one in (every if name == ALL else [name])]


def _read(lm: Model) -> list[str]:
    """All that reads the stream by itself: keys and values once for heads that share them, mixers as they are."""
    attending = [layer for layer in lm.layers if layer.attends]
    kinds = ["q", *(f"{'shared_' * any(x.kv_heads < x.heads for x in attending)}{part}" for part in "kv")]
    mixers = [f"L{layer.index}M*" for layer in lm.layers if layer.mixes]
    mlps = ["mlp_out"] if any(layer.has_mlp for layer in lm.layers) else []
    return [*(kinds if attending else []), *mixers, *mlps, LOGITS]


def _spread(lm: Model, names: Sequence[str], kinds: tuple[str, ...]) -> list[str]:
    """Names, with kinds of nodes written out."""
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if name in GROUPS and name not in kinds and name != "embed":
            raise NodeError(f"{name} are no ends of a path here", expected=", ".join(kinds))
        all_of = (slot for slot in slots(lm, name) if slot.kind != "beside") if name in kinds else ()
        several = [one for slot in all_of for one in slot.names]
        each = several if name in kinds else [str(name)] if parse_sites(name) is None else map(str, all_named(lm, name))
        found |= dict.fromkeys(each)
    if not found:
        raise NodeError("a path has two ends", got="no names", expected="names of nodes, or a kind of them")
    return list(found)


def _sites(lm: Model, name: str, what: str) -> tuple[Site, ...]:
    """The sites of "L1H0+MLP2"."""
    found: list[Site] = []
    for part in name.split("+"):
        if part == LOGITS and what == "receive":
            found.append(Site(LOGITS, len(lm.layers)))
            continue
        site = named(lm, part)
        if not getattr(KINDS[site.kind], f"{what}s"):
            known = "heads, MLPs, L1.attn_out, embed" if what == "send" else "heads, L1H0.q (.k, .v), MLPs, logits"
            raise NodeError(f"{site} cannot {what}", expected=known)
        found.append(site)
    if len(set(found)) < len(found):
        raise NodeError(f"{name} names a node twice", fix="name each once")
    return tuple(found)


def _writes(name: str, sites: Sequence[Site]) -> tuple[Write, ...]:
    """Heads of one layer are one write: behind a post-norm what they write together is no sum."""
    heads: dict[int, list[int]] = {}
    for site in sites:
        if site.kind in PROJECTED:
            heads.setdefault(site.layer, []).append(site.head)
    if twice := [site for site in sites if site.kind == "attn_out" and site.layer in heads]:
        raise NodeError(
            f"{name} names heads twice", got=f"{twice[0]} and heads of its layer", fix="name one or the other"
        )
    whole = [Write(site.kind, site.layer) for site in sites if site.kind not in PROJECTED]
    kinds = {site.layer: site.kind for site in sites if site.kind in PROJECTED}
    return (*whole, *(Write(kinds[layer], layer, tuple(sorted(own))) for layer, own in heads.items()))
