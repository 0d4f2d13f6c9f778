"""Does the modelled cost count what torch counts, and is an exponent the one that was put in?"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

import unwrite as uw

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _script(name: str) -> ModuleType:
    """A benchmark as a module; like a script it finds its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    return _script("flops")


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return _script("scaling")


@pytest.fixture(autouse=True)
def _without_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method costs beside the checks that it begins with, which are a part of one pass whatever the method."""
    monkeypatch.setattr("unwrite.run.loop.stream._require_same", lambda *_: None)
    monkeypatch.setattr("unwrite.run.replay.clean.continued", lambda *_: True)


@pytest.mark.parametrize("changes", [{"kv": 2}, {"gpt2": True, "d": 48, "heads": 3}], ids=str)
def test_the_model_counts_what_torch_counts(flops: ModuleType, changes: dict) -> None:
    # More rows in each half of the prompts than channels, so that verify fits its maps.
    s = replace(flops.Shape(layers=2, d=32, inner=80, prompts=10, length=12, vocabulary=50), **changes)
    lm = uw.load(flops.build(s))
    for method, cost in flops.COSTS.items():
        assert flops.counted(lm, method, s) == pytest.approx(cost(s).counted, rel=0.005), method


def test_few_writers_are_counted_as_few(flops: ModuleType) -> None:
    s = flops.Shape(layers=3, d=32, inner=80, prompts=4, length=12, vocabulary=50)
    lm = uw.load(flops.build(s))
    lm.hf.set_attn_implementation("eager")
    with flops.Counter() as counter:
        uw.scan(lm, flops.ids_of(s), ["L0H1", "MLP1"])
    assert counter.total == pytest.approx(flops.scan(s, 2).counted, rel=0.005)


def test_the_counter_is_torchs_own(flops: ModuleType) -> None:
    s = flops.Shape(layers=2, d=32, inner=80, prompts=4, length=12, vocabulary=50)
    lm = uw.load(flops.build(s))
    found = flops.counted(lm, "scan", s)
    lm.hf.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        uw.scan(lm, flops.ids_of(s))
    assert found == counter.get_total_flops()


def test_costs_add_up(flops: ModuleType) -> None:
    one = flops.Cost(model=1, double=2, calls=3)
    assert one + 2 * one == flops.Cost(model=3, double=6, calls=9)
    assert (one + flops.Cost(factors=5, moved=7)).counted == 3


def test_an_exponent_is_found(scaling: ModuleType) -> None:
    at = np.array([2, 4, 8, 16])
    slope, error = scaling.exponent(at, 3e-7 * at**1.5)
    assert slope == pytest.approx(1.5)
    assert error < 1e-9
    noisy, error = scaling.exponent(at, at**2 * np.array([1.1, 0.9, 1.1, 0.9]))
    assert abs(noisy - 2) < 3 * error


def test_a_rate_says_how_long_and_what_for(flops: ModuleType, scaling: ModuleType) -> None:
    here = scaling.Hardware(10, 10, 10, 10, 10, 2, 1, 1)
    cost = flops.Cost(model=5, moved=8, calls=1)
    assert here.seconds(cost) == pytest.approx(0.5 + 4 + 1)
    assert here.limit(cost) == "moved"


@pytest.mark.parametrize("changes", [{"kv": 2}, {"gpt2": True, "d": 48, "heads": 3}, {"layers": 1}], ids=str)
def test_the_model_counts_what_torch_counts_of_a_survival(flops: ModuleType, changes: dict) -> None:
    removed = _script("survival")
    s = replace(flops.Shape(layers=3, d=32, inner=80, prompts=4, length=12, vocabulary=50), **changes)
    lm = uw.load(flops.build(s))
    assert removed.counted(lm, s) == pytest.approx(removed.survival(s).counted, rel=0.005)
    assert removed.ideal(s).counted < removed.survival(s).counted
