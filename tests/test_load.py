"""What does loading refuse, in which words, and does it leave the user's model as it was?"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import tiny
import unwrite as uw
from tiny import snapshot
from unwrite.errors import ModelError, TokensError

# One of every way in which attention is reached: the interface, own code, own code with a branch for sdpa, post-norms.
WAYS = ("gpt2", "gpt_neo", "falcon", "gemma2", "qwen2_moe")
IDS = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=WAYS)
def hf(request: pytest.FixtureRequest) -> Any:
    """A model with settings of its user's: hooks, parts in training mode, frozen weights."""
    model = tiny.model(request.param, 4)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks[0].train()
    blocks[1].register_forward_hook(lambda module, args, output: None)
    blocks[1].register_forward_pre_hook(lambda module, args: None)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.promise("untouched")
def test_load_and_scan_leave_the_model_as_it_was(hf: Any) -> None:
    before = snapshot(hf)
    lm = uw.load(hf)
    assert snapshot(hf) == before
    uw.scan(lm, IDS)
    assert snapshot(hf) == before
    assert lm.hf is hf
    assert not [name for register in before["registers"] for name in register if "unwrite" in name]


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("call", [1, 2, 4])  # of these, the even ones record the attention patterns
def test_a_failure_inside_a_forward_pass_leaves_the_model_as_it_was(hf: Any, call: int) -> None:
    lm, calls = uw.load(hf), itertools.count(1)

    def fails(*_: Any) -> None:
        if next(calls) == call:
            raise RuntimeError("planted failure")

    handle = lm.layers[1].out_proj.register_forward_hook(fails)
    before = snapshot(hf)
    with pytest.raises(ModelError, match="planted failure"):
        uw.load(hf)
    assert snapshot(hf) == before
    calls = itertools.count(call)
    with pytest.raises(RuntimeError, match="planted failure"):
        uw.scan(lm, IDS)
    assert snapshot(hf) == before
    handle.remove()
    assert uw.load(hf).certificate.ok


