"""What can be patched? All nodes of one kind in one layer at once: where their tensor is, and how it is seen.

A patch puts a node's value of another run in the place of its own. Kinds, with the names of their nodes:

heads      "L2H3"         z, what a head hands to W_O          q, k, v             "L2H3.q"  a query head's own copy
attn_out   "L2.attn_out"  all that a layer's attention writes  shared_k, shared_v  "L2KV1.k" what its group shares
mlp_out    "MLP2"         what an MLP writes                   neurons             "MLP2.act[17]"
resid      "resid_mid2"   a state of the stream                embed               "embed" the embeddings
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

from unwrite.errors import NodeError
from unwrite.model.attention import Attend, Attended, around_attention, per_query_head
from unwrite.model.capture import evaluating
from unwrite.model.hooks import Point, before, hooked, kept, visited
from unwrite.model.view import Model
from unwrite.nodes import Site
from unwrite.run.edit.sites import Part, last_projection, mlp_width, named, place

# Kind -> the kinds of its sites.
KINDS: Mapping[str, tuple[str, ...]] = {
    "heads": ("head",), "q": ("q",), "k": ("k",), "v": ("v",), "shared_k": ("shared_k",), "shared_v": ("shared_v",),
    "attn_out": ("attn_out",), "mlp_out": ("mlp",), "neurons": ("neuron",), "resid": ("pre", "mid", "post"),
    "embed": ("embed",),
}  # fmt: skip
# What the scores of attention are made of: where its pattern is held, they do nothing.
SCORED = ("q", "k", "shared_k")
_STATES = ("embed", "pre", "post")
_ATTENDED = ("q", "k", "v", "shared_k", "shared_v")


@dataclass(frozen=True, eq=False)
class Slot:
    """Nodes of one kind in one layer.

    `at` is the tensor that holds them, None for a state between blocks: the one that block `layer` reads (the final
    norm reads that of layer L). `view` shows the tensor as [prompt, position, unit, d], and can be written through;
    `units` are the rows of that axis which are asked for, `sites` their names. `joined`: the value holds the state that
    the block reads as well (a state between attention and MLP). `lasting`: later positions of the same block see a
    change (keys and values).
    """

    kind: str
    layer: int
    at: Point | Part | None
    view: Callable[[Tensor, int], Float[Tensor, "prompt position unit d"]]
    sites: tuple[Site, ...]
    units: Int[Tensor, " unit"]
    joined: bool = False
    lasting: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(map(str, self.sites))

    @property
    def sees_past(self) -> bool:
        """Does the tensor hold earlier positions as well, where a pass brings only later ones?"""
        return self.lasting and isinstance(self.at, Part)

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
    if not isinstance(nodes, Iterable):
        raise NodeError("nodes are names", got=repr(nodes), expected=f"names, or a kind: {', '.join(KINDS)}")
    if isinstance(nodes, str) and nodes in KINDS:
        sites = [site for kind in KINDS[nodes] for site in _every(lm, kind)]
        if not sites:
            raise NodeError(f"this model ({lm.family}) has no {nodes} that can be patched", got="a mixture of experts")
    else:
        sites = [named(lm, name) for name in ([nodes] if isinstance(nodes, str) else nodes)]
        if not sites:
            raise NodeError("no node was named", expected=f"names, or a kind: {', '.join(KINDS)}")
    return tuple(
        _slot(lm, kind, layer, tuple(group)) for (layer, kind), group in groupby(_ordered(sites), key=_slot_of)
    )


def _every(lm: Model, kind: str) -> Iterator[Site]:
    """Every site of a kind that this model has."""
    if kind in ("embed", "pre"):
        yield Site(kind, -1 if kind == "embed" else 0)
        return
    counts = {"head": lm.n_heads, **dict.fromkeys(("q", "k", "v"), lm.n_heads)}
    counts |= dict.fromkeys(("shared_k", "shared_v"), lm.kv_heads)
    for layer in lm.layers:
        if kind == "mid" and lm.parallel:
            continue
        units = mlp_width(lm, layer) if kind == "neuron" else counts.get(kind)
        yield from (Site(kind, layer.index, unit) for unit in ((-1,) if units is None else range(units)))


def _ordered(sites: Iterable[Site]) -> list[Site]:
    return sorted(set(sites), key=lambda site: site.order)


def _slot_of(site: Site) -> tuple[int, str]:
    return site.layer, site.kind


def _slot(lm: Model, kind: str, index: int, sites: tuple[Site, ...]) -> Slot:
    for site in (sites[0], sites[-1]):
        place(lm, site, edited=True)
    if kind in _STATES:
        reader = {"embed": 0, "pre": index, "post": index + 1}[kind]
        return Slot(kind, reader, None, lambda tensor, _: tensor[:, :, None], sites, torch.zeros(1, dtype=torch.long))
    if kind not in _FINDERS:
        raise NodeError(f"{sites[0]} cannot be patched from another run", expected=f"a node of {', '.join(KINDS)}")
    at, view = _FINDERS[kind](lm, index)
    units = torch.tensor([max(site.head, 0) for site in sites])
    lasting = kind in _ATTENDED and kind != "q"
    return Slot(kind, index, at, view, sites, units.to(lm.device), joined=kind == "mid", lasting=lasting)


_Found = tuple[Point | Part, Callable[[Tensor, int], Tensor]]


def _rows(tensor: Tensor, prompts: int) -> Tensor:
    """OPT flattens prompts and positions before its MLP."""
    return tensor.unflatten(0, (prompts, -1)) if tensor.dim() == 2 else tensor


def _z(lm: Model, index: int) -> _Found:
    shape = (lm.n_heads, lm.head_dim)
    return Point(lm.layers[index].out_proj, before=True), lambda tensor, _: tensor.unflatten(-1, shape)


def _attention(lm: Model, index: int) -> _Found:
    return Point(lm.layers[index].attention_end, before=False), lambda tensor, n: _rows(tensor, n)[:, :, None]


def _mlp(lm: Model, index: int) -> _Found:
    layer = lm.layers[index]
    return Point(layer.mlp_end, before=False), lambda tensor, n: _rows(tensor, n)[:, :, None]


def _neurons(lm: Model, index: int) -> _Found:
    projection = last_projection(lm, lm.layers[index])
    assert projection is not None  # noqa: S101 (refused before)
    return Point(projection, before=True), lambda tensor, n: _rows(tensor, n)[..., None]


def _attended(kind: str, lm: Model, index: int) -> _Found:
    found = place(lm, Site(kind, index, 0), edited=True)
    if isinstance(found.point, Part):
        return found.point, lambda tensor, _: tensor.transpose(1, 2)
    if not lm.row.grouped_values:
        return found.point, lambda tensor, _: tensor.unflatten(-1, (-1, lm.head_dim))
    if lm.kv_heads < lm.n_heads:
        raise NodeError(
            f"{kind} of {lm.family} cannot be patched by module hooks", fix="load it with attn_implementation='sdpa'"
        )
    item = ("q", "k", "v").index(kind.removeprefix("shared_"))
    return found.point, lambda tensor, _: tensor.unflatten(-1, (lm.kv_heads, 3, lm.head_dim))[..., item, :]


_FINDERS: Mapping[str, Callable[[Model, int], _Found]] = {
    "head": _z,
    "attn_out": _attention,
    "mid": _attention,
    "mlp": _mlp,
    "neuron": _neurons,
    **{kind: partial(_attended, kind) for kind in _ATTENDED},
}

Visit = Callable[[Tensor], Tensor]
Values = Mapping[Slot, Float[Tensor, "pair position _unit _d"]]


@contextmanager
def visiting(lm: Model, visits: Mapping[Slot, Visit]) -> Iterator[None]:
    """Inside the `with`, what is used at a slot is what its visit makes of the tensor that was there.

    Slots of states between blocks are not visited. Keys and values of query heads come as each head's own copy. A
    visit sees and gives tensors on the model's own device, wherever a layer computes.
    """
    visits = {slot: partial(_at_home, lm.device, visit) for slot, visit in visits.items()}
    attended = {slot: visit for slot, visit in visits.items() if isinstance(slot.at, Part)}
    with ExitStack() as stack:
        for slot, visit in visits.items():
            if isinstance(slot.at, Point):
                stack.enter_context(hooked([visited(slot.at, visit)]))
        if attended:
            stack.enter_context(around_attention(lm, partial(_attend, attended), eager=False))
        yield


def _at_home(device: torch.device, visit: Visit, tensor: Tensor) -> Tensor:
    return visit(tensor.to(device)).to(tensor.device)


def _attend(
    visits: Mapping[Slot, Visit], layer: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor
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
    return attend(seen["q"], copies["k"], copies["v"])


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


def values_of(
    lm: Model, found: Mapping[Slot, Tensor], inputs: Any, prompts: int
) -> dict[Slot, Float[Tensor, "prompt position _unit _d"]]:
    """Values of slots from their tensors and from what blocks read (`inputs[layer]`).

    They are detached, and on the model's own device. A state between attention and MLP comes in units of what
    attention writes, which is multiplied on its way.
    """
    scale = lm.residual_scale
    made: dict[Slot, Tensor] = {}
    for slot, tensor in found.items():
        value = slot.view(tensor.detach().to(lm.device), prompts).index_select(2, slot.units.to(lm.device))
        read = inputs[slot.layer].detach().to(lm.device)[:, :, None] if slot.joined else None
        made[slot] = value.clone() if read is None else value + read / scale
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
        lm.decoder(input_ids=ids.to(lm.device), use_cache=False)
    return values_of(lm, found, calls, len(ids))
