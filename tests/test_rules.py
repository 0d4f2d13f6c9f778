"""Does a backward pass under rules say what an executed, or an openly written, network with these rules says?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny
from executed import Alone, exact, uncapped, weights
from surrogates import linearised
from unwrite.model.fold import fold, value_columns
from unwrite.model.load import view
from unwrite.model.projections import matrix_of
from unwrite.model.values import through_values
from unwrite.model.view import Model
from unwrite.nodes import Location
from unwrite.run.answer.logits import Question, linear, normed_measure
from unwrite.run.backward.rules import RULES, Rules
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay import clean as replay

LENGTH, ROW = 6, 4
# One of every way in which attention is reached: the interface, own code, own code with a branch for sdpa, post-norms.
WAYS = ("gpt2", "gpt_neo", "falcon", "gemma2", "qwen2_moe")
# Falcon's fused and open attention differ under ALiBi; patterns are shown by the open one, so here all runs are open.
OPEN = {"falcon": {"attn_implementation": "eager"}}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
# With the layouts that the first seed does not draw: norms without parameters, parallel and sequential blocks, norms of
# queries and keys, experts beside dense layers.
every_layout = pytest.mark.parametrize(
    ("family", "seed"),
    [(family, 0) for family in tiny.FAMILIES] + [("opt", 5), ("falcon", 3), ("falcon", 5), ("phi", 5), ("stablelm", 1)]
    + [("gpt_neox", 1), ("qwen2_moe", 5)],
)  # fmt: skip


@cache
def model(family: str, seed: int = 0) -> Model:
    return view(weights(family, seed, **OPEN.get(family, {})))


def ids_of(prompts: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 50, (prompts, length), generator=torch.Generator().manual_seed(1))


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(u: Tensor, row: int = ROW) -> Callable[[Tensor], Tensor]:
    """A metric: one row of what the final norm gives, along u."""
    return lambda normed: normed[:, row].to(u.dtype) @ u


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(1.0, float(want.abs().max())))


def writer(lm: Model, state: Location) -> str:
    """A node that writes right before this state."""
    return {"pre": "embed", "mid": f"L{state.layer}H0", "post": f"MLP{state.layer}"}[state.state]


# The forward pass


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float64) for family in tiny.FAMILIES]
    + [(family, dtype) for family in WAYS for dtype in (torch.float32, torch.bfloat16)],
)
def test_the_forward_pass_is_bit_for_bit_the_models_own(family: str, dtype: torch.dtype) -> None:
    lm, ids = model(family) if dtype == torch.float64 else view(weights(family, 0, dtype)), ids_of(2)
    with torch.no_grad():
        want = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
    for rules in RULES.values():
        seen: list[Tensor] = []
        values, _ = cotangents(lm, ids, rules, lambda normed, seen=seen: seen.append(normed) or normed.sum((1, 2)))
        assert torch.equal(seen[0].detach(), want)
        assert torch.equal(values, want.sum((1, 2)))


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", WAYS)
def test_nothing_is_left_behind_whatever_happens(family: str, rules: str) -> None:
    lm = model(family)
    lm.hf.train()
    before = tiny.snapshot(lm.hf)
    try:
        cotangents(lm, ids_of(), RULES[rules], along(drawn(lm.d_model)))
        assert tiny.snapshot(lm.hf) == before
        for error in (RuntimeError("planted"), KeyboardInterrupt()):

            def interrupted(_: Tensor, error: BaseException = error) -> Tensor:
                raise error

            with pytest.raises(type(error)):
                cotangents(lm, ids_of(), RULES[rules], interrupted)
            assert tiny.snapshot(lm.hf) == before
    finally:
        lm.hf.eval()


def test_dropout_is_off_and_parameters_need_no_gradient() -> None:
    """A model as a training loop leaves it: in training, with dropout, some of its weights frozen."""
    hf = weights("gpt2", 1, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    lm, u = view(hf), drawn(hf.config.n_embd)
    want = cotangents(lm, ids_of(), RULES["relp"], along(u))[1]
    hf.train().requires_grad_(False)
    with torch.no_grad():
        got = cotangents(lm, ids_of(), RULES["relp"], along(u))[1]
    for state, part in want.items():
        assert torch.equal(got[state], part)
        assert not part.requires_grad
    assert all(parameter.grad is None for parameter in hf.parameters())


@every_family
def test_prompts_and_padding_do_not_mix(family: str) -> None:
    """Each prompt's cotangents are those that it has alone; after the row that is read there are none."""
    lm, ids = model(family), ids_of(3, LENGTH + 2)
    u, rows = drawn(lm.d_model), torch.tensor([ROW, 2, LENGTH + 1])

    def metric(normed: Tensor) -> Tensor:
        return normed[torch.arange(3), rows] @ u

    with exact():
        together = cotangents(lm, ids, RULES["gradient"], metric)[1]
        for prompt, row in enumerate(rows.tolist()):
            alone = cotangents(lm, ids[prompt : prompt + 1, : row + 1], RULES["gradient"], along(u, row))[1]
            for state in lm.states:
                close(together[state][prompt, : row + 1], alone[state][0])
                assert not together[state][prompt, row + 1 :].any()


