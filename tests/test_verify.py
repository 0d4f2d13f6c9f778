"""Does verify say what an executed removal does, and does its algebra equal the intervention, in every family?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from unwrite.errors import NodeError, NumericError
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.values import through_values
from unwrite.model.view import Model, fold
from unwrite.run import rerun, without
from unwrite.tokens import windows

PROSE = (
    "It was the best of times, it was the worst of times; 1775 was the year, and all of it was told by a clerk. " * 60
)
PINNED: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": None}}


def model(family: str, seed: int = 0) -> Model:
    return view(tiny.model(family, seed, **PINNED.get(family, {})))


def ids_of(lm: Model, prompts: int = 2, length: int = 7) -> Tensor:
    return torch.randint(lm.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def verified(request: pytest.FixtureRequest) -> dict[str, uw.Result]:
    truth = planted(request.param, dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = windows(PROSE, truth.tokenizer, n=6, length=64)
    return {writer: uw.verify(lm, tokens, writer) for writer in ("L0H0", "L0H1", "L0H2", "L0H3", "L0H4", "L0H5")}


def test_planted_verdicts(verified) -> None:
    said = {writer: result.data.attrs["verdict"] for writer, result in verified.items()}
    expected = dict.fromkeys(("L0H0", "L0H1", "L0H2"), "erased") | {"L0H3": "filled in", "L0H4": "kept", "L0H5": "kept"}
    assert said == expected


@pytest.mark.parametrize(
    ("writer", "survival"), [("L0H0", 0.1), ("L0H1", 0.2), ("L0H2", 0.1), ("L0H3", 0.05), ("L0H4", 1.0), ("L0H5", 1.0)]
)
def test_planted_survival(verified, writer, survival) -> None:
    assert float(verified[writer]["survival"][-1]) == pytest.approx(survival, abs=0.03)


def test_a_planted_reader_is_told_from_decoys_and_from_an_mlp(verified) -> None:
    classes = {
        (writer, str(node)): str(verified[writer]["class"].sel(node=node).item())
        for writer in verified
        for node in verified[writer]["node"].values
    }
    assert classes["L0H0", "L1H0"] == "reads it through values"
    assert classes["L0H4", "L1H5"] == "acts without it"
    assert classes["L0H2", "MLP1"] == "reads it another way"
    constant = "L2.bias" if ("L0H0", "L2.bias") in classes else "L2H3"
    assert classes["L0H0", constant] == "acts without it"


def test_the_planted_backup_fills_in_and_never_erases(verified) -> None:
    backup = verified["L0H3"].data.sel(node="L2H0")
    assert float(backup["filled_in"]) < -0.9
    assert abs(float(backup["erased"])) < 0.01


def test_v_pr_of_a_reader_is_its_pr_and_that_of_a_decoy_is_nothing(verified) -> None:
    for writer, node, expected in (("L0H0", "L1H0", -0.9), ("L0H4", "L1H5", 0.0)):
        assert float(verified[writer]["v_pr"].sel(node=node, quantile=0.5)) == pytest.approx(expected, abs=0.01)


def test_all_that_is_erased_came_through_values(verified) -> None:
    assert float(verified["L0H1"]["causal_share"]) == pytest.approx(1.0, abs=0.01)


def test_hiding_the_writer_silences_the_reader_only(verified) -> None:
    pr = verified["L0H0"]["pr"].sel(quantile=0.5)
    assert float(pr.sel(condition="clean", node="L1H0")) == pytest.approx(-0.9, abs=0.01)
    assert float(pr.sel(condition="patched", node="L1H0")) == pytest.approx(0.0, abs=0.01)


def test_erased_and_filled_in_sum_to_survival_minus_one(verified) -> None:
    for result in verified.values():
        total = float((result["erased"] + result["filled_in"]).sum())
        assert total == pytest.approx(float(result["survival"][-1]) - 1, abs=1e-10)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_run_continued_without_an_edit_is_the_clean_run(family) -> None:
    lm = model(family)
    run = rerun.clean(lm, ids_of(lm), fold(lm))
    for node in lm.parts:
        again = rerun.added(run, node, torch.zeros(2, 7, lm.d_model, dtype=torch.float64))
        for state in lm.states:
            assert torch.equal(again.stream[state], run.record.stream[state])


def removed_by_hand(lm: Model, layer: int, head: int, ids: Tensor) -> Tensor:
    """The final stream of a whole forward pass in which one head's z is 0: a plain hook on the user's model."""
    block, width = lm.layers[layer], lm.head_dim
    seen = []

    def silence(_, args):
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handles = [
        block.out_proj.register_forward_pre_hook(silence),
        lm.decoder.get_submodule(lm.row.final_norm).register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    try:
        with torch.no_grad():
            lm.decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "falcon", "bloom", "opt", "granite", "cohere", "phi"])
def test_a_removed_head_is_a_head_silenced_by_a_plain_hook(family) -> None:
    """Where no post-norm rescales the others: then to silence z and to subtract the write are one intervention."""
    hf = tiny.model(family, 3, **PINNED.get(family, {}))
    lm, ids = view(hf, convention="raw"), ids_of(view(hf))
    run = rerun.clean(lm, ids, fold(lm))
    node = next(node for node in lm.parts if node.kind == "head" and node.layer == 1)
    write = run.nodes(run.record)[lm.parts.index(node)]
    ours = rerun.added(run, node, -write).stream[lm.states[-1]]
    truth = removed_by_hand(lm, 1, node.head, ids)
    tolerance = 1e-6 if lm.row.float32_inside else 1e-10
    assert torch.allclose(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_algebra_through_values_equals_the_executed_intervention(family) -> None:
    """Every head of the next layer changes by exactly C when the writer is hidden from its values (eq. 3)."""
    lm = model(family, 1)
    run = rerun.clean(lm, ids_of(lm), fold(lm), with_patterns=True)
    node = next(node for node in lm.parts if node.kind == "head" and node.layer == 0)
    write = run.nodes(run.record)[lm.parts.index(node)]
    block = lm.layers[1]
    after = rerun.hidden(run, write, [1])
    state = next(s for s in lm.states if s.layer == 1)
    through = run.post_scaled(block, through_values(lm, block, run.patterns[1], write, run.scale(block)))
    predicted = torch.einsum("bthk,hkd->btd", through, run.folded[1].w_o)
    executed = run.record.stream[state] - after.stream[state]
    if lm.parallel:  # the state also holds this layer's MLP, which does not see the edit
        assert torch.allclose(executed, predicted, atol=1e-12)
    tolerance = 1e-12 if not lm.row.float32_inside else 1e-6
    assert torch.allclose(executed, predicted, rtol=0, atol=tolerance * float(executed.abs().max() + 1))
    assert float(executed.abs().max()) > 1e-6


def test_hiding_changes_neither_queries_nor_keys_of_the_hidden_layer() -> None:
    lm = model("llama", 2)
    run = rerun.clean(lm, ids_of(lm), fold(lm), with_patterns=True)
    write = run.nodes(run.record)[1]
    z = rerun.hidden(run, write, [1]).z
    assert torch.equal(z[0], run.record.z[0])


def brute_survival(lm: Model, ids: Tensor, node: Any, skip: int) -> np.ndarray:
    """Σ⟨x_k − x_k^{−w}, o_w⟩ / Σ‖o_w‖² from two whole runs, position by position."""
    run = rerun.clean(lm, ids, fold(lm))
    write = run.nodes(run.record)[lm.parts.index(node)].clone()
    write[:, :skip] = 0
    gone = rerun.added(run, node, -write)
    top, bottom = np.zeros(len(lm.states)), 0.0
    for prompt in range(len(ids)):
        for place in range(skip, ids.shape[1]):
            w = write[prompt, place].numpy()
            bottom += w @ w
            for k, state in enumerate(lm.states):
                top[k] += (run.record.stream[state] - gone.stream[state])[prompt, place].numpy() @ w
    return top / bottom


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_survival_is_the_same_for_any_batch_and_as_by_hand(batch) -> None:
    lm = model("gpt2", 4)
    ids = ids_of(lm, prompts=5, length=8)
    node = lm.parts[2]
    result = uw.verify(lm, ids, str(node), skip=2, batch=batch)
    survival = result["survival"].values
    there = np.isfinite(survival)
    np.testing.assert_allclose(survival[there], brute_survival(lm, ids, node, 2)[there], atol=1e-12)
    assert survival[there][0] == pytest.approx(1.0, abs=1e-12)


def test_background_is_what_is_left_of_the_level(verified) -> None:
    data = verified["L0H4"].data
    np.testing.assert_allclose(data["background"][1:], data["level_share"][1:] - data["survival"][1:], atol=1e-12)


def test_rotations_keep_length_and_stay_where_readers_look() -> None:
    lm = model("gpt2", 0)
    for turn in list(without._rotations(lm))[:3]:
        write = torch.randn(4, lm.d_model, dtype=torch.float64)
        write -= write.mean(-1, keepdim=True)
        torch.testing.assert_close((write @ turn).norm(dim=-1), write.norm(dim=-1))
        assert (write @ turn).mean(-1).abs().max() < 1e-12


def test_a_rotated_write_decays_like_anything(monkeypatch) -> None:
    """A direction drawn like the generic ones is not told from them, but for a few in a hundred by chance."""
    truth = planted("gpt2", dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = windows(PROSE, truth.tokenizer, n=4, length=48)
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.cat([torch.ones(48, 1), torch.eye(48)[:, 1:]], 1).double()).Q[:, 1:]
    drawn = torch.linalg.qr(torch.randn(47, 47, generator=generator, dtype=torch.float64)).Q
    own = basis @ drawn @ basis.t()
    original = rerun.Clean.nodes

    def turned(self: rerun.Clean, record: Any) -> Tensor:
        nodes = original(self, record)
        nodes[2] = nodes[2] @ own
        return nodes

    monkeypatch.setattr(rerun.Clean, "nodes", turned)
    assert uw.verify(lm, tokens, lm.nodes[2]).data.attrs["verdict"] == "decays like anything"


def test_bad_requests_are_refused() -> None:
    lm = model("gpt2", 0)
    ids = ids_of(lm)
    with pytest.raises(NodeError, match="no node L9H9"):
        uw.verify(lm, ids, "L9H9")
    with pytest.raises(NodeError, match="cannot read L1H0"):
        uw.verify(lm, ids, "L1H0", erasers=["L0H1"])
    with pytest.raises(NodeError, match="no node was named"):
        uw.verify(lm, ids, "L0H0", erasers=[])
    with torch.no_grad():
        lm.layers[0].out_proj.weight[: lm.head_dim] = 0
    with pytest.raises(NumericError, match="never writes"):
        uw.verify(lm, ids, "L0H0")


def test_the_last_layer_and_embeddings_can_be_verified() -> None:
    lm = model("llama", 0)
    for writer in ("embed", f"MLP{len(lm.layers) - 1}"):
        result = uw.verify(lm, ids_of(lm), writer)
        assert result["survival"].notnull().any()


def test_a_value_that_is_not_finite_is_named_and_never_a_verdict() -> None:
    hf = tiny.model("llama", 7, tie_word_embeddings=False)
    lm, ids = view(hf), torch.ones(3, 6, dtype=torch.long)
    ids[2, 4] = 2
    with torch.no_grad():
        hf.model.embed_tokens.weight[2] = float("nan")
    with pytest.raises(NumericError, match=r"embed \(input\) at prompt 2, position 4"):
        uw.verify(lm, ids, "L0H0", batch=2)
