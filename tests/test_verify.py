"""Does verify say what an executed removal does, and does its algebra equal the intervention, in every family?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import tiny
import unwrite as uw
from executed import hooks
from unwrite.errors import NodeError, NumericError
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.values import through_values
from unwrite.model.view import Model
from unwrite.nodes import Node
from unwrite.prompts.texts import windows
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.report.verified import sentence
from unwrite.run.loop.job import Job
from unwrite.run.loop.stream import stream
from unwrite.run.replay import clean as replay
from unwrite.run.replay import edited
from unwrite.run.replay.edited import one_reader
from unwrite.run.source.rotations import rotations
from unwrite.run.tally import without

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


@pytest.mark.promise("causal")
def test_planted_verdicts(verified) -> None:
    said = {writer: result.data.attrs["verdict"] for writer, result in verified.items()}
    expected = dict.fromkeys(("L0H0", "L0H1", "L0H2"), "erased") | {"L0H3": "filled in", "L0H4": "kept", "L0H5": "kept"}
    assert said == expected


@pytest.mark.parametrize(
    ("writer", "survival"), [("L0H0", 0.1), ("L0H1", 0.2), ("L0H2", 0.1), ("L0H3", 0.05), ("L0H4", 1.0), ("L0H5", 1.0)]
)
def test_planted_survival(verified, writer, survival) -> None:
    assert float(verified[writer]["survival"][-1]) == pytest.approx(survival, abs=0.03)


@pytest.mark.promise("causal")
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


@pytest.mark.promise("causal")
def test_the_planted_backup_fills_in_and_never_erases(verified) -> None:
    backup = verified["L0H3"].data.sel(node="L2H0")
    assert float(backup["filled_in"]) < -0.9
    assert abs(float(backup["erased"])) < 0.01


def test_v_pr_of_a_reader_is_its_pr_and_that_of_a_decoy_is_nothing(verified) -> None:
    for writer, node, expected in (("L0H0", "L1H0", -0.9), ("L0H4", "L1H5", 0.0)):
        assert float(verified[writer]["v_pr"].sel(node=node, quantile=0.5)) == pytest.approx(expected, abs=0.01)


def test_all_that_is_erased_came_through_values(verified) -> None:
    assert float(verified["L0H1"]["causal_share"]) == pytest.approx(1.0, abs=0.01)


@pytest.mark.promise("causal")
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
    run = replay.clean(lm, ids_of(lm), fold(lm))
    for node in lm.parts:
        again = edited.added(run, node, torch.zeros(2, 7, lm.d_model, dtype=torch.float64))
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
    with hooks(*handles), torch.no_grad():
        lm.decoder(input_ids=ids, use_cache=False)
    return seen[0]


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "falcon", "bloom", "opt", "granite", "cohere", "phi"])
def test_a_removed_head_is_a_head_silenced_by_a_plain_hook(family) -> None:
    """Where no post-norm rescales the others: then to silence z and to subtract the write are one intervention."""
    hf = tiny.model(family, 3, **PINNED.get(family, {}))
    lm, ids = view(hf, convention="raw"), ids_of(view(hf))
    run = replay.clean(lm, ids, fold(lm))
    node = next(node for node in lm.parts if node.kind == "head" and node.layer == 1)
    write = torch.cat([*run.written(run.record)])[lm.parts.index(node)]
    ours = edited.added(run, node, -write).stream[lm.states[-1]]
    truth = removed_by_hand(lm, 1, node.head, ids)
    tolerance = 1e-6 if lm.row.float32_inside else 1e-10
    assert torch.allclose(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max()))


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_algebra_through_values_equals_the_executed_intervention(family) -> None:
    """Every head of the next layer changes by exactly C when the writer is hidden from its values (eq. 3)."""
    lm = model(family, 1)
    run = replay.clean(lm, ids_of(lm), fold(lm), with_patterns=True)
    node = next(node for node in lm.parts if node.kind == "head" and node.layer == 0)
    write = torch.cat([*run.written(run.record)])[lm.parts.index(node)]
    block = lm.layers[1]
    after = edited.hidden(run, write, [1])
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
    run = replay.clean(lm, ids_of(lm), fold(lm), with_patterns=True)
    write = torch.cat([*run.written(run.record)])[1]
    z = edited.hidden(run, write, [1]).z
    assert torch.equal(z[0], run.record.z[0])


def brute_survival(lm: Model, ids: Tensor, node: Any, skip: int) -> np.ndarray:
    """Σ⟨x_k − x_k^{−w}, o_w⟩ / Σ‖o_w‖² from two whole runs, position by position."""
    run = replay.clean(lm, ids, fold(lm))
    write = torch.cat([*run.written(run.record)])[lm.parts.index(node)].clone()
    write[:, :skip] = 0
    gone = edited.added(run, node, -write)
    top, bottom = np.zeros(len(lm.states)), 0.0
    for prompt in range(len(ids)):
        for place in range(skip, ids.shape[1]):
            w = write[prompt, place].numpy()
            bottom += w @ w
            for k, state in enumerate(lm.states):
                top[k] += (run.record.stream[state] - gone.stream[state])[prompt, place].numpy() @ w
    return top / bottom


@pytest.mark.promise("batches")
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
    for turn in rotations(lm, 3):
        write = torch.randn(4, lm.d_model, dtype=torch.float64)
        write -= write.mean(-1, keepdim=True)
        torch.testing.assert_close((write @ turn).norm(dim=-1), write.norm(dim=-1))
        assert (write @ turn).mean(-1).abs().max() < 1e-12


@pytest.mark.promise("erased")
def test_a_rotated_write_is_not_called_erased(monkeypatch) -> None:
    """A direction drawn like the generic ones is not told from them, but for a few in a hundred by chance."""
    truth = planted("gpt2", dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = windows(PROSE, truth.tokenizer, n=6, length=48)
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.cat([torch.ones(48, 1), torch.eye(48)[:, 1:]], 1).double()).Q[:, 1:]
    drawn = torch.linalg.qr(torch.randn(47, 47, generator=generator, dtype=torch.float64)).Q
    own = basis @ drawn @ basis.t()
    original = replay.Clean.write
    monkeypatch.setattr(replay.Clean, "write", lambda self, node: original(self, node) @ own)
    result = uw.verify(lm, tokens, lm.nodes[2])
    low, _, high = result["generic"].isel(location=-1).values
    assert low <= float(result["survival"][-1]) <= high
    assert result.data.attrs["verdict"] in ("like others", "undecided", "kept")
    assert result.data.attrs["readers"] == ""


def test_long_prompts_lose_no_digit_in_single_precision() -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    ids = torch.randint(50, (2, 1024), generator=torch.Generator().manual_seed(0))
    single, double = (
        uw.verify(view(tiny.model("llama", 0, dtype, **shape)), ids, "L0H0") for dtype in (torch.float32, torch.float64)
    )
    for name in ("survival", "generic", "background", "share", "share_without", "v_share", "v_survival", "level_share"):
        np.testing.assert_allclose(single[name], double[name], rtol=0, atol=1e-6, err_msg=name)


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


@pytest.mark.promise("finite")
def test_a_value_that_is_not_finite_is_named_and_never_a_verdict() -> None:
    hf = tiny.model("llama", 7, tie_word_embeddings=False)
    lm, ids = view(hf), torch.ones(3, 6, dtype=torch.long)
    ids[2, 4] = 2
    with torch.no_grad():
        hf.model.embed_tokens.weight[2] = float("nan")
    with pytest.raises(NumericError, match=r"embed \(input\) at prompt 2, position 4"):
        uw.verify(lm, ids, "L0H0", batch=2)


def read_again(lm: Model, index: int, x: Tensor) -> Tensor:
    """What an MLP writes when it reads x: the modules of its branch, called one after the other."""
    block: Any = lm.layers[index].block
    llama = lambda: block.mlp(block.post_attention_layernorm(x))  # noqa: E731
    either = lambda: block.mlp((block.input_layernorm if lm.parallel else block.post_attention_layernorm)(x))  # noqa: E731
    before = lambda: block.mlp(block.input_layernorm(x))  # noqa: E731
    sandwich = lambda: block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))  # noqa: E731
    branch = {
        "gpt2": lambda: block.mlp(block.ln_2(x)),
        "gpt_neo": lambda: block.mlp(block.ln_2(x)),
        "gptj": lambda: block.mlp(block.ln_1(x)),
        "opt": lambda: block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x)))),
        "bloom": lambda: block.mlp.dense_4h_to_h(
            block.mlp.gelu_impl(block.mlp.dense_h_to_4h(block.post_attention_layernorm(x)))
        ),
        "falcon": lambda: block.mlp(block.ln_mlp(x)) if hasattr(block, "ln_mlp") else either(),
        "stablelm": either,
        "phi": before,
        "cohere": before,
        "gemma2": sandwich,
        "gemma3_text": sandwich,
        "olmo2": lambda: block.post_feedforward_layernorm(block.mlp(x)),
        "granite": lambda: block.mlp(block.post_attention_layernorm(x)) * lm.config.residual_multiplier,
    }.get(lm.family, llama)
    with torch.no_grad():
        return branch()


def readings(lm: Model, run: replay.Clean, vector: Tensor, skip: int) -> dict[str, tuple[float, float]]:
    """Node name -> energy that it writes because it reads `vector`, and that along it; one reader at a time."""
    found = {}
    for node in lm.parts:
        if node.kind == "mlp" and (node.layer > 0 or not lm.parallel):
            state = run.record.stream[lm.layers[node.layer].reads]
            if not lm.parallel:
                state = next(x for name, x in run.record.stream.items() if str(name) == f"resid_mid{node.layer}")
            change = read_again(lm, node.layer, state) - read_again(lm, node.layer, state - vector)
        elif node.kind == "head" and node.layer > 0:
            change = run.carried(node.layer, vector)[:, :, node.head]  # what an executed run confirms, above
        else:
            continue
        change, along = change[:, skip:], vector[:, skip:]
        found[str(node)] = float((change**2).sum()), float((change * along).sum())
    return found


# Falcon's parallel, sequential and new layouts, GPT-NeoX and StableLM in parallel and not, are all among them.
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_reader_alone_is_that_of_a_slow_twin(family, seed) -> None:
    overrides = dict(PINNED.get(family, {}))
    if family in ("gpt_neox", "stablelm"):
        overrides["use_parallel_residual"] = bool(seed)
    if family == "falcon":
        overrides |= {"layout": 1 + 3 * seed, "alibi": False}
    lm = view(tiny.model(family, 5 + seed, **overrides), convention="raw")
    ids, writer = ids_of(lm), next(node for node in lm.parts if node.kind == "head")
    result = uw.verify(lm, ids, str(writer)).data
    run = replay.clean(lm, ids, fold(lm), with_patterns=True)
    nodes = torch.cat([*run.written(run.record)])
    write = nodes[lm.parts.index(writer)].clone()
    write[:, 0] = 0
    energy = {str(node): float(nodes[i, :, 1:].pow(2).sum()) for i, node in enumerate(lm.parts)}
    # gptj and gpt_neo compute their patterns in float32.
    tolerance = 1e-5 if lm.row.float32_inside or family in ("gptj", "gpt_neo") else 1e-8
    own = readings(lm, run, write, 1)
    for name, (read, along) in own.items():
        assert float(result["read"].sel(node=name)) == pytest.approx(read / energy[name], rel=tolerance)
        share = float(result["one_reader_share"].sel(node=name))
        expected = along / float(write.pow(2).sum()) if name.startswith("MLP") else np.nan
        assert share == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    turned = [readings(lm, run, write @ turn, 1) for turn in rotations(lm, without.READ_ROTATIONS)]
    for name in own:
        draws = np.array([draw[name][0] for draw in turned]) / energy[name]
        bound = stats.t.ppf(1 - 0.05 / len(own), len(draws) - 1) * draws.std(ddof=1) * (1 + 1 / len(draws)) ** 0.5
        expected = [max(draws.mean() - bound, 0), draws.mean(), draws.mean() + bound]
        np.testing.assert_allclose(result["read_generic"].sel(node=name), expected, rtol=100 * tolerance, atol=1e-9)
    others = [name for name in lm.nodes if name not in own]
    assert (result["read"].sel(node=others).fillna(0) == 0).all()
    assert result["read_generic"].sel(node=others).isnull().all()
    assert result["one_reader_share"].sel(node=others).isnull().all()


def test_one_reader_is_the_executed_change_of_the_first_reader_only() -> None:
    """The MLP after the writer's own heads has nothing but the write between it and the clean run; later ones do."""
    lm = model("gpt2", 3)
    data = uw.verify(lm, ids_of(lm), "L0H0").data
    gap = data["one_reader_share"] - data["acts"]
    assert abs(float(gap.sel(node="MLP0"))) < 1e-12
    assert abs(float(gap.sel(node="MLP1"))) > 1e-4


