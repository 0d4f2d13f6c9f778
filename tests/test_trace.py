"""Is every site what an independent computation says, does an edit do what it says, and is nothing left behind?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers import DynamicCache

import tiny
import unwrite as uw
from tiny import snapshot
from unwrite.errors import ModelError, NodeError
from unwrite.model.attention import patterns
from unwrite.model.cache import keeping
from unwrite.model.families import FAMILIES
from unwrite.model.fold import fold, value_weights
from unwrite.model.load import view
from unwrite.model.values import into_values, value_scale
from unwrite.model.view import Layer, Model
from unwrite.nodes import Node, Site, parse_site
from unwrite.run.edit.edits import Pending
from unwrite.run.edit.sites import _sites, place
from unwrite.run.replay import clean as replay
from unwrite.run.replay import edited

Edit = uw.Edit
PINNED: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": None}}
# Falcon reaches attention in four ways: with alibi or rotary positions, by torch's own function or eagerly.
FALCONS = {"falcon": 2, "falcon alibi": 1, "falcon eager": 2, "falcon alibi eager": 1}
KINDS = tuple(dict.fromkeys((*tiny.FAMILIES, *FALCONS)))


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    family, *flags = kind.split()
    hf = tiny.model(family, FALCONS.get(kind, seed), dtype, **PINNED.get(family, {}))
    if "eager" in flags:
        hf.config._attn_implementation = "eager"
    return hf


def unchecked(hf: Any, convention: str = "paper") -> Model:
    """A view without its certificate, which other tests are about."""
    return Model(hf, None, hf.config.model_type, FAMILIES[hf.config.model_type], convention)


@cache
def model(kind: str, convention: str = "paper") -> Model:
    return unchecked(build(kind) if convention == "paper" else model(kind).hf, convention)


def ids_of(lm: Model, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(lm.vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def editable(lm: Model) -> list[Site]:
    return [site for site in sites_of(lm) if place(lm, site).editable]


@cache
def sites_of(lm: Model) -> tuple[Site, ...]:
    return tuple(_sites(lm))


def has(lm: Model, name: str) -> bool:
    return parse_site(name) in sites_of(lm)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, truth: Tensor, lm: Model, eager: bool = False) -> None:
    """Equal to rounding: norms, and most eager softmaxes, are float32 in float64 models."""
    tolerance = 1e-6 if lm.row.float32_inside or eager else 1e-10
    torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max() + 1))


@torch.no_grad()
def ran(lm: Model, *sites: object, edits: Any = (), ids: Tensor | None = None) -> tuple[Any, Tensor]:
    with uw.trace(lm, *sites, edits=edits) as t:
        logits = lm.hf(ids_of(lm) if ids is None else ids, use_cache=False).logits
    return t, logits


@torch.no_grad()
def seen(lm: Model, wanted: dict[str, tuple[nn.Module, bool]]) -> dict[str, Any]:
    """What plain hooks show of an untraced pass: a module's input, or its output."""
    found: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].clone()}))
        if before
        else module.register_forward_hook(lambda _, args, out, name=name: found.update({name: out.clone()}))
        for name, (module, before) in wanted.items()
    ]
    found["logits"] = lm.hf(ids_of(lm), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


# What is recorded


@pytest.mark.parametrize("kind", KINDS)
def test_writes_and_states_are_those_of_the_decomposition(kind: str) -> None:
    for convention in ("paper", "raw") if model(kind).centred else ("paper",):
        lm = model(kind, convention)
        t, _ = ran(lm, *lm.nodes, *lm.locations)
        run = replay.clean(lm, ids_of(lm), fold(lm))
        writes = torch.stack([t[node] for node in lm.nodes])
        close(writes, torch.cat([*run.written(run.record)]), lm)
        for state, held in zip(lm.states, lm.holds(), strict=True):
            close(t[state], run.record.stream[state], lm)
            close(writes[held].sum(0), t[state], lm)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_sites_are_what_plain_hooks_of_an_untraced_pass_show(kind: str) -> None:
    lm = model(kind)
    layer = lm.layers[1]
    wanted = {"z": (layer.out_proj, True), "values": (layer.value, False)}
    acts = has(lm, "MLP1.act")
    if acts:
        wanted["act"] = (place(lm, parse_site("MLP1.act")).point.module, True)  # pyright: ignore
    truth = seen(lm, wanted)
    heads = range(lm.n_heads)
    t, logits = ran(
        lm,
        "L1.v_input",
        lm.layers[1].reads,
        *(["MLP1.act"] if acts else []),
        *(f"L1H{h}.{part}" for h in heads for part in ("z", "v", "pattern")),
        *(f"L1KV{g}.v" for g in range(lm.kv_heads)),
    )
    close(logits, truth["logits"], lm, eager=True)
    close(torch.cat([t[f"L1H{h}.z"] for h in heads], -1), truth["z"], lm, eager=True)
    if acts:
        close(t["MLP1.act"], truth["act"].view(t["MLP1.act"].shape), lm, eager=True)
    assert torch.equal(t["L1.v_input"], t[lm.layers[1].reads])
    values = read_values(lm, layer, t["L1.v_input"])
    for h in heads:
        pattern, group = t[f"L1H{h}.pattern"], h * lm.kv_heads // lm.n_heads
        close(t[f"L1H{h}.v"], values[:, h], lm)
        assert torch.equal(t[f"L1H{h}.v"], t[f"L1KV{group}.v"])
        close(pattern @ t[f"L1H{h}.v"], t[f"L1H{h}.z"], lm)
        close(pattern.sum(-1), torch.ones(2, 7, dtype=torch.float64), lm, eager=True)
        assert float(pattern.triu(1).abs().max()) < 1e-12


def read_values(lm: Model, layer: Layer, stream: Tensor) -> Tensor:
    """norm(stream) W_V + b of every query head, from weights alone."""
    weight, bias = value_weights(lm, layer)
    normed, scale = into_values(lm, layer, stream), value_scale(lm, layer, stream)
    normed = normed if scale is None else normed * scale[..., None]
    beta = getattr(layer.input_norm, "bias", None)
    return (normed if beta is None else normed + beta.detach())[:, None] @ weight + bias[:, None]


# Where scores are q·k times a number of the configuration, and the mask is causal.
SCALES: dict[str, Callable[[Any], float]] = {
    "gpt_neox": lambda config: (config.hidden_size // config.num_attention_heads) ** -0.5,
    "opt": lambda config: 1.0,
    "llama": lambda config: config.head_dim**-0.5,
    "qwen3": lambda config: config.head_dim**-0.5,
    "phi": lambda config: (config.hidden_size // config.num_attention_heads) ** -0.5,
    "olmo2": lambda config: (config.hidden_size // config.num_attention_heads) ** -0.5,
    "granite": lambda config: config.attention_multiplier,
    "cohere": lambda config: (config.hidden_size // config.num_attention_heads) ** -0.5,
    "gemma": lambda config: config.head_dim**-0.5,
    "falcon": lambda config: (config.hidden_size // config.num_attention_heads) ** -0.5,
}


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.where(np.tril(np.ones(scores.shape[-2:])) > 0, scores, -np.inf)
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", SCALES)
def test_the_pattern_is_the_softmax_of_queries_and_keys(kind: str) -> None:
    lm = model(kind)
    for head in range(lm.n_heads):
        t, _ = ran(lm, *(f"L0H{head}.{part}" for part in ("q", "k", "pattern")))
        q, k = (t[f"L0H{head}.{part}"].numpy() for part in "qk")
        truth = softmax(q @ k.swapaxes(-1, -2) * SCALES[kind](lm.config))
        np.testing.assert_allclose(t[f"L0H{head}.pattern"].numpy(), truth, atol=1e-6)


@pytest.mark.parametrize("kind", ["falcon", "falcon alibi", "gptj", "bloom", "gpt_neo", "gemma2", "mistral"])
def test_patterns_are_those_of_the_attention_that_the_model_itself_uses(kind: str) -> None:
    """Falcon with alibi computes another thing when it is eager, so it must not be made eager to look."""
    lm = model(kind)
    truth = seen(lm, {"z": (lm.layers[0].out_proj, True)})["z"].unflatten(-1, (lm.n_heads, -1))
    t, _ = ran(lm, *(f"L0H{h}.v" for h in range(lm.n_heads)))
    with torch.no_grad(), patterns(lm) as found:
        lm.decoder(ids_of(lm), use_cache=False)
    for head in range(lm.n_heads):
        close(found[0][:, head] @ t[f"L0H{head}.v"], truth[:, :, head], lm)


@pytest.mark.parametrize("kind", KINDS)
def test_to_record_or_to_set_a_site_to_its_own_value_changes_no_bit(kind: str) -> None:
    lm = model(kind)
    sites = editable(lm)
    _, logits = ran(lm, *(site for site in sites if site.kind != "pattern"))
    assert torch.equal(logits, seen(lm, {})["logits"])
    t, logits = ran(lm, *sites)
    again, same = ran(lm, *sites, edits=[Edit.set(site, t[site]) for site in sites])
    assert torch.equal(same, logits)
    assert all(torch.equal(again[site], t[site]) for site in sites)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "falcon alibi", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_in_lower_precision(kind: str, dtype: torch.dtype) -> None:
    lm = unchecked(build(kind, dtype=dtype))
    sites = editable(lm)
    t, logits = ran(lm, *sites)
    assert t["L0H0"].dtype == t["resid_pre0"].dtype == torch.float32
    assert t["L0H0.z"].dtype == t["L0H0.pattern"].dtype == dtype
    assert torch.equal(ran(lm, edits=[Edit.set(site, t[site]) for site in sites])[1], logits)
    value = noise(2, 7, lm.d_model).float()
    t, _ = ran(lm, "resid_post0", "L1.v_input", edits=Edit.set("resid_post0", value))
    centred = value - value.mean(-1, keepdim=True) if lm.centred else value
    torch.testing.assert_close(t["L1.v_input"], centred, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


# What an edit does


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_node_is_a_run_without_it(kind: str) -> None:
    lm = model(kind)
    run = replay.clean(lm, ids_of(lm), fold(lm))
    writes = torch.cat([*run.written(run.record)])
    last = lm.states[-1]
    chosen = [node for node in lm.parts if node.layer < 1 and node.head < 1 and node.kind != "mlp"] + [lm.parts[-1]]
    for node in chosen:
        t, _ = ran(lm, node, last, edits=Edit.set(node, 0.0))
        gone = edited.added(run, node, -writes[lm.parts.index(node)])
        close(t[last], gone.stream[last], lm)
        assert not t[node].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_added_to_a_state_is_added_after_its_last_node(kind: str) -> None:
    lm = model(kind)
    run, change = replay.clean(lm, ids_of(lm), fold(lm)), noise(2, 7, lm.d_model)
    for state, held in zip(lm.states, lm.holds(), strict=True):
        if state.layer > 0:
            continue
        node = [node for node, is_held in zip(lm.parts, held, strict=True) if is_held][-1]
        truth = edited.added(run, node, change)
        t, _ = ran(lm, *lm.states, edits=Edit.add(state, change))
        for later in lm.states[lm.states.index(state) + 1 :]:
            close(t[later], truth.stream[later], lm)
        centred = change - change.mean(-1, keepdim=True) if lm.centred else change
        close(t[state], run.record.stream[state] + change, lm)
        after = lm.states.index(state) + 1
        if after < len(lm.states):
            # Both the path around the next block and the block itself see it.
            assert float((t[lm.states[after]] - run.record.stream[lm.states[after]] - centred).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_middle_reaches_the_mlp_and_the_path_around_it(kind: str) -> None:
    lm = model(kind, "raw")
    assert has(lm, "resid_mid0") != lm.parallel
    if lm.parallel:
        return
    layer, change = lm.layers[0], noise(2, 7, lm.d_model)
    t, _ = ran(lm, "resid_mid0", "MLP0", "resid_post0", edits=Edit.add("resid_mid0", change))
    clean, _ = ran(lm, "resid_mid0")
    close(t["resid_mid0"], clean["resid_mid0"] + change, lm)
    close(t["resid_post0"], t["resid_mid0"] + t["MLP0"], lm)
    with torch.no_grad():
        close(t["MLP0"], mlp_by_hand(lm, layer, t["resid_mid0"]), lm)


def mlp_by_hand(lm: Model, layer: Layer, stream: Tensor) -> Tensor:
    """What the MLP writes, by its modules called one after the other."""
    block, scale = layer.block, lm.row.residual_scale(lm.config)
    if lm.family == "opt":
        return block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(stream))))
    if lm.family == "bloom":
        return block.mlp(block.post_attention_layernorm(stream), torch.zeros_like(stream))
    read = stream if layer.mid is layer.mlp else layer.mid(stream)  # pyright: ignore[reportOptionalCall]
    written = layer.mlp(read)
    return scale * (written if layer.post_mlp_norm is None else layer.post_mlp_norm(written))


@pytest.mark.parametrize("kind", KINDS)
def test_a_silenced_head_is_one_silenced_by_a_plain_hook(kind: str) -> None:
    lm = model(kind)
    width, head = lm.head_dim, lm.n_heads - 1

    def silence(_: nn.Module, args: Any) -> Any:
        z = args[0].clone()
        z[:, 2:, head * width : (head + 1) * width] = 0
        return (z, *args[1:])

    handle = lm.layers[1].out_proj.register_forward_pre_hook(silence)
    truth = seen(lm, {})["logits"]
    handle.remove()
    assert torch.equal(ran(lm, edits=Edit.scale(f"L1H{head}.z", 0.0, at=slice(2, None)))[1], truth)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "falcon eager"])
def test_a_pattern_that_is_set_is_the_one_that_values_are_averaged_with(kind: str) -> None:
    lm = model(kind)
    uniform = torch.ones(7, 7, dtype=torch.float64).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(2, 7, 7)
    parts = [f"L0H{h}.{part}" for h in (0, 1) for part in ("z", "v", "pattern")]
    clean, _ = ran(lm, *parts)
    t, _ = ran(lm, *parts, edits=Edit.set("L0H1.pattern", uniform))
    truth = np.stack([[v[: i + 1].mean(0) for i in range(7)] for v in t["L0H1.v"].numpy()])
    np.testing.assert_allclose(t["L0H1.z"].numpy(), truth, atol=1e-12)
    for part in ("z", "v", "pattern"):
        assert torch.equal(t[f"L0H0.{part}"], clean[f"L0H0.{part}"])
    row = torch.eye(7, dtype=torch.float64)[1]
    t, _ = ran(lm, *parts, edits=Edit.set("L0H1.pattern", row, at=[3, -1]))
    for query in (3, 6):
        close(t["L0H1.z"][:, query], t["L0H1.v"][:, 1], lm)
    close(t["L0H1.z"][:, :3], clean["L0H1.z"][:, :3], lm)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_value_input_reaches_all_values_of_its_layer_and_nothing_else(kind: str) -> None:
    lm = model(kind)
    heads = range(lm.n_heads)
    inner = [f"L1H{h}.{part}" for h in heads for part in ("q", "k", "pattern") if has(lm, f"L1H{h}.{part}")]
    after = [f"L1H{h}.{part}" for h in heads for part in ("v", "z")]
    clean, _ = ran(lm, *inner, "resid_post0", "L1.v_input")
    t, _ = ran(lm, *inner, *after, "resid_post0", "L1.v_input", edits=Edit.add("L1.v_input", noise(2, 7, lm.d_model)))
    assert all(torch.equal(t[site], clean[site]) for site in (*inner, "resid_post0"))
    close(t["L1.v_input"], clean["L1.v_input"] + noise(2, 7, lm.d_model), lm)
    stream = t["L1.v_input"]  # as the formula says, which may have a mean that no norm sees
    values = read_values(lm, lm.layers[1], stream)
    for h in heads:
        close(t[f"L1H{h}.v"], values[:, h], lm)
        close(t[f"L1H{h}.z"], t[f"L1H{h}.pattern"] @ t[f"L1H{h}.v"], lm)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.split()[-1] not in ("bloom", "gpt_neo", "eager")])
def test_a_head_has_its_own_copy_of_what_its_group_shares(kind: str) -> None:
    family = kind.split()[0]
    heads, groups = {"num_attention_heads": 4, "hidden_size": 32}, {"num_key_value_heads": 2}
    if family == "falcon":
        groups = {"num_kv_heads": 2, "layout": 5}
    hf = tiny.model(
        family,
        1,
        **heads,
        **(groups if family not in ("gpt2", "gpt_neox", "gptj", "opt") else {}),
        **PINNED.get(family, {}),
    )
    lm = unchecked(hf)
    each = lm.n_heads // lm.kv_heads
    for part, seen_in in (("k", "pattern"), ("v", "z")):
        sites = [f"L0H{h}.{seen_in}" for h in range(4)]
        clean, _ = ran(lm, *sites)
        for site, touched in (
            (f"L0H1.{part}", {1}),
            (f"L0KV{1 // each}.{part}", set(range(1 // each * each, 1 // each * each + each))),
        ):
            t, _ = ran(lm, *sites, edits=Edit.add(site, noise(2, 7, lm.head_dim)))
            assert {
                h for h in range(4) if not torch.equal(t[f"L0H{h}.{seen_in}"], clean[f"L0H{h}.{seen_in}"])
            } == touched


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neo", "falcon", "qwen3", "phi3"])
def test_a_query_of_zero_looks_everywhere_alike(kind: str) -> None:
    lm = model(kind)
    t, _ = ran(lm, "L1H1.pattern", edits=Edit.scale("L1H1.q", 0.0))
    allowed = (t["L1H1.pattern"] > 1e-9).double()
    close(t["L1H1.pattern"], allowed / allowed.sum(-1, keepdim=True), lm, eager=True)


# Gradients


def loss_of(lm: Model, ids: Tensor) -> Tensor:
    logits = lm.hf(ids, use_cache=False).logits
    return (logits * noise(*logits.shape, seed=5)).sum()


EXACT = ("gpt2", "falcon", "falcon alibi", "gpt_neox")  # nothing in float32, but for eager softmaxes


@pytest.mark.parametrize("kind", EXACT)
def test_gradients_at_every_site_are_finite_differences(kind: str) -> None:
    lm, step = model(kind), 1e-5
    ids = ids_of(lm)
    names = [site for site in editable(lm) if site.layer < 1 and site.head < 1]
    names += [site for site in editable(lm) if str(site) in ("L1H1.v", "L1H1.k", "MLP1", "L1.v_input", "L1H1")]
    if kind == "gpt_neox":
        names = [site for site in names if site.kind != "pattern"]
    with uw.trace(lm, *names) as t:
        loss_of(lm, ids).backward()
    lm.hf.zero_grad()
    for site in names:
        way = noise(*t[site].shape, seed=3)
        slope = []
        for sign in (step, -step):
            with torch.no_grad(), uw.trace(lm, edits=Edit.add(site, way, gain=sign)):
                slope.append(float(loss_of(lm, ids)))
        assert float((t[site].grad * way).sum()) == pytest.approx(
            (slope[0] - slope[1]) / (2 * step), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite", "olmo2"])
def test_gradients_flow_into_sources_gains_and_bases(kind: str) -> None:
    lm, ids = model(kind), ids_of(model(kind))
    source, gain, basis = (
        noise(lm.d_model).requires_grad_(),
        torch.ones(2, 7).double().requires_grad_(),
        noise(2, lm.d_model),
    )
    edit = Edit.add("resid_post0", source, gain=gain, basis=basis.requires_grad_())
    with uw.trace(lm, "resid_post0", edits=edit) as t:
        loss = loss_of(lm, ids)
    (at_site, *found) = torch.autograd.grad(loss, [t["resid_post0"], source, gain, basis])
    frame = torch.linalg.qr(basis.detach().mT).Q
    into = at_site @ frame @ frame.mT
    torch.testing.assert_close(found[0], into.sum((0, 1)), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[1], into @ source.detach(), rtol=1e-5, atol=1e-8)
    assert found[2].isfinite().all()
    assert found[2].any()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "bloom", "opt"])
def test_a_removed_head_takes_its_gradients_with_it(kind: str) -> None:
    """Without a post-norm, to remove a write is to silence z, for every parameter too."""
    lm, width = model(kind, "raw"), model(kind).head_dim
    ids = ids_of(lm)

    def silence(_: nn.Module, args: Any) -> Any:
        return (torch.cat([torch.zeros_like(args[0][..., :width]), args[0][..., width:]], -1), *args[1:])

    found = []
    for removed in (True, False):
        with uw.trace(lm, edits=[Edit.set("L1H0", 0.0)] if removed else []):
            handle = None if removed else lm.layers[1].out_proj.register_forward_pre_hook(silence)
            loss = loss_of(lm, ids)
            found.append(torch.autograd.grad(loss, list(lm.hf.parameters()), allow_unused=True))
            if handle is not None:
                handle.remove()
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-8)


def test_so_does_the_constant_part_that_stays() -> None:
    lm = model("gpt2")
    ids, bias = ids_of(lm), lm.layers[1].value.bias
    with uw.trace(lm, edits=Edit.set("L1H0", 0.0)):
        (slope,) = torch.autograd.grad(loss_of(lm, ids), [bias])
        found = []
        for sign in (1e-5, -1e-5):
            with torch.no_grad():
                bias += sign * noise(*bias.shape)
                found.append(float(loss_of(lm, ids)))
                bias -= sign * noise(*bias.shape)
    assert float((slope * noise(*bias.shape)).sum()) == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-5)


def test_without_autograd_nothing_is_kept_of_it() -> None:
    t, _ = ran(model("gpt2"), "L0H0", "resid_post0")
    assert not any(t[site].requires_grad for site in ("L0H0", "resid_post0"))


# The formula


NUMBERS = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def edits(draw: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """An edit with everything random, an x, and x' by numpy, row by row."""
    prompts, places, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    x, alpha, beta = rng.normal(size=(prompts, places, d)), draw(NUMBERS), draw(NUMBERS)
    rows = draw(st.sampled_from(["all", "one", "list", "slice", "mask"]))
    mask = np.zeros((prompts, places), bool)
    chosen = sorted(draw(st.sets(st.integers(0, places - 1), min_size=1)))
    if rows == "mask":
        mask = rng.random((prompts, places)) < 0.5
        mask[0, chosen[0]] = True
    else:
        chosen = {"all": list(range(places)), "one": chosen[:1], "slice": list(range(chosen[0], places))}.get(
            rows, chosen
        )
        mask[:, chosen] = True
    sign = draw(st.sampled_from([0, places]))
    at = {"all": None, "one": chosen[0] - sign, "slice": slice(chosen[0] - sign, None), "mask": torch.tensor(mask)}
    each = (prompts, len(chosen), d) if rows in ("one", "list", "slice") else (prompts, places, d)
    shapes = {"number": (), "vector": (d,), "full": (prompts, places, d), "chosen": each, "rows": (prompts, places)}
    source = rng.normal(size=shapes[draw(st.sampled_from(["number", "vector", "full", "chosen"]))])
    gain = rng.normal(size=shapes[draw(st.sampled_from(["number", "vector", "full", "chosen", "rows"]))])
    basis = rng.normal(size=(draw(st.integers(1, d)), d)) if draw(st.booleans()) else None

    def full(value: np.ndarray) -> np.ndarray:
        if value.shape == (prompts, places):
            return np.broadcast_to(value[..., None], x.shape)
        if value.shape in ((), (d,)) or value.shape == x.shape:
            return np.broadcast_to(value, x.shape)
        spread = np.zeros_like(x)
        spread[:, chosen] = value
        return spread

    truth = x.copy()
    for prompt, place_ in zip(*np.nonzero(mask), strict=True):
        inside = alpha * full(source)[prompt, place_] + beta * x[prompt, place_]
        if basis is not None:
            inside = basis.T @ np.linalg.solve(basis @ basis.T, basis @ inside)
        truth[prompt, place_] += full(gain)[prompt, place_] * inside
    tensor = torch.from_numpy
    settings = {
        "source": tensor(source) if source.shape else float(source),
        "alpha": alpha,
        "beta": beta,
        "basis": None if basis is None else tensor(basis),
        "gain": tensor(gain) if gain.shape else float(gain),
        "at": at.get(rows, chosen),
    }
    return settings, x, truth


@given(edits(), st.data())
def test_an_edit_is_its_formula(drawn: tuple[dict[str, Any], np.ndarray, np.ndarray], data: st.DataObject) -> None:
    settings, x, truth = drawn
    edit, total = Edit("L0H0", **settings), x.shape[1]
    past = data.draw(st.integers(0, total - 1))  # positions that a cache holds
    new = Pending(edit, parse_site(edit.site)).of(torch.from_numpy(x[:, past:]), total)
    np.testing.assert_allclose(new.numpy(), truth[:, past:], rtol=1e-6, atol=1e-6)


def test_the_verbs_are_their_numbers() -> None:
    x, v = noise(2, 3, 4), noise(4, seed=1)
    of: Callable[[Edit], Tensor] = lambda edit: Pending(edit, parse_site("L0H0")).of(x, 3)  # noqa: E731
    unit = v / v.norm()
    assert torch.equal(of(Edit.set("L0H0", v)), v.expand(2, 3, 4))
    assert torch.equal(of(Edit.set("L0H0", 0)), torch.zeros(2, 3, 4).double())
    assert torch.equal(of(Edit.add("L0H0", v)), x + v)
    assert torch.equal(of(Edit.scale("L0H0", 3)), 3 * x)
    torch.testing.assert_close(of(Edit.project_out("L0H0", v)), x - (x @ unit)[..., None] * unit)
    torch.testing.assert_close(of(Edit.set("L0H0", 0, basis=v)), x - (x @ unit)[..., None] * unit)
    torch.testing.assert_close(of(Edit.set("L0H0", v, gain=0.25)), 0.75 * x + 0.25 * v)


def test_half_precision_is_rounded_once() -> None:
    x = noise(2, 3, 4).bfloat16()
    new = Pending(Edit.add("L0H0", 0.7, gain=1 / 3), parse_site("L0H0")).of(x, 3)
    assert torch.equal(new, (x.float() + 0.7 / 3).bfloat16())
    new = Pending(Edit.scale("L0H0", 1 / 3, gain=torch.tensor(0.3)), parse_site("L0H0")).of(x, 3)
    assert torch.equal(new, (x.float() * (1 + torch.tensor(0.3) * (1 / 3 - 1))).bfloat16())


def test_a_mask_is_about_the_text_that_it_was_made_for() -> None:
    mask = torch.tensor([[True, False, True]])
    pending = Pending(Edit.set("L0H0", 0.0, at=mask), parse_site("L0H0"))
    for length in (3, 4, 5):  # generation without a cache
        new = pending.of(torch.ones(1, length, 2), length)
        assert new[0, :, 0].tolist() == [0, 1, 0, *[1] * (length - 3)]
    assert torch.equal(pending.of(torch.ones(1, 1, 2), 6), torch.ones(1, 1, 2))


def test_what_is_replaced_may_be_infinite() -> None:
    x = torch.full((1, 2, 3), torch.inf)
    assert torch.equal(Pending(Edit.set("L0H0", 2.0), parse_site("L0H0")).of(x, 2), torch.full((1, 2, 3), 2.0))


def test_edits_of_one_site_are_applied_in_order_and_patched_in_from_another_prompt() -> None:
    lm = model("llama")
    other, _ = ran(lm, "resid_post0", ids=ids_of(lm, seed=9))
    steps = [
        Edit.set("resid_post0", other["resid_post0"]),
        Edit.scale("resid_post0", 2.0),
        Edit.add("resid_post0", 1.0),
    ]
    t, _ = ran(lm, "resid_post0", edits=steps)
    close(t["resid_post0"], 2 * other["resid_post0"] + 1, lm)
    patched = ran(lm, edits=steps[0])[1]
    close(patched, ran(lm, ids=ids_of(lm, seed=9))[1], lm)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite", "bloom"])
def test_sites_are_edited_in_the_order_of_the_pass_and_recorded_after_it(kind: str) -> None:
    lm, value = model(kind, "raw"), noise(2, 7, model(kind).d_model)
    clean, _ = ran(lm, "resid_mid0", "L0H1")
    steps = [Edit.add("resid_mid0", value), Edit.scale("resid_mid0", 2.0), Edit.set("L0H1", 0.0)]
    t, _ = ran(lm, "resid_mid0", "L0H0", "L0H1", edits=steps)
    close(t["resid_mid0"], 2 * (clean["resid_mid0"] - clean["L0H1"] + value), lm)
    assert not t["L0H1"].any()
    t, _ = ran(lm, "L1H0.v", "L1.v_input", edits=[Edit.scale("L1H0.v", 0.0), Edit.add("L1.v_input", value)])
    assert not t["L1H0.v"].any()


# Passes with a cache


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama", "mistral", "gemma2", "gpt_neo", "falcon", "falcon alibi", "bloom", "gptj", "opt"]
)
@pytest.mark.parametrize("site", ["resid_post0", "L0H0", "L0H1.z", "L0KV0.v", "L0KV0.k", "L1.v_input", "embed"])
def test_positions_are_those_of_the_text_also_where_a_pass_brings_only_the_newest(kind: str, site: str) -> None:
    lm = model(kind)
    if not has(lm, site):
        return
    ids, width = ids_of(lm), lm.head_dim if "." in site and site != "L1.v_input" else lm.d_model
    value = noise(2, 3, width)
    edit = Edit.add(site, value, at=[1, 4, 6])
    whole = ran(lm, edits=edit)[1]
    with torch.no_grad(), uw.trace(lm, site, edits=edit) as t:
        cache, found = DynamicCache(config=lm.config), []
        for start, stop in ((0, 4), (4, 6), (6, 7)):
            out = lm.hf(ids[:, start:stop], **keeping(lm.hf, cache))
            found.append(out.logits)
            if start == 4:
                recorded = t[site].shape[1]
    close(torch.cat(found, 1), whole, lm, eager=True)
    assert recorded in (2, 5, 6)  # new positions; keys that a window of 4 lets attention see; all keys


def test_generation_is_edited_at_its_newest_position() -> None:
    lm = model("gpt2")
    ids = ids_of(lm)[:, :4]
    logits = torch.zeros(lm.vocabulary).double()
    logits[7] = 100.0
    last = f"resid_post{len(lm.layers) - 1}"
    target = lm.hf.get_output_embeddings().weight.detach()[7]
    with uw.trace(lm, edits=Edit.add(last, target * 1e4, at=-1)):
        said = lm.hf.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    own = lm.hf.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    assert len(set(said[:, 4:].flatten().tolist())) == 1
    assert not torch.equal(said, own)
    with uw.trace(lm, edits=Edit.set("L0H0", noise(2, 4, lm.d_model), at=slice(0, 4))):
        lm.hf.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "mistral", "falcon alibi", "gptj"])
