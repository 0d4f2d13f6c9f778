"""Is what a head is said to look at the pattern of the model, and what it brings from there what it really writes?"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import every
import tiny
import unwrite as uw
from executed import weights
from twin import Truth, carried, patterns
from unwrite.errors import ModelError, NodeError, NumericError
from unwrite.model.load import view
from unwrite.model.view import Model

LENGTHS = (6, 4)
# Eager attention is another function with alibi.
ALIBI = ("falcon",)
# Their write is scaled by a norm, which an edited pattern would change; or no module shows a pattern by itself.
NOT_ALONE = ("gemma2", "gemma3_text", "olmo2", "gpt_neo", "gptj", "bloom")


@cache
def model(family: str) -> Model:
    return view(weights(family), convention="raw")


def ids_of(lm: Model) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, lm.vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.promise("others")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pattern_is_that_of_eager_attention(family: str) -> None:
    lm = model(family)
    ids, mask = ids_of(lm)
    found = uw.attention(lm, ids, mask=mask)["weight"]
    for prompt, length in enumerate(LENGTHS):
        truth = Truth(lm.hf, ids[prompt : prompt + 1, :length])
        if family in ALIBI and lm.hf.config.alibi:
            with (
                torch.no_grad(),
                uw.trace(lm, *found["head"].values, *(f"{head}.pattern" for head in found["head"].values)) as t,
            ):
                lm.hf(truth.ids)
            want = torch.stack([t[f"{head}.pattern"][0] for head in found["head"].values])
        else:
            want = torch.cat(patterns(truth), 1)[0]
        one = found.sel(prompt=prompt)
        np.testing.assert_allclose(one[:, :length, :length], want, rtol=0, atol=1e-6)
        assert one[:, length:].isnull().all()
        assert one[:, :, length:].isnull().all()


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in NOT_ALONE])
def test_what_a_key_brings_is_what_the_head_writes_when_it_looks_at_nothing_else(family: str) -> None:
    lm = model(family)
    ids = ids_of(lm)[0][:1]
    found, pattern = (uw.attention(lm, ids, weigh, ["L1H1"])["weight"].values[0, 0] for weigh in ("value", "pattern"))
    for key in (0, 2):
        alone = torch.zeros(1, 6, 6, dtype=torch.float64)
        alone[0, :, key] = torch.from_numpy(pattern[:, key])
        with torch.no_grad(), uw.trace(lm, "L1H1", edits=uw.Edit.set("L1H1.pattern", alone)) as t:
            lm.hf(ids, use_cache=False)
        np.testing.assert_allclose(found[:, key], t["L1H1"][0].norm(dim=-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_under_the_papers_convention_it_is_equation_3_key_by_key(family: str) -> None:
    lm = view(weights(family))
    ids = ids_of(lm)[0][:1]
    truth = Truth(lm.hf, ids)
    found = uw.attention(lm, ids, "value")["weight"][0]
    pattern = patterns(truth)[1]
    for key in range(6):
        alone = torch.zeros_like(pattern)
        alone[..., key] = pattern[..., key]
        brought = truth.readable({"": carried(truth, 1, truth.states()["resid_post0"], alone)})[""]
        want = brought[0].norm(dim=-1).T
        names = [f"L1H{head}" for head in range(lm.n_heads)]
        np.testing.assert_allclose(found.sel(head=names, key=key), want, rtol=1e-5, atol=1e-9)


def test_mixers_have_no_pattern_and_are_named() -> None:
    lm = view(every.model("bamba"))
    ids = torch.arange(3, 9)[None]
    found = uw.attention(lm, ids)
    attends = [layer.index for layer in lm.layers if layer.attends]
    assert sorted({int(name.split("H")[0][1:]) for name in found["head"].values}) == attends
    silent = [f"L{layer.index}" for layer in lm.layers if not layer.attends]
    assert found.data.attrs["without_pattern"].split() == silent
    mixer = next(name for name in lm.nodes if "M" in name and not name.startswith("MLP"))
    with pytest.raises(NodeError, match=f"{mixer} has no pattern"):
        uw.attention(lm, ids, heads=[mixer])
    with pytest.raises(ModelError, match="no layer has attention"):
        uw.attention(view(every.model("mamba")), ids)
    with pytest.raises(NumericError, match="weigh"):
        uw.attention(lm, ids, "norm")
