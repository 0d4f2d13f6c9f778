"""What does each node do to a logit, by four readings and in truth, and which of the readings can be believed here?

Direct logit attribution credits a writer and debits its eraser for contributions that cancel (Dao, Lau, Rager, Janiak
2023, arXiv 2310.07325). So every reading stands beside `total`, the executed truth, and `trust` says how well each
predicts it in this very model. (facts: measuring erasure, §7)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from unwrite.errors import NumericError, TokensError, counted, one_of, require
from unwrite.model.fold import fold
from unwrite.model.load import provenance
from unwrite.model.projections import sizes
from unwrite.model.view import Model
from unwrite.nodes import MLPS, PROJECTED
from unwrite.prompts.answers import asked_for, compared
from unwrite.prompts.positions import rows_at
from unwrite.prompts.tokens import Tokens, read_rows, spelled
from unwrite.result import Result, build, quantity
from unwrite.run.account.invariance import QUARTILES, REPLACED, invariance
from unwrite.run.account.readings import PARTS, READINGS, Asked, readings
from unwrite.run.account.totals import totals
from unwrite.run.answer.logits import Question, top_two
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Begun, Ledger
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, stream
from unwrite.run.replay.clean import clean
from unwrite.run.source.writes import REPLACEMENTS, Pool, Replaced
from unwrite.stats.fate import fates, input_blind
from unwrite.stats.trust import FORMS, trust

AT = ("all", "position")
# Whatever is asked for, trust is measured for these.
TRUSTED = ("zero", "mean")
_TRUST = {
    "trust": "correlation of the reading with total",
    "trust_low": "2.5 %: t interval over independent prompts, Fisher's z; none below six of them",
    "trust_high": "97.5 %: as trust_low",
    "trust_slope": "slope of total on the reading",
    "trust_same_sign": "cells whose signs agree, of those whose total is at least 5 % of the prompt's largest",
}
_COUNTS = {
    "trust_n": "cells: prompts × nodes",
    "trust_clusters": "independent prompts",
}


@dataclass(frozen=True, eq=False)
class _Request:
    """What is asked: of which prompts, at which row, which logits; what stands in for a write, and where."""

    tokens: Tokens
    row: np.ndarray
    answer: np.ndarray | None
    against: np.ndarray | None
    at: str
    replace: str
    pool: Pool
    total: bool

    @property
    def replacements(self) -> tuple[str, ...]:
        """What stands in for writes: trust is about the first two, whatever is asked for."""
        return tuple(dict.fromkeys((*TRUSTED * self.total, self.replace)))

    @property
    def questions(self) -> dict[str, np.ndarray | None]:
        """The tokens asked about, by name."""
        return {"answer": self.answer, "against": self.against}


@torch.inference_mode(False)  # a backward pass is needed, also where the caller has none in mind
def dla(
    lm: Model,
    prompts: Any,
    answer: Any = None,
    against: Any = None,
    position: Any = -1,
    at: str = "all",
    replace: str = "zero",
    texts: Any = None,
    *,
    total: bool = True,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What every node's write does to a logit or a logit difference: direct, net, relp, gradient, and the truth.

    Arguments: `prompts` a string, a list of strings, or anything else that `uw.scan` takes (a string is always the
    prompt itself), with `mask` and `bos` as there; `answer` and `against` a token each, or one for every prompt: its
    id, or the text by which it continues the prompt ("The girl play" + "s"); the logit difference is answer − against,
    the logit of answer alone without `against`, and without both the model's own highest logit against its second;
    against lists of as many tokens for every prompt it is the mean of theirs (of all choices: a centred logit);
    `position` the row that is read, one number or one for every prompt (without padding; −1: the last token); `at`
    "all" replaces a node's writes at every row, "position" at the read row only; `replace` "zero", "mean" (at that
    position, over the prompts or `texts`) or "resample" (another prompt's, or one of `texts`); `texts`, as `uw.scan`
    takes them, at least as long as the prompts, for means, donors and invariance; without `total`, nothing is executed
    and at most five forward passes read the prompts (more only for means and donors).
    Returns a Result: by [prompt, node] the readings `direct` (Σ direct + constant + unexplained = logit_diff, zero
    replacement), `net`, `relp`, `gradient`, and `total` = logit_diff − logit_diff with the write replaced, executed;
    `why[prompt, node, part]`, the exact account of total at the read row; `fate` (only at="position"); `invariance`,
    the median of direct over texts when the query or the context comes from them, relative to direct, with its
    quartiles in `other_direct`; `input_blind`; by prompt `logit_diff` (before a soft-cap), `capped`, `constant`,
    `unexplained`; and `trust[reading, group, form, replacement]`, the correlation with total, its interval (none below
    six independent prompts) and counts. Without `total` there are the readings and what is by prompt, and no more.
    Raises TokensError for a token that is not one token, a position outside its prompt, a prompt of one token, or texts
    that are too short; NumericError for unknown settings.

    Example: `uw.dla(lm, "The capital of France is", " Paris", " London").table()`
    """
    request = _request(lm, prompts, answer, against, position, at, replace, texts, mask, bos, total)
    settings = {"position": request.row.tolist(), "at": at, "replace": replace, "batch": batch, "total": total}
    settings["texts"] = None if texts is None else request.pool.tokens.about()
    # Beside a run's own factors, four sets of cotangents and the writes of one node are held.
    size = batch_size(lm, request.tokens, batch, held=4)
    asked = {name: None if ids is None else ids.tolist() for name, ids in request.questions.items()}
    with opened(checkpoint, listener) as job:
        if done := job.begin("dla", lm, {"": request.tokens.hash}, {**settings, **asked}):
            return done
        tally = _Tally(lm, request, job)
        stream(lm, request.tokens, tally, size, "dla", listener, job)
        data = _Found(lm, request, tally.whole()).dataset()
        return job.signed(build("dla", data, settings, provenance(lm), {"": request.tokens.about()}))


