"""Would a node write the same if it read another text? Its direct reading, with what it reads replaced.

query     only the read row's input of the node comes from another text; earlier keys and values stay the prompt's
          (Dao, Lau, Rager, Janiak 2023, Fig. 4). An MLP reads one row, so for it all of the write is the other text's.
context   the write at the same position of the other text.

Final norm, post-norms and the logit difference asked about stay those of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.view import Model
from unwrite.model.writes import expand
from unwrite.run.answer.logits import linear
from unwrite.run.loop.finite import not_finite
from unwrite.run.replay.clean import Clean, clean
from unwrite.run.replay.edited import each_block
from unwrite.run.source.writes import Pool
from unwrite.run.tally.account import Asked

REPLACED = ("query", "context")
QUARTILES = (0.25, 0.5, 0.75)
_BATCH_TOKENS = 4096


def invariance(asked: Asked, pool: Pool, first: int, real: int) -> Iterator[Float[Tensor, "replaced node quartile"]]:
    """Of each of the batch's `real` prompts: quartiles of every node's direct reading over texts; NaN below two."""
    r, _ = linear(asked.lm, asked.question, asked.final(asked.run.record))
    for i in range(real):
        row = int(asked.row[i])
        texts = pool.others(first + i, row)
        values = [torch.einsum("snjd,d->snj", part, r[i]) for part in _others(asked, pool, i, row, texts)]
        if len(texts) < 2:
            yield torch.full((len(REPLACED), len(asked.lm.parts), len(QUARTILES)), torch.nan).to(r)
            continue
        quartiles = torch.tensor(QUARTILES, dtype=r.dtype, device=r.device)
        if not all(part.isfinite().all() for part in values):
            what = f"a node's direct reading for prompt {first + i} is not finite when it reads other texts"
            raise not_finite(what, "leave texts out that are not read well")
        yield torch.quantile(torch.cat(values, 2), quartiles, dim=2).movedim(0, 2)


def _others(
    asked: Asked, pool: Pool, prompt: int, row: int, texts: Int[np.ndarray, " text"]
) -> Iterator[Float[Tensor, "replaced node text d_model"]]:
    """Writes at the read row when it, or everything, comes from other texts; some texts at a time."""
    lm, folded = asked.lm, asked.folded
    step = max(1, _BATCH_TOKENS // (row + 1))
    for start in range(0, len(texts), step):
        ids = torch.from_numpy(pool.tokens.ids[texts[start : start + step], : row + 1])
        donors = clean(lm, ids, folded)
        own = clean(lm, asked.ids[prompt, : row + 1].expand(len(ids), -1), folded)
        context = _at(lm, donors, folded, row)
        query = _at(lm, _queried(own, donors, row), folded, row)
        attention = torch.tensor([node.kind in ("head", "bias") for node in lm.parts], device=context.device)
        yield torch.stack([torch.where(attention[:, None, None], query, context), context])


def _at(lm: Model, run: Clean, folded: tuple, row: int) -> Float[Tensor, "node text d_model"]:
    texts = len(run.record.z[0])
    return expand(lm, folded, run.record.writes.map(lambda part: part.expand(texts, *part.shape[1:])[:, row]))


def _queried(own: Clean, donors: Clean, row: int) -> Clean:
    """The prompt's run in which every block by itself reads the donors' stream at `row`, post-norms held."""

    def donated(index: int, x: Tensor) -> Tensor:
        mixed = x.clone()
        mixed[:, row] = donors.input(index)[:, row]
        return mixed

    return each_block(own, donated)