def test_generation_with_attention_open_says_the_same(kind: str) -> None:
    lm = unchecked(build(kind, dtype=torch.float32))
    ids, mask = ids_of(lm), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    own = lm.hf.generate(ids, **settings)
    with uw.trace(lm, "L0H0.pattern", "L0H0.v", "L1H1", "L1.v_input", edits=Edit.scale("L0H1.v", 1.0)) as t:
        said = lm.hf.generate(ids, **settings)
    assert torch.equal(said, own)
    assert t["L0H0.pattern"].shape[:2] == t["L1H1"].shape[:2] == (2, 1)
    close(t["L0H0.pattern"].sum(-1), torch.ones(2, 1), lm, eager=True)


def test_padding_in_float64_is_no_nan() -> None:
    lm, mask = model("llama"), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        own = lm.hf(ids_of(lm), attention_mask=mask).logits
        with uw.trace(lm, "L0H0.pattern") as t:
            logits = lm.hf(ids_of(lm), attention_mask=mask).logits
    close(logits[mask.bool()], own[mask.bool()], lm)
    assert t["L0H0.pattern"].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_without_a_trace(kind: str) -> None:
    # In float64 the eager attention of transformers itself gives NaN where a text begins with padding.
    lm, mask = unchecked(build(kind, dtype=torch.float32)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    sites = [site for site in editable(lm) if site.layer < 1 and site.head < 1]
    with torch.no_grad():
        own = lm.hf(ids_of(lm), attention_mask=mask).logits
        with uw.trace(lm, *sites) as t:
            logits = lm.hf(ids_of(lm), attention_mask=mask).logits
    shown = mask.bool()
    torch.testing.assert_close(logits[shown], own[shown], rtol=1e-4, atol=1e-4)
    if "L0H0.pattern" in map(str, sites):
        assert float(t["L0H0.pattern"][1, 3:, :3].abs().max()) < 1e-12


# Names and errors


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_prints_as_it_is_read(kind: str) -> None:
    lm = model(kind)
    for site in sites_of(lm):
        assert parse_site(str(site)) == parse_site(site) == site
    assert list(sites_of(lm)[: len(lm.parts)]) == [parse_site(name) for name in lm.nodes]


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("L2H3.out", "L2H3"),
        ("MLP2.out", "MLP2"),
        ("(2, 3)", "L2H3"),
        (Node("head", 2, 3), "L2H3"),
        ((2, 3), "L2H3"),
        ("L2.bias", "L2.bias"),
        ("embed.out", "embed"),
        ("resid_pre2", "resid_post1"),
        ("resid_pre0", "resid_pre0"),
        ("blocks.2.hook_resid_mid", "resid_mid2"),
        ("blocks.2.hook_mlp_out", "MLP2"),
        ("blocks.2.mlp.hook_post", "MLP2.act"),
        ("L2KV1.k", "L2KV1.k"),
        ("L2H3.pattern", "L2H3.pattern"),
        ("L2.v_input", "L2.v_input"),
    ],
)
def test_a_site_has_one_printed_name(name: object, printed: str) -> None:
    assert str(parse_site(name)) == printed


