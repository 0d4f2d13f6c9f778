"""Does a subspace carry what it is said to carry, is an illusion called one, and is what is patched really executed?"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import unwrite as uw
from executed import exact, weights
from patching import Alone, alone, contrasts, site
from test_mask import WIDTH, by_hand, scenes, shell
from unwrite.cli.options import Common
from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.model.load import untrained, view, weights_hash
from unwrite.model.view import Model
from unwrite.report.views import listings, words
from unwrite.run.backward.seen import seen
from unwrite.run.backward.slopes import sloping
from unwrite.run.backward.subspaces import Lesson, aligning
from unwrite.run.edit.slots import slots
from unwrite.run.edit.subspace import alike, along, as_far, exchanged, given, halves, of_classes, orthonormal, spanned
from unwrite.run.pairs.exchanges import Sample, grouped
from unwrite.stats import subspaces
from unwrite.stats.jackknife import ratio
from unwrite.stats.subspaces import PATCHES, Evidence, Numbers, evidence, word

# --- numbers by hand --------------------------------------------------------------------------------------------------

E1, E2, E3 = torch.eye(3, dtype=torch.float64)
# x ↦ h = (x, 0, x), y = (0, 2, 1) · h: what is patched of a change of x by 1.
READS, CHANGE = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(("direction", "whole", "raw"), [(E3, 1, 0.2), (E1 + E2, 1, 0.4), (E1, 0, 0), (E2, 0, 0.8)])
def test_the_three_neurons_of_the_paper(direction: Tensor, whole: float, raw: float) -> None:
    """Makelov et al. 2023, §3: with an output of one number the renormalised row part cannot tell them apart."""
    basis = given(direction[None])
    split = halves(basis, spanned(READS[None]))
    effect = {name: float((along(CHANGE, part) @ READS).sum()) for name, part in split._asdict().items()}
    assert float(along(CHANGE, basis) @ READS) == pytest.approx(whole, abs=1e-12)
    assert effect["row_raw"] == pytest.approx(raw, abs=1e-12)
    assert effect["row"] == pytest.approx(1 if raw else 0, abs=1e-12)
    assert effect["null"] == pytest.approx(0, abs=1e-12)
    assert effect["null_raw"] == pytest.approx(0, abs=1e-12)


def test_a_planted_kernel_reads_by_one_half_and_writes_by_the_other() -> None:
    """d_mlp 32 → d 8: the slope along t is ½ · (dorm W · t) / |t|² exactly, that of both parts 0."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(32, 8, generator=draw, dtype=torch.float64)
    t = torch.randn(8, generator=draw, dtype=torch.float64)
    columns = spanned(w.mT)
    noise = torch.randn(32, generator=draw, dtype=torch.float64)
    silent = noise - along(noise[None], columns)[0]
    silent = silent / silent.norm()
    loud = w @ torch.linalg.solve(w.mT @ w, t)
    loud = loud / loud.norm()
    basis = given((silent + loud)[None])
    split = halves(basis, columns)
    change = silent[None]
    slope = {
        name: float(along(change, part) @ w @ t) / float(t @ t)
        for name, part in {"v": basis, **split._asdict()}.items()
    }
    assert slope["v"] == pytest.approx(0.5 * float(loud @ w @ t) / float(t @ t), rel=1e-12)
    assert abs(slope["row"]) < 1e-12
    assert abs(slope["null"]) < 1e-12
    assert float(split.null_raw.pow(2).sum()) == pytest.approx(0.5, abs=1e-12)
    assert abs(float(alike(split.row, given(loud[None])))) == pytest.approx(1, abs=1e-12)


def test_bases_by_hand() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(3, dtype=torch.float64))
    assert (basis * rows).sum(-1).gt(0).all()  # turned, and not turned round
    torch.testing.assert_close(along(rows, basis), rows)
    turned = orthonormal(torch.randn(3, 3, generator=draw, dtype=torch.float64)) @ basis
    x = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(along(x, turned), along(x, basis))
    assert alike(basis, turned) == pytest.approx(1)
    assert alike(basis, torch.eye(6, dtype=torch.float64)[:3]) == pytest.approx(
        np.mean(np.cos(scipy_angles(basis, torch.eye(6)[:3])) ** 2)
    )
    assert torch.equal(
        exchanged(x, rows.sum(0).expand(4, 6), given(torch.eye(6, dtype=torch.float64))), rows.sum(0).expand(4, 6)
    )
    assert len(spanned(torch.cat([rows, rows.sum(0, keepdim=True)]))) == 3
    with pytest.raises(NodeError, match="depend on each other"):
        given(torch.stack([rows[0], 2 * rows[0]]))
    far = as_far(x, 3 * rows.sum(0).expand(4, 6))
    torch.testing.assert_close(far.norm(dim=-1), (3 * rows.sum(0)).norm().expand(4))
    assert torch.nn.functional.cosine_similarity(far, x).min() > 1 - 1e-12


