"""Where is each site in a forward pass, how is it seen there, and how is it changed?

A site lies in what a module reads or puts out, or is a tensor of attention that transformers' AttentionInterface shows.
Some sites are a part of that tensor, and a change is put in its place. Others (what a node writes, a centred stream)
are computed from it and from what was kept earlier in the pass; their change is added where the stream is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.errors import NodeError
from unwrite.model.attention import is_called
from unwrite.model.hooks import Point
from unwrite.model.view import Layer, Model, centre, find, matrix, norm_scale, sizes
from unwrite.model.weights import weight_of
from unwrite.nodes import Location, Site, nearest, parse_site


@dataclass(frozen=True)
class Part:
    """A tensor [prompt, head, …] that attention of a layer sees or computes, by the kind of the sites in it."""

    layer: int
    kind: str


@dataclass
class Pass:
    """One forward pass under way: prompts × positions that it brings, how many came before, and what was kept."""

    prompts: int
    positions: int
    past: int
    kept: dict[Point, Tensor] = field(default_factory=dict)
    seen: set[Point | Part] = field(default_factory=set)

    def rows(self, tensor: Tensor) -> Float[Tensor, "prompt position d"]:
        """Prompts and positions as two axes: OPT flattens them, position embeddings come out once for all prompts."""
        if tensor.dim() == 2:
            return tensor.unflatten(0, (self.prompts, self.positions))
        return tensor.expand(self.prompts, *tensor.shape[1:])


Read = Callable[[Tensor, Pass], Tensor]
Write = Callable[[Tensor, Tensor, Tensor, Pass], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a site is: `read(tensor, pass)` gives x, `write(tensor, x, x', pass)` the tensor that has x' instead.

    `keep`: points whose tensors the pass must have kept; `write` None: it can be read and not changed; `adds`: a change
    is added to what a module writes, so dropout behind it would make it another one.
    """

    point: Point | Part
    read: Read
    write: Write | None
    keep: tuple[Point, ...] = ()
    adds: bool = False


def named(lm: Model, name: object) -> Site:
    """The site called `name`. Raises NodeError, with the nearest ones of this model, for what is no site's name."""
    try:
        return parse_site(name)
    except NodeError as error:
        raise NodeError(str(error), fix=nearest(name, _sites(lm))) from None


def place(lm: Model, site: Site, edited: bool = False) -> Place:
    """Where a site is in this model. Raises NodeError, with the nearest names, if it has none or it is not editable."""
    if (why := _refusal(lm, site)) is not None:
        raise NodeError(f"this model ({lm.family}) has no site {site}", expected=why, fix=nearest(site, _sites(lm)))
    found = _PLACES[site.kind](lm, site)
    if edited and found.write is None:
        fix = (
            f"edit L{site.layer}KV{_group(lm, site)}.{site.kind}, which its group shares"
            if site.kind in ("k", "v")
            else None
        )
        raise NodeError(f"{site} can be read and not edited: no module of {lm.family} shows it by itself", fix=fix)
    return found


def _sites(lm: Model) -> Iterator[Site]:
    """Every site of a model."""
    layers, heads = range(len(lm.layers)), range(lm.n_heads)
    yield from (Site(node.kind, node.layer, node.head) for node in lm.parts)
    yield from (Site(state.state, state.layer) for state in lm.states)
    every = [Site(part, i) for i in layers for part in ("v_input", "attn_out", "act")]
    every += [Site(part, i, head) for i in layers for head in heads for part in ("q", "k", "v", "z", "pattern")]
    every += [Site(part, i, kv) for i in layers for kv in range(lm.kv_heads) for part in ("shared_k", "shared_v")]
    yield from (site for site in every if _refusal(lm, site) is None)


