"""From how many tokens on does a model compute otherwise, and can a prompt of that length be tried?

Windows, chunks and scorers of keys hide some once a prompt is longer; longrope turns queries and keys by other
frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unwrite.model.view import Model

_NAMES = ("sliding_window", "attention_chunk_size", "window_size", "index_topk", "original_max_position_embeddings")
_SWITCHING = ("longrope",)
# A prompt is tried if its tokens × the blocks' parameters, and all its attention patterns, are no more than these.
_WORK, _PATTERNS = 2e10, 2**27


def switches(lm: Model) -> tuple[int, ...]:
    """The lengths beyond which this model computes otherwise and that it can read, ascending."""
    context = lm.context or float("inf")
    return tuple(sorted({length for length in _named(lm.config) if 0 < length < context}))


def _named(config: Any) -> Iterator[int]:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    switching = [part for part in kinds if part.get("rope_type") in _SWITCHING]
    yield from (part.get("original_max_position_embeddings") or 0 for part in switching)
    for name in _NAMES:
        length = getattr(config, name, None)
        unused = name == "sliding_window" and getattr(config, "use_sliding_window", True) is False
        if type(length) is int and not unused and (switching or not name.startswith("original")):
            yield length


def affordable(lm: Model, length: int) -> bool:
    """Is one prompt of this length little work beside loading the model?"""
    parameters = sum(p.numel() for layer in lm.layers for p in layer.block.parameters())
    speed = 1 if lm.device.type == "cpu" else 100
    patterns = len(lm.layers) * lm.n_heads * length**2
    return length * parameters <= _WORK * speed and patterns <= _PATTERNS
