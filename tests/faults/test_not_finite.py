"""Does a value that is no number, wherever in a model it comes from, ever become a number or a gap in a result?

Either the method says so, or its answer does not depend on that place and is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from asked import ask, differing, every_method, found, model, single_methods
from torch import nn

from methods import IDS, METHODS
from unwrite.errors import ModelError, NumericError
from unwrite.model.view import Model

Site = Callable[[Model, float], AbstractContextManager[None]]
VALUES = (float("nan"), float("inf"))  # in turn at one site after the other; with --slow both at each
# Tokens that one prompt holds, of those that are asked about (the base of pairs) or of the others (their source).
OWN, OTHER = int(IDS[1, 2]), int(IDS[2, 3])
assert (IDS == OWN).sum() == (IDS == OTHER).sum() == 1


@contextmanager
def weight(parameter: nn.Parameter, at: Any, value: float) -> Iterator[None]:
    """Inside the `with`, a part of a parameter is `value`."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[at] = value
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@contextmanager
def passed(module: nn.Module, value: float, taken: bool = False) -> Iterator[None]:
    """Inside the `with`, one number of every vector that a module gives, or takes, is `value`."""

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[..., 0] = value
        return tensor

    def take(_: nn.Module, args: Any) -> Any:
        return (spoilt(args[0]), *args[1:])

    def give(_: nn.Module, __: Any, output: Any) -> Any:
        return spoilt(output) if isinstance(output, torch.Tensor) else (spoilt(output[0]), *output[1:])

    handle = module.register_forward_pre_hook(take) if taken else module.register_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()


def _embedding(token: int) -> Site:
    return lambda lm, value: weight(lm.hf.get_input_embeddings().weight, token, value)


def _unembedding(token: int) -> Site:
    return lambda lm, value: weight(lm.hf.get_output_embeddings().weight, token, value)


SITES: dict[str, Site] = {
    "embedding of a prompt's token": _embedding(OWN),
    "embedding of another prompt's token": _embedding(OTHER),
    "embedding": lambda lm, value: passed(lm.hf.get_input_embeddings(), value),
    "z of L0H0": lambda lm, value: passed(lm.layers[0].out_proj, value, taken=True),
    "z of L1H0": lambda lm, value: passed(lm.layers[1].out_proj, value, taken=True),
    "attention of the last layer": lambda lm, value: passed(lm.layers[-1].out_proj, value),
    "MLP0": lambda lm, value: passed(lm.layers[0].mlp, value),
    "the last MLP": lambda lm, value: passed(lm.layers[-1].mlp, value),
    "final norm": lambda lm, value: weight(lm.decoder.get_submodule(lm.row.final_norm).weight, 0, value),
    "unembedding of the answer": _unembedding(5),
    "unembedding of no answer": _unembedding(40),
}
# Of these a method's answer is made without that place.
_NO_LOGITS = {"scan", "attention"}
# Channels are weighed as the whole unembedding reads them, too.
_WEIGHED = {"survival", "verify", "verify erasers", "readers"}
_OWN_TOP = {
    "dla texts",
    "lens",
    "decode",
    "solves",
    "mask",
    "subspace",
    "corpus_dla",
    "adversarial",
    "audit",
    "reproduce",
    "graph",
}
_UNREAD: dict[str, set[str]] = {
    # A chat is of other tokens.
    "embedding of a prompt's token": {"graph"},
    "embedding of another prompt's token": {"dla", "solves", "graph"},
    "z of L1H0": {"attention"},
    "attention of the last layer": {"attention"},
    "the last MLP": {"attention"},
    "final norm": _NO_LOGITS,
    "unembedding of the answer": _NO_LOGITS,
    # The others are asked about two tokens alone.
    "unembedding of no answer": set(METHODS) - _OWN_TOP - _WEIGHED,
}


@pytest.mark.promise("faults")
@pytest.mark.promise("finite")
@pytest.mark.parametrize("site", SITES)
@every_method
def test_what_is_no_number_is_said_or_not_read(method: str, site: str, pytestconfig: pytest.Config) -> None:
    lm, turn = model(method), [*SITES].index(site) % 2
    for value in VALUES if pytestconfig.getoption("--slow") else VALUES[turn : turn + 1]:
        with SITES[site](lm, value):
            if method in _UNREAD.get(site, ()):
                assert not differing(ask(method), found(method))
                continue
            # A model whose weights are no numbers may be refused as a whole.
            with pytest.raises((NumericError, ModelError), match=r"not finite|not exact") as caught:
                ask(method)
        if site.startswith("embedding of"):
            assert any(word in str(caught.value) for word in ("prompt ", "pair "))


@contextmanager
def once(module: nn.Module, at: int, value: float) -> Iterator[list[int]]:
    """Inside the `with`, what a module gives is `value` at its `at`-th use; counts uses."""
    count = [0]

    def give(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        count[0] += 1
        return torch.full_like(output, value) if count[0] == at else None

    handle = module.register_forward_hook(give)
    try:
        yield count
    finally:
        handle.remove()


@pytest.mark.promise("faults")
@pytest.mark.promise("finite")
@single_methods
def test_what_is_no_number_in_one_pass_alone(method: str) -> None:
    """A clean run may be finite where one without a write, or with a patch, is not."""
    spoilt = partial(once, model(method).layers[-1].out_proj)
    with spoilt(0, 0.0) as count:
        ask(method)
    for at in sorted({round(1 + i * (count[0] - 1) / 5) for i in range(6)}):
        with spoilt(at, float("nan")):
            said = _said(method)
        assert said is None or any(words in said for words in ("not finite", "not exact", "as it computes now")), said


def _said(method: str) -> str | None:
    """The error, None where the answer is to the bit what it should be."""
    try:
        other = differing(ask(method), found(method))
    except (NumericError, ModelError) as error:
        return str(error)
    return f"another {', '.join(other)}" if other else None