def _refusal(lm: Model, site: Site) -> str | None:
    """Why a model does not have a site; None where it does."""
    if (node := site.node) is not None:
        return None if node in lm.parts else f"one of {len(lm.parts)} nodes from {lm.parts[0]} to {lm.parts[-1]}"
    if not 0 <= site.layer < len(lm.layers):
        return f"a layer from 0 to {len(lm.layers) - 1}"
    heads = {"q", "k", "v", "z", "pattern"}.intersection((part := site.kind.removeprefix("shared_"),))
    count = lm.kv_heads if site.kind.startswith("shared") else lm.n_heads
    if heads and not 0 <= site.head < count:
        return f"a head from 0 to {count - 1}"
    if site.kind == "mid" and lm.parallel:
        return "no state between attention and MLP: its blocks are parallel"
    if site.kind in ("act", "neuron") and last_projection(lm, lm.layers[site.layer]) is None:
        return "an MLP with one last projection; this one is a mixture of experts"
    if site.kind == "neuron" and site.head >= (width := mlp_width(lm, lm.layers[site.layer])):
        return f"a neuron from 0 to {width - 1}"
    if part in ("q", "k") and not is_called(lm) and part not in lm.row.opened(lm.config):
        return "sites that modules show: its queries and keys are turned inside of its attention"
    return None


def _group(lm: Model, site: Site) -> int:
    return site.head if site.kind.startswith("shared") else site.head * lm.kv_heads // lm.n_heads


def _inside(point: Point | Part, select: Read) -> Place:
    """A site that is a part of a tensor."""
    return Place(point, select, partial(_replaced, select))


def _replaced(select: Read, tensor: Tensor, old: Tensor, new: Tensor, now: Pass) -> Tensor:
    changed = tensor.clone(memory_format=torch.contiguous_format)
    select(changed, now).copy_(new)
    return changed


def _beside(point: Point, read: Read, keep: tuple[Point, ...] = (), scale: float = 1.0, adds: bool = True) -> Place:
    """A site that is computed; its change is added to the tensor, which reaches the stream `scale` times."""
    return Place(point, read, partial(_increased, scale), keep, adds)


def _increased(scale: float, tensor: Tensor, old: Tensor, new: Tensor, now: Pass) -> Tensor:
    change = (new - old) / scale
    return (tensor + (change.flatten(0, 1) if tensor.dim() == 2 else change)).to(tensor.dtype)


def _written(lm: Model, module: nn.Module, scale: float) -> Place:
    """What a module hands to the stream, or to what scales it."""
    read: Read = lambda tensor, now: centre(now.rows(tensor).to(lm.compute_dtype) * scale, lm)  # noqa: E731
    return _beside(Point(module, before=False), read, scale=scale)


def _embed(lm: Model, site: Site) -> Place:
    return _written(lm, lm.decoder.get_submodule(lm.row.embed), lm.row.embed_scale(lm.config))


def _pos_embed(lm: Model, site: Site) -> Place:
    return _written(lm, lm.decoder.get_submodule(lm.row.pos_embed or ""), 1.0)


