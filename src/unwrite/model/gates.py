"""By what are heads' outputs multiplied before the out-projection reads them? Seen in the pass, exactly.

z = g ⊙ (A · V), where g is a gate, a norm's gain times its scale, or both. A quotient of what comes out and what went
in would lose digits where A · V is near 0; so what attention gives carries the slope 1 forwards, and what the
out-projection then reads has the slope g. A norm is followed as if its scale were a constant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from unwrite.model.fold import gain_of
from unwrite.model.hooks import before, between, hooked
from unwrite.model.norms import norm_scale
from unwrite.model.view import Layer, Model


def has_gates(lm: Model) -> bool:
    """Does anything stand between attention and the out-projection?"""
    return lm.row.gated_heads or any(layer.head_norm is not None for layer in lm.layers)


def sloped(lm: Model, z: Tensor) -> Tensor:
    """What attention gives, with the slope 1 where gates are to be seen."""
    return forward_ad.make_dual(z, torch.ones_like(z)) if has_gates(lm) else z


@contextmanager
def multiplied(lm: Model, found: dict[int, Tensor]) -> Iterator[None]:
    """Inside the `with`, every pass whose attention gives what is `sloped` leaves layer -> g there."""
    if not has_gates(lm):
        yield
        return
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # which has no slopes of any kind
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad.dual_level())
        with warnings.catch_warnings():  # at first use torch makes rules by means that it warns of
            warnings.simplefilter("ignore", DeprecationWarning)
            sloped(lm, torch.zeros(()))
        attending = [layer for layer in lm.layers if layer.attends]
        stack.enter_context(hooked(before(layer.out_proj, partial(_seen, lm, layer, found)) for layer in attending))
        norms = (layer.head_norm for layer in attending if layer.head_norm is not None)
        stack.enter_context(hooked(between(norm, partial(_held, lm, norm)) for norm in norms))
        yield


def _seen(lm: Model, layer: Layer, found: dict[int, Tensor], z: Tensor) -> Tensor:
    z, slope = forward_ad.unpack_dual(z)
    if slope is not None:
        found[layer.index] = slope.detach().to(lm.device, lm.compute_dtype).unflatten(-1, (layer.heads, layer.head_dim))
    return z


def _held(lm: Model, norm: nn.Module, read: Tensor, output: Tensor) -> Tensor:
    x, slope = forward_ad.unpack_dual(read)
    if slope is None:
        return output
    gain, exact = gain_of(norm, lm), x.detach().to(lm.compute_dtype)
    factor = norm_scale(exact, norm, centred=False)[..., None]
    factor = factor if gain is None else factor * gain.to(factor.device)
    return forward_ad.make_dual(forward_ad.unpack_dual(output).primal, (slope * factor).to(output.dtype))
