"""What turns the factors of a forward pass into writes, and the stream into values? Matrices, from the weights.

They include scales, gains of blocks and that of a post-norm, and are centred where the convention says so. They are
copied where they must be; no weight of the model is ever changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unwrite.model.layers import Layer
from unwrite.model.projections import bias_of, has_bias, matrix_of, sizes
from unwrite.model.view import Model, is_constant
from unwrite.model.weights import weight_of


def _exact(lm: Model, weight: Tensor, detach: bool = True) -> Tensor:
    """A weight where statistics are, in the dtype in which they are computed; in autograd's graph unless detached."""
    return (weight.detach() if detach else weight).to(lm.device, lm.compute_dtype)


@dataclass(frozen=True)
class Folded:
    """What turns the factors of one layer's attention into writes.

    `w_o` includes the residual scale, the gains of blocks and of a post-norm, and is centred under the convention;
    `constant` is the part of z that the convention moves to the bias node, whose write is `bias` (times a post-norm's
    frozen scale).
    """

    w_o: Float[Tensor, "head d_head d_model"]
    constant: Float[Tensor, "head d_head"] | None
    bias: Float[Tensor, " d_model"]


def fold(lm: Model) -> tuple[Folded, ...]:
    """`Folded` of every layer, from the weights as they are now."""
    return tuple(folded(lm, layer) for layer in lm.layers)


def folded(lm: Model, layer: Layer, detach: bool = True) -> Folded:
    """`Folded` of one layer; with `detach` False in the graph of autograd."""
    if not layer.heads:
        nothing = torch.zeros(0, 0, lm.d_model, dtype=lm.compute_dtype, device=lm.device)
        return Folded(nothing, None, nothing.sum((0, 1)))
    scale = layer.into
    gain = gain_of(layer.post_attention_norm, lm, detach)
    shape: Callable[[Tensor], Tensor] = lambda write: centre(write if gain is None else write * gain, lm)  # noqa: E731
    weight = _exact(lm, matrix_of(lm, layer.out_proj, detach), detach).view(layer.heads, layer.head_dim, lm.d_model)
    w_o = shape(weight if scale == 1.0 else weight * scale)
    constant = value_constant(lm, layer, detach) if lm.convention == "paper" and layer.attends else None
    parts = [] if constant is None else [torch.einsum("hk,hkd->d", constant, w_o)]
    if (bias := bias_of(lm, layer.out_proj, detach)) is not None:
        parts.append(shape(_exact(lm, bias, detach) * scale))
    if (beside := outside(lm, layer, detach)) is not None:
        parts.append(centre(beside * scale, lm))
    return Folded(w_o, constant, sum(parts, w_o.new_zeros(lm.d_model)))


def outside(lm: Model, layer: Layer, detach: bool = True) -> Float[Tensor, " d_model"] | None:
    """What the block adds to all that attention puts out, in units of this; mostly nothing."""
    weight = None if layer.out_bias is None else weight_of(*layer.out_bias)
    return None if weight is None else _exact(lm, weight, detach)


def centre(write: Float[Tensor, "*rows d_model"], lm: Model) -> Float[Tensor, "*rows d_model"]:
    """Remove the mean over d_model if the model's convention does."""
    return write - write.mean(-1, keepdim=True) if lm.centred else write


def gain_of(norm: nn.Module | None, lm: Model, detach: bool = True) -> Float[Tensor, " d_model"] | None:
    """A norm's multiplicative gain; None without a norm, or for a norm without one."""
    weight = weight_of(norm)
    return None if weight is None else _exact(lm, weight, detach) + lm.row.norm_gain_offset


def value_columns(lm: Model, layer: Layer) -> Bool[Tensor, " output"]:
    """Which outputs of the module that makes the values are values; the others are queries and keys."""
    groups, behind = lm.row.value_layout(lm.config)
    is_value = torch.zeros(sizes(layer.value)[1], dtype=torch.bool, device=lm.device)
    each = is_value.view(groups, -1)
    end = each.shape[1] - behind * layer.head_dim
    each[:, end - layer.kv_heads // groups * layer.head_dim : end] = True
    return is_value


def value_weights(
    lm: Model, layer: Layer, detach: bool = True
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    """W_V and its bias for every query head (a group's heads share theirs), times the gain of a norm of values."""
    weight, bias = made_values(lm, layer, detach)
    gain = gain_of(layer.value_norm, lm, detach)
    each = layer.heads // layer.kv_heads
    heads, biases = (part if gain is None else part * gain for part in (weight, bias))
    return heads.repeat_interleave(each, dim=0), biases.repeat_interleave(each, dim=0)


def made_values(
    lm: Model, layer: Layer, detach: bool = True
) -> tuple[Float[Tensor, "kv_head d_model d_head"], Float[Tensor, "kv_head d_head"]]:
    """W_V and its bias for every key/value head, before a norm of values if there is one."""
    weight, bias = _exact(lm, matrix_of(lm, layer.value, detach), detach), bias_of(lm, layer.value, detach)
    both = weight if bias is None else torch.cat([weight, _exact(lm, bias, detach)[None]])
    kv, width = layer.kv_heads, layer.head_dim
    values = both[:, value_columns(lm, layer)].unflatten(1, (kv, width)) * lm.row.value_factor(lm.config)
    heads = values.transpose(0, 1)
    if bias is None:
        return heads, heads.new_zeros(kv, width)
    return heads[:, :-1], heads[:, -1]


def value_constant(lm: Model, layer: Layer, detach: bool = True) -> Float[Tensor, "head d_head"] | None:
    """What the value bias and the norm's bias put into every head's z: rows of a pattern sum to 1, so it is constant.

    None where it is neither there nor constant. (Facts: o_h without constant = o_h − (β W_V + b_V) W_O.)
    """
    return value_bias(lm, layer, detach) if is_constant(lm, layer) else None


def value_bias(lm: Model, layer: Layer, detach: bool = True) -> Float[Tensor, "head d_head"] | None:
    """What the bias of the values' projection, and that of the norm that it reads, put into every head's values."""
    beta = weight_of(layer.read_by_value, "bias")
    if beta is None and not has_bias(lm, layer.value):
        return None
    weight, bias = value_weights(lm, layer, detach)
    return bias if beta is None else bias + torch.einsum("d,hdk->hk", _exact(lm, beta, detach), weight)
