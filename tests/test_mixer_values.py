"""Is what mixers carry through values that of their kernels? Spies in transformers' own modules call these once more.

The truth: what of a vector reaches the values by notes of where they lie, through a convolution and the held factor of
its silu, is given to the very function that the mixer called, in the place of its values and with all else as it was;
what the function gives is multiplied by what stood between it and the out-projection. Nothing of the library is used.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import every
import unwrite as uw
from methods import IDS, few_draws
from unwrite.model import identities
from unwrite.model.certificate import certify
from unwrite.model.hooks import hooked
from unwrite.model.load import view
from unwrite.model.mixer_values import values_of
from unwrite.model.mixers import Held, holding, sloped_z, through_mixer
from unwrite.model.view import Model, fold
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay import clean as replay
from unwrite.studies.described import described

CONVOLUTION = "causal_conv1d_fn"


@dataclass(frozen=True)
class Notes:
    """Of a mixer: what makes its values, channels before theirs in its convolution, its kernel and what that calls them."""

    weight: Callable[[Any], Tensor]
    before: Callable[[Any], int]
    kernel: str
    value: str


def _scanned(mixer: Any) -> Tensor:
    return mixer.in_proj.weight[mixer.intermediate_size : 2 * mixer.intermediate_size]


NOTES = {
    "qwen3_5_text": Notes(
        lambda mixer: mixer.in_proj_qkv.weight[2 * mixer.key_dim :], lambda mixer: 2 * mixer.key_dim,
        "torch_chunk_gated_delta_rule", "value",
    ),
    "kimi_linear": Notes(
        lambda mixer: mixer.v_proj.weight, lambda mixer: 2 * mixer.qkv_dim, "chunk_kimi_delta_attention", "value"
    ),
    "bamba": Notes(_scanned, lambda mixer: 0, "mamba2_chunk_scan", "hidden_states"),
    "mamba2": Notes(_scanned, lambda mixer: 0, "mamba2_chunk_scan", "hidden_states"),
    "mamba": Notes(
        lambda mixer: mixer.in_proj.weight[: mixer.intermediate_size], lambda mixer: 0,
        "mamba_selective_scan", "hidden_states",
    ),
    "lfm2": Notes(
        lambda mixer: mixer.in_proj.weight[2 * len(mixer.out_proj.weight) :], lambda mixer: 0,
        CONVOLUTION, "hidden_states",
    ),
    "recurrent_gemma": Notes(lambda mixer: mixer.linear_x.weight, lambda mixer: 0, "_rnn_scan", "hidden_states"),
}  # fmt: skip
KINDS = tuple(NOTES)
Given = dict[str, Any]
Seen = dict[str, list[tuple[Callable[..., Any], Given, Tensor]]]


@cache
def model(kind: str) -> Model:
    return view(every.model(kind), convention="raw")


@contextmanager
def spied(owner: Any, name: str, seen: Seen) -> Iterator[None]:
    """Inside the `with`, `seen` is told of every call of a function: itself, its arguments by name and what it gave."""
    own = getattr(owner, name)

    def spy(*args: Any, **named: Any) -> Any:
        made = own(*args, **named)
        given = inspect.signature(own).bind(*args, **named).arguments
        given |= given.pop("kwargs", {})
        seen.setdefault(name, []).append((own, given, made if isinstance(made, Tensor) else made[0].clone()))
        return made

    with patch.object(owner, name, spy):
        yield


@dataclass
class Run:
    """A clean run, and what its last mixer's functions were called with."""

    lm: Model
    clean: replay.Clean
    index: int
    kernel: tuple[Callable[..., Any], Given, Tensor]
    convolved: tuple[Tensor, Tensor, Tensor | None]  # what was convolved [prompt, channel, position], taps, bias
    silu: bool

    @property
    def mixer(self) -> Any:
        return self.lm.layers[self.index].attention

    def z(self) -> Tensor:
        return self.clean.record.z[self.index].flatten(-2)


