"""How does one see, and change, what goes through a module? The only place where hooks are put on modules.

A visit is given a tensor and gives what the pass goes on with in its place; None leaves it as it is. Every function
here returns the hook's handle: whoever puts a hook on a module takes it off again, `hooked` does so by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle as Handle

from unwrite.errors import ModelError

Visit = Callable[[Tensor], Tensor | None]
# How a module was called: its arguments, and those with names.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Leave(Exception):
    """Raised by a hook where a pass has made all that is asked of it."""


@dataclass(frozen=True)
class Point:
    """Where a tensor is seen: what `module` reads, or (item `item` of) what it puts out."""

    module: nn.Module
    before: bool
    item: int = 0


def visited(point: Point, visit: Visit) -> Handle:
    """Visit what goes by at a point."""
    return before(point.module, visit) if point.before else after(point.module, visit, point.item)


def before(module: nn.Module, visit: Visit) -> Handle:
    """Visit what a module reads."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        read = read_of((args, kwargs))
        new = visit(_numbers(module, read))
        return None if new is None or new is read else reads_instead((args, kwargs), new)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after(module: nn.Module, visit: Visit, item: int | None = 0, first: bool = False) -> Handle:
    """Visit what a module puts out: of several things that of number `item`, or with None every tensor.

    `first`: before all who visit it already, who then see what was put in its place.
    """
    return _after(module, lambda _, output: visit(output), item, first)


def between(module: nn.Module, visit: Callable[[Tensor, Tensor], Tensor | None]) -> Handle:
    """Visit what a module puts out, beside what it read: `visit(read, put_out)`."""
    return _after(module, lambda call, output: visit(read_of(call), output), 0)


def _after(
    module: nn.Module, visit: Callable[[Call, Tensor], Tensor | None], item: int | None, first: bool = False
) -> Handle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        every = (output,) if isinstance(output, Tensor) else tuple(output)
        new = list(every)
        for i, part in enumerate(every):
            if item in (None, i) and isinstance(part, Tensor):
                made = visit((args, kwargs), _numbers(module, part))
                new[i] = part if made is None else made
        if all(mine is own for mine, own in zip(new, every, strict=True)):
            return None
        return new[0] if isinstance(output, Tensor) else tuple(new)

    return module.register_forward_hook(hook, with_kwargs=True, prepend=first)


def _numbers(module: nn.Module, seen: Tensor) -> Tensor:
    """What goes by, if it is the numbers themselves. Raises ModelError for what stands for others, as codes do."""
    if is_traceable_wrapper_subclass(seen):
        split = hasattr(seen, "device_mesh")  # as DTensors have: each process holds a part
        raise ModelError(
            f"this model {'is split over processes' if split else 'has quantised activations'}: "
            f"what goes by at a {type(module).__name__} is a {type(seen).__name__}",
            expected="numbers of the dtype in which the model computes",
            fix="load it whole, or with device_map, which spreads layers and splits none" if split
            else "load it without quantised activations (weights alone may be), or dequantise it",
        )  # fmt: skip
    return seen


def called(module: nn.Module, begin: Callable[[Call], object]) -> Handle:
    """Tell `begin` of every call of a module before it runs."""
    return module.register_forward_pre_hook(_Begin(begin), with_kwargs=True)


def given(module: nn.Module, name: str, visit: Visit) -> Handle:
    """Visit what a module is given by this name, where it is given a tensor so."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not isinstance(kwargs.get(name), Tensor):
            return None
        new = visit(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def ended(module: nn.Module, end: Callable[[], object]) -> Handle:
    """Tell `end` when a module has run, also where it raised."""

    def hook(*_: Any) -> None:
        end()

    return module.register_forward_hook(hook, always_call=True)


@contextmanager
def calls_kept(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Call]]:
    """Inside the `with`, every forward pass leaves key -> how it called the module of this key."""
    calls: dict[int, Call] = {}
    with hooked(called(module, partial(calls.__setitem__, key)) for key, module in modules.items()):
        yield calls


def put_out(module: nn.Module, visit: Callable[[Any], object]) -> Handle:
    """Show `visit` all that a module puts out, as it is."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        visit(output)

    return module.register_forward_hook(hook)


@dataclass(frozen=True, eq=False)
class _Begin:
    begin: Callable[[Call], object]

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin((args, kwargs))


def listeners(module: nn.Module) -> Iterator[object]:
    """Whoever is told of this module's calls by a method of its own."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Begin):
            yield getattr(hook.begin, "__self__", None)


@contextmanager
def hooked(handles: Iterable[Handle]) -> Iterator[None]:
    """Inside the `with`, these hooks are on their modules; afterwards, however it ends, they are not."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def kept(store: dict[Any, Tensor], key: Any, copied: bool = False) -> Visit:
    """A visit that keeps what goes by, as it is or as a detached copy."""

    def visit(tensor: Tensor) -> None:
        store[key] = tensor.detach().clone() if copied else tensor

    return visit


def leaf(instead: Tensor | None = None) -> Visit:
    """A visit behind which autograd's graph begins, with `instead` or with what goes by."""
    return lambda given: (given if instead is None else instead.to(given)).detach().requires_grad_()


def read_of(call: Call) -> Tensor:
    """What a module reads: its first argument, or `hidden_states`."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def reads_instead(call: Call, read: Tensor) -> Call:
    """The same call with something else to read."""
    args, kwargs = call
    return ((read, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": read})


def first_of(output: Any) -> Tensor:
    """What a module puts out, or the first of it."""
    return output if isinstance(output, Tensor) else output[0]
