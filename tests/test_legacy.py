"""Is a TransformerLens-era checkpoint read as TransformerLens reads it, with nothing in it run and nothing guessed?"""

from __future__ import annotations

import json
import logging
import pathlib
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax
from torch import Tensor

import unwrite as uw
from test_load import tokenizer
from unwrite.errors import ModelError
from unwrite.model import legacy
from unwrite.model.fold import fold
from unwrite.model.legacy import from_legacy, is_legacy
from unwrite.run.replay import clean as replay

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT / ".venv-legacy" / "bin" / "python"

CONFIG: dict[str, Any] = {
    "n_layers": 4, "d_model": 24, "d_mlp": 40, "d_head": 8, "n_heads": 3, "n_ctx": 16, "d_vocab": 50, "act_fn": "gelu",
    "attn_only": False, "normalization": "LN", "shortformer_pos": False, "tokenizer_name": "nobody/nothing",
    # What TransformerLens ignores.
    "ln_eps": 0.1, "seed": 9153, "neuron_temp": 2.0, "betas": [0.9, 0.99],
}  # fmt: skip
SIBLINGS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "gelu_new": {"act_fn": "gelu_new"},
    # As it was trained: with a default activation that nothing computes.
    "attn-only": {"attn_only": True, "act_fn": "solu_ln"},
    "folded": {"normalization": "LNPre"},
}
IDS = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(0))