@pytest.mark.parametrize(
    "name", ["L2H3.w", "L2.w", "MLP2.z", "L2KV1.q", "L2KV1", "resid_mod", "", "out", "resid_mid2.out", 3]
)
def test_what_is_no_site_is_refused(name: object) -> None:
    with pytest.raises(NodeError, match="not a site"):
        parse_site(name)


@pytest.mark.promise("errors")
def test_a_misspelt_site_is_refused_with_the_nearest() -> None:
    with pytest.raises(NodeError, match=r"not a site.*Got: 'L0H0\.zz'.*nearest: L0H0\.z"):
        ran(model("gpt2"), "L0H0.zz")


REFUSED = [
    ("gpt2", "L9H0.z", "a layer from 0 to"),
    ("gpt2", "L0H9.z", "a head from 0 to"),
    ("gpt2", "L0KV9.k", "a head from 0 to"),
    ("gpt2", "MLP9", "nodes from embed"),
    ("llama", "pos_embed", "nodes from embed"),
    ("llama", "resid_post9", "a layer from 0 to"),
    ("phi", "resid_mid0", "its blocks are parallel"),
    ("mixtral", "MLP0.act", "mixture of experts"),
    ("falcon eager", "L0H0.q", "turned inside"),
    ("falcon eager", "L0KV0.k", "turned inside"),
]