def scipy_angles(one: Tensor, other: Tensor) -> np.ndarray:
    from scipy.linalg import subspace_angles

    return subspace_angles(one.numpy().T.astype(float), other.numpy().T.astype(float))


def test_two_classes_that_go_opposite_ways_are_their_difference() -> None:
    draw = torch.Generator().manual_seed(2)
    v = torch.randn(5, generator=draw, dtype=torch.float64)
    sign = torch.tensor([1, -1, 1, -1, 1, 1], dtype=torch.float64)
    noise = 0.1 * torch.randn(6, 5, generator=draw, dtype=torch.float64)
    noise -= noise.mean(0)
    rows = sign[:, None] * v + noise
    label = ["ab" if one > 0 else "ba" for one in sign]
    up, down = rows[sign > 0].mean(0), rows[sign < 0].mean(0)
    found = of_classes(rows, label, 1)
    # The leading direction of both means, each as heavy as its rows.
    by_hand_ = np.linalg.svd(np.stack([up * 4**0.5, down * 2**0.5]))[2][:1]
    assert alike(found, torch.from_numpy(by_hand_)) == pytest.approx(1)
    assert alike(found, given((up - down)[None])) > 0.999
    assert len(of_classes(rows, label, 5)) == 2


def test_intervals_of_several_looks_are_bonferronis() -> None:
    rng, cluster = np.random.default_rng(0), np.repeat([0, 1, 2, 3], 3)
    above, below = rng.random(12), rng.random(12)
    one, many = (ratio(above, below, cluster, looks) for looks in (1, 5))
    half = [(high - low) / 2 for _, low, high in (one, many)]
    t = [scipy_stats.t.ppf(1 - 0.025 / looks, 3) for looks in (1, 5)]
    assert half[1] / half[0] == pytest.approx(t[1] / t[0])
    assert one[0] == many[0]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def shown(**values: tuple[float, float, float]) -> Numbers:
    every = np.full((3, len(PATCHES)), np.nan)
    for name, value in values.items():
        every[:, PATCHES.index(name)] = value
    return Numbers(*every)


def told(share_full: Any, share_row: Any = (np.nan,) * 3, spread: Any = (np.nan, np.nan), **more: Any) -> str:
    above = more.get("above", (1.0, 0.8, 1.2))
    found = Evidence(
        shown(subspace=more.get("effect", (1.0, 0.8, 1.2)), random=(0, -0.1, 0.1), arbitrary=(0, -0.1, 0.1)),
        shown(full=share_full, row=share_row), shown(random=above, arbitrary=(1.0, 0.9, 1.1)),
        shown(clean=(0, 0, 0.1), subspace=more.get("rate", (0.6, 0.4, 0.8)), random=(0, 0, 0.1), arbitrary=(0, 0, 0)),
        np.array(spread, float), more.get("complete", True),
    )  # fmt: skip
    return word(found)


SURE, SMALL, OPEN = (0.9, 0.8, 1.0), (0.3, 0.2, 0.4), (0.5, 0.3, 0.7)


@pytest.mark.parametrize(
    ("verdict", "case"),
    [
        ("carried", {"share_full": SURE}),
        ("carried", {"share_full": SURE, "share_row": SURE, "spread": (2, 1)}),
        ("illusion", {"share_full": SURE, "share_row": SMALL, "spread": (2, 1)}),
        ("illusion", {"share_full": SMALL, "share_row": OPEN, "spread": (0.4, 1)}),
        ("undecided", {"share_full": SMALL, "share_row": OPEN, "spread": (0.6, 1)}),
        ("undecided", {"share_full": OPEN, "share_row": SURE, "spread": (0.4, 1)}),
        ("mixed", {"share_full": SMALL, "share_row": SURE, "spread": (0.6, 1)}),
        # Readers that are named may not be all.
        ("mixed", {"share_full": SURE, "share_row": SMALL, "spread": (2, 1), "complete": False}),
        # The answer is pushed, and does not turn, or nobody knows.
        ("mixed", {"share_full": SURE, "rate": (0.02, 0.0, 0.08)}),
        ("undecided", {"share_full": SURE, "rate": (0.05, 0.0, 0.2)}),
        ("nothing", {"share_full": SURE, "above": (0.02, -0.01, 0.05)}),
        ("undecided", {"share_full": SURE, "above": (0.3, -0.1, 0.7)}),
        ("undecided", {"share_full": SURE, "above": (np.nan,) * 3}),
        ("undecided", {"share_full": (np.nan,) * 3}),
    ],
)
def test_a_word_asks_for_all_that_its_rule_says(verdict: str, case: dict[str, Any]) -> None:
    assert told(**case) == verdict
    assert verdict in subspaces.WORDS