def state(config: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A random state dict as such a model saved it, with its buffers; every gain and bias is random."""
    c, generator = config, torch.Generator().manual_seed(1)
    d, heads, width, neurons = c["d_model"], c["n_heads"], c["d_head"], c["d_mlp"]
    mlp = {"W_in": (d, neurons), "b_in": (neurons,), "W_out": (neurons, d), "b_out": (d,)}
    block: dict[str, tuple[int, ...]] = {f"attn.W_{x}": (heads, d, width) for x in "QKV"}
    block |= {f"attn.b_{x}": (heads, width) for x in "QKV"} | {"attn.W_O": (heads, width, d), "attn.b_O": (d,)}
    norms = [] if c["normalization"] == "LNPre" else ["ln1"] if c["attn_only"] else ["ln1", "ln2"]
    block |= {f"{norm}.{part}": (d,) for norm in norms for part in "wb"}
    block |= {} if c["attn_only"] else {f"mlp.{name}": size for name, size in mlp.items()}
    sizes: dict[str, tuple[int, ...]] = {"embed.W_E": (c["d_vocab"], d), "pos_embed.W_pos": (c["n_ctx"], d)}
    sizes |= {f"blocks.{layer}.{name}": size for layer in range(c["n_layers"]) for name, size in block.items()}
    sizes |= {"ln_final.w": (d,), "ln_final.b": (d,)} if norms else {"unembed.b_U": (c["d_vocab"],)}
    sizes["unembed.W_U"] = (d, c["d_vocab"])
    found = {name: 0.5 * torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}
    found = {name: 1 + tensor if name.endswith(".w") else tensor for name, tensor in found.items()}
    causal = torch.ones(c["n_ctx"], c["n_ctx"]).tril().bool()
    for layer in range(c["n_layers"]):
        found |= {f"blocks.{layer}.attn.mask": causal, f"blocks.{layer}.attn.IGNORE": torch.tensor(-1e5)}
    return found


def written(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda state: None, **settings: Any) -> Path:
    """A checkpoint folder, with a changed state dict or configuration."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **settings}.items() if value is not ...}
    tensors: dict[str, Any] = state({**CONFIG, **config})
    change(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "model_final.pth")
    return folder


def reference(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: np.ndarray) -> np.ndarray:
    """The logits of one prompt, from the definition of the model alone."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    gelu = {
        "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
        "gelu_new": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    }

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w.get(f"{name}.w", 1.0) + w.get(f"{name}.b", 0.0)

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        out = w[f"{name}.b_O"]
        for head in range(config["n_heads"]):
            q, k, v = (x @ w[f"{name}.W_{part}"][head] + w[f"{name}.b_{part}"][head] for part in "QKV")
            scores = q @ k.T / np.sqrt(config["d_head"])
            pattern = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf), -1)
            out = out + pattern @ v @ w[f"{name}.W_O"][head]
        return out

    x = w["embed.W_E"][ids] + w["pos_embed.W_pos"][: len(ids)]
    for block in (f"blocks.{layer}" for layer in range(config["n_layers"])):
        x = x + attention(norm(x, f"{block}.ln1"), f"{block}.attn")
        if not config["attn_only"]:
            neurons = gelu[config["act_fn"]](norm(x, f"{block}.ln2") @ w[f"{block}.mlp.W_in"] + w[f"{block}.mlp.b_in"])
            x = x + neurons @ w[f"{block}.mlp.W_out"] + w[f"{block}.mlp.b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"] + w.get("unembed.b_U", 0.0)


def logits(hf: Any) -> np.ndarray:
    with torch.no_grad():
        return hf(IDS).logits.numpy()


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * float(np.abs(want).max()))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_logits_are_those_of_the_definition(sibling: str, tmp_path: Path) -> None:
    config = {**CONFIG, **SIBLINGS[sibling]}
    hf = from_legacy(written(tmp_path, **SIBLINGS[sibling]))
    assert type(hf).__name__ == "GPT2LMHeadModel"
    assert not hf.training
    close(logits(hf), np.stack([reference(config, state(config), ids) for ids in IDS.numpy()]))


def test_gelu_is_exact_and_tanh_on_request(tmp_path: Path) -> None:
    exact, tanh = from_legacy(written(tmp_path)), from_legacy(tmp_path, activation="gelu_new")
    config = {**CONFIG, "act_fn": "gelu_new"}
    close(logits(tanh), np.stack([reference(config, state(config), ids) for ids in IDS.numpy()]))
    assert 1e-6 < np.abs(logits(exact) - logits(tanh)).max() < 0.1
    assert uw.load(tanh).certificate.ok


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint folder of each sibling, and beside each what TransformerLens makes of it."""
    if not ORACLE.is_file():
        pytest.skip("there is no .venv-legacy: make .venv-legacy/.done")
    place = tmp_path_factory.mktemp("oracle")
    folders = [written(place / sibling, **settings) for sibling, settings in SIBLINGS.items()]
    for folder in folders:
        np.save(folder / "ids.npy", IDS.numpy())
    script = ROOT / "tests" / "legacy_oracle.py"
    done = subprocess.run([ORACLE, script, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.promise("others")
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_transformer_lens_sees_the_same_writes_states_and_logits(sibling: str, oracle: Path) -> None:
    """The nodes of the convention "paper" are those of TransformerLens' default processing."""
    lm, seen = uw.load(oracle / sibling), np.load(oracle / sibling / "oracle.npz")
    run = replay.clean(lm, IDS, fold(lm))
    nodes = dict(zip(lm.nodes, torch.cat([*run.written(run.record)]).numpy(), strict=True))
    attn_only = lm.config.n_inner == 1
    close(nodes["embed"], seen["hook_embed"])
    close(nodes["pos_embed"], seen["hook_pos_embed"])
    for layer in range(4):
        for head in range(3):
            close(nodes[f"L{layer}H{head}"], seen[f"blocks.{layer}.attn.hook_result"][:, :, head])
        close(nodes[f"L{layer}.bias"], np.broadcast_to(seen[f"blocks.{layer}.attn.b_O"], (*IDS.shape, 24)))
        assert not attn_only or not nodes[f"MLP{layer}"].any()
        if not attn_only:
            close(nodes[f"MLP{layer}"], seen[f"blocks.{layer}.hook_mlp_out"])
    for location, stream in run.record.stream.items():
        absent = attn_only and location.state == "mid"
        close(stream.numpy(), seen[f"blocks.{location.layer}.hook_resid_{'post' if absent else location.state}"])
    ours = logits(lm.hf)
    close(ours - ours.mean(-1, keepdims=True), seen["logits"])


def test_a_folder_is_loaded_certified_and_scanned(tmp_path: Path) -> None:
    lm = uw.load(written(tmp_path / "tiny-4l"), dtype=torch.float32)
    assert lm.certificate.ok
    assert (lm.family, lm.about["name"], lm.dtype, lm.context) == ("gpt2", "tiny-4l", torch.float32, 16)
    assert lm.tokenizer is None
    assert uw.scan(lm, IDS)["share"].notnull().all()


def test_mlps_of_an_attention_only_model_never_write(tmp_path: Path) -> None:
    lm = uw.load(written(tmp_path, **SIBLINGS["attn-only"], d_mlp=96))
    assert lm.certificate.ok
    words = uw.scan(lm, IDS)["in_words"].to_series()
    assert {node for node in words.index if "never writes" in words[node]} == {f"MLP{layer}" for layer in range(4)}


def test_an_unembedding_bias_is_carried_and_certified(tmp_path: Path) -> None:
    bias = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = from_legacy(written(tmp_path / "a", lambda state: state.update({"unembed.b_U": torch.zeros(50)})))
    carried = uw.load(written(tmp_path / "b", lambda state: state.update({"unembed.b_U": bias})))
    assert plain.lm_head.bias is None
    assert carried.certificate.ok
    close(logits(carried.hf), logits(plain) + bias.numpy())


def test_dtype_and_device_are_honoured(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert uw.load(folder).dtype == torch.float64
    assert uw.load(str(folder), dtype="float32", device="cpu").dtype == torch.float32
    assert uw.load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"dtype is what weights are kept in. Got: 'float77'"):
        uw.load(folder, dtype="float77")


def test_the_saved_gpt2_is_the_same_model(tmp_path: Path) -> None:
    hf = from_legacy(written(tmp_path / "old"))
    hf.save_pretrained(tmp_path / "new")
    close(logits(uw.load(tmp_path / "new").hf), logits(hf))


@pytest.mark.promise("architecture")
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"act_fn": "solu_ln"}, "'solu_ln' is x · softmax"),
        ({"act_fn": "SoLU"}, "'SoLU' is x · softmax"),
        ({"act_fn": "relu"}, "'relu'.*only gelu"),
        ({"act_fn": ...}, "activation is None"),
        ({"shortformer_pos": True}, "shortformer_pos"),
        ({"normalization": "RMS"}, "'RMS'"),
        ({"normalization": None}, "normalization is None"),
        ({"normalization": ..., "normalization_type": "RMSPre"}, "'RMSPre'"),
        ({"final_rms": True}, "final_rms"),
        ({"architecture": "neel-solu-old"}, "layout is 'neel-solu-old'"),
        ({"architecture": "mingpt"}, "layout is 'mingpt'"),
        ({"d_head": 4}, "3 heads of 4. Expected: 24 in all"),
    ],
)
def test_a_sibling_that_gpt2_cannot_express_is_refused_by_name(settings: Any, why: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "sibling-1l", **settings)
    with pytest.raises(ModelError, match=f"sibling-1l cannot be expressed as a GPT-2: .*{why}"):
        uw.load(folder)