def test_one_reader_leaves_the_model_as_it_was() -> None:
    lm = model("llama", 1)
    run = replay.clean(lm, ids_of(lm), fold(lm))
    nothing = one_reader(run, torch.zeros(2, 7, lm.d_model, dtype=torch.float64), [Node("mlp", 0), Node("mlp", 1)])
    assert all(float(change.abs().max()) == 0 for change in nothing.values())
    assert not any(module._forward_pre_hooks for module in lm.hf.modules())


def test_planted_readers_are_named_and_a_write_that_nobody_reads_says_so(verified) -> None:
    readers = {writer: result.data.attrs["readers"].split() for writer, result in verified.items()}
    assert "L1H0" in readers["L0H0"]
    assert "MLP1" in readers["L0H2"]
    assert "L1H5" not in readers["L0H4"]
    assert "L1H0 read it more" in sentence(verified["L0H0"]) or "L1H0, " in sentence(verified["L0H0"])


def test_of_a_few_documents_nobody_is_called_a_reader_and_nobody_is_said_to_read_nothing() -> None:
    truth = planted("gpt2")
    lm = view(truth.hf, truth.tokenizer)
    few, enough = (uw.verify(lm, windows(PROSE, truth.tokenizer, n=n, length=48), "L0H0") for n in (5, 6))
    assert few.data.attrs["readers"] == ""
    assert "Who reads it is not measurable: 5 documents, at least 6 are needed." in sentence(few)
    assert "L1H0" in enough.data.attrs["readers"].split()
    assert enough.data.attrs["read_note"] == ""


