"""What does a vector in the stream become when heads carry it through their values? Pattern and norms frozen: linear.

C_{w→e}(q) = Σ_i A_e[q, i] · norm(o_w(i)) · W_V^e W_O^e (Dao, Lau, Rager, Janiak 2023, eq. 3, with attention weights),
where norm is linear once its scale is held: centred if it centres, times its gain, times the scale of the clean run.
Values that are made in two steps (DeepSeek-AI 2024, arXiv 2405.04434, §2.1) have a norm between the two, whose
scale is held as well: one more number for each position, which all heads share. Where values are normed, those of each
head by themselves (Gemma 4), it is one more for each position and key/value head. Where heads' outputs are gated or
normed before W_O, what they are multiplied by is held at what it was in the run that showed the pattern.

Vectors in the stream are given as they arrive at its end; `stream` is the one that the values are made of, which may be
that of an earlier layer (`makes_values`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from unwrite.model.fold import gain_of, made_values, value_bias, value_constant, value_weights
from unwrite.model.norms import norm_scale
from unwrite.model.projections import bias_of, matrix_of, sizes
from unwrite.model.view import Layer, Model
from unwrite.model.weights import weight_of


def value_scale(
    lm: Model, layer: Layer, stream: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt position *kv_head"] | None:
    """The scale of the norm through which this layer's values read `stream`, times that of a norm of their latents, and
    of a norm of themselves, which every key/value head has of its own.

    None where they read it bare.
    """
    scale = _read_at(lm, layer, stream)
    if layer.value_norm is None:
        return scale
    of_heads = head_scale(lm, layer, stream)
    return of_heads if scale is None else scale[..., None] * of_heads


def _read_at(lm: Model, layer: Layer, stream: Tensor) -> Float[Tensor, "prompt position"] | None:
    """The scale at which what makes the values reads `stream`."""
    norm = layer.makes_values.input_norm
    scale = None if norm is None else norm_scale(_here(layer, stream), norm, lm.row.layer_norm)
    if layer.latent is None:
        return scale
    of_latents = latent_scale(lm, layer, stream)
    return of_latents if scale is None else scale * of_latents


def head_scale(
    lm: Model, layer: Layer, stream: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt position kv_head"]:
    """The scale of the norm of values, those of each key/value head by themselves, that are made of `stream`."""
    assert layer.value_norm is not None  # noqa: S101 (asked for where there is one)
    scale, read, (weight, bias) = _read_at(lm, layer, stream), into_values(lm, layer, stream), made_values(lm, layer)
    read = read if scale is None else read * scale[..., None]
    if layer.latent is not None and (of_latents := latent_bias(lm, layer)) is not None:
        read = read + from_latents(lm, layer, of_latents) * latent_scale(lm, layer, stream)[..., None]
    if (beta := weight_of(layer.read_by_value, "bias")) is not None:
        read = read + beta.detach().to(read)
    made = (read[:, None] @ weight + bias[:, None]).transpose(1, 2)
    return norm_scale(made, layer.value_norm, centred=False)


def _here(layer: Layer, vector: Tensor) -> Tensor:
    """A vector as it is in the stream where values are made of it."""
    return vector if layer.makes_values.to_end == 1 else vector / layer.makes_values.to_end


def latent_scale(
    lm: Model, layer: Layer, stream: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt position"]:
    """The scale of the norm between the two steps in which this layer's values are made of `stream`."""
    assert layer.latent_norm is not None  # noqa: S101 (asked for where there is one)
    norm, stream = layer.makes_values.input_norm, _here(layer, stream)
    normed = _linear(lm, norm, stream)
    if norm is not None:
        normed = normed * norm_scale(stream, norm, lm.row.layer_norm)[..., None]
    bias = latent_bias(lm, layer)
    made = normed @ _down(lm, layer)
    return norm_scale(made if bias is None else made + bias, layer.latent_norm, lm.row.layer_norm)


def latent_bias(lm: Model, layer: Layer) -> Float[Tensor, " latent"] | None:
    """What biases before the norm of latents put into these; None where there are none."""
    assert layer.latent is not None  # noqa: S101 (asked for where there is one)
    down, bias, beta = _down(lm, layer), bias_of(lm, layer.latent), weight_of(layer.makes_values.input_norm, "bias")
    parts = [] if beta is None else [beta.detach().to(down) @ down]
    parts += [] if bias is None else [bias.detach().to(down)[: down.shape[1]]]
    return sum(parts, down.new_zeros(down.shape[1])) if parts else None


def _down(lm: Model, layer: Layer) -> Float[Tensor, "d_model latent"]:
    """The first of two steps: what its projection puts out besides is no part of the values."""
    assert layer.latent is not None  # noqa: S101 (asked for where there is one)
    return matrix_of(lm, layer.latent).detach()[:, : sizes(layer.value)[0]].to(lm.device, lm.compute_dtype)


