"""What if layers computed on devices that this machine does not have? Tensors that say so, and cannot be mixed.

Inside `Devices()` every tensor is known to be on a device, by name alone: what is made of tensors on one device is
there too, `.to` takes it elsewhere, and an operation on tensors of two devices fails as it would on two real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CPU = torch.device("cpu")
# Real devices allow a tensor of the processor as an index, as a number, and as what is copied.
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_)
_ANYWHERE = (Tensor.copy_, torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class Devices(TorchFunctionMode):
    """Knows of every tensor where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> torch.device:
        return self.known.get(tensor, tensor.device if tensor.is_meta else CPU)

    def put(self, made: Any, device: torch.device) -> Any:
        for tensor in _tensors(made):
            self.known[tensor] = device
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # made anew at every look
            return self.of(args[0])
        if func is Tensor.to:
            return self._moved(*args, **kwargs)
        if func is Tensor.cpu:
            return self._moved(args[0], CPU)
        if func is Tensor.numpy and self.of(args[0]) != CPU:
            raise TypeError(f"can't convert {self.of(args[0])} device type tensor to numpy")
        inputs = list(_tensors([args, kwargs]))
        there = self._common(func, args, inputs)
        if (named := kwargs.get("device")) is not None:
            there, kwargs["device"] = torch.device(named), CPU
        if func is torch.autograd.grad:
            made = func(*args, **kwargs)
            for slope, tensor in zip(made, args[1], strict=True):
                self.put(slope, self.of(tensor))
            return made
        return self.put(func(*args, **kwargs), there)

    def _common(self, func: Any, args: Any, inputs: list[Tensor]) -> torch.device:
        """The device of an operation's result."""
        if func in (Tensor.__getitem__, Tensor.__setitem__, *_ANYWHERE):
            there = self.of(args[0]) if isinstance(args[0], Tensor) else CPU
            indices = list(_tensors(args[1])) if func in _INDEXING else []
            if any(self.of(index) not in (there, CPU) for index in indices):
                raise RuntimeError(f"indices should be on {there} or on the CPU ({func.__name__})")
            values = list(_tensors(args[2:])) if func is Tensor.__setitem__ else []
            if any(self.of(value) != there for value in values if value.dim()):
                raise RuntimeError(f"a value from another device than {there}")
            return there
        places = {self.of(tensor) for tensor in inputs if tensor.dim() or self.of(tensor) != CPU}
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device: {places} ({func.__name__})")
        return places.pop() if places else CPU

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        there, dtype = self.of(tensor), kwargs.get("dtype")
        for arg in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(arg, Tensor):
                there, dtype = self.of(arg), arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, torch.device)):
                there = torch.device(arg)
        made = tensor if dtype is None else tensor.to(dtype)
        if made is tensor and there != self.of(tensor):
            made = tensor.clone()
        return made if made is tensor else self.put(made, there)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)


class _Moves(ModelHook):
    """What accelerate puts on a module that computes on another device."""

    def __init__(self, device: torch.device, back: bool = False):
        self.execution_device, self.back = device, back

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return send_to_device(args, self.execution_device), send_to_device(
            kwargs, self.execution_device, skip_keys=["cache", "past_key_values"]
        )


def spread(hf: nn.Module, devices: Devices, places: dict[str, str]) -> None:
    """Put the named parts of a model on devices: their weights, and what they are called with."""
    for name, place in places.items():
        for module in hf.get_submodule(name).modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            devices.put(tensors, torch.device(place))
            if module.state_dict() or not list(module.children()):
                add_hook_to_module(module, _Moves(torch.device(place)))
