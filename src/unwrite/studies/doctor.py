"""Is the decomposition of this model exact, where does it lie, will a scan fit, and how long will it take?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unwrite.errors import whole
from unwrite.methods.scan import scan
from unwrite.model.devices import Region, foreseen, placed, size
from unwrite.model.load import outline, places
from unwrite.model.view import Model, require_model
from unwrite.model.weights import DISK
from unwrite.prompts.tokens import from_ids
from unwrite.run.loop.stream import batch_size
from unwrite.stats.mergeable import RATIO
from unwrite.studies.foreseen import trial_ids

_TRIAL_TOKENS = 512


@dataclass(frozen=True)
class Check:
    """One line of a diagnosis: passed or not, what was found, and what to do if it failed."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Checks, and estimates for a scan of `n` prompts of `length` tokens: bytes and seconds.

    `regions` says where the weights lie; `memory` is what is needed where the token ids go, weights included; `seconds`
    is NaN before a model is loaded, since only its own passes tell what reading from disk costs.
    """

    checks: tuple[Check, ...]
    n: int
    length: int
    memory: int
    seconds: float
    regions: tuple[Region, ...] = ()

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


def doctor(lm: Model, n: int = 300, length: int | None = None) -> Diagnosis:
    """Checks of a loaded model and estimates for a scan, from a timed trial on random token ids.

    Memory: weights, the factors of one batch, the histograms of all pairs, and the sums over positions. The trial is a
    scan of this very model: where weights are read from disk, so are they there.
    """
    require_model(lm)
    n, length = _size(n, length, lm)
    checks = [
        Check(f"identity {name}", lm.certificate.holds(name), f"relative error {error:.1e}")
        for name, error in lm.certificate.items()
    ]
    checks.append(Check("tokenizer", lm.tokenizer is not None, _tokenizer(lm), "pass tokenizer=… to read text"))
    regions, here, need = placed(lm), str(lm.device), _memory(lm, n, length)
    checks += _fits(regions, here, need, loaded=True)
    return Diagnosis(tuple(checks), n, length, _needed(regions, here, need), _seconds(lm, n, length), regions)


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
    regions, here = foreseen(lm, device_map)
    need = _memory(lm, n, length)
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


def _memory(lm: Model, n: int, length: int) -> int:
    """Bytes of a scan, beside the weights."""
    width = torch.finfo(lm.compute_dtype).bits // 8
    nodes, states = len(lm.parts), len(lm.states)
    bins = 2 * RATIO.reach + 2
    pairs = (nodes + states + 1) * nodes
    factors = (2 * len(lm.layers) + 2) * lm.d_model * width
    folded = len(lm.layers) * lm.n_heads * lm.head_dim * lm.d_model * width
    tokens = from_ids(torch.zeros(min(n, 4096), length, dtype=torch.long))
    batch = batch_size(lm, tokens)
    alive = (-(-n // batch)).bit_length() + 2
    positions = min(2**30, factors * length * alive)
    # Histograms with their stash; the forward pass holds about as much again as the factors it shows.
    return folded + pairs * (4 * bins + 2 * 256) + 2 * batch * length * factors + positions + 2**26


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


def _seconds(lm: Model, n: int, length: int) -> float:
    """From two timed trials of different size, which tell what a scan costs once and what it costs per token."""
    short = min(length, _TRIAL_TOKENS)
    few = max(1, _TRIAL_TOKENS // short)
    _timed(lm, few, short)  # the first forward pass also allocates and compiles
    once, thrice = _timed(lm, few, short), _timed(lm, 3 * few, short)
    per_token = max(thrice - once, 0.0) / (2 * few * short)
    return max(once - per_token * few * short, 0.0) + per_token * n * length


def _timed(lm: Model, prompts: int, length: int) -> float:
    ids = trial_ids(lm, prompts, length)
    start = time.monotonic()
    scan(lm, ids)
    return time.monotonic() - start
