"""Is every number that a method needs one? If not, which is the first that is none, by the axes of its cell?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from unwrite.errors import NumericError


def require_finite(finite: Bool[Tensor | np.ndarray, "*cell"], says: str, **axes: int | Sequence[str]) -> None:
    """Raise NumericError unless all of `finite` is true; it `says` so, `{axis}` in it being the first bad place.

    `axes` in their order: where numbers are counted on, that of the first; else the names of all. The first axis is
    that of what can be left out.
    """
    bad = (~torch.as_tensor(finite)).nonzero()
    if len(bad):
        cell = zip(axes.items(), bad[0].tolist(), strict=True)
        words = {axis: f"{axis} {named + i}" if isinstance(named, int) else named[i] for (axis, named), i in cell}
        raise not_finite(says.format(**words), f"leave this {next(iter(axes))} out")


def not_finite(what: str, otherwise: str = "leave this prompt out") -> NumericError:
    """The error that says `what` is no number, and what to do."""
    return NumericError(what, fix=f"load the model in float32, or {otherwise}")
