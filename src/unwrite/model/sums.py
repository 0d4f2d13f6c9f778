"""Of what is a tensor the sum, and what lies behind it? Autograd's graph of one pass, read and never run backwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Node = torch.autograd.graph.Node

# The same numbers in another shape, order of axes, memory or dtype.
_SAME = {
    *(f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone", "Alias", "Expand")),
    *(f"{name}Backward0" for name in ("Unsqueeze", "Squeeze", "Transpose", "Permute", "Contiguous", "T")),
    "SqueezeBackward1",
}
_PARAMETER = "torch::autograd::AccumulateGrad"
_WORDS = {_PARAMETER: "a constant", "MulBackward0": "a product"}


class Term(NamedTuple):
    """One part of a sum: `factor` times what a call of a module gave, or times the source (no call, no `op`).

    `op` names what made a part that no module gave.
    """

    factor: float
    call: Any
    op: str = ""


def scalars_kept() -> AbstractContextManager[Any]:
    """Inside the `with`, autograd keeps constants and forgets all else, so a pass holds no second copy of weights."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if tensor.numel() == 1 else tensor.new_empty(0), lambda kept: kept
    )


def bare(node: Node | None) -> Node | None:
    """The node whose numbers this one has, beyond whatever only shapes, copies or casts them."""
    while node is not None and node.name() in _SAME:
        node = node.next_functions[0][0]
    return node


def chain(node: Node | None) -> Iterator[Node]:
    """A node and those below it with the same numbers."""
    while node is not None:
        yield node
        node = node.next_functions[0][0] if node.name() in _SAME else None


def addends(node: Node) -> list[tuple[float, Node | None]]:
    """Factors and nodes that this one is the sum of; none for whatever is not linear with constants."""
    name, before = node.name(), [part for part, _ in node.next_functions]
    if name in _SAME:
        return [(1.0, before[0])]
    if name in ("AddBackward0", "SubBackward0"):
        alpha = float(getattr(node, "_saved_alpha", 1.0))
        return [(1.0, before[0]), (alpha if name[0] == "A" else -alpha, (*before, None)[1])]
    if name == "NegBackward0":
        return [(-1.0, before[0])]
    if name in ("MulBackward0", "DivBackward0"):
        return _times(node, name == "DivBackward0", *(*before, None)[:2])
    return []


def _times(node: Any, divides: bool, one: Node | None, other: Node | None) -> list[tuple[float, Node | None]]:
    """A product with one constant number."""
    if _varies(one) and not _varies(other):
        factor, varying = node._saved_other, one
    elif _varies(other) and not _varies(one) and not divides:
        factor, varying = node._saved_self, other
    else:
        return []
    if not isinstance(factor, Tensor) or factor.numel() != 1:
        return []
    return [(1.0 / float(factor) if divides else float(factor), varying)]


def _varies(node: Node | None) -> bool:
    return node is not None and node.name() != _PARAMETER


def is_product(node: Node | None) -> bool:
    """Is this, but for constants, a product of two things of which neither is one?"""
    while node is not None and len(below := addends(node)) == 1:
        node = below[0][1]
    return node is not None and node.name() == "MulBackward0" and all(_varies(part) for part, _ in node.next_functions)


def leading(node: Node | None, source: Node | None) -> dict[Node, bool]:
    """Every node on the way down by sums alone -> does one of its addends lead to `source`?"""
    found: dict[Node, bool] = {}

    def leads(at: Node | None) -> bool:
        if at is None or at is source:
            return at is source and at is not None
        if at not in found:
            each = [leads(below) for _, below in addends(at)]  # all are asked, so that all are found
            found[at] = any(each)
        return found[at]

    leads(node)
    return found


def terms(node: Node, source: Node | None, maker: Callable[[Node], Any]) -> Iterator[Term]:
    """`node` as a sum of `source` and of what `maker` says that modules gave; as few and as large parts as can be."""
    leads = leading(node, source)

    def parts(at: Node | None, factor: float) -> Iterator[Term]:
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

    return parts(node, 1.0)


def behind(node: Node | None, marks: Collection[Node | None]) -> set[Node]:
    """Which of the marks are met first on the ways down from a node, whatever is done there."""
    met: set[Node] = set()
    seen: set[Node] = set()
    ahead = [node]
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
