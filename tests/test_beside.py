"""What of parts that no one module gives, or whose numbers stand in code: are they written, read and patched exactly?

Values among other outputs (codegen), positions and embeddings of no module (ctrl, xglm, nanochat, kosmos-2.5), a
parameter that a block adds (gpt_neox_japanese), norms whose epsilon no attribute holds (olmo).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import every
import tiny
import twin
import unwrite as uw
from executed import exact
from patching import alone, contrasts, executed
from test_discover import BESIDE, SINGLE, redrawn, unknown
from test_dla import Account
from unwrite.errors import ModelError, NodeError
from unwrite.model import norms
from unwrite.model.families import REST
from unwrite.model.load import view
from unwrite.model.readers import readers
from unwrite.model.view import Model
from unwrite.nodes import GROUPS
from unwrite.prompts.tokens import Tokens
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents

DOUBLE = tuple(kind for kind in BESIDE if kind not in SINGLE)
LENGTHS = np.array([7, 5, 6])


@cache
def model(kind: str, seed: int = 2, dtype: torch.dtype = torch.float64) -> Model:
    return view(unknown(kind, seed, torch.float32 if kind in SINGLE else dtype))


def some_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(seed))


def logits(lm: Model, ids: Tensor, *hooks: tuple[nn.Module, bool, Callable[..., Any]]) -> Tensor:
    """By the model itself, with plain hooks on modules: before them, or after."""
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, before, hook in hooks
    ]
    with torch.no_grad():
        out = lm.hf(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return out


def edited(lm: Model, ids: Tensor, *edits: uw.Edit) -> Tensor:
    with uw.trace(lm, edits=edits), torch.no_grad():
        return lm.hf(input_ids=ids, use_cache=False).logits


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


# Against what removals do, and patches that are really made.


@pytest.mark.promise("statistics")
@pytest.mark.parametrize("kind", DOUBLE)
def test_a_scan_says_what_its_equations_say(kind: str) -> None:
    lm, ids = model(kind), np.random.default_rng(0).integers(3, 60, (len(LENGTHS), LENGTHS.max()))
    rows = twin.Rows.of(lm.hf, ids, LENGTHS)
    found = uw.scan(lm, Tokens(ids, LENGTHS, np.arange(len(LENGTHS))), skip=0)
    assert list(found["node"].values) == list(rows.writes)
    assert list(found["location"].values) == list(rows.states)
    for writer in ("L0H1", "MLP1", next(iter(rows.writes)), [*rows.writes][-2]):
        for node, write in rows.writes.items():
            want, _ = twin.share(rows, write, writer, np.arange(len(LENGTHS)))
            close(found["share"].sel(writer=writer, node=node), want, 1e-5)


@pytest.mark.promise("executed")
@pytest.mark.parametrize(("kind", "at", "replace"), [
    ("olmo", "all", "zero"), ("codegen", "position", "mean"), ("nanochat", "all", "resample"),
    ("ctrl", "position", "zero"), ("ctrl", "all", "resample"), ("ctrl", "all", "mean"),
    ("gpt_neox_japanese", "all", "zero"),
])  # fmt: skip
def test_direct_attributions_are_those_of_executed_removals(kind: str, at: str, replace: str) -> None:
    with exact():
        Account(model(kind), at, replace).require()


@pytest.mark.promise("executed")
@pytest.mark.parametrize("kind", BESIDE)
def test_effects_are_those_of_a_naive_loop(kind: str) -> None:
    lm, pairs = model(kind), contrasts((4, 6), rows=[-1, 4])
    last = len(lm.layers) - 1
    names = ["resid_pre0", f"resid_post{last}", "L0H1", f"L{last}H2", f"L{last}.attn_out", f"MLP{last}"]
    names += [] if lm.parallel else [f"resid_mid{last}"]
    names += ["embed", f"L{last}H1.v", f"L{last}H3.v"]
    with exact():
        want = executed(lm, pairs, names)[0]
        got = uw.effects(lm, pairs, names, batch=2)["effect"].sel(node=names).values
    close(got, want, 1e-4 if kind in SINGLE else 1e-9)
    assert np.nanmax(np.abs(want)) > 1e-3


# Where a site is, by plain hooks.


def _embedding(lm: Model, ids: Tensor) -> Tensor:
    table = lm.hf.get_input_embeddings()
    return (table(ids) * lm.row.embed_scale(lm.config)).detach()


@pytest.mark.promise("executed")
@pytest.mark.parametrize("kind", ["ctrl", "xglm"])
def test_positions_of_no_module_are_taken_out_of_what_the_first_block_reads(kind: str) -> None:
    lm, ids = model(kind), some_ids()
    assert lm.row.pos_embed == REST
    state = _embedding(lm, ids)
    want = logits(lm, ids, (lm.layers[0].block, True, lambda _, args: (state, *args[1:])))
    tolerance = 1e-5 if kind in SINGLE else 1e-9
    close(edited(lm, ids, uw.Edit.set("pos_embed", 0.0)), want, tolerance)
    # Both at once, and a state that is set afterwards, which is the last word.
    close(edited(lm, ids, uw.Edit.set("pos_embed", 0.0), uw.Edit.scale("embed", 0.5)),
          logits(lm, ids, (lm.layers[0].block, True, lambda _, args: (0.5 * state, *args[1:]))), tolerance)  # fmt: skip
    other = torch.randn(state.shape, generator=torch.Generator().manual_seed(1)).to(state)
    close(edited(lm, ids, uw.Edit.set("pos_embed", 0.0), uw.Edit.set("resid_pre0", other)),
          logits(lm, ids, (lm.layers[0].block, True, lambda _, args: (other, *args[1:]))), tolerance)  # fmt: skip


@pytest.mark.parametrize("kind", ["ctrl", "xglm"])
def test_positions_are_the_same_whatever_the_tokens_are(kind: str) -> None:
    lm = model(kind)
    with uw.trace(lm, "pos_embed", "embed", "resid_pre0") as seen, torch.no_grad():
        lm.hf(some_ids())
    assert seen["pos_embed"].norm(dim=-1).min() > 0.1
    tolerance = 1e-5 if kind in SINGLE else 1e-9
    close(seen["pos_embed"][0], seen["pos_embed"][1], tolerance)
    close(seen["pos_embed"] + seen["embed"], seen["resid_pre0"], tolerance)


def test_what_depends_on_tokens_is_no_position() -> None:
    hf = unknown("smollm3")
    forward = hf.model.forward

    def embedded(input_ids: Tensor, inputs_embeds: None = None, **named: Any) -> Any:
        vectors = hf.model.embed_tokens(input_ids)
        return forward(inputs_embeds=nn.functional.silu(vectors) + vectors, **named)

    hf.model.forward = embedded
    with pytest.raises(ModelError, match=r"relative error of locations"):
        view(hf)


def test_positions_and_segments_of_a_model_of_pictures_are_one_node() -> None:
    hf = every.model("kosmos-2.5", "images")
    lm, ids = view(hf, convention="raw"), some_ids()
    with uw.trace(lm, "pos_embed") as seen, torch.no_grad():
        hf(input_ids=ids)
    body = lm.decoder
    with torch.no_grad():
        places = body.embed_positions(input_ids=ids, inputs_embeds=body.embed_tokens(ids))
        want = places + body.segment_emb(torch.zeros(1, 1, dtype=torch.long))
    close(seen["pos_embed"], want.expand(2, -1, -1), 1e-5)


@pytest.mark.promise("executed")
def test_a_norm_that_runs_twice_shows_each_state_where_it_is() -> None:
    lm, ids = model("nanochat"), some_ids()
    assert (lm.row.embed, lm.row.final_norm) == (REST, "norm")
    last = lm.layers[-1].block
    want = logits(lm, ids, (lm.layers[0].block, True, lambda _, args: (2 * args[0], *args[1:])))
    close(edited(lm, ids, uw.Edit.scale("embed", 2.0)), want)
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0), dtype=lm.dtype)
    want = logits(lm, ids, (last, False, lambda _, __, out: out + direction if isinstance(out, Tensor) else
                            (out[0] + direction, *out[1:])))  # fmt: skip
    close(edited(lm, ids, uw.Edit.add(f"resid_post{len(lm.layers) - 1}", direction)), want)
    with uw.trace(lm, "embed", "resid_pre0") as seen, torch.no_grad():
        lm.hf(ids)
    with torch.no_grad():
        close(seen["embed"], lm.decoder.norm(lm.decoder.embed_tokens(ids)))
    close(seen["embed"], seen["resid_pre0"])


@pytest.mark.promise("executed")
def test_a_parameter_that_a_block_adds_is_part_of_all_that_attention_writes() -> None:
    lm, ids = model("gpt_neox_japanese"), some_ids()
    attention = lm.layers[-1].attention
    bias = attention.dense_bias.detach()
    assert [layer.out_bias for layer in lm.layers] == [None, None, (attention, "dense_bias")]
    assert "L2.bias" in lm.nodes
    raw = view(lm.hf, convention="raw")
    assert [name for name in raw.nodes if "bias" in name] == ["L2.bias"]
    with uw.trace(raw, "L2.bias", "L2.attn_out", "resid_mid2", "resid_post1") as seen, torch.no_grad():
        lm.hf(ids)
    close(seen["L2.bias"], bias.expand(2, 7, -1))
    close(seen["resid_post1"] + seen["L2.attn_out"], seen["resid_mid2"])
    none = logits(lm, ids, (attention.dense, False, lambda _, __, out: torch.zeros_like(out) - bias))
    close(edited(raw, ids, uw.Edit.set("L2.attn_out", 0.0)), none)
    close(edited(raw, ids, uw.Edit.set("L2.bias", 0.0)),
          logits(lm, ids, (attention.dense, False, lambda _, __, out: out - bias)))  # fmt: skip
    state = torch.randn(2, 7, lm.d_model, generator=torch.Generator().manual_seed(0), dtype=lm.dtype)
    last = lm.layers[-1]
    mlp = last.mlp.forward(last.mid.forward(state))  # pyright: ignore[reportOptionalMemberAccess]
    want = logits(lm, ids, (last.block, False, lambda _, __, out: (state + mlp, *out[1:])))
    close(edited(raw, ids, uw.Edit.set("resid_mid2", state)), want)


@pytest.mark.parametrize("source", ["zero", "another model"])
def test_a_value_from_elsewhere_is_put_beside_a_parameter_that_the_block_adds(source: str) -> None:
    lm, other, pairs = model("gpt_neox_japanese"), model("gpt_neox_japanese", 5), contrasts((4, 6))
    names, donor = ["L2.attn_out", "resid_mid2", "L1.attn_out"], other if source == "another model" else source
    theirs = [one.values(names) for one in alone(other, pairs)]
    given = lambda i, _, name: theirs[i][name] if donor is other else torch.zeros_like(theirs[i][name])  # noqa: E731
    want = executed(lm, pairs, names, given=given)[0]
    close(uw.effects(lm, pairs, names, source=donor, batch=2)["effect"].sel(node=names).values, want)
    assert np.nanmax(np.abs(want)) > 1e-3


# Values among other outputs.


def _without_value(head: int, heads: int) -> Callable[..., Tensor]:
    """As codegen's own code reads what its projection puts out: in each of four groups queries, values, keys."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        query, value, key = out.reshape(*out.shape[:2], 4, -1).chunk(3, -1)
        value = value.reshape(*out.shape[:2], heads, -1).clone()
        value[:, :, head] = 0
        return torch.cat([query, value.reshape(query.shape), key], -1).reshape(out.shape)

    return hook


