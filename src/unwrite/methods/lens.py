"""What would the model say if it ended here? The final norm and the unembedding, read off every state of the stream.

logit   each state goes through the final norm by itself, as if it were the last one (nostalgebraist 2020, "interpreting
        GPT: the logit lens").
frozen  the final norm's scale is held at that of the last state, so what two states differ by is what the nodes between
        them write: direct attribution, added up (TransformerLens's accumulated_resid with apply_ln).

Both end in the model's own logits. An early state says little of what later blocks make of it: some models keep it in a
basis that the unembedding cannot read (Belrose et al. 2023, arXiv 2303.08112).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from unwrite.errors import one_of, whole
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.prompts.answers import answers
from unwrite.prompts.tokens import Tokens, words_of
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import at_once, vocabulary
from unwrite.run.edit.trace import recorded
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, stream

KINDS = ("logit", "frozen")
_CELL = ("prompt", "location", "position")
# By variable: unit and equation.
_FOUND: dict[str, tuple[str, str]] = {
    "id": ("token id", "the tokens of highest logit, the highest first"),
    "logit": ("logit", "unembedding · final norm of the state, scaled and capped as the model does"),
    "prob": ("1", "softmax of these logits"),
    "entropy": ("nat", "−Σ p log p over the vocabulary"),
    "kl": ("nat", "Σ p_end log(p_end / p), of the model's own distribution"),
    "followed_logit": ("logit", "logit of the followed token"),
    "followed_prob": ("1", "its probability"),
    "followed_rank": ("rank", "tokens of a higher logit, and 1"),
}
# Where a prompt is shorter.
_MISSING = {name: -1.0 if unit in ("token id", "rank") else np.nan for name, (unit, _) in _FOUND.items()}


def lens(
    lm: Model,
    prompts: Any,
    kind: str = "logit",
    answer: Any = None,
    top: int = 5,
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """The tokens that every state of the stream would give, at every position: what they are and how probable.

    Arguments: `prompts`, `mask`, `bos`, `batch`, `checkpoint` as in `uw.dla`; `kind` "logit", each state through the
    final norm by itself, or "frozen", with the norm's scale of the last state; `answer` a token, or one for each
    prompt, that is followed from state to state, by default the one that the model itself puts first at each position;
    `top` so many tokens are named.
    Returns a Result: by [prompt, location, position, top] the `token`, its `id`, `logit` and `prob`, highest first; by
    [prompt, location, position] `entropy` and `kl` (of the model's own distribution from this one, nat) and of the
    token that is followed `followed_logit`, `followed_prob` and `followed_rank`; by [prompt, position] the prompt's own
    tokens `read`, and `followed`. Where a prompt is shorter, numbers are NaN and words are empty.
    Raises NumericError for an unknown `kind` and a logit that is no number, TokensError as `uw.dla`, ModelError for a
    model without a head.

    Example: `uw.lens(lm, "The capital of France is", answer=" Paris")["followed_prob"].isel(position=-1)`
    """
    tokens = admit(lm, prompts, mask, 0, bos, files=False)
    lm.require("logits")
    one_of("kind", kind, KINDS)
    whole("top is a number of tokens", top, 1, lm.vocabulary)
    size, followed = (
        batch_size(lm, tokens, batch),
        answers(answer, tokens, tokens.lengths - 1, "answer", lm.tokenizer, lm.vocabulary),
    )
    asked = _Lens(lm, kind, top, followed)
    settings = {"kind": kind, "top": top, "answer": None if followed is None else followed.tolist(), "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("lens", lm, {"": tokens.hash}, settings):
            return done
        tally = Rows(asked.measured)
        stream(lm, tokens, tally, size, "lens", listener, job)
        data = _dataset(lm, tokens, tally.whole())
        return job.signed(build("lens", data, settings, provenance(lm), {"": tokens.about()}))


@dataclass(frozen=True, eq=False)
class _Lens:
    """What is asked of every state."""

    lm: Model
    kind: str
    top: int
    answer: np.ndarray | None

    @torch.no_grad()
    def measured(self, batch: Batch) -> Arrays:
        """By name, [prompt, location, position] and further axes."""
        states = recorded(self.lm, batch.ids, self.lm.locations)
        real, step = batch.counted.to(self.lm.device), at_once(self.lm)
        streams = [states[name][real].split(step) for name in self.lm.locations]
        followed = None if self.answer is None else self._followed(batch, self.answer)[real].split(step)
        parts = [self._read([*part], None if followed is None else followed[i])
                 for i, part in enumerate(zip(*streams, strict=True))]  # fmt: skip
        found = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        finite = found["logit"].isfinite().all(-1).all(0)
        batch.require_numbers(torch.ones_like(real).masked_scatter(real, finite), "a logit")
        return {name: _placed(part, real, _MISSING.get(name, -1.0)) for name, part in found.items()}

    def _followed(self, batch: Batch, answer: np.ndarray) -> Int[Tensor, "prompt position"]:
        """The tokens that are followed at every row."""
        own = torch.from_numpy(answer[batch.first : batch.first + batch.real]).to(self.lm.device)
        return own[:, None].expand(*batch.ids.shape)

    def _read(self, streams: list[Tensor], followed: Tensor | None) -> dict[str, Tensor]:
        """What some rows say at every location, [location, row] and further axes."""
        end = streams[-1]
        own = vocabulary(self.lm, end).to(self.lm.compute_dtype)
        token = own.argmax(-1) if followed is None else followed
        held = end if self.kind == "frozen" else None
        of_states = (vocabulary(self.lm, part, held).to(own) for part in streams)
        found = [self._said(logits, own.log_softmax(-1), token) for logits in of_states]
        return {name: torch.stack([part[name] for part in found]) for name in found[0]}

    def _said(self, logits: Tensor, end: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Of logits [row, vocabulary]: the highest, and how they compare with those at the end."""
        log_prob = logits.log_softmax(-1)
        highest = logits.topk(self.top, -1)
        own = logits.gather(-1, token[:, None])
        return {
            "id": highest.indices, "logit": highest.values, "prob": log_prob.gather(-1, highest.indices).exp(),
            "entropy": -_mean(log_prob, log_prob), "kl": _mean(end, end - log_prob),
            "followed_logit": own[:, 0], "followed_prob": log_prob.gather(-1, token[:, None]).exp()[:, 0],
            "followed_rank": (logits > own).sum(-1) + 1, "followed": token,
        }  # fmt: skip


def _mean(log_prob: Tensor, value: Tensor) -> Tensor:
    """The mean of a value over a distribution; a token that never comes counts nothing, however unlikely it is."""
    prob = log_prob.exp()
    return torch.where(prob > 0, prob * value, 0).sum(-1)


def _placed(found: Tensor, real: Bool[Tensor, "prompt position"], missing: float) -> np.ndarray:
    """What was found at real rows [location, row, …] as [prompt, location, position, …]."""
    whole = found.new_full((len(found), *real.shape, *found.shape[2:]), missing)
    whole[:, real] = found
    return whole.transpose(0, 1).cpu().numpy()


def _dataset(lm: Model, tokens: Tokens, found: Arrays) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: quantity((*_CELL, "top")[: found[name].ndim], found[name], unit, equation)
        for name, (unit, equation) in _FOUND.items()
    }
    variables["token"] = ((*_CELL, "top"), words_of(found["id"], lm.tokenizer))
    there = np.arange(tokens.length) < tokens.lengths[:, None]
    for name, ids in {"read": np.where(there, tokens.written, -1), "followed": found["followed"][:, 0]}.items():
        variables[name] = (("prompt", "position"), words_of(ids, lm.tokenizer))
    axes = {"prompt": np.arange(len(tokens)), "location": list(lm.locations), "position": np.arange(tokens.length)}
    return xr.Dataset(variables, axes)
