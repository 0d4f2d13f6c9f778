"""Is what the view says every node writes true, in every family, and is a false row of the table refused?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from twin import Truth
from unwrite.errors import ModelError
from unwrite.model import capture
from unwrite.model.certificate import IDENTITIES, NEEDED, Certificate
from unwrite.model.families import FAMILIES
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.model.writes import expand

# These compute in the dtype of the weights throughout; the others' norms, scores or softmax are float32 in any model.
NATIVE = {"gpt2", "gpt_neox", "opt", "falcon", "phi", "stablelm", "starcoder2"}
# The view refuses OPT's other forms, in which writes do not add up (see test_load).
ADDITIVE = {"opt": {"do_layer_norm_before": True, "word_embed_proj_dim": None}}

CONVENTIONS = ("paper", "raw")


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    return tiny.model(family, seed, dtype, **{**ADDITIVE.get(family, {}), **overrides})


def some_ids(hf: Any, seed: int = 0, prompts: int = 2, length: int = 7) -> Tensor:
    return torch.randint(hf.config.vocab_size, (prompts, length), generator=torch.Generator().manual_seed(seed))


def written(lm: Model, ids: Tensor) -> dict[str, Tensor]:
    """What the view says: node -> write [prompt, position, d_model]."""
    folded = fold(lm)
    nodes = expand(lm, folded, capture.run(lm, ids, folded).map(lambda part: part.flatten(0, 1)))
    return dict(zip(lm.nodes, nodes.unflatten(1, ids.shape), strict=True))


def error(got: Mapping[str, Tensor], want: Mapping[str, Tensor], stream: Mapping[str, Tensor]) -> float:
    """Worst relative error of any vector; of a vector smaller than the embedding, relative to that."""
    assert list(got) == list(want)
    least = stream["resid_pre0"].norm(dim=-1)
    return max(float(((got[x] - want[x]).norm(dim=-1) / want[x].norm(dim=-1).maximum(least)).amax()) for x in want)


def limit(family: str) -> float:
    # GPT-Neo and GPT-J make their scores in float32 in any model, and how these round depends on the batch's shape.
    return 1e-10 if family in NATIVE else 1e-5 if family in ("gpt_neo", "gptj") else 1e-6


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
def test_every_node_writes_what_removing_it_takes_away_and_all_sum_to_the_stream(family: str, seed: int) -> None:
    hf = model(family, seed)
    truth = Truth(hf, some_ids(hf, seed))
    states = truth.states()
    for convention in CONVENTIONS:
        lm = view(hf, convention=convention)
        writes = written(lm, truth.ids)
        assert error(writes, _listed(getattr(truth, convention)()), states) < limit(family)
        nodes = torch.stack(list(writes.values()))
        levels = dict(zip(lm.locations, torch.einsum("ln,nptd->lptd", lm.holds().to(nodes), nodes), strict=True))
        assert error(levels, truth.readable(states) if convention == "paper" else states, states) < limit(family)
        logits = truth.logits()
        assert (truth.logits(nodes.sum(0)) - logits).norm() < limit(family) * logits.norm()


def _listed(truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bias that is zero by construction is no node."""
    return {name: write for name, write in truth.items() if not (name.endswith(".bias") and write.abs().max() < 1e-6)}


@pytest.mark.promise("batches")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_after_a_prompt_changes_nothing(family: str) -> None:
    hf = model(family, 1)
    lm, ids = view(hf), some_ids(hf, prompts=3)
    together = written(lm, ids)
    for prompt, length in enumerate((3, 7, 5)):
        alone = written(lm, ids[prompt, None, :length])
        cut = {name: write[prompt, None, :length] for name, write in together.items()}
        assert error(cut, alone, {"resid_pre0": alone["embed"]}) < limit(family)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_certificate_is_exact_and_its_limit_tight(family: str) -> None:
    certificate = view(model(family, 2)).certificate
    assert certificate.ok
    assert set(certificate) == set(IDENTITIES)
    assert certificate.explain().startswith("exact to rounding")
    assert certificate.limit <= (1e-9 if family in NATIVE else 1e-6)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("wrong", [1e-3, math.inf, math.nan])
