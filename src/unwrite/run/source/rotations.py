"""Into which directions is a write turned to see what any vector of its length would have done?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.view import Model


def rotations(lm: Model, n: int) -> Iterator[Float[Tensor, "d_model d_model"]]:
    """`n` fixed random rotations; of the mean-free subspace where writes are centred, so that readers see all of it."""
    generator = torch.Generator().manual_seed(0)
    d = lm.d_model
    ones = torch.ones(d, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(d, dtype=torch.float64)[:, 1:]], 1)).Q
    free = basis[:, 1:] if lm.centred else torch.eye(d, dtype=torch.float64)
    for _ in range(n):
        yield (free @ rotation(free.shape[1], generator) @ free.t()).to(lm.device, lm.compute_dtype)


def rotation(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A random rotation, drawn evenly from all of them, in float64."""
    turn, triangle = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return turn * triangle.diagonal().sign()
