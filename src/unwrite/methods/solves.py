"""Does the model do this at all, and in which words? The gate before any effect: one clean run of every base prompt.

An effect on an answer that a model does not give says little of how it would give it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import spelled
from unwrite.result import Result, build, quantity
from unwrite.run.answer.logits import normed
from unwrite.run.answer.metrics import metric_of
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit_pairs, batch_size, stream
from unwrite.run.replay.clean import base_of
from unwrite.stats.rates import RULES, said, verdict, wilson

_EQUATIONS = {
    "solved": ("1", "is the answer's logit above that of every other choice? (of `against`, of all tokens, without)"),
    "top": ("1", "is the answer the largest of the whole vocabulary?"),
    "margin": ("logits", "ℓ[answer] − the largest ℓ of the other choices"),
    "prob": ("1", "softmax(ℓ)[answer]"),
}


@torch.no_grad()
def solves(
    lm: Model, pairs: Any, *, bos: int | bool | None = None, batch: int | None = None,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """Whether a model gives the answers of pairs, pair by pair and template by template.

    Arguments: `pairs` and `bos` as in `uw.effects`, whose base prompts are read once; `checkpoint` as in `uw.scan`.
    Returns a Result with `solved[pair]`, whether the answer's logit is above that of every other choice (above that of
    `against` where pairs have no choices, of all tokens where they have neither), `top[pair]`, whether it is the
    largest of the vocabulary, `margin[pair]` (logits over the best other choice), `prob[pair]`, and `says[pair]`, the
    token that the model itself goes on with; by template `accuracy` with Wilson's 95 % interval `lower` and `upper`,
    `top_accuracy`, `n` and `verdict`; over all pairs the attributes `chance`, `verdict` and `solves`, this in a
    sentence. A verdict is "solved" (lower > (1 + chance) / 2), "above chance" (lower > chance), "not solved" (upper <
    (1 + chance) / 2) or "undecided".
    Raises TokensError for pairs that this model cannot read, NumericError where a logit is no number.
    Source: Wilson 1927, J. Am. Stat. Assoc. 22, for the interval.

    Example: `uw.solves(lm, uw.tasks.ioi(56, lm.tokenizer)).data.attrs["solves"]`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    size, read = batch_size(lm, pairs.base, batch), pairs.about()
    settings = {"batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("solves", lm, {"": read["hash"]}, settings):
            return done
        rows = Rows(partial(_measured, lm, pairs))
        stream(lm, pairs.base, rows, size, "solves", listener, job)
        return job.signed(build("solves", _dataset(lm, pairs, rows.whole()), settings, provenance(lm), {"": read}))


def _measured(lm: Model, pairs: Pairs, batch: Batch) -> dict[str, np.ndarray]:
    rows = slice(batch.first, batch.first + batch.real)
    final = normed(lm, base_of(lm, pairs, rows, ()).final)
    metric = metric_of(lm, pairs, "prob", rows)
    logits = metric.logits(final)
    require_finite(logits.isfinite().all(-1), "a logit of {pair} is not finite", pair=batch.first)
    found = {
        "solved": metric.solved(final), "top": logits.argmax(-1) == metric.answer, "margin": metric.margin(final),
        "prob": metric.of(final), "says": logits.argmax(-1),
    }  # fmt: skip
    return {name: part.double().cpu().numpy() for name, part in found.items()}


def _dataset(lm: Model, pairs: Pairs, whole: dict[str, np.ndarray]) -> xr.Dataset:
    """Everything that was found, named."""
    variables: dict[str, Any] = {
        name: quantity(("pair",), whole[name] if name in ("margin", "prob") else whole[name] > 0, *words)
        for name, words in _EQUATIONS.items()
    }
    labels = np.array(pairs.template or ["all"] * len(pairs), dtype=object)
    said_ids = whole["says"].astype(np.int64)
    words = {**pairs.words(lm.tokenizer), "says": [spelled([i], lm.tokenizer) for i in said_ids], "label": labels}
    variables |= {name: ("pair", np.array(part, dtype=object)) for name, part in words.items() if name != "source_text"}
    names = sorted(set(labels))
    counts = [(int(whole["solved"][labels == name].sum()), int((labels == name).sum())) for name in names]
    bounds = np.array([wilson(*count) for count in counts])
    rates = {
        "accuracy": (np.array([hits / n for hits, n in counts]), "part of the pairs that are solved"),
        "lower": (bounds[:, 0], "Wilson's 95 % interval of accuracy, from"),
        "upper": (bounds[:, 1], "Wilson's 95 % interval of accuracy, to"),
        "top_accuracy": (
            np.array([whole["top"][labels == name].mean() for name in names]), "part whose answer is the top"
        ),
        "n": (np.array([n for _, n in counts]), "pairs"),
    }  # fmt: skip
    variables |= {name: quantity(("template",), part, "1", how) for name, (part, how) in rates.items()}
    words = np.array([verdict(*count, pairs.chance) for count in counts], dtype=object)
    variables["verdict"] = quantity(
        ("template",), words, "1", "; ".join(f"{name}: {rule}" for name, rule in RULES.items())
    )
    hits, n = int(whole["solved"].sum()), len(pairs)
    axes = {"pair": np.arange(n), "template": np.array(names, dtype=object)}
    return xr.Dataset(variables, axes).assign_attrs(
        chance=pairs.chance, verdict=verdict(hits, n, pairs.chance), solves=said(hits, n, pairs.chance)
    )
