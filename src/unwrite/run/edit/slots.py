"""What can be patched? All nodes of one kind in one layer at once: where their tensor is, and how it is seen.

A patch puts a node's value of another run in the place of its own. Kinds, with the names of their nodes:

heads      "L2H3", "L2M3" z, what a head hands to W_O          q, k, v             "L2H3.q"  a query head's own copy
attn_out   "L2.attn_out"  all that a layer's attention writes  shared_k, shared_v  "L2KV1.k" what its group shares
mlp_out    "MLP2"         what an MLP writes                   neurons             "MLP2.act[17]"
act        "MLP2.act"     all of its hidden activations        embed               "embed" the embeddings
resid      "resid_mid2"   a state of the stream
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.errors import NodeError, several
from unwrite.model.attention import Attend, Attended, around_attention
from unwrite.model.capture import evaluating
from unwrite.model.fold import outside
from unwrite.model.hooks import Point, Visit, before, hooked, kept, visited
from unwrite.model.placed import decode
from unwrite.model.softmax import per_query_head
from unwrite.model.view import Model
from unwrite.nodes import GROUPS, KINDS, MLPS, Site
from unwrite.run.edit.place import Inner, Place, as_one
from unwrite.run.edit.sites import all_named, every, place, unit_of

# What the scores of attention are made of: where its pattern is held, they do nothing.
SCORED = ("q", "k", "shared_k")
# Patched by putting another state in, and not inside a block.
_STATES = ("embed", "pre", "post")
_ATTENDED = ("q", "k", "v", "shared_k", "shared_v")
# Where the sites of a kind are patched in the tensor of another kind.
_IN = {"head": "z", "mixer": "mixer_z", "mid": "attn_out"}


@dataclass(frozen=True, eq=False)
class Slot:
    """Nodes of one kind in one layer.

    `place` is the tensor that holds them, None for a state between blocks: the one that block `layer` reads (the final
    norm reads that of layer L). `units` are the rows of its view which are asked for, `sites` their names.
    """

    kind: str
    layer: int
    place: Place | None
    sites: tuple[Site, ...]
    units: Int[Tensor, " unit"]

    @property
    def at(self) -> Point | Inner | None:
        """Where the tensor is seen; None between blocks."""
        return None if self.place is None else self.place.point

    @property
    def joined(self) -> bool:
        """Does the value hold the state that the block reads as well: is it one between attention and MLP?"""
        return self.kind == "mid"

    @property
    def streams(self) -> bool:
        """Are its values vectors of the stream: states of it, or what is added to it?"""
        return self.kind in (*_STATES, "mid", "attn_out", *MLPS)

    @property
    def lasting(self) -> bool:
        """Do later positions of the same block see a change: is it of keys or values?"""
        return self.kind in _ATTENDED and self.kind != "q"

    def view(self, tensor: Tensor, prompts: int) -> Float[Tensor, "prompt position unit d"]:
        """The tensor by units, to be written through."""
        return as_one(tensor, prompts) if self.place is None else self.place.view(tensor, prompts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(map(str, self.sites))

    @property
    def sees_past(self) -> bool:
        """Does the tensor hold earlier positions as well, where a pass brings only later ones?"""
        return self.lasting and isinstance(self.at, Inner)

    def put(
        self,
        tensor: Tensor,
        unit: Int[Tensor, " prompt"],
        rows: Int[Tensor, " row"],
        values: Float[Tensor, "prompt row d"],
    ) -> Tensor:
        """The tensor with one unit of every prompt changed at some rows."""
        changed = tensor.clone(memory_format=torch.contiguous_format)
        prompt = torch.arange(len(unit), device=unit.device)[:, None]
        self.view(changed, len(unit))[prompt, rows[None], unit[:, None]] = values.to(changed.dtype)
        return changed


def slots(lm: Model, nodes: str | Iterable[str]) -> tuple[Slot, ...]:
    """The slots of a kind of nodes, or of nodes named one by one, in the order in which a pass reaches them.

    Raises NodeError, with the nearest names, for what this model does not have or what cannot be patched in it.
    """
    expected = f"names, or a kind: {', '.join(GROUPS)}"
    if isinstance(nodes, str) and nodes in GROUPS:
        sites = [site for kind in GROUPS[nodes] for site in every(lm, kind)]
        if not sites:
            raise NodeError(f"this model ({lm.family}) has no {nodes} that can be patched", got="a mixture of experts")
    else:
        listed = [nodes] if isinstance(nodes, str) else several("nodes are names", nodes, expected, NodeError)
        sites = [site for name in listed for site in all_named(lm, name)]
        if not sites:
            raise NodeError("no node was named", expected=expected)
    return tuple(
        _slot(lm, kind, layer, tuple(group)) for (layer, kind), group in groupby(_ordered(sites), key=_slot_of)
    )


def _ordered(sites: Iterable[Site]) -> list[Site]:
    return sorted(set(sites), key=lambda site: site.order)


def _slot_of(site: Site) -> tuple[int, str]:
    return site.layer, site.kind


def _slot(lm: Model, kind: str, index: int, sites: tuple[Site, ...]) -> Slot:
    for site in (sites[0], sites[-1]):
        place(lm, site, edited=True)
    if kind in _STATES:
        reader = {"embed": 0, "pre": index, "post": index + 1}[kind]
        return Slot(kind, reader, None, sites, torch.zeros(1, dtype=torch.long))
    if not KINDS[kind].group:
        raise NodeError(f"{sites[0]} cannot be patched from another run", expected=f"a node of {', '.join(GROUPS)}")
    found = place(lm, Site(_IN.get(kind, kind), index, min(sites[0].head, 0)), edited=True)
    units = torch.tensor([unit_of(lm, site) for site in sites])
    return Slot(kind, index, found, sites, units.to(lm.device))


Values = Mapping[Slot, Float[Tensor, "pair position _unit _d"]]


@contextmanager
def visiting(lm: Model, visits: Mapping[Slot, Visit], shown: dict[int, Tensor] | None = None) -> Iterator[None]:
    """Inside the `with`, what is used at a slot is what its visit makes of the tensor that was there.

    Slots of states between blocks are not visited. Keys and values of query heads come as each head's own copy. A
    visit sees and gives tensors on the model's own device, wherever a layer computes. Where patterns are to be `shown`,
    attention is computed openly and leaves them there by layer.
    """
    visits = {slot: partial(_at_home, lm.device, visit) for slot, visit in visits.items()}
    attended = {slot: visit for slot, visit in visits.items() if isinstance(slot.at, Inner)}
    with ExitStack() as stack:
        for slot, visit in visits.items():
            if isinstance(slot.at, Point):
                stack.enter_context(hooked([visited(slot.at, visit)]))
        if attended:
            around = partial(_attend, attended, shown)
            stack.enter_context(around_attention(lm, around, eager=shown is not None))
        yield


def _at_home(device: torch.device, visit: Visit, tensor: Tensor) -> Tensor:
    made = visit(tensor.to(device))
    return tensor if made is None else made.to(tensor.device)


def _attend(
    visits: Mapping[Slot, Callable[[Tensor], Tensor]],
    shown: dict[int, Tensor] | None,
    layer: int,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Attended:
    seen = {"q": query, "shared_k": key, "shared_v": value}
    for slot, visit in visits.items():
        if slot.layer == layer and slot.kind in seen:
            seen[slot.kind] = visit(seen[slot.kind])
    copies = {"k": seen["shared_k"], "v": seen["shared_v"]}
    if asked := [slot for slot in visits if slot.layer == layer and slot.kind in copies]:
        copies = {kind: per_query_head(shared, query) for kind, shared in copies.items()}
        for slot in asked:
            copies[slot.kind] = visits[slot](copies[slot.kind])
    out, pattern = attend(seen["q"], copies["k"], copies["v"])
    if shown is not None and pattern is not None:
        shown[layer] = pattern.detach()
    return out, pattern


@contextmanager
def watching(lm: Model, watched: Iterable[Slot]) -> Iterator[dict[Slot, Tensor]]:
    """Inside the `with`, each forward pass leaves every slot's own tensor in the mapping, part of autograd's graph.

    Of a state between blocks it is the stream itself; of one between attention and MLP, what attention writes.
    """
    found: dict[Slot, Tensor] = {}

    def keep(slot: Slot, tensor: Tensor) -> Tensor:
        # Where a rule has stopped what lies before, the slope at the slot itself begins here.
        stopped = torch.is_grad_enabled() and not tensor.requires_grad
        found[slot] = tensor.detach().requires_grad_() if stopped else tensor
        # A copy goes on: some blocks add into the very tensor that a module returned.
        return found[slot].clone()

    states = [slot for slot in watched if slot.at is None]
    with ExitStack() as stack:
        stack.enter_context(hooked(before(between_blocks(lm)[slot.layer], kept(found, slot)) for slot in states))
        stack.enter_context(visiting(lm, {slot: partial(keep, slot) for slot in watched if slot.at is not None}))
        yield found


def between_blocks(lm: Model) -> tuple[nn.Module, ...]:
    """What reads the stream between blocks: every block, then the final norm."""
    return (*(layer.block for layer in lm.layers), lm.final_norm)


def added_to(lm: Model, slot: Slot) -> Float[Tensor, "*d"]:
    """What the block adds to a slot's value by itself: nothing, or a constant beside what attention puts out."""
    beside = outside(lm, lm.layers[slot.layer]) if slot.kind in ("attn_out", "mid") else None
    return torch.zeros(()) if beside is None else beside


