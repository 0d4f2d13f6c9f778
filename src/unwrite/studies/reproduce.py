"""Does unwrite find what the paper found? The five figures of Dao, Lau, Rager and Janiak 2023 on gelu-4l.

The paper's numbers are those of its text and those read off the authors' published images (±0.01). Its ambiguities are
run both ways: quantiles 12.5/87.5 (what the code drew) and 25/75 (what the captions say); centred writes with bias-free
heads (what was measured) and raw ones; Figure 5 with attention weights (the text) and without (the published script).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.nn.functional import cross_entropy

from unwrite.errors import ModelError, TokensError, shown, whole
from unwrite.methods.corpus import corpus_dla
from unwrite.methods.dla import dla
from unwrite.methods.scan import scan
from unwrite.methods.verify import verify
from unwrite.model.identities import logits_of
from unwrite.model.load import load, provenance, view
from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.result import Result, build, quantity
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Batch, Listener, admit, batches, parts

WEIGHTS = "NeelNanda/GELU_4L512W_C4_Code"
WRITER = "L0H2"
ERASERS = tuple(f"L2H{head}" for head in range(2, 8))
# Prompt, the model's top two tokens, and the head beside the writer in Figure 4b.
PROMPTS = (
    ("It's in the cupboard, either on the top or on the", " bottom", " top", "L3H1"),
    ("I went to university at Michigan", " State", " University", "L2H1"),
    ("class MyClass:\n\tdef", " __", " get", "L3H5"),
    ("The church I go to is the Seventh-day Adventist", " Church", " church", "L2H2"),
)
_PLACES = tuple(f"resid_{state}{i}" for i in range(4) for state in ("mid", "post"))
_FIGURE_1 = dict(
    zip(("resid_pre0", *_PLACES), (0.016, 0.963, 1.047, 1.013, 1.018, 0.105, 0.094, 0.05, 0.055), strict=True)
)
_FIGURE_1_TOP = dict(zip((f"L0H{i}" for i in range(8)), (0.18, 1.88, 0.96, 0.06, 1.08, 0.39, -0.3, -0.57), strict=True))
_FIGURE_1_BAND = (-0.29, 0.45)
_FIGURE_1_END = {"L0H1": -1.4, "L0H6": 1.4}
_FIGURE_2 = {
    "L0H0": 0.042, "L0H7": -0.023, "MLP0": 0.085, "L2H1": -0.008, "L2H2": -0.144, "L2H3": -0.034, "L2H4": -0.118,
    "L2H5": -0.263, "L2H6": -0.176, "L2H7": -0.142, "L3H5": -0.029, "MLP2": 0.0,
}  # fmt: skip
_FIGURE_2_BANDS = {"MLP2": (-0.28, 0.31), "MLP3": (-0.31, 0.28)}
_FIGURE_3A = {"resid_mid2": 0.88, "resid_post2": 0.645, "resid_mid3": 0.574, "resid_post3": 0.48}
_FIGURE_3B = (0.0, 0.0, -0.02, -0.01, 0.0, -0.035, -0.03, -0.01)
_FIGURE_4_DIFFERENCE = (1.07, 1.89, 3.02, 0.94)
_FIGURE_4A = ((0.60, 0.60), (0.84, 0.815), (0.95, 0.975), (0.247, 0.248))
_FIGURE_4B = ((1.14, 0.09), (0.84, 0.035), (2.3, 0.72), (0.525, 0.17))
_BANDS = {"12.5–87.5 %": (0.125, 0.875), "25–75 %": (0.25, 0.75)}
# The authors' prompts: four of C4 to one of code, drawn with this seed; their Figure 5 used 30 of them, its script 10.
_SEED, _OF_FIVE_C4, _FIGURE_5, _SCRIPT, _SCRIPT_SKIP, _LOSS = 5235, 4, 30, 10, 32, 5


@dataclass(frozen=True)
class Claim:
    """A number of the paper, and ours under one setting; NaN where it could not be measured."""

    figure: str
    quantity: str
    setting: str
    paper: float
    ours: float


def reproduce(
    name: str = "gelu-4l",
    weights: str | Path | Model | None = None,
    tokens: Any = None,
    n: int = 300,
    *,
    bos: int | bool | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """All five figures of the paper with its settings: what it says, beside what unwrite measures.

    Arguments: `name` "gelu-4l"; `weights` the checkpoint's folder, or a Model (by default the hub's); `tokens` as
    `uw.scan` takes them, with `bos` as there (by default the paper's own 300 × 1024 tokens, which needs the extra
    `datasets` and the network); of those at most `n`; `checkpoint` as in `uw.scan`.
    Returns a Result by `claim`: `figure`, `quantity`, `setting`, `paper`, `ours`, `difference`; and what goes beyond
    the paper as attributes: `verdict` (of `uw.verify`).
    Raises ModelError for another name, or a model without the paper's heads or with parallel blocks; TokensError where
    the text cannot be had.

    Example: `uw.reproduce("gelu-4l", weights="GELU_4L512W_C4_Code").table()`
    """
    if not isinstance(name, str) or name != "gelu-4l":
        raise ModelError("nothing to reproduce by this name", got=shown(name), expected="'gelu-4l'")
    whole("n is a number of prompts", n, 1)
    lm = weights if isinstance(weights, Model) else load(WEIGHTS if weights is None else weights)
    if missing := {WRITER, *ERASERS, "L3H5"} - set(lm.nodes):
        raise ModelError("this is not a model like gelu-4l", got=f"no {', '.join(sorted(missing))}")
    if lm.parallel:
        raise ModelError("this is not a model like gelu-4l", got="blocks whose MLP reads what their attention reads")
    lm.require("logits")
    own = tokens is None
    read = _paper_tokens(n) if own else admit(lm, tokens, None, 0, None if isinstance(tokens, Tokens) else bos)
    read = read.take(np.arange(min(n, len(read))))
    settings = {"name": name, "n": n, "paper_text": own}
    with opened(checkpoint, listener) as job:
        if done := job.begin("reproduce", lm, {"": read.hash}, settings):
            return done
        heard = {"checkpoint": job, "listener": listener}
        proof = verify(lm, read, WRITER, ERASERS, skip=0, **heard)
        claims = [
            *_of_scan(lm, read, heard),
            *_of_proof(proof),
            *_of_prompts(lm, read, bos),
            *_of_corpus(lm, read, heard),
        ]
        data = _dataset(claims).assign_attrs(verdict=str(proof.data.attrs["verdict"]))
        return job.signed(build("reproduce", data, settings, provenance(lm), {"": read.about()}))


def _dataset(claims: list[Claim]) -> xr.Dataset:
    words = {part: ("claim", np.array([getattr(claim, part) for claim in claims], dtype=object)) for part in _WORDS}
    paper, ours = (np.array([getattr(claim, part) for claim in claims]) for part in ("paper", "ours"))
    return xr.Dataset(
        {
            **words,
            "paper": quantity(("claim",), paper, "1", "as published, or read off the authors' images"),
            "ours": quantity(("claim",), ours, "1", "measured"),
            "difference": quantity(("claim",), ours - paper, "1", "ours − paper"),
        },
        {"claim": np.arange(len(claims))},
    )


_WORDS = ("figure", "quantity", "setting")


def _of_scan(lm: Model, tokens: Tokens, heard: dict[str, Any]) -> Iterator[Claim]:
    """Figures 1 and 2, centred and raw."""
    for convention, words in (("paper", "centred, heads without constant"), ("raw", "raw writes")):
        same = lm if lm.convention == convention else view(lm.hf, lm.tokenizer, convention)
        found = scan(same, tokens, list(_FIGURE_1_TOP), skip=0, **heard)
        for figure, writer, place, paper in _levels():
            level = found["level"].sel(writer=writer, location=place)
            yield Claim(figure, f"PR({place}, {writer})", words, paper, float(level.sel(quantile=0.5)))
        for node, paper in _FIGURE_2.items():
            pr = found["pr"].sel(writer=WRITER, node=node, quantile=0.5)
            yield Claim("2", f"PR({node}, {WRITER})", words, paper, float(pr))
        yield from _bands(found, words)


def _levels() -> Iterator[tuple[str, str, str, float]]:
    yield from (("1", WRITER, place, paper) for place, paper in _FIGURE_1.items())
    yield from (("1 top", writer, "resid_mid0", paper) for writer, paper in _FIGURE_1_TOP.items())
    yield from (("1 top", writer, "resid_post3", paper) for writer, paper in _FIGURE_1_END.items())


def _bands(found: Result, words: str) -> Iterator[Claim]:
    """Both readings of the paper's bands."""
    mid, pr = found["level"].sel(writer=WRITER, location="resid_mid2"), found["pr"].sel(writer=WRITER)
    drawn = [("1", "resid_mid2", mid, _FIGURE_1_BAND)]
    drawn += [("2", node, pr.sel(node=node), band) for node, band in _FIGURE_2_BANDS.items()]
    for band, ends in _BANDS.items():
        for figure, name, values, papers in drawn:
            for side, paper, end in zip(("lower", "upper"), papers, ends, strict=True):
                ours = float(values.sel(quantile=end))
                yield Claim(figure, f"band of PR({name}, {WRITER}), {side} end", f"{words}, {band}", paper, ours)