@every_family
def test_float32_inside_a_family_only_rounds(family: str) -> None:
    """What users get against what the other tests check: float32 has seven digits, and a backward pass few sums."""
    lm = model(family)
    metric = along(drawn(lm.d_model))
    for rules in RULES.values():
        got = cotangents(lm, ids_of(), rules, metric)[1]
        with exact():
            want = cotangents(lm, ids_of(), rules, metric)[1]
        for state in lm.states:
            close(got[state], want[state], 1e-5)


# gradient, relp: differences of executed runs


def slope(alone: Alone, node: str, direction: Tensor, u: Tensor, step: float = 1e-6) -> float:
    """d metric for what is added to the stream right after `node`, by whole runs on either side."""
    seen: list[Tensor] = []
    handle = alone.truth.final.register_forward_hook(lambda _, __, normed: seen.append(normed))
    for sign in (1, -1):
        with torch.no_grad(), alone.without(node, -sign * step * direction):
            alone.hf(input_ids=alone.ids[None], use_cache=False)
    handle.remove()
    above, below = (float(normed.view(LENGTH, -1)[ROW] @ u) for normed in seen)
    return (above - below) / (2 * step)


def require_slopes(lm: Model, rules: Rules, network: Callable[[Alone], Any]) -> None:
    """Cotangents under `rules` are the slopes of the executed `network` at every location, along random directions."""
    ids, u = ids_of(), drawn(lm.d_model)
    alone = Alone(lm.hf, ids[0], ROW, 0)
    with exact():
        found = cotangents(lm, ids, rules, along(u))[1]
        with network(alone):
            for state in lm.states:
                for seed in range(2):
                    direction = drawn(LENGTH, lm.d_model, seed=3 + seed)
                    want = slope(alone, writer(lm, state), direction, u)
                    # The step squared times a third derivative, and rounding over the step.
                    assert float((found[state][0] * direction).sum()) == pytest.approx(want, rel=1e-6, abs=1e-7)


@contextmanager
def as_it_is(alone: Alone) -> Iterator[None]:
    alone.truth.logits()
    yield


@every_family
def test_gradient_is_the_slope_of_executed_runs(family: str) -> None:
    require_slopes(model(family), RULES["gradient"], as_it_is)


@every_layout
def test_relp_is_the_slope_of_an_executed_network_with_its_rules(family: str, seed: int) -> None:
    require_slopes(model(family, seed), RULES["relp"], linearised)


# direct, net: algebra


