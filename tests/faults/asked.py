"""Every method, asked the same of the same small model, and what it finds where nothing goes wrong."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import disk
import numpy as np
import pytest

import unwrite as uw
from executed import weights
from methods import METHODS, shape
from unwrite.model.load import view
from unwrite.model.view import Model

every_method = pytest.mark.parametrize("method", METHODS)
# The two that combine most of the others meet these faults where there is time.
single_methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in ("audit", "reproduce") else ()) for m in METHODS]
)
# What is kept, and how it is saved, read and refused, is the same code for all methods. By these every way goes that
# leads there: texts in turn, parts of a batch, several stages, prompts one by one, a guess that was made before.
KEEPING = ("scan", "survival", "verify erasers", "dla", "bound")
keeping_methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in KEEPING else pytest.mark.slow) for m in METHODS]
)


@cache
def model(method: str) -> Model:
    """Small, its unembedding a matrix of its own."""
    return _model(tuple(shape(method).items()))


@cache
def _model(settings: tuple[tuple[str, int], ...]) -> Model:
    return view(weights("gpt2", 4, tie_word_embeddings=False, **dict(settings)))


def ask(method: str, **kept: Any) -> uw.Result:
    """The method's answer. A prompt at a time, where that can be chosen: so there is much to lose."""
    chooses = "batch" in inspect.signature(getattr(uw, method.split()[0])).parameters
    return METHODS[method](model(method), **({"batch": 1} if chooses else {}), **kept)


@cache
def found(method: str) -> uw.Result:
    """What nothing disturbed."""
    return ask(method)


@cache
def written(method: str) -> tuple[disk.State, ...]:
    """All that the folder goes through of a run that keeps what is done after every batch."""
    with TemporaryDirectory() as root, disk.watched(Path(root) / "run") as states:
        assert not differing(ask(method, checkpoint=uw.Job(Path(root) / "run", every=0.0)), found(method))
        assert disk.state(Path(root) / "run") == {}
    return tuple(states)


def differing(one: uw.Result, other: uw.Result) -> list[str]:
    """Names of variables and coordinates that are not equal bit for bit."""
    assert set(one.data.variables) == set(other.data.variables)
    return [name for name in map(str, one.data.variables) if not _same(one.data[name].values, other.data[name].values)]


def same(one: uw.Result, other: uw.Result) -> bool:
    """Are all variables and coordinates equal, bit for bit?"""
    return not differing(one, other)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    # Text is of another kind in a result that was read from a file.
    kinds = {array.dtype.kind.replace("U", "O") for array in (one, other)}
    return len(kinds) == 1 and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
