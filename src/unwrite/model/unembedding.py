"""Which matrix is between the final stream and a logit? The last linear step of a model, read from its weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.fold import gain_of
from unwrite.model.projections import bias_of, matrix_of
from unwrite.model.view import Model
from unwrite.model.weights import weight_of


def unembedding(lm: Model) -> tuple[Float[Tensor, "vocabulary d_model"], Float[Tensor, " vocabulary"] | None]:
    """Its weight and bias, wherever they are. Raises ModelError where they do not give the model's own logits."""
    lm.require("reading")
    head = lm.head
    return matrix_of(lm, head).t(), bias_of(lm, head)


def rows_of(
    weight: Float[Tensor, "vocabulary d_model"],
    bias: Float[Tensor, " vocabulary"] | None,
    ids: Int[Tensor, "*rows"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows"]]:
    """Rows of an unembedding, where the ids are."""
    here = ids.to(weight.device)
    vectors = weight.detach()[here].to(ids.device, dtype)
    if bias is None:
        return vectors, vectors.new_zeros(ids.shape)
    return vectors, bias.detach()[here].to(ids.device, dtype)


def before_norm(
    lm: Model, direction: Float[Tensor, "*rows d_model"], offset: Float[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows"]]:
    """(r, constant): ⟨direction, final norm of x⟩ + offset is scale · ⟨x, r⟩ + constant, the norm's scale held."""
    gain, beta = gain_of(lm.final_norm, lm), weight_of(lm.final_norm, "bias")
    r = direction if gain is None else direction * gain
    if lm.row.layer_norm:
        r = r - r.mean(-1, keepdim=True)
    return r, offset if beta is None else offset + (direction * beta.detach().to(direction)).sum(-1)
