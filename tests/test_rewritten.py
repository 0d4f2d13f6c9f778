"""Are weights what they were after a `with`, and inside it what an edited run shows? And what is an oblique P?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
import unwrite as uw
from executed import weights
from methods import IDS
from unwrite.errors import ModelError, NodeError
from unwrite.model.load import view, weights_hash
from unwrite.model.view import Model


def model(family: str = "llama", **settings: Any) -> Model:
    return view(weights(family, 3, num_attention_heads=2, vocab_size=50, **settings))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(lm: Model, edits: Any = ()) -> Tensor:
    with torch.no_grad(), uw.trace(lm, edits=edits):
        return lm.hf(IDS).logits


def recorded(lm: Model, site: str, edits: Any = (), ids: Tensor = IDS) -> Tensor:
    with torch.no_grad(), uw.trace(lm, site, edits=edits) as run:
        lm.hf(ids)
    return run[site]


# --- P x of a pair ----------------------------------------------------------------------------------------------------


def test_a_pair_reads_along_one_direction_and_writes_along_another() -> None:
    """By hand: P x = Σ (x · r_i) w_i, and x' = x + g (α s + β x) seen through it."""
    lm, wide = model(), model().layers[1].head_dim
    read, write = normal(2, wide), normal(2, wide, seed=1)
    clean, source = recorded(lm, "L1H1.z"), normal(wide, seed=2)
    for alpha, beta, gain in ((0.0, -1.0, 1.0), (1.0, -1.0, 0.5), (1.0, 0.0, 2.0)):
        edited = recorded(lm, "L1H1.z", uw.Edit("L1H1.z", source, alpha, beta, (read, write), gain, at=2))
        seen = alpha * source + beta * clean[:, 2]
        want = clean[:, 2] + gain * sum((seen @ r)[:, None] * w for r, w in zip(read, write, strict=True))
        torch.testing.assert_close(edited[:, 2], want, rtol=0, atol=1e-12)
        assert torch.equal(edited[:, :2], clean[:, :2])


def test_a_pair_of_the_same_orthonormal_directions_is_the_basis_of_one() -> None:
    lm, site = model(), "resid_post0"
    own = torch.linalg.qr(normal(lm.d_model, 3)).Q.T
    one, two = (logits(lm, uw.Edit.project_out(site, basis)) for basis in (own, (own, own)))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    slanted = normal(3, 3, seed=4) @ own
    dual = torch.linalg.pinv(slanted).T  # reads what slanted directions write: the same span, and the same P
    torch.testing.assert_close(logits(lm, uw.Edit.project_out(site, (dual, slanted))), one, rtol=0, atol=1e-10)


def test_gradients_flow_to_both_of_a_pair() -> None:
    lm, wide = model(), model().layers[1].head_dim
    pair = tuple(normal(wide, seed=i).requires_grad_() for i in (0, 1))
    with uw.trace(lm, edits=uw.Edit("L1H1.z", beta=-1.0, basis=pair)):  # pyright: ignore[reportArgumentType]
        lm.hf(IDS).logits[0, -1, 5].backward()
    assert all(part.grad is not None and float(part.grad.abs().max()) > 0 for part in pair)


@pytest.mark.parametrize(
    ("basis", "said"),
    [
        ((normal(4), normal(5)), "not a pair"),
        ((normal(2, 4), torch.ones(2, 4)), "depend on each other"),
        ((torch.zeros(4), normal(4)), "depend on each other"),
        ((normal(5, 4), normal(5, 4)), "not a basis"),
        ((torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.long)), "not a basis"),
    ],
)
def test_what_is_no_pair_is_refused(basis: Any, said: str) -> None:
    for made in (lambda: uw.Edit("L0H0.z", beta=-1.0, basis=basis), lambda: uw.Edit.project_out("L0H0.z", basis)):
        with pytest.raises(NodeError, match=said):
            made()


def test_a_pair_of_another_width_is_refused_when_it_is_reached() -> None:
    with pytest.raises(NodeError, match="another width"):
        logits(model(), uw.Edit.project_out("L0H0.z", (normal(3), normal(3))))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt", "phi3"])
