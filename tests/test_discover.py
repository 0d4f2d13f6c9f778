"""Is a row found where the table has none, is it the true one, and is what has none told why?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import every
import tiny
import unwrite as uw
from test_families import ADDITIVE, error, some_ids, written
from twin import Truth
from unwrite.errors import ModelError
from unwrite.model import discover, sums
from unwrite.model import load as loading
from unwrite.model.certificate import IDENTITIES, certify
from unwrite.model.discover import discovered
from unwrite.model.families import FAMILIES, REST, Family
from unwrite.model.fold import value_columns
from unwrite.model.inside import decoder_of, find, maybe
from unwrite.model.load import outline, provenance, view
from unwrite.model.view import Model
from unwrite.report.terminal import headline, show

_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_SCALED = {"embedding_multiplier": 1.5, "residual_multiplier": 0.6, "logits_scaling": 2.0}
# As many latents of queries as of values, and more keys in a head than values.
_LATENT = {"kv_lora_rank": 24, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8}

# model_type -> settings beside the common ones. None has a row in the table.
UNKNOWN: dict[str, dict[str, Any]] = {
    "olmo3": {"sliding_window": 4},
    "smollm3": {},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
                    "moe_layers": [1], "attention_chunk_size": 4, "experts_implementation": "eager"},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **_ROUTED, "first_k_dense_replace": 1},
    "ernie4_5": {"head_dim": 8},
    "cohere2": {"sliding_window": 4, "logit_scale": 0.3},
    "minimax_m2": {"head_dim": 8, **_EXPERTS, "num_local_experts": 4},
    "exaone4": {"sliding_window": 4},
    "seed_oss": {"head_dim": 8},
    "apertus": {},
    "nemotron": {"head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager", **_SCALED},
    "vaultgemma": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "arcee": {},
    "gpt_bigcode": {"num_key_value_heads": None, "n_inner": 48},
    "mpt": {"num_key_value_heads": None, "expansion_ratio": 2},
    "persimmon": {},
    # values that take two steps
    "deepseek_v2": {**_ROUTED, **_LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v3": {**_ROUTED, **_LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4, "attention_bias": True},
    "minicpm3": {**_LATENT, "num_key_value_heads": 4, "head_dim": 4, "scale_depth": 1.4, "scale_emb": 3},
    "youtu": {**_LATENT, "num_key_value_heads": 4},
    # gated or normed heads
    "afmoe": {"head_dim": 8, **_EXPERTS, "num_experts": 4, "num_dense_layers": 1, "sliding_window": 4},
    "bitnet": {"attention_bias": True},
    # sinks
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
                "experts_implementation": "eager"},
    "flint": {"head_dim": 8, "sliding_window": 4},
    "granite_swa": {"sliding_window": 4, "attention_bias": True, **_SCALED},
    "olmo": {},
    "codegen": {"num_attention_heads": 8, "n_inner": 48, "rotary_dim": 4},
    "nanochat": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 3},
    "ctrl": {"dff": 48},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
}  # fmt: skip


# In these no one module gives all that a node writes, or no attribute says all that a norm does.
BESIDE = ("olmo", "codegen", "nanochat", "xglm", "ctrl", "gpt_neox_japanese")
# Its own code fails in float64.
SINGLE = ("xglm",)


def unknown(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random model of a type that the table does not have, every parameter drawn again."""
    config = AutoConfig.for_model(kind, **{**_COMMON, **UNKNOWN.get(kind, {}), **settings})
    return redrawn(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), seed)


def redrawn(hf: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in hf.modules():
            tiny._redraw(module, generator)
    return hf


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Family]:
    """Takes a family's row out of the table, and hands it over."""

    def take(family: str) -> Family:
        row = FAMILIES[family]
        monkeypatch.delitem(FAMILIES, family)
        return row

    return take


# A hand-written row and a found one.

# Where a path begins that does not begin at the block.
_IN_ATTENTION = ("out_proj", "value", "latent", "latent_norm", "head_norm")
_FROM = {**dict.fromkeys(_IN_ATTENTION, "attention"), "act": "mlp"}
_OF_BLOCK = ("input_norm", "attention", "mid", "mlp", "post_attention_norm", "post_mlp_norm", *_FROM)
_OF_DECODER = ("blocks", "embed", "pos_embed", "final_norm")


