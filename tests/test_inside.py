"""Is the decoder found that reads text, wherever it is, and is whoever needs logits told where there are none?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
    PaliGemmaConfig,
    SiglipVisionConfig,
)

import every
import tiny
import unwrite as uw
from methods import IDS, METHODS, PAIRS, VARIANTS, few_draws, shape
from seeing import SEEN, around, text
from unwrite.errors import ModelError
from unwrite.model.certificate import IDENTITIES
from unwrite.model.load import view
from unwrite.model.view import Model

NO_LOGITS = r"has no language-model head, so it gives no logits of tokens"


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


def same(got: uw.Result, want: uw.Result, *names: str) -> None:
    for name, part in want.data.data_vars.items():
        if part.dtype.kind == "f" and (not names or name in names):
            np.testing.assert_allclose(got[name], part, rtol=1e-5, atol=1e-8, err_msg=str(name))


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_text_decoder_is_what_it_is_inside_of_another_model(family: str, tmp_path: Path) -> None:
    whole, plain = around(family)
    lm, alone = uw.load(whole), uw.load(plain)
    assert lm.hf is whole
    assert lm.nodes == alone.nodes
    assert set(lm.certificate) == set(IDENTITIES)
    asked = ("scan", "dla", "effects", "effects atp*", "paths recompute", "verify")
    for name in asked if family == "llama" else asked[:3]:
        same(METHODS[name](lm), METHODS[name](alone))
    with torch.no_grad(), uw.trace(lm, "L1H0.pattern", edits=uw.Edit.set("L0H0", 0.0)) as seen:
        got = whole(input_ids=IDS).logits
    with torch.no_grad(), uw.trace(alone, "L1H0.pattern", edits=uw.Edit.set("L0H0", 0.0)) as want:
        torch.testing.assert_close(got, plain(IDS).logits)
    torch.testing.assert_close(seen["L1H0.pattern"], want["L1H0.pattern"])
    whole.save_pretrained(tmp_path)
    kept = uw.load(tmp_path)
    assert type(kept.hf) is type(whole)
    with torch.no_grad():
        assert torch.equal(kept.hf(input_ids=IDS).logits, whole(input_ids=IDS).logits)


@pytest.mark.promise("exact")
def test_what_reads_text_otherwise_inside_of_another_model_is_refused() -> None:
    seen = SiglipVisionConfig(projection_dim=16, **SEEN)
    config = PaliGemmaConfig(vision_config=seen, text_config=text("gemma").config, image_token_index=59)
    with pytest.raises(ModelError, match="is not causal: a changed last token moves the logits before it"):
        uw.load(AutoModelForMultimodalLM.from_config(config, dtype=torch.float64).eval())


@pytest.mark.parametrize(
    ("kind", "mapping", "asks", "instead"),
    [
        ("blip-2", "images", "pixel_values", r"pass .* its \.language_model \(OPTForCausalLM\)"),
        (
            "idefics",
            "images",
            "pixel_values, image_encoder_embeddings, perceiver_embeddings",
            "use a decoder that does",
        ),
        ("kosmos-2", "images", "pixel_values, image_embeds", r"pass .* its \.text_model \(Kosmos2TextForCausalLM\)"),
        ("gemma4_unified_assistant", "text", "inputs_embeds, shared_kv_states", "use a decoder that does"),
    ],
)
def test_what_does_not_run_on_text_alone_is_told_what_it_asks_for(
    kind: str, mapping: str, asks: str, instead: str
) -> None:
    hf = every.model(kind, mapping)
    with pytest.raises(ModelError, match=rf"does not run on text alone: .* asks for {asks}\. Expected: .*{instead}"):
        uw.load(hf)
    if kind == "blip-2":
        assert uw.load(hf.language_model).certificate.ok


# --- no head ----------------------------------------------------------------------------------------------------------

WITHOUT = ("scan", "attention", "verify", "verify erasers", "survival", "survival raw")


def both(family: str) -> tuple[Model, Model]:
    hf = text(family)
    return view(hf), view(hf.base_model)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_without_a_head_a_scan_and_survival_are_the_same(family: str) -> None:
    lm, bare = both(family)
    assert set(bare.certificate) == {*IDENTITIES} - {"logits", "reading"}
    assert bare.certificate.ok
    assert "logits and reading not checked: there is no language-model head" in bare.certificate.explain()
    if family == "llama":
        # What weighs channels as readers read them has other readers.
        same(METHODS["verify"](bare), METHODS["verify"](lm), "level_share", "share", "share_without", "read", "generic")
        same(VARIANTS["survival raw"](bare), VARIANTS["survival raw"](lm))
        assert np.isfinite(METHODS["survival"](bare)["median_survival"]).any()
        with pytest.raises(ModelError, match=NO_LOGITS):
            uw.survival(bare, IDS, ["L0H0"], "unembed")
    same(METHODS["scan"](bare), METHODS["scan"](lm))
    with torch.no_grad(), uw.trace(bare, "L1H1", edits=uw.Edit.set("L0H0", 0.0)) as got:
        bare.hf(IDS)
    with torch.no_grad(), uw.trace(lm, "L1H1", edits=uw.Edit.set("L0H0", 0.0)) as want:
        lm.hf(IDS)
    assert torch.equal(got["L1H1"], want["L1H1"])


@pytest.mark.promise("exact")
@pytest.mark.parametrize("method", [name for name in {**METHODS, **VARIANTS} if name not in WITHOUT])
def test_whatever_needs_logits_says_that_there_are_none(method: str, tmp_path: Path) -> None:
    bare = view(tiny.model("llama", 0, torch.float64, **shape(method)).model)
    with pytest.raises(ModelError, match=rf"LlamaModel {NO_LOGITS}.*Next: load it with AutoModelForCausalLM"):
        {**METHODS, **VARIANTS}[method](bare, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_logits_are_had_by_one_door() -> None:
    source = Path(uw.__file__).parent
    for file in source.rglob("*.py"):
        named = {part.attr for part in ast.walk(ast.parse(file.read_text())) if isinstance(part, ast.Attribute)}
        if file.name not in ("view.py", "inside.py", "complete.py", "legacy.py"):
            assert not named & {"get_output_embeddings", "lm_head"}, file
        calls = [part for part in ast.walk(ast.parse(file.read_text())) if isinstance(part, ast.Call)]
        if file.name != "identities.py":
            assert not [call for call in calls if ast.unparse(call.func).endswith("lm.hf")], file


@pytest.mark.promise("exact")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_without_a_head_is_given_none(family: str, tied: bool, tmp_path: Path) -> None:
    hf = tiny.model(family, 0, torch.float32, tie_word_embeddings=tied, **shape(""))
    hf.base_model.save_pretrained(tmp_path)
    lm = uw.load(tmp_path)
    assert lm.has_head == tied
    same(uw.scan(lm, IDS), uw.scan(uw.load(hf), IDS))
    if tied:
        same(uw.dla(lm, IDS, 5, 9), uw.dla(uw.load(hf), IDS, 5, 9))
    else:
        with pytest.raises(ModelError, match=NO_LOGITS):
            uw.dla(lm, IDS, 5, 9)


def test_a_folder_that_lacks_other_weights_is_refused(tmp_path: Path) -> None:
    hf = tiny.model("llama", 0, torch.float32, **shape(""))
    del hf.model.layers[1].mlp.down_proj
    hf.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks weights.*Got: no model\.layers\.1\.mlp\.down_proj"):
        uw.load(tmp_path)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_is_refused_and_what_it_stands_on_is_not(kind: Any, tied: bool, tmp_path: Path) -> None:
    hf = tiny.model("llama", 0, torch.float64, tie_word_embeddings=tied, **shape(""))
    classifier = kind.from_config(hf.config, dtype=torch.float64)
    said = rf"Llama\w+Classification {NO_LOGITS}.*Next: "
    with pytest.raises(ModelError, match=rf"{said}.*AutoModelForCausalLM.*pass its \.model for what needs none"):
        uw.load(classifier)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        uw.load(tmp_path)
    found = uw.scan(uw.load(classifier.model), IDS)
    same(found, uw.scan(uw.load(AutoModel.from_pretrained(tmp_path)), IDS))


def test_two_heads_are_asked_about_the_logits_of_tokens() -> None:
    hf = tiny.model("gpt2", 0, torch.float64, **shape(""))
    two = GPT2DoubleHeadsModel(hf.config).double().eval()
    two.transformer.load_state_dict(hf.transformer.state_dict())
    two.lm_head.load_state_dict(hf.lm_head.state_dict())
    same(uw.effects(uw.load(two), PAIRS), uw.effects(uw.load(hf), PAIRS))
