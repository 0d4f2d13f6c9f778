"""What of a mixer's z is there because of a vector in what it reads? Its own module, with all but its values held.

A mixer (Mamba, Gu and Dao 2023, arXiv 2312.00752; Mamba-2, arXiv 2405.21060; gated delta rule, arXiv 2412.06464;
RG-LRU, arXiv 2402.19427; a short convolution) is linear in its values once what else it makes of the stream is a
constant: queries, keys, Δ, B, C and gates. Norms in it keep their scale, and silu(u) is u times the constant
sigmoid(u). What becomes of a vector is then the slope of the model's own module along it: no kernel is written again.
The map is no attention pattern: its entries may be negative, and its rows need not sum to 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from unwrite.model.capture import evaluating
from unwrite.model.hooks import (
    Call,
    Handle,
    after,
    before,
    called,
    calls_kept,
    ended,
    hooked,
    kept,
    read_of,
    reads_instead,
)
from unwrite.model.layers import Layer
from unwrite.model.single import in_float32
from unwrite.model.view import Columns, Model
from unwrite.model.weights import followed, offloaded

# What makes gates, steps and the scales of norms.
_CONSTANT = ("rsqrt", "sigmoid", "softplus")


class Frozen(TorchFunctionMode):
    """Inside the `with`, what makes gates, steps and the scales of norms has no slope, and silu that of its factor.

    With `biases`, a bias of a projection or convolution has itself as slope, in channels that have one; `besides` are
    further functions whose results have none.
    """

    def __init__(self, biases: bool = False, besides: tuple[str, ...] = ()):
        super().__init__()
        self._biases, self._held = biases, {*_CONSTANT, *besides}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._biases and name in ("linear", "conv1d"):
            return _with_bias(func, *args, **kwargs)
        made = func(*args, **kwargs)
        if name == "silu":
            made = _sloped(made, args[0] * args[0].sigmoid().detach())
        return made.detach() if name in self._held else made


def _sloped(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, bit for bit, with the slope of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def _with_bias(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    slope = forward_ad.unpack_dual(input).tangent
    if bias is None or slope is None:
        return func(input, weight, bias, *rest, **named)
    # A convolution has channels that are held; what a projection makes beside values is left out behind it.
    joins = slope.ne(0).any(-1).flatten(0, -2).any(0) if func.__name__ == "conv1d" else bias.new_ones(())
    dual = forward_ad.make_dual(bias.detach(), bias.detach() * joins)
    return func(input, weight, dual, *rest, **named)


def shown(lm: Model) -> Iterator[Layer]:
    """Layers with a mixer that shows its values."""
    return (layer for layer in lm.layers if layer.index in lm.mixed)


def mixers_called(lm: Model) -> AbstractContextManager[dict[int, Call]]:
    """Inside the `with`, every forward pass leaves layer -> how it called a mixer that shows its values."""
    return calls_kept({layer.index: layer.attention for layer in shown(lm)})


def holding(layer: Layer, values: Columns, biases: bool = False) -> Iterator[Handle]:
    """Hooks under which slopes go through a mixer by its values alone; what it gives stays what it is, bit for bit."""
    mode = Frozen(biases)
    yield called(layer.attention, lambda _: mode.__enter__())
    yield ended(layer.attention, lambda: mode.__exit__(None, None, None))
    for part, columns in values.items():
        yield after(part, partial(_only, columns))


def _only(columns: Bool[Tensor, " output"], made: Tensor) -> Tensor:
    return torch.where(columns.to(made.device), made, made.detach())


def through_mixer(
    lm: Model, layer: Layer, call: Call, vector: Float[Tensor, "prompt position d_model"], biases: bool = False
) -> Float[Tensor, "prompt position head d_head"]:
    """The part of a mixer's z that is there because `vector` is in what it reads, all but its values held.

    `call` is how the run called it in which these are held; `biases`: with what biases put into channels on its way.
    """
    _, slope = sloped_z(layer, lm.mixed[layer.index], call, vector, biases)
    return slope.to(lm.device, lm.compute_dtype).unflatten(-1, (layer.heads, layer.head_dim))


def sloped_z(
    layer: Layer, values: Columns, call: Call, vector: Tensor, biases: bool = False
) -> tuple[Float[Tensor, "prompt position z"], Float[Tensor, "prompt position z"]]:
    """What a mixer hands to its out-projection, and its slope along a vector in what the mixer reads."""
    with _forwards(layer.attention) as widened, hooked(holding(layer, values, biases)):
        read = read_of(call).detach()
        read = read.to(torch.promote_types(read.dtype, torch.float32), copy=True) if widened else read.clone()
        dual = forward_ad.make_dual(read, vector.to(read, copy=True))
        z, slope = forward_ad.unpack_dual(handed(layer, reads_instead(call, dual)))
        return z.detach(), torch.zeros_like(z) if slope is None else slope.detach()


def handed(layer: Layer, call: Call) -> Float[Tensor, "prompt position z"]:
    """What a mixer that is called so hands to its out-projection."""
    seen: dict[str, Tensor] = {}
    args, named = call
    with hooked([before(layer.out_proj, kept(seen, "z"))]):
        layer.attention(*args, **named)
    return seen["z"]


@contextmanager
def _forwards(module: nn.Module) -> Iterator[bool]:
    """Inside the `with`, slopes go through a module forwards, and nothing is kept for a way back.

    In float32 or better, says what is given, unless weights are brought in for each call.
    """
    with ExitStack() as stack:
        if widened := not offloaded(module):
            stack.enter_context(in_float32(module))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(module))
        stack.enter_context(followed(module))
        stack.enter_context(forward_ad.dual_level())
        with warnings.catch_warnings():  # at first use torch makes rules by means that it warns of
            warnings.simplefilter("ignore", DeprecationWarning)
            yield widened