@pytest.mark.promise("executed")
@pytest.mark.parametrize("head", [0, 3, 5])
def test_values_between_queries_and_keys_are_edited_alone(head: int) -> None:
    lm, ids = model("codegen"), some_ids()
    assert lm.row.value_layout(lm.config) == (4, 2)
    want = logits(lm, ids, (lm.layers[1].value, False, _without_value(head, 8)))
    got = edited(lm, ids, uw.Edit.set(f"L1H{head}.v", 0.0))
    close(got, want)
    pairs = uw.pairs(ids, some_ids(1), 5, 9)
    found = uw.effects(lm, pairs, [f"L1H{head}.v"], source="zero", at="all", batch=2)
    difference = [(x[:, -1, 5] - x[:, -1, 9]) for x in (want, logits(lm, ids))]
    close(found["effect"].values[:, 0], difference[0] - difference[1])


@pytest.mark.parametrize("group", GROUPS)
def test_what_no_module_shows_is_refused_by_name(group: str) -> None:
    """Queries and keys are turned inside of its attention; everything else is patched."""
    lm, pairs = model("codegen"), contrasts((4, 6))
    if group in ("q", "k", "shared_k") and not lm.row.interface:  # as in transformers 5.23
        with pytest.raises(NodeError, match=r"turned inside of its attention"):
            uw.effects(lm, pairs, f"L1{'KV' if 'shared' in group else 'H'}0.{group[-1]}")
    else:
        assert np.isfinite(uw.effects(lm, pairs, group, at="all", batch=2)["effect"].values).all()


