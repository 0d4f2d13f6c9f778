"""Are the statistics of a model in half precision in float32 or better, and is it said how exact they are?

Every sum that the library itself makes is looked at while each method runs: none may be of half precision numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tiny
import unwrite as uw
from methods import COMBINED, IDS, METHODS, VARIANTS, few_draws
from unwrite.model.capture import run
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.model.writes import write_of

HERE = Path(uw.__file__).parent
HALVES = (torch.bfloat16, torch.float16)
SUMS = {
    "sum", "mean", "einsum", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "norm", "var", "std", "cumsum",
    "index_add_", "logsumexp", "softmax", "log_softmax", "dot",
}  # fmt: skip
# Attention that is opened is still the model's own, and so is what a backward pass goes through.
THE_MODELS_OWN = {"attention.py": {"attend"}, "softmax.py": {"pattern_of", "scores_of"}, "rules.py": {"_held"}}

SINGLE = {name: ask for name, ask in (METHODS | VARIANTS).items() if name not in COMBINED}


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


class Sums(TorchFunctionMode):
    """Keeps where the library sums numbers of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in SUMS and any(part.dtype in HALVES for part in _tensors(args)):
            frame: Any = sys._getframe(1)
            while frame.f_code.co_filename.startswith(str(Path(torch.__file__).parent)):
                frame = frame.f_back
            place, caller = Path(frame.f_code.co_filename), frame.f_code.co_name
            if place.is_relative_to(HERE) and caller not in THE_MODELS_OWN.get(place.name, ()):
                self.found.add(f"{name} in {place.name}:{frame.f_lineno}, {caller}")
        return func(*args, **(kwargs or {}))


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)


def model(family: str, dtype: torch.dtype) -> Model:
    return uw.load(tiny.model(family, 5, dtype, num_hidden_layers=2, num_attention_heads=2))


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize(("family", "dtype"), [("gemma2", HALVES[0]), ("gpt2", HALVES[1])])
def test_no_statistic_is_summed_in_half_precision(method: str, family: str, dtype: torch.dtype) -> None:
    lm = model(family, dtype)
    with Sums() as sums:
        result = SINGLE[method](lm)
    assert not sums.found
    halves = [
        str(name) for name, part in result.data.variables.items() if part.dtype.kind == "f" and part.dtype.itemsize < 4
    ]
    assert not halves


def test_a_sum_of_half_precision_numbers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("llama", torch.bfloat16)
    monkeypatch.setattr(Model, "compute_dtype", property(lambda lm: lm.dtype))
    with Sums() as sums:
        SINGLE["effects atp"](lm)
    assert any("estimates.py" in place for place in sums.found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_shares_are_those_of_the_recorded_writes_in_double(family: str, dtype: torch.dtype) -> None:
    """What half precision costs is in the activations, which are the model's own; nothing is added to it."""
    lm = model(family, dtype)
    result, folded = uw.scan(lm, IDS, skip=1), fold(lm)
    writes = run(lm, IDS, folded)
    nodes = np.stack([write_of(lm, folded, writes, node)[:, 1:].double().numpy() for node in lm.parts])
    gram = np.einsum("ebtd,wbtd->we", nodes, nodes)
    share = gram / np.diag(gram)[:, None]
    np.testing.assert_allclose(result["share"].values, share, rtol=1e-4, atol=1e-4 * np.abs(share).max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_certificate_says_how_exact_it_still_is(family: str, dtype: torch.dtype) -> None:
    lm = model(family, dtype)
    name = str(dtype).removeprefix("torch.")
    said = lm.certificate.explain()
    assert f"exact to rounding in {name}" in said
    for identity, error in lm.certificate.items():
        assert f"{identity} {error:.0e}" in said
    # Rounding of the dtype is what the errors are of: far above that of float32, and below the limit.
    assert 1e-6 < max(lm.certificate.values()) <= lm.certificate.limit
    told = provenance(lm)
    assert told["dtype"] == name
    assert told["certificate"] == dict(lm.certificate)
    assert max(uw.load(tiny.model(family, 5, torch.float32)).certificate.values()) < 1e-5
