"""What does a vector in the stream become when heads carry it through their values? Pattern and norm frozen: linear.

C_{w→e}(q) = Σ_i A_e[q, i] · norm(o_w(i)) · W_V^e W_O^e (Dao, Lau, Rager, Janiak 2023, eq. 3, with attention weights),
where norm is linear once its scale is held: centred if it centres, times its gain, times the scale of the clean run.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from unwrite.model.norms import norm_scale
from unwrite.model.view import Layer, Model, gain_of, value_weights


def value_scale(
    lm: Model, layer: Layer, stream: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt position"] | None:
    """The scale of the norm through which this layer's values read `stream`; None where they read it bare."""
    return None if layer.input_norm is None else norm_scale(stream, layer.input_norm, lm.row.layer_norm)


def into_values(
    lm: Model,
    layer: Layer,
    vector: Float[Tensor, "prompt position d_model"],
    scale: Float[Tensor, "prompt position"] | None,
) -> Float[Tensor, "prompt position d_model"]:
    """What a vector in the stream is in the values' input, the norm's scale held at `scale` and its bias left out."""
    if scale is None:
        return vector
    gain = gain_of(layer.input_norm, lm)
    centred = vector - vector.mean(-1, keepdim=True) if lm.row.layer_norm else vector
    return centred * scale[..., None] if gain is None else centred * scale[..., None] * gain


def carry(
    pattern: Float[Tensor, "prompt head query key"],
    normed: Float[Tensor, "prompt key d_model"],
    weight: Float[Tensor, "head d_model d_head"],
) -> Float[Tensor, "prompt query head d_head"]:
    """A · normed · W_V for every query head: its part of z, in float32 or better whatever the pattern is in."""
    return (pattern.to(normed.dtype) @ (normed[:, None] @ weight)).transpose(1, 2)


def through_values(
    lm: Model,
    layer: Layer,
    pattern: Float[Tensor, "prompt head query key"],
    vector: Float[Tensor, "prompt position d_model"],
    scale: Float[Tensor, "prompt position"] | None,
) -> Float[Tensor, "prompt position head d_head"]:
    """The part of this layer's z that is there because `vector` is in the stream it reads (before a post-norm)."""
    return carry(pattern, into_values(lm, layer, vector, scale), value_weights(lm, layer)[0])
