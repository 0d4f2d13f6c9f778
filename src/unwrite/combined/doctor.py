"""Is the decomposition of this model exact, will a scan fit, and how long will it take?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from unwrite.methods.scan import scan
from unwrite.model.view import Model
from unwrite.run.stats import RATIO
from unwrite.run.stream import batch_size
from unwrite.tokens import from_ids

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
    """Checks, and estimates for a scan of `n` prompts of `length` tokens: bytes and seconds."""

    checks: tuple[Check, ...]
    n: int
    length: int
    memory: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Did all checks pass?"""
        return all(check.ok for check in self.checks)


def doctor(lm: Model, n: int = 300, length: int | None = None) -> Diagnosis:
    """Checks of a loaded model and estimates for a scan, from a timed trial on random token ids.

    Memory: weights, the factors of one batch, the histograms of all pairs, and the sums over positions.
    """
    length = min(length or 1024, lm.context or 1024)
    checks = [
        Check(f"identity {name}", error <= lm.certificate.limit, f"relative error {error:.1e}")
        for name, error in lm.certificate.items()
    ]
    checks.append(Check("tokenizer", lm.tokenizer is not None, _tokenizer(lm), "pass tokenizer=… to read text"))
    memory = _memory(lm, n, length)
    free = _free(lm)
    fix = "use a smaller length, fewer writers, or another device"
    checks.append(Check("memory", memory <= free, f"{memory / 2**30:.2f} GiB needed, {free / 2**30:.2f} there", fix))
    return Diagnosis(tuple(checks), n, length, memory, _seconds(lm, n, length))


def _tokenizer(lm: Model) -> str:
    return "none" if lm.tokenizer is None else f"{len(lm.tokenizer)} ids for {lm.vocabulary} embedding rows"


def _memory(lm: Model, n: int, length: int) -> int:
    width = torch.finfo(lm.compute_dtype).bits // 8
    weights = sum(parameter.numel() * parameter.element_size() for parameter in lm.hf.parameters())
    nodes, states = len(lm.parts), len(lm.states)
    bins = 2 * RATIO.reach + 2
    pairs = (nodes + states + 1) * nodes
    factors = (2 * len(lm.layers) + 2) * lm.d_model * width
    tokens = from_ids(torch.zeros(min(n, 4096), length, dtype=torch.long))
    batch = batch_size(lm, tokens)
    alive = (-(-n // batch)).bit_length() + 2
    positions = min(2**30, factors * length * alive)
    # Histograms with their stash; the forward pass holds about as much again as the factors it shows.
    return weights + pairs * (4 * bins + 2 * 256) + 2 * batch * length * factors + positions + 2**26


def _free(lm: Model) -> int:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in lm.hf.parameters())
    if lm.device.type == "cuda":
        return torch.cuda.mem_get_info(lm.device)[0] + weights
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + weights


def _seconds(lm: Model, n: int, length: int) -> float:
    """From two timed trials of different size, which tell what a scan costs once and what it costs per token."""
    short = min(length, _TRIAL_TOKENS)
    few = max(1, _TRIAL_TOKENS // short)
    _timed(lm, few, short)  # the first forward pass also allocates and compiles
    once, thrice = _timed(lm, few, short), _timed(lm, 3 * few, short)
    per_token = max(thrice - once, 0.0) / (2 * few * short)
    return max(once - per_token * few * short, 0.0) + per_token * n * length


def _timed(lm: Model, prompts: int, length: int) -> float:
    ids = torch.randint(lm.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    scan(lm, ids)
    return time.monotonic() - start