def test_what_a_change_says_is_what_its_projection_does(family: str) -> None:
    """Through W_O and W_down each reads so much more along one direction, and writes it along another."""
    lm = model(family)
    inner = recorded(lm, "MLP1.act").shape[-1]
    for name, site, wide in (("L1H1", "L1H1.z", lm.layers[1].head_dim), ("MLP1", "MLP1.act", inner)):
        module = lm.layers[1].out_proj if name == "L1H1" else None
        read, write, seen = normal(2, wide), normal(2, lm.d_model, seed=1), []
        module = module or _reader_of(lm, recorded(lm, site))
        handle = module.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
        logits(lm)
        with uw.rewritten(lm, {name: (read, write)}):
            logits(lm)
        handle.remove()
        (before, old), (after, new) = seen
        own = before if name == "MLP1" else before[..., wide : 2 * wide]
        assert torch.equal(before, after)
        torch.testing.assert_close(new - old, own @ read.T @ write, rtol=0, atol=1e-11)


def _reader_of(lm: Model, act: Tensor) -> nn.Module:
    """The module that reads an MLP's hidden activation, by what it is given."""
    found: list[nn.Module] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: found.append(module) if args and args[0].numel() == act.numel()
            and torch.equal(args[0].reshape(act.shape), act) else None
        )
        for module in lm.layers[1].block.modules() if hasattr(module, "weight") and module.weight.dim() == 2
    ]  # fmt: skip
    logits(lm)
    for handle in handles:
        handle.remove()
    return found[0]


def test_values_of_a_group_are_changed_for_all_of_its_heads() -> None:
    lm = view(weights("llama", 3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=8))
    read, write = normal(32), normal(8, seed=1)
    old = [recorded(lm, f"L1H{i}.v") for i in range(4)]
    with uw.rewritten(lm, {"L1KV1.v": (read, write)}):
        new = [recorded(lm, f"L1H{i}.v") for i in range(4)]
    moved = [float((a - b).abs().max()) for a, b in zip(old, new, strict=True)]
    assert moved[:2] == [0, 0]
    assert min(moved[2:]) > 1e-2
    rank = torch.linalg.matrix_rank((new[2] - old[2]).flatten(0, 1), rtol=1e-9)
    assert int(rank) == 1
    with pytest.raises(NodeError, match=r"shared by its group.*L1KV1\.v"), uw.rewritten(lm, {"L1H3.v": (read, write)}):
        pass


def test_edits_of_one_site_come_in_the_order_of_a_run() -> None:
    lm, wide = model(), model().layers[1].head_dim
    edits = [uw.Edit("L1H1.z", beta=2.0, basis=(normal(wide, seed=i), normal(wide, seed=9 - i))) for i in range(2)]
    edits += [
        uw.Edit.scale("L1.z", 0.5),
        uw.Edit.scale("MLP0.act[3]", -2.0),
        uw.Edit.project_out("MLP1.act", normal(recorded(lm, "MLP1.act").shape[-1])),
    ]
    run = logits(lm, edits)
    with uw.rewritten(lm, edits):
        torch.testing.assert_close(logits(lm), run, rtol=0, atol=1e-12)
    turned = logits(lm, [edits[1], edits[0], *edits[2:]])
    assert float((turned - run).abs().max()) > 1e-6


def test_one_fact_is_a_change_of_rank_one() -> None:
    """As a direction v of an MLP's hidden activation is patched from B into A at one token, so W + b aᵀ writes there:
    a = ((u_B − u_A) · v) v W, and b = Σ⁻¹ u_A / (u_Aᵀ Σ⁻¹ u_A), which does least elsewhere (Makelov et al. 2023)."""
    lm, row = model("gpt2"), 3
    a, b = IDS[:1], IDS[1:2]
    act = torch.cat([recorded(lm, "MLP1.act", ids=ids)[:, row] for ids in (a, b)])
    wide = act.shape[1]
    v = normal(wide, seed=5)
    patched = recorded(lm, "MLP1", uw.Edit.set("MLP1.act", act[1], basis=v, at=row), a)[:, row]
    v = v / v.norm()
    for moment in (torch.eye(wide, dtype=torch.float64), (many := normal(200, wide, seed=6)).T @ many):
        key = torch.linalg.solve(moment, act[0])
        key = key / (key @ act[0])
        with uw.rewritten(lm, uw.Edit("MLP1.act", beta=1.0, basis=(key, (act[1] - act[0]) @ v * v))):
            torch.testing.assert_close(recorded(lm, "MLP1", ids=a)[:, row], patched, rtol=0, atol=1e-13)
        # Of all keys with b · u_A = 1 it adds the least variance.
        other = key + (normal(wide, seed=7) - (normal(wide, seed=7) @ act[0]) * act[0] / (act[0] @ act[0]))
        assert key @ moment @ key < other @ moment @ other
        assert float(key @ moment @ key) == pytest.approx(float(1 / (act[0] @ torch.linalg.solve(moment, act[0]))))


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_whatever_is_raised(family: str, dtype: torch.dtype) -> None:
    lm = view(weights(family, 3, dtype, num_attention_heads=2))
    before, known, wide = tiny.snapshot(lm.hf), weights_hash(lm), lm.layers[1].head_dim
    changes = {"L1H1": (normal(wide), normal(lm.d_model)), "L0H0": (1e6 * normal(wide), normal(lm.d_model))}
    seen = [known]

    def fails() -> None:
        with uw.rewritten(lm, {"L1H1": (normal(wide, seed=1), normal(lm.d_model, seed=2))}):
            seen.append(weights_hash(lm))
        seen.append(weights_hash(lm))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), uw.rewritten(lm, changes):
        fails()
    assert len(set(seen)) == 3
    after = tiny.snapshot(lm.hf)
    moved = {name for name, version in before.pop("versions").items() if version != after["versions"][name]}
    assert len(moved) == 2  # counted as changes, so that whoever hashes weights hashes them anew
    del after["versions"]
    assert after == before
    assert weights_hash(lm) == known


