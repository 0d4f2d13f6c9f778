"""Which modules of a block read or write the stream, and which does it lack?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from unwrite.errors import ModelError
from unwrite.model.families import Family
from unwrite.model.inside import find, held, maybe
from unwrite.model.projections import sizes
from unwrite.nodes import Location

_Number = TypeVar("_Number", int, float)
# What a layer may lack.
_CALLED = {"attention": "attention", "out_proj": "attention", "value": "values of attention", "mlp": "MLP",
           "beside": "second MLP"}  # fmt: skip
# What makes values.
_MADE = ("value", "latent", "latent_norm", "value_norm")


@dataclass(frozen=True)
class Layer:
    """The modules of one block that read or write the stream.

    `attention` is what mixes positions: attention, or in its place a mixer, which has no pattern and no values. Its
    `heads`, each `head_dim` wide, write through `out_proj`; `kv_heads` are the key/value heads that they share. A layer
    may lack it, and has no heads then, or lack an MLP. Raises ModelError where a module is asked for that it lacks.
    """

    index: int
    block: nn.Module
    modules: Mapping[str, nn.Module]  # attention, out_proj, value, latent, its norm, that of heads, mlp: what there is
    input_norm: nn.Module | None
    mid: nn.Module | None
    late: nn.Module | None
    post_attention_norm: nn.Module | None
    post_mlp_norm: nn.Module | None
    post_beside_norm: nn.Module | None
    out_bias: tuple[nn.Module, str] | None  # the module that holds it, and its name there
    heads: int
    kv_heads: int
    residual_scale: float  # by which what attention and MLP put out is multiplied before the stream takes it in
    gain: float  # by which the block multiplies all that it gives, the stream and what joined it
    mid_gain: float  # by which it did before its MLP reads that
    to_end: float  # by which, the gains of this block and of all later ones, all in its stream reaches the end
    values_of: Layer | None  # the layer whose keys and values its attention looks at, if they are not its own

    @property
    def into(self) -> float:
        """By which what attention and MLP put out is multiplied until it is in the final stream."""
        return self.residual_scale * self.to_end

    @property
    def mid_to_end(self) -> float:
        """By which the state between attention and MLP reaches the end."""
        return self.to_end / self.mid_gain

    @property
    def attention(self) -> nn.Module:
        """What mixes positions."""
        return self._module("attention")

    @property
    def out_proj(self) -> nn.Module:
        """The projection through which it writes."""
        return self._module("out_proj")

    @property
    def value(self) -> nn.Module:
        """What makes the values of its attention."""
        return self._module("value")

    @property
    def mlp(self) -> nn.Module:
        """Its MLP."""
        return self._module("mlp")

    def _module(self, name: str) -> nn.Module:
        if name not in self.modules:
            raise ModelError(
                f"layer {self.index} has no {_CALLED[name]}", got=f"a layer with {' and '.join(self.modules)}",
                fix="ask it of another layer",
            )  # fmt: skip
        return self.modules[name]

    @property
    def beside(self) -> nn.Module | None:
        """What writes beside its MLP, if anything does."""
        return self.modules.get("beside")

    @property
    def attends(self) -> bool:
        """Has it attention, with values and a pattern?"""
        return "value" in self.modules

    @property
    def mixes(self) -> bool:
        """Has it a mixer in the place of attention?"""
        return self.heads > 0 and not self.attends

    @property
    def has_mlp(self) -> bool:
        """Has it an MLP?"""
        return "mlp" in self.modules

    @property
    def kind(self) -> str:
        """The kind of the nodes that write through `out_proj`."""
        return "head" if self.attends else "mixer"

    @property
    def head_dim(self) -> int:
        """How wide what a head hands to `out_proj` is."""
        return sizes(self.out_proj)[0] // self.heads if self.heads else 0

    @property
    def reads(self) -> Location:
        """The state of the stream that this block reads."""
        return Location("post", self.index - 1) if self.index else Location("pre", 0)

    @property
    def latent(self) -> nn.Module | None:
        """The first of the two projections that make its values, if there are two."""
        return self.modules.get("latent")

    @property
    def latent_norm(self) -> nn.Module | None:
        """The norm between these two."""
        return self.modules.get("latent_norm")

    @property
    def value_norm(self) -> nn.Module | None:
        """The norm through which attention is given values, those of each head by themselves, if there is one."""
        return self.modules.get("value_norm")

    @property
    def makes_values(self) -> Layer:
        """The layer whose stream its values are made of: its own, or an earlier one."""
        return self.values_of or self

    @property
    def head_norm(self) -> nn.Module | None:
        """The norm between attention and its out-projection, if there is one."""
        return self.modules.get("head_norm")

    @property
    def read_by_value(self) -> nn.Module | None:
        """The norm that what makes the values reads."""
        return self.latent_norm or self.makes_values.input_norm

    @property
    def attention_end(self) -> nn.Module:
        """What puts out all that attention writes but for `outside`, still apart from the stream."""
        return self.post_attention_norm or self.out_proj

    def end(self, kind: str) -> nn.Module:
        """What puts out all that nodes of a kind write, still apart from the stream."""
        if kind == "beside":
            return self.post_beside_norm or self._module("beside")
        return self.mlp_end if kind == "mlp" else self.attention_end

    @property
    def mlp_end(self) -> nn.Module:
        """What puts out all that the MLP writes, still apart from the stream."""
        return self.post_mlp_norm or self.mlp


def layers_of(row: Family, config: Any, blocks: Sequence[nn.Module]) -> tuple[Layer, ...]:
    """The blocks as the row of their model describes them, first to last."""
    gains = [_of_layer(row.gain, config, index) for index in range(len(blocks))]
    to_end = [math.prod(gains[index:]) for index in range(len(blocks))]
    layers: list[Layer] = []
    for index, block in enumerate(blocks):
        source = row.shared(config).get(index)
        of = None if source is None else layers[source]
        layers.append(_layer_of(row, config, index, block, gains[index], to_end[index], of))
    return tuple(layers)


def _layer_of(
    row: Family, config: Any, index: int, block: nn.Module, gain: float, to_end: float, of: Layer | None
) -> Layer:
    row, mixers = row.of_layer(index), row.mixers(config)
    modules = _modules(row, block, index in mixers, of)
    heads = mixers.get(index) or _of_layer(row.heads, config, index)
    return Layer(
        index,
        block,
        modules,
        input_norm=maybe(block, row.input_norm),
        mid=maybe(block, row.mid) if {"out_proj", "mlp"} <= {*modules} else None,
        late=maybe(block, row.late) if "beside" in modules else None,
        post_attention_norm=maybe(block, row.post_attention_norm),
        post_mlp_norm=maybe(block, row.post_mlp_norm),
        post_beside_norm=maybe(block, row.post_beside_norm),
        out_bias=held(block, row.out_bias),
        heads=heads if "out_proj" in modules else 0,
        kv_heads=_of_layer(row.kv_heads, config, index) if "value" in modules else 0,
        residual_scale=_of_layer(row.residual_scale, config, index),
        gain=gain,
        mid_gain=_of_layer(row.mid_gain, config, index),
        to_end=to_end,
        values_of=of,
    )


def _modules(row: Family, block: nn.Module, mixes: bool, of: Layer | None) -> dict[str, nn.Module]:
    """What there is of attention, or a mixer, and MLP; where both have one path, what has an out-projection is none."""
    attention, mlp = maybe(block, row.attention), maybe(block, row.mlp)
    out_proj = maybe(attention, row.out_proj)
    value = None if mixes or of or out_proj is None else find(attention or block, row.value)
    made = {"value": value, **{name: maybe(attention, getattr(row, name)) for name in _MADE[1:]}}
    if of is not None:
        made = {name: of.modules.get(name) for name in _MADE}
    beside = {**made, "head_norm": maybe(attention, row.head_norm)}
    mixing = {} if out_proj is None else {"attention": attention, "out_proj": out_proj, **beside}
    every = {**mixing, "mlp": None if mixing and mlp is attention else mlp, "beside": maybe(block, row.beside)}
    return {name: module for name, module in every.items() if module is not None}


def _of_layer(number: Callable[[Any], _Number | Sequence[_Number]], config: Any, index: int) -> _Number:
    every = number(config)
    return every[index] if isinstance(every, Sequence) else every