@pytest.mark.promise("untouched")
def test_logits_are_bit_for_bit_what_they_were(hf: Any) -> None:
    hf.eval()
    with torch.no_grad():
        before = hf(IDS).logits
        uw.scan(uw.load(hf), IDS)
        assert torch.equal(hf(IDS).logits, before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "falcon", "gemma2", "olmo2", "granite", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_passes_its_own_limit(family: str, dtype: torch.dtype) -> None:
    lm = uw.load(tiny.model(family, 5, dtype))
    assert lm.certificate.ok
    assert lm.certificate.dtype == str(dtype).removeprefix("torch.")
    assert lm.compute_dtype == torch.float32
    assert uw.scan(lm, IDS)["share"].notnull().all()


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bloom", "gemma3_text", "falcon"])
def test_a_saved_model_loads_from_its_folder_with_the_same_numbers(family: str, tmp_path: Path) -> None:
    model = tiny.model(family, 6, torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer(40).save_pretrained(tmp_path)
    here, there = uw.load(model), uw.load(tmp_path)
    assert there.dtype == torch.float32
    assert there.tokenizer.get_vocab() == tokenizer(40).get_vocab()
    results = [uw.scan(lm, IDS) for lm in (here, there, uw.load(str(tmp_path), dtype=torch.float64))]
    weights = [result.provenance["model"]["weights"] for result in results]
    assert weights[0] == weights[1] != weights[2]
    for result in results[1:]:
        np.testing.assert_allclose(result["share"], results[0]["share"], atol=1e-4)


@pytest.mark.promise("provenance")
def test_the_weights_hash_follows_a_change_in_place() -> None:
    model = tiny.model("llama")
    first, again = (uw.scan(uw.load(model), IDS).provenance["model"]["weights"] for _ in range(2))
    lm = uw.load(model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert first == again != uw.scan(lm, IDS).provenance["model"]["weights"]


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), unk_token="w0")


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("ids", [50, 60, 61])
def test_ids_that_the_embedding_does_not_have_are_an_error_only_where_they_occur(ids: int) -> None:
    lm = uw.load(tiny.model("gpt2", vocab_size=60), tokenizer(ids))
    assert uw.scan(lm, ["w3", "w49"], skip=0).provenance["tokens"][""]["tokens"] == 2
    if ids > 60:
        with pytest.raises(TokensError, match=r"id 60 at prompt 1, position 0\. Expected: 0 to 59"):
            uw.scan(lm, ["w3", "w60"], skip=0)


@pytest.mark.parametrize("wrong", ["gpt2", tokenizer(9).backend_tokenizer])
def test_what_is_no_tokenizer_of_transformers_is_an_error(wrong: object) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer of transformers.*Next: AutoTokenizer"):
        uw.load(tiny.model("gpt2"), wrong)


def folder(path: Path, config: Mapping[str, Any], *files: str) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    for name in files:
        (path / name).write_bytes(b"")
    return path


@pytest.mark.promise("exact")
@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, "post-LN"),
        ("opt", {"word_embed_proj_dim": 12, "hidden_size": 24}, "projects the stream"),
        ("opt", {"word_embed_proj_dim": None, "_remove_final_layer_norm": True}, "no final norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual is taken after the norm"),
        ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}, "slices"),
    ],
)  # fmt: skip
def test_a_configuration_whose_writes_do_not_add_up_is_refused(family: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        uw.load(tiny.model(family, **settings))


@pytest.mark.promise("finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    hf = tiny.model("llama")
    with torch.no_grad():
        hf.model.layers[-1].mlp.down_proj.weight[0] = value
    with pytest.raises(
        ModelError, match=r"weights that are no numbers\. Got: NaN or infinity in .*mlp\.down_proj\.weight"
    ):
        uw.load(hf)


@pytest.mark.promise("architecture")
def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="t5 is an encoder–decoder"):
        uw.load(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.promise("architecture")
@pytest.mark.parametrize("part", ["qwen3_vl_text", "clip_vision_model"])
def test_a_part_of_a_model_that_makes_no_logits_is_refused(part: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"no model that makes logits of text from {part} by itself.*Next: load the"):
        uw.load(folder(tmp_path, {"model_type": part}, "model.safetensors"))


Make = Callable[[Path], Path]


def _empty(path: Path) -> Path:
    return path


def _no_weights(path: Path) -> Path:
    return folder(path, {"model_type": "gpt2"})


def _pickled(path: Path) -> Path:
    return folder(path, {"model_type": "gpt2"}, "pytorch_model.bin")


def _own_code(path: Path) -> Path:
    (path / "modeling_mine.py").write_text(f"import pathlib; pathlib.Path({str(path / 'ran')!r}).touch()")
    auto = {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Mine"}
    return folder(path, {"model_type": "mine", "auto_map": auto}, "model.safetensors")


def _no_such_type(path: Path) -> Path:
    return folder(path, {"model_type": "mine"}, "model.safetensors")


def _damaged(path: Path) -> Path:
    tiny.config("gpt2", random.Random(0)).save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    return path


@pytest.mark.promise("no-code")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "no config.json"),
        (_no_weights, "has no weights"),
        (_pickled, "only pickled weights, which can run any code when opened. Got: pytorch_model.bin"),
        (_own_code, "brings its own code; read it, then pass trust_remote_code=True"),
        (_no_such_type, "check model_type in its config.json, or update transformers"),
        (_damaged, "cannot load"),
        (lambda path: path / "missing", "cannot load"),
    ],
)
def test_a_folder_that_cannot_be_read_safely_is_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        uw.load(make(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "option", [{"dtype": torch.float16}, {"device": "cpu"}, {"device_map": "auto"}, {"revision": "main"}]
)
def test_a_model_in_memory_stays_as_it_is(option: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="stays as it is"):
        uw.load(tiny.model("gpt2"), **option)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'folded'.*'paper' or 'raw'"):
        uw.load(tiny.model("gpt2"), convention="folded")


@pytest.mark.parametrize("source", [None, 3, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(source: Any) -> None:
    with pytest.raises(ModelError, match="cannot load this"):
        uw.load(source)
