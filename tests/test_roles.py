"""Does a role mean its own token of every prompt, whatever is asked there, also between prompts of unequal lengths?"""

from __future__ import annotations

from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats

import unwrite as uw
from executed import exact, weights
from patching import alone, site
from unwrite.errors import NodeError, NumericError, TokensError, UnwriteError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import from_rows
from unwrite.stats import jackknife, rates

NAMES = ["L0H1", "L1H0.k", "L0KV0.v", "MLP1", "resid_mid0", "L1.attn_out"]


@cache
def model(family: str = "llama") -> Model:
    return view(weights(family, 1, num_attention_heads=2, num_hidden_layers=2))


@cache
def unequal() -> uw.Pairs:
    """Base and source prompts of other lengths; "a" comes before "b"."""
    draw = np.random.default_rng(0)
    base, source = ([draw.integers(3, 50, n) for n in lengths] for lengths in ((6, 5, 7), (8, 4, 7)))
    return uw.pairs(
        from_rows(base), from_rows(source), [5, 6, 7], [14, 15, 16], roles={"a": [1, 0, 2], "b": -2},
        source_roles={"a": [3, 1, 2], "b": [6, 2, 0]}, template=["x", "y", "x"],
        choices=[[5, 14, 9], [15, 6, 9], [7, 8, 16]],
    )  # fmt: skip


def by_hand(lm: Model, pairs: uw.Pairs, names: list[str], role: str) -> np.ndarray:
    """Whole runs of the user's own model, a pair at a time: record at the source's row, set at the base's."""
    found = np.zeros((len(pairs), len(names)))
    for i, one in enumerate(alone_of(lm, pairs)):
        given = one.values(names)
        at, there = int(pairs.roles[role][i]), int(pairs.source_roles[role][i])
        for j, name in enumerate(names):
            with uw.trace(lm, edits=uw.Edit.set(site(name), given[name][there], at=at)), torch.no_grad():
                logits = lm.hf(one.base[None], use_cache=False).logits[:, one.row]
            found[i, j] = float(one.score(logits) - one.score(one.clean[None]))
    return found


def alone_of(lm: Model, pairs: uw.Pairs) -> list[Any]:
    """As `alone`, whose prompts have one length, for two."""
    found = []
    for i in range(len(pairs)):
        base, source = (
            uw.pairs(part.ids[i : i + 1, : part.lengths[i]], part.ids[i : i + 1, : part.lengths[i]], 5, 9)
            for part in (pairs.base, pairs.source)
        )
        (one,), (other,) = alone(lm, base), alone(lm, source)
        asked = int(pairs.answer[i]), int(pairs.against[i]) if pairs.against is not None else None
        found.append(type(one)(lm, one.base, other.base, int(pairs.row[i]), *asked))
    return found


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_role_is_patched_from_its_own_row_of_the_source(family: str) -> None:
    lm, pairs = model(family), unequal()
    roles = ["a", "end", "b"]
    with exact():
        want = np.stack([by_hand(lm, pairs, NAMES, role) for role in roles], -1)
        found = uw.effects(lm, pairs, NAMES, at=roles)
        np.testing.assert_allclose(found["effect"].sel(node=NAMES).values, want, atol=1e-12)
        one = uw.effects(lm, pairs, NAMES, at="b", batch=1)["effect"].sel(node=NAMES).values
    np.testing.assert_allclose(one, want[..., 2], atol=1e-7)
    assert found["role"].values.tolist() == roles
    assert (np.abs(want) > 1e-4).any((0, 1)).all()


def test_a_guess_at_a_role_is_the_change_times_the_slope() -> None:
    lm, pairs = model(), unequal()
    found = uw.effects(lm, pairs, NAMES[:4], at=["a", "b"], method="atp")["effect"].sel(node=NAMES[:4]).values
    for i, one in enumerate(alone_of(lm, pairs)):
        slopes, given, base = one.slopes(NAMES[:4]), one.values(NAMES[:4]), one.values(NAMES[:4], one.base)
        for j, name in enumerate(NAMES[:4]):
            for k, role in enumerate(("a", "b")):
                at, there = int(pairs.roles[role][i]), int(pairs.source_roles[role][i])
                want = (given[name][there] - base[name][at]) @ slopes[name][at]
                assert found[i, j, k] == pytest.approx(float(want), abs=1e-7)


