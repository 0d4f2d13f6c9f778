"""What is a subspace of a site's values? A basis as a value: fitted to rows, split by what a reader sees, compared.

A basis is [direction, d]; what lies along it is Σ_i ⟨x, b_i⟩ b_i, a projection where its directions are orthonormal. Of
what reads the site as x W, the row part of a direction lies in the column space of W [d, ·], the null part is what W
makes nothing of (Makelov et al. 2023, arXiv 2311.17030). (facts: systems, §1)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NodeError

Basis = Float[Tensor, "direction d"]
# A direction, or a channel of a matrix, that is smaller than this part of the largest is none.
_NONE = 1e-5


class Halves(NamedTuple):
    """The parts of a basis that a reader sees (row) and does not see (null): as they are, and of unit length."""

    row: Basis
    null: Basis
    row_raw: Basis
    null_raw: Basis


def along(x: Float[Tensor, "... d"], basis: Float[Tensor, "*fit direction d"]) -> Float[Tensor, "... d"]:
    """What of x lies along a basis, or along each of several."""
    return (x @ basis.mT) @ basis


def exchanged(own: Float[Tensor, "row d"], there: Float[Tensor, "row d"], basis: Basis) -> Float[Tensor, "row d"]:
    """A value whose part along an orthonormal basis is another one's: all of it where that is everything."""
    return there if len(basis) == own.shape[-1] else own + along(there - own, basis)


def orthonormal(directions: Float[Tensor, "*fit direction d"]) -> Float[Tensor, "*fit direction d"]:
    """The same spans by orthonormal bases, each direction turned as little as it can be; with a slope."""
    columns, sizes = torch.linalg.qr(directions.mT)
    # QR is free to turn a direction round, which a momentum would not survive.
    return columns.mT * torch.sign(sizes.diagonal(dim1=-2, dim2=-1))[..., None]


def given(directions: Float[Tensor, "direction d"]) -> Basis:
    """A basis of the span of directions. Raises NodeError where they depend on each other, or one is 0."""
    found = spanned(directions / directions.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(directions.dtype).tiny))
    if len(found) < len(directions):
        raise NodeError("the directions of the basis depend on each other, or one is 0", expected="independent ones")
    return orthonormal(directions)


def spanned(rows: Float[Tensor, "row d"]) -> Basis:
    """An orthonormal basis of what rows span, the direction with most of their energy first; of nothing none."""
    if not rows.numel():
        return rows[:0]
    if len(rows) > rows.shape[1]:  # a small square in the place of a tall matrix
        rows = torch.linalg.qr(rows).R
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[sizes > _NONE * sizes.max().clamp_min(torch.finfo(rows.dtype).tiny)]


def of_classes(rows: Float[Tensor, "row d"], label: Sequence[Hashable], k: int) -> Basis:
    """The k leading directions, or as many as there are, of the mean row of each class.

    Of two classes whose rows point opposite ways it is their difference.
    """
    names = list(dict.fromkeys(label))
    of = torch.tensor([names.index(one) for one in label], device=rows.device)
    means = torch.stack([rows[of == i].mean(0) for i in range(len(names))])
    # Each class weighs as many rows as it has.
    return spanned(means * torch.bincount(of).to(rows)[:, None].sqrt())[:k]


def drawn(k: int, like: Float[Tensor, "... d"], *seed: int) -> Basis:
    """k random directions, orthonormal."""
    generator = torch.Generator().manual_seed(sum(part * 10_007**i for i, part in enumerate(seed)))
    made = torch.randn(k, like.shape[-1], generator=generator, dtype=torch.float64)
    return orthonormal(made).to(like)


def halves(basis: Basis, seen: Float[Tensor, "column d"]) -> Halves:
    """The parts of an orthonormal basis inside and outside of what a reader sees, itself an orthonormal basis."""
    row = along(basis, seen)
    return Halves(_unit(row), _unit(basis - row), row, basis - row)


def _unit(part: Basis) -> Basis:
    """An orthonormal basis of a part of an orthonormal one, without what is rounding."""
    if not part.numel():
        return part
    _, sizes, directions = torch.linalg.svd(part, full_matrices=False)
    return directions[sizes > _NONE]


def size(part: Basis) -> float:
    """The length of a part of a basis beside that of the whole, √(Σ ‖part_i‖² / k)."""
    return float(part.pow(2).sum(-1).mean().sqrt())


def alike(one: Basis, other: Basis) -> float:
    """The mean squared cosine of the principal angles of two subspaces of k directions: 1 the same, k/d by chance."""
    return float((one @ other.mT).pow(2).sum() / len(one))


def as_far(change: Float[Tensor, "pair d"], as_: Float[Tensor, "pair d"]) -> Float[Tensor, "pair d"]:
    """A change of each pair made as long as another one."""
    length = change.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    return change * (as_.norm(dim=-1, keepdim=True) / length)
