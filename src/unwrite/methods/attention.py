"""Where does every head look, and how much does it bring from there?

pattern  A[q, k], the rows of the softmax (what an attention sink takes comes from no key).
value    A[q, k] · ‖v_k W_O‖, the size of what the head writes at q because it looks at k: where values are small, a
         large weight brings little (Kobayashi, Kuribayashi, Yokoi, Inui 2020, arXiv 2004.10102, eq. 7).

Sizes are in units of the stream and rows do not sum to 1: what several keys bring may cancel, and how much a head
writes at all is a part of the answer. Whoever wants shares divides by the sum over keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NodeError, one_of
from unwrite.model.fold import fold, value_constant
from unwrite.model.load import provenance
from unwrite.model.values import of_biases, values_of
from unwrite.model.view import Layer, Model
from unwrite.nodes import Node, choose, parse_node
from unwrite.prompts.tokens import Tokens, words_of
from unwrite.result import Result, build, quantity
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, stream
from unwrite.run.replay.clean import Clean, clean

_SAYS = {"pattern": ("1", "A[q, k]"), "value": ("activation", "A[q, k] · ‖v_k W_O‖")}
WEIGHS = tuple(_SAYS)
# Of so many prompts, and of each head the tokens from which it brings most.
_PROMPTS, _SOURCES = 8, 3


def attention(
    lm: Model,
    prompts: Any,
    weigh: str = "pattern",
    heads: Any = None,
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """How much every head looks at each key from each query, or how much it brings from there.

    Arguments: `prompts`, `mask`, `bos`, `batch`, `checkpoint` as in `uw.dla`; `weigh` "pattern" or "value", the pattern
    times the norm of what a key's value writes, ‖v W_O‖: under the model's `convention` (as nodes write: without the
    constant part of values, centred), times the scale of a post-norm, and a gate, at the query; `heads` names of some
    ("L2H3", "L*H0"), by default all.
    Returns a Result with `weight[prompt, head, query, key]`, and `read[prompt, query]`, the prompts' own tokens; NaN,
    and no word, where a prompt is shorter. Layers without attention, such as mixers, have no pattern: they are named in
    the attribute `without_pattern`.
    Raises NumericError for an unknown `weigh`; NodeError for a head that is not there or has no pattern; ModelError for
    a model in which no layer attends, or whose attention cannot be opened; TokensError as `uw.scan`.

    Example: `uw.attention(lm, "The cat sat", "value")["weight"].sel(head="L0H1")`
    """
    tokens = admit(lm, prompts, mask, 0, bos, files=False)
    one_of("weigh", weigh, WEIGHS)
    lm.require("values" if weigh == "value" else "opened")
    chosen, size = _heads(lm, heads), batch_size(lm, tokens, batch, held=2)
    settings = {"weigh": weigh, "heads": [*map(str, chosen)], "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("attention", lm, {"": tokens.hash}, settings):
            return done
        tally = Rows(_Looks(lm, weigh, chosen).measured)
        stream(lm, tokens, tally, size, "attention", listener, job)
        data = _dataset(lm, tokens, weigh, chosen, tally.whole()["weight"])
        return job.signed(build("attention", data, settings, provenance(lm), {"": tokens.about()}))


def _heads(lm: Model, heads: Any) -> tuple[Node, ...]:
    """The heads asked for. Raises NodeError for a node that has no pattern."""
    if heads is None:
        return tuple(node for node in lm.parts if node.kind == "head")
    chosen = choose(heads, lm.parts)
    if without := [str(node) for node in chosen if node.kind != "head"]:
        raise NodeError(f"{', '.join(without)} has no pattern", expected="heads of attention, such as L2H3")
    return chosen


@dataclass(frozen=True, eq=False)
class _Looks:
    """What is asked of a clean run."""

    lm: Model
    weigh: str
    heads: tuple[Node, ...]

    @torch.no_grad()
    def measured(self, batch: Batch) -> Arrays:
        """`weight` [prompt, head, query, key]."""
        run = clean(self.lm, batch.ids, fold(self.lm), with_patterns=True)
        weight = torch.cat([*self._layers(run)], 1)
        real = batch.counted.to(weight.device)
        batch.require_numbers(weight.isfinite().all(-1).all(1) | ~real, "an attention weight")
        both = real[:, None, :, None] & real[:, None, None, :]
        return {"weight": weight.masked_fill(~both, torch.nan).cpu().numpy()}

    def _layers(self, run: Clean) -> Iterator[Tensor]:
        for layer in (layer for layer in self.lm.layers if layer.attends):
            if own := [node.head for node in self.heads if node.layer == layer.index]:
                pattern = run.patterns[layer.index][:, own].to(self.lm.compute_dtype)
                yield pattern if self.weigh == "pattern" else pattern * sizes_written(run, layer, own)


def sizes_written(run: Clean, layer: Layer, heads: list[int]) -> Float[Tensor, "prompt head query key"]:
    """‖v_k W_O‖ as it would be written at each query, by the scale of a post-norm and the gate there."""
    lm, gate = run.lm, run.patterns.gate.get(layer.index)
    values, w_o = _values(run, layer)[:, heads], run.folded[layer.index].w_o[heads]
    if gate is None:
        size = (values @ w_o).norm(dim=-1)[:, :, None]
    else:
        by_query = gate[:, :, heads].transpose(1, 2).unbind(2)
        size = torch.stack([((values * own[:, :, None]) @ w_o).norm(dim=-1) for own in by_query], 2)
    scale = run.record.gain.get(layer.index)
    return size if scale is None else size * scale.to(lm.device)[:, None, :, None]


def _values(run: Clean, layer: Layer) -> Float[Tensor, "prompt head key d_head"]:
    """What every query head's values are, without what the convention moves to the bias node."""
    lm, read = run.lm, run.record.stream[layer.makes_values.reads]
    values = values_of(lm, layer, read, run.scale(layer))
    if (more := of_biases(lm, layer, read)) is not None:
        values = values + more
    constant = value_constant(lm, layer) if lm.convention == "raw" else None
    return values if constant is None else values + constant[:, None]