@pytest.mark.parametrize("source", ["mean", "zero", "resample"])
def test_values_at_a_role_come_from_that_role(source: str) -> None:
    lm, pairs = model(), unequal()
    pairs = uw.pairs(pairs.base, pairs.base, 5, 9, roles={"a": [1, 0, 2]}, source_roles={"a": [3, 1, 4]})
    pairs = pairs.take([0, 1, 2] if source != "resample" else [0, 0])
    given = [
        one.values(["L0H1"])["L0H1"][int(there)]
        for one, there in zip(alone_of(lm, pairs), pairs.source_roles["a"], strict=True)
    ]
    value = {"mean": torch.stack(given).mean(0), "zero": torch.zeros_like(given[0]), "resample": given[0]}[source]
    found = uw.effects(lm, pairs, ["L0H1"], at="a", source=source)["effect"].values[:, 0]
    for i, one in enumerate(alone_of(lm, pairs)):
        with uw.trace(lm, edits=uw.Edit.set("L0H1.z", value, at=int(pairs.roles["a"][i]))), torch.no_grad():
            logits = lm.hf(one.base[None], use_cache=False).logits[:, one.row]
        assert found[i] == pytest.approx(float(one.score(logits) - one.score(one.clean[None])), abs=1e-7)


@pytest.mark.parametrize("mlps", ["recompute", "frozen"])
def test_an_edge_at_a_role_is_the_edge_where_only_that_token_differs(mlps: str) -> None:
    lm, base = model(), torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    source = base.clone()
    source[[0, 1], [2, 3]] += 1
    pairs = uw.pairs(base, source, 5, 9, roles={"it": [2, 3], "other": [1, 1]})
    ends = (["embed"], ["L1H0", "MLP1", "logits"], mlps)
    whole = uw.paths(lm, pairs, *ends)["effect"].values
    found = uw.paths(lm, pairs, *ends, at=["it", "other"])["effect"].values
    np.testing.assert_allclose(found[..., 0], whole, atol=1e-12)
    assert not found[..., 1].any()
    assert np.abs(whole).max() > 1e-4
    last = uw.paths(lm, pairs, "heads", "logits", mlps, at="last")["effect"].values
    np.testing.assert_array_equal(last, uw.paths(lm, pairs, "heads", "logits", mlps, at="end")["effect"].values)


