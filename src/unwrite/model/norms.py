"""Is a module a norm, and by what does it multiply? Its epsilon is an attribute's, or that of what it makes of vectors.

A norm gives gain ⊙ x / sqrt(mean(x²) + ε) + bias, x centred first if it is a LayerNorm. Of a vector with mean 0 and
mean square t² the part r(t) = t / sqrt(t² + ε) is left of what becomes of a large one, whatever gain and bias are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model.single import HALVES
from unwrite.model.weights import weight_of

# Whether a norm removes the mean, and what is added to its weight.
NormKind = tuple[bool, float]
_NAMES = ("eps", "variance_epsilon", "epsilon")
# Decades of t; what is the same in float32; so near, an epsilon is the round number that stands in the code.
_SMALLEST, _LARGEST, _SAME, _ROUND = -8, 4, 1e-4, 1e-5
# The same in half precision.
_HALF = 2e-2


def is_norm(module: nn.Module, width: int) -> bool:
    """Does this module itself divide by a root mean square? Where no attribute says so, of vectors so wide."""
    return _epsilon(module, width) is not None


def norm_scale(x: Float[Tensor, "*rows d_model"], norm: nn.Module, centred: bool) -> Float[Tensor, "*rows"]:
    """1 / sqrt(mean(x²) + ε), x centred first for a LayerNorm: what a norm multiplies by, beside its gain.

    Raises ModelError for what is no norm.
    """
    epsilon = _epsilon(norm, x.shape[-1])
    if epsilon is None:
        raise ModelError("this is no norm", got=f"a {type(norm).__name__}", expected="what divides by its input's size")
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(x.pow(2).mean(-1) + epsilon)


def kinds(module: nn.Module, x: Tensor, gave: Tensor) -> dict[NormKind, float]:
    """The kinds of norm of which a module that gave this of x is one, with the relative error; none for no norm."""
    if x.shape != gave.shape or not is_norm(module, x.shape[-1]):
        return {}
    held = [getattr(module, name, None) for name in ("weight", "bias")]
    if any(isinstance(part, Tensor) and not part.is_meta and part.shape != x.shape[-1:] for part in held):
        return {}
    x, gave = x.double(), gave.double()
    found = {(mean, offset): _off(module, x, gave, mean, offset) for mean in (False, True) for offset in (0.0, 1.0)}
    return {kind: error for kind, error in found.items() if error <= _SAME}


def _off(module: nn.Module, x: Tensor, gave: Tensor, mean: bool, offset: float) -> float:
    weight, bias = (None if part is None else part.detach().to(x)
                    for part in (weight_of(module, name) for name in ("weight", "bias")))  # fmt: skip
    made = (x - x.mean(-1, keepdim=True) if mean else x) * norm_scale(x, module, mean)[..., None]
    made = (made if weight is None else made * (weight + offset)) + (0.0 if bias is None else bias)
    return float((made - gave).norm() / gave.norm())


def _epsilon(module: nn.Module, width: int) -> float | None:
    held = [value for name in _NAMES if isinstance(value := getattr(module, name, None), float)]
    return held[0] if held else _measured(module, width)


@torch.no_grad()
def _measured(module: nn.Module, width: int) -> float | None:
    """The epsilon with which a module is a norm, from a vector in several sizes; None where there is none."""
    weights = [*module.parameters()]
    plain = next(module.children(), None) is None and next(module.buffers(), None) is None
    if not plain or any(weight.shape != (width,) for weight in weights):
        return None
    like = weights[0] if weights else torch.empty((), dtype=torch.float64)
    x = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    t = torch.cat([torch.zeros(1), torch.logspace(_SMALLEST, _LARGEST, 2 * (_LARGEST - _SMALLEST) + 1)]).double()
    try:
        # `forward`, and not a call: no hook of anyone sees it.
        made = module.forward((t[:, None] * x).to(like)[None])[0].cpu().double()
    except Exception:  # noqa: BLE001 - what cannot read vectors is no norm
        return None
    same = _HALF if like.dtype in HALVES else _SAME
    return _fitted(t[1:], made[1:] - made[0], same) if made.shape == (len(t), width) else None


def _fitted(t: Float[Tensor, " size"], made: Float[Tensor, "size width"], same: float) -> float | None:
    """ε, if every size of the vector becomes the part r(t) of what the largest does."""
    whole = made[-1]
    r = made @ whole / (whole @ whole)
    half = (r.square() - 0.5).abs().argmin()
    epsilon = float(t[half].square() * (1 / r[half].square() - 1))
    want = (t / (t.square() + epsilon).sqrt())[:, None] * whole
    if not bool(((made - want).norm(dim=-1) <= same * whole.norm()).all()) or epsilon <= 0:  # NaN is none either
        return None
    known = float(f"{epsilon:.1e}")
    return known if abs(known - epsilon) <= _ROUND * known else epsilon
