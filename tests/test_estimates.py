"""Are guesses the slopes that sequential backward passes give, exact where the model is linear, and complete?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import executed
import tiny
import unwrite as uw
from executed import exact, weights
from patching import Alone, alone, contrasts
from surrogates import bilinear, linearised
from test_effects import SHAPES, a_few, close, effects, every_shape, model, names_of
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs

# Norms held, factors for activations, half for products, patterns held: a network that is linear in its stream.
FROZEN = uw.Rules("held", "relp", "values")
PAIRS = contrasts((6, 4))


@pytest.fixture(autouse=True)
def _whatever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models here are made into others after they were certified."""
    monkeypatch.setattr("unwrite.run.loop.stream.same_now", lambda *_: None)


def unchecked(hf: Any) -> Model:
    """A view of a model that was changed so much that its certificate would not hold."""
    return replace(model(hf.config.model_type), hf=hf, hashes={})


def filled(parts: list[Tensor], pairs: Pairs) -> np.ndarray:
    """Rows [node, position] of each pair as a result has them."""
    whole = np.full((len(pairs), parts[0].shape[0], pairs.base.length), np.nan)
    for i, (part, row) in enumerate(zip(parts, pairs.row, strict=True)):
        whole[i, :, : row + 1] = part[:, : row + 1].numpy()
    return whole


# --- AtP: one ordinary backward pass ----------------------------------------------------------------------------------