@pytest.mark.parametrize("identity", NEEDED)
def test_one_identity_that_fails_is_enough(identity: str, wrong: float) -> None:
    certificate = Certificate({**dict.fromkeys(IDENTITIES, 1e-12), identity: wrong}, 1e-9, "float64")
    assert not certificate.ok
    assert "NOT exact" in certificate.explain()
    with pytest.raises(ModelError, match=rf"Got: relative error of {identity} [^,]*\. Expected"):
        certificate.require("this model")


@pytest.mark.promise("exact")
@pytest.mark.parametrize("wrong", [1e-3, math.nan])
@pytest.mark.parametrize("identity", ["opened", "reading", "continued", "mlp"])
def test_what_only_some_methods_need_is_refused_to_them(identity: str, wrong: float) -> None:
    certificate = Certificate({**dict.fromkeys(IDENTITIES, 1e-12), identity: wrong}, 1e-9, "float64")
    certificate.require("this model")
    assert certificate.failing == (identity,)
    assert f"but for {identity}" in certificate.explain()
    lm = replace(view(model("llama")), certificate=certificate)
    with pytest.raises(ModelError, match=rf"Got: relative error of {identity} "):
        lm.require(identity)
    lm.require("heads")


# What is changed in a family's row, the model that shows it, and the identities that must fail.
FALSE_ROWS: list[tuple[str, dict[str, Any], dict[str, Any], set[str]]] = [
    # value layouts and groups
    ("gpt_neox", {"value_layout": lambda config: (1, 0)}, {}, {"values"}),
    ("bloom", {"value_layout": lambda config: (1, 0)}, {}, {"values"}),
    ("phi3", {"value_layout": lambda config: (4, 0)}, {"num_attention_heads": 4, "num_key_value_heads": 4}, {"values"}),
    ("llama", {"value": "k_proj"}, {}, {"values"}),
    ("llama", {"kv_heads": lambda config: 1}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"values"}),
    ("falcon", {"value_layout": lambda config: (1, 0)}, {"layout": 2}, {"values"}),
    # scales and caps
    ("granite", {"embed_scale": lambda config: 1.0}, {}, {"stream", "locations"}),
    ("granite", {"residual_scale": lambda config: 1.0}, {}, {"stream", "locations"}),
    ("granite", {"logit_scale": lambda config: 1.0}, {}, {"logits"}),
    ("cohere", {"logit_scale": lambda config: 1.0}, {}, {"logits"}),
    ("gemma2", {"logit_cap": lambda config: None}, {"final_logit_softcapping": 5.0}, {"logits"}),
    ("gemma2", {"logit_cap": lambda config: None}, {"final_logit_softcapping": 30.0}, {"logits"}),
    ("cohere", {"logit_cap": lambda config: 30.0}, {}, {"logits"}),
    # caps that a random model's own logits are far from
    ("gemma2", {"logit_cap": lambda config: None}, {"final_logit_softcapping": 200.0}, {"logits"}),
    ("llama", {"logit_cap": lambda config: 200.0}, {}, {"logits"}),
    ("granite", {"embed_scale": lambda config: 1.01 * config.embedding_multiplier}, {}, {"stream", "locations"}),
    ("granite", {"residual_scale": lambda config: 1.01 * config.residual_multiplier}, {}, {"stream", "locations"}),
    ("granite", {"logit_scale": lambda config: 1.01 / config.logits_scaling}, {}, {"logits"}),
    # norms
    ("gemma", {"norm_gain_offset": 0.0}, {}, {"values"}),
    ("llama", {"norm_gain_offset": 1.0}, {}, {"values"}),
    ("gemma2", {"norm_gain_offset": 0.0}, {}, {"heads", "stream", "values"}),
    ("olmo2", {"norm_gain_offset": 1.0}, {}, {"heads", "stream"}),
    ("gemma3_text", {"post_attention_norm": None}, {}, {"stream", "locations"}),
    ("gemma3_text", {"post_mlp_norm": None}, {}, {"stream", "locations"}),
    ("gpt_neox", {"input_norm": "post_attention_layernorm"}, {}, {"values"}),
    ("llama", {"input_norm": None}, {}, {"values"}),
    ("gpt2", {"layer_norm": False}, {}, {"values"}),
    ("llama", {"layer_norm": True}, {}, {"logits", "values"}),
    # what writes into the stream, and when
    ("gpt2", {"pos_embed": None}, {}, {"stream", "locations"}),
    ("bloom", {"embed": "word_embeddings"}, {}, {"stream", "locations"}),
    ("bloom", {"mlp": "mlp"}, {}, {"stream", "locations"}),
    ("gpt_neox", {"parallel": lambda config: False}, {"use_parallel_residual": True}, {"locations"}),
    ("gpt_neox", {"parallel": lambda config: True}, {"use_parallel_residual": False}, {"locations"}),
    ("llama", {"parallel": lambda config: True}, {}, {"locations"}),
    ("gpt2", {"final_norm": "h.0.ln_1"}, {}, {"stream", "logits"}),
    ("llama", {"mid": "mlp"}, {}, {"locations"}),
    ("gemma2", {"mid": "post_attention_layernorm"}, {}, {"locations"}),
    # what is inside of an MLP
    ("llama", {"act": "up_proj"}, {}, {"mlp"}),
    ("llama", {"act": "gate_proj"}, {}, {"mlp"}),
    ("llama", {"act": "nowhere"}, {}, {"mlp"}),
    ("gpt2", {"act": "c_fc"}, {}, {"mlp"}),
    ("llama", {"gated": False}, {}, {"mlp"}),
    ("gpt_neox", {"gated": True}, {}, {"mlp"}),
    ("opt", {"gated": True}, {}, {"mlp"}),
]