def _request(
    lm: Model,
    source: Any,
    answer: Any,
    against: Any,
    position: Any,
    at: str,
    replace: str,
    texts: Any,
    mask: Any,
    bos: int | bool | None,
    total: bool,
) -> _Request:
    one_of("at", at, AT)
    one_of("replace", replace, REPLACEMENTS)
    require(isinstance(total, bool), NumericError, "total is a choice", total, "True or False")
    tokens = admit(lm, source, mask, 0, bos, files=False, sees=True)
    lm.require("logits")
    if (tokens.lengths < 2).any():
        raise TokensError(
            f"prompt {int(tokens.lengths.argmin())} is one token long",
            expected="two or more, so that heads have a choice",
        )
    row = read_rows(position, tokens)
    pool = Pool(lm, fold(lm), tokens if texts is None else _texts(lm, texts, row, bos), own=texts is None)
    if replace != "zero" and len(pool.tokens) < 2:
        raise TokensError(f"replace={replace!r} needs other texts", got="1 prompt", fix="pass texts=, or more prompts")
    chosen, other = compared(answer, against, tokens, row, lm.tokenizer, min(lm.vocabulary, sizes(lm.head)[1]))
    return _Request(tokens, row, chosen, other, at, replace, pool, total)


def _texts(lm: Model, texts: Any, row: np.ndarray, bos: int | bool | None) -> Tokens:
    tokens = admit(lm, texts, None, 0, None if isinstance(texts, Tokens) else bos, sees=True)
    if int(tokens.lengths.min()) <= int(row.max()):
        raise TokensError(
            "texts are shorter than the prompts", got=counted(int(tokens.lengths.min()), "token"),
            expected=f"at least {int(row.max()) + 1}", fix="cut them longer with uw.text(…, length=…)",
        )  # fmt: skip
    return tokens


