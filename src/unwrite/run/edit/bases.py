"""What does an edit keep of what is at a site? P x: its part in a span, or what some directions read, along others.

One basis: P x = Q Qᵀ x, Q orthonormal in its span; only the span matters. A pair (read r, write w): P x = Σ_i (x · r_i)
w_i, an oblique view: of a head's z that of a singular channel of its weights, which is written through W_O and read
before it, where no orthonormal directions say the same (Merullo et al. 2024, arXiv 2406.09519).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NodeError, shown
from unwrite.result import Result, require_result

Oblique = tuple[Tensor, Tensor]
_EXPECTED = "a tensor [d] or [direction, d], or a pair (read, write) of two such tensors of one shape"


def orthonormal(basis: Any) -> Float[Tensor, "d direction"]:
    """An orthonormal basis as columns, by QR: unlike that of an SVD, its gradient exists for orthonormal directions.

    Raises NodeError for what is no basis, and for directions that depend on each other.
    """
    fits = isinstance(basis, Tensor) and basis.is_floating_point() and basis.layout is torch.strided
    columns = torch.atleast_2d(basis).mT if fits and not basis.is_meta and 0 < basis.dim() <= 2 else None
    if columns is None or not 0 < columns.shape[1] <= columns.shape[0]:
        raise NodeError("not a basis", got=shown(basis), expected=_EXPECTED)
    exact = torch.promote_types(basis.dtype, torch.float32)
    kept, sizes = torch.linalg.qr(columns.to(exact))
    size = sizes.diagonal().abs()
    if not bool((size > size.max() * len(columns) * torch.finfo(exact).eps).all()):
        raise NodeError("the directions of the basis depend on each other, or one is 0", expected="independent ones")
    return kept


def check(basis: Any) -> None:
    """Raise NodeError for what is no basis: of a pair both are one, and of the same shape."""
    if not isinstance(basis, tuple):
        orthonormal(basis)
        return
    shapes = [getattr(part, "shape", None) for part in basis]
    if len(basis) != 2 or shapes[0] != shapes[1]:
        raise NodeError("not a pair of directions that read and directions that write", got=shown(basis),
                        expected=_EXPECTED)  # fmt: skip
    for part in basis:
        orthonormal(part)


def width(basis: Tensor | Oblique) -> int:
    """The d of the sites that it is for."""
    return (basis if isinstance(basis, Tensor) else basis[0]).shape[-1]


def inside(basis: Tensor | Oblique, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """P x, in the dtype of x."""
    if isinstance(basis, Tensor):
        columns = orthonormal(basis).to(x)
        return (x @ columns) @ columns.mT
    read, write = (torch.atleast_2d(part).to(x) for part in basis)
    return (x @ read.mT) @ write


def channels_of(found: Result, writer: str, channels: int | Sequence[int]) -> Oblique:
    """Singular channels of a head, as `uw.channels` found them, in its z: what reads them there, and writes them.

    Raises NodeError for a head or a channel that is not there, and for a part of channels whose singular values are so
    near each other that only their span means anything; ResultError for another result.
    """
    require_result("found", found, "channels")
    heads = found.data["writer"].values.tolist()
    if not isinstance(writer, str) or writer not in heads:
        raise NodeError("the channels of this head were not asked for", got=shown(writer), expected=f"one of {heads}")
    one = found.data.sel(writer=writer)
    count = int(one["singular"].notnull().sum())
    asked = list(channels) if isinstance(channels, Sequence) and not isinstance(channels, str) else [channels]
    whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) and 0 <= i < count for i in asked)
    if not whole or not asked or len(set(asked)) < len(asked):
        raise NodeError(f"{writer} has no such channels", got=shown(channels), expected=f"some of 0 to {count - 1}")
    block = one["block"].values
    if missing := sorted({*np.flatnonzero(np.isin(block[:count], block[asked])).tolist()} - set(asked)):
        raise NodeError(
            f"channels of {writer} whose singular values are so near each other are one subspace, not several",
            got=f"channels {sorted(asked)}, without {missing}", fix=f"ask for channels {sorted({*asked, *missing})}",
        )  # fmt: skip
    read, write = (torch.from_numpy(one[f"z_{name}"].values[asked].copy()) for name in ("read", "write"))
    there = ~read[0].isnan()
    return read[:, there], write[:, there]