# Norms.


class Norm(nn.Module):
    """A norm whose epsilon stands in code alone."""

    def __init__(self, epsilon: float, mean: bool, weighted: bool, inside: torch.dtype | None = None):
        super().__init__()
        self.make = lambda x: (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
        self.mean, self.inside = mean, inside
        self.weight = nn.Parameter(torch.ones(32, dtype=torch.float64)) if weighted else None
        self.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        made = self.make((x - x.mean(-1, keepdim=True) if self.mean else x).to(self.inside or x.dtype)).to(x.dtype)
        return made if self.weight is None else made * self.weight + self.bias


@pytest.mark.parametrize("inside", [None, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-8, 1.1920929e-07, 1e-6, 1e-5, 3.3e-3])
def test_an_epsilon_is_told_from_what_a_norm_does(
    epsilon: float, mean: bool, weighted: bool, inside: torch.dtype | None
) -> None:
    norm = redrawn(Norm(epsilon, mean, weighted, inside), 3)
    assert norms.is_norm(norm, 32)
    size = torch.logspace(-7, 3, 11, dtype=torch.float64)
    x = size[:, None] * torch.randn(11, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = x - x.mean(-1, keepdim=True) if mean else x
    close(norms.norm_scale(x, norm, mean) * (moved.pow(2).mean(-1) + epsilon).sqrt(), np.ones(11), 1e-5)
    if not weighted:
        with torch.no_grad():
            close(norms.norm_scale(x, norm, mean)[:, None] * moved, norm(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_epsilon_is_told_in_half_precision_as_far_as_this_shows_it(dtype: torch.dtype) -> None:
    norm, x = redrawn(Norm(1e-5, False, True, torch.float32), 3).to(dtype), torch.full((32,), 3e-3)
    assert norms.is_norm(norm, 32)
    close(norms.norm_scale(x, norm, False), 1 / (9e-6 + 1e-5) ** 0.5, 2e-2)


@pytest.mark.parametrize("module", [
    nn.SiLU(), nn.GELU(), nn.ReLU(), nn.Tanh(), nn.Softmax(-1), nn.Identity(), nn.Dropout(), nn.Linear(32, 32),
    nn.Embedding(32, 32), nn.Sequential(nn.RMSNorm(32)), nn.Softsign(), nn.LogSoftmax(-1), nn.Hardtanh(),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_what_does_not_divide_by_a_size_is_no_norm(module: nn.Module) -> None:
    assert not norms.is_norm(module, 32)


def test_norms_without_attributes_are_held_and_their_readers_are_found() -> None:
    lm, ids = model("olmo"), some_ids()
    head = lm.hf.lm_head
    with exact():
        found = cotangents(lm, ids, RULES["direct"], lambda y: head(y)[:, -1, 5] - head(y)[:, -1, 9])
        with torch.no_grad(), uw.trace(view(lm.hf, convention="raw"), "resid_post2") as seen:
            lm.hf(ids)
    row = head.weight[5] - head.weight[9]
    scale = 1 / (seen["resid_post2"][:, -1].var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    close(found[1][lm.states[-1]][:, -1], (scale * (row - row.mean())).detach())
    names = {reader.name.removeprefix("0.") for reader in readers(lm) if reader.name.startswith("0.")}
    assert names == {*(f"self_attn.{part}_proj" for part in "qkv"), "mlp.gate_proj", "mlp.up_proj"}


@pytest.mark.promise("executed")
def test_values_that_heads_share_are_patched_in_what_their_module_puts_out() -> None:
    shape = {"layout": 5, "alibi": False, "num_attention_heads": 4, "num_kv_heads": 2, "attn_implementation": "eager"}
    lm, pairs, names = view(tiny.model("falcon", 2, **shape)), contrasts((4, 6)), ["L1KV0.v", "L1KV1.v"]
    assert 1 < lm.kv_heads < lm.n_heads
    with exact():
        want = executed(lm, pairs, names)[0]
        close(uw.effects(lm, pairs, names, batch=2)["effect"], want)
    assert np.nanmax(np.abs(want)) > 1e-3
    with pytest.raises(NodeError, match=r"turned inside of its attention"):
        uw.effects(lm, pairs, ["L1KV0.k"])
