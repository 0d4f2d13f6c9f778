"""Do the numbers hold on real, trained models, and against activations that other software computed?"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import unwrite as uw
from unwrite.model import capture
from unwrite.model.attention import patterns
from unwrite.model.view import Model, expand, fold


def written(lm: Model, ids: Tensor) -> dict[str, Tensor]:
    folded = fold(lm)
    nodes = expand(lm, folded, capture.run(lm, ids, folded).map(lambda part: part.flatten(0, 1)))
    return dict(zip(lm.nodes, nodes.unflatten(1, ids.shape), strict=True))


def logits(lm: Model, stream: Tensor) -> Tensor:
    """What the end of the model makes of a stream: the same for GPT-2 and Llama."""
    final = lm.hf.transformer.ln_f if lm.family == "gpt2" else lm.hf.model.norm
    with torch.no_grad():
        return lm.hf.lm_head(final(stream))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_l0h6_of_stories260k_rises_to_three_times_its_write(shared: Path) -> None:
    lm = uw.load(shared / "models" / "stories260K")
    tokens = uw.text(shared / "corpus" / "tinystories.txt", lm.tokenizer, n=40, length=256)
    level = uw.scan(lm, tokens, writers=["L0H6"])["level"].sel(writer="L0H6", quantile=0.5)
    for location, want in (("resid_pre0", 0.27), ("resid_mid0", 1.48), ("resid_post1", 2.6), ("resid_post4", 3.2)):
        assert float(level.sel(location=location)) == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize("convention", ["paper", "raw"])
@pytest.mark.parametrize("name", ["arthur-r24-ep200", "batson-induction-2l", "llmviz-sort-3l", "stories260K"])
def test_nodes_of_a_real_model_sum_to_what_hugging_face_computes(shared: Path, name: str, convention: str) -> None:
    lm = uw.load(shared / "models" / name, convention=convention)
    assert lm.certificate.ok
    ids = torch.randint(lm.vocabulary, (2, lm.context), generator=torch.Generator().manual_seed(0))
    own = AutoModelForCausalLM.from_pretrained(shared / "models" / name)
    with torch.no_grad():
        truth = own(ids, output_hidden_states=True)
    close(logits(lm, sum(written(lm, ids).values())), truth.logits)
    if convention == "raw":
        writes = written(lm, ids)
        for location, held in zip(lm.locations, lm.holds(), strict=True):
            if location.startswith("resid_post") and location != lm.locations[-1]:
                layer = int(location.removeprefix("resid_post"))
                stream = sum(writes[node] for node, holds in zip(lm.nodes, held, strict=True) if holds)
                close(stream, truth.hidden_states[layer + 1])


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    """Activations of the sorting model, as the software that trained it printed them."""
    raw = json.loads((shared / "models" / "llmviz-sort-3l" / "golden_activations.json").read_text())
    return {name: _tensor(part) for name, part in raw.items() if name != "config"}


def _tensor(part: dict[str, Any]) -> Tensor:
    return torch.tensor(np.frombuffer(base64.b64decode(part["data"]), np.float32).reshape(part["shape"]))


def test_the_sorting_model_writes_its_golden_activations(shared: Path, golden: dict[str, Tensor]) -> None:
    lm = uw.load(shared / "models" / "llmviz-sort-3l", convention="raw")
    ids = golden["idx"].long()
    writes = written(lm, ids)
    stream = dict(
        zip(
            lm.locations,
            torch.einsum("ln,nptd->lptd", lm.holds().float(), torch.stack([*writes.values()])),
            strict=True,
        )
    )
    close(writes["embed"], golden["tok_emb"])
    close(writes["pos_embed"], golden["pos_emb"].expand_as(golden["tok_emb"]))
    close(writes["MLP0"], golden["mlp"])
    close(stream["resid_mid0"], golden["attnResid"])
    for name, state in {"x": "pre0", "block0": "post0", "block1": "post1", "block2": "post2"}.items():
        close(stream[f"resid_{state}"], golden[name])
    close(logits(lm, stream["resid_post2"]), golden["lm_head"])


def test_heads_of_the_sorting_model_are_its_golden_pattern_and_values(shared: Path, golden: dict[str, Tensor]) -> None:
    lm = uw.load(shared / "models" / "llmviz-sort-3l", convention="raw")
    ids = golden["idx"].long()
    with patterns(lm) as found, torch.no_grad():
        lm.hf(ids)
    close(found[0], golden["attSm"])
    writes = written(lm, ids)
    close(writes["L0H0"] + writes["L0H1"] + writes["L0H2"] + writes["L0.bias"], golden["yProj"])
    rows = lm.hf.transformer.h[0].attn.c_proj.weight.detach()
    for head in range(3):
        write = golden["attSm"][:, head] @ golden["v"][:, head] @ rows[16 * head : 16 * (head + 1)]
        close(writes[f"L0H{head}"], write)
