"""What does the model go on to say? Greedy continuation of prompts of one length.

The first pass may be edited. Only that pass is inside of a trace: what later ones see of an edit is what a cache keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import NumericError, TokensError, counted
from unwrite.model.cache import keeping
from unwrite.model.capture import evaluating
from unwrite.model.placed import decode
from unwrite.model.unembedding import headed
from unwrite.model.view import Model
from unwrite.run.edit.edits import Edit
from unwrite.run.edit.trace import trace

# What is edited of a pass over so many positions.
Edits = Callable[[int], Sequence[Edit]]
# Under which of these a model hands on what it keeps of earlier positions.
_CACHES = ("cache", "past_key_values")


def require_room(lm: Model, length: int, steps: int, what: str, fix: str) -> None:
    """Raise TokensError, which says `what` it is, where a prompt and what is said after it pass the model's context."""
    if lm.context is not None and length + steps > lm.context:
        got = f"{length} + {counted(steps, 'token')}"
        raise TokensError(what, got=got, expected=f"at most {lm.context}", fix=fix)


@dataclass(frozen=True, eq=False)
class Spoken:
    """What was said: `ids` and their probabilities `prob`, −1 and NaN behind a token that ends a text, and the logits
    of the `first` token."""

    ids: Int[Tensor, "run step"]
    prob: Float[Tensor, "run step"]
    first: Float[Tensor, "run vocabulary"]


@torch.no_grad()
def spoken(
    lm: Model, ids: Int[Tensor, "run position"], steps: int, edits: Edits = lambda _: (),
    hear: Callable[[int], object] = lambda _: None,
) -> Spoken:  # fmt: skip
    """The `steps` likeliest tokens that follow, each after the one before; `hear` is told how many there are.

    A token that ends a text, as the model's generation_config names them, is said and nothing after it. Raises
    NumericError where a logit is no number.
    """
    ending = torch.tensor(ends_of(lm), dtype=torch.long)
    found = ids.new_full((len(ids), steps), -1)
    probs, first, cache = torch.full(found.shape, torch.nan, dtype=torch.float64), None, None
    going = torch.ones(len(ids), dtype=torch.bool)
    with evaluating(lm.hf):
        for step in range(steps):
            so_far = torch.cat([ids, found[:, :step].clamp(min=0)], 1)
            logits, cache = _next(lm, so_far, cache, edits, step)
            first = logits if first is None else first
            token = logits.argmax(-1).cpu()
            prob = logits.double().softmax(-1).amax(-1).cpu()
            found[:, step], probs[:, step] = torch.where(going, token, -1), torch.where(going, prob, torch.nan)
            going = going & ~torch.isin(token, ending)
            hear(step + 1)
            if not going.any():
                break
    assert first is not None  # noqa: S101 (there is a step)
    return Spoken(found, probs, first)


def _next(
    lm: Model, ids: Int[Tensor, "run position"], cache: Any, edits: Edits, step: int
) -> tuple[Float[Tensor, "run vocabulary"], Any]:
    """The logits after a text so far, and what is kept of it; without that all of it is run again, and edited."""
    if cache is not None:
        out = decode(lm, ids[:, -1:], **keeping(lm.decoder, cache))
    else:
        with trace(lm, edits=edits(ids.shape[1])):
            out = decode(lm, ids, use_cache=True)
    logits = headed(lm, out["last_hidden_state"][:, -1].to(lm.device)).detach()
    if not logits.isfinite().all():
        raise NumericError(
            f"a logit of step {step} is not finite", fix="load the model in float32, or leave this prompt out"
        )
    return logits, next((out[name] for name in _CACHES if name in out), None)


def ends_of(lm: Model) -> list[int]:
    """The tokens that end a text."""
    named = getattr(getattr(lm.hf, "generation_config", None), "eos_token_id", None)
    named = getattr(lm.config, "eos_token_id", None) if named is None else named
    if named is None:
        return []
    return [int(i) for i in (named if isinstance(named, (list, tuple)) else [named])]
