"""Of what is a tensor the sum, and what lies behind it? Autograd's graph of one pass, read and never run backwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Op = torch.autograd.graph.Node

# The same numbers in another shape, order of axes, memory or dtype.
_SAME = {
    *(f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone", "Alias", "Expand")),
    *(f"{name}Backward0" for name in ("Unsqueeze", "Squeeze", "Transpose", "Permute", "Contiguous", "T")),
    "SqueezeBackward1",
}
_PARAMETER = "torch::autograd::AccumulateGrad"
CONSTANT = "a constant"
_WORDS = {_PARAMETER: CONSTANT, "MulBackward0": "a product"}


class Term(NamedTuple):
    """One part of a sum: `factor` times what a call of a module gave, or times the source (no call, no `other`).

    `other` says what made a part that no module gave.
    """

    factor: float
    call: Any
    other: str = ""


def scalars_kept() -> AbstractContextManager[Any]:
    """Inside the `with`, autograd keeps constants and forgets all else, so a pass holds no second copy of weights."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if tensor.numel() == 1 else tensor.new_empty(0), lambda kept: kept
    )


def bare(op: Op | None) -> Op | None:
    """The operation whose numbers this one has, beyond whatever only shapes, copies or casts them."""
    while op is not None and op.name() in _SAME:
        op = op.next_functions[0][0]
    return op


def chain(op: Op | None) -> Iterator[Op]:
    """An operation and those below it with the same numbers."""
    while op is not None:
        yield op
        op = op.next_functions[0][0] if op.name() in _SAME else None


def addends(op: Op) -> list[tuple[float, Op | None]]:
    """Factors and operations that this one is the sum of; none for whatever is not linear with constants."""
    name, before = op.name(), [part for part, _ in op.next_functions]
    if name in _SAME:
        return [(1.0, before[0])]
    if name in ("AddBackward0", "SubBackward0"):
        alpha = float(getattr(op, "_saved_alpha", 1.0))
        return [(1.0, before[0]), (alpha if name[0] == "A" else -alpha, (*before, None)[1])]
    if name == "NegBackward0":
        return [(-1.0, before[0])]
    if name in ("MulBackward0", "DivBackward0"):
        return _times(op, name == "DivBackward0", *(*before, None)[:2])
    return []


def _times(op: Any, divides: bool, one: Op | None, other: Op | None) -> list[tuple[float, Op | None]]:
    """A product with one constant number."""
    if _varies(one) and not _varies(other):
        factor, varying = op._saved_other, one
    elif _varies(other) and not _varies(one) and not divides:
        factor, varying = op._saved_self, other
    else:
        return []
    if not isinstance(factor, Tensor) or factor.numel() != 1:
        return []
    return [(1.0 / float(factor) if divides else float(factor), varying)]


def _varies(op: Op | None) -> bool:
    return op is not None and op.name() != _PARAMETER


# What is done to each channel of a position by itself, or to all of them by one number.
_LAID_OUT = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_CHANNELS = ("Mul", "Div", "Add", "Sub", "Neg", "Silu", "Sigmoid", "Pow", "Rsqrt", "Mean", "Norm", "ToCopy", "Clone")


def merged_from(op: Op | None, width: int) -> int | None:
    """The last axis of what was laid out as `width` channels, if it was apart from another one before.

    Looked for as far down as channels are only scaled, gated and normed; of several the one farthest down, since a norm
    takes channels apart, and together again.
    """
    seen: set[Op] = set()

    def apart(at: Op | None) -> int | None:
        if at is None or at in seen:
            return None
        seen.add(at)
        last = int((getattr(at, "_saved_self_sym_sizes", None) or [width])[-1])
        if at.name() in _LAID_OUT or any(word in at.name() for word in _CHANNELS):
            found = next((found for part, _ in at.next_functions if (found := apart(part)) is not None), None)
            merges = at.name() in _LAID_OUT and 1 < last < width and width % last == 0
            return found or (last if merges else None)
        return None

    return apart(op)


def factor_of(op: Op | None) -> float:
    """By what constant numbers that which lies below an operation is multiplied in all."""
    factor = 1.0
    while op is not None and len(below := addends(op)) == 1:
        factor, op = factor * below[0][0], below[0][1]
    return factor


def is_product(op: Op | None) -> bool:
    """Is this, but for constants, a product of two things of which neither is one?"""
    while op is not None and len(below := addends(op)) == 1:
        op = below[0][1]
    return op is not None and op.name() == "MulBackward0" and all(_varies(part) for part, _ in op.next_functions)


def leading(op: Op | None, source: Op | None) -> dict[Op, bool]:
    """Every operation on the way down by sums alone -> does one of its addends lead to `source`?"""
    found: dict[Op, bool] = {}

    def leads(at: Op | None) -> bool:
        if at is None or at is source:
            return at is source and at is not None
        if at not in found:
            each = [leads(below) for _, below in addends(at)]  # all are asked, so that all are found
            found[at] = any(each)
        return found[at]

    leads(op)
    return found


def terms(op: Op, source: Op | None, maker: Callable[[Op], Any]) -> Iterator[Term]:
    """`op` as a sum of `source` and of what `maker` says that modules gave; as few and as large parts as can be."""
    leads = leading(op, source)

    def parts(at: Op | None, factor: float) -> Iterator[Term]:
        if at is None:
            yield Term(factor, None, _WORDS[_PARAMETER])
        elif at is not source and not leads.get(at) and maker(at) is not None:
            yield Term(factor, maker(at))
        elif at is source:
            yield Term(factor, None)
        elif below := addends(at):
            for share, part in below:
                yield from parts(part, factor * share)
        else:
            yield Term(factor, None, _WORDS.get(at.name()) or at.name().removesuffix("Backward0"))

    return parts(op, 1.0)


def behind(op: Op | None, marks: Collection[Op | None]) -> set[Op]:
    """Which of the marks are met first on the ways down from an operation, whatever is done there."""
    met: set[Op] = set()
    seen: set[Op] = set()
    ahead = [op]
    while ahead:
        at = ahead.pop()
        if at is None or at in seen:
            continue
        seen.add(at)
        if at in marks:
            met.add(at)
        else:
            ahead += [part for part, _ in at.next_functions]
    return met