def _mlp(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    return _written(lm, layer.mlp_end, lm.residual_scale)


def _attn_out(lm: Model, site: Site) -> Place:
    return _written(lm, lm.layers[site.layer].attention_end, lm.residual_scale)


def _state(lm: Model, site: Site) -> Place:
    """A state between blocks: what the next block reads, or the final norm."""
    reader = next((layer.block for layer in lm.layers if layer.reads == Location(site.kind, site.layer)), None)
    point = Point(reader or lm.final_norm, before=True)
    if not lm.centred and lm.dtype == lm.compute_dtype:
        return _inside(point, lambda tensor, now: tensor)
    return _beside(point, lambda tensor, now: centre(tensor.to(lm.compute_dtype), lm), adds=False)


def _mid(lm: Model, site: Site) -> Place:
    layer, scale = lm.layers[site.layer], lm.residual_scale
    before = Point(layer.block, before=True)
    read: Read = lambda tensor, now: centre(  # noqa: E731
        (now.kept[before].to(tensor.device) + tensor * scale).to(lm.compute_dtype), lm
    )
    # The norm between attention and MLP reads the stream, but the stream does not go through it.
    return _beside(Point(layer.attention_end, before=False), read, (before,), scale)


def _head(lm: Model, site: Site) -> Place:
    layer, z = lm.layers[site.layer], Point(lm.layers[site.layer].out_proj, before=True)
    read = partial(_head_write, lm, site, z)
    return _beside(Point(layer.attention_end, before=False), read, (z, *_post_norm(layer)), lm.residual_scale)


def _head_write(lm: Model, site: Site, z: Point, tensor: Tensor, now: Pass) -> Tensor:
    layer = lm.layers[site.layer]
    own = now.kept[z].unflatten(-1, (lm.n_heads, lm.head_dim))[:, :, site.head].to(tensor.device, lm.compute_dtype)
    constant = _constants(lm, layer)(_group(lm, site)).to(own.device) if lm.convention == "paper" else 0.0
    return _as_written(lm, layer, (own - constant) @ _w_o(lm, layer)(site.head).to(own.device), now)


def _bias(lm: Model, site: Site) -> Place:
    layer, scale = lm.layers[site.layer], lm.residual_scale
    return _beside(Point(layer.attention_end, before=False), partial(_bias_write, lm, layer), _post_norm(layer), scale)


def _bias_write(lm: Model, layer: Layer, tensor: Tensor, now: Pass) -> Tensor:
    constant = tensor.new_zeros(lm.d_model, dtype=lm.compute_dtype)
    if lm.convention == "paper":
        of_group, w_o = _constants(lm, layer), _w_o(lm, layer)
        for head in range(lm.n_heads):
            write = of_group(head * lm.kv_heads // lm.n_heads).to(constant.device) @ w_o(head).to(constant.device)
            constant = constant + write
    if (bias := weight_of(layer.out_proj, "bias")) is not None:
        constant = constant + bias.to(constant)
    return _as_written(lm, layer, constant.expand(now.prompts, now.positions, -1), now)


def _post_norm(layer: Layer) -> tuple[Point, ...]:
    return () if layer.post_attention_norm is None else (Point(layer.post_attention_norm, before=True),)


def _as_written(lm: Model, layer: Layer, write: Tensor, now: Pass) -> Tensor:
    """A part of what out_proj puts out, as it reaches the stream: through the post-norm with its scale in this pass."""
    for point in _post_norm(layer):
        weight = weight_of(point.module)
        scale = norm_scale(now.kept[point].to(write), point.module, lm.row.layer_norm)
        gain = 1.0 if weight is None else weight.to(write) + lm.row.norm_gain_offset
        write = write * scale[..., None] * gain
    return centre(write * lm.residual_scale, lm)


# The weights of `view.fold`, but in the graph of autograd: a removed write must take its gradients with it.
def _w_o(lm: Model, layer: Layer) -> Callable[[int], Float[Tensor, "d_head d_model"]]:
    """W_O of each head."""
    weight, width = matrix(layer.out_proj), lm.head_dim
    return lambda head: weight[head * width : (head + 1) * width].to(lm.compute_dtype)


def _constants(lm: Model, layer: Layer) -> Callable[[int], Float[Tensor, " d_head"]]:
    """What the biases of values and norm put into z of a key/value head's group, as a row of a pattern sums to 1."""
    weight, bias = matrix(layer.value), weight_of(layer.value, "bias")
    beta = weight_of(layer.input_norm, "bias")
    fixed = (weight.new_zeros(weight.shape[1]) if bias is None else bias).to(lm.compute_dtype)
    if beta is None:
        return lambda group: _values(lm, fixed, group)
    shift = beta.to(weight.device, lm.compute_dtype)
    return lambda group: _values(lm, fixed, group) + shift @ _values(lm, weight, group).to(lm.compute_dtype)


def _values(lm: Model, fused: Tensor, group: int) -> Tensor:
    """The columns of a key/value head's values in what the value projection puts out."""
    if lm.row.grouped_values:
        return fused.unflatten(-1, (lm.kv_heads, -1, lm.head_dim))[..., group, -1, :]
    last = fused[..., fused.shape[-1] - lm.kv_heads * lm.head_dim :]
    return last.unflatten(-1, (lm.kv_heads, lm.head_dim))[..., group, :]


def _z(lm: Model, site: Site) -> Place:
    select: Read = lambda tensor, now: tensor.unflatten(-1, (lm.n_heads, lm.head_dim))[:, :, site.head]  # noqa: E731
    return _inside(Point(lm.layers[site.layer].out_proj, before=True), select)


def _act(lm: Model, site: Site) -> Place:
    projection = last_projection(lm, lm.layers[site.layer])
    assert projection is not None  # noqa: S101 (refused before)
    return _inside(Point(projection, before=True), lambda tensor, now: now.rows(tensor))


def _neuron(lm: Model, site: Site) -> Place:
    whole = _act(lm, site)
    own: Read = lambda tensor, now: now.rows(tensor)[..., site.head : site.head + 1]  # noqa: E731
    return _inside(whole.point, own)


def mlp_width(lm: Model, layer: Layer) -> int:
    """Hidden activations of a layer's MLP; 0 for a mixture of experts."""
    projection = last_projection(lm, layer)
    return 0 if projection is None else sizes(projection)[0]


def last_projection(lm: Model, layer: Layer) -> nn.Module | None:
    """What reads the MLP's hidden activations; None in a mixture of experts."""
    try:
        return find(layer.mlp, lm.row.act)
    except AttributeError:  # a mixture of experts
        return None


def _v_input(lm: Model, site: Site) -> Place:
    layer = lm.layers[site.layer]
    before = Point(layer.block, before=True)
    read: Read = lambda tensor, now: centre(now.kept[before].to(lm.compute_dtype), lm)  # noqa: E731
    return Place(Point(layer.value, before=False), read, partial(_values_of, lm, layer, before), (before,))


def _values_of(lm: Model, layer: Layer, before: Point, tensor: Tensor, old: Tensor, new: Tensor, now: Pass) -> Tensor:
    """What the value projection puts out, with values that read another stream."""
    stream = (now.kept[before] + (new - old).to(now.kept[before].device)).to(now.kept[before].dtype)
    # `forward`, and not a call: hooks see only what the model itself does.
    normed = stream if layer.input_norm is None else layer.input_norm.forward(stream)
    put_out, changed = layer.value.forward(normed), tensor.clone(memory_format=torch.contiguous_format)
    for group in range(lm.kv_heads):
        _values(lm, changed, group).copy_(_values(lm, put_out, group))
    return changed


def _attended(lm: Model, site: Site) -> Place:
    """What attention sees (q, k, v) or computes (the pattern)."""
    part, layer = site.kind.removeprefix("shared_"), lm.layers[site.layer]
    if is_called(lm):
        return _inside(Part(site.layer, site.kind), lambda tensor, now: tensor[:, _row(lm, site, tensor.shape[1])])
    opened = lm.row.opened(lm.config)
    if part != "pattern":
        found = _inside(Point(find(layer.attention, opened[part]), before=False), partial(_projected, lm, site, part))
        # One head's copy of what its group reads from one place is nowhere.
        return replace(found, write=None) if site.kind in ("k", "v") and lm.kv_heads < lm.n_heads else found
    select: Read = lambda tensor, now: tensor[:, site.head]  # noqa: E731
    if part in opened:
        return _inside(Point(find(layer.attention, opened[part]), before=False), select)
    return Place(Point(layer.attention, before=False, item=1), select, None)


def _row(lm: Model, site: Site, heads: int) -> int:
    """The row of a site on an axis of query heads, or of the key/value heads that they share."""
    return site.head if site.kind.startswith("shared") or heads == lm.n_heads else _group(lm, site)


def _projected(lm: Model, site: Site, part: str, tensor: Tensor, now: Pass) -> Tensor:
    """A head's part of what a projection puts out."""
    if not lm.row.grouped_values:
        return tensor.unflatten(-1, (-1, lm.head_dim))[:, :, site.head]
    each = lm.n_heads // lm.kv_heads
    fused = tensor.unflatten(-1, (lm.kv_heads, each + 2, lm.head_dim))[:, :, _group(lm, site)]
    return fused[:, :, {"q": site.head % each, "k": -2, "v": -1}[part]]


_PLACES: dict[str, Callable[[Model, Site], Place]] = {
    "embed": _embed,
    "pos_embed": _pos_embed,
    "pre": _state,
    "mid": _mid,
    "post": _state,
    "head": _head,
    "bias": _bias,
    "attn_out": _attn_out,
    "mlp": _mlp,
    "act": _act,
    "neuron": _neuron,
    "z": _z,
    "v_input": _v_input,
    **dict.fromkeys(("q", "k", "v", "pattern", "shared_k", "shared_v"), _attended),
}