def test_named_erasers_take_one_pass_and_give_the_same_numbers(monkeypatch) -> None:
    lm = model("llama", 1)
    ids, real, runs = ids_of(lm, 4), without.clean, []
    # The few prompts that are shown token by token are run one at a time.
    monkeypatch.setattr(without, "clean", lambda *args: (len(args[1]) > 1 and runs.append(args[3])) or real(*args))
    first = uw.verify(lm, ids, "L0H0", batch=4)
    assert runs == [True, False, True]
    runs.clear()
    again = uw.verify(lm, ids, "L0H0", erasers=first.data.attrs["erasers"].split(), batch=4)
    assert runs == [True, False]
    for name in first.data:
        if first[name].dtype.kind == "f":
            np.testing.assert_array_equal(first[name].values, again[name].values)


def test_a_model_that_shows_its_patterns_is_run_once(monkeypatch) -> None:
    lm = model("gpt_neo", 1)
    real, runs = without.clean, []
    # The few prompts that are shown token by token are run one at a time.
    monkeypatch.setattr(without, "clean", lambda *args: (len(args[1]) > 1 and runs.append(args[3])) or real(*args))
    uw.verify(lm, ids_of(lm, 4), "L0H0", erasers=["L1H0"], batch=4)
    assert runs == [True]


