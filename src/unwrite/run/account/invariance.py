"""Would a node write the same if it read another text? Its direct reading, with what it reads replaced.

query     only the read row's input of the node comes from another text; earlier keys and values stay the prompt's
          (Dao, Lau, Rager, Janiak 2023, Fig. 4). An MLP reads one row, so for it all of the write is the other text's.
context   the write at the same position of the other text.

Final norm, post-norms and the logit difference asked about stay those of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.cache import Handed
from unwrite.model.capture import Recording, recording
from unwrite.model.continued import Calls, block_from
from unwrite.nodes import PROJECTED
from unwrite.run.account.readings import Asked, Direct
from unwrite.run.loop.finite import not_finite
from unwrite.run.replay.clean import clean
from unwrite.run.replay.removed import alone
from unwrite.run.source.writes import Pool

REPLACED = ("query", "context")
QUARTILES = (0.25, 0.5, 0.75)
_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class _Donors:
    """Some texts at one row: what each block reads there, what nodes write there, and how blocks are called there."""

    text: Int[np.ndarray, " text"]
    reads: Sequence[Float[Tensor, "text d_model"]]
    record: Recording
    calls: Calls


def invariance(asked: Asked, pool: Pool, first: int, real: int) -> Iterator[Float[Tensor, "replaced node quartile"]]:
    """Of each of the batch's `real` prompts: quartiles of every node's direct reading over texts; NaN below two."""
    direct, donors = Direct(asked), dict[int, list[_Donors]]()
    for i in range(real):
        row = int(asked.row[i])
        texts = pool.others(first + i, row)
        if len(texts) < 2:
            nothing = direct.linear[0].new_full((), torch.nan)
            yield nothing.expand(len(REPLACED), len(asked.lm.parts), len(QUARTILES))
            continue
        if row not in donors:
            donors[row] = [*_donors(asked, pool, row)]
        others = torch.from_numpy(np.isin(np.concatenate([part.text for part in donors[row]]), texts))
        values = torch.cat([_values(asked, direct, i, part) for part in donors[row]], -1)
        values = values[..., others.to(values.device)]
        if not values.isfinite().all():
            what = f"a node's direct reading for prompt {first + i} is not finite when it reads other texts"
            raise not_finite(what, "leave texts out that are not read well")
        quartiles = torch.tensor(QUARTILES, dtype=values.dtype, device=values.device)
        yield torch.quantile(values, quartiles, dim=2).movedim(0, 2)


def _donors(asked: Asked, pool: Pool, row: int) -> Iterator[_Donors]:
    """All texts that reach a row, some at a time."""
    lm, base = asked.lm, asked.base
    texts = np.flatnonzero(pool.tokens.lengths > row)
    calls = base.calls(row, row + 1) if base.kept else alone(lm, asked.ids)
    step = max(1, _BATCH_TOKENS // (row + 1))
    for some in (texts[start : start + step] for start in range(0, len(texts), step)):
        run = clean(lm, torch.from_numpy(pool.tokens.ids[some, : row + 1]), asked.folded)
        at_row = run.record.writes.map(partial(_at, n=len(some), row=row))
        record = Recording(dict(at_row.z), dict(at_row.gain), dict(at_row.vectors))
        yield _Donors(some, [run.input(i)[:, row].clone() for i in range(len(lm.layers))], record, calls)


def _at(part: Tensor, n: int, row: int) -> Tensor:
    """A factor of every text at one row."""
    return part.expand(n, *part.shape[1:])[:, row].clone()


def _values(asked: Asked, direct: Direct, i: int, donors: _Donors) -> Float[Tensor, "replaced node text"]:
    """Direct readings when the read row, or everything, comes from other texts."""
    lm, prompt = asked.lm, torch.full((len(donors.text),), i, device=asked.row.device)
    context = torch.cat([direct.of(layer, donors.record, lambda x: x, prompt) for layer in direct.nodes])
    with recording(lm, asked.folded) as record:
        query = [direct.of(-1, donors.record, lambda x: x, prompt)]
        for layer, reads in enumerate(donors.reads):
            at = _queried(asked, i, layer, reads, donors.calls, prompt)
            if layer in record.gain:
                held = asked.run.record.gain[layer][i, asked.row[i]]
                record.z[layer] = record.z[layer] * (held / record.gain[layer])[..., None, None]
                record.gain[layer] = held.expand_as(record.gain[layer])
            query.append(direct.of(layer, record, lambda x, at=at: x[:, at], prompt))
    attention = torch.tensor([node.kind in (*PROJECTED, "bias") for node in lm.parts], device=context.device)
    return torch.stack([torch.where(attention[:, None], torch.cat(query), context), context])


@torch.no_grad()
def _queried(asked: Asked, i: int, layer: int, reads: Tensor, calls: Calls, prompt: Tensor) -> int:
    """Run one block of a prompt's run with what others read at the read row; where that row is in what it brings."""
    base, row = asked.base, int(asked.row[i])
    if base.kept:
        block_from(asked.lm, base.kept, layer, reads[:, None], prompt, row, calls, Handed())
        return 0
    mixed = asked.run.input(layer)[i].expand(len(reads), -1, -1).clone()
    mixed[:, row] = reads.to(mixed)
    block_from(asked.lm, (), layer, mixed, prompt, 0, calls, Handed())
    return row