def _of_proof(proof: Result) -> Iterator[Claim]:
    """Figure 3, and the share of the erasure that is causal."""
    level, pr = proof["level"].sel(quantile=0.5), proof["pr"].sel(quantile=0.5)
    summed = float(proof["opposed_pr"].sel(quantile=0.5))
    yield Claim("2", "Σ PR of the six erasers", "median of sums", -0.903, summed)
    medians = float(pr.sel(condition="clean", node=list(ERASERS)).sum())
    yield Claim("2", "Σ PR of the six erasers", "sum of medians", -0.88, medians)
    for place, paper in _FIGURE_3A.items():
        yield Claim(
            "3a", f"PR({place}, {WRITER})", "patched", paper, float(level.sel(condition="patched", location=place))
        )
    before, after = (float(level.sel(condition="clean", location=place)) for place in ("resid_post1", "resid_mid2"))
    patched = float(level.sel(condition="patched", location="resid_mid2"))
    share = (patched - after) / (before - after) if before != after else np.nan
    yield Claim("3a", "causal share of the erasure", "of medians", 0.85, share)
    for head, paper in enumerate(_FIGURE_3B):
        yield Claim(
            "3b", f"PR(L2H{head}, {WRITER})", "patched", paper, float(pr.sel(condition="patched", node=f"L2H{head}"))
        )


