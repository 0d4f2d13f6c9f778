"""What does a projection do, as a matrix? Of a plain one its weight; of any other what it makes of the unit vectors.

W = f(I) − f(0) and b = f(0) hold for adapters that are not merged and for weights that are quantised, and for nothing
that quantises or otherwise bends what it reads: that is measured, and refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from unwrite.errors import ModelError
from unwrite.model.hooks import Handle, between, hooked
from unwrite.model.weights import weight_of

# Unit vectors at a time.
_BLOCK = 1024
# Above this relative error of its matrix, by dtype, a module is not linear. Quantised activations are at 1e-2.
_LINEAR = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF = 5e-2
# Beside 1, most of these are less than half a step of eight bits.
_SMALL = 0.003


_KNOWN = ("torch", "transformers")


@dataclass(frozen=True, eq=False)
class Effective:
    """What a module that is no plain projection does: its matrix, its bias, and by what it is known again."""

    matrix: Float[Tensor, "input output"]
    bias: Float[Tensor, " output"]
    probe: Float[Tensor, "2 output"]


def is_plain(module: nn.Module) -> bool:
    """Is a module's own weight all that it multiplies by?"""
    if not isinstance(module, (nn.Linear, Conv1D)) or type(module).__module__.split(".")[0] not in _KNOWN:
        return False
    # A tensor that is made of others holds numbers of its own kind, as quantised weights do.
    return not (is_traceable_wrapper_subclass(module.weight) or nn.utils.parametrize.is_parametrized(module))