class _Tally:
    """What is measured of every prompt, batch by batch; of executed runs also those of the batch that is not done."""

    def __init__(self, lm: Model, request: _Request, job: Job):
        self._lm, self._request, self._job = lm, request, job
        self._rows, self._begun = Rows(self._measured), Begun()
        self.kept = Ledger({"done": self._rows.kept, "begun": self._begun.kept})
        self.step, self.whole = self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> dict[str, np.ndarray]:
        """All readings and, where it is asked for, the truth, by what stands in for a write."""
        lm, request = self._lm, self._request
        prompt = list(range(batch.first, batch.first + batch.real))
        run = clean(lm, batch.ids, request.pool.folded)
        row = torch.from_numpy(request.row[prompt]).to(lm.device)
        question = _question(lm, request, prompt, run.record.stream[lm.states[-1]], row)
        asked = Asked(run, batch.ids.to(lm.device), row, question)
        found = asked.sums() | {"answer": question.answer}
        if question.against is not None:
            found["against"] = question.against
        require_finite(found["logit_diff"].isfinite(), "the logits of {prompt} are not finite", prompt=batch.first)
        replaced = _replaced(request, batch, asked)
        slopes = asked.cotangents()
        for name, one in replaced.items():
            parts = {f"{key} {name}": part for key, part in readings(asked, slopes, one).items()}
            found |= _known(batch, one, parts)
        if request.total:
            found["other_direct"] = self._other(batch, asked)
            executed = self._executed(batch, asked, replaced)
            for name, one in replaced.items():
                found |= _known(batch, one, {key: executed[key] for key in (f"total {name}", f"why {name}")})
        return {name: part.double().cpu().numpy() for name, part in found.items()}

    def _other(self, batch: Batch, asked: Asked) -> Tensor:
        found = []
        for one in invariance(asked, self._request.pool, batch.first, batch.real):
            found.append(one)
            self._job.tick(self.kept)
        return torch.stack(found)

    def _executed(self, batch: Batch, asked: Asked, replaced: Mapping[str, Replaced]) -> dict[str, Tensor]:
        """`total` and `why` by replacement; nodes go up together, and what is done of them lasts."""
        name, nodes = f"prompts {batch.first} to {batch.first + batch.real}", len(self._lm.nodes)
        new = asked.run.record.stream[self._lm.states[-1]].new_zeros
        empty = {f"total {one}": new(batch.real, nodes) for one in replaced}
        empty |= {f"why {one}": new(batch.real, nodes, len(PARTS)) for one in replaced}
        found, done = self._begun.held(name, empty)

        def tick(chunks: int, share: float) -> None:
            nonlocal done
            if chunks > done:
                done = chunks
                self._begun.keep(name, found, done)
            self._job.tick(self.kept, share, f"{int(share * nodes)}/{nodes} nodes")

        totals(asked, replaced, found, done, tick)
        self._begun.clear()
        return found


def _replaced(request: _Request, batch: Batch, asked: Asked) -> dict[str, Replaced]:
    """What stands in for writes, by name."""
    writes = asked.run.record.writes.map(lambda part: part.expand(batch.real, *part.shape[1:]))
    place = torch.arange(batch.ids.shape[1], device=asked.row.device)
    where = rows_at(request.at, asked.row, place)
    return {name: request.pool.replaced(name, batch, writes, where) for name in request.replacements}


