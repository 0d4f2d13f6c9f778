"""Is the decomposition of this model exact, where does it lie, will each stage fit, and how long will it take?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unwrite.errors import whole
from unwrite.model import devices
from unwrite.model.devices import Region, placed, size
from unwrite.model.families import BY_HAND
from unwrite.model.load import outline, places
from unwrite.model.view import Model, require_model
from unwrite.model.weights import DISK
from unwrite.studies.described import described
from unwrite.studies.foreseen import foreseen, spread
from unwrite.studies.room import memory


@dataclass(frozen=True)
class Check:
    """One line of a diagnosis: passed or not, what was found, and what to do if it failed."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Need:
    """What one stage needs: seconds, and bytes where the token ids go, weights included."""

    stage: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Diagnosis:
    """Checks, and estimates for a scan of `n` prompts of `length` tokens: bytes and seconds.

    `stages` has the same of a survival of all writers, of a verify of one in the middle, of a dla of one prompt, and of
    an audit of the material writers; `regions` says where the weights lie; `memory` is what is needed where the token
    ids go, weights included; `seconds` is NaN before a model is loaded, since only its own passes tell what reading
    from disk costs.
    """

    checks: tuple[Check, ...]
    n: int
    length: int
    memory: int
    seconds: float
    regions: tuple[Region, ...] = ()
    stages: tuple[Need, ...] = ()

    @property
    def ok(self) -> bool:
        """Did all checks pass?"""
        return all(check.ok for check in self.checks)

    @property
    def per_pass(self) -> str:
        """What every forward pass brings in, in words; "" where all weights are where they are used."""
        read = sum(region.bytes for region in self.regions if region.moves and region.place == DISK)
        moved = sum(region.bytes for region in self.regions if region.moves and region.place != DISK)
        parts = [f"reads {size(read)} from disk"] * (read > 0) + [f"moves {size(moved)} from other memory"] * (
            moved > 0
        )
        return f"every forward pass {' and '.join(parts)}" if parts else ""


def doctor(
    lm: Model, n: int = 300, length: int | None = None, writers: int | Iterable[object] | None = None
) -> Diagnosis:
    """Checks of a loaded model and estimates for scan, survival, verify, dla, audit, from a trial on random ids.

    Arguments: `n` prompts of `length` tokens (of dla one); `writers` that survival takes out: their names, or how many,
    by default all. Memory: weights, what a batch holds, and what is summed up of it. The trial runs this very model:
    where weights are read from disk, so are they there.
    """
    require_model(lm)
    n, length = _size(n, length, lm)
    checks = [Check(f"row {lm.about.get('row', BY_HAND)}", True, described(lm))]
    checks += [
        Check(f"identity {name}", lm.certificate.holds(name), f"relative error {error:.1e}")
        for name, error in lm.certificate.items()
    ]
    checks.append(Check("tokenizer", lm.tokenizer is not None, _tokenizer(lm), "pass tokenizer=… to read text"))
    nodes = spread(lm, writers)
    regions, here, need = placed(lm), str(lm.device), memory(lm, n, length, len(nodes))
    checks += _fits(regions, here, need["scan"], loaded=True)
    stages = tuple(
        Need(name, seconds, _needed(regions, here, need[name]))
        for name, seconds in foreseen(lm, n, length, nodes).items()
    )
    first = stages[0]
    return Diagnosis(tuple(checks), n, length, first.memory, first.seconds, regions, stages)


def foresee(
    source: str | Path, device_map: Any, n: int = 300, length: int | None = None, dtype: str | None = None
) -> Diagnosis | None:
    """What a `device_map` would do with a model, from its configuration alone: no weight is read.

    None for a model whose shape its configuration does not say. Raises ModelError as `uw.load` does.
    """
    device_map = places(device_map)
    if (lm := outline(source, dtype)) is None:
        return None
    n, length = _size(n, length, lm)
    regions, here = devices.foreseen(lm, device_map)
    need = memory(lm, n, length)["scan"]
    checks = _fits(regions, here, need, loaded=False)
    return Diagnosis(tuple(checks), n, length, _needed(regions, here, need), float("nan"), regions)


def _size(n: int, length: int | None, lm: Model) -> tuple[int, int]:
    """How many prompts of which length the scan has that is asked about."""
    longest = lm.context or 1024
    wanted = longest if length is None else whole("length is a number of tokens", length, 1)
    return whole("n is a number of prompts", n, 1), min(wanted, longest)


def _needed(regions: Sequence[Region], here: str, scan: int) -> int:
    """Bytes needed where the token ids go: what lies there, the largest of what is brought in, and a scan."""
    brought = max((region.largest for region in regions), default=0)
    return _held(regions, here) + brought + scan


def _held(regions: Sequence[Region], place: str) -> int:
    return sum(region.bytes for region in regions if region.place == place)


def _fits(regions: Sequence[Region], here: str, scan: int, loaded: bool) -> list[Check]:
    """Is there room on every device?"""
    found, fix = (
        [],
        "use a smaller length, fewer writers, or a device_map that leaves more room here (auto, or your own)",
    )
    devices = dict.fromkeys([here, *(region.place for region in regions if region.place != DISK)])
    for place in devices:
        held = _held(regions, place)
        need, free = _needed(regions, here, scan) if place == here else held, _free(place) + held * loaded
        name = "memory" if len(devices) == 1 else f"memory of {place}"
        found.append(Check(name, need <= free, f"{size(need)} needed, {size(free)} there", fix))
    return found


def _tokenizer(lm: Model) -> str:
    return "none" if lm.tokenizer is None else f"{len(lm.tokenizer)} ids for {lm.vocabulary} embedding rows"


def _free(place: str) -> int:
    """Bytes that are free on a device; 0 on one that is not there."""
    device = torch.device(place)
    if device.type == "cuda":
        there = (device.index or 0) < torch.cuda.device_count()
        return torch.cuda.mem_get_info(device)[0] if there else 0
    meminfo = Path("/proc/meminfo")
    # What the system has read ahead from disk is there for whoever needs room.
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