def modules(hf: Any, row: Family) -> dict[str, list[nn.Module | None]]:
    """What every path of a row leads to, in every block."""
    decoder = decoder_of(hf, row)
    found = {"decoder": [decoder], **{name: [maybe(decoder, getattr(row, name))] for name in _OF_DECODER}}
    for name in _OF_BLOCK:
        blocks = find(decoder, row.blocks).children()
        roots = [find(block, getattr(row, _FROM[name])) if name in _FROM else block for block in blocks]
        found[name] = [maybe(root, getattr(row, name)) for root in roots]
    return found


def numbers(hf: Any, row: Family) -> dict[str, Any]:
    """What is no path: functions of the configuration as what they give, a layout of values as the columns."""
    lm = Model(hf, None, hf.config.model_type, row, "raw")
    left = {*_OF_BLOCK, *_OF_DECODER, "decoder", "refuse", "opened", "value_layout", "float32_inside"}
    told = {field.name: getattr(row, field.name) for field in fields(row) if field.name not in left}
    told = {name: value(hf.config) if callable(value) else value for name, value in told.items()}
    return told | {"columns": [value_columns(lm, layer).tolist() for layer in lm.layers]}


@pytest.mark.promise("architecture")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_written_by_hand_is_found_again(family: str, seed: int) -> None:
    hf = tiny.model(family, seed, torch.float32, **ADDITIVE.get(family, {}))
    hand, found = FAMILIES[family], discovered(hf)
    assert modules(hf, found) == modules(hf, hand)
    assert numbers(hf, found) == numbers(hf, hand)
    opened = found.opened(hf.config)
    assert opened.items() <= hand.opened(hf.config).items()
    assert found.interface or "v" in opened


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_row_of_a_real_model_is_found_again(name: str, real: Path, nameless: Callable[[str], Family]) -> None:
    hand = uw.load(str(real / name))
    row = nameless(hand.family)
    found = uw.load(str(real / name))
    assert found.certificate.ok
    assert [str(part) for part in found.parts] == [str(part) for part in hand.parts]
    assert numbers(hand.hf, found.row) == numbers(hand.hf, row)
    assert modules(hand.hf, found.row) == modules(hand.hf, row)


# Types that nobody here has written a row for.


@pytest.mark.promise("architecture")
@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_type_opens_with_all_identities(kind: str) -> None:
    for seed in range(2):
        lm = view(unknown(kind, seed))
        assert lm.certificate.ok
        assert set(lm.certificate) == set(IDENTITIES)
        assert lm.certificate.limit <= 1e-4
        assert uw.scan(lm, some_ids(lm.hf, length=12))["share"].notnull().all()


@pytest.mark.promise("exact")
@pytest.mark.parametrize("kind", ["smollm3", "ernie4_5", "seed_oss", "arcee", "hunyuan_v1_dense", *BESIDE])
@pytest.mark.parametrize("convention", ["raw", "paper"])
def test_a_node_of_a_found_row_writes_what_removing_it_takes_away(kind: str, convention: str) -> None:
    hf, least = unknown(kind, 1, torch.float32 if kind in SINGLE else torch.float64), 1e-5 if kind in SINGLE else 1e-6
    truth, lm = Truth(hf, some_ids(hf)), view(hf, convention=convention)
    states, removed = truth.states(), getattr(truth, convention)()
    listed = {name: write for name, write in removed.items() if name in lm.nodes or write.abs().max() > least}
    assert error(written(lm, truth.ids), listed, states) < least


@pytest.mark.promise("exact")
@pytest.mark.parametrize("kind", ["mpt", "gpt_bigcode", "cohere2", "phimoe"])
def test_a_found_head_puts_out_its_pattern_times_its_values(kind: str) -> None:
    lm = view(unknown(kind, 2))
    with uw.trace(lm, "L1H2.pattern", "L1H2.v", "L1H2.z") as seen, torch.no_grad():
        lm.hf(some_ids(lm.hf))
    pattern, values, z = (seen[f"L1H2.{part}"] for part in ("pattern", "v", "z"))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(pattern @ values, z)


