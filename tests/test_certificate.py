"""Is the certificate one of the run that follows, and does a method that rests on what fails say so?"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Phi3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from typer.testing import CliRunner

import tiny
import unwrite as uw
from unwrite.cli import app
from unwrite.errors import ModelError, PrecisionError
from unwrite.model.families import FAMILIES
from unwrite.model.lengths import switches
from unwrite.model.single import in_float32

IDS = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(0))
Make = Callable[[], Any]


def llama(**settings: Any) -> Any:
    return tiny.model("llama", 3, num_hidden_layers=3, num_attention_heads=2, hidden_size=16, **settings)


def seeing_ahead() -> Any:
    """A decoder whose attention sees later tokens."""
    hf = llama()
    hf.config.is_causal = False
    for layer in hf.model.layers:
        layer.self_attn.is_causal = False
    return hf


def twice(module: Any, query: Tensor, *rest: Any, **settings: Any) -> Any:
    return sdpa_attention_forward(module, query * 2, *rest, **settings)


@contextmanager
def sharper(own: Any = twice) -> Iterator[None]:
    """A user's own attention function, by name: scores are twice the usual ones."""
    AttentionInterface.register("sharper", own)
    AttentionMaskInterface.register("sharper", sdpa_mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop("sharper")
        AttentionMaskInterface._global_mapping.pop("sharper")


def with_own_attention() -> Any:
    hf = llama()
    hf.config._attn_implementation = "sharper"
    return hf


def beside_its_unembedding() -> Any:
    """An adapter beside the unembedding: the module is not the map of its weight."""
    hf = llama()
    low = 0.3 * torch.randn(hf.config.hidden_size, hf.config.vocab_size, generator=torch.Generator().manual_seed(1))
    hf.lm_head.register_forward_hook(lambda _, args, output: output + args[0] @ low.to(output))
    return hf


def exchanged() -> Any:
    """Two layers exchanged, whose attention still looks up what was kept under its old number."""
    hf = llama()
    layers = hf.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    return hf


def without_a_layer() -> Any:
    hf = llama()
    del hf.model.layers[0]
    hf.config.num_hidden_layers -= 1
    return hf


def long_rope(first: int = 4) -> Any:
    """Other rotary frequencies for prompts that are longer than the first context."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    settings = Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, original_max_position_embeddings=first, eos_token_id=0,
        pad_token_id=0, initializer_range=0.3,
        rope_parameters={**rope, "original_max_position_embeddings": first, "factor": 16.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float64).eval()


@pytest.mark.promise("exact")
def test_a_decoder_that_sees_ahead_is_refused() -> None:
    with pytest.raises(ModelError, match=r"not causal.*relative error of causal"):
        uw.load(seeing_ahead())


# What fails for which model; what cannot be done then, and what can.
Ask = Callable[[Any], Any]


def scanned(lm: Any) -> Any:
    return uw.scan(lm, IDS)


def logits_of(lm: Any) -> Any:
    return uw.dla(lm, IDS, 3, 5)


def pattern(lm: Any) -> Any:
    with uw.trace(lm, "L0H0.pattern"):
        lm.hf(IDS)


def inside(lm: Any) -> Any:
    with uw.trace(lm, "L0H0.q", "L0H0.z"):
        lm.hf(IDS)


def copied(lm: Any) -> Any:
    return uw.corpus_dla(lm, IDS, "L0H0", ["L1H0"])


@pytest.mark.promise("exact")
@pytest.mark.parametrize(
    ("make", "identity", "cannot", "can"),
    [
        (with_own_attention, "opened", pattern, (scanned, logits_of, inside)),
        (with_own_attention, "opened", copied, ()),
        (beside_its_unembedding, "reading", logits_of, (scanned, pattern)),
    ],
)
def test_a_method_is_refused_with_the_identity_it_rests_on_and_others_work(
    make: Make, identity: str, cannot: Ask, can: tuple[Ask, ...]
) -> None:
    with sharper():
        lm = uw.load(make())
        assert lm.certificate.failing == (identity,)
        assert f"but for {identity}" in lm.certificate.explain()
        with pytest.raises(
            ModelError, match=rf"Got: relative error of {identity} [\d.e+-]+\. Expected: at most .*Next"
        ):
            cannot(lm)
        for ask in can:
            ask(lm)


def executed(hf: Any, base: Tensor, source: Tensor, layer: int, head: int, at: int) -> float:
    """What a head's value of the source run does to the difference of two logits, by two hooks and whole runs."""
    size = hf.config.hidden_size // hf.config.num_attention_heads
    seen: dict[str, Tensor] = {}

    def difference(ids: Tensor, hook: Any) -> float:
        handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = hf(ids, use_cache=False).logits[0, -1]
        handle.remove()
        return float(logits[3] - logits[5])

    def put(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[:, at, head * size : (head + 1) * size] = seen["z"][:, at, head * size : (head + 1) * size]
        return (z,)

    difference(source, lambda _, args: seen.update(z=args[0].clone()))
    return difference(base, put) - difference(base, lambda _, args: None)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("make", [exchanged, without_a_layer, long_rope])
def test_where_a_part_of_a_run_is_not_the_whole_runs_are_whole_and_exact(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    hf = make()
    lm = uw.load(hf)
    base = IDS[:1]
    source = base.clone()
    source[0, 2], source[0, 5] = 7, 9
    pairs = uw.pairs(base, source, 3, 5)
    effect = uw.effects(lm, pairs, "heads")["effect"]
    assert "every run is whole" in caplog.text
    for head, at in ((0, 2), (1, 5), (1, 7)):
        got = float(effect.sel(node=f"L1H{head}", position=at)[0])
        assert got == pytest.approx(executed(hf, base, source, 1, head, at), abs=1e-6)
    last = uw.effects(lm, pairs, "heads", at="last")["effect"].sel(node="L1H1")
    assert float(last[0]) == pytest.approx(executed(hf, base, source, 1, 1, 7), abs=1e-6)


@pytest.mark.promise("exact")
def test_whole_runs_give_what_parts_give(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, pairs = uw.load(llama()), uw.pairs(IDS[:2], IDS[1:], 3, 5)
    asks = {
        **{
            kind: partial(uw.effects, lm, pairs, kind)
            for kind in ("heads", "mlp_out", "shared_v", "q", "resid", "neurons")
        },
        "all": lambda: uw.effects(lm, pairs, "heads", at="all"),
        "resid": lambda: uw.effects(lm, pairs, "resid"),
        "resid, all": lambda: uw.effects(lm, pairs, "resid", at="all"),
        "paths": lambda: uw.paths(lm, pairs, "heads", "L2H0.v"),
    }
    parts = {name: ask() for name, ask in asks.items()}
    monkeypatch.setattr("unwrite.run.replay.clean.continued", lambda *_: False)
    for name, ask in asks.items():
        whole = ask()
        for variable, part in parts[name].data.data_vars.items():
            if part.dtype.kind == "f":
                np.testing.assert_allclose(whole[variable], part, rtol=1e-6, atol=1e-8, err_msg=f"{name} {variable}")


@pytest.mark.promise("exact")
@pytest.mark.parametrize("kind", ["seen", "added"])
def test_a_mask_of_the_callers_own_is_understood_where_attention_is_opened(kind: str) -> None:
    hf = llama()
    lm = uw.load(hf)
    seen = torch.ones(3, 1, 8, 8, dtype=torch.bool).tril()
    seen[:, :, 4:, 1] = False
    mask = seen if kind == "seen" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    with torch.no_grad():
        want = hf(IDS, attention_mask=mask).logits
        with uw.trace(lm, "L0H0.pattern"):
            got = hf(IDS, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(want, hf(IDS).logits, atol=1e-3)


def test_what_failed_is_read_in_the_message() -> None:
    with pytest.raises(ModelError) as refused:
        uw.dla(uw.load(beside_its_unembedding()), IDS, 3, 5)
    assert re.search(r"unembedding does not give its logits.*merge_and_unload", str(refused.value))


def windowed(window: int) -> Any:
    return tiny.model("mistral", 3, sliding_window=window, num_hidden_layers=2)


@pytest.mark.promise("exact")
def test_a_prompt_beyond_every_switch_is_tried_or_it_is_said_that_none_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switches(uw.load(windowed(12))) == (12,)
    lengths: list[int] = []
    hf = windowed(12)
    keep = lambda _, args, named: lengths.append(named["input_ids"].shape[1])  # noqa: E731
    hf.model.register_forward_pre_hook(keep, with_kwargs=True)
    certificate = uw.load(hf).certificate
    assert max(lengths) == 14
    assert certificate.ok
    assert certificate.unchecked is None
    monkeypatch.setattr("unwrite.model.lengths._WORK", 0.0)
    lm = uw.load(windowed(12))
    assert lm.certificate.unchecked == 12
    assert lm.certificate.explain().endswith("not checked beyond 12 tokens, where the model computes otherwise")
    assert uw.scan(lm, IDS).provenance["model"]["certificate_beyond"] == 12
    assert uw.load(windowed(4)).certificate.unchecked is None


@pytest.mark.promise("exact")
def test_what_is_false_only_beyond_a_switch_is_found() -> None:
    assert uw.load(long_rope()).certificate.failing == ("continued",)
    late = long_rope(12)
    assert uw.load(late).certificate.failing == ("continued",)

    def own(module: Any, query: Tensor, key: Tensor, *rest: Any, **settings: Any) -> Any:
        return sdpa_attention_forward(module, query * (2 if key.shape[2] > 12 else 1), key, *rest, **settings)

    with sharper(own):
        hf = windowed(12)
        hf.config._attn_implementation = "sharper"
        assert uw.load(hf).certificate.failing == ("opened", "continued")


SCALES = [
    ("granite", {name: partial(lambda scale, config: 1.04 * scale(config), getattr(FAMILIES["granite"], name))}, {})
    for name in ("embed_scale", "residual_scale", "logit_scale")
]
CAPS = [("gemma2", {"logit_cap": lambda config: None}, {"final_logit_softcapping": cap}) for cap in (5.0, 30.0)]


@pytest.mark.promise("exact")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "change", "settings"), [*SCALES, *CAPS])
def test_rounding_hides_no_false_row(
    family: str, change: dict[str, Any], settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = tiny.model(family, 3, dtype, **settings)
    assert uw.load(hf).certificate.ok
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **change))
    with pytest.raises(ModelError, match=r"not exact.*Expected: at most 1e-04 in float32 of these .*float16 weights"):
        uw.load(hf)


def test_the_limit_of_half_precision_is_the_models_own_rounding() -> None:
    hf = tiny.model("llama", 3, torch.bfloat16)
    certificate = uw.load(hf).certificate
    full = tiny.model("llama", 3, torch.bfloat16).float()
    with torch.no_grad():
        own, exact = hf(IDS).logits.float(), full(IDS).logits
    rounding = float(((own - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    assert certificate.rounding == pytest.approx(rounding, rel=0.7)
    assert certificate.limit == max(2e-2, 3 * certificate.rounding)
    assert max(certificate.single.values()) < 1e-5
    assert f"{certificate.rounding:.0e} from those of float32" in certificate.explain()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_lent_in_float32_and_given_back(family: str) -> None:
    hf = tiny.model(family, 3, torch.bfloat16)
    before, ids = tiny.snapshot(hf), IDS % hf.config.vocab_size
    with torch.no_grad(), in_float32(hf):
        lent = hf(ids).logits
    assert tiny.snapshot(hf) == before
    with torch.no_grad():
        torch.testing.assert_close(lent, copy.deepcopy(hf).float()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_overflows_is_refused_with_the_next_step(tmp_path: Path) -> None:
    hf = tiny.model("llama", 3, torch.float16)
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.mul_(2e5).clamp_(-6e4, 6e4)
    with pytest.raises(PrecisionError, match=r"overflows float16.*--dtype float32"):
        uw.load(hf)
    hf.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path), "--dtype", "float16", "-n", "2", "--length", "8"])
    assert shown.exit_code == 1
    assert "✗ precision: " in shown.stdout
    assert "--dtype float32" in " ".join(shown.stdout.split())


def test_half_precision_on_a_cpu_is_computed_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.model("llama", 3, torch.bfloat16).save_pretrained(tmp_path)
    assert uw.load(tmp_path).dtype == torch.float32
    assert caplog.text.count("dtype='auto' keeps bfloat16") == 1
    assert uw.load(tmp_path, dtype="auto").dtype == torch.bfloat16
    tiny.model("llama", 3, torch.float64).save_pretrained(tmp_path)
    assert uw.load(tmp_path).dtype == torch.float64


@pytest.mark.promise("exact")
def test_an_mlp_of_the_users_own_is_refused_where_its_hidden_activations_are_asked_for() -> None:
    hf = llama()
    own = hf.model.layers[0].mlp.forward
    hf.model.layers[0].mlp.forward = lambda x: 0.5 * own(x)
    lm = uw.load(hf)
    assert lm.certificate.failing == ("mlp",)
    scanned(lm)
    logits_of(lm)
    with pytest.raises(ModelError, match="last projection of LlamaForCausalLM's MLPs does not give what they write"):
        uw.effects(lm, uw.pairs(IDS[:2], IDS[1:], 3, 5), "neurons")