def test_executed_runs_of_falcon_are_the_models_own() -> None:
    """With ALiBi, transformers' eager attention is another function than the one that the model calls."""
    lm = view(tiny.model("falcon", 4, alibi=True))
    ids, node = ids_of(lm, length=12), lm.parts[1]
    survival = uw.verify(lm, ids, str(node))["survival"].values
    there = np.isfinite(survival)
    np.testing.assert_allclose(survival[there], brute_survival(lm, ids, node, 1)[there], atol=1e-10)


def tallied(lm: Model, tokens: Tokens, size: int, named: bool) -> without.WithoutTally:
    """A whole tally, with erasers named beforehand or hidden in a second pass."""
    erasers = [lm.parts[-3]]
    with Job() as job:
        tally = without.WithoutTally(lm, tokens, lm.parts[2], 1, 1e-4, job)
        stream(lm, tokens, tally.executed(erasers if named else ()), size, "", None, job)
        if not named:
            stream(lm, tokens, tally.hiding(erasers), size, "", None, job)
    return tally


def same_tally(one: without.WithoutTally, two: without.WithoutTally) -> None:
    for name in one.ratios:
        np.testing.assert_array_equal(one.ratios[name].counts, two.ratios[name].counts)
    for mine, yours in ((one.shares(), two.shares()), (one.eraser_sums(), two.eraser_sums())):
        for name in mine[0]:
            np.testing.assert_allclose(mine[0][name], yours[0][name], rtol=1e-12, atol=1e-12)
            # A root: of rounding where there is no error.
            np.testing.assert_allclose(mine[1][name], yours[1][name], rtol=1e-9, atol=1e-7)
    for mine, yours in zip((*one.reads(), *one.spaces()), (*two.reads(), *two.spaces()), strict=True):
        np.testing.assert_allclose(mine, yours, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.decoding.found(), two.decoding.found(), rtol=0, atol=1e-9)
    assert one.n_positions == two.n_positions


