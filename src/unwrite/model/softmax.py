"""Where does a head look, given its queries, its keys, and what it may see? The softmax, computed openly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def pattern_of(
    query: Tensor, key: Tensor, mask: Tensor | None, **settings: Any
) -> Float[Tensor, "prompt head query key"]:
    """The pattern of every query head under an added mask and the settings with which attention is called."""
    scores = scores_of(query, key, **settings)
    scores = scores if mask is None else scores + mask[..., : key.shape[-2]]
    if (sink := settings.get("s_aux")) is None:
        return torch.softmax(scores, dim=-1)
    # What goes to a head's sink is part of the softmax, and comes from no key.
    beside = sink.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, beside], -1), dim=-1)[..., :-1]


def scores_of(
    query: Tensor, key: Tensor, scaling: float | None = None, softcap: float | None = None, **rest: Any
) -> Float[Tensor, "prompt head query key"]:
    """What the softmax takes, but for the mask: after the scaling and the soft-cap."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ per_query_head(key, query).transpose(2, 3) * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def per_query_head(shared: Tensor, query: Tensor) -> Tensor:
    """Keys or values of every query head, from those of the key/value heads that they share."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


def added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as scores take it: a caller's own may say which keys are seen, which closed attention understands."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(
        ~mask, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    )


def chosen(mask: Tensor | None, query: Tensor, key: Tensor, settings: Mapping[str, Any]) -> Tensor | None:
    """A mask that also hides the keys that a model's scorer has not chosen, if it has one.

    Models put them into the mask where attention has a name that they know, and else hand over which were chosen.
    """
    if (found := settings.get("indices")) is None:
        return mask
    shape = (query.shape[0], query.shape[2], key.shape[2])
    hidden = torch.ones(shape, dtype=torch.bool, device=key.device).scatter(-1, found.long(), value=False)[:, None]
    if mask is None:
        return torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