def test_evidence_is_a_ratio_of_sums() -> None:
    rng, cluster = np.random.default_rng(3), np.repeat([0, 1, 2], 4)
    turned, clean = rng.random((len(PATCHES), 12)), rng.random(12) + 1
    match = (rng.random((len(PATCHES), 12)) < 0.5).astype(float)
    found = evidence(turned, clean, match, cluster, np.ones(2), True, 2)
    for i, name in enumerate(PATCHES):
        own = turned[PATCHES.index("subspace")]
        assert found.effect.of(name)[0] == pytest.approx(turned[i].sum() / clean.sum())
        assert found.share.of(name)[0] == pytest.approx(turned[i].sum() / own.sum())
        assert found.above.of(name)[0] == pytest.approx((own - turned[i]).sum() / clean.sum())
        assert found.rate.of(name)[0] == pytest.approx(match[i].mean())


# --- planted: a carrier, and a kernel ---------------------------------------------------------------------------------

_SIGNAL, _SILENT, _LOUD = 15, 0, 1


@cache
def with_kernel() -> Model:
    """The model by hand with two hidden units between the head that asks and the one that moves.

    One knows which word of order there was, and nothing reads it; the other would turn the signal round, and never
    moves.
    """
    hf = copy.deepcopy(by_hand().hf)
    mlp = hf.transformer.h[0].mlp
    for i, sign in enumerate((1.0, -1.0)):
        mlp.c_fc.weight.data[_SIGNAL + i, _SILENT] = 2 * sign
        mlp.c_proj.weight.data[_LOUD, _SIGNAL + i] = 4 * sign
    return view(hf)


FEW: dict[str, Any] = {"seeds": 2, "steps": 40, "lr": 0.1}


@cache
def illusion() -> uw.Result:
    return uw.subspace(with_kernel(), scenes("order"), "MLP0.act", **FEW)


def verdict(found: uw.Result) -> str:
    return str(found["verdict"].item())


def fldd(found: uw.Result, patch: str) -> float:
    return float(found["fldd"].sel(patch=patch))


@pytest.mark.promise("planted")
def test_a_planted_carrier_is_found_and_carried() -> None:
    """What head 0 of layer 0 says of the word of order lies along one difference of two coordinates."""
    found = uw.subspace(by_hand(), scenes("order"), "resid_post0", readers=["L1H0.q"], **FEW)
    wanted = torch.zeros(WIDTH, dtype=torch.float64)
    wanted[[_SIGNAL, _SIGNAL + 1]] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # Once every answer has turned nothing leads on, so a rest of the random direction stays; by chance it is 1/32.
    assert alike(torch.from_numpy(found["basis"].values), given(wanted[None])) > 0.8
    assert verdict(found) == "carried"
    assert found["match"].sel(patch="subspace").values.all()
    assert float(found["rate"].sel(patch="clean")) == 0
    assert fldd(found, "full") == pytest.approx(200, abs=1)
    assert fldd(found, "subspace") > 150
    assert fldd(found, "row") > 150
    assert abs(fldd(found, "null")) < 1
    assert abs(fldd(found, "untrained")) < 20
    assert found["agreement"].values.min() > 0.7
    assert found.data.attrs["templates"] == 3


@pytest.mark.promise("planted")
def test_a_planted_kernel_is_an_illusion() -> None:
    lm, pairs, found = with_kernel(), scenes("order"), illusion()
    assert abs(fldd(found, "full")) < 5
    assert fldd(found, "subspace") > 35
    assert fldd(found, "row") < fldd(found, "subspace") / 2
    assert abs(fldd(found, "null")) < 1e-6
    assert verdict(found) == "illusion"
    assert found["norm"].values.tolist() == pytest.approx([0.5**0.5] * 2, abs=0.1)
    assert float(found["spread"].sel(part="row")) < 0.1 * float(found["spread"].sel(part="null"))
    # In one call both keep their word, though their intervals are wider.
    both = uw.subspace(lm, pairs, ["MLP0.act", "resid_post0"], **FEW)
    assert both["verdict"].values.tolist() == ["illusion", "carried"]
    assert both["basis"].dims == ("site", "direction", "coordinate")
    assert both["basis"].sel(site="MLP0.act").notnull().sum() == 4
    one, two = (
        float(f["fldd_high"].sel(patch="subspace") - f["fldd_low"].sel(patch="subspace"))
        for f in (found, both.data.sel(site="MLP0.act"))
    )
    assert two > one