def test_a_bound_at_a_role_is_of_what_moves_there() -> None:
    lm, pairs = model(), unequal()
    guess = uw.effects(lm, pairs, at="a", method="atp")
    found = uw.bound(lm, pairs, guess, verified=0, subsets=60, p=0.5, batch=1)
    true = uw.effects(lm, pairs, at="a")["effect"]
    # In the last layer nothing is left that could read the role, so no node moves the answer from there.
    still = true.sel(node=["L1H0", "L1H1"]).values
    np.testing.assert_allclose(still, 0, atol=1e-12)
    alone = np.abs(found["d"].sel(node=["L1H0", "L1H1"]).values)
    assert np.nanmax(alone) < np.nanmax(np.abs(found["d"].values))
    with pytest.raises(NumericError, match="no bound"):
        uw.bound(lm, pairs, uw.effects(lm, pairs, at=["a", "b"], method="atp"))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_logits_that_the_model_returns() -> None:
    lm, pairs = model("gemma2"), unequal()
    against, choices = np.asarray(pairs.against), torch.from_numpy(np.asarray(pairs.choices))
    node, base, patched = ["resid_post0"], [], []
    for i, one in enumerate(alone_of(lm, pairs)):
        value = one.values(node)[node[0]][int(pairs.source_roles["end"][i])]
        with uw.trace(lm, edits=uw.Edit.set(node[0], value, at=one.row)), torch.no_grad():
            patched.append(lm.hf(one.base[None], use_cache=False).logits[0, one.row])
        base.append(one.clean)
    logits = torch.stack([torch.stack(base), torch.stack(patched)])
    pair = torch.arange(3)
    own, other = logits[:, pair, pairs.answer], logits[:, pair, against]
    restricted = torch.stack([logits[:, pair, choices[:, k]] for k in range(3)]).exp().sum(0).log() - own
    diff = (own - other).numpy()
    found = uw.effects(lm, pairs, node, at="end", metric="restricted")
    np.testing.assert_allclose(found["base"], restricted[0], atol=1e-6)
    np.testing.assert_allclose(found["effect"].values[:, 0], restricted[1] - restricted[0], atol=1e-6)
    # Which of each pair's tokens is asked for is chosen such that the base runs have a difference to lose.
    turned = np.where(diff[0] > 0, pairs.answer, against), np.where(diff[0] > 0, against, pairs.answer)
    sided = uw.Pairs(pairs.base, pairs.source, *turned, pairs.row, pairs.roles, pairs.source_roles)
    diff = diff * np.sign(diff[0])
    found = uw.effects(lm, sided, node, at="end", metric="fldd")
    assert float(found["mean"][0]) == pytest.approx(100 * (1 - diff[1].mean() / diff[0].mean()), abs=1e-4)
    assert float(found["effect"].mean()) == pytest.approx(float(found["mean"][0]), abs=1e-9)
    best = logits[1].argmax(-1).numpy()
    said = uw.Pairs(pairs.base, pairs.source, (best + 1) % 50, best, pairs.row, pairs.roles, pairs.source_roles)
    found = uw.effects(lm, said, node, at="end", metric="match")
    want = (logits.argmax(-1).numpy() == best).astype(float)
    np.testing.assert_array_equal(found["base"], want[0])
    np.testing.assert_array_equal(found["effect"].values[:, 0], want[1] - want[0])
    chosen = torch.stack([logits[0, pair, choices[:, k]] for k in range(3)], 1)
    solved = (chosen.argmax(1) == (choices == torch.from_numpy(pairs.answer)[:, None]).int().argmax(1)).numpy()
    for result in (
        uw.effects(lm, pairs, node, at="a"),
        uw.effects(lm, pairs, node, at="a", method="relp"),
        uw.paths(lm, pairs, at="a"),
    ):
        np.testing.assert_array_equal(result["solved"].values, solved)
        assert f"{solved.sum()} of 3 pairs" in result.data.attrs["solves"]


def test_a_mean_has_the_interval_of_its_clusters() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(12, 2)), draw.uniform(1, 2, 12)
    mean, low, high = jackknife.ratio(x, np.ones(12), np.arange(12))
    want = stats.t.interval(0.95, 11, x.mean(0), stats.sem(x))
    np.testing.assert_allclose([mean, low, high], [x.mean(0), *want])
    cluster = np.repeat([2, 0, 3, 1], 3)
    whole, low, high = jackknife.ratio(x, y, cluster)
    np.testing.assert_allclose(whole, x.sum(0) / y.sum())
    without = np.array([x[cluster != c].sum(0) / y[cluster != c].sum() for c in range(4)])
    pseudo = 4 * whole - 3 * without
    np.testing.assert_allclose((low + high) / 2, pseudo.mean(0))
    np.testing.assert_allclose((high - low) / 2, stats.t.ppf(0.975, 3) * pseudo.std(0, ddof=1) / 2)
    assert np.isnan(jackknife.ratio(x, y, cluster % 2)[1]).all()


def test_a_rate_has_wilsons_interval_and_a_word() -> None:
    p, n, z = 0.8, 10, stats.norm.ppf(0.975)
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + (z / n) ** 2 / 4),
    )
    np.testing.assert_allclose(rates.wilson(8, 10), [middle - half, middle + half])
    # 48 of 50 against one other: lower bound .86 > .75; 32 of 50 beat chance; 25 of 50 do not; 2 of 2 say nothing.
    words = [rates.verdict(hits, n, 0.5) for hits, n in ((48, 50), (35, 50), (25, 50), (2, 2))]
    assert words == ["solved", "above chance", "not solved", "undecided"]
    assert "effects mean little" in rates.said(25, 50, 0.5)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_taken_and_split_with_all_that_they_have() -> None:
    pairs = unequal()
    some = pairs.take([label == "x" for label in pairs.template])
    assert some.template == ("x", "x")
    assert some.roles["a"].tolist() == [1, 2]
    assert some.source_roles["b"].tolist() == [6, 0]
    assert some.choices.tolist() == [[5, 14, 9], [7, 8, 16]]
    assert some.about()["hash"] == pairs.take([0, 2]).about()["hash"]
    fit, judge = pairs.split()
    assert {*fit.template}.isdisjoint(judge.template)
    assert len(fit) + len(judge) == 3
    fit, judge = pairs.split("pair", 0.7, seed=3)
    assert (len(fit), len(judge)) == (2, 1)