@pytest.mark.parametrize(("kind", "name", "why"), REFUSED)
def test_a_site_that_the_model_does_not_have_is_refused_with_the_nearest(kind: str, name: str, why: str) -> None:
    lm = model(kind)
    for refused in ({"sites": (name,)}, {"edits": Edit.scale(name, 0.0)}):
        with pytest.raises(NodeError, match=rf"has no site {name}.*{why}.*nearest: ") as error:
            ran(lm, *refused.get("sites", ()), edits=refused.get("edits", ()))
        near = str(error.value).partition("nearest: ")[2].rstrip(".").split(", ")
        assert [other for other in near if has(lm, other)] == near != []


@pytest.mark.parametrize(
    ("kind", "name", "fix"), [("falcon eager", "L0H0.pattern", ""), ("falcon eager", "L0H1.v", "L0KV0.v")]
)
def test_a_site_that_can_only_be_read_is_not_edited(kind: str, name: str, fix: str) -> None:
    lm = model(kind)
    assert ran(lm, name)[0][name].shape[:2] == (2, 7)
    with pytest.raises(NodeError, match=f"can be read and not edited.*{fix}"):
        ran(lm, edits=Edit.scale(name, 0.0))


WRONG: list[tuple[Callable[[], Edit], str]] = [
    (lambda: Edit.set("L0H0.z", noise(2, 6, 4)), "another prompt"),
    (lambda: Edit.set("L0H0.z", noise(1, 7, 4)), "another shape"),
    (lambda: Edit.set("L0H0.z", noise(7, 4)), "another shape"),
    (lambda: Edit.set("L0H0.z", noise(2, 7, 1)), "another shape"),
    (
        lambda: Edit.set("L0H0.z", noise(2, 1, 4), at=[1, 2]),
        r"Expected: a number or \[4\] or \[2, 7, 4\] or \[2, 2, 4\]",
    ),
    (lambda: Edit.set("L0H0.z", noise(7)), "another shape"),
    (lambda: Edit.set("L0H0.z", noise(2, 4), at=[1]), "another shape"),
    (lambda: Edit.set("L0H0.z", noise(2, 7), at=1), "another shape"),
    (lambda: Edit.add("L0H0.z", 1.0, gain=noise(7, 2)), r"the gain of .*\[2, 7\]"),
    (lambda: Edit.project_out("L0H0.z", noise(5)), "another width"),
    (
        lambda: Edit.scale("L0H0.z", 0.0, at=torch.ones(2, 6, dtype=torch.bool)),
        r"mask .* another shape.*\[2, 6\].*\[2, 7\]",
    ),
    (lambda: Edit.scale("L0H0.z", 0.0, at=torch.ones(2, 8, dtype=torch.bool)), "mask"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=torch.ones(1, 7, dtype=torch.bool)), "mask"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=[2, 1]), "increasing order"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=[6, -1]), "increasing order"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=9), "touched nothing.*at=9"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=-8), "touched nothing"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=slice(7, None)), "touched nothing"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=[1, 7, 9]), r"did not touch all.*\[7, 9\]"),
    (lambda: Edit("L0H0.z", alpha=1.0), "no source"),
    (lambda: Edit.scale("L0H0.y", 0.0), "not a site"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=[]), "chooses no rows"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=torch.zeros(2, 7, dtype=torch.bool)), "chooses no rows"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=torch.tensor([1.0, 2.0])), "chooses no rows"),
    (lambda: Edit.scale("L0H0.z", 0.0, at=slice(5, 2, -1)), "chooses no rows"),
    (lambda: Edit.project_out("L0H0.z", torch.zeros(4)), "depend on each other"),
    (lambda: Edit.project_out("L0H0.z", torch.ones(2, 4)), "depend on each other"),
    (lambda: Edit.project_out("L0H0.z", noise(5, 4)), "not a basis"),
    (lambda: Edit.project_out("L0H0.z", torch.ones(4, dtype=torch.long)), "not a basis"),
]


