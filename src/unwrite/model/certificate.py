"""Is the decomposition exact for this very model, and what may methods rest on? Identities, measured at load.

What every method needs is asked for at load (`NEEDED`), what only some need where they begin: whoever opens attention,
reads logits from weights or continues runs. What each identity says is in `identities`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unwrite.errors import ModelError
from unwrite.model.identities import added
from unwrite.model.view import Model, fold

NEEDED = ("heads", "stream", "locations", "logits", "values", "causal")
IDENTITIES = (*NEEDED, "opened", "reading", "continued")
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_FLOAT32_INSIDE = 1e-6
_LENGTHS = (5, 9)
_PADDING = 3

# Why something cannot be done, and what can be done instead.
_WHY = {
    "causal": "{model} is not causal: a changed last token moves the logits before it",
    "opened": "the attention of {model} cannot be opened: computed openly, for its patterns, it gives other logits",
    "reading": "the weight of {model}'s unembedding does not give its logits, so none can be read from it",
    "continued": "a run of {model} that is continued over keys and values it kept is not that run",
}
_INSTEAD = {
    "causal": "use a decoder in which a position sees earlier ones only",
    "opened": "use what needs no pattern, or load the model with attn_implementation='eager' if it means the same",
    "reading": "merge what was put around the unembedding (an adapter: merge_and_unload()) and load the model again",
    "continued": "use what runs whole prompts",
}


@dataclass(frozen=True)
class Certificate(Mapping[str, float]):
    """Identity -> worst relative error over layers, positions and prompts, and the `limit` above which it fails."""

    errors: Mapping[str, float]
    limit: float
    dtype: str

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
        # Written so that NaN does not.
        return self.errors[identity] <= self.allowed(identity)

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
        return f"{verdict} in {self.dtype}: {parts} (relative error, limit {self.limit:.0e})"

    def require(self, model: str) -> None:
        """Raise ModelError naming the failing identities unless all hold that every method needs."""
        if failing := [identity for identity in self.failing if identity in NEEDED]:
            self.refuse(model, failing)

    def refuse(self, model: str, failing: Sequence[str]) -> NoReturn:
        """Raise ModelError naming these identities."""
        only = failing[0] if len(failing) == 1 else ""
        what = f"the decomposition of {model} is not exact, so per-node numbers would be wrong"
        fix = "see 'How to add a family' in CONTRIBUTING.md; load in float32 if this is half precision"
        raise ModelError(
            _WHY.get(only, what).format(model=model),
            got=f"relative error of {', '.join(f'{name} {self.errors[name]:.1e}' for name in failing)}",
            expected=f"at most {self.allowed(failing[0]):.0e} in {self.dtype}",
            fix=_INSTEAD.get(only, fix),
        )


@torch.no_grad()
def certify(lm: Model) -> Certificate:
    """Measure the identities on two batches of random prompts of two lengths, the first padded as methods pad."""
    worst: dict[str, float] = dict.fromkeys(map(str, IDENTITIES), 0.0)
    folded = fold(lm)
    for ids, mask in _prompts(lm):
        for identity, error in added(lm, folded, ids, mask):
            # max() would drop a NaN.
            worst[identity] = error if not error <= worst[identity] else worst[identity]
    return Certificate(worst, _limit(lm), str(lm.dtype).removeprefix("torch."))


def _limit(lm: Model) -> float:
    limit = _LIMITS.get(lm.dtype, 5e-2)
    # Most families' eager attention has its softmax in float32.
    inexact = lm.row.float32_inside or lm.config._attn_implementation != "sdpa"
    return max(limit, _FLOAT32_INSIDE) if inexact else limit


def _prompts(
    lm: Model,
) -> Iterator[tuple[Int[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]]:
    """Two prompts of which one is padded; then two longer ones, and the first of them with another last token."""
    generator = torch.Generator().manual_seed(0)
    for length, padding in zip(_LENGTHS, (_PADDING, 0), strict=True):
        length = min(length, lm.context or length)
        ids = torch.randint(lm.vocabulary, (2, length), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, max(1, length - padding) :] = padding == 0
        if not padding:
            changed = torch.cat([ids[0, :-1], (ids[0, -1:] + 1) % lm.vocabulary])
            ids, mask = torch.cat([ids, changed[None]]), torch.cat([mask, mask[:1]])
        yield ids.to(lm.device), mask.to(lm.device)
