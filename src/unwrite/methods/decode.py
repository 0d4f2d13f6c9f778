"""What does the model itself say of a state? A state of one prompt, put at a placeholder of another, and what follows.

x'[placeholder] = Σ w[position] · x[location, position], in the pass over the second prompt alone; every later step sees
it through the keys and values that this pass leaves (Ghandeharioun et al. 2024, "Patchscopes", arXiv 2401.06102;
weighted sums at the embedding: Bronzini et al. 2024, arXiv 2404.03623). Beside it stands the logit lens of the same
state. A later block reads such a state by its own weights, which a lens cannot; but what is said of it is also what
the second prompt makes the model say.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from unwrite.errors import (
    ModelError,
    NodeError,
    NumericError,
    TokensError,
    counted,
    plain,
    require,
    several,
    shown,
    whole,
)
from unwrite.model.load import provenance
from unwrite.model.view import Model, require_model
from unwrite.nodes import Site
from unwrite.prompts.answers import firsts
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.spans import holding, said_by
from unwrite.prompts.spans import placeholder as placeholder_in
from unwrite.prompts.tokens import Tokens, array_of, read_rows, words_of
from unwrite.result import Result, build, quantity
from unwrite.run.answer.decoding import Injection, SaidOf
from unwrite.run.answer.injected import EMBED, START, Target, as_it_is
from unwrite.run.answer.spoken import require_room
from unwrite.run.answer.translated import Translation, translation
from unwrite.run.edit.sites import all_named
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit, stream
from unwrite.stats.rates import wilson

_STATES = ("pre", "mid", "late", "post")
# What a prompt is read at: "end" and "last" say the same.
_ENDS = ("end", "last")
# Where nothing is said of what a state means: a prompt that says words twice.
SAME_AGAIN = "red->red; seven->seven; house->house; x"
# Tokens that are said at most.
_MOST = 4096
_CELL = ("prompt", "location")


def decode(
    lm: Model, prompts: Any, at: Any = "end", into: Any = SAME_AGAIN, *, placeholder: Any = "x", locations: Any = None,
    place: str = "same", answer: Any = None, rescale: bool = False, tokens: int = 20, source: Model | None = None,
    fit: Any = None, mask: Any = None, bos: int | bool | None = None, batch: int | None = None,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """What the model says after another prompt, at a placeholder of which it finds a state of its own.

    Arguments: `prompts` as in `uw.dla`, or pairs, of which the base prompts are read; `at` which state of each prompt:
    "end" (of pairs, the row that is read), a role of pairs, a position or one for each prompt, words of every prompt
    (their last token), or weights [prompt, position] of a sum over positions, as real numbers; `into` the other
    prompt: a text, a chat (messages) or ids, in which the one token `placeholder` (its text, or its id) stands once, by
    default one that says words twice and ends in the placeholder, so that what a state would say next is said;
    `locations` names of states ("resid_post3", "resid_mid*"), by default all those between blocks; `place` where a
    state is put: "same" (where it is from), the name of a state, or "embed", in place of the placeholder's embedding,
    before its position is added (of "resid_pre0" then what tokens alone bring); `answer` what should be said, one text
    or id for all prompts or for each, by default the model's own next token at the state; with `rescale`, states get
    the norm of what the placeholder itself has there; `tokens` so many are said, or fewer where the model ends its
    text; `source` another model, whose states these are: of the same width, or with `fit`, a text or tokens by which an
    affine map from its states to those of `lm` is learned (from half of its documents, and judged by the others);
    `mask`, `bos`, `batch`, `checkpoint` as in `uw.dla`.
    Returns a Result: by [prompt, location] the `text`, and by step its `token`, `id` and `prob`; beside it
    `lens_token`, `lens_id` and `lens_prob`, what the state gives through the final norm and the unembedding, and its
    `norm`. Where there is an answer (`answer[prompt]`): `match`, whether the first token is the answer's first one,
    `said`, whether the text has the answer in it, `lens_match`; `rank` and `answer_prob` of that token, `lens_rank`
    and `lens_answer_prob`; by [way, location] for the three of them `precision` over prompts with Wilson's 95 %
    interval `lower` and `upper`. With `fit`, `r2[location]`.
    Raises TokensError for a placeholder or words that are not there once; NodeError for what is no state, or of another
    width; NumericError for weights and logits that are none; ModelError for a model without a head.

    Example: `uw.decode(lm, "The Eiffel Tower is tall", "Tower", "Paris: a city. Mozart: a man. x: a")["text"]`
    """
    require_saying(lm, rescale, tokens)
    read, weight, row = _read(lm if source is None else source, prompts, at, mask, bos)
    other = _into(lm, into, tokens)
    target = Target(as_it_is(lm), other.ids[0], placeholder_in(placeholder, other.ids[0], lm.tokenizer))
    origin = _origin(lm, source, fit)
    sites = states_named(origin, locations)
    put_at = put_at_of(lm, place, sites)
    asked = _answered(Injection(target, origin, read, weight, sites, put_at, tokens, rescale, row), answer)
    held = None if fit is None else _held(lm, origin, fit)
    read_from = {"": read.hash, "into": other.hash} | ({} if held is None else {"fit": held.hash})
    size, settings = asked.size(batch), {**asked.settings, "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("decode", lm, read_from, settings):
            return done
        if held is not None:
            asked = replace(asked, translation=_between(asked, held, listener, job))
        said = SaidOf(asked, job)
        stream(lm, read, said.rows, size, asked.stage, listener, job)
        data = _dataset(asked, said.rows.whole())
        about = {"": read.about(), "into": other.about()} | ({} if held is None else {"fit": held.about()})
        return job.signed(build("decode", data, settings, provenance(lm), about))


def require_saying(lm: Model, rescale: Any, tokens: Any) -> None:
    """Raise ModelError for a model that says nothing, NumericError for settings that mean nothing."""
    require_model(lm)
    lm.require("logits")
    require(isinstance(rescale, bool), NumericError, "rescale is a yes or no", rescale, "True or False")
    whole("tokens is how many are said", tokens, 1, _MOST)


def _read(
    lm: Model, prompts: Any, at: Any, mask: Any, bos: Any
) -> tuple[Tokens, Float[np.ndarray, "prompt position"], Int[np.ndarray, " prompt"] | None]:
    """The prompts, the weight of every position, and the one row that is taken, if it is one."""
    pairs = prompts if isinstance(prompts, Pairs) else None
    tokens = admit(lm, prompts if pairs is None else pairs.base, mask, 0, bos, files=False)
    weight = array_of(at)
    if weight is not None and weight.dtype.kind == "f":
        there = np.arange(tokens.length) < tokens.lengths[:, None]
        if weight.shape != there.shape or not np.isfinite(weight).all() or (weight[~there] != 0).any():
            raise NumericError(
                "at, as real numbers, are weights of positions", got=shown(at),
                expected=f"finite numbers {list(there.shape)}, 0 where a prompt is shorter",
            )  # fmt: skip
        return tokens, weight.astype(np.float64), None
    row = _row(at, tokens, pairs, lm.tokenizer)
    return tokens, (np.arange(tokens.length) == row[:, None]).astype(np.float64), row


def _row(at: Any, tokens: Tokens, pairs: Pairs | None, tokenizer: Any) -> Int[np.ndarray, " prompt"]:
    if not isinstance(at, str):
        return read_rows(at, tokens, "at")
    if pairs is not None and at in pairs.roles:
        return pairs.roles[at]
    if at in _ENDS:
        return tokens.lengths - 1
    each = zip(tokens.written, tokens.lengths, strict=True)
    return np.array([holding(at, ids[:n], tokenizer, f"prompt {i}")[-1] for i, (ids, n) in enumerate(each)])


def _into(lm: Model, into: Any, steps: int) -> Tokens:
    """The prompt that states are put in."""
    other = admit(lm, into, None, 0, files=False)
    if len(other) != 1:
        raise TokensError("states are put in one prompt", got=counted(len(other), "prompt"), expected="one")
    what = "what is said would go beyond the model's context"
    require_room(lm, other.length, steps, what, "shorten into, or say fewer tokens")
    return other


def _origin(lm: Model, source: Model | None, fit: Any) -> Model:
    """The model that states are from. Raises NodeError where they are of another width and nothing translates them."""
    if source is None:
        require(fit is None, ModelError, "fit is between two models", fit, "another model as source, or no fit")
        return as_it_is(lm)
    require_model(source)
    source.require("logits")
    if fit is None and source.d_model != lm.d_model:
        raise NodeError(
            "states of the source are of another width than those of the model that they are put in",
            got=source.d_model, expected=lm.d_model, fix="give text as fit, by which a map between them is learned",
        )  # fmt: skip
    return as_it_is(source)


def states_named(lm: Model, locations: Any) -> tuple[Site, ...]:
    """The states that are decoded, in the order of a pass."""
    if locations is None:
        return tuple(Site(state.state, state.layer) for state in lm.states if state.state in ("pre", "post"))
    names = [locations] if isinstance(locations, str) else locations
    listed = several("locations are names of states", names, "names such as resid_post3", NodeError)
    found = [site for name in listed for site in all_named(lm, name)]
    if wrong := [str(site) for site in found if site.kind not in _STATES]:
        raise NodeError(f"{wrong[0]} is no state of the stream", expected="names such as resid_post3 or resid_mid*")
    if not found:
        raise NodeError("no location was named", expected="names of states, or None for all between blocks")
    return tuple(sorted(dict.fromkeys(found), key=lambda site: site.order))


def put_at_of(lm: Model, place: Any, sites: tuple[Site, ...]) -> tuple[Site | str, ...]:
    """Where each state is put."""
    says = "same, embed, or one state"
    require(isinstance(place, str), NodeError, "place says where states are put", place, says)
    if place in (EMBED, "same"):
        return tuple(EMBED if place == EMBED else all_named(lm, str(site))[0] for site in sites)
    found = all_named(lm, place)
    if len(found) != 1 or found[0].kind not in _STATES:
        raise NodeError("place says where states are put", got=shown(place), expected=says)
    return (found[0],) * len(sites)


def _answered(asked: Injection, answer: Any) -> Injection:
    """With what should be said. An id is one token; of a text the first token, with a space before it or without."""
    if answer is None:
        return asked
    n = len(asked.prompts)
    array = array_of(answer) if hasattr(answer, "tolist") else None
    listed = answer if array is None else array.tolist()
    each = list(listed) if isinstance(listed, (list, tuple)) else [listed] * n
    if len(each) != n:
        raise TokensError("answer is one for each prompt", got=counted(len(each), "answer"), expected=f"1 or {n}")
    ids, lens_ids = (
        np.array([firsts(one, lm.tokenizer, lm.vocabulary) for one in each]) for lm in (asked.target.lm, asked.origin)
    )
    words = [one if isinstance(one, str) else said_by([one], asked.target.lm.tokenizer) for one in each]
    return replace(asked, words=words, answer=ids, lens_answer=lens_ids)


def _held(lm: Model, source: Model, fit: Any) -> Tokens:
    """Text by which a map is learned. Raises TokensError where the two models read it otherwise."""
    mine, theirs = (admit(part, fit, None, 1) for part in (lm, source))
    if mine.hash != theirs.hash:
        raise TokensError(
            "the two models read the text of fit as other tokens",
            got=f"{mine.lengths.sum()} and {theirs.lengths.sum()} tokens", expected="models of one tokenizer",
            fix="give tokens that both know, as ids",
        )  # fmt: skip
    return mine


def _between(asked: Injection, held: Tokens, listener: Listener | None, job: Job) -> Translation:
    sites = [str(START) if site == EMBED else str(site) for site in asked.put_at]
    return translation(asked.origin, asked.target.lm, held, [*map(str, asked.locations)], sites, listener, job)


# By variable: unit and equation.
_FOUND = {
    "prob": ("1", "softmax of the logits at this token, the likeliest"),
    "norm": ("activation", "‖Σ w[position] · x[location, position]‖"),
    "rank": ("rank", "first tokens of a higher logit than the answer's, and 1"),
    "answer_prob": ("1", "softmax of the first logits at the answer's first token, in either spelling"),
    "lens_prob": ("1", "softmax(unembedding · final norm of the state), of its likeliest token"),
    "lens_rank": ("rank", "of these, tokens of a higher logit than the answer's, and 1"),
    "lens_answer_prob": ("1", "of these, of the answer's first token, in either spelling"),
}
_MATCHED = {
    "match": "is the first token the answer's?", "said": "does the text have the answer in it, as words?",
    "lens_match": "is the lens's likeliest token the answer's?",
}  # fmt: skip


def _dataset(asked: Injection, found: Arrays) -> xr.Dataset:
    """Everything that was found, named."""
    lm, tokenizer = asked.target.lm, asked.target.lm.tokenizer
    texts = [[plain(said_by([i for i in row if i >= 0], tokenizer)) for row in rows] for rows in found["id"].tolist()]
    variables: dict[str, Any] = {
        "text": (_CELL, np.array(texts, dtype=object)), "token": ((*_CELL, "step"), words_of(found["id"], tokenizer)),
        "id": quantity((*_CELL, "step"), found["id"], "token id", "the likeliest token, after those before it"),
        "lens_id": quantity(_CELL, found["lens_id"], "token id", "the likeliest token of the state itself"),
        "lens_token": (_CELL, words_of(found["lens_id"], asked.origin.tokenizer)),
        "read": ("prompt", np.array([said_by(ids[:n], asked.origin.tokenizer) for ids, n in
                                     zip(asked.prompts.written, asked.prompts.lengths, strict=True)], dtype=object)),
    }  # fmt: skip
    variables |= {
        name: quantity((*_CELL, "step")[: found[name].ndim], found[name], *words)
        for name, words in _FOUND.items() if name in found
    }  # fmt: skip
    if "answer" in found:
        variables |= _matched(asked, found, texts)
    if asked.translation is not None:
        r2 = asked.translation.r2.numpy()
        variables["r2"] = quantity(("location",), r2, "1", "1 − Σ‖y − [x, 1] W‖² / Σ‖y − ȳ‖², on unseen documents")
    axes = {"prompt": np.arange(len(asked.prompts)), "location": [*map(str, asked.locations)]}
    into = said_by(asked.target.written, tokenizer)
    return xr.Dataset(variables, axes).assign_attrs(into=into, put=f"token {asked.target.row}", d_model=lm.d_model)


def _matched(asked: Injection, found: Arrays, texts: list[list[str]]) -> dict[str, Any]:
    """What is right, and how often over prompts."""
    answer = found["answer"]
    right = {
        "match": (found["id"][:, :, :1] == answer[:, None]).any(-1),
        "lens_match": found["lens_rank"] == 1,
    }  # fmt: skip
    words = asked.words
    if words is not None:
        right["said"] = np.array([[_has(text, word) for text in row] for row, word in zip(texts, words, strict=True)])
    ways = [name for name in _MATCHED if name in right]
    hits = np.stack([right[name].sum(0) for name in ways])
    bounds = np.array([[wilson(int(count), len(answer)) for count in row] for row in hits])
    rates = {
        "precision": (hits / len(answer), "part of the prompts"),
        "lower": (bounds[..., 0], "Wilson's 95 % interval of precision, from"),
        "upper": (bounds[..., 1], "Wilson's 95 % interval of precision, to"),
    }  # fmt: skip
    named = words if words is not None else [*words_of(answer[:, 0], asked.target.lm.tokenizer)]
    return {
        "answer": ("prompt", np.array([plain(word) for word in named], dtype=object)),
        **{name: quantity(_CELL, right[name], "1", _MATCHED[name]) for name in ways},
        **{name: quantity(("way", "location"), part, "1", how) for name, (part, how) in rates.items()},
        "way": ("way", np.array(ways, dtype=object)),
    }


def _has(text: str, word: str) -> bool:
    """Does a text have these words in it, by themselves?"""
    return re.search(rf"(?<!\w){re.escape(word.strip().casefold())}(?!\w)", text.casefold()) is not None