def test_a_result_knows_what_roles_it_is_of() -> None:
    pairs = unequal()
    named = {"roles": pairs.roles, "source_roles": pairs.source_roles}
    plainly = uw.Pairs(pairs.base, pairs.source, pairs.answer, pairs.against, pairs.row, **named)
    named["roles"] = pairs.roles | {"a": np.array([1, 1, 2])}
    moved = uw.Pairs(pairs.base, pairs.source, pairs.answer, pairs.against, pairs.row, **named)
    assert len({part.about()["hash"] for part in (pairs, plainly, moved)}) == 3


B, S = torch.arange(10).view(2, 5), torch.arange(10).view(2, 5) + 1
BAD: dict[str, tuple[Any, type[UnwriteError], str]] = {
    "unequal": (lambda: uw.pairs(B, S[:, :4], 5, roles={"a": 1}), TokensError, "unequal numbers"),
    "unequal, one named": (
        lambda: uw.pairs(B, S[:, :4], 5, roles={"a": 1, "b": 2}, source_roles={"a": 1}), TokensError, "with b"
    ),
    "outside": (lambda: uw.pairs(B, S, 5, roles={"a": 5}), TokensError, "no such role a. Got: 5"),
    "a word for positions": (lambda: uw.pairs(B, S, 5, roles={"all": 1}), TokensError, "roles have names. Got: 'all'"),
    "behind": (lambda: uw.pairs(B, S, 5, position=2, roles={"a": 3}), TokensError, "behind the row that is read"),
    "end is another": (lambda: uw.pairs(B, S, 5, roles={"end": 3}), TokensError, "end is the row that is read"),
    "of the source alone": (lambda: uw.pairs(B, S, 5, source_roles={"a": 3}), TokensError, "other names"),
    "a list": (lambda: uw.pairs(B, S, 5, roles=[3]), TokensError, "rows by their names"),
    "two labels": (lambda: uw.pairs(B, S, 5, template=["x"]), TokensError, "label for each pair"),
    "a label of numbers": (lambda: uw.pairs(B, S, 5, template=[1, 2]), TokensError, "label for each pair"),
    "no choice": (lambda: uw.pairs(B, S, 5, choices=[6, 7]), TokensError, "answer is one of them. Got: answer 5"),
    "choices twice": (lambda: uw.pairs(B, S, 5, choices=[5, 7, 7]), TokensError, "choices of pair 0 differ"),
    "choices of unequal number": (lambda: uw.pairs(B, S, 5, choices=[[5, 6], [5]]), TokensError, "lists of tokens"),
    "an unknown role": (
        lambda: uw.effects(model(), unequal(), at="c"), NumericError, "at is unknown. Got: 'c'. .*'a', 'b', 'end'"
    ),
    "no role": (lambda: uw.effects(model(), unequal(), at=[]), NumericError, "names each role once"),
    "a role twice": (lambda: uw.effects(model(), unequal(), at=["a", "a"]), NumericError, "names each role once"),
    "a word among roles": (lambda: uw.effects(model(), unequal(), at=["a", "all"]), NumericError, "at is unknown"),
    "positions of unequal prompts": (
        lambda: uw.effects(model(), unequal(), at="all"), TokensError, "unequal .* Got: at='all'. .*a, b"
    ),
    "edges of unequal prompts": (lambda: uw.paths(model(), unequal()), TokensError, "a role: a, b, end"),
    "edges at each": (lambda: uw.paths(model(), unequal(), at="each"), NumericError, "name roles"),
    "one row, two of the source": (
        lambda: uw.effects(
            model(), uw.pairs(B, S, 5, roles={"a": 1, "b": 1}, source_roles={"a": 1, "b": 2}), at=["a", "b"]
        ), NumericError, "a and b are one token of the base prompt"
    ),
    "ig of unequal prompts": (lambda: uw.effects(model(), unequal(), at="a", method="ig"), NumericError, "unequal"),
    "match without": (lambda: uw.effects(model(), uw.pairs(B, S, 5), metric="match"), NumericError, "have against"),
    "restricted without": (
        lambda: uw.effects(model(), uw.pairs(B, S, 5), metric="restricted"), NumericError, "have choices"
    ),
    "match has no slope": (
        lambda: uw.effects(model(), uw.pairs(B, S, 5, 6), metric="match", method="atp"), NumericError, "no slope"
    ),
    "fldd of nothing": (lambda: uw.effects(model(), _turned(), metric="fldd", at="a"), NumericError, "do not have"),
    "split by nothing": (lambda: uw.pairs(B, S, 5).split(), NumericError, "Expected: pair, or a label"),
    "split one label": (lambda: uw.pairs(B, S, 5, template=["x", "x"]).split(), TokensError, "cannot be split"),
    "take none": (lambda: unequal().take([False] * 3), TokensError, "taken by their numbers"),
}  # fmt: skip