@every_family
def test_direct_is_the_reading_of_the_final_norm_at_the_read_row_only(family: str) -> None:
    lm, ids = model(family), ids_of(2)
    question = Question(torch.tensor([5, 6]), torch.tensor([7, 8]))
    with exact():
        run = replay.clean(lm, ids, fold(lm))
        r, _ = linear(lm, question, run.record.stream[lm.states[-1]][:, ROW])
        found = cotangents(lm, ids, RULES["direct"], lambda normed: normed_measure(lm, question, normed[:, ROW]))[1]
    assert tuple(found) == lm.states
    for part in found.values():
        close(part[:, ROW], r, 1e-12)
        assert not part[:, torch.arange(LENGTH) != ROW].any()


@every_family
def test_a_reading_is_the_slope_of_the_models_own_logits_with_the_final_norm_held(family: str) -> None:
    lm, ids, vector = model(family), ids_of(), drawn(model(family).d_model)
    with exact():
        stream = replay.clean(lm, ids, fold(lm)).record.stream[lm.states[-1]][:, ROW]
        for against in (7, None):
            question = Question(torch.tensor([5]), None if against is None else torch.tensor([against]))
            r, _ = linear(lm, question, stream)
            want = Alone(uncapped(lm.hf), ids[0], ROW, 5, against).direct(vector)
            assert float(r[0] @ vector) == pytest.approx(want, rel=1e-10)


def propagated(run: replay.Clean, state: Location, x: Tensor) -> Tensor:
    """x ← x + Σ_e C_e(x), for all heads that read `state` or later."""
    lm = run.lm
    for layer in lm.layers:
        if lm.states.index(layer.reads) >= lm.states.index(state):
            through = through_values(lm, layer, run.patterns[layer.index], x, run.scale(layer))
            x = x + torch.einsum("bthk,hkd->btd", run.post_scaled(layer, through), run.folded[layer.index].w_o)
    return x


@every_layout
def test_net_is_the_write_carried_by_hand_through_all_values(family: str, seed: int) -> None:
    lm, ids = model(family, seed), ids_of(2)
    u, x = drawn(lm.d_model), drawn(2, LENGTH, lm.d_model, seed=7)
    with exact():
        run = replay.clean(lm, ids, fold(lm), with_patterns=True)
        direct = cotangents(lm, ids, RULES["direct"], along(u))[1][lm.states[-1]][:, ROW]
        found = cotangents(lm, ids, RULES["net"], along(u))[1]
        carried = [propagated(run, state, x)[:, ROW] for state in lm.states]
    for state, end in zip(lm.states, carried, strict=True):
        close((found[state] * x).sum((1, 2)), (end * direct).sum(-1))
    assert (found[lm.states[0]] - direct[:, None]).abs().max() > 1e-3


@every_family
def test_net_is_direct_where_no_later_head_reads(family: str) -> None:
    lm = model(family)
    silent = replace(lm, hf=copy.deepcopy(lm.hf))
    with torch.no_grad():
        for layer in silent.layers:
            matrix_of(silent, layer.value)[:, value_columns(silent, layer)] = 0
    # In the last layer there is no head to come; without values there is none in any.
    for which, states in ((lm, lm.states[-1 if lm.parallel else -2 :]), (silent, lm.states)):
        direct, net = (
            cotangents(which, ids_of(), RULES[name], along(drawn(lm.d_model)))[1] for name in ("direct", "net")
        )
        for state in states:
            close(net[state], direct[state], 1e-12)


# All four rules: forward passes written out, with every stop written where it belongs


