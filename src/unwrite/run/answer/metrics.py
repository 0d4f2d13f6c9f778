"""What is an answer worth? One number for each pair, of the logits that the model returns at the row that is read.

logit_diff  ℓ[answer] − ℓ[against], or ℓ[answer] alone; linear in logits, hence the default
log_prob    ℓ[answer] − logsumexp ℓ             prob  softmax(ℓ)[answer]
kl          Σ p (log p − log p'), p of the clean base run; it has no sign, and no slope at the base run itself
top         1 where ℓ[answer] is the largest of the vocabulary, else 0: its mean is the accuracy
match       1 where ℓ[against] is the largest of the vocabulary, else 0: its mean is the interchange accuracy
restricted  logsumexp of ℓ over the choices − ℓ[answer]: the loss where nothing but a choice can be said
centred     ℓ[answer] − the mean of ℓ over the choices: what raises all choices alike does not count
fldd        100 · (1 − mean logit_diff patched / mean logit_diff of base runs), means over all pairs, of which each
            pair gives its part (Makelov et al. 2023, arXiv 2311.17030); 100: the difference is gone, above: turned
or any function of logits [pair, vocabulary] that gives a number for each pair
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.errors import NumericError, one_of
from unwrite.model.view import Model
from unwrite.model.weights import through
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.logits import normed as final_normed
from unwrite.run.answer.logits import unembedding

METRICS = ("logit_diff", "log_prob", "prob", "kl", "top", "match", "restricted", "centred", "fldd")
# These count, and so have no slope.
_COUNTS = ("top", "match")
_OF_CHOICES = ("restricted", "centred")
_LINEAR = ("logit_diff", "fldd")
Custom = Callable[[Float[Tensor, "pair vocabulary"]], Float[Tensor, " pair"]]
P = TypeVar("P")


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of some pairs. `clean`: what the final norm gives at the row that is read in base runs, for "kl"."""

    lm: Model
    name: str | Custom
    answer: Int[Tensor, " pair"]
    against: Int[Tensor, " pair"] | None
    clean: Float[Tensor, "pair d_model"] | None = None
    choices: Int[Tensor, "pair option"] | None = None

    def __call__(
        self, stream: Float[Tensor, "run d_model"], pair: Int[Tensor, " run"] | None = None
    ) -> Float[Tensor, " run"]:
        """The metric of final streams, `pair[i]` the pair of run i (by default run i is of pair i).

        Raises NumericError where a function of the caller gives anything but a number for each run.
        """
        return self.of(final_normed(self.lm, stream), pair)

    def of(
        self, normed: Float[Tensor, "run d_model"], pair: Int[Tensor, " run"] | None = None
    ) -> Float[Tensor, " run"]:
        """The same of what the final norm gives."""
        pair = torch.arange(len(normed), device=self.answer.device) if pair is None else pair
        if isinstance(self.name, str) and self.name in _LINEAR:
            value = self._logit(normed, self.answer[pair])
            return value if self.against is None else value - self._logit(normed, self.against[pair])
        if isinstance(self.name, str) and self.name in _OF_CHOICES:
            own, choices = self._logit(normed, self.answer[pair]), self._chosen(normed, self.choices, pair)
            return own - choices.mean(-1) if self.name == "centred" else choices.logsumexp(-1) - own
        logits = self.logits(normed)
        if callable(self.name):
            return _numbers(_asked(self.name, logits), logits)
        if self.name in _COUNTS:
            asked = self.answer if self.name == "top" or self.against is None else self.against
            return (logits.argmax(-1) == asked[pair]).to(logits)
        log_p = logits.log_softmax(-1)
        if self.name == "kl":
            clean = self._reference()[pair]
            return (clean.exp() * (clean - log_p)).sum(-1)
        chosen = log_p.gather(-1, self.answer[pair][:, None])[:, 0]
        return chosen.exp() if self.name == "prob" else chosen

    def logits(self, normed: Float[Tensor, "run d_model"]) -> Float[Tensor, "run vocabulary"]:
        """What the model returns."""
        return self._bounded(self._logits(normed))

    @torch.no_grad()
    def solved(self, normed: Float[Tensor, "pair d_model"]) -> Bool[Tensor, " pair"]:
        """Does the answer beat all other choices, or what it is compared to, or else the whole vocabulary?"""
        return self.margin(normed) > 0

    @torch.no_grad()
    def margin(self, normed: Float[Tensor, "pair d_model"]) -> Float[Tensor, " pair"]:
        """By how much the answer's logit is above that of the best of these."""
        if self.choices is None and self.against is None:
            logits = self.logits(normed)
            own = logits.gather(1, self.answer[:, None])
            return (own - logits.scatter(1, self.answer[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]
        others = self.answer[:, None] if self.against is None else self.against[:, None]
        others = others if self.choices is None else self.choices
        logits = self._chosen(normed, others, torch.arange(len(normed), device=others.device))
        own = self._logit(normed, self.answer)
        return own - logits.masked_fill(others == self.answer[:, None], -torch.inf).amax(-1)

    def _chosen(
        self, normed: Tensor, choices: Int[Tensor, "pair option"] | None, pair: Int[Tensor, " run"]
    ) -> Float[Tensor, "run option"]:
        assert choices is not None  # noqa: S101 (asked for where the metric is named)
        return torch.stack([self._logit(normed, ids) for ids in choices[pair].unbind(1)], 1)

    def _reference(self) -> Float[Tensor, "pair vocabulary"]:
        assert self.clean is not None  # noqa: S101 (given wherever runs are continued)
        with torch.no_grad():
            return self.logits(self.clean).log_softmax(-1)

    def _logits(self, normed: Tensor) -> Tensor:
        return through(self.lm.head, normed).to(self.lm.device, self.lm.compute_dtype)

    def _logit(self, normed: Tensor, ids: Tensor) -> Tensor:
        """One logit of every run; the others are not computed."""
        weight, bias = unembedding(self.lm)
        rows = weight.detach()[ids.to(weight.device)].to(self.lm.device, self.lm.compute_dtype)
        value = (normed.to(rows) * rows).sum(-1)
        return self._bounded(value if bias is None else value + bias.detach()[ids.to(bias.device)].to(value.device))

    def _bounded(self, logits: Tensor) -> Tensor:
        logits = logits * self.lm.row.logit_scale(self.lm.config)
        cap = self.lm.row.logit_cap(self.lm.config)
        # A cap would make a number of what is none.
        return logits if cap is None else (torch.tanh(logits / cap) * cap).where(logits.isfinite(), torch.nan)


def metric_of(
    lm: Model, pairs: Pairs, name: str | Custom, rows: slice, clean: Float[Tensor, "pair d_model"] | None = None
) -> Metric:
    """The metric of some rows of pairs, `clean` the final stream of their base runs at the row that is read, for "kl".

    To be made before any graph is recorded: hooks would take its pass through the final norm for one of the run's own.
    """
    answer, against, choices = (
        None if part is None else torch.from_numpy(part[rows]).to(lm.device)
        for part in (pairs.answer, pairs.against, pairs.choices)
    )
    assert answer is not None  # noqa: S101 (pairs always have one)
    return Metric(lm, name, answer, against, None if clean is None else final_normed(lm, clean).detach(), choices)


def known(metric: Any, pairs: Pairs) -> str | Custom:
    """The metric again. Raises NumericError for a name that is none, or that these pairs lack something for."""
    if callable(metric):
        return metric  # pyright: ignore[reportReturnType]
    one_of("metric", metric, METRICS, also="a function of logits")
    name = str(metric)
    lacks = "choices" if name in _OF_CHOICES and pairs.choices is None else ""
    lacks = "against" if name in ("match", "fldd") and pairs.against is None else lacks
    if lacks:
        raise NumericError(f"{name} is of pairs that have {lacks}", got="none", fix=f"give {lacks} to uw.pairs")
    return name


def require_slope(metric: Any, method: str, at_base: bool) -> None:
    """Raise NumericError where a slope says nothing of a metric: of "kl" if it is taken `at_base` alone."""
    if isinstance(metric, str) and metric == "kl" and at_base:
        raise NumericError(
            f"{method} says 0 for every node and edge: kl has no slope at the base run, which it is measured against",
            fix="use method='exact', or what integrates from the source, or another metric",
        )
    if isinstance(metric, str) and metric in _COUNTS:
        what = f"{method} says nothing of {metric}: what counts answers has no slope"
        raise NumericError(what, fix="use method='exact', or another metric")


def unit_of_base(metric: str | Custom) -> str:
    """What a base run is measured in."""
    return "logit_diff" if metric == "fldd" else name_of(metric)


def parts_of_mean(
    metric: str | Custom, base: Float[np.ndarray, " pair"], effect: Float[np.ndarray, "pair ..."]
) -> tuple[Float[np.ndarray, "pair ..."], Float[np.ndarray, " pair"]]:
    """What pairs add above and below the line: Σ above / Σ below is the mean effect, above / mean below that of a pair.

    Raises NumericError for "fldd" where base runs prefer on average what the answer is compared to.
    """
    if metric != "fldd":
        return effect, np.ones(len(base))
    if not base.mean() > 0:
        raise NumericError(
            "fldd is a part of a logit difference that base runs do not have", got=f"{base.mean():.3g} on average",
            expected="more than 0", fix="use metric='logit_diff'",
        )  # fmt: skip
    return -100 * effect, base


def name_of(setting: Any) -> str:
    """What a result calls a setting: its own name, or that of the function or rules."""
    if isinstance(setting, str) or not callable(setting):
        return str(setting)
    return str(getattr(setting, "__name__", type(setting).__name__))


def unless_own(place: P, *settings: Any) -> P:
    """`place` again. Raises NumericError where a run is to be kept there that a function of the caller's decides.

    Its name does not say what it computes, so another run could go on from there.
    """
    own = [name_of(setting) for setting in settings if callable(setting)]
    if own and getattr(place, "folder", place) is not None:
        raise NumericError("no checkpoint is kept of this", got=", ".join(own), expected="a metric that has a name")
    return place


def _asked(metric: Custom, logits: Float[Tensor, "run vocabulary"]) -> Any:
    """What a function of the caller's says; what it raises is kept beside the words."""
    try:
        return metric(logits)
    except Exception as error:
        what = f"the metric {name_of(metric)} cannot be computed of logits {list(logits.shape)}"
        raise NumericError(what, got=error, expected="a function from logits to a number for each pair") from error


def _numbers(value: Any, logits: Float[Tensor, "run vocabulary"]) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1] or value.is_complex():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        what = "the metric gives something else than a number for each pair"
        raise NumericError(what, got=got, expected=f"real numbers [{len(logits)}]")
    # One that counts or compares gives whole numbers, or truths.
    return value.to(logits)
