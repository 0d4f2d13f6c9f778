"""Are sites that are named together those that are named one by one, and do edits of another kind do what they say?"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import unwrite as uw
from executed import weights
from methods import IDS, PAIRS
from unwrite.errors import NodeError, ResultError
from unwrite.model.load import view
from unwrite.model.view import Model

Edit = uw.Edit


@cache
def lm() -> Model:
    return view(weights("llama", 2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))


@torch.no_grad()
def ran(*sites: object, edits: Any = (), **more: Any) -> tuple[Any, Tensor]:
    with uw.trace(lm(), *sites, edits=edits, **more) as t:
        return t, lm().hf(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["L1.pattern", "L1.z", "L1KV*.k", "resid_post*", "MLP*", "L*H0", "q", "nodes"])
def test_several_sites_are_recorded_as_one_by_one(name: str) -> None:
    whole, _ = ran(name)
    for i, site in enumerate(whole.sites):
        alone, _ = ran(site)
        assert torch.equal(whole[site], alone[site])
        assert torch.equal(whole[name][:, i], alone[site])


def test_of_several_all_must_have_been_asked_for_and_be_alike() -> None:
    part, _ = ran("L1H0.z", "L1H1.z")
    with pytest.raises(NodeError, match=r"L1H2\.z was not asked for"):
        part["L1.z"]
    with pytest.raises(NodeError, match="no site L7"):
        ran("L7.z")
    mixed, _ = ran("L*.z", "MLP*.act")
    assert mixed["L*.z"].shape[:3] == (len(IDS), 8, IDS.shape[1])


@pytest.mark.parametrize("edit", [Edit.scale("L1.z", 0.5), Edit.add("resid_post*", 1.0, at=-1), Edit.set("L*H2", 0.0)])
def test_an_edit_of_several_is_an_edit_of_each(edit: Edit) -> None:
    t, _ = ran(edit.site)
    each = [Edit(site, edit.source, edit.alpha, edit.beta, gain=edit.gain, at=edit.at) for site in t.sites]
    assert torch.equal(ran(edits=edit)[1], ran(edits=each)[1])


def test_values_of_several_go_back_where_they_came_from() -> None:
    other = torch.roll(IDS, 1, 0)
    with torch.no_grad(), uw.trace(lm(), "L1.z", "L1.attn_out") as t:
        lm().hf(other, use_cache=False)
    patched = ran(edits=Edit.set("L1.z", t["L1.z"]))[1]
    torch.testing.assert_close(patched, ran(edits=Edit.set("L1.attn_out", t["L1.attn_out"]))[1])
    with pytest.raises(NodeError, match="other sites"):
        ran(edits=Edit.set("L1.z", t["L1.z"][:, :3]))


def test_effects_and_paths_take_them_too() -> None:
    several, each = (
        uw.effects(lm(), PAIRS, names, "all")["effect"] for names in (["L1H*"], [f"L1H{h}" for h in range(4)])
    )
    np.testing.assert_array_equal(several, each)
    found = uw.paths(lm(), PAIRS, "L0H*", ["L1.q", "MLP*"], "frozen")
    assert list(found["sender"].values) == [f"L0H{head}" for head in range(4)]
    assert list(found["receiver"].values) == [*(f"L1H{head}.q" for head in range(4)), "MLP0", "MLP1"]


def test_a_function_is_an_edit() -> None:
    clean, _ = ran("MLP0.act", "L1H0.z")
    seen: list[Tensor] = []

    def halved(x: Tensor) -> Tensor:
        seen.append(x)
        return x / 2

    got = ran(edits=Edit.set("MLP0.act", halved, at=[1, 3]))[1]
    torch.testing.assert_close(got, ran(edits=Edit.scale("MLP0.act", 0.5, at=[1, 3]))[1])
    assert torch.equal(seen[0], clean["MLP0.act"][:, [1, 3]])
    mean = clean["L1H0.z"].mean((0, 1))
    want = ran(edits=Edit.set("L1H0.z", mean))[1]
    torch.testing.assert_close(ran(edits=Edit.mean("L1H0.z"))[1], want)
    torch.testing.assert_close(ran(edits=Edit.mean("L1H0.z", clean["L1H0.z"]))[1], want)
    with pytest.raises(NodeError, match="gave another thing"):
        ran(edits=Edit.set("MLP0.act", lambda x: x[:1]))


def test_a_mean_of_several_is_that_of_each() -> None:
    clean, _ = ran("L1.z")
    each = [Edit.mean(site, clean[site]) for site in clean.sites]
    torch.testing.assert_close(ran(edits=Edit.mean("L1.z", clean["L1.z"]))[1], ran(edits=each)[1])


def test_every_pass_of_generate_is_kept() -> None:
    with torch.no_grad(), uw.trace(lm(), "resid_post1", "L0.z", every_pass=True) as t:
        ids = lm().hf.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad(), uw.trace(lm(), "resid_post1", "L0.z") as whole:
        lm().hf(ids[:, :-1])
    assert len(t.passes("resid_post1")) == 3
    torch.testing.assert_close(torch.cat(t.passes("resid_post1"), 1), whole["resid_post1"])
    torch.testing.assert_close(torch.cat(t.passes("L0.z"), 2), whole["L0.z"])
    with pytest.raises(NodeError, match="every_pass"):
        whole.passes("L0.z")


D, FEATURES = 32, 7


def saved(
    folder: Path, kind: str, into: int, out: int, features: int = FEATURES, **config: Any
) -> dict[str, np.ndarray]:
    """The weights of an autoencoder in a folder, as SAELens writes them."""
    draw = np.random.default_rng(3).normal
    weights = {"W_enc": draw(size=(into, features)), "W_dec": draw(size=(features, out)), "b_dec": draw(size=out)}
    names = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "r_mag", "b_mag")}.get(kind, ("b_enc",))
    weights |= {name: draw(size=features) for name in names}
    folder.mkdir()
    save_file({name: torch.from_numpy(part) for name, part in weights.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": kind, "d_in": into, "d_sae": features, **config}))
    return weights


def encoded(kind: str, w: dict[str, np.ndarray], x: np.ndarray, k: int = 0) -> np.ndarray:
    """Features by the equations as they stand."""
    made = x @ w["W_enc"]
    if kind == "gated":
        return np.where(made + w["b_gate"] > 0, np.maximum(made * np.exp(w["r_mag"]) + w["b_mag"], 0), 0)
    made = made + w["b_enc"]
    if kind == "jumprelu":
        return np.where(made > w["threshold"], np.maximum(made, 0), 0)
    if kind == "topk":
        made = np.where(made >= np.sort(made, -1)[..., -k, None], made, 0)
    return np.maximum(made, 0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("standard", {"apply_b_dec_to_input": True}), ("topk", {"k": 2, "apply_b_dec_to_input": False}), ("gated", {}),
     ("jumprelu", {"apply_b_dec_to_input": False})],
)  # fmt: skip
def test_features_are_edited_and_the_rest_stays(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    d = lm().d_model
    w = saved(tmp_path / "sae", kind, d, d, **config)
    sae = uw.sae(tmp_path / "sae")
    clean, _ = ran("resid_post0")
    x = clean["resid_post0"].numpy()
    a = encoded(kind, w, x - w["b_dec"] * config.get("apply_b_dec_to_input", True), config.get("k", 0))
    np.testing.assert_allclose(sae.encode(clean["resid_post0"]), a, rtol=1e-9, atol=1e-12)
    for edit, feature in (
        (Edit.scale("resid_post0", 0.0, basis=sae[[2, 4]]), -a[..., [2, 4]] @ w["W_dec"][[2, 4]]),
        (Edit.set("resid_post0", 5.0, basis=sae[2]), (5 - a[..., 2:3]) * w["W_dec"][2]),
        (Edit.add("resid_post0", 1.5, basis=sae[2], at=-1), np.eye(IDS.shape[1])[-1][:, None] * 1.5 * w["W_dec"][2]),
        (Edit.set("resid_post0", lambda f: 2 * f, basis=sae[4]), a[..., 4:5] * w["W_dec"][4]),
    ):
        want = torch.from_numpy(x + feature)
        torch.testing.assert_close(ran("resid_post0", edits=edit)[0]["resid_post0"], want)


def test_a_transcoder_reads_what_its_mlp_reads(tmp_path: Path) -> None:
    d = lm().d_model
    w = saved(tmp_path / "sae", "transcoder", d, d, apply_b_dec_to_input=False)
    sae, read = uw.sae(tmp_path / "sae"), []
    handle = lm().layers[1].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    clean, _ = ran("MLP1")
    handle.remove()
    a = encoded("standard", w, read[0].numpy())
    want = clean["MLP1"].numpy() - a[..., 3:4] * w["W_dec"][3]
    got, _ = ran("MLP1", edits=Edit.scale("MLP1", 0.0, basis=sae[3]))
    np.testing.assert_allclose(got["MLP1"], want, rtol=1e-9, atol=1e-10)
    with pytest.raises(NodeError, match="what an MLP does"):
        ran(edits=Edit.scale("resid_post0", 0.0, basis=sae))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "cfg.json").write_text("[]"), "no configuration"),
        (lambda folder: (folder / "cfg.json").unlink(), "is no configuration"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"x" * 99), "holds no weights"),
        (lambda folder: (folder / "cfg.json").write_text('{"architecture": "temporal"}'), "another kind"),
        (lambda folder: (folder / "cfg.json").write_text('{"normalize_activations": "layer_norm"}'), "normalize"),
        (lambda folder: (folder / "cfg.json").write_text('{"architecture": "topk"}'), "its k"),
        (lambda folder: (folder / "cfg.json").write_text('{"architecture": "gated"}'), "b_gate"),
        (lambda folder: save_file({"W_enc": torch.ones(2, 3), "W_dec": torch.ones(2, 2)},
                                  folder / "sae_weights.safetensors"), "do not fit"),
    ],
)  # fmt: skip
def test_what_is_no_autoencoder_is_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path / "sae", "standard", D, D)
    spoil(tmp_path / "sae")
    with pytest.raises(ResultError, match=said):
        uw.sae(tmp_path / "sae")


def test_only_its_own_features_can_be_chosen(tmp_path: Path) -> None:
    saved(tmp_path / "sae", "standard", D + 1, D + 1)
    sae = uw.sae(tmp_path / "sae")
    for wrong in (FEATURES, -1, [], [0, 0], "2", True, [0.0]):
        with pytest.raises(NodeError, match="no features"):
            sae[wrong]
    with pytest.raises(NodeError, match="another width"):
        ran(edits=Edit.scale("resid_post0", 0.0, basis=sae))
