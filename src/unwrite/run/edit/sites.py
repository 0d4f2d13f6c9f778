"""Where is each site in a forward pass?

A site lies in what a module reads or puts out, or is a tensor of attention that transformers' AttentionInterface shows.
Some sites are a unit of that tensor, and a change is put in its place. Others (what a node writes, a centred stream)
are computed from it and from what was kept earlier in the pass; their change is added where the stream is written.
One finder for each kind says where; all units of a kind in a layer are a slot (`slots.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from unwrite.errors import NodeError
from unwrite.model.attention import is_called
from unwrite.model.families import REST
from unwrite.model.fold import centre, outside, value_columns
from unwrite.model.hooks import Point
from unwrite.model.inside import find
from unwrite.model.norms import norm_scale
from unwrite.model.projections import sizes
from unwrite.model.queries import unit_in
from unwrite.model.view import Layer, Model
from unwrite.nodes import KINDS, MLPS, PROJECTED, Location, Site, nearest, parse_site, parse_sites
from unwrite.run.edit.place import Inner, Pass, Place, View, by_row


def named(lm: Model, name: object) -> Site:
    """The site called `name`. Raises NodeError, with the nearest ones of this model, for what is no site's name."""
    try:
        return parse_site(name)
    except NodeError as error:
        raise NodeError(str(error), fix=nearest(name, _sites(lm))) from None


def all_named(lm: Model, name: object) -> tuple[Site, ...]:
    """The site called `name`, or where it names several ("L2.pattern", "resid_post*", "heads") those of this model.

    They come in the order in which a pass reaches them. Raises NodeError as `named`, and where there is none of them.
    """
    if (group := parse_sites(name)) is None:
        return (named(lm, name),)
    every_ = [site for kind in group.kinds for site in every(lm, kind) if site in group]
    found = [site for site in every_ if _refusal(lm, site) is None]
    if not found:
        why = next((_refusal(lm, site) for site in every_), f"layers 0 to {len(lm.layers) - 1}, of what they have")
        raise NodeError(f"this model ({lm.family}) has no site {name}", expected=why, fix=nearest(name, _sites(lm)))
    return tuple(sorted(found, key=lambda site: site.order))


def place(lm: Model, site: Site, edited: bool = False) -> Place:
    """Where a site is in this model. Raises NodeError, with the nearest names, if it has none or it is not editable."""
    if (why := _refusal(lm, site)) is not None:
        raise NodeError(f"this model ({lm.family}) has no site {site}", expected=why, fix=nearest(site, _sites(lm)))
    found = _FINDERS[site.kind](lm, site)
    if edited and not found.editable:
        in_group = site.kind in ("k", "v")
        fix = f"edit L{site.layer}KV{_group(lm, site)}.{site.kind}, which its group shares" if in_group else None
        raise NodeError(f"{site} can be read and not edited: no module of {lm.family} shows it by itself", fix=fix)
    return found


def every(lm: Model, kind: str) -> Iterator[Site]:
    """Every site of a kind that a model of this shape could have."""
    per = KINDS[kind].per
    if per == "model":
        yield Site(kind, 0 if kind == "pre" else -1)
        return
    for layer in lm.layers:
        count = _count(lm, kind, layer)
        if _lacks(lm, kind, layer) is None:
            yield from (Site(kind, layer.index, unit) for unit in ((-1,) if count is None else range(count)))


def _count(lm: Model, kind: str, layer: Layer) -> int | None:
    """How many sites of a kind a layer has, where they are numbered."""
    per = KINDS[kind].per
    if per == "neuron":
        return mlp_width(lm, layer)
    attends = int(layer.attends)
    heads = {"head": attends * layer.heads, "kv_head": layer.kv_heads, "mixer": (1 - attends) * layer.heads}
    return heads.get(per)


def _sites(lm: Model) -> Iterator[Site]:
    """Every site of a model, but for single neurons."""
    yield from (Site(node.kind, node.layer, node.head) for node in lm.parts)
    for kind in (name for name, kind in KINDS.items() if not kind.writes and kind.per != "neuron"):
        yield from (site for site in every(lm, kind) if _refusal(lm, site) is None)


def _refusal(lm: Model, site: Site) -> str | None:
    """Why a model does not have a site; None where it does."""
    if (node := site.node) is not None:
        return None if node in lm.parts else f"one of {len(lm.parts)} nodes from {lm.parts[0]} to {lm.parts[-1]}"
    if not 0 <= site.layer < len(lm.layers):
        return f"a layer from 0 to {len(lm.layers) - 1}"
    layer, part = lm.layers[site.layer], site.kind.removeprefix("shared_")
    if (why := _lacks(lm, site.kind, layer)) is not None:
        return why
    if (count := _count(lm, site.kind, layer)) is not None and not 0 <= site.head < count:
        return f"a {'neuron' if site.kind == 'neuron' else 'head'} from 0 to {count - 1}"
    if part in ("q", "k") and not is_called(lm) and part not in lm.row.opened(lm.config):
        return "sites that modules show: its queries and keys are turned inside of its attention"
    return None


