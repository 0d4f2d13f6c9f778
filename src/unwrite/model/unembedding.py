"""Which matrix is between the final stream and a logit? The last linear step of a model, read from its weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.fold import gain_of
from unwrite.model.projections import bias_of, matrix_of
from unwrite.model.view import Model
from unwrite.model.weights import through, weight_of


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


def finished(
    lm: Model, stream: Float[Tensor, "*rows d_model"], dtype: torch.dtype | None = None
) -> Float[Tensor, "*rows output"]:
    """What the model's own final norm, and head if any, make of final streams, given to them in `dtype`, or its own."""
    normed = through(lm.final_norm, stream.to(dtype or lm.dtype))
    return headed(lm, normed) if lm.has_head else normed


def headed(lm: Model, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocabulary"]:
    """The logits that the model returns where its final norm gives this: scaled, and capped where it has a cap."""
    return bounded(lm, through(lm.head, normed))


def bounded(lm: Model, logits: Tensor) -> Tensor:
    """What the model returns where its unembedding gives these logits."""
    logits, cap = logits * lm.row.logit_scale(lm.config), lm.row.logit_cap(lm.config)
    return logits if cap is None else torch.tanh(logits / cap) * cap