def _known(batch: Batch, replaced: Replaced, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of prompts that have a replacement, NaN for others. Raises NumericError for what is no number."""
    for key, part in found.items():
        finite = part.isfinite().flatten(1).all(1) | ~replaced.known
        name, _, replacement = key.partition(" ")
        says = f"{name} ({replacement} replacement) of {{prompt}} are not finite"
        require_finite(finite, says, prompt=batch.first)
        part[~replaced.known] = torch.nan
    return found


def _question(lm: Model, request: _Request, prompt: list[int], final: Tensor, row: Tensor) -> Question:
    if request.answer is None:
        return top_two(lm, final[torch.arange(len(row)), row])
    answer = torch.from_numpy(request.answer[prompt]).to(row.device)
    against = request.against
    return Question(answer, None if against is None else torch.from_numpy(against[prompt]).to(row.device))


@dataclass(frozen=True, eq=False)
class _Found:
    """What was measured of every prompt, by name."""

    lm: Model
    request: _Request
    value: dict[str, np.ndarray]

    def dataset(self) -> xr.Dataset:
        """Everything that was kept, named."""
        value, request = self.value, self.request
        variables = {name: self._cell(name) for name in READINGS}
        variables |= {name: quantity(("prompt",), value[name], "logit", text) for name, text in _SUMS.items()}
        axes = {"prompt": np.arange(len(request.tokens)), "node": list(self.lm.nodes)}
        found = xr.Dataset({**variables, **self._words(value)}, axes).assign_attrs(n_prompts=len(request.tokens))
        return found.merge(self._executed(), combine_attrs="no_conflicts") if request.total else found

    def _cell(self, name: str) -> Any:
        """A number of every prompt and node, for the replacement that was asked for."""
        return quantity(("prompt", "node"), self.value[f"{name} {self.request.replace}"], "logit", _EQUATIONS[name])

    def _executed(self) -> xr.Dataset:
        """What executed runs said, and what rests on it."""
        value, request, cells = self.value, self.request, ("prompt", "node")
        why, other = value[f"why {request.replace}"], value["other_direct"]
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = other[..., 1] / value["direct zero"][:, None]
        variables = {
            "total": self._cell("total"),
            "why": quantity((*cells, "part"), why, "logit", "exact account of total at the read row"),
            "fate": (cells, fates(why, value[f"total {request.replace}"], request.at)),
            "other_direct": quantity(
                ("prompt", "replaced", "node", "quartile"), other, "logit", "direct, the query or all from other texts"
            ),
            "invariance": quantity(("prompt", "replaced", "node"), relative, "1", "median of other_direct / direct"),
            "input_blind": (cells, input_blind(value["direct zero"], other)),
            **self._trust(value),
        }
        axes = {
            "part": list(PARTS), "replaced": list(REPLACED), "quartile": list(QUARTILES), "reading": list(READINGS),
            "group": list(groups(self.lm)), "form": list(FORMS), "replacement": list(TRUSTED),
        }  # fmt: skip
        note = "" if np.isfinite(other).any() else "fewer than two other texts reach the read row"
        return xr.Dataset(variables, axes).assign_attrs(invariance_note=note)

    def _words(self, value: dict[str, np.ndarray]) -> dict[str, Any]:
        request, tokenizer, tokens = self.request, self.lm.tokenizer, self.request.tokens
        asked = {name: value[name].astype(int) for name in ("answer", "against") if name in value}
        words = {name: [asked_for(one, tokenizer) for one in ids.tolist()] for name, ids in asked.items()}
        words["prompt_text"] = [
            spelled(ids[: n + 1], tokenizer) for ids, n in zip(tokens.written, request.row, strict=True)
        ]
        return {
            **{name: ("prompt", np.array(part, dtype=object)) for name, part in words.items()},
            **{f"{name}_id": (("prompt", "option")[: ids.ndim], ids) for name, ids in asked.items()},
            "row": ("prompt", request.row),
            "cluster": ("prompt", tokens.cluster),
        }

    def _trust(self, value: dict[str, np.ndarray]) -> dict[str, Any]:
        axes = ("reading", "group", "form", "replacement")
        found = np.full((len(_TRUST), len(READINGS), len(groups(self.lm)), len(FORMS), len(TRUSTED)), np.nan)
        counts = np.zeros((len(_COUNTS), *found.shape[1:]), dtype=np.int64)
        for place, kept, name, form, with_ in self._cells():
            cells = [value[f"{part} {with_}"][:, kept] for part in (name, "total")]
            one = trust(cells[0], cells[1], self.request.tokens.cluster, form)
            found[(slice(None), *place)] = (one.correlation, one.low, one.high, one.slope, one.same_sign)
            counts[(slice(None), *place)] = (one.n, one.clusters)
        texts, parts = _TRUST | _COUNTS, [*found, *counts]
        return {name: quantity(axes, part, "1", texts[name]) for name, part in zip(texts, parts, strict=True)}

    def _cells(self) -> Iterator[tuple[tuple[int, int, int, int], list[int], str, str, str]]:
        for g, kept in enumerate(groups(self.lm).values()):
            for r, name in enumerate(READINGS):
                for f, form in enumerate(FORMS):
                    for w, with_ in enumerate(TRUSTED):
                        yield (r, g, f, w), kept, name, form, with_


_EQUATIONS = {
    "direct": "⟨write − replacement, final norm and unembedding at the clean scale⟩",
    "net": "direct + what later heads write because of it; patterns and norms held",
    "relp": "backward pass with norms held, act(x)/x and the half rule",
    "gradient": "⟨write − replacement, ∂ logit_diff / ∂ stream⟩",
    "total": "logit_diff − logit_diff with the write replaced, executed",
}
_SUMS = {
    "logit_diff": "answer − against, before a soft-cap",
    "capped": "answer − against as the model returns it",
    "constant": "biases of the final norm and the unembedding, which belong to no node",
    "unexplained": "logit_diff − Σ direct (zero) − constant",
}


def groups(lm: Model) -> dict[str, list[int]]:
    """Nodes whose readings are judged together. The last layer acts on the logits alone: near 1 by construction."""
    last = len(lm.layers) - 1
    heads, mlps = ([i for i, node in enumerate(lm.parts) if node.kind in kinds] for kinds in (PROJECTED, MLPS))
    early = {
        "heads before the last layer": [i for i in heads if lm.parts[i].layer < last],
        "mlps before the last layer": [i for i in mlps if lm.parts[i].layer < last],
    }
    layers = {f"L{layer}.heads": [i for i in heads if lm.parts[i].layer == layer] for layer in range(last + 1)}
    return {name: kept for name, kept in {"heads": heads, "mlps": mlps, **early, **layers}.items() if kept}