@pytest.mark.parametrize("odd", [..., None, 0, -1, 2.5, "8", True])
def test_a_size_that_the_configuration_leaves_open_is_refused(odd: Any, tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = {key: value for key, value in {**CONFIG, "n_heads": odd}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"leaves its size open\. Got: n_heads {None if odd is ... else repr(odd)}"):
        uw.load(folder)


def _nan(state: dict[str, Any]) -> None:
    state["blocks.1.mlp.W_in"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.2.attn.b_V"), "no blocks.2.attn.b_V"),
        (lambda state: state.update({"blocks.4.attn.W_Q": torch.zeros(3, 24, 8)}), "an unknown blocks.4.attn.W_Q"),
        (lambda state: state.update({"blocks.0.mlp.ln.w": torch.ones(40)}), "an unknown blocks.0.mlp.ln.w"),
        (lambda state: state.update({7: torch.ones(40)}), "an unknown 7"),
        (
            lambda state: state.update({"embed.W_E": state["embed.W_E"].T}),
            r"embed.W_E is \[24, 50\] and not \[50, 24\]",
        ),
        (lambda state: state.update({"unembed.b_U": torch.zeros(24)}), r"unembed.b_U is \[24\] and not \[50\]"),
        (_nan, "blocks.1.mlp.W_in is not finite"),
        (lambda state: state.update({"ln_final.b": torch.full((24,), torch.inf)}), "ln_final.b is not finite"),
        (
            lambda state: state.update({"ln_final.b": torch.zeros(24, dtype=torch.long)}),
            "ln_final.b is no dense tensor",
        ),
        (lambda state: state.update({"ln_final.b": [0.0] * 24}), "ln_final.b is no dense"),
        (lambda state: state.update({"norm.w": state.pop("ln_final.w")}), "_old checkpoint.*no ln_final.w"),
        (lambda state: state.clear(), "no embed.W_E, .* and 64 more"),
    ],
)
def test_tensors_that_are_not_as_described_are_named(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"model_final.pth is not what its config.json describes. Got: .*{message}"):
        uw.load(written(tmp_path, change))


