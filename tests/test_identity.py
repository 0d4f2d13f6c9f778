"""Does a folder know the model that it was made with, beyond its weights?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import unwrite as uw
from unwrite.errors import ResultError
from unwrite.run.loop.checkpoint import alike

IDS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return tiny.model("llama", 4, torch.float32, num_hidden_layers=2, num_attention_heads=2)


def another_rope(hf: Any) -> None:
    hf.config.rope_parameters = {**hf.config.rope_parameters, "rope_theta": 50.0}
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)


def another_frequency(hf: Any) -> None:
    hf.model.rotary_emb.inv_freq.mul_(0.5)


def an_adapter(hf: Any) -> None:
    hf.model.layers[0].mlp._disable_adapters = False


def another_function(hf: Any) -> None:
    own = hf.model.layers[0].mlp.forward
    hf.model.layers[0].mlp.forward = lambda x: 0.5 * own(x)


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (another_rope, "model buffers, model configuration"),
    (another_frequency, "model buffers"),
    (an_adapter, "model adapters"),
    (another_function, "model logits"),
]


@pytest.mark.promise("resumed")
@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_folder_refuses_the_same_weights_in_another_model(
    change: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    hf = llama()
    uw.dla(uw.load(hf), IDS, 3, 5, checkpoint=tmp_path).save(tmp_path)
    again = uw.dla(uw.load(llama()), IDS, 3, 5, checkpoint=tmp_path)
    assert again.data.attrs["starts"] == 1
    change(hf)
    with pytest.raises(ResultError, match=f"holds the result of another run.*another {named}"):
        uw.dla(uw.load(hf), IDS, 3, 5, checkpoint=tmp_path)


def test_machines_may_round_differently_and_models_may_not() -> None:
    key = '{"model": {"logits": [10.0, -0.5], "weights": "a"}, "run": "x"}'
    assert alike(key, key.replace("-0.5", "-0.505"))
    assert not alike(key, key.replace("-0.5", "-0.6"))
    assert not alike(key, key.replace('"a"', '"b"'))
    assert not alike(key, key.replace('"x"', '"y"'))
    assert not alike("no key", key)
