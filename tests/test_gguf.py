"""Is a GGUF file the model that was written into it, and what else can be handed over under that name?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from unwrite.errors import ModelError

gguf = pytest.importorskip("gguf")

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 16,
    "intermediate_size": 32, "vocab_size": 64, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
OF_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for ours, theirs in OF_BLOCK.items()
}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as the format has them: the two of a rotation side by side."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def hf() -> Any:
    return tiny.model("llama", 0, torch.float32, **SHAPE)


@pytest.fixture(scope="module")
def written(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, config = gguf.GGUFWriter(file, "llama"), hf.config
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, part in hf.state_dict().items():
        weight = part.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight = paired(weight, heads) if projection in name else weight
        writer.add_tensor(f"{NAMES[name.removesuffix('.weight')]}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where dequantised weights are kept: not in the cache of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unwrite"


def test_weights_are_dequantised_once(hf: Any, written: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = uw.load(written)
    (kept,) = cached.iterdir()
    assert {"config.json", "model.safetensors"} <= {file.name for file in kept.iterdir()}
    monkeypatch.setattr(gguf.GGUFReader, "get_tensor", lambda *_: pytest.fail("read again"))
    again = uw.load(written)
    with torch.no_grad():
        assert torch.equal(again.hf(IDS).logits, first.hf(IDS).logits)
    assert again.about["name"] == first.about["name"]
    assert [place.name for place in cached.iterdir()] == [kept.name]


def test_a_cache_that_cannot_be_written_is_gone_without(
    hf: Any, written: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.parent.mkdir()
    cached.write_text("a file where the folder should be")
    with torch.no_grad():
        assert torch.equal(uw.load(written).hf(IDS).logits, hf(IDS).logits)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cached.parent / "full"))
    monkeypatch.setattr("unwrite.model.gguf._ROOM", 0.0)
    assert uw.load(written).certificate.ok
    assert not [*(cached.parent / "full" / "unwrite").iterdir()]


@pytest.mark.promise("exact")
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_file_is_the_model_that_was_written(hf: Any, written: Path, folder: bool) -> None:
    lm = uw.load(written.parent if folder else written)
    with torch.no_grad():
        assert torch.equal(lm.hf(IDS).logits, hf(IDS).logits)
    assert lm.certificate.ok
    # Where it lay on this machine is nobody's business.
    assert "/" not in lm.about["name"]


def test_what_cannot_be_read_is_refused_in_words(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file .*other\.gguf"):
        uw.load(tmp_path / "other.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files. Got: a\.gguf, b\.gguf. Next: name one"):
        uw.load(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load a\.gguf"):
        uw.load(tmp_path / "a.gguf")


def test_a_missing_reader_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unwrite.model.gguf.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"not installed. Next: pip install 'unwrite\[gguf\]'"):
        uw.load(written)