def full_tokens(lm: Model) -> Tokens:
    """Seven prompts of unequal length."""
    ids = ids_of(lm, 7, 9)
    mask = torch.arange(9) < torch.tensor([9, 9, 8, 9, 7, 9, 9])[:, None]
    return from_ids(ids, mask)


@pytest.mark.promise("memory")
@pytest.mark.parametrize(
    ("most", "error", "named"),
    [
        (1, torch.OutOfMemoryError("full"), True),
        (2, RuntimeError("can't allocate memory"), True),
        (3, torch.OutOfMemoryError("full"), False),
    ],
)
def test_out_of_memory_in_the_middle_of_a_batch_counts_nothing_twice(most, error, named, monkeypatch) -> None:
    """Late in the step, when most is computed: the readers of rotated writes, or the paper's view."""
    lm = model("gpt2", 4)
    tokens = full_tokens(lm)
    before = tallied(lm, tokens, 5, named)
    for name, place in (("one_reader", 1), ("hidden", 1)):
        real = getattr(without, name)

        def small(*args: Any, real: Any = real, place: int = place) -> Any:
            if len(args[place]) > most:
                raise error
            return real(*args)

        monkeypatch.setattr(without, name, small)
    same_tally(before, tallied(lm, tokens, 5, named))


@pytest.mark.promise("memory")
@pytest.mark.parametrize("call", [0, 7, 21, 40])
def test_out_of_memory_at_any_call_counts_nothing_twice(call, monkeypatch) -> None:
    lm = model("llama", 2)
    tokens, real, calls = full_tokens(lm), without.added, iter(range(10**6))
    before = tallied(lm, tokens, 3, True)

    def failing(*args: Any) -> Any:
        if next(calls) == call:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(without, "added", failing)
    same_tally(before, tallied(lm, tokens, 3, True))


def test_a_prompt_that_alone_does_not_fit_is_named(monkeypatch) -> None:
    lm = model("gpt2", 4)
    tokens, real = full_tokens(lm), without.added

    def full(run: replay.Clean, *rest: Any) -> Any:
        if (run.record.vectors[lm.parts[0]][:, :3] == bad[:3]).all((1, 2)).any():
            raise torch.OutOfMemoryError("full")
        return real(run, *rest)

    bad = replay.clean(lm, torch.from_numpy(tokens.ids[3:4]), fold(lm)).record.vectors[lm.parts[0]][0]
    monkeypatch.setattr(without, "added", full)
    with pytest.raises(NumericError, match="prompt 3 does not fit into memory"):
        uw.verify(lm, tokens, "L0H1", batch=2)