def _lacks(lm: Model, kind: str, layer: Layer) -> str | None:
    """Why a layer has no site of a kind, whatever its number; None where it can have some."""
    if kind == "mid" and Location("mid", layer.index) not in lm.states:
        why = "its blocks are parallel" if lm.parallel else "there are not both in this layer"
        return f"no state between attention and MLP: {why}"
    if kind == "late" and layer.late is None:
        return "a state between its MLP and what reads it in the same layer; this layer has nothing like it"
    if kind == "beside" and layer.beside is None:
        return "what writes beside its MLP; this layer has nothing like it"
    if kind in ("act", "neuron", "mlp") and not layer.has_mlp:
        return "an MLP; this layer has none"
    if kind in ("act", "neuron") and last_projection(lm, layer) is None:
        return "an MLP with one last projection; this one is a mixture of experts"
    if kind == "v_input" and layer.values_of is not None:
        return f"a layer with values of its own; this one has those of layer {layer.values_of.index}"
    if kind in ("v_input", "pattern", "z") or KINDS[kind].group in ("q", "k", "v", "shared_k", "shared_v"):
        instead = f" but a mixer (L{layer.index}M0.z): it has no pattern, queries, keys or values" * bool(layer.heads)
        return None if layer.attends else f"a layer with attention; this one has none{instead}"
    if kind == "mixer_z" and (layer.attends or not layer.heads):
        return "a mixer; this layer has none"
    return None if kind != "attn_out" or layer.heads else "a layer with attention or a mixer; this one has neither"


def _group(lm: Model, site: Site) -> int:
    layer = lm.layers[site.layer]
    return site.head if site.kind.startswith("shared") else site.head * layer.kv_heads // layer.heads


def _written(lm: Model, module: nn.Module, scale: float) -> Place:
    """What a module hands to the stream, or to what scales it."""
    shown = lambda tensor, now: centre(now.rows(tensor).to(lm.compute_dtype) * scale, lm)  # noqa: E731
    return Place(Point(module, before=False), shown=shown, scale=scale, adds=True)


def _start(lm: Model, site: Site) -> Place:
    """What a module writes before the blocks, or what the first of them reads beside what another site holds of it."""
    path, of_tokens, begin = getattr(lm.row, site.kind), site.kind == "embed", lm.to_end(lm.states[0])
    if path != REST:
        scale = lm.row.embed_scale(lm.config) if of_tokens else 1.0
        found = _written(lm, lm.decoder.get_submodule(path), scale * begin)
        return _into_stream(lm, found) if lm.by_prompt else found
    keep = () if of_tokens else (Point(lm.decoder.get_submodule(lm.row.embed), before=False),)

    def shown(tensor: Tensor, now: Pass) -> Tensor:
        others = [_start(lm, Site("embed")).read(now.kept[point], now) for point in keep]
        return centre(tensor.to(lm.compute_dtype) * begin, lm) - sum(other.to(tensor.device) for other in others)

    return Place(Point(lm.layers[0].block, before=True), shown=shown, scale=begin, keep=keep, adds=True)


def _into_stream(lm: Model, found: Place) -> Place:
    """The same, changed where the stream begins: of what a module gives something else may be made for blocks."""
    own = found.point
    assert isinstance(own, Point)  # noqa: S101 (a module's)
    shown = lambda tensor, now: found.read(now.kept[own], now).to(tensor.device)  # noqa: E731
    begin = lm.to_end(lm.states[0])
    return Place(Point(lm.layers[0].block, before=True), shown=shown, scale=begin, keep=(own,), adds=True)


