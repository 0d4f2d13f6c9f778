"""What does a vector in the final stream do to a logit, or to the difference of two? The last linear step of a model.

With the final norm's scale held, a logit difference is linear in the final stream x: ⟨x, r⟩ + constant, where
r = c · scale · centre(gain ⊙ (u_a − u_b)) and constant = c · (⟨β, u_a − u_b⟩ + b_a − b_b); u and b are the
unembedding, β the final norm's bias, c the family's logit scale. Against several tokens u_b and b_b are their means.
All of it before a soft-cap, which is monotone but not linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.fold import gain_of
from unwrite.model.norms import norm_scale
from unwrite.model.projections import sizes
from unwrite.model.unembedding import before_norm, finished, headed, rows_of, unembedding
from unwrite.model.view import Model
from unwrite.model.weights import through, weight_of

_CHUNK = 2**24


@dataclass(frozen=True)
class Question:
    """A logit, or its difference to another one, to the mean of several, or (`centred`) to that over the vocabulary."""

    answer: Int[Tensor, "*rows"]
    against: Int[Tensor, "*rows"] | Int[Tensor, "*rows option"] | None = None
    centred: bool = False

    def of(self, rows: Int[Tensor, " other"]) -> Question:
        """The questions of some rows, in this order."""
        return replace(self, answer=self.answer[rows], against=None if self.against is None else self.against[rows])

    def direction(self, lm: Model) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows"]]:
        """u_a − u_b and b_a − b_b."""
        weight, bias = unembedding(lm)
        u, b = rows_of(weight, bias, self.answer, lm.compute_dtype)
        if self.against is not None:
            v, c = rows_of(weight, bias, self.against, lm.compute_dtype)
            if self.against.ndim > self.answer.ndim:
                v, c = v.mean(-2), c.mean(-1)
            return u - v, b - c
        return (u - _mean(weight, lm), b - _mean(bias, lm)) if self.centred else (u, b)


def normed(lm: Model, stream: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """What the model's own final norm makes of streams, wherever it computes."""
    return through(lm.final_norm, stream)


@torch.no_grad()
def measure(lm: Model, question: Question, stream: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """The logit or logit difference of the final stream, through the model's own final norm, before a soft-cap."""
    return normed_measure(lm, question, normed(lm, stream.to(lm.dtype)))


def normed_measure(lm: Model, question: Question, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """`measure` of what the final norm gave."""
    direction, offset = question.direction(lm)
    return lm.row.logit_scale(lm.config) * ((final.to(direction) * direction).sum(-1) + offset)


def linear(
    lm: Model, question: Question, stream: Float[Tensor, "*rows d_model"]
) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows"]]:
    """(r, constant): the clean final norm's scale held, `measure` of x is ⟨x, r⟩ + constant."""
    r, constant = before_norm(lm, *question.direction(lm))
    held = norm_scale(stream, lm.final_norm, lm.row.layer_norm)
    scale = lm.row.logit_scale(lm.config)
    return scale * held[..., None] * r, scale * constant


def capped(lm: Model, question: Question, stream: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """The logit or difference that the model itself returns, after its soft-cap where it has one."""
    cap = lm.row.logit_cap(lm.config)
    if cap is None:
        return measure(lm, question, stream)

    def bounded(ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        return torch.tanh(measure(lm, Question(ids), stream) / cap) * cap

    answer, against = bounded(question.answer), question.against
    if against is None:
        return answer
    each = against.unbind(-1) if against.ndim > answer.ndim else [against]
    return answer - torch.stack([bounded(ids) for ids in each]).mean(0)


@torch.no_grad()
def vocabulary(
    lm: Model, stream: Float[Tensor, "*rows d_model"], end: Float[Tensor, "*rows d_model"] | None = None
) -> Float[Tensor, "*rows vocabulary"]:
    """Every token's logit as the model's own last steps make it of streams, after a soft-cap where there is one.

    With `end`, the final streams of these rows, the final norm's scale is theirs: held, and not that of each stream.
    """
    if end is None:
        return finished(lm, stream)
    gain, beta = gain_of(lm.final_norm, lm), weight_of(lm.final_norm, "bias")
    seen = stream - stream.mean(-1, keepdim=True) if lm.row.layer_norm else stream
    normed = seen * norm_scale(end, lm.final_norm, lm.row.layer_norm)[..., None]
    normed = normed if gain is None else normed * gain
    return headed(lm, (normed if beta is None else normed + beta.detach().to(normed)).to(lm.dtype))


def at_once(lm: Model) -> int:
    """Rows whose logits of the whole vocabulary are held at once."""
    return max(1, _CHUNK // sizes(lm.head)[1])


@torch.no_grad()
def top_two(lm: Model, stream: Float[Tensor, "*rows d_model"]) -> Question:
    """The model's own two highest logits at every row: the highest against the second."""
    head, flat = lm.head, stream.flatten(0, -2)
    found = [through(head, normed(lm, part.to(lm.dtype))).topk(2).indices for part in flat.split(at_once(lm))]
    first, second = torch.cat(found).unflatten(0, stream.shape[:-1]).unbind(-1)
    return Question(first, second)


def _mean(parameter: Tensor | None, lm: Model) -> Tensor | float:
    return 0.0 if parameter is None else parameter.detach().to(lm.compute_dtype).mean(0).to(lm.device)
