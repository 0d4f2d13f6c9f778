"""Are the statistics those of a hand and of simulations, and is every subset really patched?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

import unwrite as uw
from executed import exact, weights
from unwrite.errors import NodeError, NumericError, ResultError
from unwrite.methods import bound as method
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import from_ids
from unwrite.result import build
from unwrite.run.answer.metrics import metric_of
from unwrite.run.edit.slots import slots, values
from unwrite.run.replay.clean import base_run
from unwrite.run.replay.walk import patched_together
from unwrite.stats.random_sets import Contexts, subset

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0}),
    "granite": ("granite", {}),
    "opt": ("opt", {}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
LENGTHS, ROWS = [6, 5], [4, 3]
ANSWER, AGAINST = [5, 6], [9, 3]


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    with exact():
        yield


@cache
def model(name: str) -> Model:
    family, settings = FAMILIES[name]
    with exact():
        return view(weights(family, 1, **{"num_hidden_layers": 3, "num_attention_heads": 2, **settings}))


def pairs(first: int = 1) -> Pairs:
    drawn = [torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    drawn[1][:, :first] = drawn[0][:, :first]
    made = [from_ids(part.numpy(), np.arange(6) < np.array(LENGTHS)[:, None]) for part in drawn]
    return uw.pairs(made[0], made[1], ANSWER, AGAINST, position=ROWS)


# Statistics, apart from any model.


def test_full_enumeration_is_the_banzhaf_value() -> None:
    """Σ over all sets without n of (v(S ∪ n) − v(S)) / 2^(N−1), set by set."""
    rng, n = np.random.default_rng(0), 7
    every = np.array([*product([False, True], repeat=n)])
    value = rng.normal(size=(2**n, 2))
    found = Contexts.of(value, every).difference().d
    index = {tuple(row): i for i, row in enumerate(every)}
    for cell in range(n):
        total = np.zeros(2)
        for row in every[~every[:, cell]]:
            joined = row.copy()
            joined[cell] = True
            total += value[index[tuple(joined)]] - value[index[tuple(row)]]
        np.testing.assert_allclose(found[:, cell], total / 2 ** (n - 1), atol=4e-16, rtol=0)


def test_in_an_additive_game_every_node_gets_its_own_effect() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(size=8)
    every = np.array([*product([False, True], repeat=8)])
    full = Contexts.of((every @ effect)[:, None], every).difference()
    np.testing.assert_allclose(full.d[0], effect, atol=1e-14, rtol=0)
    found = []
    for seed in range(400):
        chosen = np.stack([subset(seed, i, 8, 0.3) for i in range(40)])
        found.append(Contexts.of((chosen @ effect)[:, None], chosen).difference().d[0])
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(mean - effect) < 4 * error).all()
    assert error.max() < 0.05


def test_moments_in_chunks_are_welchs_test_of_scipy() -> None:
    rng = np.random.default_rng(2)
    value, chosen = rng.normal(size=(50, 3)) + 1e6, rng.random((50, 4)) < 0.4
    found = Contexts.empty(3, 4)
    for rows in np.split(np.arange(50), [1, 7, 8, 30]):
        found = found + Contexts.of(value[rows], chosen[rows])
    made = found.difference()
    np.testing.assert_array_equal(found.n, [chosen.sum(0), (~chosen).sum(0)])
    for pair, cell in np.ndindex(3, 4):
        with_it, without = value[chosen[:, cell], pair], value[~chosen[:, cell], pair]
        want = stats.ttest_ind(with_it, without, equal_var=False)
        assert made.d[pair, cell] == pytest.approx(with_it.mean() - without.mean(), abs=1e-9)
        assert made.d[pair, cell] / made.se[pair, cell] == pytest.approx(want.statistic, abs=1e-8)
        assert made.df[pair, cell] == pytest.approx(want.df, rel=1e-8)
        # What its one-sided interval ends at.
        high = want.confidence_interval(0.9).high if want.statistic > 0 else -want.confidence_interval(0.9).low
        assert made.upper(0.05)[pair, cell] == pytest.approx(high, rel=1e-8)
    worst = made.upper(0.05).max(1)
    for pair in range(3):
        assert made.p_value(float(worst[pair]))[pair] == pytest.approx(0.05, rel=1e-9)


def test_too_few_sets_say_nothing_and_no_spread_leaves_no_doubt() -> None:
    value = np.array([[1.0], [1.0], [3.0], [3.0], [3.0]])
    chosen = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [0, 1]], dtype=bool)
    found = Contexts.of(value, chosen).difference()
    assert found.d[0, 0] == -2
    assert found.upper(0.05)[0, 0] == 2
    assert np.isnan([found.d[0, 1], found.se[0, 1], found.upper(0.05)[0, 1]]).all()


def _covered(p: float, repeats: int = 300) -> tuple[float, float]:
    """How often θ* covers the largest effect, and how often a true "some node does θ" is rejected at 5 %."""
    rng, covered, rejected = np.random.default_rng(3), 0, 0
    effect = np.sort(rng.normal(size=40)) / 3
    largest = np.abs(effect).max()
    for _ in range(repeats):
        chosen = rng.random((400, 40)) < p
        found = Contexts.of((chosen @ effect + 0.2 * rng.normal(size=400))[:, None], chosen).difference()
        covered += found.upper(0.05).max() >= largest
        rejected += found.p_value(largest)[0] <= 0.05
    return covered / repeats, rejected / repeats


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_bound_covers_about_as_often_as_it_says(p: float) -> None:
    covered, rejected = _covered(p)
    # 300 repeats of 0.95 have a standard error of 0.0126; Welch's test of a sum of Bernoulli terms is not exact.
    assert 0.95 - 3 * 0.0126 <= covered <= 1
    assert rejected <= 0.05 + 3 * 0.0126
    assert covered == pytest.approx(1 - rejected, abs=1e-9)


def test_the_union_null_needs_no_correction() -> None:
    """With many nodes just at θ the largest of their p-values is rarely small: the test is conservative."""
    rng, rejected = np.random.default_rng(4), 0
    effect = np.full(30, 0.3)
    for _ in range(200):
        chosen = rng.random((200, 30)) < 0.5
        found = Contexts.of((chosen @ effect + rng.normal(size=200))[:, None], chosen).difference()
        rejected += found.p_value(0.3)[0] <= 0.05
    assert rejected / 200 < 0.01


def test_sets_are_the_same_in_any_order_and_as_large_as_asked() -> None:
    first = [subset(7, i, 1000, 0.2) for i in range(50)]
    np.testing.assert_array_equal(first[13], subset(7, 13, 1000, 0.2))
    assert (first[13] != subset(8, 13, 1000, 0.2)).any()
    assert np.mean(first) == pytest.approx(0.2, abs=0.01)


# Runs, by the model.


def edits(lm: Model, pair: int, chosen: dict[str, list[int]], source: dict[str, Tensor]) -> list[uw.Edit]:
    return [uw.Edit.set(site, source[site][:, at], at=at) for site, at in chosen.items() if at]


def traced(lm: Model, given: Pairs, pair: int, chosen: dict[str, list[int]]) -> float:
    """The metric when all of these sites are set, at these positions, by one trace of the model."""
    n = given.base.lengths[pair]
    base, source = (torch.from_numpy(part.ids[pair : pair + 1, :n]) for part in (given.base, given.source))
    with torch.no_grad():
        with uw.trace(lm, *chosen) as t:
            lm.hf(source)
        with uw.trace(lm, edits=edits(lm, pair, chosen, {site: t[site] for site in chosen})):
            logits = lm.hf(base).logits[0, given.row[pair]]
    return float(logits[ANSWER[pair]] - logits[AGAINST[pair]])


NAMES = ["embed", "L0H0", "L0H1", "L0.attn_out", "MLP0", "L1H1", "resid_post1", "L2H0.q", "L2H1.k", "L2H0.v", "MLP2",
         "MLP2.act[3]"]  # fmt: skip


def site_of(name: str) -> str:
    if name == "embed":
        return "resid_pre0"
    return f"{name}.z" if name[0] == "L" and "." not in name else name


@pytest.mark.promise("executed")
@torch.no_grad()
@every_family
def test_a_subset_is_one_trace_with_all_its_edits(name: str) -> None:
    lm, given = model(name), pairs()
    names = [*NAMES, *([] if lm.parallel else ["resid_mid1"])]
    asked = slots(lm, names)
    row = torch.from_numpy(given.row)
    base = base_run(lm, torch.from_numpy(given.base.ids), row, asked)
    source = values(lm, torch.from_numpy(given.source.ids), asked)
    rng, sets = np.random.default_rng(5), 6
    pair = torch.tensor([0, 1] * sets)
    chosen = {slot: torch.from_numpy(rng.random((2 * sets, 6, len(slot.units))) < 0.3) for slot in asked}
    final = patched_together(base, source, chosen, pair, 1)
    got = metric_of(lm, given, "logit_diff", slice(0, 2))(final, pair)
    for i in range(2 * sets):
        at = {
            site_of(str(site)): [t for t in range(1, int(given.base.lengths[pair[i]])) if where[i, t, j]]
            for slot, where in chosen.items()
            for j, site in enumerate(slot.sites)
        }
        assert float(got[i]) == pytest.approx(traced(lm, given, int(pair[i]), at), abs=1e-12), i
    assert got.std() > 1e-3


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("at", ["each", "all", "last"])
def test_the_bound_is_that_of_really_patched_subsets(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = model("llama"), pairs(2)
    guess = uw.effects(lm, given, "heads", at=at, method="atp")
    found = uw.bound(lm, given, guess, verified=3, subsets=30, p=0.4, seed=2, batch=2)
    effect = guess["effect"].values
    # From the first token that differs to the row that is read; elsewhere a node by itself does nothing.
    position = np.arange(6)
    seen = (position >= given.first[:, None]) & (position <= np.array(ROWS)[:, None])
    moves = np.broadcast_to(seen[:, None], effect.shape) if at == "each" else np.ones_like(effect, dtype=bool)
    mean = np.nan_to_num(np.abs(effect)).mean(0)
    first = np.argsort(-mean.ravel(), kind="stable")[:3]
    left = np.setdiff1d(np.flatnonzero(moves.any(0).ravel()), first)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(found["n_in"].values.ravel())), left)
    sets = np.stack([subset(2, i, len(left), 0.4) for i in range(30)])
    nodes = [str(node) for node in guess["node"].values]
    for pair in (0, 1):
        value = []
        for chosen in sets:
            where: dict[str, list[int]] = {}
            for cell in left[chosen]:
                node, *position = np.unravel_index(cell, mean.shape)
                every = {"all": [*range(LENGTHS[pair])], "last": [ROWS[pair]]}
                rows = [int(position[0])] if position else every[at]
                rows = [row for row in rows if row < LENGTHS[pair]]
                where.setdefault(f"{nodes[int(node)]}.z", []).extend(rows)
            value.append(traced(lm, given, pair, {site: sorted(rows) for site, rows in where.items()}))
        change = np.array(value) - float(found["base"][pair])
        for i, cell in enumerate(left):
            got = {name: found[name].values[pair].ravel()[cell] for name in ("d", "se", "df", "upper")}
            if not moves[pair].ravel()[cell]:
                assert np.isnan([*got.values()]).all()
                continue
            want = stats.ttest_ind(change[sets[:, i]], change[~sets[:, i]], equal_var=False)
            d = change[sets[:, i]].mean() - change[~sets[:, i]].mean()
            assert got["d"] == pytest.approx(d, abs=1e-12)
            assert got["se"] == pytest.approx(abs(d / want.statistic), rel=1e-6)
            assert got["df"] == pytest.approx(want.df, rel=1e-6)
            assert got["upper"] == pytest.approx(abs(d) + stats.t.ppf(0.95, want.df) * got["se"], rel=1e-6)
        upper = found["upper"].values[pair]
        assert float(found["theta"][pair]) == np.nanmax(upper)
        assert str(found["by_node"].values[pair]) == nodes[np.unravel_index(np.nanargmax(upper), upper.shape)[0]]
    assert found.data.attrs["theta"] == float(found["theta"].max())
    monkeypatch.setattr(method, "ROWS", 20)
    again = uw.bound(lm, given, guess, verified=3, subsets=30, p=0.4, seed=2, batch=1)
    numbers = [name for name, part in found.data.items() if part.dtype != object]
    xr.testing.assert_allclose(again.data[numbers], found.data[numbers], atol=1e-12, rtol=1e-9)


def test_it_says_what_it_is(tmp_path: Path) -> None:
    lm, given = model("gpt2"), pairs()
    guess = uw.effects(lm, given, ["L0H1", "L1H0.q", "L1H0.k", "MLP1", "MLP2.act[1]"], at="all", method="atp")
    found = uw.bound(lm, given, guess, verified=1, subsets=40, p=0.4)
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    assert "only if effects add up" in found.data.attrs["assumes"]
    table = again.table()
    assert len(table) == 2
    assert {"theta", "by_node", "by_d", "by_se", "by_df", "by_n_in", "by_n_out", "says"} <= set(table)
    assert table["says"].str.contains("If effects add up, with 95 % confidence").all()
    for i in (0, 1):
        assert f"{table.by_node[i]} sets this bound" in table.says[i]
        assert f"logit_diff by {table.theta[i]:.4g} or more" in table.says[i]
    assert found.provenance["settings"]["guess"]["method"] == "atp"
    assert found.provenance["settings"]["subsets"] == 40
    assert found.data.attrs["cost"] == 42
    assert int(np.isnan(found["d"].values).sum()) == 2
    for name, part in found.data.items():
        assert part.dtype == object or {"units", "equation"} <= set(part.attrs), name


def test_the_bound_holds_where_effects_nearly_add_up() -> None:
    lm, given = model("llama"), pairs()
    truth = uw.effects(lm, given, "heads", at="all")
    found = uw.bound(lm, given, truth, verified=2, subsets=200, p=0.1)
    left = np.isfinite(found["d"].values)
    for pair in (0, 1):
        largest = np.abs(truth["effect"].values[pair][left[pair]]).max()
        assert float(found["theta"][pair]) > 0.9 * largest


def test_metrics_and_values_of_the_callers_own_are_given_again() -> None:
    lm, given = model("gpt2"), pairs()

    def seventh(logits: Tensor) -> Tensor:
        return logits[:, 7]

    guess = uw.effects(lm, given, "heads", at="all", metric=seventh, method="atp", source="zero")
    with pytest.raises(NumericError, match="metric of its own"):
        uw.bound(lm, given, guess, subsets=20, p=0.5)
    with pytest.raises(ResultError, match="another metric"):
        uw.bound(lm, given, guess, subsets=20, p=0.5, metric="prob")
    with pytest.raises(ResultError, match="another source"):
        uw.bound(lm, given, guess, subsets=20, p=0.5, metric=seventh, source="source")
    found = uw.bound(lm, given, guess, verified=0, subsets=20, p=0.5, metric=seventh)
    assert found["theta"].attrs["units"] == "seventh"


def test_what_cannot_be_asked_is_refused() -> None:
    lm, given = model("gpt2"), pairs()
    guess = uw.effects(lm, given, "heads", at="all", method="atp")
    with pytest.raises(NumericError, match="no node is left"):
        uw.bound(lm, given, guess, verified=6)
    with pytest.raises(NumericError, match="fewer than two of the sets"):
        uw.bound(lm, given, guess, verified=0, subsets=10, p=0.05)
    for words, settings in {
        "verified is": {"verified": -1}, "subsets is": {"subsets": 2}, "p is": {"p": 1.0}, "alpha is": {"alpha": 0.0},
    }.items():  # fmt: skip
        with pytest.raises(NumericError, match=words):
            uw.bound(lm, given, guess, **settings)
    with pytest.raises(ResultError, match="other pairs"):
        uw.bound(lm, pairs(3), guess)
    with pytest.raises(ResultError, match="another model"):
        uw.bound(model("llama"), given, guess)
    with pytest.raises(ResultError, match=r"no result of uw\.effects"):
        uw.bound(lm, given, build("scan", xr.Dataset(), {}, {}, {}))
    bad = uw.effects(lm, given, "heads", at="all", method="atp")
    bad.data["node"] = [f"L9H{i}" for i in range(6)]
    with pytest.raises(NodeError, match="no site L9H0"):
        uw.bound(lm, given, bad)
