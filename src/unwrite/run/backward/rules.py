"""What would a gradient be if parts of the network were held still? One backward pass of the model's own forward pass.

A rule replaces what the backward pass sees of a module by a surrogate; the forward pass keeps its values bit for bit.

direct     every later node stopped, the final norm's scale held: classic direct logit attribution
net        what later heads write because of a node, through frozen patterns and norms, and later mixers, frozen but for
           their values; MLPs stopped
relp       norms held, an activation is the factor act(x)/x, each factor of a gated product gets half; attention is free
           (Jafari et al. 2025, arXiv 2508.21258: LN, identity and half rule)
gradient   everything differentiated

A norm between the two steps of values, or between heads and the out-projection, is on the way of the stream, and held
where norms are. What gates heads is part of the attention: stopped or constant with the pattern, and free with it, each
factor then with its whole gradient: the half rule is for the products of MLPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unwrite.errors import one_of
from unwrite.model.fold import gain_of, value_columns
from unwrite.model.hooks import Handle, after, before, between
from unwrite.model.mixers import holding
from unwrite.model.norms import is_norm, norm_scale
from unwrite.model.projections import sizes
from unwrite.model.view import Layer, Model
from unwrite.run.edit.sites import last_projection

_STABLE = 1e-6
# How much an expert counts is held: a product of three factors has no agreed rule.
_ROUTERS = ("gate", "shared_expert_gate")

_SETTINGS = {
    "norm": ("free", "held"), "mlp": ("free", "relp", "stopped"), "attention": ("free", "values", "stopped"),
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How each kind of module is seen by the backward pass.

    `norm` "free" or "held"; `mlp` "free", "relp" or "stopped"; `attention` "free", "values" (queries and keys stopped:
    the pattern is a constant) or "stopped". A mixer that shows no values is stopped where attention is not free.
    """

    norm: str = "free"
    mlp: str = "free"
    attention: str = "free"

    def __post_init__(self) -> None:
        for name, known in _SETTINGS.items():
            one_of(f"the rule for {name}", getattr(self, name), known)


RULES: Mapping[str, Rules] = {
    "direct": Rules("held", "stopped", "stopped"),
    "net": Rules("held", "stopped", "values"),
    "relp": Rules("held", "relp", "free"),
    "gradient": Rules(),
}


class _Surrogate(torch.autograd.Function):
    """Forward: `value`. Backward: as if it had been `surrogate`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        # A copy, since some blocks go on to add into what a module gave them.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[0]


def _follow(value: Tensor, surrogate: Tensor) -> Tensor:
    return _Surrogate.apply(value, surrogate.to(value.dtype))  # pyright: ignore[reportReturnType]


def put(lm: Model, rules: Rules) -> Iterator[Handle]:
    """Hooks that make a backward pass follow `rules`; whoever puts them there removes them."""
    if rules.norm == "held":
        for norm in [*(norm for layer in lm.layers for norm in _norms(lm, layer)), lm.final_norm]:
            yield between(norm, partial(_held, lm, norm))
    for layer in lm.layers:
        yield from _mlp_rules(lm, layer, rules.mlp)
        yield from _attention_rules(lm, layer, rules.attention)


def _norms(lm: Model, layer: Layer) -> Iterator[nn.Module]:
    """Every norm on the way of the stream; those of queries and keys are part of the attention."""
    inside = _inside(layer) - {layer.latent_norm, layer.value_norm, layer.head_norm}
    for module in layer.block.modules():
        if module not in inside and is_norm(module, lm.d_model):
            yield module


def _inside(layer: Layer) -> set[nn.Module]:
    """Whatever is part of a layer's attention."""
    return set(layer.attention.modules()) if layer.heads else set()


def _held(lm: Model, norm: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """A norm as a linear map: its scale is a constant."""
    scale, gain = norm_scale(x.detach().to(lm.compute_dtype), norm, lm.row.layer_norm), gain_of(norm, lm)
    x = x - x.mean(-1, keepdim=True) if lm.row.layer_norm else x
    factor = scale[..., None] if gain is None else scale[..., None] * gain.to(scale.device)
    return _follow(output, (x * factor).to(output.device))


def _stopped(module: nn.Module) -> Handle:
    return after(module, Tensor.detach, item=None)


def _mlp_rules(lm: Model, layer: Layer, rule: str) -> Iterator[Handle]:
    if not layer.has_mlp:
        return
    product = last_projection(lm, layer)
    if layer.beside is not None and rule == "stopped":
        yield _stopped(layer.beside)
    # What reads the MLP's state is multiplied by something beside the stream, which is no second factor in it.
    if layer.beside is not None and layer.late is None and rule == "relp":
        yield after(layer.beside, _halved)
    if rule == "stopped":
        yield _stopped(layer.mlp) if product is None else before(product, Tensor.detach)
    if rule != "relp":
        return
    inside = _inside(layer)
    for name, module in layer.block.named_modules():
        if module not in inside and _is_activation(lm, module):
            yield between(module, _as_factor)
        if name.rpartition(".")[2] in _ROUTERS:
            yield _stopped(module)
    if lm.row.gated:
        # All of the input of a mixture of experts goes through products, so half of their gradient is half of all.
        yield after(layer.mlp, _halved) if product is None else before(product, _halved)


def _is_activation(lm: Model, module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None and not module.state_dict()
    return leaf and not is_norm(module, lm.d_model) and not isinstance(module, (nn.Dropout, nn.Identity))


def _as_factor(x: Tensor, output: Tensor) -> Tensor:
    """act(x) as x times the constant act(x)/x."""
    return _follow(output, x * (output / (x + torch.where(x < 0, -_STABLE, _STABLE))).detach())


def _halved(x: Tensor) -> Tensor:
    return _follow(x, x / 2)


def _only(columns: Tensor, made: Tensor) -> Tensor:
    """What a projection puts out, of which only some columns are followed."""
    return _follow(made, made * columns.to(made.device))


def _attention_rules(lm: Model, layer: Layer, rule: str) -> Iterator[Handle]:
    if rule == "free" or not layer.heads:
        return
    if rule == "values" and layer.index in lm.mixed:
        yield from holding(layer, lm.mixed[layer.index])
        return
    if not layer.attends:
        rule = "stopped"
    if rule == "values":
        yield after(layer.value, partial(_only, value_columns(lm, layer)))
        if layer.latent is not None:
            yield after(layer.latent, partial(_only, torch.arange(sizes(layer.latent)[1]) < sizes(layer.value)[0]))
    followed = (
        layer.out_proj,
        *(layer.modules.get(name) for name in ("head_norm", "value", "latent", "latent_norm", "value_norm")),
    )
    # Of what is followed all parts are: an adapter lies beside the weight that it adapts.
    kept = [module for module in followed[: None if rule == "values" else 1] if module is not None]
    parts = {part for module in kept for part in module.modules()}
    for module in layer.attention.modules():
        around = parts.intersection(module.modules())
        if not around and next(module.parameters(), None) is not None:
            yield _stopped(module)