def values_of(
    lm: Model, found: Mapping[Slot, Tensor], inputs: Any, prompts: int
) -> dict[Slot, Float[Tensor, "prompt position _unit _d"]]:
    """Values of slots from their tensors and from what blocks read (`inputs[layer]`).

    They are detached, and on the model's own device. A state between attention and MLP comes in units of what
    attention writes, which is multiplied on its way.
    """
    made: dict[Slot, Tensor] = {}
    for slot, tensor in found.items():
        value = slot.view(tensor.detach().to(lm.device), prompts).index_select(2, slot.units.to(lm.device))
        read = inputs[slot.layer].detach().to(lm.device)[:, :, None] if slot.joined else None
        made[slot] = value.clone() if read is None else value + read / lm.layers[slot.layer].residual_scale
    return made


@torch.no_grad()
def values(lm: Model, ids: Int[Tensor, "pair position"], slots: Sequence[Slot]) -> dict[Slot, Tensor]:
    """What nodes are in a run of these prompts."""
    calls: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        found = stack.enter_context(watching(lm, slots))
        joined = {slot.layer for slot in slots if slot.joined}
        stack.enter_context(hooked(before(between_blocks(lm)[i], kept(calls, i, copied=True)) for i in joined))
        decode(lm, ids, use_cache=False)
    return values_of(lm, found, calls, len(ids))