@cache
def run_of(kind: str, which: int = -1) -> Run:
    lm, seen = model(kind), {}
    mixers = [layer for layer in lm.layers if layer.mixes]
    mixer: Any = mixers[which].attention
    module, notes = importlib.import_module(type(mixer).__module__), NOTES[kind]
    with ExitStack() as stack:
        own = notes.kernel == "_rnn_scan"
        stack.enter_context(spied(mixer.rg_lru if own else module, notes.kernel, seen))
        if own:
            stack.enter_context(spied(mixer.conv_1d, "forward", seen))
        elif notes.kernel != CONVOLUTION:
            stack.enter_context(spied(module, CONVOLUTION, seen))
        clean = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    at = 0 if own else which
    _, conv, made = seen["forward" if own else CONVOLUTION][at]
    if own:  # conv_1d is padded behind as well
        conv = {"hidden_states": conv["input"], "weight": mixer.conv_1d.weight[:, 0], "bias": mixer.conv_1d.bias}
    convolved = conv["hidden_states"], conv["weight"], conv.get("bias")
    return Run(lm, clean, mixers[which].index, seen[notes.kernel][at], convolved, conv.get("activation") == "silu")


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Each channel of [prompt, channel, position] with its own taps, the last of which is for now."""
    padded = nn.functional.pad(x.double(), (taps.shape[1] - 1, 0))
    return sum(padded[..., i : i + x.shape[-1]] * taps[:, i, None].double() for i in range(taps.shape[1]))  # pyright: ignore[reportReturnType]


@torch.no_grad()
def carried_by_hand(kind: str, run: Run, read: Tensor) -> Tensor:
    """What a vector in what the mixer reads puts into its z, by notes: [prompt, position, z]."""
    notes, (x, taps, bias) = NOTES[kind], run.convolved
    weight, before = notes.weight(run.mixer), notes.before(run.mixer)
    made = (read @ weight.t()).mT
    function, given, core = run.kernel
    if kind == "lfm2":  # the convolution is its kernel: it is given B ⊙ x, and what it gives is multiplied by C
        gate = (read_by_mixer(run) @ run.mixer.in_proj.weight[: len(weight)].t()).mT
        values = gate * made
    else:
        channels = slice(before, before + len(weight))
        values = convolve(made, taps[channels])
        if run.silu:
            u = convolve(x[:, channels], taps[channels])
            values = values * (u if bias is None else u + bias[channels, None]).sigmoid()
        own = given[notes.value]
        if kind == "recurrent_gemma":  # what its gate and its norm make of what was convolved
            values = values * (own.mT / (convolve(x, taps) + (0 if bias is None else bias[:, None])))
        values = values.float() if own.shape == values.shape else values.float().mT.reshape(own.shape)
    with_it = function(**{**given, notes.value: values})
    with_it = with_it if isinstance(with_it, Tensor) else with_it[0]
    z = run.z()
    with_it, core = (part.mT if kind in ("mamba", "lfm2") else part for part in (with_it, core))
    return with_it.reshape(z.shape) * (z / core.reshape(z.shape))


def read_by_mixer(run: Run) -> Tensor:
    args, named = run.clean.patterns.mixed[run.index]
    return args[0] if args else named["hidden_states"]


def some_vector(run: Run, seed: int = 3) -> Tensor:
    return torch.randn(*IDS.shape, run.lm.d_model, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    assert float(want.norm()) > 1e-3


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.promise("exact")
@every_kind
def test_what_a_mixer_carries_is_its_kernel_on_other_values(kind: str) -> None:
    run = run_of(kind)
    vector = some_vector(run)
    call = run.clean.patterns.mixed[run.index]
    close(through_mixer(run.lm, run.lm.layers[run.index], call, vector).flatten(-2), carried_by_hand(kind, run, vector))
