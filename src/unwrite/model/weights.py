"""Where are a module's weights, and what are they? The one place through which weights are read.

A model that `device_map` spreads keeps some weights in other memory or on disk, and shows empty parameters on the
device `meta` in their place. accelerate brings them in for a module's own forward pass and not for anyone who reads
them beside it, so they are read here from where accelerate keeps them. What is computed from them goes to the device
where the model's token ids go (`home`), and there all statistics are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model.hooks import called, ended, hooked

DISK = "disk"


def weight_of(module: nn.Module | None, name: str = "weight") -> Tensor | None:
    """A module's parameter; where it is kept elsewhere a copy of it, on the device on which the module computes.

    None without a module or without such a parameter. Raises ModelError for a parameter that is nowhere.
    """
    held = getattr(module, name, None)
    if module is None or not isinstance(held, Tensor) or not held.is_meta:
        return held
    value = _brought(module, name, _keeper(module, name)).to(_runs_on(module), held.dtype)
    return value.requires_grad_(held.requires_grad)


def home(hf: Any) -> torch.device:
    """The device where a model's token ids go. Raises ModelError for a model without weights."""
    embedding = hf.get_input_embeddings()
    if not embedding.weight.is_meta:
        return embedding.weight.device
    return torch.empty(0, device=_runs_on(embedding)).device  # "cuda" is cuda:0


