"""How much of a vector lies along a write? Products row by row, and their sums over the positions of a prompt.

Sums are in float64: the products of a prompt of 1,024 tokens that one matrix product adds up in float32 differ in the
fourth digit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def along(vectors: Float[Tensor, "*what prompt position d"], write: Tensor) -> Float[Tensor, "*what prompt position"]:
    """⟨·, o_w⟩ at every row."""
    return torch.einsum("...btd,btd->...bt", vectors, write)


def summed(products: Float[Tensor, "*what prompt position"]) -> Float[Tensor, "*what prompt"]:
    """Over the positions."""
    return products.sum(-1, dtype=torch.float64)


def dot(vectors: Float[Tensor, "*what prompt position d"], write: Tensor) -> Float[Tensor, "*what prompt"]:
    """Σ⟨·, o_w⟩ over the positions."""
    return summed(along(vectors, write))


def squares(vectors: Float[Tensor, "what prompt position d"]) -> Float[Tensor, " what"]:
    """Σ‖·‖² over prompts and positions."""
    return vectors.pow(2).sum((1, 2, 3), dtype=torch.float64)


def ratio(products: Float[Tensor, "what prompt position"], write: Tensor) -> Float[Tensor, "row what"]:
    """⟨·, o_w⟩ / ‖o_w‖² wherever there is a write."""
    energy = write.pow(2).sum(-1)
    return products[:, energy > 0].t() / energy[energy > 0][:, None]
