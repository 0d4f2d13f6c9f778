"""Can the bundled model be trained again? A cut run goes on as if it had not been cut, and held-out text stays out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unwrite as uw

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain" / "train.py"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "1234", "dogs", "ran", "far", "away", "until", "night", "fell"]


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(train, monkeypatch, tmp_path) -> argparse.Namespace:
    """Settings of a run of eight steps on made-up text."""
    chance = random.Random(0)
    made = {name: [" ".join(chance.choices(WORDS, k=2000)) for _ in range(2)] for name in ("books", "code")}
    monkeypatch.setattr(train, "texts", lambda _: made)
    monkeypatch.setattr("sys.argv", ["train.py", "--books", "none", "--out", str(tmp_path / "run"), "--no-compile"])
    settings = train.arguments()
    shape = {"width": 16, "layers": 1, "heads": 2, "context": 16, "batch": 2, "tokens": 8 * 2 * 16.0, "warm_up": 2}
    vars(settings).update(shape)
    return settings


@pytest.mark.parametrize("adamw", [False, True])
def test_a_cut_run_goes_on_to_the_same_weights(train, asked, monkeypatch, tmp_path, adamw) -> None:
    asked.adamw = adamw
    train.train(asked)
    whole = load_file(tmp_path / "run" / "newest.safetensors")

    asked.out, draw = tmp_path / "cut", train.batch
    monkeypatch.setattr(train, "SAVE_EVERY", 0)

    def cut(tokens: dict, settings: argparse.Namespace, step: int) -> torch.Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return draw(tokens, settings, step)

    monkeypatch.setattr(train, "batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(asked)
    assert json.loads((asked.out / "run.json").read_text())["step"] == 5
    monkeypatch.setattr(train, "batch", draw)
    train.train(asked)
    resumed = load_file(tmp_path / "cut" / "newest.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_other_settings_do_not_go_on_with_a_run(train, asked) -> None:
    train.train(asked)
    asked.lr = 1.0
    with pytest.raises(SystemExit, match="other settings"):
        train.train(asked)


def test_what_is_written_can_be_loaded(train, asked, tmp_path) -> None:
    asked.keep = [0.5]
    train.train(asked)
    lm = uw.load(tmp_path / "run" / "model")
    assert lm.dtype == torch.float32
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["transformer.wte.weight"].dtype == torch.float16
    assert lm.tokenizer.model_max_length == 16
    assert uw.load(tmp_path / "run" / "steps" / "4").d_model == 16


def test_text_is_cut_into_the_tokens_of_the_whole(train, tmp_path, monkeypatch) -> None:
    text = "One\ntwo  12.\n\nThree\n    four\n\n\n five\tsix \n seven" * 3
    monkeypatch.setattr(train, "texts", lambda _: {"books": [text], "code": [text, text]})
    found = train.prepare(Path("none"), tmp_path)
    from transformers import PreTrainedTokenizerFast

    first, *whole = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")(text)["input_ids"]
    assert first == 0  # which begins every row that the model is trained on
    np.testing.assert_array_equal(found["books"], [*whole, 0])
    np.testing.assert_array_equal(found["code"], [*whole, 0, *whole, 0])


def test_held_out_text_is_not_trained_on(train, tmp_path) -> None:
    for name in (*train.HELD_OUT, "other.txt"):
        (tmp_path / name).write_text(name)
    read = train.texts(tmp_path)
    assert read["books"] == ["other.txt"]
    from asyncio import base_events
    from pydoc_data import topics

    own = [Path(str(module.__file__)).read_text("utf-8") for module in (topics, base_events)]
    assert not set(own) & set(read["code"])
    assert Path(argparse.__file__).read_text("utf-8") in read["code"]