def test_one_number_of_a_query_is_enough() -> None:
    """The query of the head that moves is one of two vectors."""
    found = uw.subspace(by_hand(), scenes("order"), "L1H0.q", 1, method="svd", restrict=True, draws=5)
    kept = found["kept"].values
    assert kept[0] == 0
    assert kept[1] == pytest.approx(1, abs=1e-2)
    assert float(found["variance"][1]) > 0.99
    assert float(found["random_kept"].isel(rank=1).max()) < 0.9
    assert "1 of 16 directions keep 1.00" in words(found)


# --- what is patched is executed --------------------------------------------------------------------------------------


@cache
def model(family: str = "llama", seed: int = 1) -> Model:
    shared: dict[str, Any] = {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    return view(weights(family, seed, num_attention_heads=4, num_hidden_layers=2, hidden_size=32, **shared))


def random_pairs(lengths: tuple[int, ...] = (5, 6, 6, 5)) -> uw.Pairs:
    made = contrasts(lengths)
    return uw.pairs(
        made.base,
        made.source,
        made.answer,
        made.against,
        roles={"a": 1},
        template=[f"t{i}" for i in range(len(lengths))],
    )


def same_tokens(pairs: uw.Pairs) -> dict[int, int]:
    assert pairs.against is not None
    return {int(i): int(i) for i in [*pairs.answer, *pairs.against]}


def traced(lm: Model, one: Alone, name: str, row: int, value: Tensor) -> Tensor:
    """Logits at the read row when a site is set to a value at one row of the user's own model."""
    units = name.split("+")
    each = value.view(len(units), -1)
    edits = [uw.Edit.set(site(unit), each[i][None, None], at=row) for i, unit in enumerate(units)]
    with uw.trace(lm, edits=edits), torch.no_grad():
        return lm.hf(one.base[None], use_cache=False).logits[0, one.row]


def values_at(lm: Model, ids: Tensor, name: str, row: int) -> Tensor:
    units = [site(unit) for unit in name.split("+")]
    with uw.trace(lm, *units) as t, torch.no_grad():
        lm.hf(ids[None], use_cache=False)
    return torch.cat([t[unit][0, row] for unit in units])


SITES = ["resid_post0", "resid_mid1", "MLP0.act", "L1.attn_out", "L0H1.z", "L1H0.q+L1H2.q", "L1KV1.v", "MLP1"]


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("at", ["end", "a"])
def test_every_patch_is_what_a_trace_does_with_it(family: str, at: str) -> None:
    lm, pairs = model(family), random_pairs()
    sites = [name for name in SITES if family != "gpt_neox" or name != "resid_mid1"]
    sites = [name for name in sites if lm.kv_heads < lm.n_heads or "KV" not in name]
    draw = torch.Generator().manual_seed(5)
    with exact():
        for name in sites:
            d = len(values_at(lm, torch.from_numpy(pairs.base.ids[0]), name, 1))
            rows = torch.randn(2, d, generator=draw, dtype=torch.float64)
            found = uw.subspace(lm, pairs, name, at=at, method=rows, draws=1)
            for i in found["pair"].values:
                one = [*alone(lm, pairs)][i]
                row = one.row if at == "end" else 1
                own, there = (values_at(lm, ids, name, row) for ids in (one.base, one.source))
                change = there - own
                # A projection by the normal equations.
                along_ = rows.mT @ torch.linalg.solve(rows @ rows.mT, rows @ change)
                for patch, value in {"clean": own, "full": there, "subspace": own + along_}.items():
                    logits = traced(lm, one, name, row, value)
                    here = found.data.sel(pair=i, patch=patch)
                    want = float(logits[one.answer] - logits[one.against])
                    assert float(here["logit_diff"]) == pytest.approx(want, abs=1e-10), (name, patch)
                    assert bool(here["match"]) == (int(logits.argmax()) == one.against)


def test_only_the_span_matters_and_all_directions_are_the_whole_value() -> None:
    lm, pairs, draw = model(), random_pairs(), torch.Generator().manual_seed(6)
    rows = torch.randn(3, 32, generator=draw, dtype=torch.float64)
    mixed = torch.randn(3, 3, generator=draw, dtype=torch.float64) @ rows
    one, other = (uw.subspace(lm, pairs, "resid_post0", method=part, draws=1)["logit_diff"] for part in (rows, mixed))
    np.testing.assert_allclose(one.sel(patch="subspace"), other.sel(patch="subspace"), atol=1e-9)
    whole = torch.randn(32, 32, generator=draw, dtype=torch.float64)
    found = uw.subspace(lm, pairs, "resid_post0", method=whole, draws=1)["logit_diff"]
    assert np.array_equal(found.sel(patch="subspace"), found.sel(patch="full"))


WIDE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48},
    "gpt2": {"n_inner": 48},
    "gemma2": {"intermediate_size": 48},
}


