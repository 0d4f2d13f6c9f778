"""On which prompts does direct logit attribution mislead most about a node? A search through a corpus, with base rates.

At every position the question is the model's own top two logits. A hit is a position where the writer's direct reading
is large, its executed total effect is small, and the reading hardly depends on the text: the write's mean over prompts
at that position gives nearly the same. (Dao, Lau, Rager, Janiak 2023, arXiv 2310.07325, section 4, chose such prompts
by hand.) A search always finds something, so hits are counted against positions searched, against the same search for
randomly turned writes, and again on text that was not searched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from unwrite.errors import whole
from unwrite.model.capture import Recording
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.model.writes import write_of
from unwrite.nodes import Node, choose, parse_node
from unwrite.prompts.tokens import Tokens, spelled
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import Question, linear, measure, top_two
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, parts, stream
from unwrite.run.replay.clean import clean
from unwrite.run.replay.edited import added
from unwrite.run.source.rotations import rotations
from unwrite.run.source.writes import Pool

# Large: direct is at least this part of the logit difference. Small: at most this part of direct.
LARGE = 0.25
SMALL = 0.25
GENERIC = 5
TEXTS = ("searched", "held_out")
SOURCES = ("writer", "generic")


def adversarial(
    lm: Model,
    tokens: Any,
    writer: object,
    held_out: Any = None,
    n: int = 4,
    skip: int = 1,
    *,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """The `n` prompts on which a node's direct attribution is largest and its effect and dependence on the text small.

    Arguments: `tokens` the corpus that is searched, and `held_out` one that is not, as `uw.scan` takes them; `writer`
    one node; `skip` positions at the start of each prompt are left out. At most one hit is kept of each prompt.
    Returns a Result: by hit `direct`, `direct_mean` (that of the position's mean write; the rest depends on the text),
    `total` (logit_diff − logit_diff without the writer's writes, executed), `logit_diff`, `prompt`, `row`, `answer`,
    `against`, and the tokens up to there `ids[hit, position]` (−1 where the prompt is over); by text and source
    (writer, generic: 5 random rotations of the write) `hits`, `positions` and `rate`.
    Raises NodeError for an unknown writer, TokensError as `uw.scan`.

    Example: `uw.adversarial(lm, tokens, "L0H2").data[["direct", "total"]]`
    """
    whole("n is a number of prompts", n, 0)
    texts = [admit(lm, tokens, None, skip, bos)]
    texts += [] if held_out is None else [admit(lm, held_out, None, skip, bos)]
    lm.require("logits")
    node = choose([parse_node(writer)], lm.parts)[0]
    sizes = [batch_size(lm, part, batch, held=4) for part in texts]
    settings = {"writer": str(node), "n": n, "skip": skip, "batch": batch}
    about = {name: part.about() for name, part in zip(TEXTS, texts, strict=False)}
    with opened(checkpoint, listener) as job:
        if done := job.begin("adversarial", lm, {name: part["hash"] for name, part in about.items()}, settings):
            return done
        tallies = []
        for name, part, size in zip(TEXTS, texts, sizes, strict=False):
            tallies.append(_Search(lm, part, node, skip, n))
            stage = f"search {node} ({name.replace('_', ' ')})"
            stream(lm, part, tallies[-1], size, stage, listener, job)
        return job.signed(build("adversarial", _dataset(lm, tallies, node), settings, provenance(lm), about))


class _Search:
    """Counts of hits, and the best hit of every prompt."""

    def __init__(self, lm: Model, tokens: Tokens, writer: Node, skip: int, n: int):
        self.lm, self.tokens, self.writer, self.skip, self.n = lm, tokens, writer, skip, n
        self.folded = fold(lm)
        pool = Pool(lm, self.folded, tokens, own=True)
        self._mean, self._known = pool.mean(writer), pool.has_mean
        self._turns = list(rotations(lm, GENERIC))
        self.counts = np.zeros((len(SOURCES), 2), dtype=np.int64)  # [source, (hits, positions)]
        self._best = {"": np.array("[]")}  # JSON, since hits are of many lengths
        self.kept = Ledger({"counts": self.counts, "best": self._best})

    def step(self, batch: Batch) -> None:
        """One clean run, one without the write, one for every rotation."""
        best = self.best
        for _, (found, hits) in parts(batch, self._measured):
            self.counts += found
            best += hits
        best = _distinct(sorted(best, key=lambda one: -one["score"]))[: self.n]
        self._best[""] = np.array(json.dumps(best))

    @property
    def best(self) -> list[dict[str, Any]]:
        """The best hit of every prompt, best first."""
        return json.loads(str(self._best[""]))

    def _measured(self, batch: Batch) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Counts [source, (hits, positions)] and the hits of a part of a batch."""
        run = clean(self.lm, batch.ids, self.folded)
        final = run.record.stream[self.lm.states[-1]]
        question = top_two(self.lm, final)
        r, _ = linear(self.lm, question, final)
        difference = measure(self.lm, question, final)
        kept = (batch.beyond(self.skip) & self._known[: batch.ids.shape[1]]).to(self.lm.device)
        write = write_of(self.lm, self.folded, run.record.writes, self.writer).expand_as(final)
        mean = self._mean[: write.shape[1]]
        counts, best = np.zeros_like(self.counts), []
        for number, turn in enumerate([None, *self._turns]):
            turned, typical = (part if turn is None else part @ turn for part in (write, mean))
            found = {
                "logit_diff": difference,
                "direct": (turned * r).sum(-1),
                "direct_mean": (typical * r).sum(-1),
                "total": difference - self._measure(question, added(run, self.writer, -turned)),
            }
            finite = torch.stack([part.isfinite() for part in found.values()]).all(0)
            batch.require_numbers(finite | ~kept, "what the writer does to the logits")
            hit = _hits(found) & kept
            counts[int(number > 0)] += (int(hit.sum()), int(kept.sum()))
            if turn is None:
                best = list(self._candidates(batch, question, found, hit))
        return counts, best

    def _measure(self, question: Question, record: Recording) -> Tensor:
        return measure(self.lm, question, record.stream[self.lm.states[-1]])

    def _candidates(
        self, batch: Batch, question: Question, found: dict[str, Tensor], hit: Tensor
    ) -> Iterator[dict[str, Any]]:
        # By how much the reading overstates the effect, in logits; the best of each prompt.
        score = torch.where(hit, found["direct"].abs() - found["total"].abs(), -torch.inf)
        value, row = score[: batch.real].max(1)
        other = question.answer if question.against is None else question.against
        for i in torch.isfinite(value).nonzero()[:, 0].tolist():
            place = (i, int(row[i]))
            numbers = {name: float(part[place]) for name, part in found.items()}
            said = batch.ids[i, : place[1] + 1].tolist()
            ids = {f"{name}_id": int(part[place]) for name, part in (("answer", question.answer), ("against", other))}
            yield {"score": float(value[i]), "prompt": batch.first + i, "row": place[1], "said": said, **ids, **numbers}


def _distinct(ranked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of every text: prompts of a corpus begin alike."""
    first: dict[tuple[int, ...], dict[str, Any]] = {}
    for one in ranked:
        first.setdefault(tuple(one["said"]), one)
    return list(first.values())


def _hits(found: dict[str, Tensor]) -> Tensor:
    direct = found["direct"].abs()
    large = direct >= LARGE * found["logit_diff"].abs()
    rest = (found["direct"] - found["direct_mean"]).abs()
    return large & (found["total"].abs() <= SMALL * direct) & (rest <= SMALL * direct) & (direct > 0)


def _dataset(lm: Model, tallies: list[_Search], writer: Node) -> xr.Dataset:
    counts = np.stack([tally.counts for tally in tallies])
    best = tallies[0].best
    ids = np.full((len(best), max((one["row"] + 1 for one in best), default=0)), -1)
    for row, one in zip(ids, best, strict=True):
        row[: len(one["said"])] = one["said"]
    axes = ("text", "source")
    with np.errstate(invalid="ignore"):
        rate = counts[..., 0] / counts[..., 1]
    whole = {name: np.array([one[name] for one in best], dtype=np.int64) for name in _WHERE}
    return xr.Dataset(
        {
            **{name: quantity(("hit",), np.array([one[name] for one in best]), "logit", _SAYS[name]) for name in _SAYS},
            **{name: ("hit", part) for name, part in whole.items()},
            "answer": ("hit", _words(lm, whole["answer_id"])),
            "against": ("hit", _words(lm, whole["against_id"])),
            "ids": (("hit", "position"), ids),
            "hits": quantity(axes, counts[..., 0].astype(np.int64), "1", "positions that are hits"),
            "positions": quantity(axes, counts[..., 1].astype(np.int64), "1", "positions searched"),
            "rate": quantity(axes, rate, "1", "hits / positions"),
        },
        {
            "text": list(TEXTS[: len(tallies)]),
            "source": list(SOURCES),
            "hit": np.arange(len(best)),
            "token": (("hit", "position"), np.reshape(_words(lm, ids.ravel()), ids.shape)),
        },
    ).assign_attrs(writer=str(writer))


_WHERE = ("prompt", "row", "answer_id", "against_id")
_SAYS = {
    "logit_diff": "the model's highest logit − its second",
    "direct": "⟨write, final norm and unembedding at the clean scale⟩",
    "direct_mean": "the same of the mean write at this position",
    "total": "logit_diff − logit_diff without the writer's writes, executed",
}


def _words(lm: Model, ids: np.ndarray) -> np.ndarray:
    # Of no words at all a file would not know that they are words.
    said = {i: spelled([i], lm.tokenizer) if i >= 0 else "" for i in set(ids.tolist())}
    return np.array([said[i] for i in ids.tolist()], dtype=object if len(ids) else str)