def test_values_beside_queries_and_keys_are_edited_alone() -> None:
    lm, names = view(unknown("mpt", 2)), [f"L1H{head}.z" for head in range(4)]
    ids = some_ids(lm.hf)
    with uw.trace(lm, *names) as clean, torch.no_grad():
        lm.hf(ids)
    with uw.trace(lm, *names, edits=uw.Edit.set("L1H2.v", 0.0)) as edited, torch.no_grad():
        lm.hf(ids)
    assert edited["L1H2.z"].abs().max() == 0 < clean["L1H2.z"].abs().max()
    for name in {*names} - {"L1H2.z"}:
        torch.testing.assert_close(edited[name], clean[name], rtol=0, atol=0)


@pytest.mark.promise("provenance")
def test_a_found_row_is_said_everywhere(nameless: Callable[[str], Family]) -> None:
    hf = tiny.model("llama", 0, torch.float32)
    hand = view(hf)
    assert (hand.about["row"], provenance(hand)["row"]) == ("by hand", "by hand")
    assert "row:" not in hand.certificate.explain()
    nameless("llama")
    lm = view(hf)
    assert (lm.about["row"], provenance(lm)["row"]) == ("found", "found")
    assert lm.certificate.explain().endswith("row: found")
    result = uw.scan(lm, some_ids(hf))
    assert "row: found" in headline(result)
    screen = Console(file=StringIO(), width=200)
    show(result, screen)
    assert "row: found" in screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_found_row_stays_with_its_model() -> None:
    before = dict(FAMILIES)
    view(unknown("smollm3"))
    assert before == FAMILIES


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("kind", ["cohere2", "phimoe", "mpt"])
def test_finding_a_row_leaves_the_model_as_it_was(kind: str) -> None:
    hf = unknown(kind)
    hf.train()
    next(hf.parameters()).requires_grad_(False)
    before = tiny.snapshot(hf)
    view(hf)
    assert tiny.snapshot(hf) == before


def test_a_row_is_found_whether_or_not_weights_ask_for_slopes(nameless: Callable[[str], Family]) -> None:
    nameless("gpt2")
    hf = tiny.model("gpt2", 0, torch.float32).requires_grad_(False)
    assert view(hf).row.pos_embed == "wpe"


# Tokens of the passes of a certificate: of two batches of prompts both as the model attends and with attention opened,
# and of one prompt that goes on over what it kept.
CERTIFIED = [10, 10, 27, 27, 9]