def through(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of x, called where it computes; x's own device is that of the result."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return module(x.to(weight.device)).to(x.device)
    # accelerate moves what a module is given to where its weights are brought.
    return module(x).to(x.device)


def offloaded(hf: nn.Module) -> bool:
    """Are any weights kept elsewhere and brought in when they are needed?"""
    return any(parameter.is_meta for parameter in hf.parameters())


@dataclass(frozen=True)
class Stored:
    """One parameter of a model: its name, and where its values are when the model rests: a device, or "disk"."""

    name: str
    module: nn.Module
    leaf: str
    place: str
    state: Any  # another one whenever the values may have changed

    @property
    def shown(self) -> Tensor:
        """The parameter as the module shows it; without values where it is kept elsewhere."""
        return getattr(self.module, self.leaf)

    @property
    def bytes(self) -> int:
        """What its values take."""
        return self.shown.numel() * self.shown.element_size()

    @property
    def moves(self) -> bool:
        """Is it brought in anew in every forward pass?"""
        return self.shown.is_meta

    def values(self) -> Tensor:
        """The values themselves, on any device. One that is kept elsewhere is read now, and stays with nobody."""
        shown = self.shown
        if not shown.is_meta:
            return shown.detach()
        return _brought(self.module, self.leaf, _keeper(self.module, self.leaf)).to(shown.dtype)


def stored(hf: Any) -> Iterator[Stored]:
    """Every parameter once, also where the two halves of a tied one are empty parameters of their own."""
    first: set[str] = set()
    tied = getattr(hf, "all_tied_weights_keys", None) or {}
    for name, parameter in hf.named_parameters():
        group = tied.get(name, name)
        if group in first and (parameter.is_meta or hf.get_parameter(group).is_meta):
            continue
        first.add(group)
        path, _, leaf = name.rpartition(".")
        module = hf.get_submodule(path)
        yield Stored(name, module, leaf, *_place(module, leaf, parameter))


def _place(module: nn.Module, leaf: str, parameter: Tensor) -> tuple[str, Any]:
    if not parameter.is_meta:
        return str(parameter.device), (parameter.data_ptr(), _version(parameter))
    kept = _kept(_keeper(module, leaf).weights_map, leaf)
    if isinstance(kept, Tensor):
        return str(kept.device), (kept.data_ptr(), _version(kept))
    return DISK, kept


def _version(tensor: Tensor) -> object:
    """Another one whenever a tensor may have changed; one that was made in inference mode does not count changes."""
    return object() if tensor.is_inference() else tensor._version


def _kept(found: Any, name: str) -> Any:
    """The tensor that accelerate keeps in memory; of one on disk, what changes when its file does."""
    while (inner := getattr(found, "dataset", None)) is not None:
        found, name = inner, f"{found.prefix}{name}"
    memory = getattr(found, "state_dict", found)
    if name in memory:
        return memory[name]
    entry = found.index[name]
    file = Path(entry.get("safetensors_file") or f"{found.save_folder}/{name}.dat")
    state = file.stat()
    return str(file), entry.get("weight_name", name), state.st_ino, state.st_size, state.st_mtime_ns


def _brought(module: nn.Module, name: str, keeper: Any) -> Tensor:
    value = keeper.weights_map[name]
    if value.shape != getattr(module, name).shape:
        raise ModelError(
            f"the {name} that is kept for {type(module).__name__} has another shape", got=list(value.shape)
        )
    return value.detach()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """What accelerate has put on a module."""
    waiting = [module.__dict__.get("_hf_hook")]
    while waiting:
        if (hook := waiting.pop()) is not None:
            yield hook
            waiting.extend(reversed(getattr(hook, "hooks", ())))


def _keeper(module: nn.Module, name: str) -> Any:
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and name in (hook.weights_map or ()):
            return hook
    raise ModelError(
        f"the {name} of a {type(module).__name__} is empty (on the device meta), and nothing brings its values in",
        expected="weights on a device, or a model that `device_map` has spread",
        fix="load it again, with device_map=… if it is too large for one device",
    )


def _runs_on(module: nn.Module) -> torch.device:
    for hook in _hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    return torch.device("cpu")


@contextmanager
def followed(hf: nn.Module) -> Iterator[None]:
    """Inside the `with`, autograd can go through a model that was made in inference mode, in the same memory.

    Afterwards every parameter and buffer is the object that it was.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in hf.modules():
            for own in (module._parameters, module._buffers):
                for name, value in own.items():
                    if value is not None and value.is_inference():
                        held.append((own, name, value))
                        own[name] = _followed(value)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for own, name, value in held:
            own[name] = value


def _followed(value: Tensor) -> Tensor:
    plain = torch.empty(0, dtype=value.dtype, device=value.device)
    plain.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    return nn.Parameter(plain, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else plain


@contextmanager
def reloading(hf: nn.Module) -> Iterator[None]:
    """Inside the `with`, autograd's graph remembers where weights are kept, and not the weights that were brought in.

    Otherwise the graph of a whole pass would hold all that does not fit on the device; a backward pass brings each one
    in again. Gradients of such weights are not computed, and those of activations are what they were.
    """
    away = [(module, name) for module in hf.modules() for name, p in module._parameters.items() if _is_away(p)]
    followed = [(module, name) for module, name in away if module.get_parameter(name).requires_grad]
    running: list[nn.Module] = []
    with ExitStack() as stack:
        for module in {module: None for module, _ in away}:
            begins = called(module, lambda _, module=module: running.append(module))
            stack.enter_context(hooked([begins, ended(module, lambda: _end(running))]))
        for module, name in followed:
            # The graph holds on to every leaf that has a gradient.
            module.get_parameter(name).requires_grad_(False)
            stack.callback(lambda module=module, name=name: module.get_parameter(name).requires_grad_(True))
        if away:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(partial(_packed, running), _unpacked))
        yield


def _is_away(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_meta


def _end(running: list[nn.Module]) -> None:
    if running:
        running.pop()


@dataclass(frozen=True, eq=False)
class _Away:
    """A weight, or a view of it, that a graph would have saved."""

    module: nn.Module
    name: str
    device: torch.device
    view: tuple[torch.Size, tuple[int, ...], int]


def _packed(running: list[nn.Module], saved: Tensor) -> Tensor | _Away:
    for name, parameter in running[-1]._parameters.items() if running else ():
        if parameter is None or parameter.is_meta or not parameter.is_contiguous():
            continue
        if parameter.untyped_storage().data_ptr() == saved.untyped_storage().data_ptr():
            view = (saved.shape, saved.stride(), int(saved.storage_offset()))
            return _Away(running[-1], name, saved.device, view)
    return saved


def _unpacked(kept: Tensor | _Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    weight = weight_of(kept.module, kept.name)
    assert weight is not None  # noqa: S101 (it was there in the forward pass)
    return weight.to(kept.device).contiguous().as_strided(*kept.view)
