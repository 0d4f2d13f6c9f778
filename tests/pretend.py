"""What would fail on a GPU? A device that computes on the CPU, and refuses what CUDA refuses.

A tensor on it is a shell around a CPU tensor, so every number is that of the CPU, bit for bit. As with CUDA, tensors of
two devices never meet, but for single numbers and indices; numpy sees only what `.cpu()` brought back; a generator of
the CPU draws nothing there; integers have no matrix product; and backward passes run in a thread of the device's own.
What it cannot show: CUDA's own kernels (rounding, order of sums, missing dtypes), its memory, a second device of a kind.

`register` changes a process for good (torch has an accelerator from then on) and must come before its first backward
pass, so what needs the device runs in a process of its own: see test_other_device.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
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
        _require_one_device(func, args, kwargs)
        target = kwargs.get("device")
        if target is not None:
            kwargs = {**kwargs, "device": "cpu"}
        shells = {id(shell.held): shell for shell in _tensors((args, kwargs)) if isinstance(shell, Shell)}
        found = func(*tree.tree_map(_held, args), **tree.tree_map(_held, kwargs))
        if torch.Tag.inplace_view in func.tags:  # a shell says itself what its shape is
            with torch.utils._mode_utils.no_dispatch():
                func(*args, **kwargs)
        assert all(shell.shape == shell.held.shape for shell in shells.values()), f"{func} changed a shape in place"
        if target is not None and torch.device(target).type == "cpu":
            return found
        return tree.tree_map_only(Tensor, lambda made: shells[id(made)] if id(made) in shells else Shell(made), found)

    # torch cannot read, find or copy what a subclass holds; what lies on CUDA it can.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Shell) else value


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree.tree_leaves(values) if isinstance(value, Tensor)]


def _factory(made: Any, *args: Any, **kwargs: Any) -> Shell:
    _require_own_generator(kwargs.values())
    return Shell(made(*args, **{**kwargs, "device": "cpu"}))


def _whole(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return Shell.__torch_dispatch__(operator, (), args, kwargs)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _require_own_generator(values: Any) -> None:
    if any(isinstance(value, torch.Generator) for value in values):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")


def _require_one_device(func: Any, args: tuple, kwargs: dict) -> None:
    """What CUDA would refuse raises RuntimeError."""
    name = func._schema.name
    _require_own_generator(tree.tree_leaves((args, kwargs)))
    if name == "aten::copy_":
        return
    if name in _PRODUCTS and not args[0].dtype.is_floating_point:
        raise RuntimeError(f"{name} not implemented on {NAME!r} for {args[0].dtype}")
    strangers = list(_strangers(func, name, args, kwargs))
    if strangers or (func._schema.is_mutable and not isinstance(args[0], Shell)):
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found {NAME} and cpu (shapes there: {shapes})"
        )


def _strangers(func: Any, name: str, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Tensors of the CPU that may not be among these."""
    if name in _INDEXED:  # whatever lies on the device may be indexed from both sides
        yield from (tensor for tensor in _tensors(args[0]) if not isinstance(tensor, Shell))
        args = args[2:]
    single = torch.Tag.pointwise in func.tags or name in (*_ONE_BY_ONE, *_INDEXED)
    for tensor in _tensors((args, kwargs)):
        if not (isinstance(tensor, Shell) or (single and tensor.dim() == 0)):
            yield tensor
