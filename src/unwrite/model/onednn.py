"""What makes a model's linear maps in float32 on a CPU? oneDNN, where that is faster than what torch takes.

torch hands such products to MKL, which uses half of the width of processors that are not Intel's: with AVX-512 oneDNN
is twice as fast there, and as fast on Intel's. It is float32, too; only the order of the sums differs. All passes of a
method, and those of the certificate, are made in the same way, so that their rounding is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Below so many weights handing them over takes as long as it saves.
SMALLEST = 2**16
_SINGLE = torch.float32
_OWN = (Tensor, nn.Parameter)


def fast(hf: nn.Module | None = None) -> AbstractContextManager[object]:
    """Inside the `with`, oneDNN makes what passes of this model, or of any, multiply by large matrices of weights."""
    able = there() and (hf is None or any(_large(weight) for weight in hf.parameters()))
    return OneDNN() if able else nullcontext()


def there() -> bool:
    """Is it at hand, and faster?"""
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDNN(TorchFunctionMode):
    """Inside the `with`, products with large matrices of weights are made by oneDNN, with their slopes of both kinds.

    Weights have none there: a model is read, and autograd would make those of all weights whenever it makes any.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = _ASKED.get(func)
        found = None if asked is None else asked(*args, **(kwargs or {}))
        if found is None:
            return func(*args, **(kwargs or {}))
        return _Linear.apply(*found) if _sloped(*found) else _product(*found)


_Product = tuple[Tensor, Tensor, Tensor | None]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Product | None:
    return (input, weight.detach(), bias) if _fits(input, weight, bias) else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scaled: Any) -> _Product | None:
    """As GPT-2's projections are written, whose weights are the other way round."""
    fits = not scaled and input.dim() == 1 and _fits(mat1, mat2, input)
    return (mat1, mat2.detach().t(), input) if fits else None


def _matmul(input: Tensor, other: Any, **more: Any) -> _Product | None:
    """As writes are made of what heads hand over."""
    fits = not more and isinstance(other, Tensor) and input.dim() > 1 and _fits(input, other, None)
    return (input, other.detach().t(), None) if fits else None


_ASKED: Mapping[Any, Callable[..., _Product | None]] = {
    functional.linear: _linear, torch.addmm: _addmm,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul,
}  # fmt: skip


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    single = (input, weight) if bias is None else (input, weight, bias)
    return _large(weight) and all(_plain(part) for part in single) and input.numel() > 0


def _large(weight: Tensor) -> bool:
    """Is it a matrix of weights, or at least one without slopes? What has some and is no parameter was computed."""
    held = isinstance(weight, nn.Parameter) or not (
        weight.requires_grad or forward_ad.unpack_dual(weight).tangent is not None
    )
    return held and _plain(weight) and weight.dim() == 2 and weight.numel() >= SMALLEST


def _plain(part: Tensor) -> bool:
    """Is it an ordinary tensor of float32, and here? Codes and parts of tensors are other types."""
    here = part.dtype == _SINGLE and part.device.type == "cpu" and part.layout == torch.strided
    return type(part) in _OWN and here


def _sloped(input: Tensor, _: Tensor, bias: Tensor | None) -> bool:
    """Are slopes followed here, of either kind? Where none are, following them would cost more than what it follows."""
    given = (input,) if bias is None else (input, bias)
    backward = torch.is_grad_enabled() and any(part.requires_grad for part in given)
    return backward or any(forward_ad.unpack_dual(part).tangent is not None for part in given)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


class _Linear(Function):
    """`functional.linear`, whose product oneDNN makes: its op there has no slopes of its own."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: _Product, output: Tensor) -> None:
        weight = inputs[1]
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the sum of outputs times `slopes`; itself a function with slopes."""
        of_input, _, of_bias = ctx.needs_input_grad
        back = _Linear.apply(slopes[0], ctx.saved_tensors[0].t(), None) if of_input else None
        return back, None, slopes[0].flatten(0, -2).sum(0) if of_bias else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Along tangents of the input and the bias, where they have some."""
        (weight,), (along, _, of_bias) = ctx.saved_tensors, tangents
        made = weight.new_zeros(ctx.shape) if along is None else functional.linear(along, weight)
        return made if of_bias is None else made + of_bias