def twin(lm: Model, names: list[str], metric: str = "logit_diff") -> np.ndarray:
    found = []
    for one in alone(lm, PAIRS, metric):
        slopes = one.slopes(names)
        found.append(torch.stack([one.guess(name, slopes) for name in names]))
    return filled(found, PAIRS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_atp_is_the_difference_times_the_slope(family: str) -> None:
    lm = model(family)
    names = a_few(lm, 1 if family not in SHAPES else 2)
    with exact():
        each = effects(lm, PAIRS, names, method="atp")
        want = twin(lm, names)
        close(each, want)
        # All positions of a node are their sum, the last is its own.
        close(effects(lm, PAIRS, names, at="all", method="atp"), np.nansum(each, -1))
        last = effects(lm, PAIRS, names, at="last", method="atp")
        close(last, each[np.arange(2)[:, None], np.arange(len(names)), PAIRS.row[:, None]])
        assert np.array_equal(each, effects(lm, PAIRS, names, method=uw.Rules()), equal_nan=True)


@pytest.mark.parametrize("metric", ["log_prob", "prob"])
def test_other_metrics_have_their_own_slopes(metric: str) -> None:
    lm = model("gemma2")
    with exact():
        names = a_few(lm, 1)
        close(effects(lm, PAIRS, names, method="atp", metric=metric), twin(lm, names, metric))


@every_shape
def test_a_small_patch_does_what_the_slope_says(family: str) -> None:
    """|I(εΔ) − ε I_AtP| = O(ε²): the slope of a log–log line is 2; and dI/dε at 0 is I_AtP."""
    lm, steps = model(family), 2.0 ** -np.arange(6, 10)
    one = next(alone(lm, PAIRS))
    names = [name for name in a_few(lm, 1) if name != "embed"]
    with exact():
        guess = effects(lm, PAIRS, names, method="atp")[0]
        for j, name in enumerate(names):
            base, source = one.values([name], one.base)[name], one.values([name])[name]
            run = {e: one.effect(name, base + e * (source - base))[:-1].numpy() for e in (*steps, -steps[-1])}
            rest = np.array([np.abs(run[e] - e * guess[j]).max() for e in steps])
            slope = np.polyfit(np.log(steps), np.log(rest), 1)[0] if rest.min() > 1e-13 else 2.0
            assert slope == pytest.approx(2, abs=0.1), name
            central = (run[steps[-1]] - run[-steps[-1]]) / (2 * steps[-1])
            np.testing.assert_allclose(central, guess[j], rtol=0, atol=1e-4 * np.abs(guess).max())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_parts_add_up(family: str) -> None:
    lm = model(family)
    with exact():
        for method in ("atp", "relp"):
            for whole, part in (("attn_out", "heads"), ("mlp_out", "neurons")):
                parts, want = (effects(lm, PAIRS, kind, method=method) for kind in (part, whole))
                close(parts.reshape(2, 3, -1, PAIRS.base.length).sum(2), want)


@every_shape
def test_a_heads_output_moves_by_its_values_its_pattern_and_both(family: str) -> None:
    """Δz · g = AtP(v) + AtP(A) + g · (ΔA Δv), summed over positions."""
    lm = model(family)
    with exact():
        found = {kind: effects(lm, PAIRS, kind, at="all", method="atp") for kind in ("heads", "v")}
        names = names_of(lm, "heads")
        for i, one in enumerate(alone(lm, PAIRS)):
            slopes = one.slopes(names)
            for j, name in enumerate(names):
                parts = [f"{name}.pattern", f"{name}.v"]
                (a0, v0), (a1, v1) = (one.values(parts, ids).values() for ids in (one.base, one.source))
                rest = (a1 - a0) @ v0 + (a1 - a0) @ (v1 - v0)
                close(found["heads"][i, j], found["v"][i, j] + float((rest * slopes[name]).sum()))


def test_scores_follow_the_metric() -> None:
    """A constant has none; a · m + b has a times those of m."""
    lm = model("llama")
    names = a_few(lm, 1)

    def scaled(a: float, b: float) -> Callable[[Tensor], Tensor]:
        return lambda logits: a * (logits[:, 5] - logits[:, 14]) + b

    asked = [scaled(a, b) for a, b in ((1, 0), (-3, 7), (0, 2))]
    for method in ("exact", "atp*", "ig"):
        with exact():
            made = [effects(lm, PAIRS, names, method=method, metric=metric, steps=2) for metric in asked]
        close(made[1], (3 if method == "atp*" else -3) * made[0])
        assert np.nanmax(np.abs(made[2])) == 0


def test_a_larger_unembedding_is_a_larger_score() -> None:
    hf = weights("llama", 1, **SHAPES["llama"], tie_word_embeddings=False)
    found = {}
    for a in (1.0, 3.0):
        with torch.no_grad():
            hf.lm_head.weight.mul_(a)
        found[a] = effects(unchecked(hf), PAIRS, "resid", method=FROZEN)
    close(found[3.0], 3 * found[1.0])


def test_heads_in_another_order_have_their_own_scores() -> None:
    lm, order = model("gpt2"), [2, 0, 1]
    hf = copy.deepcopy(lm.hf)
    with torch.no_grad():
        for block in hf.transformer.h:
            fused = block.attn.c_attn
            for part in (fused.weight, fused.bias):
                part.copy_(part.unflatten(-1, (3, 3, -1))[..., order, :].flatten(-3))
            block.attn.c_proj.weight.copy_(block.attn.c_proj.weight.unflatten(0, (3, -1))[order].flatten(0, 1))
    moved = view(hf)
    for method in ("exact", "atp*"):
        for kind in ("heads", "shared_k"):
            want = effects(lm, PAIRS, kind, method=method).reshape(2, 3, 3, -1)[:, :, order]
            close(effects(moved, PAIRS, kind, method=method), want.reshape(2, 9, -1), 1e-10)


# --- AtP*: what a query or a key really does to its head, and layers left out one by one ------------------------------


def starred(one: Alone, names: list[str], at: str = "each") -> dict[str, Tensor]:
    """AtP* of a pair by one backward pass for every layer that is left out: "signed" and "effect" [node, …]."""
    lm = one.lm
    layers, heads = len(lm.layers), names_of(lm, "heads")
    summed = (lambda part: part.sum(-1, keepdim=True)) if at == "all" else (lambda part: part)

    def guesses(slopes: dict[str, Tensor]) -> list[Tensor]:
        fixed = (".q", ".k")
        made = [one.through_softmax(n, slopes) if n.endswith(fixed) else one.guess(n, slopes) for n in names]
        return [summed(part) for part in made]

    signed = guesses(one.slopes([*names, *heads]))
    total = [torch.zeros_like(part) for part in signed]
    for layer in range(layers):
        slopes = one.slopes([*names, *heads], without=layer)
        if (mid := f"resid_mid{layer}") in names:
            # Attention writes into this state, which goes on past the MLP.
            slopes |= one.slopes([mid], without=layer, mlp_only=True)
        total = [t + part.abs() for t, part in zip(total, guesses(slopes), strict=True)]
    count = [layers if name.startswith(("resid", "embed")) else layers - 1 for name in names]
    return {
        "signed": torch.stack(signed),
        "effect": torch.stack([t / max(1, n) for t, n in zip(total, count, strict=True)]),
    }


@pytest.mark.parametrize("at", ["each", "all"])
@pytest.mark.parametrize("family", [*SHAPES, "qwen3", "granite", "phi"])
def test_atp_star_is_that_of_sequential_passes_and_patched_heads(family: str, at: str) -> None:
    """GQA (a shared key is the sum over its group), soft-caps, norms of queries, parallel blocks, scaled writes."""
    lm = model(family)
    names = a_few(lm, 1 if at == "all" else 2)
    with exact():
        found = uw.effects(lm, PAIRS, names, at=at, method="atp*", batch=2)
        for i, one in enumerate(alone(lm, PAIRS)):
            for name, want in starred(one, names, at).items():
                got = found[name].sel(node=names).values[i]
                got = got[:, None] if at == "all" else got[:, : one.row + 1]
                if at == "each":
                    want = want[:, : one.row + 1]
                close(got, want.numpy(), 1e-11)


@every_shape
def test_leaving_layers_out_obeys_its_identities(family: str) -> None:
    """In the last layer it is |signed|; it has no sign; of heads the signed one is AtP."""
    lm = model(family)
    for kind in ("heads", "q", "mlp_out"):
        found = uw.effects(lm, PAIRS, kind, method="atp*")
        names = found["node"].values
        last = [name for name in names if name.startswith(("L2", "MLP2"))]
        close(found["effect"].sel(node=last).values, np.abs(found["signed"].sel(node=last).values), 1e-9)
        assert (found["effect"].fillna(0) >= 0).all()
    assert np.array_equal(
        uw.effects(lm, PAIRS, "heads", method="atp*", batch=2)["signed"].values,
        effects(lm, PAIRS, "heads", method="atp"), equal_nan=True,
    )  # fmt: skip


def test_one_layer_leaves_nothing_to_leave_out() -> None:
    lm = view(weights("gpt2", 1, num_hidden_layers=1))
    found = uw.effects(lm, PAIRS, a_few(lm, 2), method="atp*")
    assert np.array_equal(found["effect"].values, np.abs(found["signed"].values), equal_nan=True)


def attention_only(family: str) -> Model:
    """One layer of attention, no norm behind it and no MLP: logits are linear in z."""
    settings = {**SHAPES[family], "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    settings |= {"final_logit_softcapping": None} if family == "gemma2" else {"layer_types": None}
    if family != "gemma2":
        settings.pop("layer_types")
    hf = weights(family, 3, **settings)
    lm = unchecked(hf)
    layer = lm.layers[0]
    for name, module in list(hf.named_modules()):
        if module in (lm.decoder.get_submodule(lm.row.final_norm), layer.post_attention_norm, layer.post_mlp_norm):
            hf.set_submodule(name, nn.Identity())
        if name.endswith(("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h")):
            for part in module.parameters():
                part.data.zero_()
    with torch.no_grad():  # queries and keys large enough that rows are nearly saturated
        layer.value.weight.mul_(6) if family in ("gpt2", "gpt_neox") else layer.attention.q_proj.weight.mul_(20)
    return unchecked(hf)


@every_shape
def test_in_one_layer_of_attention_the_fixed_guess_is_exact(family: str) -> None:
    lm = attention_only(family)
    with exact():
        for kind in ("q", "k", "shared_k"):
            truth = effects(lm, PAIRS, kind)
            close(uw.effects(lm, PAIRS, kind, method="atp*")["signed"].values, truth, 1e-11)
            assert np.nanmax(np.abs(effects(lm, PAIRS, kind, method="atp") - truth)) > 0.02 * np.nanmax(np.abs(truth))
        for kind in ("v", "shared_v", "heads", "attn_out"):
            close(effects(lm, PAIRS, kind, method="atp"), effects(lm, PAIRS, kind), 1e-11)


# --- a linear model: everything is exact ------------------------------------------------------------------------------


@cache
def linear() -> Model:
    """No norms, no activation, and patterns that nothing changes."""
    hf = weights("gpt2", 5, num_hidden_layers=3, num_attention_heads=2)
    for name, module in list(hf.named_modules()):
        if name.rpartition(".")[2] in ("ln_1", "ln_2", "ln_f", "act"):
            hf.set_submodule(name, nn.Identity())
        if name.endswith("c_attn"):
            module.weight.data[:, : 2 * hf.config.n_embd] = 0
            module.bias.data[: 2 * hf.config.n_embd] = 0
    return unchecked(hf)


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_in_a_linear_model_a_guess_is_exact(method: str) -> None:
    names = a_few(linear(), 2)
    for steps in (1, 3) if method == "ig" else (1,):
        guess = uw.effects(linear(), PAIRS, names, method=method, steps=steps, batch=2)
        truth = uw.effects(linear(), PAIRS, names)["effect"]
        for part in ("effect", *(["inputs"] if method == "ig" else [])):
            close(guess[part].values, truth.values, 1e-11)
    assert np.nanmax(np.abs(truth.values)) > 0.1


def test_in_a_linear_model_the_other_direction_is_minus_this_one() -> None:
    back = uw.pairs(PAIRS.source, PAIRS.base, PAIRS.answer, PAIRS.against)
    names = a_few(linear(), 2)
    close(effects(linear(), back, names), -effects(linear(), PAIRS, names), 1e-11)
    there = effects(model("gpt2"), PAIRS, "heads")
    assert np.nanmax(np.abs(there + effects(model("gpt2"), back, "heads"))) > 0.01 * np.nanmax(np.abs(there))


def test_the_mean_of_both_ends_is_complete_for_a_square() -> None:
    back = uw.pairs(PAIRS.source, PAIRS.base, PAIRS.answer, PAIRS.against)

    def square(logits: Tensor) -> Tensor:
        return (logits[:, 5] - 2 * logits[:, 14]) ** 2

    settings: dict[str, Any] = {"metric": square, "at": "all"}
    ends = [effects(linear(), part, "resid", method="atp", **settings) for part in (PAIRS, back)]
    whole = effects(linear(), PAIRS, "resid", **settings)
    close((ends[0] - ends[1]) / 2, whole, 1e-11)
    close(effects(linear(), PAIRS, "resid", method="ig", steps=1, **settings), whole, 1e-11)


# --- integrated gradients ---------------------------------------------------------------------------------------------


@pytest.mark.promise("estimates")
@every_shape
def test_conductance_is_complete_on_every_cut_and_inputs_at_the_embeddings(family: str) -> None:
    """The midpoint rule's error is a quarter with twice the steps."""
    lm, pair, few = model(family), contrasts((6,)), 16 if family in ("gpt2", "gpt_neox") else 32
    cuts = ["embed", "resid_post1", "resid_post2", *([] if lm.parallel else ["resid_mid1"])]
    errors: dict[tuple[str, int], np.ndarray] = {}
    with exact():
        whole = effects(lm, pair, ["resid_post2"], at="all")
        for steps in (few, 2 * few):
            found = uw.effects(lm, pair, cuts, at="all", method="ig", steps=steps).data.sel(node=cuts)
            for name in ("effect", "inputs"):
                errors[name, steps] = np.abs(found[name].values - whole)
    first, second = errors["effect", few], errors["effect", 2 * few]
    assert second.max() < 0.01 * np.abs(whole).max()
    close(second * 4, first, 0.3 * first.max())
    close(errors["inputs", 2 * few][:, 0], second[:, 0])
    assert errors["inputs", 2 * few][:, 1:].max() > 10 * second.max()


def test_integrated_gradients_are_sums_over_runs_between() -> None:
    lm, steps = model("gpt2"), 3
    names = [name for name in a_few(lm, 2) if name not in ("embed", "resid_pre0")]
    found = uw.effects(lm, PAIRS, names, method="ig", steps=steps, batch=2).data.sel(node=names)
    one = next(alone(lm, PAIRS))
    ends = [one.values(["resid_pre0"], ids)["resid_pre0"] for ids in (one.base, one.source)]
    between = [ends[0] + (ends[1] - ends[0]) * k / (2 * steps) for k in range(2 * steps + 1)]
    values = [one.values(names, start=x) for x in between[::2]]
    slopes = [one.slopes(names, start=x) for x in between[1::2]]
    for j, name in enumerate(names):
        conductance = sum(((values[k + 1][name] - values[k][name]) * slopes[k][name]).sum(-1) for k in range(steps))
        inputs = ((values[-1][name] - values[0][name]) * sum(slope[name] for slope in slopes)).sum(-1) / steps
        close(found["effect"].values[0, j], conductance.numpy())  # pyright: ignore[reportAttributeAccessIssue]
        close(found["inputs"].values[0, j], inputs.numpy())


# --- RelP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["source", "zero"])
@pytest.mark.parametrize("family", [*SHAPES, "olmo2", "starcoder2"])
def test_relp_with_patterns_held_is_exact_in_the_network_with_its_rules(family: str, source: str) -> None:
    """Norm scales, factors of activations, halves of products and patterns held; biases stay; logits have no cap."""
    capless = {"final_logit_softcapping": None} if family == "gemma2" else {}
    lm = view(weights(family, 1, **{**SHAPES.get(family, {}), **capless}))
    names = [name for name in a_few(lm, 2) if not name.endswith((".q", ".k")) and name != "embed"]
    with exact():
        found = effects(lm, PAIRS, names, method=FROZEN, source=source)
        for i, one in enumerate(alone(lm, PAIRS)):
            values = one.values(names)
            patterns = one.values([f"{name}.pattern" for name in names_of(lm, "heads")], one.base)
            with linearised(executed.Alone(lm.hf, one.base, one.row, 0)), bilinear(lm, one.base):
                for j, name in enumerate(names):
                    value = torch.zeros_like(values[name]) if source == "zero" else values[name]
                    close(found[i, j, : one.row + 1], one.effect(name, value, patterns)[:-1].numpy(), 1e-10)


def biasless(family: str) -> Model:
    hf = weights(family, 2, **SHAPES[family], **({"attention_bias": False} if family == "llama" else {}))
    for name, part in hf.named_parameters():
        if name.endswith("bias"):
            part.data.zero_()
    return view(hf)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_relevance_is_conserved_on_every_cut_with_all_rules_and_no_biases(family: str) -> None:
    """Σ x · ρ = m at every state, up to the 10⁻⁶ that keeps act(x)/x finite and the norms' own."""
    lm = biasless(family)
    states = [name for name in names_of(lm, "resid") if "mid" not in name or not lm.parallel]
    settings: dict[str, Any] = {"source": "zero", "at": "all"}
    found = uw.effects(lm, PAIRS, states, method=FROZEN, **settings)
    close(found["effect"].values, np.repeat(-found["base"].values[:, None], len(states), 1), 2e-4)
    for fewer in (uw.Rules("free", "relp", "values"), uw.Rules("held", "free", "values"), uw.Rules("held", "relp")):
        rest = effects(lm, PAIRS, states, method=fewer, **settings) + found["base"].values[:, None]
        assert np.abs(rest).max() > 0.01


def test_a_norms_input_has_no_plain_relevance_of_its_own() -> None:
    lm = biasless("llama")
    settings: dict[str, Any] = {"source": "zero", "at": "last"}
    end = [f"resid_post{len(lm.layers) - 1}"]
    assert np.abs(effects(lm, PAIRS, end, method="atp", **settings)).max() < 1e-4
    found = uw.effects(lm, PAIRS, end, method="relp", **settings)
    close(found["effect"].values[:, 0], -found["base"].values, 1e-5)


def test_where_patterns_are_held_queries_and_keys_do_nothing() -> None:
    for family in SHAPES:
        names = [name for kind in ("q", "k", "shared_k") for name in names_of(model(family), kind, 2)]
        for rules in (FROZEN, "net", "direct"):
            assert not np.nan_to_num(effects(model(family), PAIRS, names, method=rules)).any()


def test_an_activation_that_is_a_factor_already_needs_no_rule() -> None:
    lm = view(weights("gpt2", 1, **SHAPES["gpt2"], activation_function="relu"))
    names = a_few(lm, 2)
    close(effects(lm, PAIRS, names, method=uw.Rules(mlp="relp")), effects(lm, PAIRS, names, method="atp"), 1e-4)


def test_an_activation_of_nothing_is_finite() -> None:
    hf = weights("gpt2", 1, **SHAPES["gpt2"])
    for block in hf.transformer.h:
        for part in block.mlp.c_fc.parameters():
            part.data.zero_()
    found = effects(view(hf), PAIRS, "resid", method="relp")
    assert np.isfinite(found[~np.isnan(found)]).all()
    assert np.nanmax(np.abs(found)) > 0


@pytest.mark.parametrize("family", SHAPES)
def test_the_base_run_is_the_models_own_under_any_rule(family: str) -> None:
    lm = model(family)
    base = [uw.effects(lm, PAIRS, "mlp_out", method=rules)["base"].values for rules in ("atp", "relp", "direct", "net")]
    for other in base[1:]:
        assert np.array_equal(base[0], other)
    close(base[0], np.array([float(one.score(one.clean[None])) for one in alone(lm, PAIRS)]), 1e-6)