def _mlp(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    return _written(lm, layer.end(site.kind), layer.into)


def _attn_out(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    shown = lambda tensor, now: centre(_whole(lm, layer, now.rows(tensor).to(lm.compute_dtype)) * layer.into, lm)  # noqa: E731
    return _attention_part(lm, layer, shown)


def _whole(lm: Model, layer: Layer, tensor: Tensor) -> Tensor:
    """All that attention puts out, and what the block adds to it, of what its end does."""
    beside = outside(lm, layer, detach=False)
    return tensor if beside is None else tensor + beside.to(tensor.device)


def _state(lm: Model, site: Site) -> Place:
    """A state between blocks: what the next block reads, or the final norm."""
    reader = next((layer.block for layer in lm.layers if layer.reads == Location(site.kind, site.layer)), None)
    # What the last block gives: the final norm may have run before, on the embedding.
    point = Point(reader or lm.layers[-1].block, before=reader is not None)
    if not lm.centred and lm.dtype == lm.compute_dtype:
        return Place(point)
    return Place(point, shown=lambda tensor, now: centre(tensor.to(lm.compute_dtype), lm))


def _mid(lm: Model, site: Site) -> Place:
    layer, before = lm.layers[site.layer], Point(lm.layers[site.layer].block, before=True)

    def shown(tensor: Tensor, now: Pass) -> Tensor:
        written = _whole(lm, layer, tensor) * layer.residual_scale
        return centre((now.kept[before].to(tensor.device) + written).to(lm.compute_dtype) * layer.mid_gain, lm)

    # The norm between attention and MLP reads the stream, but the stream does not go through it.
    scale = layer.residual_scale * layer.mid_gain
    return replace(_attention_part(lm, layer, shown, before), scale=scale)


def _late(lm: Model, site: Site) -> Place:
    layer, before = lm.layers[site.layer], Point(lm.layers[site.layer].block, before=True)
    end = Point(layer.attention_end, before=False)

    def shown(tensor: Tensor, now: Pass) -> Tensor:
        written = now.rows(tensor) + _whole(lm, layer, now.kept[end]).to(tensor.device)
        here = now.kept[before].to(tensor.device) + written * layer.residual_scale
        return centre(here.to(lm.compute_dtype), lm)

    place = Point(layer.end("mlp"), before=False)
    return Place(place, shown=shown, scale=layer.residual_scale, keep=(before, end), adds=True)


def _attention_part(lm: Model, layer: Layer, shown: Callable[[Tensor, Pass], Tensor], *keep: Point) -> Place:
    """What is computed from, and added to, all that attention writes."""
    return Place(Point(layer.attention_end, before=False), shown=shown, scale=layer.into, keep=keep, adds=True)


def _head(lm: Model, site: Site) -> Place:
    layer, z = lm.layers[site.layer], Point(lm.layers[site.layer].out_proj, before=True)
    return _attention_part(lm, layer, partial(_head_write, lm, site, z), z, *_post_norm(layer))


def _head_write(lm: Model, site: Site, z: Point, tensor: Tensor, now: Pass) -> Tensor:
    layer = lm.layers[site.layer]
    weights, own = now.weights(lm, layer), now.kept[z].unflatten(-1, (layer.heads, layer.head_dim))[:, :, site.head]
    own = own.to(tensor.device, lm.compute_dtype)
    if weights.constant is not None:
        own = own - weights.constant[site.head].to(own.device)
    return _post_scaled(lm, layer, own @ weights.w_o[site.head].to(own.device), now)


def _bias(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    return _attention_part(lm, layer, partial(_bias_write, lm, layer), *_post_norm(layer))


def _bias_write(lm: Model, layer: Layer, tensor: Tensor, now: Pass) -> Tensor:
    constant = now.weights(lm, layer).bias.to(tensor.device)
    return _post_scaled(lm, layer, constant.expand(now.prompts, now.positions, -1), now)


def _post_norm(layer: Layer) -> tuple[Point, ...]:
    return () if layer.post_attention_norm is None else (Point(layer.post_attention_norm, before=True),)


def _post_scaled(lm: Model, layer: Layer, write: Tensor, now: Pass) -> Tensor:
    """A part of what attention writes times the scale of the post-norm in this pass, where there is one."""
    for point in _post_norm(layer):
        write = write * norm_scale(now.kept[point].to(write), point.module, lm.row.layer_norm)[..., None]
    return write


def _z(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    point, shape = Point(layer.out_proj, before=True), (layer.heads, layer.head_dim)
    return Place(point, lambda tensor, _: tensor.unflatten(-1, shape), lambda view: view[:, :, site.head])


def _act(lm: Model, site: Site) -> Place:
    lm.require("mlp")
    projection = last_projection(lm, lm.layers[site.layer])
    assert projection is not None  # noqa: S101 (refused before)
    return Place(Point(projection, before=True))


def _neuron(lm: Model, site: Site) -> Place:
    return Place(
        _act(lm, site).point, lambda tensor, n: by_row(tensor, n)[..., None], lambda view: view[:, :, site.head]
    )


def mlp_width(lm: Model, layer: Layer) -> int:
    """Hidden activations of a layer's MLP; 0 for a mixture of experts, and where there is none."""
    projection = last_projection(lm, layer) if layer.has_mlp else None
    return 0 if projection is None else sizes(projection)[0]


def last_projection(lm: Model, layer: Layer) -> nn.Module | None:
    """What reads the MLP's hidden activations; None in a mixture of experts."""
    try:
        return find(layer.mlp, lm.row.of_layer(layer.index).act)
    except AttributeError:  # a mixture of experts
        return None


def _v_input(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    before = Point(layer.block, before=True)
    shown = lambda tensor, now: centre(now.kept[before].to(lm.compute_dtype), lm)  # noqa: E731
    put = partial(_values_of, lm, layer, before)
    return Place(Point(layer.value_norm or layer.value, before=False), shown=shown, put=put, keep=(before,))


def _values_of(lm: Model, layer: Layer, before: Point, tensor: Tensor, old: Tensor, new: Tensor, now: Pass) -> Tensor:
    """What the value projection, or a norm of values, puts out, with values that read another stream."""
    stream = (now.kept[before] + (new - old).to(now.kept[before].device)).to(now.kept[before].dtype)
    # `forward`, and not a call: hooks see only what the model itself does.
    read = stream if layer.input_norm is None else layer.input_norm.forward(stream)
    if layer.latent is not None and layer.latent_norm is not None:
        if now.past:
            raise NodeError(
                f"L{layer.index}.v_input cannot be edited in a pass that goes on from a cache",
                got="values that are made anew in every pass, of latents that the cache keeps",
                fix="give the whole prompt to one pass",
            )
        read = layer.latent_norm.forward(layer.latent.forward(read)[..., : sizes(layer.value)[0]])
    values, columns = layer.value.forward(read), value_columns(lm, layer).to(tensor.device)
    if layer.value_norm is None:
        return torch.where(columns, values.view_as(tensor), tensor)
    own = values[..., columns].view_as(tensor) * lm.row.value_factor(lm.config)
    return layer.value_norm.forward(own)


def _attended(lm: Model, site: Site) -> Place:
    """What attention sees (q, k, v) or computes (the pattern)."""
    part, layer, opened = site.kind.removeprefix("shared_"), lm.layers[site.layer], lm.row.opened(lm.config)
    by_head: View = lambda tensor, _: tensor.transpose(1, 2)  # noqa: E731
    own = lambda view: view[:, :, _row(lm, site, view.shape[2])]  # noqa: E731
    if is_called(lm):
        return Place(Inner(site.layer, site.kind), by_head, own)
    if part == "pattern" and part not in opened:
        return Place(Point(layer.attention, before=False, item=1), by_head, own, editable=False)
    point = Point(find(layer.attention, opened[part]), before=False)
    if part == "pattern":
        return Place(point, by_head, own)
    # One head's copy of what its group reads from one place is nowhere.
    editable = site.kind not in ("k", "v") or layer.kv_heads == layer.heads
    by_width: View = lambda tensor, _: tensor.unflatten(-1, (-1, layer.head_dim))  # noqa: E731
    return Place(point, by_width, lambda view: view[:, :, unit_of(lm, site)], editable=editable)


def unit_of(lm: Model, site: Site) -> int:
    """The row of a site in the view of its place: of a part of attention that a module puts out, which head's width."""
    part, layer = site.kind.removeprefix("shared_"), lm.layers[max(site.layer, 0)]
    if part not in ("q", "k", "v") or is_called(lm):
        return max(site.head, 0)
    own, module = _group(lm, site), find(layer.attention, lm.row.opened(lm.config)[part])
    if module is not layer.value:  # a projection of queries or keys alone
        return site.head if part == "q" else own
    return unit_in(lm, layer, part, site.head if part == "q" else own * layer.heads // layer.kv_heads, module)


def _row(lm: Model, site: Site, heads: int) -> int:
    """The row of a site on an axis of query heads, or of the key/value heads that they share."""
    return site.head if site.kind.startswith("shared") or heads == lm.layers[site.layer].heads else _group(lm, site)


_FINDERS: dict[str, Callable[[Model, Site], Place]] = {
    "embed": _start,
    "pos_embed": _start,
    "pre": _state,
    "mid": _mid,
    "late": _late,
    "post": _state,
    **dict.fromkeys(PROJECTED, _head),
    "bias": _bias,
    "attn_out": _attn_out,
    **dict.fromkeys(MLPS, _mlp),
    "act": _act,
    "neuron": _neuron,
    **dict.fromkeys(("z", "mixer_z"), _z),
    "v_input": _v_input,
    **dict.fromkeys(("q", "k", "v", "pattern", "shared_k", "shared_v"), _attended),
}
