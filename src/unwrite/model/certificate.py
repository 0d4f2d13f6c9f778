"""Is the decomposition exact for this very model, and what may methods rest on? Identities, measured at load.

What every method needs is asked for at load (`NEEDED`), what only some need where they begin: whoever opens attention,
reads logits from weights or continues runs. What each identity says is in `identities`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unwrite.errors import ModelError, PrecisionError
from unwrite.model.families import BY_HAND
from unwrite.model.fold import Folded, fold
from unwrite.model.identities import added, beyond, output_of, relative
from unwrite.model.lengths import affordable, switches
from unwrite.model.mixer_values import shown_values
from unwrite.model.projections import as_matrices
from unwrite.model.single import HALVES, in_float32
from unwrite.model.view import ABSENT, Model
from unwrite.model.weights import offloaded

NEEDED = ("heads", "stream", "locations", "logits", "values", "causal")
IDENTITIES = (*NEEDED, "opened", "reading", "continued", "mlp")
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
_FLOAT32_INSIDE = 1e-6
# Of half precision: errors are of the size of the model's own rounding, or of that of one product.
_OF_ROUNDING, _ROUNDING, _UNKNOWN = 3.0, 2e-2, 5e-2
_LENGTHS = (5, 9)
_PADDING = 3

# Why something cannot be done, and what can be done instead.
_WHY = {
    "causal": "{model} is not causal: a changed last token moves the logits before it",
    "opened": "the attention of {model} cannot be opened: computed openly, for its patterns, it gives other logits",
    "reading": "the weight of {model}'s unembedding does not give its logits, so none can be read from it",
    "mlp": "what is taken for the last projection of {model}'s MLPs does not give what they write",
    "continued": "a run of {model} that is continued over keys and values it kept is not that run",
}
_INSTEAD = {
    "causal": "use a decoder in which a position sees earlier ones only",
    "opened": "use what needs no pattern, or load the model with attn_implementation='eager' if it means the same",
    "reading": "merge what was put around the unembedding (an adapter: merge_and_unload()) and load the model again",
    "mlp": "use what asks for no hidden activation, or see 'How to add a family' in CONTRIBUTING.md",
    "continued": "use what runs whole prompts",
}


@dataclass(frozen=True)
class Certificate(Mapping[str, float]):
    """Identity -> worst relative error over layers, positions and prompts, and the `limit` above which it fails."""

    errors: Mapping[str, float]
    limit: float
    dtype: str
    # The model computes otherwise beyond so many tokens, and no prompt of that length was tried.
    unchecked: int | None = None
    # Of half precision: how far the logits are from those of float32, and the errors there, of the same weights.
    rounding: float | None = None
    single: Mapping[str, float] = field(default_factory=dict)
    row: str = BY_HAND  # or FOUND

    def __getitem__(self, identity: str) -> float:
        return self.errors[identity]

    def __iter__(self) -> Iterator[str]:
        return iter(self.errors)

    def __len__(self) -> int:
        return len(self.errors)

    def allowed(self, identity: str) -> float:
        """The largest error with which an identity holds."""
        # Eager functions have their softmax in float32 whatever the dtype.
        return max(self.limit, _FLOAT32_INSIDE) if identity in ("opened", "continued") else self.limit

    def holds(self, identity: str) -> bool:
        """Does this identity hold?"""
        if identity not in self.errors:
            return False
        # Written so that NaN does not.
        exact = not self.single or self.single[identity] <= _LIMITS[torch.float32]
        # In half precision another order of the same sums may choose other experts; float32 says what is the same.
        reordered = bool(self.single) and identity in ("opened", "continued")
        return exact and (reordered or self.errors[identity] <= self.allowed(identity))

    @property
    def ok(self) -> bool:
        """Do all identities hold within the limit?"""
        return not self.failing

    @property
    def failing(self) -> tuple[str, ...]:
        """The identities that do not hold."""
        return tuple(identity for identity in self.errors if not self.holds(identity))

    def explain(self) -> str:
        """The certificate in one line."""
        parts = ", ".join(f"{name} {error:.0e}" for name, error in self.errors.items())
        without = "" if not self.failing else f" but for {', '.join(self.failing)}, without which methods do"
        verdict = "NOT exact" if {*self.failing} & {*NEEDED} else f"exact to rounding{without}"
        said = f"{verdict} in {self.dtype}: {parts} (relative error, limit {self.limit:.0e})"
        if self.rounding is not None:
            said += f"; its logits are {self.rounding:.0e} from those of float32, where the same weights are exact to "
            said += f"{max(self.single.values()):.0e}"
        missing = [name for name in IDENTITIES if name not in self.errors]
        for why in dict.fromkeys(ABSENT[name] for name in missing):
            said += f"; {' and '.join(name for name in missing if ABSENT[name] == why)} not checked: {why}"
        if self.unchecked is not None:
            said += f"; not checked beyond {self.unchecked:,} tokens, where the model computes otherwise"
        return said if self.row == BY_HAND else f"{said}; row: {self.row}"

    def require(self, model: str) -> None:
        """Raise ModelError naming the failing identities unless all hold that every method needs."""
        # Where shapes tell that a row is false, no function of the user's is the reason.
        false = self.errors.get("mlp") == math.inf
        failing = [identity for identity in self.failing if identity in NEEDED or (false and identity == "mlp")]
        if failing and self.rounding is not None and not math.isfinite(self.rounding):
            raise PrecisionError(
                f"{model} overflows {self.dtype}", got="logits that are no numbers",
                expected="numbers, as float32 gives from the same weights",
                fix="load it in float32: dtype='float32', on the command line --dtype float32",
            )  # fmt: skip
        if failing:
            self.refuse(model, failing)

    def refuse(self, model: str, failing: Sequence[str]) -> NoReturn:
        """Raise ModelError naming these identities."""
        only = failing[0] if len(failing) == 1 else ""
        what = f"the decomposition of {model} is not exact, so per-node numbers would be wrong"
        inexact = [name for name in failing if self.single and not self.single[name] <= _LIMITS[torch.float32]]
        errors, limit = (self.single, _LIMITS[torch.float32]) if inexact else (self.errors, self.allowed(failing[0]))
        where = f"in float32 of these {self.dtype} weights" if inexact else f"in {self.dtype}"
        fix = "load it in float32" if self.single and not inexact else "see 'How to add a family' in CONTRIBUTING.md"
        raise ModelError(
            _WHY.get(only, what).format(model=model),
            got=f"relative error of {', '.join(f'{name} {errors[name]:.1e}' for name in inexact or failing)}",
            expected=f"at most {limit:.0e} {where}",
            fix=_INSTEAD.get(only, fix),
        )


@torch.no_grad()
def certify(lm: Model) -> Certificate:
    """Measure the identities on two batches of random prompts of two lengths, the first padded as methods pad.

    And on one prompt longer than every length beyond which the model computes otherwise, as far as that is little work.
    """
    folded = fold(lm)
    lm.mixed.clear()
    lm.mixed.update(shown_values(lm))
    longer = [length for length in switches(lm) if length + 2 > max(_LENGTHS)]
    tried = [length for length in longer if affordable(lm, length + 2)]
    found = [error for ids, mask in _prompts(lm) for error in added(lm, folded, ids, mask, lm.dtype)]
    for length in tried[-1:]:
        found += beyond(lm, folded, _random(lm, 1, length + 2))
    unchecked = next((length for length in longer if length not in tried), None)
    rounding, single = _in_float32(lm, folded)
    found += [("values", single["values"])] if lm.mixed and single else []  # of mixers it is asked in float32 alone
    limit = _limit(lm) if rounding is None else max(_ROUNDING, _OF_ROUNDING * rounding)
    dtype, row = str(lm.dtype).removeprefix("torch."), lm.about.get("row", BY_HAND)
    return Certificate(_worst(lm, found), limit, dtype, unchecked, rounding, single, row)


def _in_float32(lm: Model, folded: tuple[Folded, ...]) -> tuple[float | None, dict[str, float]]:
    """Of half precision: how far the logits are from those of float32, relative, and the identities' errors there."""
    # Weights that are brought in for each pass cannot be lent; only rounding at a fixed limit is asked for then.
    if lm.dtype not in HALVES or offloaded(lm.hf):
        return None, {}
    prompts = [*_prompts(lm)]
    ids, mask = prompts[-1]
    own = output_of(lm, ids, mask).float()
    with in_float32(lm.hf), as_matrices(lm, lm.hf):
        exact = output_of(lm, ids, mask)
        found = [error for ids, mask in prompts for error in added(lm, folded, ids, mask, torch.float32)]
    return relative(own.flatten(0, 1)[None], exact.flatten(0, 1)), _worst(lm, found)


