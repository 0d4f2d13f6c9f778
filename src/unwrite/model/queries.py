"""What makes queries and keys, and how does attention turn them before it compares them? Found, and then seen.

Their projection is a part of the one that makes values, or lies beside it under the name that goes with it. What stands
between it and attention (a norm of queries, rotary positions) is seen in one pass: the projection's output is set to
each unit vector e_i, and what attention is given at a position is f(e_i), so that T = f(e_i) − f(0) is all of it that
is linear: C diag(γ) R for a norm with the gain γ (its scale, the same for all e_i, is left out) and a rotation R. In
one more prompt every head, and queries and keys, get unit vectors of their own: so it is seen that each is whose it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.errors import NodeError
from unwrite.model.attention import Attend, Attended, around_attention, is_called
from unwrite.model.capture import evaluating
from unwrite.model.hooks import after, before, hooked, kept
from unwrite.model.inside import maybe
from unwrite.model.placed import decode
from unwrite.model.projections import sizes
from unwrite.model.view import Layer, Model

WHOSE = {"q": "queries", "k": "keys"}
# A name of what makes values, and what stands there in that of what makes queries or keys.
_NAMED = (("value", {"q": "query", "k": "key"}), (r"(?<![a-z])v(?![a-z])|(?<=w)v$", {"q": "q", "k": "k"}))
# Below this part of a unit vector nothing of it arrives; above this one a doubled one is not doubled, or another's.
_NOTHING, _BENT = 1e-6, 1e-2
# Which unit vector is the mark of a head's queries, and of its keys, beyond its number.
_MARKS = (0, 1)


@dataclass(frozen=True, eq=False)
class Maker:
    """The module that makes the queries of a layer's heads, or keys, and which of its outputs are those of each."""

    module: nn.Module
    columns: Int[Tensor, "head width"]


@dataclass(frozen=True, eq=False)
class Turned:
    """What becomes of a projection's output on the way to attention, by rows: of each query head, and of each key.

    `normed`: a positive factor, which depends on the vector, is left out.
    """

    query: Float[Tensor, "head width width"]
    key: Float[Tensor, "kv_head width width"]
    normed: bool


def unit_in(lm: Model, layer: Layer, part: str, head: int, module: nn.Module) -> int:
    """The place of a head's queries ("q"), or of a key/value head's "k" or "v", among heads' widths in one projection.

    `head` is a query head. Before the values of a group lie its keys, and before these its queries.
    """
    own, (groups, behind) = head * layer.kv_heads // layer.heads, lm.row.value_layout(lm.config)
    each, size = layer.kv_heads // groups, sizes(module)[1] // groups // layer.head_dim
    values = size - behind - each
    within = {"q": head % max(1, values - each), "k": values - each + own % each, "v": values + own % each}
    return own // each * size + within[part]


