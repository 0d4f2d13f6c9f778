"""Is the model that ships what its card says: small, exact, not trained on what judges it, and does it erase?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from safetensors.torch import load_file

import unwrite as uw
from unwrite.model.load import BUNDLED
from unwrite.model.view import Model

BOOKS = ("jane-austen_emma.txt", "h-g-wells_the-war-of-the-worlds.txt")


@pytest.fixture(scope="module")
def lm() -> Model:
    return uw.load("default")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((BUNDLED / "training.json").read_text())


def test_it_is_small_and_stored_in_half_precision_but_computes_in_single(lm) -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 12 * 2**20
    assert {part.dtype for part in load_file(BUNDLED / "model.safetensors").values()} == {torch.float16}
    assert lm.dtype == torch.float32
    assert max(lm.certificate.errors.values()) < 1e-5


def test_its_shape_is_gelu_4l_in_miniature(lm, record) -> None:
    assert (len(lm.layers), lm.n_heads, lm.hf.config.activation_function) == (4, 8, "gelu")
    assert lm.hf.config.n_embd == record["settings"]["width"]
    assert lm.hf.config.tie_word_embeddings == record["settings"]["tied"]
    assert lm.hf.config.n_positions == lm.tokenizer.model_max_length == record["settings"]["context"]


def test_its_tokenizer_splits_digits_and_loses_no_byte(lm) -> None:
    assert len(lm.tokenizer) == 4096
    assert len(lm.tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
    text = "naïve “quotes”\t\n\n  def f(x): return x**2  # 日本 \x00"
    first, *ids = lm.tokenizer(text)["input_ids"]
    assert lm.tokenizer.decode(ids) == text
    assert first == lm.tokenizer.bos_token_id == uw.text(text, lm.tokenizer, length=8).ids[0, 0]


def test_default_cannot_be_mistaken_for_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").mkdir()
    assert uw.load("default").about["name"] == "unwrite's own model"
    with pytest.raises(uw.errors.ModelError, match=r"no config\.json"):
        uw.load("./default")


@pytest.mark.shared
def test_its_loss_on_books_that_it_never_saw_is_what_its_card_says(lm, record, shared, record_property) -> None:
    """Nats per token over the same windows, by weights of the log-softmax in float64."""
    for name in BOOKS:
        ids = uw.text(shared / "corpus" / "books" / name, lm.tokenizer, n=100).ids
        losses = []
        for part in np.split(ids, 20):
            with torch.no_grad():
                logits = lm.hf(torch.from_numpy(part)).logits[:, :-1].double().numpy()
            right = np.take_along_axis(logits, part[:, 1:, None], -1)[..., 0]
            losses.append(scipy.special.logsumexp(logits, -1) - right)
        loss = np.mean(losses)
        record_property("measured", f"{name}: {loss:.3f} nats per token, perplexity {np.exp(loss):.1f}")
        assert loss == pytest.approx(record["held_out"][name], abs=2e-3)


@pytest.mark.parametrize("index", range(4))
def test_its_prompts_mislead_as_recorded(lm, index) -> None:
    """direct is large, and taking the write away does next to nothing: by a plain hook on the model."""
    found = json.loads((BUNDLED / "prompts.json").read_text())
    assert len(found) == 4
    one = found[index]
    asked = uw.dla(lm, one["text"], one["answer"], one["against"]).data.isel(prompt=0).sel(node=one["writer"])
    for name in ("direct", "net", "relp", "gradient", "total"):
        assert float(asked[name]) == pytest.approx(one[name], abs=2e-3)
    assert abs(one["direct"]) >= 0.25 * abs(one["logit_diff"])
    assert abs(one["total"]) <= 0.25 * abs(one["direct"])


def test_it_erases(lm, record) -> None:
    """A head that its card calls erased is so by stricter rules, on text that neither chose it nor trained it."""
    from unwrite.studies.audit import demonstration

    assert "L1H5" in [row["writer"] for row in record["writers"] if row["verdict"] == "erased"]
    writers = [str(node) for node in lm.parts if node.layer in (0, 1) and node.kind in ("head", "mlp")]
    found = uw.survival(lm, demonstration(lm, n=12, length=48), writers).data.sel(writer="L1H5")
    assert found["verdict"].item() == "erased"
    # What its words mean, by numbers: little is left, surely less than of ordinary writes, and because of later nodes.
    low, median = (float(found["ordinary"].sel(control="typical", bound=bound)) for bound in ("low", "median"))
    assert float(found["end"]) < min(low, 0.5 * median)
    assert float(found["gap_high"]) < 0
    assert float(found["acts"].sum()) < -0.3
