"""Do the numbers hold on real, trained models, and against activations that other software computed?"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import unwrite as uw
from executed import Alone
from twin import Rows, Truth, carried, share
from twin import patterns as looks
from unwrite.model import capture
from unwrite.model.attention import patterns
from unwrite.model.fold import fold
from unwrite.model.view import Model
from unwrite.model.writes import expand
from unwrite.prompts.tokens import Tokens


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


@pytest.mark.promise("exact")
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


@pytest.mark.promise("others")
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


@pytest.mark.promise("others")
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


def lies_along(truth: Truth, states: dict[str, Tensor], writes: dict[str, Tensor], write: Tensor) -> dict[str, float]:
    """Σ⟨·, write⟩ of states and of what nodes write, by name."""
    named = {**truth.readable(states), **writes}
    return {name: float((vector.expand_as(write) * write).sum()) for name, vector in named.items()}


def layer_of(node: str) -> int:
    """Embeddings come before all layers."""
    return -1 if "embed" in node else int(re.findall(r"\d+", node)[0])


def by_hand(hf: Any, tokens: Tokens, writer: str, nodes: Sequence[str]) -> dict[str, dict[str, float]]:
    """What a verification says about a node, from two runs of every prompt and eq. 3, one by one."""
    energy, sums = 0.0, {kind: defaultdict(float) for kind in ("clean", "without", "v_share")}
    for ids in torch.from_numpy(tokens.ids):
        truth = Truth(hf, ids[None])
        writes, read = truth.paper(), {}
        write = writes[writer].expand(1, len(ids), -1).clone()
        write[:, 0] = 0
        energy += float((write**2).sum())
        clean = lies_along(truth, truth.states(), writes, write)
        with Alone(hf, ids, len(ids) - 1, 0).without(writer, write[0]):
            gone = Truth(hf, ids[None])
            without = lies_along(truth, gone.states(), gone.paper(), write)
        for later in range(layer_of(writer) + 1, len(truth.blocks)):
            each = carried(truth, later, write, looks(truth)[later])
            read |= {f"L{later}H{head}": float((each[:, :, head] * write).sum()) for head in range(each.shape[2])}
        for kind, found in (("clean", clean), ("without", without), ("v_share", read)):
            for name, value in found.items():
                sums[kind][name] += value
    a, b, v = ({name: value / energy for name, value in part.items()} for part in sums.values())
    beside = [] if writer[0] != "L" else [f"MLP{layer_of(writer)}"]
    later = [name for name in nodes if layer_of(name) > layer_of(writer)] + beside
    return {
        "survival": {name: a[name] - b[name] for name in a if name.startswith("resid")},
        "erased": {name: min(a[name], 0) - min(b[name], 0) for name in later},
        "filled_in": {name: max(a[name], 0) - max(b[name], 0) for name in later},
        "v_share": v,
    }


def found_text(data: xr.Dataset, judge: Tokens, i: int) -> Tensor:
    """The tokens of the i-th prompt that attribution was asked about: found ones first, then the other windows."""
    hits = data.sizes["hit"]
    if i < hits:
        return torch.from_numpy(judge.ids[int(data["found_prompt"][i]), : int(data["found_row"][i]) + 1])
    others = [prompt for prompt in range(len(judge)) if prompt not in data["found_prompt"].values]
    return torch.from_numpy(judge.ids[others[i - hits]])


@pytest.mark.promise("executed")
@pytest.mark.parametrize(
    ("name", "corpus", "length"),
    [
        pytest.param("stories260K", "tinystories.txt", 48, marks=pytest.mark.slow),
        ("arthur-r24-ep200", "arthur.txt", 40),
    ],
)
def test_an_audit_of_a_real_model_is_what_plain_hooks_say(
    shared: Path, name: str, corpus: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it is written but for its float32, behind which a wrong number could hide.
    exact = lambda self, x: self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
    lm = uw.load(shared / "models" / name, dtype="float64")
    tokens = uw.text(shared / "corpus" / corpus, lm.tokenizer, n=16, length=length)
    choose, judge = (Tokens(tokens.ids[i : i + 8], tokens.lengths[:8], np.arange(8)) for i in (0, 8))
    data = uw.audit(lm, tokens, out=tmp_path, most=2).data
    assert uw.read(tmp_path).data.identical(data)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "result.nc", "table.csv"]
    words, said = Counter(data["removed_verdict"].values.tolist()), data.attrs["verdict"]
    of = f"{words.total()} writers on 6 documents"
    assert said.startswith(f"None of {of} ends out" if {*words} <= {"like others", "undecided"} else f"Of {of}: ")
    assert f" {words['like others']} writers end like others, {words['undecided']} are undecided" in said
    writers = [str(writer) for writer in data["verified"].values[:2]]
    rows = Rows.of(lm.hf, choose.ids, choose.lengths)
    rows = rows.where(rows.place > 0)
    for writer in (*writers, "embed"):
        for kind, axis, vectors in (("share", "node", rows.writes), ("level_share", "location", rows.states)):
            for place, vector in vectors.items():
                one = data.sel({"writer": writer, axis: place})
                want = share(rows, vector, writer, choose.cluster)
                assert float(one[kind]) == pytest.approx(want[0], rel=1e-8, abs=1e-9)
                assert float(one[f"{kind}_se"]) == pytest.approx(want[1], rel=1e-4, abs=1e-7)
    for writer in writers:
        for kind, found in by_hand(lm.hf, judge, writer, lm.nodes).items():
            got = data[kind].sel({"verified": writer, "location" if kind == "survival" else "node": list(found)}).values
            assert np.isfinite(got).all() or kind == "survival"
            want = np.where(np.isfinite(got), list(found.values()), np.nan)
            # Hugging Face's softmax is in float32 where it returns its patterns.
            np.testing.assert_allclose(got, want, atol=1e-6 if kind == "v_share" else 1e-9, err_msg=f"{writer} {kind}")
    for i in (0, data.sizes["prompt"] - 1):
        one, row = data.isel(prompt=i), int(data["row"][i])
        prompt = Alone(lm.hf, found_text(data, judge, i), row, int(one["answer_id"]), int(one["against_id"]))
        assert float(one["logit_diff"]) == pytest.approx(prompt.measured, abs=1e-9)
        for node in (*writers, "MLP1"):
            change, cell = prompt.writes[node].clone(), one.sel(node=node)
            change[:row] = 0
            assert float(cell["direct"]) == pytest.approx(prompt.direct(change[row]), abs=1e-9)
            assert float(cell["total"]) == pytest.approx(prompt.total(node, change), abs=1e-9)
            for part, want in prompt.why(node, change).items():
                assert float(cell["why"].sel(part=part)) == pytest.approx(want, abs=1e-9), (node, part)