class Counted:
    """How often a model was called, on how many tokens, and how often anything ran backwards."""

    def __init__(self, hf: Any, monkeypatch: pytest.MonkeyPatch):
        self.passes: list[int] = []
        self.backward = 0
        hf.register_forward_pre_hook(self._count, with_kwargs=True)
        run = torch.autograd.graph._engine_run_backward  # what both torch.autograd.grad and .backward() call
        for module in (torch.autograd, torch.autograd.graph):
            monkeypatch.setattr(module, "_engine_run_backward", self._slope(run))

    def _count(self, module: nn.Module, args: Any, kwargs: Mapping[str, Tensor]) -> None:
        self.passes.append(kwargs["input_ids"].numel())

    def _slope(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.backward += 1
            return run(*args, **named)

        return counted

    def during(self, asked: Callable[[], object]) -> tuple[list[int], int]:
        """The passes of one question alone, and how often something ran backwards for it."""
        self.passes, self.backward = [], 0
        asked()
        return self.passes, self.backward


@pytest.mark.parametrize(("family", "most"), [("llama", 1), ("qwen3_moe", 1), ("falcon", 2), ("gptj", 1), ("bloom", 2)])
def test_finding_a_row_costs_few_short_passes(
    family: str, most: int, nameless: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = tiny.model(family, 2, torch.float32)
    counted = Counted(hf, monkeypatch)
    known, _ = counted.during(lambda: view(hf))
    assert known == CERTIFIED
    nameless(family)
    loaded, backward = counted.during(lambda: view(hf))
    more = loaded[: len(loaded) - len(known)]
    assert loaded[len(more) :] == known
    assert 1 <= len(more) <= most <= 3
    assert max(more) <= 2 * 9
    assert backward == 0


@pytest.mark.parametrize(
    ("kind", "certified"),
    [*((kind, CERTIFIED) for kind in ("olmo3", "deepseek_v3", "gpt_oss", "bamba")), ("falcon_mamba", [10, 27, 9])],
)
def test_finding_a_row_of_another_type_costs_as_few(
    kind: str, certified: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = every.model(kind)
    counted, found = Counted(hf, monkeypatch), []
    loaded, backward = counted.during(lambda: found.append(view(hf)))
    own, slopes = counted.during(lambda: certify(found[0]))
    assert own == certified  # without attention none is opened
    assert loaded[len(loaded) - len(own) :] == own
    assert 1 <= len(loaded) - len(own) <= 3
    assert max(loaded[: -len(own)]) <= 2 * 9
    assert backward - slopes <= 1


def test_a_row_is_found_of_a_decoder_without_a_head() -> None:
    hf = unknown("olmo3", 1)
    lm, whole = view(hf.model), view(hf)
    assert (lm.about["row"], lm.has_head, lm.nodes) == ("found", False, whole.nodes)
    assert lm.row.decoder == ""
    assert lm.certificate.ok


def test_a_row_is_found_whatever_mode_torch_is_in() -> None:
    hf = unknown("smollm3")
    with torch.inference_mode():
        assert view(hf).certificate.ok
    with torch.no_grad():
        assert view(hf).certificate.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_found_of_a_model_that_was_made_in_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        hf = unknown("phimoe").to(dtype)
    before = dict(hf.named_parameters())
    assert view(hf).about["row"] == "found"
    assert all(part is before[name] for name, part in hf.named_parameters())


def test_half_precision_that_is_brought_in_for_every_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "offloaded", lambda hf: True)
    assert view(unknown("smollm3")).about["row"] == "found"
    with pytest.raises(ModelError, match=r"found in float32 alone.*Next: load it with dtype='float32'"):
        view(unknown("smollm3").half())


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("smollm3", **_COMMON), dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"is empty \(on the device meta\)"):
        view(hf)


# What the graph of a pass says.


def leaf() -> Tensor:
    """What a module gave, as far as a graph can say: no sum, and no constant multiple."""
    return torch.randn(3, requires_grad=True).exp()


def test_a_sum_is_taken_apart_with_its_factors() -> None:
    x, a, b = leaf(), leaf(), leaf()
    out = (x.view(1, 3) - (0.5 * a).view(1, 3)).to(torch.float64).reshape(3) + torch.sub(b, x, alpha=0.25) / 2
    made = {a.grad_fn: "a", b.grad_fn: "b"}
    assert out.grad_fn is not None
    parts = [(part.factor, part.call or part.other) for part in sums.terms(out.grad_fn, x.grad_fn, made.get)]
    assert parts == [(1.0, ""), (-0.5, "a"), (0.5, "b"), (-0.125, "")]


def test_what_is_no_sum_is_named_and_the_largest_part_is_taken() -> None:
    x, a = leaf(), leaf()
    both = a + 1.0 * a
    out = x + both + x * a + torch.ones(3)
    assert out.grad_fn is not None
    parts = [(part.call, part.other) for part in sums.terms(out.grad_fn, x.grad_fn, {both.grad_fn: "both"}.get)]
    assert parts == [(None, ""), ("both", ""), (None, "a product"), (None, "a constant")]
    assert sums.is_product(((x * a) * 2.0).grad_fn)
    assert not sums.is_product((x * 2.0).grad_fn)
    assert sums.behind((x * a).sin().grad_fn, {x.grad_fn, both.grad_fn}) == {x.grad_fn}


def test_a_pass_keeps_no_second_copy_of_weights() -> None:
    weight, x = torch.randn(4, 4), torch.randn(4, requires_grad=True)
    with sums.scalars_kept():
        out: Any = 3.0 * (weight @ x)
    assert float(out.grad_fn._saved_self if out.grad_fn._saved_other is None else out.grad_fn._saved_other) == 3.0
    assert out.grad_fn.next_functions[0][0]._saved_self.numel() == 0


# Is a false row refused, also where it was found?

Change = Callable[[Family, Any], dict[str, Any] | None]


def times(name: str) -> Change:
    return lambda row, config: {name: lambda _: 1.01 * getattr(row, name)(config)}


def without(name: str) -> Change:
    return lambda row, config: None if getattr(row, name) is None else {name: None}


def cap(row: Family, config: Any) -> dict[str, Any]:
    cap = None if row.logit_cap(config) else 30.0
    return {"logit_cap": lambda _: cap}


def key_heads(row: Family, config: Any) -> dict[str, Any]:
    heads = 1 if row.kv_heads(config) != 1 else 2
    return {"kv_heads": lambda _: heads}


def early(row: Family, config: Any) -> dict[str, Any] | None:
    return None if row.parallel(config) or row.input_norm is None else {"mid": row.input_norm}


# What is done to a found row; None where the row has no such thing.
FALSE: dict[str, Change] = {
    "residual scale": times("residual_scale"),
    "embedding scale": lambda row, config: None if row.embed == REST else times("embed_scale")(row, config),
    "logit scale": times("logit_scale"),
    "cap": cap,
    "gain offset": lambda row, config: (
        None if config.model_type in _WITHOUT_GAIN else {"norm_gain_offset": 1.0 - row.norm_gain_offset}
    ),
    "kind of norm": lambda row, config: {"layer_norm": not row.layer_norm},
    "parallel": lambda row, config: {"parallel": lambda _: not row.parallel(config)},
    "keys for values": lambda row, config: {"value": "k_proj"} if row.value == "v_proj" else None,
    "no input norm": without("input_norm"),
    "no norm after attention": without("post_attention_norm"),
    "no norm after the MLP": without("post_mlp_norm"),
    "an earlier state": early,
    "another final norm": lambda row, config: {"final_norm": f"{row.blocks}.0.{row.input_norm or row.post_mlp_norm}"},
    "key/value heads": key_heads,
    "another activation": lambda row, config: None if hasattr(config, "num_local_experts") else {"act": "up_proj"},
    # Of a mixture of experts no product is shown.
    "gated": lambda row, config: None if hasattr(config, "num_local_experts") else {"gated": not row.gated},
    "no positions": without("pos_embed"),
    "no bias beside": without("out_bias"),
    "values before others": lambda row, config: {"value_layout": lambda _: (1, 1 + row.value_layout(config)[1])},
    "values in fewer groups": lambda row, config: None if (layout := row.value_layout(config))[0] == 1 else {
        "value_layout": lambda _: (layout[0] // 2, layout[1])
    },
    "another norm of latents": lambda row, config: row.latent_norm and {"latent_norm": "q_a_layernorm"},
    "latents of queries": lambda row, config: row.latent and {"latent": "q_a_proj"},
    "no gate": lambda row, config: {"gated_heads": False} if row.gated_heads else None,
    "no norm of heads": without("head_norm"),
    "no sinks": lambda row, config: {"sinks": False} if row.sinks else None,
}  # fmt: skip
_WITHOUT_GAIN = ("olmo", "nanochat")
MUTATED = (
    *("olmo3", "smollm3", "glm4", "cohere2", "nemotron", "granitemoe", "vaultgemma", "gpt_bigcode", *BESIDE),
    *("minicpm3", "afmoe", "bitnet", "gpt_oss"),
)


def refused(hf: Any, row: Family, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(loading, "discovered", lambda _: row)
    try:
        return not view(hf).certificate.ok
    except ModelError:
        return True


# In half precision a float32 copy is the judge, whatever the type: a few always, all with --slow.
IN_HALF = [
    pytest.param(torch.bfloat16, kind, marks=() if kind in ("olmo3", "minicpm3", "gpt_oss") else pytest.mark.slow)
    for kind in MUTATED
]


@pytest.mark.promise("exact")
@pytest.mark.parametrize(("dtype", "kind"), [*((torch.float32, kind) for kind in MUTATED), *IN_HALF])
def test_a_found_row_that_is_changed_is_refused(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = unknown(kind, 3).to(dtype)
    row = discovered(hf)
    assert not refused(hf, row, monkeypatch)
    changes = {name: new for name, change in FALSE.items() if (new := change(row, hf.config)) is not None}
    assert len(changes) >= 10
    assert [name for name, new in changes.items() if not refused(hf, replace(row, **new), monkeypatch)] == []


def test_half_precision_has_the_row_of_float32() -> None:
    hf = unknown("granitemoe", 1)
    for dtype in (torch.float16, torch.bfloat16):
        half = unknown("granitemoe", 1).to(dtype)
        found = discovered(half)
        assert numbers(half, found) == numbers(hf, discovered(hf))
        assert max(view(half).certificate.single.values()) < 1e-5


# What has no row, and why.


def mixing(hf: Any) -> Any:
    """A model in which heads are added to each other on their way to the out-projection."""
    for layer in hf.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + args[0].roll(8, -1),))
    return hf


def adding(what: Callable[[nn.Module, Tensor], Tensor]) -> Any:
    """A model whose blocks add one thing more to the stream."""
    hf = unknown("smollm3")
    for layer in hf.model.layers:
        layer.self_attn.beside = nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(0)))

        def forward(*args: Any, layer: Any = layer, run: Any = layer.forward, **named: Any) -> Tensor:
            out = run(*args, **named)
            return out + what(layer, out)

        layer.forward = forward
    return hf


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "heads that read others": (lambda: mixing(unknown("smollm3")), "something else of what attention gives"),
    "post-LN": (
        lambda: unknown("bert", is_decoder=True), r"output is not a sum that holds its input \(it is output.LayerNorm"
    ),
    "several calls": (lambda: unknown("diffllama"), "the block calls attention 2 times"),
    "a gain": (lambda: unknown("zaya", head_dim=8, num_experts=2, router_hidden_size=16), "not a sum that holds"),
    "attention beside a mixer": (
        lambda: unknown("falcon_h1", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
        r"not one attention and one MLP write in a block \(mamba: FalconH1Mixer \+ self_attn: FalconH1Attention",
    ),
    "a constant of its own making": (
        lambda: adding(lambda layer, out: torch.ones_like(out)),
        "the block adds a constant that is none of its parameters",
    ),
    "a parameter that is added otherwise": (
        lambda: adding(lambda layer, out: 2.0 * layer.self_attn.beside.expand_as(out)),
        "the block adds self_attn.beside otherwise than what attention writes",
    ),
    "a dense layer before the unembedding": (
        lambda: unknown("modernbert-decoder", local_attention=4, cls_token_id=1, sep_token_id=2),
        "something stands between the final norm and the unembedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_the_same_row_is_found_of_frozen_weights(kind: str) -> None:
    hf = unknown(kind, 1)
    free, frozen = discovered(hf), discovered(hf.requires_grad_(False))
    assert modules(hf, free) == modules(hf, frozen)
    assert numbers(hf, free) == numbers(hf, frozen)


@pytest.mark.promise("architecture")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_row_can_say_is_named_by_its_structure(name: str) -> None:
    make, why = REFUSED[name]
    with pytest.raises(ModelError, match=rf"has no row in the table of families, and none can be found: .*{why}") as no:
        view(make())
    assert "Next: " in str(no.value)
    assert no.value.__cause__ is None


# Folders, and models that see pictures.

_SEEN = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def seeing() -> Any:
    """A model that reads pictures as well, around a decoder without a row."""
    text = {**_COMMON, "head_dim": 8, "model_type": "ministral3"}
    vision = {**_SEEN, "model_type": "pixtral", "intermediate_size": 16, "head_dim": 8}
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision, image_token_index=63)
    return redrawn(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), 0)


