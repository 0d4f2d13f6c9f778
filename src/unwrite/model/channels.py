"""What does a head write of what it reads, and who compares it? Weights as factors, channel by channel.

A head moves OV = A B: A [d_model, d_head] the norm that its values read (its gain; its scale is held) times W_V, B
[d_head, d_model] W_O as it arrives in the stream, with the gain of a post-norm. OV = Σ_i s_i u_i v_iᵀ, found from QR of
both factors and the SVD of a small matrix, never of the d_model × d_model product: channel i reads u_i and writes v_i.
A reader is W_Q T W_Kᵀ, by its query or its key side (T: `queries.turned`), or the OV of its own by its values.
Of a unit vector v in the stream it takes ‖v M‖ / ‖M‖: the composition score (Elhage et al. 2021) of one channel. A
whole head's is CS² = Σ_i s_i² / Σ s² · CS_i² (Merullo, Eickhoff and Pavlick 2024, arXiv 2406.09519).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.errors import NodeError
from unwrite.model.fold import folded
from unwrite.model.projections import matrix_of
from unwrite.model.queries import Turned, made, turned
from unwrite.model.values import folded_into, read_by_values
from unwrite.model.view import Layer, Model


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a layer's heads, the largest first: unit vectors `read` and `write`, and their factors.

    In a head's z channel i is what `z_read` reads (z · z_read_i is how much of write_i the head writes), written along
    `z_write` (z_write_i through W_O is write_i). NaN where a head has fewer.
    """

    singular: Float[Tensor, "head channel"]
    read: Float[Tensor, "head channel d_model"]
    write: Float[Tensor, "head channel d_model"]
    z_read: Float[Tensor, "head channel d_head"]
    z_write: Float[Tensor, "head channel d_head"]


@dataclass(frozen=True, eq=False)
class Listening:
    """By one side of every head of a layer: `space`, orthonormal columns of what it reads, and how much along each.

    What it makes of x is as large as x · space · weight; `weight` has the norm 1. Columns beyond what it reads are 0.
    """

    space: Float[Tensor, "head d_model direction"]
    weight: Float[Tensor, "head direction out"]


def channels_in(lm: Model, layer: Layer) -> Channels:
    """The channels of every head of a layer. Raises NodeError where what its heads move is no fixed matrix."""
    _require_fixed(lm, layer)
    a, b = read_by_values(lm, layer), folded(lm, layer).w_o
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a), torch.linalg.qr(b.mT)
    u, singular, v = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    read, write = (q_a @ u).mT, v @ q_b.mT
    singular = singular.where(_real(singular, max(a.shape[1:])), torch.nan)
    there = (singular * 0)[..., None]  # 0, or NaN
    return Channels(singular, read + there, write + there, write @ b.mT + there, read @ a / singular[..., None])


def _require_fixed(lm: Model, layer: Layer) -> None:
    """Raise NodeError unless values and out-projection are all that stands between what is read and written."""
    why = None if layer.attends else "it has no attention"
    if lm.row.gated_heads or layer.head_norm is not None:
        why = "what its heads give is multiplied by something that moves with the prompt"
    if why is not None:
        raise NodeError(f"heads of layer {layer.index} ({lm.family}) have no channels", got=why,
                        expected="heads that write W_V W_O of what they read")  # fmt: skip


def readings(lm: Model, layers: Sequence[Layer], side: str, offset: int) -> dict[int, Listening]:
    """How heads of some layers read the stream by their queries ("q"), `offset` tokens behind a key; by "k" or "v".

    Raises NodeError for a side that a layer lacks.
    """
    if side == "v":
        for layer in layers:
            _require_fixed(lm, layer)
        return {one.index: _reading(read_by_values(lm, one), folded(lm, one).w_o.mT) for one in layers}
    found: dict[int, Listening] = {}
    for index, how in turned(lm, list(layers), offset).items():
        query, key = compared(lm, lm.layers[index], how)
        found[index] = _reading(query, key) if side == "q" else _reading(key, query)
    return found


def compared(
    lm: Model, layer: Layer, how: Turned
) -> tuple[Float[Tensor, "head d_model width"], Float[Tensor, "head d_model width"]]:
    """What queries and keys of every head are made of the stream by, norms' scales held: x_q (query keyᵀ) x_k compares.

    A group's heads share their keys.
    """
    both = []
    for part, turn in (("q", how.query), ("k", how.key)):
        maker = made(lm, layer, part)
        matrix = matrix_of(lm, maker.module).detach().to(lm.device, lm.compute_dtype)
        own = matrix[:, maker.columns.to(lm.device)].transpose(0, 1)
        both.append(folded_into(lm, layer.input_norm, own) @ turn / layer.makes_values.to_end)
    return both[0], both[1].repeat_interleave(layer.heads // layer.kv_heads, 0)


def _reading(near: Float[Tensor, "head d_model width"], far: Float[Tensor, "head d_other width"]) -> Listening:
    """How near · farᵀ reads, by its near side."""
    (space, r_near), (_, r_far) = torch.linalg.qr(near), torch.linalg.qr(far)
    u, singular, v = torch.linalg.svd(r_near @ r_far.mT, full_matrices=False)
    space = space @ u * _real(singular, max(near.shape[1:]))[:, None]
    return Listening(space, singular[..., None] * v / singular.norm(dim=1)[:, None, None])


def _real(singular: Float[Tensor, "head channel"], size: int) -> Bool[Tensor, "head channel"]:
    """Which are more than rounding of a matrix of this size?"""
    return singular > singular[:, :1] * size * torch.finfo(singular.dtype).eps