def _turned() -> uw.Pairs:
    """Pairs whose base runs prefer what the answer is compared to."""
    pairs = unequal().take([0])
    base = float(uw.effects(model(), pairs, ["MLP0"], at="a")["base"][0])
    ids = (pairs.against, pairs.answer) if base > 0 else (pairs.answer, pairs.against)
    return uw.Pairs(pairs.base, pairs.source, *ids, pairs.row, pairs.roles, pairs.source_roles)


@pytest.mark.promise("errors")
@pytest.mark.parametrize("wrong", BAD)
def test_roles_that_cannot_be_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make, kind, message = BAD[wrong]
    with pytest.raises(kind, match=message):
        make()


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [1, 2])
def test_an_edit_has_a_row_of_its_own_in_every_prompt(chosen: int) -> None:
    lm, ids = model(), torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    rows = np.array([[1, 4], [0, 2], [3, 5]])[:, :chosen]
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[torch.arange(3)[:, None], torch.from_numpy(rows)] = True
    at = rows[:, 0] if chosen == 1 else torch.from_numpy(rows)
    values = torch.randn(3, 6, lm.head_dim, dtype=lm.dtype, generator=torch.Generator().manual_seed(2))
    picked = values[torch.arange(3)[:, None], torch.from_numpy(rows)]

    def run(**edit: Any) -> torch.Tensor:
        with uw.trace(lm, edits=uw.Edit("L0H1.z", alpha=1.0, beta=-1.0, **edit)), torch.no_grad():
            return lm.hf(ids).logits

    want = run(source=values, at=mask)
    assert torch.equal(run(source=values, at=at), want)
    assert torch.equal(run(source=picked, at=at), want)
    if chosen == 1:
        assert torch.equal(run(source=picked[:, 0], at=at), want)
        assert torch.equal(run(source=picked[:, 0], at=mask), want)
        assert torch.equal(run(source=values, at=at - 6), want)
    half = torch.full((3, chosen), 0.5, dtype=lm.dtype)
    assert torch.equal(run(source=picked, at=at, gain=half), run(source=values, at=mask, gain=0.5))


def test_a_row_in_the_prompt_is_edited_once_while_text_is_made() -> None:
    lm, ids = model(), torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    said = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    value = torch.randn(2, lm.d_model, dtype=lm.dtype, generator=torch.Generator().manual_seed(2)) * 9
    with uw.trace(lm, edits=uw.Edit.set("resid_post0", value, at=torch.tensor([4, 2]))):
        found = lm.hf.generate(ids, attention_mask=torch.ones_like(ids), **said)
    want = ids
    for _ in range(3):  # without a cache, the whole text anew
        with uw.trace(lm, edits=uw.Edit.set("resid_post0", value, at=torch.tensor([4, 2]))), torch.no_grad():
            want = torch.cat([want, lm.hf(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (torch.tensor([1]), "for each of 2 prompts"),
        (np.array([[2, 1], [0, 1]]), "increasing order"),
        (np.array([1, 9]), "did not touch all of its positions. Got: .9."),
        (torch.tensor([1.0, 2.0]), "chooses no rows"),
        (np.zeros((2, 2, 2), int), "chooses no rows"),
    ],
)
def test_rows_that_prompts_do_not_have_are_refused(at: Any, says: str) -> None:
    lm = model()
    with pytest.raises(NodeError, match=says), uw.trace(lm, edits=uw.Edit.set("L0H1.z", 0.0, at=at)):
        lm.hf(torch.ones(2, 5, dtype=torch.long))
