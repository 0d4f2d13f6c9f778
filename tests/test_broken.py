"""Is a model that is broken, or that is none, refused in words where it is loaded and wherever a model is asked?"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
import transformers as tf
from torch import nn

import unwrite as uw
from executed import weights
from test_foreign import calls, wrong
from unwrite.errors import ModelError, UnwriteError

_TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def gpt2() -> Any:
    return weights("gpt2", 0, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)


class Wrapper(nn.Module):
    """As a training loop wraps a model, or an adapter does whose base is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.peft_config = gpt2(), {}

    def get_base_model(self) -> nn.Module:
        return nn.Sequential(self.model)


class Failing(Wrapper):
    def get_base_model(self) -> nn.Module:
        raise KeyError("default")


def changed(change: Callable[[Any], object]) -> Any:
    hf = gpt2()
    change(hf)
    return hf


def on_meta() -> Any:
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(gpt2().config)


def bert(kind: Any) -> Any:
    return kind(tf.BertConfig(**_TINY, is_decoder=True))


def t5(kind: Any) -> Any:
    return kind(tf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def spoil(hf: Any) -> None:
    hf.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan


# What is no decoder, and what is said of it.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a wrapper": (Wrapper, "cannot load this. Got: Wrapper"),
    "a wrapper that fails": (Failing, "Failing does not give the model that it adapts. Got: .*default.*Next: pass the"),
    "a layer": (lambda: nn.Linear(2, 2), "cannot load this. Got: Linear"),
    "a state dict": (lambda: gpt2().state_dict(), "cannot load this. Got: OrderedDict of 29"),
    "a configuration": (lambda: gpt2().config, "cannot load this. Got: GPT2Config"),
    "a pipeline": (lambda: SimpleNamespace(model=gpt2(), task="text-generation"), "cannot load this"),
    "a class": (lambda: tf.GPT2LMHeadModel, "cannot load this. Got: the class GPT2LMHeadModel"),
    "empty weights": (on_meta, "is empty .on the device meta."),
    "weights that are NaN": (lambda: changed(spoil), "has weights that are no numbers. Got: .*h.1.mlp.c_fc.weight"),
    "an encoder": (
        lambda: bert(tf.BertModel),
        "bert has no row in the table .*output is not a sum that holds its input",
    ),
    "a masked model": (lambda: bert(tf.BertForMaskedLM), "bert has no row in the table .*output is not a sum"),
    "an encoder and a decoder": (lambda: t5(tf.T5ForConditionalGeneration), "t5 is an encoder–decoder. Expected: "),
    "half of one": (
        lambda: t5(tf.T5EncoderModel),
        "t5 has no row in the table of families, and none can be found: its embedding of tokens",
    ),
    "no unembedding": (lambda: changed(lambda hf: setattr(hf, "lm_head", nn.Identity())), "could not be run .*Next: "),
    "no output": (lambda: changed(lambda hf: setattr(hf, "forward", lambda **_: None)), "could not be run .*Next: "),
    "a pass that fails": (
        lambda: changed(lambda hf: setattr(hf, "forward", lambda **_: 1 / 0)),
        "its own forward pass fails. Got: division by zero. Next: see that it runs by itself",
    ),
}


def saved(folder: Path, change: Callable[[Path], object]) -> Path:
    gpt2().save_pretrained(folder)
    change(folder)
    return folder


def told(**other: Any) -> Callable[[Path], object]:
    """Another configuration beside the same weights."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | other))

    return change


def config(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def model(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return write


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "has no config.json. Expected: a folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights. Expected: "),
    "no JSON": (config("no JSON"), "cannot load .*not a valid JSON file. Next: check"),
    "bytes": (config(b"\xff\xfe\x00"), "cannot load .*not a valid JSON file. Next: check"),
    "a list": (config("[]"), "cannot load .*Next: check model_type in its config.json"),
    "an empty object": (config("{}"), "cannot load .*Next: check model_type in its config.json"),
    "another architecture": (told(model_type="nonsense"), "cannot load .*Next: check model_type in its config.json"),
    "a number for a name": (told(model_type=3), "cannot load .*Next: check model_type in its config.json"),
    "more layers than weights": (told(n_layer=3), "lacks weights, .*Got: no transformer.h.2.* and 9 more. Expected: "),
    "no layers": (told(n_layer=0), "could not be run .*Next: "),
    "heads that do not divide": (told(n_head=5), "must be divisible by num_heads"),
    "a width that is text": (told(n_embd="x"), "cannot load .*n_embd"),
    "another width": (told(n_embd=32), "Next: take config.json and weights from one place"),
    "another activation": (told(activation_function="nonsense"), "cannot load .*nonsense"),
    "weights that are none": (model(lambda _: b"garbage" * 10), "cannot load .*Next: "),
    "half of the weights": (model(lambda whole: whole[: len(whole) // 2]), "cannot load .*Next: "),
}

NAMES: dict[str, str] = {
    "nonsense": "cannot load nonsense. Got: .*Next: check the name, the folder and the network",
    "a/b/c": "cannot load a/b/c: there is no such folder. Expected: .*Next: check the path",
    "https://huggingface.co/gpt2": "there is no such folder.*on the hub a model is called name or owner/name",
    "a b?": "cannot load a b\\?. Got: .*Next: ",
    "": "cannot load this. Got: ''. Expected: a hub name",
    "a\0b": "no file can be called 'a.x00b'",
    "x" * 5000: "no file can be called 'xxx.*…. Got: File name too long",
    "some.txt": "some.txt is a file. Expected: a folder as save_pretrained writes it, or a GGUF file",
    "some.gguf": "cannot load some.gguf. Got: .*it is not a GGUF file",
}


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def refused(source: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        uw.load(source)
    assert wrong(str(caught.value)) is None, str(caught.value)


@pytest.mark.promise("architecture")
@pytest.mark.filterwarnings("ignore")  # of transformers, about the strange models
@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_whole_decoder_is_refused_in_words(name: str) -> None:
    make, says = MODELS[name]
    refused(make(), says)


@pytest.mark.promise("errors")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_holds_no_model_is_refused_in_words(name: str, tmp_path: Path) -> None:
    change, says = FOLDERS[name]
    refused(saved(tmp_path / "model", change), says)


@pytest.mark.promise("errors")
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_is_none_is_refused_in_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("some.txt", "some.gguf"):
        Path(file).write_text("no model")
    refused(name, NAMES[name])


@pytest.mark.promise("errors")
def test_wherever_a_model_is_asked_only_one_that_was_loaded_is_taken() -> None:
    asks = {name: call for name, call in calls().items() if "lm" in inspect.signature(call.of).parameters}
    assert {"scan", "dla", "effects", "audit", "doctor", "trace"} <= set(asks)
    for name, call in asks.items():
        for kind in ("a wrapper", "a layer", "a state dict", "a pipeline", "empty weights", "an encoder"):
            with pytest.raises(UnwriteError, match=r"no model of unwrite. Got: .*Next: lm = uw.load") as caught:
                call(lm=MODELS[kind][0]())
            assert wrong(str(caught.value)) is None, (name, kind, str(caught.value))
