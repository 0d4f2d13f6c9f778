"""Are products that oneDNN makes those of the model, with their slopes, and made for no longer than a method runs?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

import unwrite as uw
from tiny import model
from unwrite.errors import NumericError
from unwrite.model import onednn
from unwrite.model.view import Model

pytestmark = pytest.mark.skipif(not onednn.there(), reason="no oneDNN here, or no AVX-512, where it would be faster")

# As nn.Linear calls it, as GPT-2 does, and as products are written.
ASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "addmm": lambda x, weight, bias: torch.addmm(bias, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1]),
    "matmul": lambda x, weight, bias: x @ weight.t() + bias,
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what oneDNN was given, of matrices of any size."""
    given: list[torch.Size] = []
    own = onednn._product

    def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given.append(weight.shape)
        return own(input, weight, bias)

    monkeypatch.setattr(onednn, "SMALLEST", 1)
    monkeypatch.setattr(onednn, "_product", product)
    return given


def slopes(ask: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Values, slopes, slopes of slopes, and what it is along tangents of each and of all."""
    drawn = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=drawn).to(dtype) for shape in ((3, 5, 7), (4, 7), (4,)))
    leaves = [part.clone().requires_grad_() for part in (x, bias)]
    value = ask(leaves[0], weight, leaves[1])
    first = torch.autograd.grad((value**3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((part**2).sum() for part in first), leaves)
    along = []
    with torch.no_grad(), forward_ad.dual_level():
        for which in ((0,), (1,), (2,), (0, 1, 2)):
            parts = (forward_ad.make_dual(p, p.flip(0)) if i in which else p for i, p in enumerate((x, weight, bias)))
            along.append(forward_ad.unpack_dual(ask(*parts)).tangent)
    return [value.detach(), *(part.detach() for part in first), *second, *along]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward slopes begin with it
@pytest.mark.parametrize("how", ASKED)
def test_values_and_slopes_of_every_kind_are_those_of_float64(how: str, made: list[torch.Size]) -> None:
    exact = slopes(ASKED[how], torch.float64)
    assert not made
    with onednn.OneDNN():
        own = slopes(ASKED[how], torch.float32)
    assert len(made) >= 4
    for one, other in zip(own, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_what_was_computed_keeps_its_slope(made: list[torch.Size]) -> None:
    """A matrix that is no weight, as patterns are: nothing of its slope may be lost."""
    x, other = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    with onednn.OneDNN():
        value = (x @ (2 * other)).sum() + functional.linear(x, (3 * other).t()).sum()
    assert not made
    (slope,) = torch.autograd.grad(value, other)
    torch.testing.assert_close(slope, 5 * x.sum(0)[:, None].expand(4, 5))


@pytest.mark.parametrize("change", ["half", "double", "quantised"])
def test_what_is_no_plain_float32_is_left_to_torch(change: str, made: list[torch.Size]) -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    if change == "quantised":

        class Coded(Tensor):
            """As weights of a quantised model are."""

        weight = weight.as_subclass(Coded)
    else:
        dtype = torch.bfloat16 if change == "half" else torch.float64
        x, weight = x.to(dtype), weight.to(dtype)
    with onednn.OneDNN():
        found = functional.linear(x, weight)
    assert not made
    assert torch.equal(found, functional.linear(x, weight))


def numbers(lm: Model) -> dict[str, np.ndarray]:
    """What methods say that run forward, backward, with changed rows and without a write."""
    ids = torch.arange(12).reshape(2, 6) % lm.vocabulary
    pairs = uw.pairs(ids, (ids + 3) % lm.vocabulary, answer=1, against=2)
    found = {
        "levels": uw.scan(lm, ids).data["level"], "totals": uw.dla(lm, ids, 1, 2).data["total"],
        "effects": uw.effects(lm, pairs).data["effect"],
        "estimates": uw.effects(lm, pairs, method="relp").data["effect"],
    }  # fmt: skip
    return {name: values.values for name, values in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_methods_say_what_they_say_without_it(
    family: str, made: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = uw.load(model(family, dtype=torch.float32))
    with_it = numbers(lm)
    assert made
    made.clear()
    monkeypatch.setattr(onednn, "there", lambda: False)
    without = numbers(uw.load(lm.hf))
    assert not made
    for name, values in without.items():
        np.testing.assert_allclose(
            with_it[name], values, rtol=1e-4, atol=2e-5 * np.nanmax(np.abs(values)), err_msg=name
        )


def test_it_ends_with_the_method(made: list[torch.Size]) -> None:
    lm = uw.load(model("llama", dtype=torch.float32))
    ids = torch.arange(6)[None]
    uw.scan(lm, ids)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uw.scan(lm, ids, listener=stop)
    with pytest.raises(NumericError):
        uw.dla(lm, ids, replace="none")
    made.clear()
    lm.hf(ids)
    assert not made