def _dataset(lm: Model, tokens: Tokens, weigh: str, heads: tuple[Node, ...], weight: np.ndarray) -> xr.Dataset:
    there = np.arange(tokens.length) < tokens.lengths[:, None]
    words = words_of(np.where(there, tokens.written, -1), lm.tokenizer)
    variables = {
        "weight": quantity(("prompt", "head", "query", "key"), weight, *_SAYS[weigh]),
        "read": (("prompt", "query"), words),
    }
    place = np.arange(tokens.length)
    axes = {"prompt": np.arange(len(tokens)), "head": [*map(str, heads)], "query": place, "key": place}
    without = " ".join(f"L{layer.index}" for layer in lm.layers if not layer.attends)
    return xr.Dataset(variables, axes).assign_attrs(without_pattern=without)


def at_largest(lm: Model, tokens: Tokens, scanned: xr.Dataset) -> dict[str, xr.Variable]:
    """From which tokens heads bring most where they write most: by writer what they read there, tokens, and shares.

    `scanned` says where that is; of the few prompts in which many heads do. No head of another prompt has a word.
    """
    names = list(map(str, scanned["writer"].values))
    prompt, place = (scanned[f"largest_{axis}"].values for axis in ("prompt", "position"))
    text, token = np.full(len(names), "", dtype=object), np.full((len(names), _SOURCES), "", dtype=object)
    share = np.full((len(names), _SOURCES), np.nan)
    heads = [i for i, node in enumerate(map(parse_node, names)) if node.kind == "head"]
    met = prompt[heads]
    for one, _ in Counter(met[met >= 0].tolist()).most_common(_PROMPTS):
        asked = [i for i in heads if not text[i] and one in prompt[i]]
        if not asked:
            continue
        found = attention(lm, tokens.take([one]), "value", [names[i] for i in asked]).data
        words = found["read"].values[0]
        for i, weight in zip(asked, found["weight"].values[0], strict=True):
            rank = int((prompt[i] == one).argmax())
            row = weight[place[i, rank]] / max(np.nansum(weight[place[i, rank]]), np.finfo(float).tiny)
            best = np.argsort(-np.nan_to_num(row), kind="stable")[:_SOURCES]
            text[i] = str(scanned["largest_text"].values[i, rank])
            token[i, : len(best)], share[i, : len(best)] = words[best], row[best]
    says = "A[q, k] · ‖v_k W_O‖ / Σ over k, at one of the places where it writes most"
    axes = ("writer", "attended")
    return {
        "attended_text": xr.Variable("writer", text),
        "attended_token": xr.Variable(axes, token),
        "attended_share": quantity(axes, share, "1", says),
    }