def _of_prompts(lm: Model, tokens: Tokens, bos: int | bool | None) -> Iterator[Claim]:
    """Figure 4: four prompts, clean and with the head's last row reading other text."""
    found = None
    if lm.tokenizer is not None:
        texts, answers, others, _ = zip(*PROMPTS, strict=True)
        begun = lm.tokenizer.bos_token_id is not None if bos is None else bos  # as the model was trained
        found = dla(lm, list(texts), list(answers), list(others), at="position", texts=tokens, bos=begun)
    for i, (text, *_, other) in enumerate(PROMPTS):
        words = f"prompt {i + 1}: “…{text[-24:]}”"
        difference = np.nan if found is None else float(found["logit_diff"][i])
        yield Claim("4", "logit difference", words, _FIGURE_4_DIFFERENCE[i], difference)
        for figure, head, papers in (("4a", WRITER, _FIGURE_4A[i]), ("4b", other, _FIGURE_4B[i])):
            one = None if found is None else found.data.sel(prompt=i, node=head)
            ours = (
                (np.nan, np.nan)
                if one is None
                else (float(one["direct"]), float(one["other_direct"].sel(replaced="query", quartile=0.5)))
            )
            for what, paper, value in zip(("clean", "patched, median"), papers, ours, strict=True):
                yield Claim(figure, f"DLA of {head}, {what}", words, paper, value)


def _of_corpus(lm: Model, tokens: Tokens, heard: dict[str, Any]) -> Iterator[Claim]:
    """Figure 5 and the loss."""
    some = tokens.take(np.arange(min(_FIGURE_5, len(tokens))))
    top = corpus_dla(lm, some, WRITER, ERASERS, skip=0, **heard)
    for path, words, paper in (
        ("raw", "all that erasers write", -0.159),
        ("values", "eq. 3, with attention weights", -0.716),
    ):
        yield Claim(
            "5",
            "r(DLA writer, DLA erasers)",
            f"top-2 difference, {words}",
            paper,
            float(top["correlation"].sel(path=path)),
        )
    few = tokens.take(np.arange(min(_SCRIPT, len(tokens))))
    script = corpus_dla(lm, few, WRITER, ERASERS, min(_SCRIPT_SKIP, tokens.length - 2), "next token", **heard)
    for what, paper in (("slope", -0.723), ("intercept", 0.052)):
        for path, words in (("same_position", "without attention weights"), ("values", "with attention weights")):
            yield Claim("5 (script)", what, f"next token, {words}", paper, float(script[what].sel(path=path)))
    mean, median = _loss(lm, tokens)
    yield Claim("–", "loss, mean", f"first {_LOSS} prompts", 3.13, mean)
    yield Claim("–", "loss, median", "all prompts", 2.25, median)


@torch.no_grad()
def _loss(lm: Model, tokens: Tokens) -> tuple[float, float]:
    """Nats per token: the mean over the first prompts, the median over all."""
    losses: list[torch.Tensor] = []

    def measured(batch: Batch) -> torch.Tensor:
        ids = batch.ids[:, : int(tokens.lengths[batch.first])].to(lm.device)
        logits = logits_of(lm, ids)[0, :-1].to(lm.compute_dtype)
        found = cross_entropy(logits, ids[0, 1:], reduction="none").cpu()
        require_finite(found.isfinite().all()[None], "the loss of {prompt} is not finite", prompt=batch.first)
        return found

    for batch in batches(tokens, 1):
        losses += [found for _, found in parts(batch, measured)]
    return float(torch.cat(losses[:_LOSS]).mean()), float(torch.cat(losses).median())


def _paper_tokens(n: int) -> Tokens:
    """The authors' prompts: rows of 1,024 tokens that others tokenised, four of C4 to one of code."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TokensError(
            "the paper's text comes from the hub", expected="the extra `datasets`",
            fix="pip install 'unwrite[datasets]', or give a text of your own",
        ) from None  # fmt: skip
    of_c4 = n * _OF_FIVE_C4 // (_OF_FIVE_C4 + 1)
    rows: list[list[int]] = []
    try:
        for source, count in (("NeelNanda/c4-tokenized-2b", of_c4), ("NeelNanda/code-tokenized", n - of_c4)):
            stream = load_dataset(source, split="train", streaming=True).shuffle(seed=_SEED, buffer_size=10)
            rows += [row["tokens"] for row in stream.take(count)]
    except (OSError, ValueError) as error:
        raise TokensError(
            "the paper's text cannot be had", got=error, fix="check the network, or give your own text"
        ) from error
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))
    return from_ids(np.array(rows)[order.numpy()]).named("c4-tokenized-2b and code-tokenized, 4 to 1")
