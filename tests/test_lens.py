"""Does a lens say what the model itself says when its last steps are given a state of the stream?"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from executed import exact, weights
from twin import Truth
from unwrite.errors import ModelError, NumericError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import spelled

LENGTHS = (6, 4)


@cache
def model(family: str) -> Model:
    return view(weights(family))


def ids_of(lm: Model) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, lm.vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_lens_is_the_model_that_ends_in_this_state(family: str) -> None:
    with exact():
        lm = model(family)
        ids, mask = ids_of(lm)
        found = uw.lens(lm, ids, top=3, mask=mask)
        for prompt, length in enumerate(LENGTHS):
            truth = Truth(lm.hf, ids[prompt : prompt + 1, :length])
            own = truth.logits()[0]
            for name in (lm.locations[0], lm.locations[2], lm.locations[-1]):
                one = found.data.sel(prompt=prompt, location=name).isel(position=slice(0, length))
                logits = own if name == lm.locations[-1] else truth.logits(truth.states()[name])[0]
                want, log_prob = logits.topk(3), logits.log_softmax(-1)
                size = float(logits.abs().max())
                np.testing.assert_allclose(one["logit"], want.values, rtol=0, atol=1e-6 * size)
                np.testing.assert_array_equal(one["id"], want.indices)
                followed = own.argmax(-1)[:, None]
                rank = (logits > logits.gather(-1, followed)).sum(-1) + 1
                np.testing.assert_array_equal(one["followed_rank"], rank)
                kl = torch.nn.functional.kl_div(log_prob, own.log_softmax(-1), reduction="none", log_target=True).sum(
                    -1
                )
                np.testing.assert_allclose(one["kl"], kl, rtol=1e-4, atol=1e-5)
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                np.testing.assert_allclose(one["entropy"], entropy, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere"])
def test_with_the_norm_held_two_states_differ_by_what_is_written_between_them(family: str) -> None:
    lm = model(family)
    ids, _ = ids_of(lm)
    found, direct = uw.lens(lm, ids, "frozen", answer=5), uw.dla(lm, ids, 5, total=False)
    end = found["followed_logit"].isel(position=-1)
    if lm.row.logit_cap(lm.config) is not None:  # what is capped does not add up
        cap = lm.row.logit_cap(lm.config)
        end = cap * np.arctanh(end / cap)
    after = [name for name in lm.nodes if name not in ("embed", "pos_embed")]
    between = direct["direct"].sel(node=after).sum("node")
    np.testing.assert_allclose(end[:, -1] - end[:, 0], between, rtol=1e-5)


def test_words_are_the_tokenizers_and_what_is_missing_is_empty() -> None:
    lm = uw.load(uw.planted().hf, uw.planted().tokenizer)
    found = uw.lens(lm, ["It is so", "It"], answer=["x", "y"], top=2)
    assert list(found["read"].values[1]) == [*found["read"].values[0][:2], *[""] * (found.data.sizes["position"] - 2)]
    assert list(found["followed"].values[:, 0]) == ["x", "y"]
    gone = found.data.isel(prompt=1, position=-1)
    assert gone["kl"].isnull().all()
    assert (gone["id"] == -1).all()
    assert (gone["token"] == "").all()
    best = found.data.isel(prompt=0, position=1, location=-1)
    assert best["token"].values[0] == spelled([int(best["id"][0])], lm.tokenizer)
    assert {"prompt", "location", "position", "token", "prob", "kl"} <= set(found.table())


def test_what_a_lens_cannot_say_is_refused() -> None:
    lm = model("gpt2")
    ids, _ = ids_of(lm)
    for error, settings in (
        (NumericError, {"kind": "tuned"}),
        (NumericError, {"top": 0}),
        (TokensError, {"answer": -1}),
    ):
        with pytest.raises(error):
            uw.lens(lm, ids, **settings)
    headless: Any = view(lm.hf.transformer)
    with pytest.raises(ModelError, match="head"):
        uw.lens(headless, ids)