def _linear(lm: Model, norm: nn.Module | None, vector: Tensor) -> Tensor:
    """What a norm does but for its scale and its bias: centred if it centres, times its gain."""
    if norm is None:
        return vector
    gain = gain_of(norm, lm)
    centred = vector - vector.mean(-1, keepdim=True) if lm.row.layer_norm else vector
    return centred if gain is None else centred * gain


def into_values(lm: Model, layer: Layer, vector: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows read"]:
    """What a vector in the stream is in what the values' projection reads, but for norms' scales and biases."""
    vector = _linear(lm, layer.makes_values.input_norm, _here(layer, vector))
    return vector if layer.latent is None else from_latents(lm, layer, vector @ _down(lm, layer))


def read_by_values(lm: Model, layer: Layer) -> Float[Tensor, "head d_model d_head"]:
    """What makes every query head's values of a vector in the stream, but for norms' scales and biases."""
    weight = value_weights(lm, layer)[0]
    if layer.latent is not None:
        weight = _down(lm, layer) @ folded_into(lm, layer.latent_norm, weight)
    return folded_into(lm, layer.makes_values.input_norm, weight) / layer.makes_values.to_end


def folded_into(
    lm: Model, norm: nn.Module | None, weight: Float[Tensor, "head read out"]
) -> Float[Tensor, "head read out"]:
    """Matrices as if they read what a norm reads: times its gain, and centred if it centres; its scale is held."""
    if norm is None:
        return weight
    gain = gain_of(norm, lm)
    weight = weight if gain is None else weight * gain[:, None]
    return weight - weight.mean(-2, keepdim=True) if lm.row.layer_norm else weight


def read_by(
    lm: Model, layer: Layer, vector: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows"] | None
) -> Float[Tensor, "*rows read"]:
    """The same, the `scale` of norms held: of a mixer what it reads."""
    read = into_values(lm, layer, vector)
    return read if scale is None else read * scale[..., None]


def values_of(
    lm: Model,
    layer: Layer,
    vector: Float[Tensor, "prompt position d_model"],
    scale: Float[Tensor, "prompt position *kv_head"] | None,
    sizes_alone: bool = False,
) -> Float[Tensor, "prompt head position d_head"]:
    """What a vector in the stream is in the values of every query head, the `scale` of norms held, without biases.

    `sizes_alone`: the sum of the sizes of what is summed up there.
    """
    read, (weight, _) = into_values(lm, layer, vector), value_weights(lm, layer)
    by_head = scale is not None and scale.dim() == read.dim()
    if scale is not None and not by_head:
        read = read * scale[..., None]
    if sizes_alone:
        read, weight = read.abs(), weight.abs()
    values = read[:, None] @ weight
    return values * _of_heads(layer, scale) if scale is not None and by_head else values


def _of_heads(layer: Layer, scale: Float[Tensor, "prompt position kv_head"]) -> Float[Tensor, "prompt head position 1"]:
    return scale.repeat_interleave(layer.heads // layer.kv_heads, -1).transpose(1, 2)[..., None]


def from_latents(lm: Model, layer: Layer, latents: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows read"]:
    """What the norm of latents makes of a part of them, but for its scale and its bias."""
    return _linear(lm, layer.latent_norm, latents)


def of_biases(
    lm: Model, layer: Layer, stream: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt head position d_head"] | None:
    """What biases put into every head's values beside `value_constant`: it varies by position, and stays in the head.

    None where there is nothing of that kind.
    """
    parts: list[Tensor] = []
    if layer.latent is not None and (bias := latent_bias(lm, layer)) is not None:
        read = from_latents(lm, layer, bias) * latent_scale(lm, layer, stream)[..., None]
        parts.append(read[:, None] @ value_weights(lm, layer)[0])
    if value_constant(lm, layer) is None and (bias := value_bias(lm, layer)) is not None:
        parts.append(bias[None, :, None].expand(len(stream), -1, stream.shape[1], -1))
    if not parts or layer.value_norm is None:
        return sum(parts[1:], parts[0]) if parts else None
    return sum(parts[1:], parts[0]) * _of_heads(layer, head_scale(lm, layer, stream))


def looked(
    pattern: Float[Tensor, "prompt head query key"], values: Float[Tensor, "prompt head key d_head"]
) -> Float[Tensor, "prompt query head d_head"]:
    """A · values: a part of every query head's z, in float32 or better whatever the pattern is in."""
    return (pattern.to(values.dtype) @ values).transpose(1, 2)


def through_values(
    lm: Model,
    layer: Layer,
    pattern: Float[Tensor, "prompt head query key"],
    vector: Float[Tensor, "prompt position d_model"],
    scale: Float[Tensor, "prompt position *kv_head"] | None,
    gate: Float[Tensor, "prompt position head d_head"] | None = None,
) -> Float[Tensor, "prompt position head d_head"]:
    """The part of this layer's z that is there because `vector` is in the stream it reads (before a post-norm).

    `gate` is what heads' outputs were multiplied by, where they are: it reads the stream, too, and is held.
    """
    z = looked(pattern, values_of(lm, layer, vector, scale))
    return z if gate is None else z * gate
