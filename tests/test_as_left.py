"""Does a model give the plain model's numbers, however a person made or left it: modes, switches, attention?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from methods import COMBINED, IDS, METHODS, few_draws, shape
from test_families import ADDITIVE
from unwrite.errors import ModelError
from unwrite.model.load import view

pytestmark = pytest.mark.promise("exact")
ALL = {name: ask for name, ask in METHODS.items() if name not in COMBINED}


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


def plain(family: str) -> Any:
    return tiny.model(family, 1, torch.float64, **{**ADDITIVE.get(family, {}), **shape("")})


def in_inference_mode(family: str) -> Any:
    with torch.inference_mode():
        return plain(family)


def switched(hf: Any) -> Any:
    """With all that a training or generating script may have left switched."""
    if hf.supports_gradient_checkpointing:
        hf.activation_checkpointing_enable()
    hf.generation_config.cache_implementation = "static"
    # transformers cannot run most of its models so; with it, none.
    hf.config.return_dict = False
    hf.config.output_hidden_states = True
    return hf.train()


def eager(family: str) -> Any:
    hf = plain(family)
    hf.set_attn_implementation("eager")
    if hf.config._attn_implementation == "eager":
        hf.config.output_attentions = True
    return hf


def same(got: uw.Result, want: uw.Result) -> None:
    for name, part in want.data.data_vars.items():
        # A slope through points that hardly differ is nobody's number.
        if part.dtype.kind == "f" and name != "trust_slope":
            np.testing.assert_allclose(got[name], part, rtol=1e-4, atol=1e-6, err_msg=str(name))


@pytest.mark.parametrize("method", ALL)
def test_every_method_gives_what_it_gives_of_the_plain_model(method: str) -> None:
    want = ALL[method](view(plain("llama")))
    hf = switched(in_inference_mode("llama"))
    held = [*hf.parameters(), *hf.buffers()]
    same(ALL[method](view(hf)), want)
    assert all(a is b for a, b in zip([*hf.parameters(), *hf.buffers()], held, strict=True))
    assert all(part.training for part in hf.modules())
    assert hf.config.return_dict is False


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_every_family_how_a_model_was_left_changes_nothing(family: str) -> None:
    lm = view(plain(family))
    method = "effects ig" if lm.row.layer_norm else "effects relp"
    want = METHODS[method](lm)
    for hf in (switched(in_inference_mode(family)), eager(family)):
        same(METHODS[method](view(hf)), want)


def test_weights_of_inference_mode_are_known_again_and_their_change_is_seen() -> None:
    hf = in_inference_mode("llama")
    before = uw.scan(view(hf), IDS).provenance["model"]["weights"]
    lm = view(hf)
    assert uw.scan(lm, IDS).provenance["model"]["weights"] == before
    with torch.inference_mode():
        hf.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert uw.scan(lm, IDS).provenance["model"]["weights"] != before
    with uw.trace(lm, "L0H0") as seen:
        hf(IDS).logits.sum().backward()
    assert seen["L0H0"].grad is not None


def test_flash_attention_that_is_not_installed_is_refused_by_transformers_itself() -> None:
    with pytest.raises(ImportError, match="FlashAttention2"):
        plain("llama").set_attn_implementation("flash_attention_2")


def test_gradient_checkpointing_is_refused_where_a_pass_is_the_users_own() -> None:
    hf = switched(plain("llama"))
    hf.config.return_dict = True
    with pytest.raises(ModelError, match="gradient checkpointing"), uw.trace(view(hf), "L0H0"):
        hf(IDS)
