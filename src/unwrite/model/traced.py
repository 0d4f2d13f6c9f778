"""What did one forward pass do? Every call of a module, and of attention, with what made its tensors in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from unwrite.model.attention import Attended, AttendInstead, eager_of, implementation, registered
from unwrite.model.capture import evaluating
from unwrite.model.hooks import Call, Handle, after, called, hooked, put_out, read_of, reads_instead
from unwrite.model.inside import head_of, text_config
from unwrite.model.single import HALVES, in_float32
from unwrite.model.sums import Op, scalars_kept
from unwrite.model.weights import followed, home

# Prompts and tokens of the pass.
_SHAPE = (2, 7)
# The largest logit that the unembedding gives: more than any cap that is in use, so that a cap is reached.
LOUD = 100.0
# Rows of a pattern sum to 1, whatever it is called.
_SUM = 1e-3
# Of a change of an earlier position, relative to what is written, beyond any rounding.
_MIXED = 1e-5


@dataclass(frozen=True, eq=False)
class Called:
    """One call of a module: copies of what it read and gave, and the operations that made these."""

    path: str
    module: nn.Module
    read: Tensor | None
    reads: Op | None
    gave: Tensor
    made: Op | None
    pattern: Tensor | None = None  # [prompt, head, query, key], where it puts one out beside, and what made that
    shows: Op | None = None
    given: Call | None = None  # as it was called

    def within(self, path: str) -> bool:
        """Is this module below another one, and not that one itself?"""
        return self.path.startswith(f"{path}.") if path else bool(self.path)


@dataclass(frozen=True, eq=False)
class Looked:
    """One call of attention in the module at `path`: its values, which `reads` made, and z, which `made` made.

    `value` [prompt, kv_head, key, d_head] and `z` [prompt, query, head, d_head] where a function was called that can be
    seen; else only the pattern that the module shows, which `made` made.
    """

    path: str
    made: Op | None
    pattern: Tensor | None = None
    value: Tensor | None = None
    z: Tensor | None = None
    reads: Op | None = None
    sinks: bool = False
    interface: bool = False


@dataclass(eq=False)
class Traced:
    """One forward pass: calls in the order in which they ended, also `at` a path and `making` what an operation made.

    `start` made the embedding of the tokens; `loud` is what the unembedding gave.
    """

    calls: list[Called] = field(default_factory=list)
    looked: list[Looked] = field(default_factory=list)
    running: list[tuple[str, Tensor | None, Op | None, Call]] = field(default_factory=list)
    start: Op | None = None
    loud: Tensor | None = None
    output: Any = None
    at: dict[str, list[Called]] = field(default_factory=dict)
    making: dict[Op | None, list[Called]] = field(default_factory=dict)

    def add(self, call: Called) -> None:
        """One more call that has ended."""
        self.calls.append(call)
        self.at.setdefault(call.path, []).append(call)
        # What hands on the very tensor that it read (dropout that does nothing) makes nothing.
        if call.made is not call.reads:
            self.making.setdefault(call.made, []).append(call)

    def of(self, path: str) -> list[Called]:
        """All calls of a module."""
        return self.at.get(path, [])

    def makers(self, op: Op | None, within: str) -> list[Called]:
        """The modules below `within` that gave exactly what an operation made, the outermost first."""
        found = [call for call in self.making.get(op, []) if call.within(within)]
        return sorted(found, key=lambda call: call.path.count("."))

    def maker(self, op: Op | None, within: str) -> Called | None:
        """The outermost of them."""
        return next(iter(self.makers(op, within)), None)

    def innermost(self, op: Op | None, within: str) -> Called | None:
        """The innermost of them."""
        return next(reversed(self.makers(op, within)), None)


def traced(hf: Any) -> Traced:
    """What a pass of a few random ids does; its logits are made loud where the unembedding gives them.

    By transformers' attention interface where the model asks it; else as the model is; else openly.
    """
    trace, failed = None, None
    for way in (_by_interface, _as_it_is, _openly):
        try:
            trace = _pass(hf, way)
        except Exception as error:  # noqa: BLE001 - not every model runs in every way; of one that runs in none, the last
            failed = error
            continue
        if trace.looked or any(call.pattern is not None for call in trace.calls):
            return trace
    if trace is None and failed is not None:
        raise failed
    return trace or Traced()


def _pass(hf: Any, way: Callable[[Any, Traced], AbstractContextManager[object]]) -> Traced:
    trace = Traced()
    with ExitStack() as stack:
        for inside in lent(hf):
            stack.enter_context(inside)
        stack.enter_context(hooked(_hooks(hf, trace)))
        stack.enter_context(way(hf, trace))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(scalars_kept())
        trace.output = hf(input_ids=some_ids(hf), use_cache=False)
    return trace


@torch.no_grad()
def mixing(hf: Any, calls: Iterable[Called]) -> set[str]:
    """Which modules give later positions something of an earlier one: each is called again with another first one."""
    with ExitStack() as stack:
        for inside in lent(hf):
            stack.enter_context(inside)
        return {call.path for call in calls if _mixes(call)}


def _mixes(call: Called) -> bool:
    """The prompts' last tokens are not changed, so what becomes of them tells."""
    assert call.given is not None and call.read is not None  # noqa: S101, PT018 (what writes in a block reads)
    # Some give their prompts and positions as one axis.
    read = _by_prompt(call.read).clone()
    read[:, 0] += read[:, 1] - read[:, 2]
    args, named = reads_instead(call.given, read.reshape(call.read.shape).to(read_of(call.given)))
    made = _copy(_tensors(call.module(*args, **named))[0])
    one, other = (_by_prompt(part)[:, 1:] for part in (call.gave, made))
    return bool((one - other).abs().amax() > _MIXED * one.abs().amax())


