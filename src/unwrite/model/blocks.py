"""What is added to the stream in one block, and by whom? Read off the trace of one pass.

What a row of the table cannot say raises `Unlike`, with the reason in the structure.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from unwrite.model.norms import NormKind, kinds
from unwrite.model.sums import (
    CONSTANT,
    Op,
    Term,
    bare,
    behind,
    chain,
    leading,
    terms,
)
from unwrite.model.traced import Called, Traced
from unwrite.model.weights import weight_of

# Relative: what is the same in float32, where the sum is made in another order.
SAME = 1e-4
# Products of constants in float64.
_EXACT = 1e-9


class Unlike(Exception):
    """What in a model's structure no row can say."""


class Block:
    """One block: the state of the stream that it reads, those on the way, and what it adds."""

    def __init__(self, trace: Traced, call: Called):
        self.trace, self.path, self.module = trace, call.path, call.module
        source, out, maker = bare(call.reads), call.made, partial(trace.maker, within=call.path)
        if source is None or out is None:
            raise Unlike("a block is not given the stream, or gives none")
        leads = leading(out, source)
        if not leads.get(out, False):
            parts = listed(self, [*terms(out, None, partial(trace.innermost, within=call.path))])
            raise Unlike(f"the block's output is not a sum that holds its input (it is {parts})")
        self.source, self.states = source, {source, *(op for op, true in leads.items() if true)}
        self.given = {op for part in _tensors(call) if (op := part.grad_fn) is not None} - self.states
        parts = [*terms(out, source, maker)]
        self.gain = _gain(parts)
        self.writers, self.out_bias = _writers(parts, self.gain), _constant(call, parts, self.gain)

    def name(self, call: Called | None) -> str | None:
        """The path of a module from the block."""
        return None if call is None else below(self.path, call.path)

    def states_behind(self, op: Op | None) -> set[Op | None]:
        """The states that something rests on; not that from which what a block is given beside the stream was made."""
        return {bare(met) for met in behind(op, self.states | self.given) - self.given}

    def calls(self, within: str = "") -> Iterator[Called]:
        """What ran inside of the block, or of a module of it."""
        return (call for call in self.trace.calls if call.within(within or self.path))


def below(root: str, path: str) -> str:
    """A path as it is from `root`, where it lies."""
    return path if not root else path.removeprefix(root).removeprefix(".")


def _tensors(call: Called) -> Iterator[Tensor]:
    """What a block is given beside the stream."""
    args, named = call.given or ((), {})
    return (part for part in (*args, *named.values()) if isinstance(part, Tensor))


def _gain(parts: list[Term]) -> float:
    """By what the block multiplies its stream."""
    gain = sum(part.factor for part in parts if part.call is None and not part.other)
    if abs(gain) <= SAME:
        raise Unlike(f"the block multiplies its stream by {gain:.3g}")
    return 1.0 if abs(gain - 1) <= _EXACT else gain


def _writers(parts: list[Term], gain: float) -> list[Term]:
    """What is written, by factors before this gain."""
    if odd := [part.other for part in parts if part.other not in ("", CONSTANT)]:
        raise Unlike(f"the block adds what no module gives ({', '.join(odd)})")
    return [part._replace(factor=part.factor / gain) for part in _given(parts)]


def _given(parts: list[Term]) -> list[Term]:
    return [part for part in parts if part.call is not None]


def _constant(call: Called, parts: list[Term], gain: float) -> tuple[float, str] | None:
    """The factor, before this gain, and the path of the parameter that a block adds to its stream; None where it adds
    none."""
    factors = [part.factor for part in parts if part.other == CONSTANT]
    if not factors:
        return None
    assert call.read is not None  # noqa: S101 (asked before)
    rest = call.gave - gain * call.read - sum(part.factor * part.call.gave.view_as(call.gave) for part in _given(parts))
    for path, parameter in call.module.named_parameters():
        above, _, name = path.rpartition(".")
        module = call.module.get_submodule(above)
        # That of a module without others in it is the module's own.
        if len(factors) > 1 or parameter.shape != rest.shape[-1:] or next(module.children(), None) is None:
            continue
        value = weight_of(module, name)
        if value is not None and (rest - factors[0] * value.detach().to(rest)).norm() <= SAME * call.gave.norm():
            return factors[0] / gain, path
    raise Unlike("the block adds a constant that is none of its parameters")


def writer(block: Block, term: Term) -> Called:
    """The module that writes a term, before a norm through which it does."""
    return without_norm(block, term.call)[1]


def without_norm(block: Block, call: Called) -> tuple[Called | None, Called]:
    """A norm through which a writer writes, and the writer before it."""
    if not norm_kinds(call):
        return None, call
    for op in chain(call.reads):
        if (writer := block.trace.maker(op, block.path)) is not None:
            return call, writer
    raise Unlike(f"{block.name(call)} is a norm of what no module gives")


def norm_kinds(call: Called) -> dict[NormKind, float]:
    """The kinds of norm that a module is, with the relative error of each; none for what is no norm."""
    return {} if call.read is None else kinds(call.module, call.read, call.gave)


def projection_of(block: Block, op: Op | None, within: str) -> Called | None:
    """The linear map that gave what an operation made, in another shape perhaps."""
    for at in chain(op):
        for call in block.trace.makers(at, within):
            if is_projection(call.module):
                return call
    return None


def is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return matrix or all(isinstance(getattr(module, f"{side}_features", None), int) for side in ("in", "out"))


def same(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= SAME * want.norm())


def listed(block: Block, parts: list[Term]) -> str:
    names = [part.other or f"{block.name(part.call)}: {type(part.call.module).__name__}" for part in parts]
    return " + ".join(names) or "nothing"