def made(lm: Model, layer: Layer, part: str) -> Maker:
    """What makes queries ("q") or keys ("k") of a layer. Raises NodeError, with the reason, where nothing does."""
    heads = layer.heads if part == "q" else layer.kv_heads
    if (why := _lacks(lm, layer, part)) is not None:
        raise _lacking(lm, layer, part, why)
    if sizes(layer.value)[1] > layer.kv_heads * layer.head_dim:
        first = range(layer.heads) if part == "q" else range(0, layer.heads, layer.heads // layer.kv_heads)
        places = torch.tensor([unit_in(lm, layer, part, head, layer.value) for head in first])
        return Maker(layer.value, places[:, None] * layer.head_dim + torch.arange(layer.head_dim))
    module = maybe(layer.attention, _beside(lm.row.of_layer(layer.index).value, part))
    if module is None or sizes(module)[1] % heads:
        raise _lacking(lm, layer, part, "no one projection beside that of its values makes them")
    return Maker(module, torch.arange(sizes(module)[1]).view(heads, -1))


def _lacks(lm: Model, layer: Layer, part: str) -> str | None:
    if not layer.attends:
        return "it has no attention"
    if layer.values_of is not None or layer.latent is not None:
        return "its keys are those of an earlier layer" if layer.latent is None else "they are made in two steps"
    if not is_called(lm) and part not in lm.row.opened(lm.config):
        return "they are turned inside of its attention, where no module shows them"
    return None


def _lacking(lm: Model, layer: Layer, part: str, why: str) -> NodeError:
    return NodeError(
        f"the {WHOSE[part]} of layer {layer.index} ({lm.family}) have no matrix of their own", got=why,
        fix='leave this side out (sides="v"), or name readers of other layers',
    )  # fmt: skip


def _beside(path: str, part: str) -> str:
    """The path of what makes values, as it would be of queries or keys."""
    place, dot, name = path.rpartition(".")
    for said, instead in _NAMED:
        if re.search(said, name):
            return f"{place}{dot}{re.sub(said, instead[part], name, count=1)}"
    return f"{place}{dot}{name}.{part}"  # there is none


@torch.no_grad()
def turned(lm: Model, layers: list[Layer], offset: int) -> dict[int, Turned]:
    """How queries are turned `offset` tokens behind the first, and keys at the first, in each of some layers.

    One pass over as many prompts as a head is wide, of offset + 1 tokens. Raises NodeError as `made` does, and where
    what was taken for the maker of queries is seen to be none.
    """
    makers = {layer.index: (made(lm, layer, "q"), made(lm, layer, "k")) for layer in layers}
    if not is_called(lm):
        return {layer: Turned(*(_eye(lm, part) for part in both), normed=False) for layer, both in makers.items()}
    wide = max(part.columns.shape[1] for both in makers.values() for part in both)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def around(layer: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        if layer in makers:
            seen[layer] = query[:, :, offset].to(lm.compute_dtype), key[:, :, 0].to(lm.compute_dtype)
        return attend(query, key, value)

    reads: dict[nn.Module, Tensor] = {}
    modules = {module for layer in layers for module in (layer.value, *(part.module for part in makers[layer.index]))}
    puts = [
        after(part.module, partial(_units, part, wide, mark))
        for both in makers.values() for part, mark in zip(both, _MARKS, strict=True)
    ]  # fmt: skip
    ids = torch.full((wide + 3, offset + 1), lm.vocabulary // 2, device=lm.device)
    puts += [before(one, kept(reads, one)) for one in modules]
    with evaluating(lm.hf), hooked(puts), around_attention(lm, around, eager=False):
        decode(lm, ids, use_cache=False)
    return {layer.index: _linear_part(lm, layer, makers[layer.index], seen[layer.index], reads) for layer in layers}


def _eye(lm: Model, part: Maker) -> Float[Tensor, "head width width"]:
    heads, width = part.columns.shape
    return torch.eye(width, dtype=lm.compute_dtype, device=lm.device).expand(heads, -1, -1)


def _units(part: Maker, wide: int, mark: int, output: Tensor) -> Tensor:
    """Nothing, each unit vector, twice the first one, and each head's mark, prompt by prompt, instead of its output."""
    heads, width = part.columns.shape
    units = torch.eye(wide, width, dtype=output.dtype, device=output.device)
    same = torch.cat([torch.zeros_like(units[:1]), units, 2 * units[:1]])[:, None].expand(-1, heads, -1)
    rows = torch.cat([same, units[_marks(part, mark)][None]]).flatten(1)
    new = output.clone().view(len(rows), -1, output.shape[-1])
    new[..., part.columns.flatten().to(output.device)] = rows[:, None]
    return new.view_as(output)


def _marks(part: Maker, mark: int) -> Int[Tensor, " head"]:
    heads, width = part.columns.shape
    return (torch.arange(heads) + mark) % width


def _linear_part(
    lm: Model, layer: Layer, parts: tuple[Maker, Maker], seen: tuple[Tensor, Tensor], reads: dict[nn.Module, Tensor]
) -> Turned:
    """What is linear in what was seen. Raises NodeError where nothing arrived, or another state is read."""
    found, bent = [], False
    for name, part, given, mark in zip(WHOSE, parts, seen, _MARKS, strict=True):
        heads, width = part.columns.shape
        linear = (given[1 : width + 1] - given[:1]).transpose(0, 1).to(lm.device)
        fits = linear.shape == (heads, width, width)
        if not fits or float(linear.flatten(1).norm(dim=1).min()) < _NOTHING:
            raise _lacking(lm, layer, name, "what lies beside that of its values is not what makes them")
        marked = linear[torch.arange(heads), _marks(part, mark)]
        doubled, own = ((one - given[0]).to(lm.device) for one in given[-2:])
        if bool((torch.nn.functional.cosine_similarity(own, marked, dim=1) < 1 - _BENT).any()):
            raise _lacking(lm, layer, name, "they lie in another order than its values")
        if not torch.equal(reads[part.module], reads[layer.value]):
            raise _lacking(lm, layer, name, "they are made of another state than its values")
        bent = bent or bool((doubled - 2 * linear[:, 0]).norm() > _BENT * linear[:, 0].norm())
        found.append(linear)
    return Turned(found[0], found[1], bent)