def _by_prompt(part: Tensor) -> Tensor:
    return part.reshape(_SHAPE[0], -1, part.shape[-1])


def lent(hf: Any) -> Iterator[AbstractContextManager[object]]:
    """How modules are called here: not training, with their own weights, in float32."""
    yield evaluating(hf)
    yield followed(hf)
    yield in_float32(hf) if _half(hf) else nullcontext()


def _half(hf: Any) -> bool:
    return hf.get_input_embeddings().weight.dtype in HALVES


def some_ids(hf: Any) -> Tensor:
    """The ids of a short pass."""
    ids = hf.get_input_embeddings().weight.shape[0]
    return torch.randint(ids, _SHAPE, generator=torch.Generator().manual_seed(3)).to(home(hf))


def _hooks(hf: Any, trace: Traced) -> Iterator[Handle]:
    tokens, head = hf.get_input_embeddings(), head_of(hf)
    for part in hf.modules():
        # All that comes after an embedding is in the graph, whether or not weights ask for slopes.
        if part is tokens or isinstance(part, nn.Embedding):
            yield after(part, lambda vectors: vectors + vectors.new_zeros((), requires_grad=True))
    if head is not None:
        yield after(head, partial(_loud, trace))
    for path, part in hf.named_modules():
        yield called(part, partial(_begin, trace, path))
        yield put_out(part, partial(_end, trace, part, part is tokens))


def _loud(trace: Traced, logits: Tensor) -> Tensor:
    logits = logits * (LOUD / logits.detach().abs().amax().clamp_min(torch.finfo(logits.dtype).tiny))
    trace.loud = _copy(logits)
    return logits


def _begin(trace: Traced, path: str, call: Call) -> None:
    args, named = call
    given = [named.get("hidden_states"), *args, *named.values()]
    read = next((part for part in given if isinstance(part, Tensor)), None)
    trace.running.append((path, _copy(read), None if read is None else read.grad_fn, call))


def _end(trace: Traced, module: nn.Module, is_start: bool, output: Any) -> None:
    path, read, reads, given = trace.running.pop()
    parts = _tensors(output)
    if not parts or not path:
        return
    made = parts[0].grad_fn
    trace.start = made if is_start else trace.start
    pattern = next((part for part in parts[1:] if is_pattern(part)), None)
    # Some blocks go on to add into the very tensor that a module gave.
    shows = None if pattern is None else pattern.grad_fn
    trace.add(Called(path, module, read, reads, _copy(parts[0]), made, _copy(pattern), shows, given))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    every = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [part for part in every if isinstance(part, Tensor)]


def is_pattern(part: Tensor) -> bool:
    """Is this [prompt, head, query, key] with rows that sum to 1?"""
    square = part.dim() == 4 and part.shape[-1] == part.shape[-2] == _SHAPE[1] and part.is_floating_point()
    return square and bool((part >= 0).all()) and bool(((part.sum(-1) - 1).abs() < _SUM).all())


def _copy(part: Any) -> Any:
    return None if part is None else part.detach().to("cpu", copy=True)


def _by_interface(hf: Any, trace: Traced) -> AbstractContextManager[object]:
    paths = {module: path for path, module in hf.named_modules()}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *seen: Any, **settings: Any) -> Attended:
        z, pattern = eager_of(module)(module, query, key, value, *seen, **settings)
        sinks = settings.get("s_aux") is not None
        seen_there = _copy(pattern), _copy(value), _copy(z), value.grad_fn
        trace.looked.append(Looked(paths[module], z.grad_fn, *seen_there, sinks, interface=True))
        return z, pattern

    return registered(text_config(hf.config), attend, eager_mask)


def _as_it_is(hf: Any, trace: Traced) -> AbstractContextManager[object]:
    """Torch's own attention function is seen, where a family calls it by itself."""
    attention: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        z = attention(query, key, value, **settings)
        path, heads = trace.running[-1][0], z.transpose(1, 2)
        trace.looked.append(Looked(path, z.grad_fn, None, _copy(value), _copy(heads), value.grad_fn))
        return z

    return AttendInstead(attend)


def _openly(hf: Any, _: Traced) -> AbstractContextManager[object]:
    return implementation(text_config(hf.config), "eager")
