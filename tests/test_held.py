"""Are values right that take two steps, pass a gate or a norm of heads, or share their softmax with a sink?

The truth is Euler's theorem on the user's own model, in float64 and by plain hooks: with patterns, gates and the scales
of norms held, what a head hands to the out-projection is linear in the stream and in biases, so that slopes times these
add up to it. Nothing of the library is used for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import every
import unwrite as uw
from patching import contrasts
from test_discover import unknown
from test_families import some_ids, written
from test_saturation import brute_force
from twin import Truth
from unwrite.errors import ModelError, NodeError
from unwrite.model import identities, values
from unwrite.model.attention import Scored, eager_of, patterns
from unwrite.model.cache import empty, keeping
from unwrite.model.certificate import certify
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.values import through_values
from unwrite.model.view import Model
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.saturation import of_keys, of_queries
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay import clean as replay
from unwrite.run.replay import edited

# By what is new in them; the first of each has no norm behind its attention.
STEPS, GATED, SINKS = ("deepseek_v3", "minicpm3"), ("bitnet", "afmoe"), ("gpt_oss", "granite_swa")
KINDS = (*STEPS, *GATED, *SINKS)
ONE_OF_EACH = ("deepseek_v3", "bitnet", "gpt_oss")
LAYER = 1
# Norms and softmaxes of these are float32 whatever the model is.
FLOAT32_INSIDE = 1e-6
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def weights(kind: str) -> Any:
    return unknown(kind, 1, torch.float64)


@cache
def model(kind: str) -> Model:
    return view(weights(kind))


def close(got: Tensor, want: Tensor, tolerance: float = FLOAT32_INSIDE) -> None:
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    assert float(want.norm()) > 1e-3


# The truth.


@contextmanager
def by_plain_hooks(hf: Any, *, hold: bool) -> Iterator[None]:
    """Inside the `with`, with `hold`, patterns, gates and the scales of all norms inside of blocks are constants."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **settings: Any) -> Any:
        return eager_of(module)(module, query.detach(), key.detach(), *rest, **settings)

    def normed(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        x: Tensor = args[0]
        eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
        made = norm.weight * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach())
        torch.testing.assert_close(made, output, rtol=1e-5, atol=1e-5)
        return made

    with ExitStack() as stack:
        AttentionInterface.register("held", attend)
        AttentionMaskInterface.register("held", eager_mask)
        before, hf.config._attn_implementation = hf.config._attn_implementation, "held" if hold else "eager"
        stack.callback(setattr, hf.config, "_attn_implementation", before)
        for name, module in hf.model.layers.named_modules() if hold else ():
            if "Norm" in type(module).__name__:
                stack.callback(module.register_forward_hook(normed).remove)
            if name.endswith("self_attn.gate_proj"):
                stack.callback(module.register_forward_hook(lambda _, __, output: output.detach()).remove)
        yield


@contextmanager
def heads_of(hf: Any, ids: Tensor, hold: bool = True) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """What the block of LAYER reads, what its heads hand over [prompt, query, head, d_head], and biases before that."""
    block, seen = hf.model.layers[LAYER], {}

    def leaf(_: nn.Module, args: Any) -> Any:
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(by_plain_hooks(hf, hold=hold))
        stack.callback(block.register_forward_pre_hook(leaf).remove)
        keep = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        stack.callback(keep.remove)
        hf(input_ids=ids, use_cache=False)
        inside = block.self_attn.named_parameters()
        biases = [part for name, part in inside if name.endswith(".bias") and "o_proj" not in name]
        yield seen["x"], seen["z"].unflatten(-1, (hf.config.num_attention_heads, -1)), biases


