"""On which device does each part of a model lie, or where would it go, and what is brought in at every pass?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map

from unwrite.model.view import Model
from unwrite.model.weights import DISK, stored

_NOT_RUN_ON = ("cpu", DISK)
_LAST = ("final norm", "unembed")


@dataclass(frozen=True)
class Region:
    """Parts of a model ("embed, layers 0–2") whose weights lie in one place: a device, or "disk".

    `moves`: are they brought to another device in every forward pass? `largest`: bytes of what comes in at once.
    """

    parts: str
    place: str
    bytes: int
    moves: bool
    largest: int

    def __str__(self) -> str:
        how = "" if not self.moves else (", read" if self.place == DISK else ", moved") + " at every forward pass"
        return f"{self.parts}: {self.place}, {size(self.bytes)}{how}"


@dataclass(frozen=True)
class _Part:
    module: nn.Module
    place: str
    bytes: int
    moves: bool


def size(number: int) -> str:
    """Bytes, for a reader."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**27 else f"{number / 2**20:.2f} MiB"


def placed(lm: Model) -> tuple[Region, ...]:
    """Where the weights of a loaded model lie."""
    return _regions(lm, [_Part(one.module, one.place, one.bytes, one.moves) for one in stored(lm.hf)])


def foreseen(lm: Model, device_map: Any) -> tuple[tuple[Region, ...], str]:
    """Where `device_map` would put the weights of a model that is not loaded, and where its token ids would go."""
    places = _places(lm.hf, device_map)
    devices = {place for place in places.values() if place not in _NOT_RUN_ON}
    away = (DISK, "cpu") if devices else (DISK,)
    found = []
    for name, parameter in lm.hf.named_parameters():
        place = _place_of(name, places)
        module = lm.hf.get_submodule(name.rpartition(".")[0])
        found.append(_Part(module, place, parameter.numel() * parameter.element_size(), place in away))
    embedded = next(part for part in found if part.module is lm.hf.get_input_embeddings())
    return _regions(lm, found), (min(devices) if devices else "cpu") if embedded.moves else embedded.place


def _places(hf: Any, device_map: Any) -> dict[str, str]:
    """Where transformers would put the modules of a model."""
    found = _get_device_map(hf, check_and_set_device_map(device_map), None, None)
    return {name: place if place == DISK else str(torch.device(place)) for name, place in found.items()}


def _place_of(name: str, places: Mapping[str, str]) -> str:
    holders = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
    return places[max(holders, key=len)] if holders else "cpu"


def _regions(lm: Model, parts: Iterable[_Part]) -> tuple[Region, ...]:
    parts = list(parts)
    of_module = {module: layer.index for layer in lm.layers for module in layer.block.modules()}
    grouped: dict[tuple[str, bool], list[_Part]] = {}
    for part in parts:
        grouped.setdefault((part.place, part.moves), []).append(part)
    return tuple(
        Region(
            ", ".join(_named(lm, own, parts, of_module)),
            place, sum(part.bytes for part in own), moves, _largest(own) if moves else 0,
        )
        for (place, moves), own in grouped.items()
    )  # fmt: skip


def _largest(parts: Iterable[_Part]) -> int:
    """Bytes of the largest module: accelerate brings in one at a time."""
    total: dict[nn.Module, int] = {}
    for part in parts:
        total[part.module] = total.get(part.module, 0) + part.bytes
    return max(total.values())


def _named(lm: Model, own: list[_Part], every: list[_Part], of_module: Mapping[nn.Module, int]) -> Iterator[str]:
    """The parts of a region in the order of a forward pass."""
    ends: dict[nn.Module, str] = {lm.hf.get_input_embeddings(): "embed", lm.final_norm: "final norm"}
    if lm.has_head:
        ends |= {lm.head: "unembed"}
    if lm.row.pos_embed:
        ends |= {lm.decoder.get_submodule(lm.row.pos_embed): "pos_embed"}
    names = dict.fromkeys(ends.get(part.module, "other weights") for part in own if part.module not in of_module)
    yield from (name for name in names if name not in _LAST)
    count = [[of_module.get(part.module) for part in some].count for some in (own, every)]
    layers = [i for i in range(len(lm.layers)) if count[0](i)]
    whole = [i for i in layers if count[0](i) == count[1](i)]
    yield from (f"layer{'s' * (last > first)} {first}{f'–{last}' * (last > first)}" for first, last in _ranges(whole))
    yield from (f"a part of layer{'s' * (last > first)} {first}{f'–{last}' * (last > first)}"
                for first, last in _ranges([i for i in layers if i not in whole]))  # fmt: skip
    yield from (name for name in names if name in _LAST)


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of numbers that follow each other."""
    starts = [i for i in numbers if i - 1 not in numbers]
    ends = [i for i in numbers if i + 1 not in numbers]
    yield from zip(starts, ends, strict=True)