class Open:
    """A decoder written out in float64; `rules` says what is detached. Parts of the model are read by `w`."""

    def __init__(self, hf: Any, rules: Rules):
        self.config, self.rules, self.state = hf.config, rules, hf.state_dict()
        self.stream: list[Tensor] = []

    def w(self, name: str) -> Tensor:
        return self.state[name]

    def at(self, x: Tensor) -> Tensor:
        """A state of the stream, kept."""
        self.stream.append(x)
        return x

    def norm(self, x: Tensor, name: str, eps: float, centred: bool, offset: float = 0.0) -> Tensor:
        y = x - x.mean(-1, keepdim=True) if centred else x
        sigma = (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        y = y / (sigma.detach() if self.rules.norm == "held" else sigma) * (self.w(f"{name}.weight") + offset)
        return y + self.w(f"{name}.bias") if f"{name}.bias" in self.state else y

    def linear(self, x: Tensor, name: str, conv: bool = False) -> Tensor:
        weight = self.w(f"{name}.weight")
        y = x @ (weight if conv else weight.t())
        return y + self.w(f"{name}.bias") if f"{name}.bias" in self.state else y

    def act(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if self.rules.mlp != "relp":
            return function(x)
        s = x + 1e-6 * torch.where(x < 0, -1.0, 1.0)
        return s * (function(x) / s).detach()

    def product(self, a: Tensor, u: Tensor) -> Tensor:
        return (a * u.detach() + a.detach() * u) / 2 if self.rules.mlp == "relp" else a * u

    def mlp_write(self, x: Tensor) -> Tensor:
        return x.detach() if self.rules.mlp == "stopped" else x

    def attention_write(self, x: Tensor) -> Tensor:
        return x.detach() if self.rules.attention == "stopped" else x

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, cap: float | None = None
    ) -> Tensor:
        """[prompt, position, head, d_head] each; heads of q share those of k and v."""
        group = q.shape[2] // k.shape[2]
        q, k, v = q.movedim(2, 1), *(part.movedim(2, 1).repeat_interleave(group, 1) for part in (k, v))
        scores = q @ k.mT * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pattern = pattern.detach() if self.rules.attention == "values" else pattern
        return (pattern @ v).movedim(1, 2).flatten(2)

    def rope(self, x: Tensor, inverse: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * inverse.double()
        cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def gpt2(hf: Any, ids: Tensor, o: Open) -> Tensor:
    x = (o.w("transformer.wte.weight")[ids] + o.w("transformer.wpe.weight")[: ids.shape[1]]).requires_grad_()
    x, heads, eps = o.at(x), hf.config.n_head, hf.config.layer_norm_epsilon
    for layer in range(hf.config.n_layer):
        at = f"transformer.h.{layer}."
        fused = o.linear(o.norm(x, f"{at}ln_1", eps, True), f"{at}attn.c_attn", True)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in fused.chunk(3, -1))
        z = o.attend(q, k, v, q.shape[-1] ** -0.5)
        x = o.at(x + o.attention_write(o.linear(z, f"{at}attn.c_proj", True)))
        inside = o.linear(o.norm(x, f"{at}ln_2", eps, True), f"{at}mlp.c_fc", True)
        inside = o.act(inside, lambda a: F.gelu(a, approximate="tanh"))
        x = o.at(x + o.mlp_write(o.linear(inside, f"{at}mlp.c_proj", True)))
    return o.norm(x, "transformer.ln_f", eps, True)


def llama(hf: Any, ids: Tensor, o: Open) -> Tensor:
    x, config = o.at(o.w("model.embed_tokens.weight")[ids].requires_grad_()), hf.config
    for layer in range(config.num_hidden_layers):
        at, eps = f"model.layers.{layer}.", config.rms_norm_eps
        y = o.norm(x, f"{at}input_layernorm", eps, False)
        q, k, v = (o.linear(y, f"{at}self_attn.{p}_proj").unflatten(-1, (-1, config.head_dim)) for p in "qkv")
        q, k = (o.rope(part, hf.model.rotary_emb.inv_freq) for part in (q, k))
        z = o.attend(q, k, v, config.head_dim**-0.5)
        x = o.at(x + o.attention_write(o.linear(z, f"{at}self_attn.o_proj")))
        y = o.norm(x, f"{at}post_attention_layernorm", eps, False)
        gate = o.act(o.linear(y, f"{at}mlp.gate_proj"), F.silu)
        x = o.at(x + o.mlp_write(o.linear(o.product(gate, o.linear(y, f"{at}mlp.up_proj")), f"{at}mlp.down_proj")))
    return o.norm(x, "model.norm", config.rms_norm_eps, False)


def gpt_neox(hf: Any, ids: Tensor, o: Open) -> Tensor:
    x, config = o.at(o.w("gpt_neox.embed_in.weight")[ids].requires_grad_()), hf.config
    for layer in range(config.num_hidden_layers):
        at, eps = f"gpt_neox.layers.{layer}.", config.layer_norm_eps
        y = o.norm(x, f"{at}input_layernorm", eps, True)
        fused = o.linear(y, f"{at}attention.query_key_value").unflatten(-1, (config.num_attention_heads, -1))
        q, k, v = fused.chunk(3, -1)
        q, k = (o.rope(part, hf.gpt_neox.rotary_emb.inv_freq) for part in (q, k))
        attention = o.linear(o.attend(q, k, v, q.shape[-1] ** -0.5), f"{at}attention.dense")
        inside = o.linear(o.norm(x, f"{at}post_attention_layernorm", eps, True), f"{at}mlp.dense_h_to_4h")
        mlp = o.linear(o.act(inside, F.gelu), f"{at}mlp.dense_4h_to_h")
        x = o.at(x + o.attention_write(attention) + o.mlp_write(mlp))
    return o.norm(x, "gpt_neox.final_layer_norm", config.layer_norm_eps, True)


def gemma2(hf: Any, ids: Tensor, o: Open) -> Tensor:
    config, eps = hf.config, hf.config.rms_norm_eps
    x = o.at((o.w("model.embed_tokens.weight")[ids] * config.hidden_size**0.5).requires_grad_())
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = o.norm(x, f"{at}input_layernorm", eps, False, 1)
        q, k, v = (o.linear(y, f"{at}self_attn.{p}_proj").unflatten(-1, (-1, config.head_dim)) for p in "qkv")
        q, k = (o.rope(part, hf.model.rotary_emb.inv_freq) for part in (q, k))
        window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        z = o.attend(q, k, v, config.query_pre_attn_scalar**-0.5, window, config.attn_logit_softcapping)
        attention = o.attention_write(o.linear(z, f"{at}self_attn.o_proj"))
        x = o.at(x + o.norm(attention, f"{at}post_attention_layernorm", eps, False, 1))
        y = o.norm(x, f"{at}pre_feedforward_layernorm", eps, False, 1)
        gate = o.act(o.linear(y, f"{at}mlp.gate_proj"), lambda a: F.gelu(a, approximate="tanh"))
        mlp = o.linear(o.product(gate, o.linear(y, f"{at}mlp.up_proj")), f"{at}mlp.down_proj")
        x = o.at(x + o.norm(o.mlp_write(mlp), f"{at}post_feedforward_layernorm", eps, False, 1))
    return o.norm(x, "model.norm", eps, False, 1)


WRITTEN_OUT: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "gpt2": (gpt2, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}),
    "llama": (llama, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt_neox": (gpt_neox, {"use_parallel_residual": True}),
    "gemma2": (gemma2, {"attn_logit_softcapping": 5.0, "attn_implementation": "eager", "num_attention_heads": 4}),
}


@cache
def _pinned(family: str) -> Model:
    return view(weights(family, 1, **WRITTEN_OUT[family][1]))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_cotangents_are_those_of_the_same_network_written_out(family: str, rules: str) -> None:
    lm, ids = _pinned(family), ids_of(2)
    forward, hf = WRITTEN_OUT[family][0], lm.hf
    u = drawn(lm.d_model)
    with exact():
        found = cotangents(lm, ids, RULES[rules], along(u))[1]
        with torch.no_grad():
            truth = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        o = Open(hf, RULES[rules])
        normed = forward(hf, ids, o)
    close(normed, truth)
    want = torch.autograd.grad(along(u)(normed).sum(), o.stream, allow_unused=True)
    for state, part in zip(lm.states, want, strict=True):
        assert part is not None
        close(found[state], part)
