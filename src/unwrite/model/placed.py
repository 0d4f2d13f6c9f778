"""How does a pass put what a model sees where ids stand for it? At the embedding, before anyone looks at what it gives.

An id of `Images` names one vector, so ids alone say what a run is of, also those of a part of a prompt. The embedding
is called with the tokens that hold the place of images in a text, and the vectors overwrite what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unwrite.errors import TokensError
from unwrite.model.hooks import after, hooked
from unwrite.model.view import Model
from unwrite.prompts.tokens import BEYOND


def decode(lm: Model, ids: Int[Tensor, "prompt position"], device: torch.device | None = None, **settings: Any) -> Any:
    """What the model without its unembedding makes of left-aligned prompts, on the device where token ids go."""
    with placed(lm, ids) as written:
        return lm.decoder(input_ids=written.to(device or lm.device), **settings)


@contextmanager
def placed(lm: Model, ids: Int[Tensor, "prompt position"]) -> Iterator[Int[Tensor, "prompt position"]]:
    """Inside the `with`, a pass over the ids that are yielded is one over `ids`, with what some of them stand for."""
    if not lm.images or not bool((at := ids >= BEYOND).any()):
        yield ids
        return
    vectors, written = _found(lm, ids[at].cpu())

    def put(embedded: Tensor) -> Tensor:
        return embedded.masked_scatter(at.to(embedded.device)[..., None], vectors.to(embedded))

    with hooked([after(lm.decoder.get_submodule(lm.row.embed), put, first=True)]):
        yield ids.masked_scatter(at, written.to(ids))


def _found(lm: Model, ids: Int[Tensor, " vector"]) -> tuple[Tensor, Tensor]:
    """The vectors that ids stand for, and the tokens that hold their place."""
    vectors, written, left = torch.empty(len(ids), lm.d_model, dtype=lm.dtype), ids.clone(), ids >= BEYOND
    for seen in lm.images:
        at, known = map(torch.from_numpy, seen.find(ids.numpy()))
        vectors[known], written[known] = seen.vectors[at[known]], torch.from_numpy(seen.written)[at[known]]
        left &= ~known
    if left.any():
        raise TokensError(
            "ids of images stand for nothing that this model has seen", expected="tokens of uw.images(lm, …), kept",
            fix="read the prompts again with uw.images",
        )  # fmt: skip
    return vectors, written