def plain_tensor(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for, where it is made of others."""
    return weight.dequantize() if is_traceable_wrapper_subclass(weight) else weight


@runtime_checkable
class Computing(Protocol):
    """What must be known of a model: where and in what it computes, and what was measured of its projections."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...
    @property
    def effective(self) -> dict[nn.Module, Effective]: ...


def matrix_of(lm: Computing, module: nn.Module, detach: bool = True) -> Float[Tensor, "input output"]:
    """A projection's weight as [input, output]: torch's Linear stores the transpose, transformers' Conv1D does not.

    Raises ModelError for a module that is not linear.
    """
    if not is_plain(module):
        return _effective(lm, module, detach).matrix
    weight = weight_of(module)
    assert weight is not None  # noqa: S101 (a plain projection has one)
    return weight.t() if isinstance(module, nn.Linear) else weight


def bias_of(lm: Computing, module: nn.Module, detach: bool = True) -> Float[Tensor, " output"] | None:
    """A projection's constant part; None for one without. Raises ModelError as `matrix_of` does."""
    if is_plain(module):
        return weight_of(module, "bias")
    bias = _effective(lm, module, detach).bias
    return bias if bool(bias.any()) else None


def has_bias(lm: Computing, module: nn.Module) -> bool:
    """Has a projection a constant part? Also of a model of which no weight is read."""
    return (getattr(module, "bias", None) if is_plain(module) else bias_of(lm, module)) is not None


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a projection, wherever its weight is."""
    named = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in named):
        return named  # pyright: ignore[reportReturnType]
    shape: torch.Size = module.weight.shape  # pyright: ignore[reportAssignmentType]
    first, second = shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def projections_in(module: nn.Module) -> Iterator[nn.Module]:
    """The projections inside of a module, without what is inside of these."""
    for part in module.children():
        yield from [part] if is_sized(part) else projections_in(part)


def is_sized(module: nn.Module) -> bool:
    """Does a module say how wide what it puts out is, as projections do?"""
    return getattr(module, "out_features", getattr(module, "nf", None)) is not None


def _effective(lm: Computing, module: nn.Module, detach: bool) -> Effective:
    """What the module does now: kept with the model as long as two vectors come out of it as they did."""
    if not detach:
        return _measured(module, lm, _of(module, lm, _probe(lm, module)))
    with torch.no_grad():
        probe = _of(module, lm, _probe(lm, module))
        if (known := lm.effective.get(module)) is None or not torch.equal(known.probe, probe):
            lm.effective[module] = known = _measured(module, lm, probe)
    return known


def _measured(module: nn.Module, lm: Computing, probe: Tensor) -> Effective:
    inputs, units = sizes(module)[0], []
    nothing = _of(module, lm, torch.zeros(1, inputs))[0]
    for rows in torch.arange(inputs).split(_BLOCK):
        unit = nn.functional.one_hot(rows, inputs).to(lm.dtype)
        units.append(_of(module, lm, unit) - nothing)
    found = Effective(torch.cat(units), nothing, probe)
    _require_linear(lm, module, found)
    return found


def _of(module: nn.Module, lm: Computing, x: Tensor) -> Tensor:
    """What a module puts out. `forward`, and not a call: no hook of anyone sees it."""
    place = next((part.device for part in module.parameters() if not part.is_meta), lm.device)
    return module.forward(x[None].to(place, lm.dtype))[0].to(lm.device, lm.compute_dtype)


def _probe(lm: Computing, module: nn.Module) -> Float[Tensor, "2 input"]:
    return torch.randn(2, sizes(module)[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _require_linear(lm: Computing, module: nn.Module, found: Effective) -> None:
    found = Effective(found.matrix.detach(), found.bias.detach(), found.probe)
    x = _probe(lm, module)
    want = x.to(found.matrix) @ found.matrix + found.bias
    got = _of(module, lm, x).detach()
    error = float((got - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny))
    if not error <= _LINEAR.get(lm.dtype, _HALF) or _hides(lm, module, found):
        raise ModelError(
            f"a {type(module).__name__} is not linear, so what passes through it cannot be told apart: its activations "
            f"are quantised, or rounded to less than {str(lm.dtype).removeprefix('torch.')}, or it is no projection",
            got=f"relative error of its matrix {error:.0e}", expected=f"at most {_LINEAR.get(lm.dtype, _HALF):.0e}",
            fix="load the model without quantised activations (weights alone may be), in the dtype in which it "
            "computes, or dequantise it",
        )  # fmt: skip


def _hides(lm: Computing, module: nn.Module, found: Effective) -> bool:
    """Does a large input hide small ones? Half precision rounds each by itself; quantised activations share a step."""
    if lm.dtype in _LINEAR:
        return False
    small = _SMALL * _probe(lm, module)[:1].clamp(-2, 2)
    large = nn.functional.one_hot(torch.zeros(1, dtype=torch.long), small.shape[1]).to(small)
    want = small.to(found.matrix) @ found.matrix
    error = (_of(module, lm, small + large) - _of(module, lm, large)).detach() - want
    return not bool(error.norm() <= want.norm() / 2)


@contextmanager
def as_matrices(lm: Computing, hf: nn.Module) -> Iterator[None]:
    """Inside the `with`, a projection whose weights are packed in integers is what its matrix does in float32."""

    def put(module: nn.Module) -> Handle:
        def does(read: Tensor, output: Tensor) -> Tensor:
            # Made anew at every call: all of them together may not fit into memory.
            found = _measured(module, lm, _of(module, lm, _probe(lm, module)))
            return (read.to(found.matrix) @ found.matrix + found.bias).to(output.dtype)

        return between(module, does)

    with hooked(put(module) for module in hf.modules() if _packed(module)):
        yield


def require_slopes(lm: Computing, hf: nn.Module) -> None:
    """Raise ModelError for a projection with packed weights that autograd does not go through as its matrix does."""
    for module in (module for module in hf.modules() if _packed(module)):
        with torch.no_grad():
            found = _measured(module, lm, _of(module, lm, _probe(lm, module)))
            slope = found.matrix[:2].to(lm.dtype)
            want = slope.to(found.matrix) @ found.matrix.mT
        x = _probe(lm, module).to(lm.device, lm.dtype).requires_grad_()
        try:
            with torch.enable_grad():
                (got,) = torch.autograd.grad(module.forward(x[None])[0], x, slope)
            error = float((got.to(want) - want).norm() / want.norm())
        except RuntimeError:
            error = float("inf")
        if not error <= _HALF:
            raise ModelError(
                f"slopes do not go through a {type(module).__name__} of this model as its matrix has it",
                got=f"relative error {error:.0e}", expected=f"at most {_HALF:.0e}",
                fix="use what needs no slope, such as method='exact', or dequantise the model",
            )  # fmt: skip


def _packed(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point() and isinstance(module, nn.Linear)


def require_linear(lm: Computing, *modules: Any) -> None:
    """Raise ModelError for a module that is neither a plain projection nor linear."""
    for module in modules:
        if not is_plain(module):
            try:
                _effective(lm, module, detach=True)
            except (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
                raise ModelError(
                    f"a {type(module).__name__} cannot be read as a matrix", got=error,
                    expected="a projection that is linear in what it reads",
                    fix="merge adapters (merge_and_unload), or dequantise the weights",
                ) from None  # fmt: skip