@pytest.mark.promise("architecture")
@pytest.mark.parametrize("make", [lambda: unknown("olmo3"), seeing], ids=["text", "pictures"])
def test_a_folder_of_an_unknown_type_loads(make: Callable[[], Any], tmp_path: Path) -> None:
    hf = make()
    hf.save_pretrained(tmp_path)
    here, there = view(hf), uw.load(tmp_path)
    assert there.about["row"] == "found"
    assert there.certificate.ok
    assert here.nodes == there.nodes
    assert outline(tmp_path) is None


def test_a_model_of_pictures_is_opened_for_text() -> None:
    hf = seeing()
    lm, ids = view(hf), torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    assert len(lm.layers) == 3
    with torch.no_grad():
        states = hf(input_ids=ids, output_hidden_states=True).hidden_states
    ends = [name for name in lm.locations if name.startswith(("resid_pre", "resid_post"))]
    nodes = torch.stack([*written(view(hf, convention="raw"), ids).values()])
    levels = dict(zip(lm.locations, torch.einsum("ln,nptd->lptd", lm.holds().to(nodes), nodes), strict=True))
    for name, state in zip(ends[:-1], states, strict=False):
        torch.testing.assert_close(levels[name], state, rtol=1e-4, atol=1e-5)


def test_a_block_that_multiplies_its_stream_is_found_with_its_gain() -> None:
    hf = unknown("smollm3")
    layer = hf.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *rest, **named: forward(hidden, *rest, **named) * 2.84
    lm = view(hf)
    assert lm.certificate.ok
    assert [one.gain for one in lm.layers] == [2.84 if i == 1 else 1.0 for i in range(len(lm.layers))]