def slopes(z: Tensor, head: int, parts: list[Tensor], along: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((z[:, :, head] * along).sum(), parts, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(part) if slope is None else slope for part, slope in zip(parts, found, strict=True)]


def off(hf: Any, hold: bool) -> float:
    """How far slopes times stream and biases are from what a head hands over: the worst of the heads."""
    worst = 0.0
    with heads_of(hf, some_ids(hf), hold) as (x, z, biases):
        along = torch.randn(z[:, :, 0].shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        for head in range(z.shape[2]):
            parts = [x, *biases]
            got = sum((slope * part).sum() for slope, part in zip(slopes(z, head, parts, along), parts, strict=True))
            worst = max(
                worst, float((got - (z[:, :, head] * along).sum()).detach().abs() / z[:, :, head].detach().norm())
            )
    return worst


def carried_by_hand(hf: Any, ids: Tensor, vector: Tensor) -> Tensor:
    """What heads hand over because `vector` is in the stream that they read: the held network's own slope along it."""
    with heads_of(hf, ids) as (x, z, _):
        dummy = torch.zeros_like(z, requires_grad=True)
        (back,) = torch.autograd.grad(z, x, dummy, create_graph=True)
        return torch.autograd.grad(back, dummy, vector)[0]


@every_kind
def test_the_truth_adds_up_where_all_is_held_and_not_where_nothing_is(kind: str) -> None:
    assert off(weights(kind), hold=True) < 1e-12
    assert off(weights(kind), hold=False) > 1e-3


# Values.


def run_of(lm: Model, ids: Tensor) -> replay.Clean:
    return replay.clean(lm, ids, fold(lm), with_patterns=True)


@pytest.mark.promise("exact")
@every_kind
def test_what_values_carry_is_the_slope_of_the_held_network(kind: str) -> None:
    lm, hf, ids = model(kind), weights(kind), some_ids(weights(kind))
    vector = torch.randn(*ids.shape, lm.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    run, layer = run_of(lm, ids), lm.layers[LAYER]
    want = carried_by_hand(hf, ids, vector)
    scale, gate = run.scale(layer), run.patterns.gate.get(LAYER)
    assert (gate is None) == (kind not in GATED)
    close(through_values(lm, layer, run.patterns[LAYER], vector, scale, gate), want)
    if gate is not None:  # the control: left out, it is another number
        assert (through_values(lm, layer, run.patterns[LAYER], vector, scale) - want).norm() > 0.1 * want.norm()


@pytest.mark.promise("exact")
@pytest.mark.parametrize("kind", STEPS)
def test_without_the_scale_between_two_steps_no_identity_of_values_holds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(kind)
    assert certify(lm)["values"] < FLOAT32_INSIDE
    scale = values.latent_scale
    monkeypatch.setattr(values, "latent_scale", lambda *asked: torch.ones_like(scale(*asked)))
    assert certify(lm)["values"] > 1e-2


@pytest.mark.promise("exact")
@pytest.mark.parametrize(
    ("kind", "broken"),
    [("bitnet", "gate"), ("afmoe", "gate"), *((kind, "of_biases") for kind in ("deepseek_v3", "gpt_oss", "bitnet"))],
)
def test_without_gates_or_what_biases_leave_in_heads_the_certificate_fails(
    kind: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(kind)
    assert certify(lm)["values"] < FLOAT32_INSIDE
    if broken == "gate":
        own = identities._head_error
        forget: Callable[..., float] = lambda lm, layer, stream, found, *rest: own(  # noqa: E731
            lm, layer, stream, replace(found, gate={}), *rest
        )
        monkeypatch.setattr(identities, "_head_error", forget)
    else:
        monkeypatch.setattr(identities, broken, lambda *_: None)
    assert certify(lm)["values"] > 1e-2


def test_gates_are_seen_with_all_their_digits_in_any_mode() -> None:
    hf, ids = weights("afmoe"), some_ids(weights("afmoe"))
    lm, seen = model("afmoe"), {}
    gate = hf.model.layers[LAYER].self_attn.gate_proj
    handle = gate.register_forward_hook(lambda _, __, output: seen.update(gate=output.sigmoid()))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), patterns(lm) as found:
            hf(input_ids=ids, use_cache=False)
        assert torch.equal(found.gate[LAYER].flatten(-2), seen["gate"])
    handle.remove()


def test_rows_of_a_pattern_and_its_sink_make_one() -> None:
    lm, ids = model("gpt_oss"), some_ids(weights("gpt_oss"))
    with uw.trace(lm, "L1H2.pattern", "L1H2.q", "L1KV1.k", "L1H2.v", "L1H2.z") as seen, torch.no_grad():
        lm.hf(ids)
    scores = seen["L1H2.q"] @ seen["L1KV1.k"].mT * lm.layers[1].attention.scaling
    visible = torch.ones(7, 7).tril().bool() & ~torch.ones(7, 7).tril(-4).bool()
    if lm.layers[1].attention.sliding_window is None:
        visible = torch.ones(7, 7).tril().bool()
    weighed = scores.exp() * visible
    want = weighed / (weighed.sum(-1, keepdim=True) + lm.layers[1].attention.sinks[2].exp())
    torch.testing.assert_close(seen["L1H2.pattern"], want)
    assert (seen["L1H2.pattern"].sum(-1) < 0.97).all()
    torch.testing.assert_close(seen["L1H2.pattern"] @ seen["L1H2.v"], seen["L1H2.z"])


# Nodes, and what methods make of them.


@pytest.mark.promise("exact")
@every_kind
@pytest.mark.parametrize("convention", ["raw", "paper"])
def test_a_node_writes_what_removing_it_takes_away(kind: str, convention: str) -> None:
    """Under the paper's convention as well: no part of these heads is constant, so none is moved."""
    hf = weights(kind)
    truth = Truth(hf, some_ids(hf))
    got, want = written(view(hf, convention=convention), truth.ids), truth.raw()
    for name, write in want.items():
        if name in got:
            close(got[name], write)
        else:
            assert name.endswith(".bias")
            assert write.abs().max() < 1e-6


@pytest.mark.promise("executed")
@every_kind
def test_values_without_a_write_are_an_executed_run(kind: str) -> None:
    lm, ids = model(kind), some_ids(weights(kind))
    run = run_of(lm, ids)
    write = torch.cat([*run.written(run.record)])[2]
    after = edited.hidden(run, write, [LAYER])
    state = next(state for state in lm.states if state.layer == LAYER)
    predicted = run.carried(LAYER, write).sum(2)
    close(run.record.stream[state] - after.stream[state], predicted)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_verify_reads_through_values_what_the_held_network_does(kind: str) -> None:
    hf, lm = weights(kind), model(kind)
    truth = Truth(hf, some_ids(hf))
    result, writes = uw.verify(lm, truth.ids, "L0H1"), truth.raw()
    write = writes["L0H1"].clone()
    write[:, 0] = 0
    with torch.no_grad():
        z = carried_by_hand(hf, truth.ids, write)
        w_o = hf.model.layers[LAYER].self_attn.o_proj.weight.t().unflatten(0, (lm.n_heads, -1))
        carried = torch.einsum("bthk,hkd->hbtd", z, w_o)[:, :, 1:]
    for head in range(lm.n_heads):
        want = carried[head].pow(2).sum() / writes[f"L{LAYER}H{head}"][:, 1:].pow(2).sum()
        assert float(result["read"].sel(node=f"L{LAYER}H{head}")) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.promise("account")
@every_kind
def test_direct_readings_add_up_to_the_difference(kind: str) -> None:
    lm = model(kind)
    result = uw.dla(lm, some_ids(lm.hf), position=4)
    limit = FLOAT32_INSIDE * (1 + result["direct"].pipe(abs).sum("node"))
    assert (abs(result["direct"].sum("node") + result["constant"] - result["logit_diff"]) <= limit).all()
    assert (abs(result["unexplained"]) <= limit).all()


@every_kind
def test_net_is_the_slope_of_the_network_with_all_but_values_held(kind: str) -> None:
    """By plain hooks: the stream after the first block, carried up through values alone to the last row."""
    hf, lm = weights(kind), model(kind)
    ids, row = some_ids(hf), 5
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    along: Callable[[Tensor], Tensor] = lambda normed: normed[:, row] @ u  # noqa: E731
    found = cotangents(lm, ids, RULES["net"], along)[1]
    want = _net_by_hand(hf, ids, row, u)
    close(found[lm.layers[LAYER].reads], want)
    direct = cotangents(lm, ids, RULES["direct"], along)[1][lm.layers[LAYER].reads]
    assert (want - direct).norm() > 1e-2 * want.norm()


def _net_by_hand(hf: Any, ids: Tensor, row: int, u: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {}

    def leaf(_: nn.Module, args: Any) -> Any:
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    def stopped(_: nn.Module, __: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

    def final(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        scale = (args[0].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt().detach()
        seen["normed"] = norm.weight * args[0] * scale
        return output

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(by_plain_hooks(hf, hold=True))
        hooks = [layer.mlp.register_forward_hook(stopped) for layer in hf.model.layers]
        hooks += [hf.model.layers[LAYER].register_forward_pre_hook(leaf), hf.model.norm.register_forward_hook(final)]
        for hook in hooks:
            stack.callback(hook.remove)
        hf(input_ids=ids, use_cache=False)
        return torch.autograd.grad((seen["normed"][:, row] @ u).sum(), seen["x"])[0]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("nodes", ["shared_v", "heads"])
def test_effects_of_values_and_heads_are_those_of_a_patch_by_trace(kind: str, nodes: str) -> None:
    lm, pairs = model(kind), contrasts((6,))
    base, source = (torch.as_tensor(part.ids) for part in (pairs.base, pairs.source))
    result = uw.effects(lm, pairs, nodes)
    for name in ("L1H1", "L2H3") if nodes == "heads" else ("L1KV1.v", "L2KV0.v"):
        site = f"{name}.z" if nodes == "heads" else name
        with uw.trace(lm, site) as seen, torch.no_grad():
            lm.hf(source)
        there, plain = seen[site].clone(), _difference(lm, base, pairs)
        for position in range(6):
            edit = uw.Edit.set(site, there[:, position : position + 1], at=position)
            with uw.trace(lm, edits=edit):
                patched = _difference(lm, base, pairs)
            got = float(result["effect"].sel(node=name)[0, position])
            assert got == pytest.approx(float(patched - plain), abs=1e-6)


def _difference(lm: Model, ids: Tensor, pairs: Any) -> Tensor:
    with torch.no_grad():
        logits = lm.hf(ids).logits[0, -1]
    return logits[int(pairs.answer[0])] - logits[int(pairs.against[0])]


# Sites.


@every_kind
def test_a_pattern_times_values_times_gates_is_what_a_head_hands_over(kind: str) -> None:
    lm, ids = model(kind), some_ids(weights(kind))
    with uw.trace(lm, "L1H2.pattern", "L1H2.v", "L1H2.z") as seen, torch.no_grad():
        lm.hf(ids)
    with patterns(lm) as found, torch.no_grad():
        lm.hf(ids)
    z = seen["L1H2.pattern"] @ seen["L1H2.v"]
    close(z if kind not in GATED else z * found.gate[1][:, :, 2], seen["L1H2.z"])
    close(found[1][:, 2], seen["L1H2.pattern"])
    assert (seen["L1H2.pattern"].sum(-1) < 1 - 1e-3).all() == (kind in SINKS)


def test_an_edited_pattern_of_scaled_heads_is_used_as_it_is() -> None:
    """GraniteSWA scales what a head gives by what its sink leaves; the pattern that is shown is that after it."""
    lm, ids = model("granite_swa"), some_ids(weights("granite_swa"))
    looks = torch.zeros(2, 7, 7, dtype=torch.float64)
    looks[:, :, 0] = 0.5
    with uw.trace(lm, "L1H2.v", "L1H2.z", edits=uw.Edit.set("L1H2.pattern", looks)) as seen, torch.no_grad():
        lm.hf(ids)
    close(seen["L1H2.z"], (0.5 * seen["L1H2.v"][:, :1]).expand(-1, 7, -1), 1e-12)


@pytest.mark.parametrize("kind", STEPS)
def test_the_input_of_values_is_edited_and_nothing_else_where_they_take_two_steps(kind: str) -> None:
    hf, lm, ids = weights(kind), model(kind), some_ids(weights(kind))
    attention, seen = hf.model.layers[LAYER].self_attn, {}
    other = torch.randn(*ids.shape, lm.d_model, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names = [f"L1H{head}.v" for head in range(lm.n_heads)]
    edit = uw.Edit.set("L1.v_input", other)
    with uw.trace(lm, *names, "L1H0.k", "L1H0.pattern", edits=edit) as after, torch.no_grad():
        hf(ids)
    with uw.trace(lm, "L1H0.k", "L1H0.pattern") as before, torch.no_grad():
        hf(ids)
    for name in ("L1H0.k", "L1H0.pattern"):
        assert torch.equal(before[name], after[name])
    handle = hf.model.layers[LAYER].register_forward_pre_hook(lambda _, args: (other, *args[1:]))
    with torch.no_grad():
        keep = attention.kv_b_proj.register_forward_hook(lambda _, __, output: seen.update(made=output))
        hf(ids, use_cache=False)
    handle.remove()
    keep.remove()
    made = seen["made"].reshape(*ids.shape, lm.n_heads, -1)[..., -lm.head_dim :]
    for head, name in enumerate(names):
        torch.testing.assert_close(after[name], made[:, :, head])


def test_the_input_of_such_values_is_not_edited_over_a_cache() -> None:
    hf, lm, ids = weights("minicpm3"), model("minicpm3"), some_ids(weights("minicpm3"))
    with torch.no_grad():
        cache = empty()
        hf(ids[:, :4], **keeping(hf, cache))
        refused = pytest.raises(NodeError, match=r"L1\.v_input cannot be edited in a pass that goes on from a cache")
        with refused, uw.trace(lm, edits=uw.Edit.set("L1.v_input", 0.0)):
            hf(ids[:, 4:], **keeping(hf, cache))


# Sinks in AtP*, and keys that a scorer chooses.


@pytest.mark.parametrize("kind", GATED)
def test_steps_through_the_softmax_of_gated_heads_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=r"heads of .* are gated or normed.*Next: use method='atp'"):
        uw.effects(model(kind), contrasts((6,)), "q", method="atp*")


@pytest.mark.parametrize("sink", [-2.0, 1.0, 30.0])
def test_a_step_through_a_softmax_with_a_sink_is_exact(sink: float) -> None:
    draw = torch.Generator().manual_seed(6)
    query, key, value, source, slope = (torch.randn(1, 2, 5, 4, generator=draw, dtype=torch.float64) for _ in range(5))
    visible = torch.ones(1, 1, 5, 5).tril().bool()
    sinks = torch.tensor([sink, -sink], dtype=torch.float64)
    call = Scored(query, key, value, visible, 2, lambda q, k: q @ k.mT, sinks)
    worth = nn.functional.pad(slope @ value.mT, (0, 1))
    step = nn.functional.pad(query @ source.mT - query @ key.mT, (0, 1))
    beside = sinks[None, :, None, None].expand(1, 2, 5, 1)
    row = torch.cat([(query @ key.mT).masked_fill(~visible, -torch.inf), beside], -1)
    torch.testing.assert_close(of_keys(call, source, slope), brute_force(row, step, worth)[..., :5].sum(2))
    moved = torch.cat([(source @ key.mT).masked_fill(~visible, -torch.inf), beside], -1)
    want = ((moved.softmax(-1) - row.softmax(-1)) * worth).sum(-1)
    torch.testing.assert_close(of_queries(call, source, slope), want)


def choosing(kind: str, keys: int, **settings: Any) -> Any:
    """A model whose attention looks at so many keys as its scorer chooses."""
    hf = AutoModelForCausalLM.from_config(every.config(kind, index_topk=keys), dtype=torch.float32, **settings).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            every._redraw(parameter, draw)
    return hf


KEYS, LONGER = 9, torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_keys_that_a_scorer_leaves_out_are_left_out_of_open_attention(kind: str, implementation: str) -> None:
    """With more tokens than a scorer chooses of: by a name that these models do not know, they hand over the choice."""
    hf = choosing(kind, KEYS, attn_implementation=implementation)
    lm = view(hf)
    assert lm.certificate.holds("opened")
    with torch.no_grad():
        plain = hf(LONGER).logits
        with uw.trace(lm, "L1H0.q", "L2H1.pattern") as seen:
            torch.testing.assert_close(hf(LONGER).logits, plain, rtol=1e-4, atol=1e-5)
    assert ((seen["L2H1.pattern"] > 0).sum(-1) == torch.arange(1, 13).clamp_max(KEYS)).all()


def test_a_layer_that_is_handed_a_choice_of_another_is_not_run_again_by_itself() -> None:
    """In GLM's some layers look where an earlier one looked: with another stream that would have been elsewhere."""
    lm = view(choosing("glm_moe_dsa", KEYS))
    with pytest.raises(ModelError, match=r"layer 1 of glm_moe_dsa is handed what another layer made.*at most 9"):
        uw.verify(lm, LONGER, "L0H1")
    with pytest.raises(ModelError, match="is handed what another layer made"):
        uw.effects(lm, contrasts((12,)), "heads")
    # Each layer of DeepSeek's chooses by itself, and of few tokens all are chosen.
    for own, ids in ((view(choosing("deepseek_v32", KEYS)), LONGER), (lm, LONGER[:, :KEYS])):
        assert uw.verify(own, ids, "L0H1")["read"].notnull().any()