def _worst(lm: Model, found: Iterable[tuple[str, float]]) -> dict[str, float]:
    worst = dict.fromkeys((str(name) for name in IDENTITIES if lm.applies(name)), 0.0)
    for identity, error in found:
        if identity not in worst:  # of mixers that show no values after all
            continue
        # max() would drop a NaN.
        worst[identity] = error if not error <= worst[identity] else worst[identity]
    return worst


def _random(lm: Model, prompts: int, length: int) -> Int[Tensor, "prompt position"]:
    generator = torch.Generator().manual_seed(length)
    return _placed(lm, torch.randint(lm.vocabulary, (prompts, length), generator=generator).to(lm.device))


def _placed(lm: Model, ids: Int[Tensor, "prompt _"]) -> Int[Tensor, "prompt _"]:
    """Without the id for padding, which has no position of its own in some models."""
    padding = getattr(lm.config, "pad_token_id", None)
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % lm.vocabulary, ids)


def _limit(lm: Model) -> float:
    limit = _LIMITS.get(lm.dtype, _UNKNOWN)
    # Most families' eager attention has its softmax in float32.
    inexact = lm.row.float32_inside or lm.config._attn_implementation != "sdpa"
    return max(limit, _FLOAT32_INSIDE) if inexact else limit


def _prompts(
    lm: Model,
) -> Iterator[tuple[Int[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]]:
    """Two prompts of which one is padded; then two longer ones, and the first of them with another last token."""
    for length, padding in zip(_LENGTHS, (_PADDING, 0), strict=True):
        length = min(length, lm.context or length)
        ids = _random(lm, 2, length)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, max(1, length - padding) :] = padding == 0
        if not padding:
            changed = torch.cat([ids[:1, :-1], _placed(lm, (ids[:1, -1:] + 1) % lm.vocabulary)], 1)
            ids, mask = torch.cat([ids, changed]), torch.cat([mask, mask[:1]])
        yield ids, mask
