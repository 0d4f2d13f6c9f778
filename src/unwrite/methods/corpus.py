"""Do a writer's direct attribution and its erasers' cancel, over a whole corpus? The paper's Figure 5, streamed.

At every position, x = what the writer's write does to a logit difference through the frozen final norm, y = the same
of its erasers: `raw`, all that they write; `values`, only what they write because their values read the writer (eq. 3,
with attention weights); `same_position`, eq. 3 without them, as if every head attended to its own position (the
authors' published script). Perfect clean-up is a correlation and a slope of −1. (Dao, Lau, Rager, Janiak 2023, arXiv
2310.07325, Figure 5)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from unwrite.errors import one_of
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.values import through_values
from unwrite.model.view import Model
from unwrite.model.writes import write_of
from unwrite.nodes import Node, choose, parse_node, require_readers
from unwrite.prompts.tokens import Tokens
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import Question, linear, top_two
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, parts, stream
from unwrite.run.replay.clean import Clean, clean
from unwrite.stats.bootstrap import fit, interval, moments
from unwrite.stats.mergeable import Tree

PATHS = ("raw", "values", "same_position")
# Of all positions, about so many are kept to be drawn, spread evenly.
DRAWN = 2000
LOGITS = ("top two", "next token")


def corpus_dla(
    lm: Model,
    tokens: Any,
    writer: object,
    erasers: Iterable[object],
    skip: int = 1,
    logit: str = "top two",
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """Correlation and slope between a writer's direct attribution and that of its erasers, over every position.

    Arguments: `writer` one node, `erasers` heads of later layers (such as those that `uw.verify` names); `skip`
    positions at the start of each prompt are left out; `logit` "top two", the difference of the model's two highest
    logits, or "next token", the logit of the token that comes next minus the mean logit.
    Returns a Result: by path (raw, values, same_position) `correlation` with a 95 % interval from resampled prompts
    (`correlation_low`, `correlation_high`), `slope`, `intercept`; `n` positions; of about 2,000 of these the
    attributions themselves, `sample_x` of the writer and `sample_y` of its erasers.
    Raises NodeError for nodes that the model does not have or erasers that cannot read the writer; NumericError for an
    unknown `logit`; TokensError as `uw.scan`.

    Example: `uw.corpus_dla(lm, tokens, "L0H2", ["L2H2", "L2H5"])["correlation"]`
    """
    tokens = admit(lm, tokens, mask, skip, bos)
    one_of("logit", logit, LOGITS)
    lm.require("logits")
    node = choose([parse_node(writer)], lm.parts)[0]
    named = require_readers(choose(erasers, lm.parts), node, lm.carriers(node))
    size = batch_size(lm, tokens, batch, held=4)
    settings = {"writer": str(node), "erasers": [str(e) for e in named], "skip": skip, "logit": logit, "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("corpus_dla", lm, {"": tokens.hash}, settings):
            return done
        tally = _Tally(lm, tokens, node, named, skip, logit)
        stream(lm, tokens, tally, size, f"corpus {node}", listener, job)
        return job.signed(build("corpus_dla", tally.dataset(), settings, provenance(lm), {"": tokens.about()}))


class _Tally:
    """Moments of (x, y) by path, summed over every prompt's positions."""

    def __init__(self, lm: Model, tokens: Tokens, writer: Node, erasers: tuple[Node, ...], skip: int, logit: str):
        self.lm, self.tokens, self.writer, self.erasers, self.skip, self.logit = (
            lm,
            tokens,
            writer,
            erasers,
            skip,
            logit,
        )
        self.folded = fold(lm)
        self._stride = -(-int(tokens.lengths.sum()) // DRAWN)
        self._sums = Tree[Tensor](add)
        self._sample = Tree[Tensor](lambda first, second: torch.cat([first, second], 1))
        self.kept = Ledger({"sums": self._sums, "sample": self._sample})

    def step(self, batch: Batch) -> None:
        """Read both attributions at every position of a batch."""
        sums, samples = zip(*(found for _, found in parts(batch, self._measured)), strict=True)
        self._sums.add(batch.index, torch.from_numpy(reduce(add, sums)))
        self._sample.add(batch.index, torch.from_numpy(np.concatenate(samples, 1)))

    def _measured(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Moments [cluster, path, moment] of a part of a batch, and some of its attributions [x or path, point]."""
        run = clean(self.lm, batch.ids, self.folded, with_patterns=True)
        kept, question = self._asked(batch, run)
        r, _ = linear(self.lm, question, run.record.stream[self.lm.states[-1]])
        along = [(part * r).sum(-1) for part in self._writes(run)]
        finite = torch.stack([part.isfinite() for part in along]).all(0)
        batch.require_numbers(finite | ~kept, "the attribution of the writer or its erasers")
        x, *ys = (torch.where(kept, part, 0).double().cpu().numpy() for part in along)
        counted = kept.cpu().numpy()
        sums = np.zeros((int(self.tokens.cluster.max()) + 1, len(PATHS), 6))
        for path, y in enumerate(ys):
            of_rows = moments(x, y) * counted
            np.add.at(sums[:, path], self._cluster(batch), of_rows.sum(2).T[: batch.real])
        drawn = counted & (sum(np.ogrid[batch.first : batch.first + len(x), : x.shape[1]]) % self._stride == 0)
        drawn[batch.real :] = False
        return sums, np.stack([x, *ys])[:, drawn]

    def _cluster(self, batch: Batch) -> np.ndarray:
        return self.tokens.cluster[batch.first : batch.first + batch.real]

    def _asked(self, batch: Batch, run: Clean) -> tuple[Tensor, Question]:
        kept = batch.beyond(self.skip).to(self.lm.device)
        if self.logit == LOGITS[0]:
            return kept, top_two(self.lm, run.record.stream[self.lm.states[-1]])
        following = batch.ids.roll(-1, 1).to(self.lm.device)
        has_next = batch.counted.roll(-1, 1).to(self.lm.device)
        has_next[:, -1] = False
        return kept & has_next, Question(following, centred=True)

    def _writes(self, run: Clean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the writer writes; of the erasers, in sum: all, through values, through values without pattern."""
        write, *others = (write_of(self.lm, self.folded, run.record.writes, e) for e in (self.writer, *self.erasers))
        write = write.expand_as(run.record.stream[self.lm.states[-1]])  # positions are embedded once for all prompts
        raw, values, own = sum(others, torch.zeros_like(write)), torch.zeros_like(write), torch.zeros_like(write)
        for layer in sorted({node.layer for node in self.erasers}):
            heads = [node.head for node in self.erasers if node.layer == layer]
            values += run.carried(layer, write)[:, :, heads].sum(2)
            block, pattern = self.lm.layers[layer], run.patterns[layer]
            itself = torch.eye(pattern.shape[-1], dtype=pattern.dtype, device=pattern.device).expand_as(pattern)
            gate = run.patterns.gate.get(layer)
            z = run.post_scaled(block, through_values(self.lm, block, itself, write, run.scale(block), gate))
            own += torch.einsum("bthk,hkd->btd", z[:, :, heads], self.folded[layer].w_o[heads])
        return write, raw, values, own

    def dataset(self) -> xr.Dataset:
        """Correlation, slope, intercept and interval by path."""
        sums = self._sums.total().numpy()
        sums = sums[sums[:, 0, 0] > 0]
        found = np.array([self._fitted(sums[:, path].T[:, :, None]) for path in range(len(PATHS))]).T
        equations = {
            "correlation": "of x = direct(writer) and y = Σ direct(erasers)", "slope": "of y on x",
            "intercept": "of y on x, in logits", "correlation_low": "2.5 % over resampled prompts",
            "correlation_high": "97.5 % over resampled prompts",
        }  # fmt: skip
        variables = {
            name: quantity(("path",), row, "logit" if name == "intercept" else "1", text)
            for row, (name, text) in zip(found, equations.items(), strict=True)
        }
        n = quantity((), np.asarray(int(sums[:, 0, 0].sum())), "1", "positions")
        x, *ys = self._sample.total().numpy()
        sample = {
            "sample_x": quantity(("point",), x, "logit", "direct(writer)"),
            "sample_y": quantity(("path", "point"), np.stack(ys), "logit", "Σ direct(erasers)"),
        }
        return xr.Dataset({**variables, **sample, "n": n}, {"path": list(PATHS)}).assign_attrs(
            writer=str(self.writer), erasers=" ".join(map(str, self.erasers))
        )

    def _fitted(self, sums: np.ndarray) -> tuple[float, ...]:
        whole = sums.sum(1, keepdims=True)
        correlation, slope = (float(part[0]) for part in fit(whole))
        n, x, y = whole[:3, 0, 0]
        return (correlation, slope, (y - slope * x) / n, *interval(sums))
