"""What does a patched query or key do through a softmax that is nearly 0 or 1, where the slope says nothing?

The step through the softmax is exact, the slope is used behind it alone: AtP*'s QK fix (Kramár, Lieberum, Shah and
Nanda 2024, arXiv 2403.00745, §3.1). A patched key changes one score of every row, so the whole row follows in closed
form; for the key that holds most of a row that form cancels, and statistics without that key are used instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.model.attention import Scored

Heads = Float[Tensor, "prompt head position d_head"]


def of_queries(call: Scored, source: Heads, slope: Heads) -> Float[Tensor, "prompt head position"]:
    """Σ over keys of (A' − A) G for each query by itself, G the slope at the pattern; `slope` is that at z."""
    moved = _softmax(call, source.to(call.query), call.key) - _softmax(call, call.query, call.key)
    return (moved @ call.value * slope.to(call.query)).sum(-1)


def of_keys(call: Scored, source: Heads, slope: Heads) -> Float[Tensor, "prompt head position"]:
    """The same for each key by itself, summed over the queries that see it."""
    scores = call.scores(call.query, call.key)
    step, worth = call.scores(call.query, source.to(call.key)) - scores, slope.to(call.query) @ call.value.mT
    row = _row(call, scores)
    # No patch moves a sink, and what it gets is worth nothing.
    step, worth = (nn.functional.pad(part, (0, row.shape[-1] - part.shape[-1])) for part in (step, worth))
    return exact_change(row, step, worth)[..., : scores.shape[-1]].sum(2)


def exact_change(
    scores: Float[Tensor, "*rows key"], step: Float[Tensor, "*rows key"], worth: Float[Tensor, "*rows key"]
) -> Float[Tensor, "*rows key"]:
    """Σ_k (p'_k − p_k) worth_k when the score of one key alone makes a step: one number for each key.

    p is the softmax of the row; a score of −∞ is a key that the row does not see.
    """
    seen = scores.isfinite()
    step = step.masked_fill(~seen, 0.0)
    p = scores.softmax(-1)
    change = _closed_form(scores.log_softmax(-1), step) * (worth - (p * worth).sum(-1, keepdim=True))
    top = scores.argmax(-1, keepdim=True)
    alone = seen.sum(-1, keepdim=True) == 1
    others = scores.scatter(-1, top, -torch.inf).masked_fill(alone, 0.0)
    before = scores.gather(-1, top) - others.logsumexp(-1, keepdim=True)
    gain = worth.gather(-1, top) - (others.softmax(-1) * worth).sum(-1, keepdim=True)
    of_top = _sigmoid_step(before, step.gather(-1, top)) * gain
    return change.scatter(-1, top, of_top.masked_fill(alone, 0.0))


def _closed_form(log_p: Tensor, step: Tensor) -> Tensor:
    """(p' − p) / (1 − p) of the key whose score makes a step, in the form that does not overflow.

    By log p: a key too small for a number of this dtype is not too small for a step that lifts it as high.
    """
    p, up, down = log_p.exp(), step.clamp(min=0), step.clamp(max=0)
    rising = -torch.expm1(-up) * torch.sigmoid(log_p - torch.log1p(-p) + up)
    falling = p * torch.expm1(down) / (1 + p * torch.expm1(down))
    # A key that is not seen has no share to lose.
    return torch.where(step > 0, rising, falling).masked_fill(log_p == -torch.inf, 0.0)


def _sigmoid_step(start: Tensor, step: Tensor) -> Tensor:
    """sigmoid(start + step) − sigmoid(start), taken where both are small."""
    end = start + step
    flipped = (start > 0) & (end > 0)
    return torch.where(flipped, torch.sigmoid(-start) - torch.sigmoid(-end), torch.sigmoid(end) - torch.sigmoid(start))


def _softmax(call: Scored, query: Heads, key: Heads) -> Float[Tensor, "prompt head query key"]:
    return _row(call, call.scores(query, key)).softmax(-1)[..., : key.shape[-2]]


def _row(call: Scored, scores: Float[Tensor, "prompt head query key"]) -> Float[Tensor, "prompt head query _key"]:
    """What the softmax is taken of: −∞ where a query does not see, and last what goes to a sink, if there is one."""
    seen = scores.masked_fill(~call.visible, -torch.inf)
    if call.sink is None:
        return seen
    return torch.cat([seen, call.sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
