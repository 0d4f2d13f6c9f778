"""Is the user's model bit for bit what it was, whatever is asked of it and however that ends?

A new method gets a line in `methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import unwrite as uw
from executed import weights
from methods import COMBINED, IDS, METHODS, few_draws, shape
from tiny import snapshot
from unwrite.model.load import view
from unwrite.model.view import Model

pytestmark = pytest.mark.promise("untouched")

# One of every way in which attention is reached: the interface, post-norms, own code with a branch for sdpa, own code.
FAMILIES = ("gpt2", "llama", "gemma2", "falcon", "gpt_neo")


def _traced(lm: Model) -> None:
    with uw.trace(lm, "L1H0.v", "resid_post0", edits=uw.Edit.set("L0H0", 0.0)):
        lm.hf(IDS)


ASKED: dict[str, Callable[[Model], Any]] = {**METHODS, "trace": _traced}
# What is made of the others is asked once.
MATRIX = [(method, family) for method in ASKED for family in FAMILIES if method not in COMBINED or family == "falcon"]
matrix = pytest.mark.parametrize(("method", "family"), MATRIX)


class Planted(Exception):
    """Raised in the middle, on purpose."""


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


def model(family: str, method: str = "") -> Model:
    """As a user may have left it: own hooks, parts in training, frozen weights, a gradient."""
    return _model(family, tuple(shape(method).items()))


@cache
def _model(family: str, settings: tuple[tuple[str, int], ...]) -> Model:
    lm = view(weights(family, 4, **dict(settings)))
    blocks = next(module for module in lm.hf.modules() if isinstance(module, nn.ModuleList))
    blocks[0].train()
    blocks[1].register_forward_hook(lambda module, args, output: None)
    blocks[1].register_forward_pre_hook(lambda module, args: None)
    parameters = list(lm.hf.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    return lm


@contextmanager
def interrupted(lm: Model, at: int, error: BaseException | None) -> Iterator[list[int]]:
    """Raises `error` when the second block's last attention projection is used for the `at`-th time; counts uses."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if error is not None and calls[0] == at:
            raise error

    handle = lm.layers[1].out_proj.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


@cache
def uses(method: str, family: str) -> int:
    """How often a method runs the second block."""
    lm = model(family, method)
    with interrupted(lm, 0, None) as calls:
        ASKED[method](lm)
    return calls[0]


@matrix
def test_a_model_is_untouched_by_success(method: str, family: str) -> None:
    lm = model(family, method)
    before = snapshot(lm.hf)
    with torch.no_grad():
        logits = lm.hf(IDS).logits
        assert uses(method, family) > 0
    assert snapshot(lm.hf) == before
    with torch.no_grad():
        assert torch.equal(lm.hf(IDS).logits, logits)


@matrix
def test_a_model_is_untouched_by_what_is_raised_in_the_middle(method: str, family: str) -> None:
    """At the first use, and at one while something is recorded, continued or differentiated; errors take turns."""
    lm, n, turn = model(family, method), uses(method, family), MATRIX.index((method, family))
    errors = (Planted, KeyboardInterrupt) if turn % 2 else (KeyboardInterrupt, Planted)
    for error, at in zip(errors, (1, 1 + n * (turn % 5) // 6), strict=True):
        with interrupted(lm, at, error()):
            before = snapshot(lm.hf)
            with pytest.raises(error):
                ASKED[method](lm)
            assert snapshot(lm.hf) == before


@pytest.mark.parametrize(
    ("method", "inside"),
    [
        ("dla", "torch.autograd.grad"),
        ("dla", "unwrite.methods.dla.readings"),
        ("dla", "unwrite.run.account.totals.changed"),
        ("effects", "unwrite.run.edit.slots.Slot.put"),
        ("effects", "unwrite.run.answer.metrics.Metric.of"),
        ("effects atp*", "torch.autograd.grad"),
        ("effects atp*", "unwrite.run.backward.estimates.of_keys"),
    ],
)
def test_a_model_is_untouched_by_what_fails_between_passes(
    method: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model("gemma2")
    before = snapshot(lm.hf)

    def fails(*_: Any, **__: Any) -> None:
        raise Planted

    monkeypatch.setattr(inside, fails)
    with pytest.raises(Planted):
        ASKED[method](lm)
    assert snapshot(lm.hf) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_untouched_by_a_listener_that_raises(method: str) -> None:
    lm = model("llama", method)
    before = snapshot(lm.hf)

    def fails(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        METHODS[method](lm, listener=fails)
    assert snapshot(lm.hf) == before