@pytest.mark.promise("exact")
@pytest.mark.parametrize(("family", "change", "settings_", "failing"), FALSE_ROWS)
def test_a_false_row_is_refused_with_the_identity_named(
    family: str, change: dict[str, Any], settings_: dict[str, Any], failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = model(family, 3, **settings_)
    assert view(hf).certificate.ok
    single = model(family, 3, torch.float32, **settings_)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **change))
    with pytest.raises(ModelError, match=r"not exact|does not give what they write"):
        view(hf, convention="raw")
    with pytest.raises(ModelError, match=r"not exact|does not give what they write") as refused:
        view(hf, convention="paper")
    assert failing <= set(re.findall(r"(\w+) (?:[\d.]+e|nan|inf)", str(refused.value)))
    with pytest.raises(ModelError, match=r"at most 1e-04 in float32"):
        view(single)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", {"attention": "nowhere"}, "is not exact.*relative error of stream"),
        ("llama", {"mid": "nowhere"}, "could not be run"),
        ("gpt2", {"value": "nowhere"}, "could not be run"),
        ("gpt_neo", {"interface": True}, "could not be run"),
    ],
)
def test_a_row_that_names_what_is_not_there_is_refused(
    family: str, change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **change))
    with pytest.raises(ModelError, match=says):
        view(model(family))


def test_every_write_is_copied_before_falcon_adds_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = model("falcon", layout=0)
    assert view(hf).certificate.ok
    keep = lambda store, key, lm, scale=1.0: lambda output, *_: store.update({key: output})  # noqa: E731
    monkeypatch.setattr(capture, "_keep", keep)
    with pytest.raises(ModelError, match=r"stream \d"):
        view(hf, convention="raw")