@pytest.mark.promise("errors")
@pytest.mark.parametrize(("make", "message"), WRONG, ids=map(str, range(len(WRONG))))
def test_an_edit_that_cannot_be_honoured_is_an_error(make: Callable[[], Edit], message: str) -> None:
    lm = unchecked(tiny.model("gpt2", 0, num_attention_heads=4, hidden_size=16))
    with pytest.raises(NodeError, match=message):
        ran(lm, edits=make())


def _left_out(lm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass goes by the second block."""
    monkeypatch.setattr(lm.layers[1].block, "forward", lambda x, *_, **__: x)


@pytest.mark.promise("errors")
def test_an_edit_that_no_pass_reached_is_an_error_unless_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    with pytest.raises(NodeError, match="touched nothing"), uw.trace(lm, edits=Edit.set("L0H0", 0.0)):
        pass
    with pytest.raises(ZeroDivisionError), uw.trace(lm, edits=Edit.set("L0H0", 0.0)):
        raise ZeroDivisionError
    _left_out(lm, monkeypatch)
    with pytest.raises(NodeError, match="edit of MLP1 touched nothing"), uw.trace(lm, edits=Edit.set("MLP1", 0.0)):
        lm.hf(ids_of(lm))


def test_what_was_not_asked_for_or_not_reached_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2", "raw")
    _left_out(lm, monkeypatch)
    with uw.trace(lm, "L0H0.z", "embed", "MLP1") as t:
        with pytest.raises(NodeError, match="no forward pass has run"):
            t["L0H0.z"]
        embedded = lm.hf.get_input_embeddings()(ids_of(lm))
        with pytest.raises(NodeError, match="no forward pass has run"):
            t["embed"]
        lm.hf(inputs_embeds=embedded)
        assert torch.equal(t["embed"], embedded)
        with pytest.raises(NodeError, match="did not reach it"):
            t["MLP1"]
    assert t["L0H0.z"].shape == (2, 7, lm.head_dim)
    with pytest.raises(NodeError, match=r"L0H1\.z was not asked for.*nearest: L0H0\.z"):
        t["L0H1.z"]


def test_the_latest_pass_is_what_is_read_and_a_failed_one_leaves_nothing_of_the_one_before() -> None:
    lm = model("llama")
    with torch.no_grad(), uw.trace(lm, "resid_post0") as t:
        lm.hf(ids_of(lm))
        lm.decoder(ids_of(lm, length=3))
        assert t["resid_post0"].shape[1] == 3
        handle = lm.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.hf(ids_of(lm))
        handle.remove()
        with pytest.raises(NodeError, match="did not reach"):
            t["resid_post0"]


def test_dropout_and_checkpointing_make_writes_untrue_and_are_refused() -> None:
    hf = tiny.model("gpt2", 0)
    hf.config.resid_pdrop = 0.1
    lm = unchecked(hf)
    hf.train()
    for site in ("L0H0", "MLP0", "embed", "resid_mid0", "L0.bias"):
        with pytest.raises(ModelError, match=f"dropout lies between what is written at {site}"):
            ran(lm, site)
    assert ran(lm, "L0H0.z", "resid_post0")[0]["L0H0.z"].isfinite().all()
    hf.config.resid_pdrop = 0.0
    assert ran(lm, "L0H0")[0]["L0H0"].isfinite().all()
    lm.layers[0].block.gradient_checkpointing = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="gradient checkpointing"), uw.trace(lm, "L0H0.z"):
        lm.hf(ids_of(lm))


def test_a_module_that_runs_twice_has_no_one_value() -> None:
    lm = model("gpt2")
    with pytest.raises(ModelError, match="shows embed ran twice"), uw.trace(lm, "embed"):
        lm.hf(ids_of(lm), token_type_ids=ids_of(lm))


def test_one_model_is_traced_once_and_two_models_at_once() -> None:
    hf = build("llama")
    one, other, same = unchecked(hf), unchecked(build("llama", 1)), unchecked(hf, "raw")
    with uw.trace(one, "L0H0.pattern"):
        for again in (one, same):
            with pytest.raises(ModelError, match="traced already"), uw.trace(again, "L0H0.z"):
                pass
        with pytest.raises(ModelError, match="already opened"), patterns(one):
            pass
    before = [snapshot(lm.hf) for lm in (one, other)]
    traces = [uw.trace(lm, "L0H0.pattern", "L0H0") for lm in (one, other)]
    opened = [trace.__enter__() for trace in traces]
    with torch.no_grad():
        for lm in (one, other):
            lm.hf(ids_of(lm))
    for trace, t, lm in zip(traces, opened, (one, other), strict=True):
        trace.__exit__(None, None, None)
        assert torch.equal(t["L0H0"], ran(lm, "L0H0", "L0H0.pattern")[0]["L0H0"])
    assert [snapshot(lm.hf) for lm in (one, other)] == before


# Nothing is left behind


def everything(lm: Model) -> dict[str, Any]:
    """Every kind of site."""
    sites = [site for site in editable(lm) if site.head < 1]
    return {"sites": sites, "edits": [Edit.scale(site, 0.9) for site in sites]}


def succeeds(lm: Model) -> None:
    what = everything(lm)
    with uw.trace(lm, *what["sites"], edits=what["edits"]):
        lm.hf(ids_of(lm)).logits.sum().backward()
    lm.hf.zero_grad()


def fails(lm: Model) -> None:
    what = everything(lm)

    def broken(*_: Any) -> None:
        raise RuntimeError("planted failure")

    handle = lm.layers[1].out_proj.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="planted"), uw.trace(lm, *what["sites"], edits=what["edits"]):
        lm.hf(ids_of(lm))
    handle.remove()


def is_interrupted(lm: Model) -> None:
    what = everything(lm)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = lm.layers[1].out_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), uw.trace(lm, *what["sites"], edits=what["edits"]):
        lm.hf(ids_of(lm))
    handle.remove()


def steps(lm: Model) -> Iterator[Tensor]:
    what = everything(lm)
    with torch.no_grad(), uw.trace(lm, *what["sites"], edits=what["edits"]) as t:
        while True:
            lm.hf(ids_of(lm))
            yield t["resid_post0"]


def is_abandoned(lm: Model) -> None:
    generator = steps(lm)
    next(generator)
    del generator


def is_closed(lm: Model) -> None:
    generator = steps(lm)
    next(generator)
    generator.close()  # pyright: ignore[reportAttributeAccessIssue]


def touches_nothing(lm: Model) -> None:
    with pytest.raises(NodeError), uw.trace(lm, edits=[*everything(lm)["edits"], Edit.scale("L0H0.z", 0.0, at=99)]):
        lm.hf(ids_of(lm))


def is_refused(lm: Model) -> None:
    with pytest.raises(NodeError), uw.trace(lm, "L0H0.pattern", edits=Edit.set("L0H0.q", noise(3))):
        lm.hf(ids_of(lm))


def is_never_entered(lm: Model) -> None:
    opened = uw.trace(lm, "L0H0.pattern", "L0H0")
    opened.__enter__()
    del opened


ENDS = (succeeds, fails, is_interrupted, is_abandoned, is_closed, touches_nothing, is_refused, is_never_entered)


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "falcon", "falcon alibi eager", "gptj"])
def test_the_model_is_bit_for_bit_what_it_was(kind: str) -> None:
    hf = build(kind)
    lm = unchecked(hf)
    lm.layers[0].block.train()
    lm.layers[1].block.register_forward_hook(lambda module, args, output: None)
    lm.layers[1].attention.forward = lm.layers[1].attention.forward  # as accelerate leaves it
    next(hf.parameters()).requires_grad_(False)
    before = snapshot(hf)
    for end in ENDS:
        if kind == "falcon alibi eager" and end is is_refused:
            continue
        end(lm)
        assert snapshot(hf) == before, end.__name__


def test_a_trace_is_open_as_long_as_its_generator_lives() -> None:
    lm = unchecked(build("llama"))
    before = snapshot(lm.hf)
    generator = steps(lm)
    next(generator)
    assert snapshot(lm.hf) != before
    with pytest.raises(ModelError, match="traced already"), uw.trace(lm):
        pass
    del generator
    assert snapshot(lm.hf) == before


def test_only_the_hooks_that_are_needed_are_there() -> None:
    lm = unchecked(build("llama"))
    count: Callable[[], int] = lambda: sum(  # noqa: E731
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.hf.modules()
    )
    with uw.trace(lm, *(f"L0H{h}.z" for h in range(lm.n_heads))):
        assert count() == 3
        assert lm.config._attn_implementation == "sdpa"
    with uw.trace(lm, "L0H0.q"):
        assert count() == 2
        assert lm.config._attn_implementation != "sdpa"


def test_a_pass_that_is_given_states_of_an_encoder_is_refused() -> None:
    lm = view(tiny.model("gpt2", 0, add_cross_attention=True))
    ids = ids_of(lm)
    states = torch.randn(len(ids), 4, lm.d_model)
    with uw.trace(lm, "L1H0"):
        lm.hf(input_ids=ids)
        with pytest.raises(ModelError, match=r"because of an encoder is no node's\. Got: encoder_hidden_states"):
            lm.hf(input_ids=ids, encoder_hidden_states=states)
