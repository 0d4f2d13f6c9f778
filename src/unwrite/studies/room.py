"""How many bytes does each stage need beside the weights? From the shape of the model alone, no weight is read."""

from __future__ import annotations

import torch

from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.run.loop.stream import batch_size
from unwrite.run.replay.removed import at_once
from unwrite.run.tally.without import ROTATIONS
from unwrite.stats.mergeable import RATIO

# What is there whatever is asked: tables, hooks, and what libraries take for themselves.
_ALWAYS = 2**26
# Of each word of a tokenizer: 321 MiB of Gemma's 262,144.
_WORD = 1280
# At most so much is spent on the matrices of one fit in verify.
_FITS = 2**30


def memory(lm: Model, n: int, length: int, writers: int | None = None) -> dict[str, int]:
    """Bytes by stage, as `unwrite.studies.foreseen` has them, for n prompts of `length` tokens and so many writers."""
    # Each stage of an audit has half of the prompts.
    found = {**_stages(lm, n, length, writers), "audit": max(_stages(lm, -(-n // 2), length, writers).values())}
    return {name: _folded(lm) + part + _ALWAYS + _tokenizer(lm) for name, part in found.items()}


def _stages(lm: Model, n: int, length: int, writers: int | None) -> dict[str, int]:
    tokens = from_ids(torch.zeros(min(n, 4096), length, dtype=torch.long))
    return {
        "scan": _scan(lm, n, tokens), "survival": _survival(lm, n, length, writers or len(lm.parts)),
        "verify": _verify(lm, n, tokens), "dla": _dla(lm, tokens),
    }  # fmt: skip


def _tokenizer(lm: Model) -> int:
    """What a tokenizer keeps, in the memory of the processor."""
    return _WORD * lm.vocabulary if lm.tokenizer is not None and lm.device.type == "cpu" else 0


def _width(lm: Model) -> int:
    return torch.finfo(lm.compute_dtype).bits // 8


def _folded(lm: Model) -> int:
    """W_O of all heads, in the dtype in which writes are computed."""
    return sum(layer.heads * layer.head_dim for layer in lm.layers) * lm.d_model * _width(lm)


def _factors(lm: Model) -> int:
    """Of all writes, at one position."""
    return (2 * len(lm.layers) + 2) * lm.d_model * _width(lm)


def _scan(lm: Model, n: int, tokens: Tokens) -> int:
    nodes, length = len(lm.parts), tokens.length
    pairs = (nodes + len(lm.states) + 1) * nodes
    batch = batch_size(lm, tokens, whole_only=True)
    alive = (-(-n // batch)).bit_length() + 2
    positions = min(2**30, _factors(lm) * length * alive)
    # Histograms with their stash; the forward pass holds about as much again as the factors it shows.
    return pairs * (4 * (2 * RATIO.reach + 2) + 2 * 256) + 2 * batch * length * _factors(lm) + positions


def _inner(lm: Model) -> int:
    """Width of an MLP's activation."""
    return getattr(lm.config, "intermediate_size", None) or 4 * lm.d_model


def _clean(lm: Model, rows: int) -> int:
    """A recorded run with the stream at every location, and the writes of another prompt."""
    return rows * (4 * _factors(lm) + 2 * len(lm.states) * lm.d_model * _width(lm))


def _going_up(lm: Model, length: int) -> int:
    """Runs that go through a block together, the change of each, and what is compared."""
    return at_once(length, lm.device) * length * (10 * lm.d_model + 3 * _inner(lm)) * _width(lm)


def _dla(lm: Model, tokens: Tokens) -> int:
    """A recorded run of a batch, slopes at every state under four rules, and the last of their graphs, or what goes up.

    A norm leaves three tensors in a graph, an MLP as many of its own width, and attention of queries, keys and values.
    """
    rows, width = batch_size(lm, tokens, held=4) * tokens.length, _width(lm)
    layer = lm.layers[-1]
    norms = 2 + sum(norm is not None for norm in (layer.post_attention_norm, layer.post_mlp_norm))
    inside = norms * lm.d_model + _inner(lm) + (lm.n_heads + lm.kv_heads) * lm.head_dim
    graph = 3 * rows * len(lm.layers) * inside * width
    slopes = 3 * rows * len(lm.states) * lm.d_model * width
    return _clean(lm, rows) + slopes + max(graph, _going_up(lm, tokens.length))


def _survival(lm: Model, n: int, length: int, writers: int) -> int:
    of_prompt = writers * (7 * (3 * len(lm.states) + 4) + 2 * len(lm.parts) + lm.d_model) * 8 + writers * length * 4
    # Of the prompt that is not done also as it was kept last.
    return _clean(lm, length) + _going_up(lm, length) + (n + 3) * of_prompt


def _verify(lm: Model, n: int, tokens: Tokens) -> int:
    """Two recorded runs of a batch, their patterns, what a block's nodes write, turns, and what is decoded."""
    rows = batch_size(lm, tokens, whole_only=True) * tokens.length
    width = _width(lm)
    recorded = 2 * rows * (_factors(lm) + len(lm.states) * lm.d_model * width)
    patterns = 2 * rows * tokens.length * len(lm.layers) * lm.n_heads * width
    nodes = 4 * rows * (lm.n_heads + 2) * lm.d_model * width
    # Nothing is decoded where a half has fewer rows than there are channels.
    enough = n * (tokens.length - 1) // 2 > lm.d_model
    fits = enough * min(_FITS, len(lm.states) * 32 * lm.d_model * (lm.d_model + lm.head_dim + tokens.length))
    return recorded + patterns + nodes + ROTATIONS * lm.d_model**2 * (8 + width) + fits