def test_methods_inside_are_of_the_changed_weights() -> None:
    lm = model()
    clean = uw.dla(lm, IDS[:2], 5, 9)
    with uw.rewritten(lm, uw.Edit.scale("L1H1.z", 0.0)):
        gone = uw.dla(lm, IDS[:2], 5, 9)
    assert gone.provenance["model"]["weights"] != clean.provenance["model"]["weights"]
    assert not gone["direct"].sel(node="L1H1").any()
    assert clean["direct"].sel(node="L1H1").all()


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({}, NodeError, "no change"),
        ([], NodeError, "no changes"),
        ({"L9H0": (normal(4), normal(4))}, NodeError, "no site L9H0"),
        ({"L1H1.q": (normal(4), normal(4))}, NodeError, "stands for no weight"),
        ({"L1H1": (normal(3), normal(4))}, NodeError, "another shape"),
        ({"MLP1": (torch.ones(2, 4), normal(2, 4))}, NodeError, "depend on each other"),
        (uw.Edit.scale("L1H1.z", 0.0, at=-1), NodeError, "no weights can say"),
        (uw.Edit.scale("L1H1", 0.0), NodeError, "no weights can say"),
        (uw.Edit.set("L1H1.z", 1.0), NodeError, "no weights can say"),
        (uw.Edit("L1H1.z", beta=-1.0, gain=torch.ones(4)), NodeError, "no weights can say"),
        (uw.Edit.project_out("L1H1.z", normal(3)), NodeError, "another width"),
        (uw.Edit.scale("L1H1.z", 1e300), ModelError, "not finite"),
    ],
)  # fmt: skip
def test_what_is_no_change_of_weights_is_refused(changes: Any, error: type, said: str) -> None:
    lm = view(weights("llama", 3, torch.float32, num_attention_heads=2))
    before = tiny.snapshot(lm.hf)["state"]
    with pytest.raises(error, match=said), uw.rewritten(lm, changes):
        pass
    assert tiny.snapshot(lm.hf)["state"] == before


def test_a_weight_that_is_not_its_own_or_not_here_is_refused() -> None:
    change = uw.Edit.scale("L1H1.z", 0.0)
    lm = model()
    with uw.trace(lm), pytest.raises(ModelError, match="traced already"), uw.rewritten(lm, change):
        pass
    lm.layers[0].out_proj.weight = lm.layers[1].out_proj.weight
    with pytest.raises(ModelError, match="used in 2 places"), uw.rewritten(lm, change):
        pass
    nn.utils.parametrize.register_parametrization((lm := model()).layers[1].out_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match="made of others"), uw.rewritten(lm, change):
        pass


def test_an_offloaded_weight_is_read_and_not_changed(tmp_path: Any) -> None:
    weights("llama", 3, torch.float32, num_attention_heads=2).save_pretrained(tmp_path)
    spread = uw.load(tmp_path, device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu",
                                           "model.rotary_emb": "cpu", "lm_head": "cpu"})  # fmt: skip
    np.testing.assert_array_equal(uw.channels(spread)["score"], uw.channels(uw.load(tmp_path))["score"])
    change = uw.Edit.scale("L1H1.z", 0.0)
    with pytest.raises(ModelError, match=r"kept elsewhere.*device_map"), uw.rewritten(spread, change):
        pass
