"""What would fail on a GPU? A device that computes on the CPU, and refuses what CUDA refuses.

A tensor on it is a shell around a CPU tensor, so every number is that of the CPU, bit for bit. As with CUDA, tensors of
two devices never meet, but for single numbers and indices; numpy sees only what `.cpu()` brought back; a generator of
the CPU draws nothing there; integers have no matrix product; and backward passes run in a thread of the device's own.
What it cannot show: CUDA's own kernels (rounding, order of sums, missing dtypes), its memory, a second such device.

`register` changes a process for good (torch has an accelerator from then on) and must come before its first backward
pass, so what needs the device runs in a process of its own: see test_other_device.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration

NAME = "pretend"
_SETUP = "_setup_privateuseone_for_python_backend"  # torch says that it may change without notice

# What makes a tensor of nothing. Others (`torch.full_like`, `x.new_zeros`) come through `__torch_dispatch__`.
_FACTORIES = (
    *("empty.memory_format", "empty_strided", "zeros", "ones", "full", "scalar_tensor", "eye", "eye.m", "linspace"),
    *("arange", "arange.start", "arange.start_step", "tril_indices", "triu_indices"),
    *(f"{name}{generator}" for name in ("rand", "randn", "randperm", "randint") for generator in ("", ".generator")),
    *("randint.low", "randint.low_generator"),
)
# On devices that have no kernel of their own torch computes these as several operators, which round differently.
_TAKEN_APART = ("silu_backward", "mish_backward")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_ONE_BY_ONE = ("aten::masked_fill", "aten::masked_fill_")  # pointwise, but not tagged so
_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot")


def missing() -> str | None:
    """Why there can be no such device in this version of torch; None where there can be."""
    return None if hasattr(backend_registration, _SETUP) else f"torch {torch.__version__} has no {_SETUP}"


@cache
def register() -> torch.device:
    """The device, known to torch from now on."""
    getattr(backend_registration, _SETUP)(NAME)
    # Shells cannot change what they hold under their hands; modules that are moved exchange whole parameters instead,
    # which also keeps tied weights tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name in _FACTORIES:
        operator, _, overload = name.partition(".")
        made = getattr(getattr(torch.ops.aten, operator), overload or "default")
        _library().impl(name, partial(_factory, made), "PrivateUse1")
    _library().impl("_copy_from", _copy_from, "PrivateUse1")  # where torch.tensor(…, device=…) arrives
    for name in _TAKEN_APART:
        _library().impl(name, partial(_whole, getattr(torch.ops.aten, name).default), "PrivateUse1")
    return torch.device(NAME, 0)


@cache
def _library() -> torch.library.Library:
    """What is registered lasts as long as this object."""
    return torch.library.Library("aten", "IMPL")


class Shell(Tensor):
    """A tensor on the device: nothing of its own but `held`, the CPU tensor with its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Shell:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [*_leaves(args), *_leaves(kwargs.values())]
        _require_one_device(func, args, given)
        target = kwargs.get("device")
        if target is not None:
            kwargs = {**kwargs, "device": "cpu"}
        shells = {id(shell.held): shell for shell in given if isinstance(shell, Shell)}
        found = func(*map(_held, args), **{name: _held(value) for name, value in kwargs.items()})
        if torch.Tag.inplace_view in func.tags:  # a shell says itself what its shape is
            with torch.utils._mode_utils.no_dispatch():
                func(*args, **kwargs)
        assert all(shell.shape == shell.held.shape for shell in shells.values()), f"{func} changed a shape in place"
        if target is not None and torch.device(target).type == "cpu":
            return found
        return _shelled(found, shells)

    @property
    def data(self) -> Tensor:
        """Not to be set: torch would change the shell, and not what it holds."""
        return self.detach()

    # torch cannot read, find or copy what a subclass holds; what lies on CUDA it can.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone()
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo.setdefault(id(self), made)

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"


def _held(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_held, value))
    return value.held if isinstance(value, Shell) else value


def _shelled(found: Any, shells: Mapping[int, Shell]) -> Any:
    """In shells of their own, but for what was changed in place."""
    if isinstance(found, (list, tuple)):
        return type(found)(_shelled(part, shells) for part in found)
    return shells[id(found)] if id(found) in shells else Shell(found) if isinstance(found, Tensor) else found


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _factory(made: Any, *args: Any, **kwargs: Any) -> Shell:
    _require_own_generator(kwargs.values())
    return Shell(made(*args, **{**kwargs, "device": "cpu"}))


def _whole(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return Shell.__torch_dispatch__(operator, (), args, kwargs)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _require_own_generator(values: Iterable[Any]) -> None:
    if any(isinstance(value, torch.Generator) for value in values):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")


def _require_one_device(func: Any, args: tuple, given: Sequence[Any]) -> None:
    """What CUDA would refuse raises RuntimeError; `given` is all that is in the arguments."""
    name = func._schema.name
    _require_own_generator(given)
    if name in _PRODUCTS and not args[0].dtype.is_floating_point:
        raise RuntimeError(f"{name} not implemented on {NAME!r} for {args[0].dtype}")
    strangers = [value for value in given if isinstance(value, Tensor) and not isinstance(value, Shell)]
    if not strangers or name == "aten::copy_":
        return
    if name in _INDEXED and isinstance(args[0], Shell):  # may be indexed from both sides
        strangers = [value for value in _leaves(args[2:]) if isinstance(value, Tensor) and not isinstance(value, Shell)]
    changed = func._schema.is_mutable and not isinstance(args[0], Shell)
    if torch.Tag.pointwise in func.tags or name in (*_ONE_BY_ONE, *_INDEXED):
        strangers = [value for value in strangers if value.dim() or changed]
    if strangers:
        shapes = ", ".join(str(tuple(value.shape)) for value in strangers)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {shapes} on the CPU")