@pytest.mark.parametrize("family", WIDE)
def test_what_no_projection_reads_changes_nothing(family: str) -> None:
    lm = view(weights(family, 1, num_attention_heads=2, num_hidden_layers=2, hidden_size=16, **WIDE[family]))
    with exact():
        # A slope has no part in the kernel, a random direction has.
        found = uw.subspace(lm, random_pairs(), "MLP0.act", method="gradient", draws=1)
        assert found["norm"].values == pytest.approx([1, 0], abs=1e-9)
        assert np.isnan(found["logit_diff"].sel(patch="null")).all()
        rows = torch.randn(1, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = uw.subspace(lm, random_pairs(), "MLP0.act", method=rows, draws=1)
        values = found["logit_diff"]
        for null in ("null", "null_raw"):
            np.testing.assert_allclose(values.sel(patch=null), values.sel(patch="clean"), atol=1e-12)
        assert (found["norm"] ** 2).sum() == pytest.approx(1)
        assert found["norm"].values.min() > 0.1
        assert np.abs(values.sel(patch="row") - values.sel(patch="clean")).max() > 1e-6


def test_a_random_direction_moves_a_run_exactly_as_far() -> None:
    lm, pairs = model(), random_pairs()
    sample = Sample.of(pairs, np.arange(4), "end", same_tokens(pairs))
    asked = slots(lm, "resid_post0")
    (group, *_) = grouped(lm, asked, sample, 8)
    from unwrite.run.pairs.exchanges import interchanges

    runs, basis = group.runs[asked[0]], given(torch.ones(1, 32, dtype=torch.float64))
    sets = interchanges(runs, {"subspace": basis}, 3)
    moved = (sets["subspace"] - sets["clean"]).norm(dim=-1)
    torch.testing.assert_close((sets["random"] - sets["clean"]).norm(dim=-1), moved.expand(3, -1))


def test_the_slope_of_the_loss_is_that_of_a_trace() -> None:
    """An edit's own basis has a slope: autograd through the user's model, one pair at a time."""
    lm, pairs = model("gemma2"), random_pairs()
    sample = Sample.of(pairs, np.arange(4), "end", same_tokens(pairs))
    asked = slots(lm, "MLP0.act")
    with exact():
        lessons = [
            Lesson(group.batch, group.runs[asked[0]], [group.metric], group.names)
            for group in grouped(lm, asked, sample, 8)
        ]
        with sloping(lm):
            problem = aligning(lessons, 2, [3], lambda: None)
            found = [*problem.loss(problem.start)]
        basis = problem.start["basis"][0].clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for one in alone(lm, pairs):
            there = values_at(lm, one.source, "MLP0.act", one.row)
            edit = uw.Edit.set("MLP0.act", there[None, None], at=one.row, basis=basis)
            with uw.trace(lm, edits=[edit]):
                logits = lm.hf(one.base[None], use_cache=False).logits[0, one.row]
            loss = loss + torch.nn.functional.softplus(logits[one.answer] - logits[one.against]) / 4
        (slope,) = torch.autograd.grad(loss, basis)
    assert float(sum(part for part, _ in found)) == pytest.approx(float(loss.detach()), abs=1e-11)
    torch.testing.assert_close(torch.cat([part["basis"] for _, part in found]).sum(0), slope, atol=1e-10, rtol=0)
    assert slope.abs().max() > 1e-6


def test_a_patch_along_a_direction_is_an_edit_of_the_weights() -> None:
    """W' = W + a bᵀ, a = ⟨Δ, v⟩ v W, b = u / |u|²: the last MLP puts out the same at its base value u."""
    lm, pairs = model("gpt2"), random_pairs()
    d = len(values_at(lm, torch.from_numpy(pairs.base.ids[0]), "MLP1.act", 1))
    v = torch.randn(1, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with exact():
        found = uw.subspace(lm, pairs, "MLP1.act", method=v, draws=1)
        i = int(found["pair"][0])
        one = [*alone(lm, pairs)][i]
        u, there = (values_at(lm, ids, "MLP1.act", one.row) for ids in (one.base, one.source))
        unit = v[0] / v.norm()
        edited = copy.deepcopy(lm.hf)
        weight = edited.transformer.h[1].mlp.c_proj.weight
        weight.data += torch.outer(u / (u @ u), float((there - u) @ unit) * (unit @ weight.data))
        with torch.no_grad():
            logits = edited(one.base[None]).logits[0, one.row]
    want = float(logits[one.answer] - logits[one.against])
    assert float(found["logit_diff"].sel(patch="subspace", pair=i)) == pytest.approx(want, abs=1e-12)


def test_a_kept_value_is_what_a_trace_does_with_it_and_all_directions_keep_all() -> None:
    lm, pairs = model(), random_pairs((5, 5, 5, 5, 5, 5))
    with exact():
        found = uw.subspace(lm, pairs, "L1H1.q", 2, method="svd", restrict=True, draws=2)
        learned = [i for i in range(6) if i not in found["pair"].values]
        every = [*alone(lm, pairs)]
        own = torch.stack([values_at(lm, every[i].base, "L1H1.q", every[i].row) for i in learned])
        centre = own.mean(0)
        directions = torch.linalg.svd(own - centre, full_matrices=False)[2]
        for i in found["pair"].values:
            x = values_at(lm, every[i].base, "L1H1.q", every[i].row)
            for rank in range(3):
                some = directions[:rank]
                logits = traced(lm, every[i], "L1H1.q", every[i].row, centre + (x - centre) @ some.mT @ some)
                want = float(logits[every[i].answer] - logits[every[i].against])
                assert float(found["kept_diff"].sel(rank=rank, pair=i)) == pytest.approx(want, abs=1e-10)
        whole = uw.subspace(lm, pairs, "L1H1.q", method=torch.eye(12, dtype=torch.float64), restrict=True, draws=1)
    assert whole["kept"].values[-1] == pytest.approx(1, abs=1e-9)
    assert whole["random_kept"].values[:, -1] == pytest.approx(1, abs=1e-9)
    assert whole["variance"].values[-1] == pytest.approx(1)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_of_arbitrary_tokens_nothing_is_learned_that_holds_elsewhere() -> None:
    lm = view(weights("gpt2", 2, num_attention_heads=2, num_hidden_layers=2, vocab_size=200))
    made = contrasts((6,) * 48, seed=3)
    pairs = uw.pairs(
        made.base, made.source, [5 + i % 16 for i in range(48)], [30 + i % 16 for i in range(48)],
        template=[f"t{i % 12}" for i in range(48)],
    )  # fmt: skip
    found = uw.subspace(lm, pairs, "resid_post0", steps=30, seeds=1, lr=0.1)
    low, high = (float(found[f"fldd_{end}"].sel(patch="arbitrary")) for end in ("low", "high"))
    assert low < 0 < high
    assert not found["match"].sel(patch="arbitrary").values.any()
    assert found["loss"].values[0, -1] < found["loss"].values[0, 0]
    assert verdict(found) in ("nothing", "undecided")


def test_an_untrained_model_is_another_one_and_the_users_stays_as_it_was() -> None:
    lm = model()
    before = weights_hash(lm)
    one, other = untrained(lm), untrained(lm)
    assert weights_hash(one) == weights_hash(other) != before
    assert weights_hash(lm) == before
    assert [*one.nodes] == [*lm.nodes]
    assert one.dtype == lm.dtype
    found = uw.subspace(lm, random_pairs(), "MLP0.act", controls=["random"], steps=2)
    for name in ("arbitrary", "untrained"):
        assert np.isnan(found["logit_diff"].sel(patch=name)).all()
    assert np.isfinite(found["logit_diff"].sel(patch="random")).all()


# --- who reads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_what_a_query_sees_is_the_span_of_its_weights_behind_the_gain_of_the_norm(family: str) -> None:
    lm = view(weights(family, 3, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16))
    with exact():
        columns, who = seen(lm, slots(lm, "resid_post0")[0], ["L1H1.q"])
    block: Any = lm.layers[1].block
    d = lm.head_dim
    if family == "gpt2":
        weight = block.attn.c_attn.weight[:, d : 2 * d].T * block.ln_1.weight
        weight = weight - weight.mean(1, keepdim=True)  # a LayerNorm takes the mean away
    else:
        gain = block.input_layernorm.weight
        weight = block.self_attn.q_proj.weight[d : 2 * d] * (gain + (family == "gemma3_text"))
    assert columns is not None
    assert who == "L1H1.q"
    assert len(columns) == d
    assert alike(columns, spanned(weight.detach())) == pytest.approx(1, abs=1e-9)


def test_who_reads_is_said_where_nobody_is_known() -> None:
    found = uw.subspace(model(), random_pairs(), "resid_post0", method="mean")
    assert np.isnan(found["fldd"].sel(patch=["row", "null", "row_raw", "null_raw"])).all()
    assert "no readers of the stream are named" in str(found["because"].item())
    for name, why in (("resid_post1", "L1H0.q is no reader of resid_post1"), ("MLP0.act", "readers read states")):
        with pytest.raises(NodeError, match=why):
            uw.subspace(model(), random_pairs(), name, readers=["L1H0.q"])
    with pytest.raises(NodeError, match="L1H0 is no reader of resid_post0"):
        uw.subspace(model(), random_pairs(), "resid_post0", readers=["L1H0"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"k": 33}, NumericError, "k is more directions than resid_post0 has. Got: 33. Expected: at most 32"),
        ({"k": 0}, NumericError, "k is a number of directions"),
        ({"method": "pca"}, NumericError, "method is unknown.*'das', 'mean', 'svd', 'gradient', or directions"),
        ({"method": torch.ones(2, 32)}, NodeError, "depend on each other"),
        ({"method": torch.ones(1, 9)}, NodeError, "not of resid_post0. Got: d = 9. Expected: d = 32"),
        ({"method": torch.ones(2, 2, 2)}, NodeError, "not a basis"),
        ({"at": "all"}, NumericError, "a subspace is of one row"),
        ({"at": "S2"}, NumericError, "at is unknown"),
        ({"site": "resid_post9"}, NodeError, "resid_post9"),
        ({"site": "L0H0.q+L1H0.q"}, NodeError, "units that lie side by side"),
        ({"site": ["MLP0.act", "MLP0.act"]}, NodeError, "site names each once"),
        ({"site": []}, NodeError, "site names each once"),
        ({"site": "L0H0.pattern"}, NodeError, "cannot be patched"),
        ({"restrict": True}, NumericError, "those that are learned have none"),
        ({"controls": ["chance"]}, NumericError, "a control is unknown"),
        ({"held": "name"}, NumericError, "held is unknown"),
        ({"lr": 0.0}, NumericError, "lr is a rate"),
        ({"classes": [1, 2]}, NumericError, "classes are labels. Got: 2 for 4 pairs"),
        ({"method": "mean", "k": 3}, NumericError, "mean finds fewer directions of resid_post0 than k"),
        ({"site": "embed"}, TokensError, "embed is the same in base and source prompts, in all 2 pairs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], error: type[Exception], said: str) -> None:
    pairs = random_pairs()
    same = pairs.base.ids.copy()
    same[:, 0] = 2
    asked = {"site": "resid_post0", "steps": 1, "seeds": 1, **settings}
    if asked["site"] == "embed":  # the last token is the same in both
        asked["at"] = "a"
        other = uw.pairs(torch.from_numpy(pairs.base.ids), torch.from_numpy(same), 5, 9, roles={"a": 1})
        pairs = uw.pairs(other.base, other.source, 5, 9, roles={"a": 1}, template=["x", "y", "x", "y"])
    with pytest.raises(error, match=said):
        uw.subspace(model(), pairs, **asked)


def test_pairs_without_what_it_takes_are_refused() -> None:
    pairs = random_pairs()
    bare = uw.pairs(pairs.base, pairs.source, pairs.answer, pairs.against)
    with pytest.raises(TokensError, match=r'no template can be held out.*held="pair"'):
        uw.subspace(model(), bare, "MLP0.act")
    with pytest.raises(TokensError, match="have against"):
        uw.subspace(model(), uw.pairs(pairs.base, pairs.source, pairs.answer), "MLP0.act", held="pair")
    found = uw.subspace(model(), bare, "MLP0.act", held=pairs.take([0, 2]), method="mean", draws=1)
    assert (found.data.attrs["learned_from"], found.data.sizes["pair"]) == (4, 2)
    # What is enough for an answer needs nothing to turn it to.
    alone_ = uw.pairs(pairs.base, pairs.source, pairs.answer)
    kept = uw.subspace(model(), alone_, "MLP0.act", method="svd", held="pair", restrict=True, draws=1)
    assert np.isfinite(kept["kept"]).all()


# --- as it is shown ---------------------------------------------------------------------------------------------------


def test_a_result_says_its_numbers_before_its_word() -> None:
    found = illusion()
    told_ = words(found)
    assert told_.index("takes") < told_.index(": illusion (24 pairs of 3 clusters held out)")
    assert told_.endswith(found.data.attrs["solves"])
    (table,) = listings(found)
    assert [row[0] for row in table.rows] == [*PATCHES]
    sites = uw.subspace(with_kernel(), scenes("order"), ["MLP0.act", "resid_post0"], method="mean")
    first, *rest = listings(sites)
    assert [row[0] for row in first.rows] == ["MLP0.act", "resid_post0"]
    assert len(rest) == 2
    assert "intervals hold for all 2 together" in words(sites)
    for result in (found, sites):
        assert result.figure().to_dict()
        assert uw.Result(result.data).table().shape[0] in (12, 24)


def test_from_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Common, "load", lambda *_: uw.load("default"))
    out = tmp_path / "out"
    few = ("--site", "resid_post1,MLP1.act", "-n", 12, "--steps", 1, "--seeds", 1)
    assert shell(monkeypatch, "subspace", "default", "--task", "agreement", *few, "--out", out) == 0
    assert "held out" in capsys.readouterr().out
    found = uw.read(out)
    assert [*found["site"].values] == ["resid_post1", "MLP1.act"]
    assert found["agreement"].dims == ("site", "seed", "other_seed")
    kept = ("--site", "L1H0.q", "-n", 12, "--method", "svd", "--restrict", "-k", 2, "--controls", "none")
    assert shell(monkeypatch, "subspace", "default", "--task", "agreement", *kept) == 0
    assert "kept alone" in capsys.readouterr().out
    assert shell(monkeypatch, "subspace", "default", "--task", "agreement", "--site", "L9H0.q") == 1
    assert "L9H0" in capsys.readouterr().err


# --- trained, and real ------------------------------------------------------------------------------------------------


def bits(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight tokens of noise with one bit token somewhere, the same with the other bit, and the bit."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 12, (n, 8), generator=draw)
    ids[:, -1] = 2
    bit, at = torch.randint(0, 2, (n,), generator=draw), torch.randint(0, 7, (n,), generator=draw)
    other = ids.clone()
    ids[torch.arange(n), at], other[torch.arange(n), at] = bit, 1 - bit
    return ids, other, bit


@pytest.mark.slow
def test_a_trained_copy_of_a_bit_shows_the_paper_pattern() -> None:
    """GPT-2 with MLPs frozen as they were drawn: what their hidden units say of the bit is hardly used.

    Of seeds 0 to 3 all give both words; how large the numbers are differs.
    """
    config = GPT2Config(
        vocab_size=12, n_positions=8, n_embd=32, n_inner=256, n_layer=2, n_head=4, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(2)
    hf = GPT2LMHeadModel(config)
    for name, part in hf.named_parameters():
        part.requires_grad_("mlp" not in name)
    adam = torch.optim.Adam([part for part in hf.parameters() if part.requires_grad], lr=3e-3)
    for step in range(600):
        ids, _, bit = bits(64, step)
        loss = torch.nn.functional.cross_entropy(hf(ids).logits[:, -1], bit)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 0.05
    ids, other, bit = bits(192, 10_000)
    pairs = uw.pairs(
        ids, other, bit.tolist(), (1 - bit).tolist(), template=[f"t{i % 12}" for i in range(192)]
    )  # fmt: skip
    found = uw.subspace(view(hf.eval()), pairs, ["MLP1.act", "resid_post1"], steps=150, lr=0.05)
    mlp, state = (found.data.sel(site=name) for name in ("MLP1.act", "resid_post1"))
    numbers = {patch: float(mlp["fldd"].sel(patch=patch)) for patch in ("full", "subspace", "row", "null")}
    assert numbers["full"] < 15
    assert numbers["subspace"] > 35
    assert numbers["row"] < 20
    assert abs(numbers["null"]) < 1e-3
    assert str(mlp["verdict"].item()) == "illusion"
    assert float(state["fldd"].sel(patch="subspace")) > 150
    assert str(state["verdict"].item()) == "carried"


@pytest.mark.slow
def test_in_a_real_model_the_stream_carries_where_a_name_stood_and_an_mlp_is_an_illusion(real: Path) -> None:
    """Makelov et al. 2023, table 1, in signs: the whole MLP does nothing, one of its directions much."""
    lm = uw.load(real / "smollm2-135m")
    pairs = uw.tasks.ioi(112, lm.tokenizer, change="order", bos=False)
    found = uw.subspace(lm, pairs, ["resid_post21", "MLP20.act"], seeds=1, steps=80, controls=["random"], draws=3)
    state, mlp = (found.data.sel(site=name) for name in found["site"].values)
    numbers = {patch: float(mlp["fldd"].sel(patch=patch)) for patch in ("full", "subspace", "row", "null")}
    assert numbers["full"] < 0
    assert numbers["subspace"] > 35
    assert numbers["row"] < numbers["subspace"] / 2
    assert abs(numbers["null"]) < 1e-3
    assert float(state["fldd"].sel(patch="subspace")) > 100
    assert str(mlp["verdict"].item()) != "carried"