class Code:
    """What a pickle would run on being opened."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path(self.place),)


@pytest.mark.promise("no-code")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(zipped: bool, tmp_path: Path) -> None:
    folder, ran = written(tmp_path / "model"), tmp_path / "ran"
    file = folder / "model_final.pth"
    torch.save({"embed.W_E": Code(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"model_final\.pth cannot be opened as a state dict.*is never run"):
        uw.load(folder)
    assert not ran.exists()
    torch.load(file, weights_only=False)  # it would have
    assert ran.exists()


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"PK\x03\x04"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (written(tmp_path) / "model_final.pth").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be opened as a state dict"):
        uw.load(tmp_path)


def test_a_file_without_names_and_two_files_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    torch.save([torch.zeros(2)], folder / "model_final.pth")
    with pytest.raises(ModelError, match=r"is no state dict\. Got: list"):
        uw.load(folder)
    torch.save({}, folder / "other_final.pth")
    with pytest.raises(ModelError, match=r"several final checkpoints\. Got: model_final\.pth, other_final\.pth"):
        uw.load(folder)


def test_only_such_a_folder_is_legacy(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert is_legacy(folder)
    for config in ('{"model_type": "gpt2", "d_model": 24, "n_layers": 4}', '{"d_model": 24}', "[]", "{", "\0"):
        (folder / "config.json").write_text(config)
        assert not is_legacy(folder)
        with pytest.raises(ModelError, match="is no TransformerLens-era checkpoint"):
            from_legacy(folder)
        with pytest.raises(ModelError, match="only pickled weights, which can run any code when opened"):
            uw.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        uw.load(folder)
    with pytest.raises(ModelError, match=r"unknown activation\. Got: 'tanh'"):
        from_legacy(folder, activation="tanh")


def test_a_tokenizer_that_cannot_be_had_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path)
    assert uw.load(folder).tokenizer is None
    assert [(note.name, note.levelno) for note in caplog.records] == [("unwrite", logging.WARNING)]
    assert "nobody/nothing cannot be had" in caplog.text
    caplog.clear()
    assert uw.load(folder, tokenizer(40)).tokenizer is not None
    for place in (tmp_path / "elsewhere", folder):
        tokenizer(40).save_pretrained(place)
        assert uw.load(written(folder, tokenizer_name=str(place))).tokenizer.get_vocab() == tokenizer(40).get_vocab()
    assert not caplog.records


def test_a_hub_name_of_such_a_checkpoint_fetches_its_configuration_and_final_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshots").mkdir()
    folder, described, asked = written(tmp_path / "snapshots" / "a4f4290"), {**CONFIG}, []
    monkeypatch.setattr(legacy.PretrainedConfig, "get_config_dict", lambda source, **_: (described, {}))
    monkeypatch.setattr(
        legacy, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(folder)
    )
    lm = uw.load("somebody/GELU_4L", revision="main")
    assert asked[:1] == [(("somebody/GELU_4L",), {"revision": "main", "allow_patterns": ["config.json", "*final.pth"]})]
    assert (lm.about["name"], lm.about["commit"]) == ("somebody/GELU_4L", "a4f4290")
    close(logits(lm.hf), logits(from_legacy(folder)))
    described["act_fn"] = "solu_ln"
    with pytest.raises(ModelError, match="somebody/SoLU_4L cannot be expressed"):
        uw.load("somebody/SoLU_4L")
    assert [source for (source,), _ in asked] == ["somebody/GELU_4L", CONFIG["tokenizer_name"]]


def test_a_hub_name_of_any_other_model_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy.PretrainedConfig, "get_config_dict", lambda source, **_: ({"model_type": "t5"}, {}))
    monkeypatch.setattr(legacy, "snapshot_download", lambda *_, **__: pytest.fail("it was fetched"))
    assert legacy.checkpoint("somebody/t5") is None
    with pytest.raises(ModelError, match="t5 is an encoder"):
        uw.load("somebody/t5")
