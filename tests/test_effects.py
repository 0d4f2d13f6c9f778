"""Is a sweep that runs nothing twice the naive loop, whatever is patched, asked of it, or wrong with what is asked?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny
import unwrite as uw
from executed import exact, weights
from patching import METRICS, alone, contrasts, entropy, executed
from unwrite.errors import ModelError, NodeError, NumericError, ResultError, TokensError, UnwriteError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.nodes import GROUPS
from unwrite.prompts.pairs import Pairs
from unwrite.run.edit.slots import slots
from unwrite.run.replay import clean, sweep

# Learned positions and LayerNorm, parallel blocks, grouped keys and values, caps and windows and norms after writes.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"num_attention_heads": 3, "num_hidden_layers": 3},
    "gpt_neox": {"num_attention_heads": 3, "num_hidden_layers": 3, "use_parallel_residual": True},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "gemma2": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 3.0, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
every_shape = pytest.mark.parametrize("family", SHAPES)
# Kinds of nodes that a family shows nowhere, or that a mixture of experts does not have.
MISSING = {"mixtral": ("neurons", "act")}
METHODS = ("exact", "atp", "atp*", "relp", "ig", "direct", "net")


@cache
def model(family: str, seed: int = 1) -> Model:
    return view(weights(family, seed, **SHAPES.get(family, {})))


def names_of(lm: Model, kind: str, most: int = 1000) -> list[str]:
    """Nodes of a kind, at most so many of them, from the first layers on."""
    every = [name for slot in slots(lm, kind) for name in slot.names]
    return every if len(every) <= most else [every[(4 * i + 1) * len(every) // (4 * most)] for i in range(most)]


def a_few(lm: Model, most: int = 2) -> list[str]:
    """Nodes of every kind that can be patched in this model."""
    kinds = [kind for kind in GROUPS if kind not in MISSING.get(lm.family, ())]
    return [name for kind in kinds for name in names_of(lm, kind, most)]


def effects(lm: Model, pairs: Pairs, nodes: Any, **settings: Any) -> np.ndarray:
    """Effects, nodes in the order of `nodes` where they are names; unless told otherwise of all pairs in one batch."""
    found = uw.effects(lm, pairs, nodes, **{"batch": len(pairs), **settings})["effect"]
    return (found if isinstance(nodes, str) else found.sel(node=list(nodes))).values


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.nanmax(np.abs(want)))))


# --- exact: the naive loop --------------------------------------------------------------------------------------------


@pytest.mark.promise("executed")
@pytest.mark.parametrize("kind", GROUPS)
@every_shape
def test_a_sweep_is_the_naive_loop_over_every_node(family: str, kind: str) -> None:
    """Prompts of unequal length, read at the last row or before it."""
    lm = model(family)
    pairs = contrasts((4, 6), rows=[-1, 4])
    names = names_of(lm, kind, 12 if kind == "heads" else 6)
    with exact():
        each, together = executed(lm, pairs, names)
        close(effects(lm, pairs, names), each)
        close(effects(lm, pairs, names, at="all"), together)
        last = effects(lm, pairs, names, at="last")
    close(last, each[np.arange(2)[:, None], np.arange(len(names)), pairs.row[:, None]])
    assert np.nanmax(np.abs(each)) > 1e-3


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_sweep_is_the_naive_loop_in_every_family(family: str) -> None:
    lm, pairs = model(family), contrasts((4, 6))
    names = [*a_few(lm, 1), f"L{len(model(family).layers) - 1}H0"]
    for kind in MISSING.get(family, ()):
        with pytest.raises(NodeError):
            uw.effects(lm, pairs, kind)
    with exact():
        each, together = executed(lm, pairs, names)
        close(effects(lm, pairs, names), each)
        close(effects(lm, pairs, names, at="all"), together)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float32_inside_a_family_only_rounds(family: str) -> None:
    """As users run it: norms or scores of many families are float32 in any dtype, whose seven digits a sum loses."""
    lm, pairs = model(family), contrasts((5,))
    names = a_few(lm, 1)
    close(effects(lm, pairs, names), executed(lm, pairs, names)[0], 1e-5 if lm.row.float32_inside else 1e-6)


def test_a_float32_model_only_rounds() -> None:
    lm = view(weights("llama", 1, torch.float32, **SHAPES["llama"]))
    close(effects(lm, contrasts(), "heads"), executed(lm, contrasts(), names_of(lm, "heads"))[0], 1e-5)


@every_shape
def test_a_patched_cut_is_the_source_run(family: str) -> None:
    """All that goes on at a cut replaced: a normalised metric is 0 before and 1 after, and 1 − that the other way."""
    lm, pairs = model(family), contrasts()
    back = uw.pairs(pairs.source, pairs.base, pairs.answer, pairs.against)
    there, again = (uw.effects(lm, part, "resid", at="all") for part in (pairs, back))
    whole = (again["base"] - there["base"]).values[:, None]
    cuts = [name for name in there["node"].values if lm.parallel or "mid" not in name]
    close(there["effect"].sel(node=cuts).values / whole, np.ones((3, len(cuts))), 1e-6)
    close(there["effect"].values, -again["effect"].values, 1e-6)
    # A state between attention and MLP is all that goes on, too.
    close(there["effect"].values / whole, np.ones(there["effect"].shape), 1e-6)


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "exact") for family in SHAPES), *(("gemma2", method) for method in METHODS[1:])]
)
def test_what_cannot_matter_does_not(family: str, method: str) -> None:
    """Positions before the prompts differ; in the last layer, all but keys and values of earlier positions."""
    lm, pairs = model(family), contrasts()
    last = len(lm.layers) - 1
    single = [f"L{last}H0", f"L{last}H2", f"L{last}.attn_out", f"MLP{last}", f"MLP{last}.act[3]", f"resid_post{last}"]
    single += [f"L{last}H1.q"] if method in ("exact", "atp", "relp", "ig") else []
    names = [*a_few(lm, 2), *single]
    found = effects(lm, pairs, names, method=method, steps=2)
    position, row = np.arange(pairs.base.length), pairs.row[:, None]
    early, behind = (
        np.broadcast_to(part[:, None], found.shape) for part in (position < pairs.first[:, None], position > row)
    )
    assert (np.isnan(found) == behind).all()
    assert early.any()
    assert not found[early].any()
    off = (position < row)[:, None] & np.isin(names, single)[:, None]
    assert np.abs(found[off]).max() <= (1e-14 if method == "exact" else 0)
    assert np.abs(found[:, -1][position == row]).min() > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ig"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_node_set_to_what_it_is_does_nothing(family: str, method: str) -> None:
    lm, ids = model(family), torch.from_numpy(contrasts((6, 6)).base.ids)
    found = uw.effects(
        lm, uw.pairs(ids, ids, 5, 9), [n for n in a_few(lm, 1) if n != "embed"], method=method, source=lm
    )
    assert not found["effect"].values.any()


def test_heads_without_an_output_leave_all_of_attention_to_the_one_that_has_it() -> None:
    hf = copy.deepcopy(model("gpt2").hf)
    for block in hf.transformer.h:
        block.attn.c_proj.weight.data[hf.config.n_embd // 3 :] = 0
    lm, pairs = view(hf), contrasts()
    for at in ("each", "all"):
        close(effects(lm, pairs, ["L0H0", "L1H0"], at=at), effects(lm, pairs, ["L0.attn_out", "L1.attn_out"], at=at))
    assert np.nanmax(np.abs(effects(lm, pairs, ["L0H1", "L1H2"]))) < 1e-14


def test_what_differs_in_one_coordinate_differs() -> None:
    hf = copy.deepcopy(model("gpt2").hf)
    for block in hf.transformer.h:
        block.mlp.c_proj.weight.data[:, 1:] = 0
        block.attn.c_attn.weight.data[:, -hf.config.n_embd + 1 :] = 0
    lm, pairs = view(hf), contrasts((5,))
    names = ["L0H0.v", "L1KV0.v", "MLP0", "MLP1"]
    found = effects(lm, pairs, names)
    close(found, executed(lm, pairs, names)[0])
    assert (np.abs(found[:, :, 2]) > 0).all()


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "cohere", "gptj"])
def test_a_metric_is_one_of_the_logits_that_the_model_returns(family: str, metric: str) -> None:
    """With a soft-cap, a scale, and an unembedding with a bias."""
    lm, pairs = model(family), contrasts(rows=[-1, 2, -1], against=metric != "logit_diff" or family != "gpt2")
    asked: Any = entropy if metric == "entropy" else metric
    names = ["L0H1", "MLP1", "resid_post0"]
    with exact():
        found = uw.effects(lm, pairs, names, metric=asked, batch=3)
        close(found["effect"].sel(node=names).values, executed(lm, pairs, names, metric)[0])
        close(found["base"].values, np.array([float(a.score(a.clean[None])) for a in alone(lm, pairs, metric)]))
    assert found["effect"].attrs["units"] == metric
    assert metric != "kl" or (found["effect"].fillna(0) >= -1e-15).all()  # that of the base run is 0 to rounding


def test_a_metric_may_count_where_it_is_executed() -> None:
    lm, pairs = model("gpt2"), contrasts()
    found = uw.effects(lm, pairs, "resid", at="all", metric=lambda logits: logits.argmax(-1) == 5)
    assert set(np.unique(found["effect"].values)) <= {-1, 0, 1}


@pytest.mark.parametrize("source", ["mean", "zero", "resample", "another model"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_come_from_where_they_are_asked_for(family: str, source: str) -> None:
    lm, pairs = model(family), contrasts((4, 6, 4, 6))
    ones = list(alone(lm, pairs))
    other = view(weights(family, 1, **SHAPES[family]))
    with torch.no_grad():
        for part in other.hf.parameters():
            part.mul_(0.9)
    names = ["resid_pre0", "L0H1", "L1H0.k", "L0KV0.v", "MLP1", "MLP1.act[3]", "resid_mid1"]

    donor: Any = other if source == "another model" else source

    def given(i: int, name: str) -> torch.Tensor:
        n = len(ones[i].base)
        return {
            "mean": lambda: torch.stack(
                [torch.stack([read[name][t] for read in own if len(read[name]) > t]).mean(0) for t in range(n)]
            ),
            "zero": lambda: torch.zeros_like(own[i][name]),
            "resample": lambda: own[(i + 2) % 4][name],
            "another model": lambda: theirs[i][name],
        }[source]()

    with exact():
        own, theirs = ([one.values(names) for one in alone(reader, pairs)] for reader in (lm, other))
        found = effects(lm, pairs, names, source=donor)
        close(found, executed(lm, pairs, names, given=lambda i, _, name: given(i, name))[0])
        guess = effects(lm, pairs, names, method="atp", source=donor)
        for i, one in enumerate(ones):
            slopes, base = one.slopes(names), one.values(names, one.base)
            for j, name in enumerate(names):
                want = ((given(i, name) - base[name]) * slopes[name]).sum(-1)[: one.row + 1]
                close(guess[i, j, : one.row + 1], want.numpy())


@pytest.mark.promise("batches")
@pytest.mark.parametrize("method", METHODS)
def test_a_pair_is_the_same_in_any_batch_and_in_any_order(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, pairs, order = model("llama"), contrasts((6, 4, 5, 4)), [3, 0]
    names = a_few(lm, 1)
    whole = effects(lm, pairs, names, method=method, steps=2)
    for batch in (1, 2):
        close(effects(lm, pairs, names, method=method, batch=batch, steps=2), whole, 1e-6)
    parts = [part.take(order) for part in (pairs.base, pairs.source)]
    against = None if pairs.against is None else pairs.against[order]
    some = effects(lm, uw.pairs(*parts, pairs.answer[order], against), names[::-1], method=method, steps=2)[:, ::-1]
    close(some, whole[order][..., : some.shape[-1]], 1e-6)
    # In waves of a few patches.
    monkeypatch.setattr(sweep, "ROWS", 13)
    close(effects(lm, pairs, names, method=method, steps=2), whole, 1e-6)


@pytest.mark.promise("memory")
def test_memory_that_runs_out_halves_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, pairs, own = model("gpt2"), contrasts(), clean.base_run
    want = effects(lm, pairs, "heads")

    def small(lm: Model, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > 1:
            raise torch.OutOfMemoryError
        return own(lm, ids, *rest)

    monkeypatch.setattr(clean, "base_run", small)
    close(effects(lm, pairs, "heads", batch=3), want)


def test_nodes_are_named_one_by_one_or_by_their_kind() -> None:
    lm, pairs = model("gpt2"), contrasts()
    whole = uw.effects(lm, pairs, "heads")
    assert whole["node"].values.tolist() == [f"L{layer}H{head}" for layer in range(3) for head in range(3)]
    some = uw.effects(lm, pairs, ["L2H1", "blocks.1.hook_mlp_out", "(0, 2)", "L0H2"])
    assert some["node"].values.tolist() == ["L0H2", "MLP1", "L2H1"]
    close(some["effect"].sel(node="L2H1").values, whole["effect"].sel(node="L2H1").values)
    assert uw.effects(lm, pairs, "MLP1")["effect"].shape == (3, 1, 7)


def test_a_model_in_training_is_measured_without_dropout() -> None:
    hf = weights("gpt2", 1, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5, **SHAPES["gpt2"])
    lm, pairs = view(hf), contrasts()
    for method in ("exact", "atp*", "relp"):
        want = effects(lm, pairs, "heads", method=method)
        hf.train().requires_grad_(False)
        with torch.inference_mode():
            close(effects(lm, pairs, "heads", method=method), want)
        assert hf.training
        hf.eval().requires_grad_(True)


# --- what is handed out -----------------------------------------------------------------------------------------------


def spelling() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(1, 50))])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_texts_are_pairs() -> None:
    hf, tokenizer = model("gpt2").hf, spelling()
    lm = view(hf, tokenizer)
    pairs = uw.pairs(["w3 w4 w5", "w6 w7"], ["w3 w8 w5", "w9 w7"], "w10", ["w11", "w12"], tokenizer=tokenizer)
    assert (pairs.base.ids[0].tolist(), pairs.source.ids[1, :2].tolist()) == ([3, 4, 5], [9, 7])
    assert [part.tolist() for part in (pairs.base.lengths, pairs.row, pairs.first)] == [[3, 2], [2, 1], [1, 0]]
    result = uw.effects(lm, pairs, "mlp_out", at="all")
    assert [result[name].values.tolist() for name in ("base_text", "source_text", "answer", "against")] == [
        ["w3 w4 w5", "w6 w7"], ["w3 w8 w5", "w9 w7"], ["w10", "w10"], ["w11", "w12"],
    ]  # fmt: skip
    one = uw.pairs("w6 w7", "w9 w7", 10, 12, tokenizer=tokenizer)
    close(result["effect"].values[1:], effects(lm, one, "mlp_out", at="all"))


@pytest.mark.promise("read-back")
@pytest.mark.parametrize(
    ("method", "at"), [*((method, "each") for method in METHODS), ("exact", "all"), ("atp*", "all"), ("ig", "last")]
)
def test_a_result_comes_back_and_is_a_table(method: str, at: str, tmp_path: Path) -> None:
    lm, pairs = model("llama"), contrasts()
    names = [*names_of(lm, "q", 2), "MLP2.act[3]", "resid_mid1", "L1KV0.v", "L0.attn_out", "embed"]
    result = uw.effects(lm, pairs, names, at=at, method=method, steps=2)
    back = uw.read(result.save(tmp_path / "made.nc"))
    for name in result.data.variables:
        np.testing.assert_array_equal(back.data[name].values, result.data[name].values)
    assert back.provenance == result.provenance
    assert back.provenance["settings"]["method"] == method
    frame = back.table()
    axes = ["pair", "node", *(["position"] if at == "each" else [])]
    extra = {"atp*": ["signed"], "ig": ["inputs"]}.get(method, [])
    extra += ["token", "source_token"] if at == "each" else []
    assert sorted(frame.columns) == sorted([*axes, "effect", *extra, "kind", "layer", "head"])
    assert len(frame) == result["effect"].size
    cell = frame.set_index(axes)["effect"]
    assert (
        cell.loc[(1, "L1KV0.v", 3)[: len(axes)]]
        == result["effect"].sel(node="L1KV0.v").values[1].flat[3 * (at == "each")]
    )
    back.save_table(tmp_path / "made.csv")


@pytest.mark.promise("hostile")
@pytest.mark.parametrize("name", ["=1+1", "<script>", "L0H0\x1b[2J", "L0H0.q; rm", "MLP0.act[", "resid_mid", ""])
def test_a_saved_result_with_another_kind_of_name_is_refused(name: str, tmp_path: Path) -> None:
    result = uw.effects(model("gpt2"), contrasts(), ["L0H0", "L0H1.q"], at="all")
    forged = uw.Result(result.data.assign_coords(node=["L0H0", name]))
    with pytest.raises(ResultError, match="not a readable result"):
        uw.read(forged.save(tmp_path / "forged.nc"))


def test_sites_are_no_nodes_of_other_methods(tmp_path: Path) -> None:
    scan = uw.scan(model("gpt2"), torch.from_numpy(contrasts((6, 6)).base.ids))
    names = [*scan["node"].values[:-1], "L0H1.q"]
    with pytest.raises(ResultError, match="not a node name"):
        uw.read(uw.Result(scan.data.assign_coords(node=names)).save(tmp_path / "forged.nc"))


def test_the_cost_is_said_in_passes() -> None:
    lm, pairs = model("gpt2"), contrasts()
    cost = {method: uw.effects(lm, pairs, "heads", method=method).data.attrs["cost"] for method in METHODS}
    assert cost["atp"] == cost["relp"] == cost["direct"] == cost["net"] == 2 + 1
    assert cost["atp*"] == 3 + (1 + (3 - 1) / 2)
    assert cost["ig"] == (11 + 10 + 3) + 10
    assert 4 < cost["exact"] < 9 * 7


def test_a_listener_hears_of_every_pair() -> None:
    heard: list[tuple[int, int]] = []
    uw.effects(model("gpt2"), contrasts(), "mlp_out", batch=2, listener=lambda p: heard.append((p.done, p.total)))
    assert heard == [(0, 3), (2, 3), (3, 3)]


# --- what is wrong ----------------------------------------------------------------------------------------------------

B = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(7))
S = torch.where(torch.arange(5) == 1, 2, B)
NAN = float("nan")
BAD_PAIRS: dict[str, tuple[Callable[[], Any], str]] = {
    "unequal lengths": (lambda: uw.pairs([[3, 4], [5, 6]], [[3, 4, 5], [5, 6, 7]], 5), "pair 0 .* 2 .* and 3"),
    "unequal texts": (
        lambda: uw.pairs(["w1 w2", "w1"], ["w2 w1", "w2 w3"], 5, tokenizer=spelling()), "pair 1 .* 1 .w1. and 2"
    ),
    "unequal numbers": (lambda: uw.pairs(B, S[:1], 5), "one source prompt. Got: 2 and 1"),
    "floats": (lambda: uw.pairs(B.double(), S, 5), "matrix of integers. Got: .*float64"),
    "NaN": (lambda: uw.pairs(B * NAN, S, 5), "matrix of integers"),
    "no prompts": (lambda: uw.pairs(B[:0], S[:0], 5), "matrix of integers"),
    "no tokens": (lambda: uw.pairs(B[:, :0], S[:, :0], 5), "matrix of integers"),
    "nothing": (lambda: uw.pairs(None, None, 5), "matrix of integers"),
    "three axes": (lambda: uw.pairs(B[None], S[None], 5), "matrix of integers"),
    "ragged": (lambda: uw.pairs([[1, 2], []], [[1, 2], [3]], 5), "matrix of integers"),
    "no tokenizer": (lambda: uw.pairs("a", "b", 5), "needs a tokenizer"),
    "empty text": (lambda: uw.pairs("", "", 5, tokenizer=spelling()), "empty"),
    "text and number": (lambda: uw.pairs(["w1", 3], ["w2", 3], 5, tokenizer=spelling()), "not prompts"),
    "no answer": (lambda: uw.pairs(B, S, None), "need an answer"),
    "several tokens": (lambda: uw.pairs("w1", "w2", "w3 w4", tokenizer=spelling()), "not one token. Got: 'w3'"),
    "answer is NaN": (lambda: uw.pairs(B, S, NAN), "not a token. Got: nan"),
    "answer is a float": (lambda: uw.pairs(B, S, 5.0), "not a token. Got: 5.0"),
    "answer is a truth": (lambda: uw.pairs(B, S, True), "not a token"),
    "answer is negative": (lambda: uw.pairs(B, S, -1), "not a token"),
    "three answers": (lambda: uw.pairs(B, S, [1, 2, 3]), "answer is one token for each prompt. Got: 3"),
    "no answers": (lambda: uw.pairs(B, S, []), "answer is one token for each prompt. Got: 0"),
    "against is NaN": (lambda: uw.pairs(B, S, 5, NAN), "not a token"),
    "against itself": (lambda: uw.pairs(B, S, [5, 6], [7, 6]), "same token. Got: pair 1"),
    "position outside": (lambda: uw.pairs(B, S, 5, position=5), "no such position. Got: 5"),
    "position is a float": (lambda: uw.pairs(B, S, 5, position=1.0), "position is a row"),
    "position is NaN": (lambda: uw.pairs(B, S, 5, position=NAN), "position is a row"),
    "position is missing": (lambda: uw.pairs(B, S, 5, position=None), "position is a row"),
    "three positions": (lambda: uw.pairs(B, S, 5, position=[1, 2, 3]), "position is a row"),
}  # fmt: skip


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: without the checks of types that the tests add."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("wrong", BAD_PAIRS)
def test_pairs_that_cannot_be_are_refused(wrong: str, unchecked: None) -> None:
    make, message = BAD_PAIRS[wrong]
    with pytest.raises(TokensError, match=message):
        make()


def _ids(*shape: int, value: int = 4) -> torch.Tensor:
    return torch.full(shape, value)


def _other(**settings: Any) -> Model:
    return view(weights("gpt2", 1, **{**SHAPES["gpt2"], **settings}))


BAD_EFFECTS: dict[str, tuple[dict[str, Any], type[UnwriteError], str]] = {
    "no pairs": ({"pairs": (B, S)}, TokensError, "Got: tuple of 2. Expected: what uw.pairs returns"),
    "same prompts": ({"pairs": lambda: uw.pairs(B, B, 5)}, TokensError, "pair 0 are the same"),
    "same up to the row": ({"pairs": lambda: uw.pairs(B, S, 5, position=[1, 0])}, TokensError, "pair 1 are the same"),
    "base outside": ({"pairs": lambda: uw.pairs(_ids(1, 4, value=999), _ids(1, 4), 5)}, TokensError, "vocabulary"),
    "source outside": ({"pairs": lambda: uw.pairs(_ids(1, 4), _ids(1, 4, value=999), 5)}, TokensError, "vocabulary"),
    "negative ids": ({"pairs": lambda: uw.pairs(-_ids(1, 4), _ids(1, 4), 5)}, TokensError, "vocabulary"),
    "answer outside": ({"pairs": lambda: uw.pairs(B, S, 999)}, TokensError, "answer is outside .* Got: 999"),
    "against outside": ({"pairs": lambda: uw.pairs(B, S, 5, 999)}, TokensError, "against is outside .* Got: 999"),
    "too long": ({"pairs": lambda: uw.pairs(_ids(1, 65), _ids(1, 65, value=5), 5)}, TokensError, "longer than"),
    "no nodes": ({"nodes": []}, NodeError, "no node was named"),
    "nodes are a number": ({"nodes": 5}, NodeError, "nodes are names. Got: 5"),
    "nodes are None": ({"nodes": None}, NodeError, "nodes are names"),
    "unknown kind": ({"nodes": "head"}, NodeError, "not a site"),
    "unknown layer": ({"nodes": ["L9H0"]}, NodeError, "no site L9H0"),
    "unknown head": ({"nodes": ["L0H9.q"]}, NodeError, "no site L0H9.q"),
    "unknown neuron": ({"nodes": ["MLP0.act[9999]"]}, NodeError, "no site"),
    "a pattern": ({"nodes": ["L0H0.pattern"]}, NodeError, "cannot be patched from another run"),
    "a bias": ({"nodes": ["L0.bias"]}, NodeError, "cannot be patched from another run"),
    "at": ({"at": "every"}, NumericError, "at is unknown. Got: 'every'"),
    "at is None": ({"at": None}, NumericError, "at is unknown"),
    "method": ({"method": "ATP"}, NumericError, "method is unknown. Got: 'ATP'. Expected: 'exact', 'atp'"),
    "method is a list": ({"method": ["atp"]}, NumericError, "method is unknown"),
    "metric": ({"metric": "accuracy"}, NumericError, "metric is unknown. Got: 'accuracy'. Expected: 'logit_diff'"),
    "metric is an array": ({"metric": np.zeros(3)}, NumericError, "metric is unknown"),
    "metric of one number": ({"metric": lambda y: y.sum()}, NumericError, r"number for each pair. Got: .* \[\]"),
    "metric of a matrix": ({"metric": lambda y: y}, NumericError, "number for each pair"),
    "metric of an array": ({"metric": lambda y: y.detach().numpy()[:, 0]}, NumericError, "Got: ndarray"),
    "metric is NaN": ({"metric": lambda y: y.sum(-1) * NAN}, NumericError, "metric of pair 0 is not finite"),
    "metric is NaN somewhere": (
        {"metric": lambda y: y[:, 5].where(y[:, 5] == y[0, 5], NAN), "batch": 1}, NumericError, "effect of pair 0 with"
    ),
    "slope is NaN": (
        {"metric": lambda y: (y[:, 5] * 0).sqrt(), "method": "atp"}, NumericError, "pair 0 with L0H0 at position 0"
    ),
    "metric without slope": ({"metric": lambda y: y.argmax(-1), "method": "relp"}, NumericError, "no slope"),
    **{
        f"kl by {method}": ({"metric": "kl", "method": method}, NumericError, f"{method[:3]}.* says 0 for every node")
        for method in ("atp", "atp*", "relp", "direct", "net")
    },
    "source": ({"source": "noise"}, NumericError, "source is unknown. Got: 'noise'. Expected: 'source', 'mean'"),
    "source is an array": ({"source": np.zeros(3)}, NumericError, "source is unknown"),
    "source is not loaded": ({"source": lambda: model("gpt2").hf}, NumericError, "Got: GPT2LMHeadModel"),
    "another shape": ({"source": lambda: model("llama")}, ModelError, "another shape. Got: n_heads 4. Expected: n_hea"),
    "fewer layers": ({"source": lambda: _other(num_hidden_layers=2)}, NodeError, "no site L2H0"),
    "shorter context": ({"source": lambda: _other(max_position_embeddings=4)}, TokensError, "longer than"),
    "positions of another model": ({"source": lambda: _other(), "nodes": "embed"}, NumericError, "positions"),
    "zero at positions": ({"source": "zero", "nodes": "embed"}, NumericError, "positions"),
    "one pair resampled": ({"source": "resample", "pairs": lambda: uw.pairs(B[:1], S[:1], 5)}, TokensError, "no other"),
    "ig of zero": ({"method": "ig", "source": "zero"}, NumericError, "ig goes from base to source"),
    **{
        f"steps {steps}": ({"method": "ig", "steps": steps}, NumericError, "number of steps")
        for steps in (0, -1, "3", 2.0, True, None)
    },
    **{f"batch {n}": ({"batch": n}, NumericError, "batch is a number") for n in (0, -1, "3", 2.0, True)},
}  # fmt: skip


@pytest.mark.promise("errors")
@pytest.mark.promise("finite")
@pytest.mark.parametrize("wrong", BAD_EFFECTS)
def test_what_cannot_be_honoured_is_refused(wrong: str, unchecked: None) -> None:
    settings, kind, message = BAD_EFFECTS[wrong]
    made = {name: part() if name in ("pairs", "source") and callable(part) else part for name, part in settings.items()}
    with pytest.raises(kind, match=message) as caught:
        uw.effects(model("gpt2"), **{"pairs": uw.pairs(B, S, 5), **made})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["norm", "mlp", "attention"])
def test_a_rule_that_there_is_not_is_refused(rule: str) -> None:
    with pytest.raises(NumericError, match=f"the rule for {rule} is unknown. Got: 'frozen'. Expected: 'free'"):
        uw.Rules(**{rule: "frozen"})


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "falcon"])
def test_scores_that_no_module_shows_are_said(family: str) -> None:
    """Their queries can be patched, but what a patched one does to the pattern cannot be worked out."""
    lm, pairs = model(family), contrasts()
    assert effects(lm, pairs, "heads", method="atp*").shape[0] == 3
    with pytest.raises(ModelError, match="are not shown by any module"):
        uw.effects(lm, pairs, "q", method="atp*")
