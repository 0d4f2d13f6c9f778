"""Are numbers right where blocks have a gain, values a norm or an earlier layer, and a prompt more than one stream?

Gemma 4 has it all. The truth is the user's own model in float64, by plain hooks, one prompt at a time: states, executed
removals, and the slopes of a network in which all but values is held (Euler's theorem: they add up to what heads give).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import every
import unwrite as uw
from executed import hooks
from methods import few_draws
from patching import contrasts, executed
from unwrite.errors import ModelError, NodeError
from unwrite.model import values
from unwrite.model.attention import eager_of
from unwrite.model.certificate import certify
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.nodes import Node, parse_location, parse_node
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay import clean as replay
from unwrite.run.replay import edited
from unwrite.run.replay.removed import Changed, alone, changed, in_order

IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
GAINS = (0.9, 1.3, 0.7, 1.1, 0.8, 1.25)
# Of six layers the last two have values of the third and the fourth, which look at all or at some earlier positions.
OWN, SHARING, SOURCE = 2, 4, 2
# Norms of these are float32 whatever the model is.
FLOAT32_INSIDE = 2e-6


@cache
def weights(**settings: Any) -> Any:
    hf = AutoModelForCausalLM.from_config(every.config("gemma4_text", **settings), dtype=torch.float64).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            every._redraw(parameter, draw)
        for layer, gain in zip(hf.model.layers, GAINS, strict=True):
            layer.layer_scalar.fill_(gain)
    return hf


@cache
def model(**settings: Any) -> Model:
    return view(weights(**settings), convention="raw")


def close(got: Tensor, want: Tensor, tolerance: float = FLOAT32_INSIDE) -> None:
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    assert float(want.norm()) > 1e-6


# The truth.


@torch.no_grad()
def ran(hf: Any, ids: Tensor, *handles: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of prompts, and every state of the stream by its name, in the model's own units."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda _, args, named: seen.update(
            {name: (args[0] if args else named["hidden_states"]).clone()}), with_kwargs=True)  # fmt: skip

    own = [keep("resid_pre0", hf.model.layers[0]), keep(f"resid_post{len(hf.model.layers) - 1}", hf.model.norm)]
    for i, layer in enumerate(hf.model.layers):
        own += [keep(f"resid_post{i - 1}", layer)] if i else []
        own += [
            keep(f"resid_mid{i}", layer.pre_feedforward_layernorm),
            keep(f"resid_mid{i}.1", layer.per_layer_input_gate),
        ]
    with hooks(*own, *handles):
        return hf(input_ids=ids, use_cache=False).logits, seen


def behind(name: str) -> float:
    """The gains that a state is still to pass, by hand."""
    state, layer = re.match(r"resid_(pre|mid|post)(\d+)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(np.prod(GAINS[int(layer) + (state == "post") :]))


def end_of(hf: Any, node: Node) -> nn.Module:
    layer = hf.model.layers[node.layer]
    ends = {"mlp": layer.post_feedforward_layernorm, "beside": layer.post_per_layer_input_norm}
    return ends.get(node.kind, layer.post_attention_layernorm)


def plus(hf: Any, node: Node, change: Tensor) -> Any:
    """A hook by which something more is written, given as it arrives at the end."""
    if node.layer < 0:
        here = change / behind("resid_pre0")
        return hf.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + here, *args[1:]))
    here = change / behind(f"resid_mid{node.layer}")
    return end_of(hf, node).register_forward_hook(lambda *seen: seen[2] + here)


@contextmanager
def held(hf: Any, *, pattern: bool = True, norms: bool = True, of_values: bool = True) -> Iterator[None]:
    """Inside the `with`, patterns and the scales of norms inside of blocks are constants, or some are not."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **settings: Any) -> Any:
        query, key = (query.detach(), key.detach()) if pattern else (query, key)
        return eager_of(module)(module, query, key, *rest, **settings)

    def normed(norm: Any, args: Any, output: Tensor) -> Tensor:
        scale = (args[0].pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
        made = args[0] * scale * (norm.weight if norm.with_scale else 1.0)
        torch.testing.assert_close(made, output, rtol=1e-5, atol=1e-5)
        return made

    with ExitStack() as stack:
        AttentionInterface.register("held", attend)
        AttentionMaskInterface.register("held", eager_mask)
        before, hf.config._attn_implementation = hf.config._attn_implementation, "held"
        stack.callback(setattr, hf.config, "_attn_implementation", before)
        for name, module in hf.model.layers.named_modules():
            if "Norm" in type(module).__name__ and (of_values if name.endswith("v_norm") else norms):
                stack.callback(module.register_forward_hook(normed).remove)
        yield


@contextmanager
def heads_of(hf: Any, layer: int, source: int, **hold: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """What a block reads, and what the heads of a layer hand over [prompt, query, head, d_head] because of it: between
    the two nothing else is written."""
    seen: dict[str, Tensor] = {}

    def leaf(_: nn.Module, args: Any) -> Any:
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(held(hf, **hold))
        blocks = hf.model.layers
        stack.callback(blocks[source].register_forward_pre_hook(leaf).remove)
        keep = blocks[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        stack.callback(keep.remove)
        hf(input_ids=IDS, use_cache=False)
        yield seen["x"], seen["z"].unflatten(-1, (hf.config.num_attention_heads, -1))


def off(layer: int, source: int, **hold: bool) -> float:
    """How far slopes times the stream are from what heads hand over."""
    with heads_of(weights(), layer, source, **hold) as (x, z):
        along = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        (slope,) = torch.autograd.grad((z * along).sum(), x, allow_unused=True)
        got = 0.0 if slope is None else (slope * x).sum()
        return float(torch.as_tensor(got - (z * along).sum()).detach().abs() / z.detach().norm())


def carried_by_hand(layer: int, source: int, vector: Tensor) -> Tensor:
    """What heads hand over because `vector` is in what the source reads: the held network's own slope along it."""
    with heads_of(weights(), layer, source) as (x, z):
        dummy = torch.zeros_like(z, requires_grad=True)
        (back,) = torch.autograd.grad(z, x, dummy, create_graph=True)
        return torch.autograd.grad(back, dummy, vector)[0]


@pytest.mark.parametrize("layer", [OWN, SHARING])
def test_the_truth_adds_up_where_all_is_held_and_not_where_one_part_is_free(layer: int) -> None:
    assert off(layer, SOURCE) < 1e-12
    for part in ("pattern", "norms", "of_values"):
        assert off(layer, SOURCE, **{part: False}) > 1e-3, part


# The certificate.


@pytest.mark.promise("exact")
def test_every_identity_holds() -> None:
    lm = model()
    assert lm.certificate.ok
    assert max(lm.certificate.values()) < 1e-5
    assert [layer.gain for layer in lm.layers] == list(GAINS)
    assert [layer.makes_values.index for layer in lm.layers] == [0, 1, 2, 3, 2, 3]
    assert lm.by_prompt == {"1", "shared_kv_states"}


FALSE: dict[str, tuple[dict[str, Any], str]] = {
    "no gain": ({"gain": lambda config: 1.0}, "locations"),
    "another gain of one block": ({"gain": lambda config: (*GAINS[:3], 1.11, *GAINS[4:])}, "locations"),
    "values without a norm": ({"value_norm": None}, "values"),
    "values of another layer": ({"shared": lambda config: {4: 0, 5: 3}}, "values"),
    "nothing after the MLP": ({"beside": None, "post_beside_norm": None, "late": None}, "stream"),
    "all from one state": ({"late": "pre_feedforward_layernorm"}, "locations"),
}


@pytest.mark.promise("exact")
@pytest.mark.parametrize("name", FALSE)
def test_a_row_without_a_part_is_refused_by_the_identity_of_it(name: str) -> None:
    lm, (change, identity) = model(), FALSE[name]
    false = replace(lm, row=replace(lm.row, **change), certificate=None)
    assert certify(false)[identity] > 1e-3


# States and writes.


@pytest.mark.promise("exact")
def test_states_are_the_models_own_and_nodes_add_up_to_them_times_later_gains() -> None:
    lm = model()
    with torch.no_grad(), uw.trace(lm, *lm.locations, *lm.nodes) as t:
        logits = lm.hf(input_ids=IDS, use_cache=False).logits
    own, states = ran(lm.hf, IDS)
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-12)
    assert {*states} == {*lm.locations}
    nodes = torch.stack([t[name] for name in lm.nodes])
    for location, holds in zip(lm.states, lm.holds(), strict=True):
        torch.testing.assert_close(t[str(location)], states[str(location)], rtol=1e-6, atol=1e-7)
        assert lm.to_end(location) == pytest.approx(behind(str(location)))
        close(nodes[holds].sum(0), states[str(location)] * behind(str(location)))


@pytest.mark.parametrize("site", ["resid_mid1.1", "resid_post2", "resid_mid3", "MLP1", "MLP2.1", "L4H1", "embed"])
def test_an_edit_is_that_of_a_plain_hook(site: str) -> None:
    lm, hf = model(), weights()
    more = torch.randn(3, 7, lm.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad(), uw.trace(lm, edits=uw.Edit.add(site, more)):
        got = hf(input_ids=IDS, use_cache=False).logits
    state = re.fullmatch(r"resid_(mid|post)(\d)(\.1)?", site)
    if state is None:
        want = ran(hf, IDS, plus(hf, parse_node(site), more))[0]
    else:  # added where the last that the state holds is written, in the model's own units
        kind, layer, late = state.groups()
        at = hf.model.layers[int(layer) + (kind == "post")]
        ends = at.post_feedforward_layernorm if late else at.post_attention_layernorm
        hook = (at.register_forward_pre_hook(lambda _, args: (args[0] + more, *args[1:])) if kind == "post"
                else ends.register_forward_hook(lambda *seen: seen[2] + more))  # fmt: skip
        want = ran(hf, IDS, hook)[0]
    close(got, want, 1e-7)
    assert (want - ran(hf, IDS)[0]).norm() > 1e-3


@pytest.mark.promise("executed")
def test_every_changed_write_is_executed_as_a_plain_hook_does_it() -> None:
    """All runs in one batch, of prompts in turn: what a block is given of a prompt is that of the run's own."""
    lm, hf = model(), weights()
    run = replay.clean(lm, IDS, fold(lm))
    nodes = [lm.parts[i] for i in in_order(lm, lm.parts)]
    prompt = torch.arange(len(nodes)) % len(IDS)
    change = torch.stack([-0.5 * run.write(node)[i] for node, i in zip(nodes, prompt, strict=True)])
    states: dict[Any, Tensor] = {}

    def keep(layer: int, n: int, record: Any) -> None:
        states.update({(str(state), i): x[i].clone() for state, x in record.stream.items() for i in range(n)})

    final = changed(run, alone(lm, IDS), Changed(nodes, prompt, change), keep)
    for i, node in enumerate(nodes):
        ids = IDS[prompt[i] : prompt[i] + 1]
        want = ran(hf, ids, plus(hf, node, change[i]))[1]
        close(final[i], want[str(lm.states[-1])][0])
        for (state, at), x in states.items():
            if at == i and state != str(lm.after(node)):
                close(x, want[state][0] * behind(state))
        one = edited.added(run, node, torch.zeros_like(change[:3]).index_copy(0, prompt[i : i + 1], change[i : i + 1]))
        close(one.stream[lm.states[-1]][prompt[i]], final[i])
    assert str(lm.after(Node("mlp", 1))) == "resid_mid1.1"


def test_a_node_that_is_a_module_writes_what_is_missing_without_it() -> None:
    lm, hf = model(), weights()
    run = replay.clean(lm, IDS, fold(lm))
    for node in (Node("mlp", 5), Node("beside", 2), Node("beside", 5)):
        got = ran(hf, IDS, plus(hf, node, -run.write(node)))[0]
        close(got, ran(hf, IDS, end_of(hf, node).register_forward_hook(lambda *seen: torch.zeros_like(seen[2])))[0])


# Values.


@pytest.mark.promise("exact")
@pytest.mark.parametrize("layer", [OWN, SHARING])
def test_what_values_carry_is_the_slope_of_the_held_network(layer: int) -> None:
    lm = model()
    vector = torch.randn(*IDS.shape, lm.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    run = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    own, scale = lm.layers[layer], run.scale(lm.layers[layer])
    want = carried_by_hand(layer, SOURCE, vector / behind(f"resid_mid{SOURCE}"))
    assert scale is not None
    assert scale.shape == (*IDS.shape, own.kv_heads)
    close(values.through_values(lm, own, run.patterns[layer], vector, scale), want)
    flat = scale.mean(-1, keepdim=True).expand_as(scale)  # the control: one scale for all heads is another number
    assert (values.through_values(lm, own, run.patterns[layer], vector, flat) - want).norm() > 1e-2 * want.norm()


@pytest.mark.promise("executed")
@pytest.mark.parametrize("layer", [OWN, SHARING])
def test_values_without_a_write_are_an_executed_run(layer: int) -> None:
    lm = model()
    run = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    write = run.write(Node("mlp", 0))
    after = edited.hidden(run, write, [layer])
    state = next(state for state in lm.states if state.layer == layer and state.state == "mid")
    close(run.record.stream[state] - after.stream[state], run.carried(layer, write).sum(2))


def test_what_is_written_after_the_values_were_made_is_in_none_of_them() -> None:
    lm = model()
    assert lm.carriers(Node("mlp", 1)) == [2, 3, 4, 5]
    assert lm.carriers(Node("head", 2, 0)) == [3, 5]
    assert lm.carriers(Node("mlp", 3)) == []
    with pytest.raises(NodeError, match=r"L4H1 cannot read L2H0 through values.*heads of layers 3, 5"):
        uw.verify(lm, IDS, "L2H0", ["L4H1"])
    with pytest.raises(NodeError, match="there are none"):
        uw.verify(lm, IDS, "MLP3", ["L4H1"])


@pytest.mark.parametrize("writer", ["MLP1", "L2H0"])
def test_verify_follows_a_write_through_values_as_the_held_network_does(writer: str) -> None:
    """By slopes of a network in which MLPs and all but values are held, layer by layer."""
    lm, hf = model(), weights()
    with few_draws():
        found = uw.verify(lm, IDS, writer, skip=0)
    run = replay.clean(lm, IDS, fold(lm))
    write = run.write(parse_node(writer))
    seen: dict[str, Tensor] = {}

    def leaf(_: nn.Module, args: Any) -> Any:
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    start = int(writer[3] if writer[0] == "M" else writer[1]) + 1
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(held(hf))
        for layer in hf.model.layers:
            for end in (layer.post_feedforward_layernorm, layer.post_per_layer_input_norm):
                stack.callback(end.register_forward_hook(lambda *seen: seen[2].detach()).remove)
        stack.callback(hf.model.layers[start].register_forward_pre_hook(leaf).remove)
        keep = hf.model.norm.register_forward_pre_hook(lambda _, args: seen.update(end=args[0]))
        stack.callback(keep.remove)
        hf(input_ids=IDS, use_cache=False)
        dummy = torch.zeros_like(seen["end"], requires_grad=True)
        (back,) = torch.autograd.grad(seen["end"], seen["x"], dummy, create_graph=True)
        (moved,) = torch.autograd.grad(back, dummy, write / behind(f"resid_post{start - 1}"))
    want = float((moved * write).sum() / write.square().sum())
    got = float(found["v_survival"].sel(location="resid_post5"))
    assert got == pytest.approx(want, rel=1e-5)
    assert abs(got - 1) > 1e-4
    heads = lambda layer: [f"L{layer}H{head}" for head in range(4)]  # noqa: E731
    assert bool((found["v_share"].sel(node=heads(4)) == 0).all()) == (start > SOURCE)
    assert bool((found["v_share"].sel(node=heads(5)) != 0).any())
    assert bool((found["acts"].sel(node=heads(4)) != 0).any())


def test_the_input_of_values_is_that_of_all_who_share_them() -> None:
    lm, hf = model(), weights()
    other = torch.randn(*IDS.shape, lm.d_model, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names = [f"L{SOURCE}H1.v", f"L{SOURCE}H1.k", f"L{SHARING}H1.v", f"L{SHARING}H1.k"]
    with torch.no_grad():
        with uw.trace(lm, *names) as before:
            hf(input_ids=IDS, use_cache=False)
        with uw.trace(lm, *names, edits=uw.Edit.set(f"L{SOURCE}.v_input", other)) as after:
            hf(input_ids=IDS, use_cache=False)
        hook = hf.model.layers[SOURCE].register_forward_pre_hook(lambda _, args: (other, *args[1:]))
        with hooks(hook), uw.trace(lm, *names) as want:
            hf(input_ids=IDS, use_cache=False)
    for v, k in (names[:2], names[2:]):
        assert torch.equal(after[k], before[k])
        torch.testing.assert_close(after[v], want[v], rtol=0, atol=1e-12)
    with pytest.raises(NodeError, match=r"no site L4\.v_input.*those of layer 2"), uw.trace(lm, "L4.v_input"):
        pass


# Methods.


def test_a_scan_adds_up_to_levels() -> None:
    lm = model()
    data = uw.scan(lm, IDS, ["embed", "MLP1", "L2H1"], skip=0).data
    states = ran(lm.hf, IDS)[1]
    held_by = dict(zip(lm.locations, lm.holds(), strict=True))
    with torch.no_grad(), uw.trace(lm, *lm.nodes) as t:
        lm.hf(input_ids=IDS, use_cache=False)
    for writer in ("embed", "MLP1", "L2H1"):
        for location in ("resid_mid3", "resid_mid3.1", "resid_post5"):
            level = (states[location] * behind(location) * t[writer]).sum() / t[writer].square().sum()
            own = data.sel(writer=writer)
            assert float(own["level_share"].sel(location=location)) == pytest.approx(float(level), rel=1e-4, abs=1e-6)
            nodes = [name for name, there in zip(lm.nodes, held_by[location], strict=True) if there]
            assert float(own["share"].sel(node=nodes).sum()) == pytest.approx(float(level), rel=1e-4, abs=1e-6)


def test_survival_and_acts_are_those_of_an_executed_run() -> None:
    lm, hf, name = model(), weights(), "MLP1"
    node = parse_node(name)
    found = uw.survival(lm, IDS, [name], "raw", ["rotated"], 1, skip=0)
    write = replay.clean(lm, IDS, fold(lm)).write(node)
    states, gone = ran(hf, IDS)[1], ran(hf, IDS, plus(hf, node, -write))[1]
    for location in ("resid_mid1.1", "resid_post1", "resid_mid3.1", "resid_post5"):
        want = ((states[location] - gone[location]) * behind(location) * write).sum() / write.square().sum()
        got = float(found["survival"].sel(location=location).values.ravel()[0])
        assert got == pytest.approx(float(want), rel=1e-4)
    assert float(found["survival"].sel(location="resid_mid1.1").values.ravel()[0]) == pytest.approx(1)


@pytest.mark.promise("account")
def test_a_difference_is_told_of_every_prompt_by_itself() -> None:
    lm, hf, row = model(), weights(), 4
    result = uw.dla(lm, IDS, 5, 9, position=row)
    limit = FLOAT32_INSIDE * (1 + result["direct"].pipe(abs).sum("node"))
    assert (abs(result["direct"].sum("node") + result["constant"] - result["logit_diff"]) <= limit).all()
    assert (abs(result["unexplained"]) <= limit).all()
    writes = replay.clean(lm, IDS, fold(lm))
    for i, name in ((0, "MLP1"), (1, "MLP2.1"), (2, "L2H3"), (1, "L4H0"), (2, "embed")):
        node, ids = parse_node(name), IDS[i : i + 1]
        change = -writes.write(node)[i : i + 1]
        logits = [ran(hf, ids)[0][0, row], ran(hf, ids, plus(hf, node, change))[0][0, row]]
        clean, without = (float(part[5] - part[9]) for part in logits)
        assert float(result["logit_diff"][i]) == pytest.approx(clean, rel=1e-5)
        assert float(result["total"].sel(node=name)[i]) == pytest.approx(clean - without, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("nodes", ["heads", "mlp_out", "resid", "shared_v"])
def test_effects_are_those_of_patches_by_trace_one_prompt_at_a_time(nodes: str) -> None:
    lm, pairs = model(), contrasts((5, 4))
    result = uw.effects(lm, pairs, nodes)
    some = [*result["node"].values][:: max(1, len(result["node"]) // 4)]
    want = executed(lm, pairs, some)[0]
    got = result["effect"].sel(node=some).values
    assert np.nanmax(abs(got - want)) < 1e-6 * max(1.0, np.nanmax(abs(want)))
    assert np.nanmax(abs(want)) > 1e-3


def test_paths_are_those_of_plain_hooks() -> None:
    """Direct edges by hand: what a sender writes more is in what one receiver reads, and nowhere else."""
    lm, hf, pairs = model(), weights(), contrasts((5, 4))
    senders, receivers = ["MLP1", "L2H1", "MLP3", "embed"], ["MLP2", "MLP4", "logits"]
    result = uw.paths(lm, pairs, senders, receivers, mlps="frozen")
    for i, length in enumerate((5, 4)):
        base, source = (torch.from_numpy(part.ids[i : i + 1, :length]) for part in (pairs.base, pairs.source))
        with torch.no_grad():
            writes = [replay.clean(lm, ids, fold(lm)) for ids in (base, source)]
        plain = ran(hf, base)[0][0, -1]
        for sender, receiver in product(senders, receivers):
            own = parse_node(sender)
            if sender == "L2H1":  # through the post-norm, with what the other heads hand over
                continue
            delta = writes[1].write(own) - writes[0].write(own)
            got = result["effect"].sel(sender=sender, receiver=receiver).values[i]
            if receiver != "logits" and not lm.can_read(parse_node(receiver), own):
                assert np.isnan(got)
                continue
            at = hf.model.norm if receiver == "logits" else hf.model.layers[int(receiver[3])].pre_feedforward_layernorm
            here = delta / behind("resid_post5" if receiver == "logits" else f"resid_mid{receiver[3]}")
            hook = at.register_forward_pre_hook(lambda _, args, here=here: (args[0] + here, *args[1:]))
            moved = ran(hf, base, hook)[0][0, -1] - plain
            want = moved[int(pairs.answer[i])] - moved[int(pairs.against[i])]
            assert got == pytest.approx(float(want), rel=1e-4, abs=1e-7), (sender, receiver)


def test_recomputed_paths_are_what_runs_with_held_heads_do() -> None:
    """The sender is set, every other head is held, MLPs and what writes after them answer; what a head's query becomes
    there is put into a plain run."""
    lm, pairs = model(), contrasts((5,))
    result = uw.paths(lm, pairs, ["MLP1", "MLP2"], ["L3H1.q", "logits"], mlps="recompute")
    base, source = (torch.from_numpy(part.ids) for part in (pairs.base, pairs.source))
    for sender in ("MLP1", "MLP2"):
        layer = int(sender[3])
        names = [f"L{i}.attn_out" for i in range(layer + 1, 6)]
        with torch.no_grad(), uw.trace(lm, sender) as t:
            lm.hf(input_ids=source, use_cache=False)
        put_in = t[sender]
        with torch.no_grad(), uw.trace(lm, *names) as t:
            plain = lm.hf(input_ids=base, use_cache=False).logits[0, -1]
        held_there = [uw.Edit.set(name, t[name]) for name in names]
        edits = [uw.Edit.set(sender, put_in), *held_there]
        with torch.no_grad(), uw.trace(lm, "L3H1.q", edits=edits) as t:
            moved = lm.hf(input_ids=base, use_cache=False).logits[0, -1]
        with torch.no_grad(), uw.trace(lm, edits=uw.Edit.set("L3H1.q", t["L3H1.q"])):
            other = lm.hf(input_ids=base, use_cache=False).logits[0, -1]
        for receiver, logits in (("logits", moved), ("L3H1.q", other)):
            change = (logits - plain)[[int(pairs.answer[0]), int(pairs.against[0])]]
            got = float(result["effect"].sel(sender=sender, receiver=receiver).values[0])
            assert got == pytest.approx(float(change[0] - change[1]), rel=1e-4, abs=1e-7), (sender, receiver)


@pytest.mark.parametrize("rule", ["direct", "net", "relp", "gradient"])
def test_slopes_are_those_of_a_network_that_is_held_by_plain_hooks(rule: str) -> None:
    lm, hf, row = model(), weights(), 5
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    along: Callable[[Tensor], Tensor] = lambda normed: normed[:, row] @ u  # noqa: E731
    found = cotangents(lm, IDS, RULES[rule], along)[1]
    if rule in ("relp", "gradient"):  # the state's own slope: of a step along it, in the model itself
        if rule == "relp":
            assert all((found[state] - other).norm() > 1e-3 for state, other in
                       cotangents(lm, IDS, RULES["gradient"], along)[1].items() if state.layer < 5)  # fmt: skip
            return
        step = 1e-4 * torch.randn(
            *IDS.shape, lm.d_model, generator=torch.Generator().manual_seed(6), dtype=torch.float64
        )
        ends: list[Tensor] = []
        for node in (Node("embed"), Node("mlp", 1), Node("beside", 1)):
            for sign in (1, -1):
                keep = hf.model.norm.register_forward_hook(lambda *seen: ends.append(seen[2]))
                ran(hf, IDS, plus(hf, node, sign * step), keep)
            moved = float(((along(ends[-2]) - along(ends[-1])) / 2).sum())
            assert moved == pytest.approx(float((step * found[lm.after(node)]).sum()), rel=1e-2)
        return
    seen: dict[str, Tensor] = {}

    def leaf(_: nn.Module, args: Any) -> Any:
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    def final(norm: Any, args: Any, output: Tensor) -> Tensor:
        scale = (args[0].pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
        seen["normed"] = norm.weight * args[0] * scale
        return output

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(held(hf))
        for layer in hf.model.layers:
            ends = [layer.post_feedforward_layernorm, layer.post_per_layer_input_norm]
            ends += [layer.post_attention_layernorm] if rule == "direct" else []
            for end in ends:
                stack.callback(end.register_forward_hook(lambda *seen: seen[2].detach()).remove)
        stack.callback(hf.model.layers[1].register_forward_pre_hook(leaf).remove)
        stack.callback(hf.model.norm.register_forward_hook(final).remove)
        hf(input_ids=IDS, use_cache=False)
        (want,) = torch.autograd.grad((seen["normed"][:, row] @ u).sum(), seen["x"])
    close(found[lm.layers[1].reads] * behind("resid_mid1"), want)


# What may be otherwise.


def test_a_gain_before_the_mlp_and_one_after_it_are_told_apart() -> None:
    """Beam multiplies its stream at every addition, and each time by another number."""
    hf = every.model("beam")  # in float32: its experts are computed in no better
    lm, seen = view(hf, convention="raw"), dict[str, Tensor]()
    assert [layer.mid_gain for layer in lm.layers] == pytest.approx([((i - 1) / i) ** 0.5 for i in (2, 4, 6, 8)])
    for i, layer in enumerate(hf.model.layers):
        for name, module in ((f"resid_mid{i}", layer.pre_feedforward_layernorm), (f"resid_post{i - 1}", layer)):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad(), uw.trace(lm, *lm.locations) as t:
        hf(input_ids=IDS, use_cache=False)
    for name in ("resid_mid1", "resid_mid3", "resid_post1"):
        close(t[name], seen[name], 1e-5)
    run = replay.clean(lm, IDS, fold(lm))
    node, change = Node("head", 1, 2), -0.5 * run.write(Node("head", 1, 2))
    with torch.no_grad(), uw.trace(lm, edits=uw.Edit.scale("L1H2", 0.5)):
        hf(input_ids=IDS, use_cache=False)
    after = edited.added(run, node, change)
    for name, state in (("resid_mid3", parse_location("resid_mid3")), ("resid_mid1", parse_location("resid_mid1"))):
        close(after.stream[state], seen[name] * lm.to_end(state), 1e-5)
    names, pairs = ["resid_mid1", "L1.attn_out", "resid_mid2", "MLP2"], contrasts((5, 4))
    close(torch.from_numpy(uw.effects(lm, pairs, names)["effect"].sel(node=names).values).nan_to_num(),
          torch.from_numpy(executed(lm, pairs, names)[0]).nan_to_num(), 1e-4)  # fmt: skip


def test_values_that_are_keys_are_those_of_the_keys_projection() -> None:
    same = AutoModelForCausalLM.from_config(every.config("gemma4_text", attention_k_eq_v=True), dtype=torch.float64)
    lm = view(same.eval())
    assert lm.certificate.ok
    own = [layer for layer in lm.layers if layer.values_of is None]
    full = [layer for layer in own if layer.attention.layer_type == "full_attention"]
    assert [layer.value for layer in full] == [layer.attention.k_proj for layer in full] != []


def test_blocks_that_are_given_what_cannot_be_told_apart_by_prompt_are_refused(monkeypatch: Any) -> None:
    hf = every.model("llama")
    own = type(hf.model).forward

    def given(self: Any, *args: Any, **named: Any) -> Any:
        return own(self, *args, **named, beside=[named["input_ids"].sum() * torch.ones(1)])

    monkeypatch.setattr(type(hf.model), "forward", given)
    with pytest.raises(ModelError, match=r"read something beside the stream.*argument beside"):
        view(hf)
