"""Does `agree` count, correlate and rank as scipy and a hand do, and does it refuse what cannot be compared?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import unwrite as uw
from executed import weights
from unwrite.errors import NumericError, ResultError
from unwrite.model.load import view
from unwrite.result import Result, build
from unwrite.stats import bootstrap, ranks

NODES = ["L0H0", "L0H1", "MLP0", "L1H0", "L1H1", "MLP1"]
SETTINGS = {"at": "all", "metric": "logit_diff", "source": "source"}


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """Intervals are the same for any number of draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_DRAWS", 29)
        yield


def made(effect: Any, method: str = "exact", cost: float = 4.0, prompts: Any = None, **more: Any) -> Result:
    """A result of effects with these numbers; `more` overrides settings, or is a further variable if an array."""
    effect = np.asarray(effect, dtype=float)
    axes = ("pair", "node", "position")[: effect.ndim]
    variables = {name: more.pop(name) for name in [*more] if isinstance(more[name], np.ndarray)}
    data = {
        name: xr.Variable(axes, part, {"units": "logit_diff"}) for name, part in {"effect": effect, **variables}.items()
    }
    texts = [f"p{i}" for i in range(len(effect))] if prompts is None else prompts
    data |= {"base_text": ("pair", [f"{t} b" for t in texts]), "source_text": ("pair", [f"{t} s" for t in texts])}
    coords = {"pair": np.arange(len(effect)), "node": more.pop("nodes", NODES)}
    pairs, weight = more.pop("pairs", "one"), more.pop("weights", "w")
    settings = {**SETTINGS, "method": method, **({"at": "each"} if effect.ndim == 3 else {}), **more}
    dataset = xr.Dataset(data, coords).assign_attrs(cost=cost)
    return build("effects", dataset, settings, {"weights": weight}, {"": {"hash": pairs}})


def drawn(seed: int = 0, pairs: int = 5, positions: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (pairs, len(NODES), *([] if positions is None else [positions]))
    exact = rng.normal(size=shape) ** 3
    return exact + rng.normal(size=shape), exact


def cell(found: Result, name: str, group: str = "all", reading: str = "effect") -> float:
    return float(found[name].sel(reading=reading, group=group))


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    guess, exact = drawn(seed)
    exact[1, 2] = exact[0, 0]  # equal numbers share a rank
    found = uw.agree(made(guess, "atp"), made(exact))
    assert cell(found, "pearson") == pytest.approx(stats.pearsonr(guess.ravel(), exact.ravel()).statistic, rel=1e-12)
    assert cell(found, "spearman") == pytest.approx(stats.spearmanr(guess.ravel(), exact.ravel()).statistic, rel=1e-12)
    rows = [stats.pearsonr(a, b).statistic for a, b in zip(guess, exact, strict=True)]
    assert cell(found, "pearson_median") == pytest.approx(np.median(rows), rel=1e-12)
    rows = [stats.spearmanr(a, b).statistic for a, b in zip(guess, exact, strict=True)]
    assert cell(found, "spearman_median") == pytest.approx(np.median(rows), rel=1e-12)
    for kind, columns in (("heads", [0, 1, 3, 4]), ("mlp_out", [2, 5])):
        part = guess[:, columns].ravel(), exact[:, columns].ravel()
        assert cell(found, "pearson", kind) == pytest.approx(stats.pearsonr(*part).statistic, rel=1e-12)
        assert cell(found, "n", kind) == 5 * len(columns)
    assert list(found["group"].values) == ["all", "heads", "mlp_out"]


def test_intervals_are_those_of_cells_repeated_as_often_as_their_pairs_are_drawn() -> None:
    guess, exact = drawn(3)
    exact[:, 3] = 0.5
    found = uw.agree(made(guess, "atp"), made(exact))
    by_hand: dict[str, list[float]] = {"pearson": [], "spearman": []}
    for times in bootstrap.draws(5):
        rows = np.repeat(np.arange(5), times)
        x, y = guess[rows].ravel(), exact[rows].ravel()
        by_hand["pearson"].append(stats.pearsonr(x, y).statistic)
        by_hand["spearman"].append(stats.spearmanr(x, y).statistic)
    for name, values in by_hand.items():
        low, high = np.quantile(values, (0.025, 0.975))
        assert cell(found, f"{name}_low") == pytest.approx(low, rel=1e-9)
        assert cell(found, f"{name}_high") == pytest.approx(high, rel=1e-9)
        assert low < cell(found, name) < high


def test_pairs_that_share_a_prompt_are_one() -> None:
    guess, exact = drawn()
    found = uw.agree(made(guess, "atp", prompts=list("aabbc")), made(exact, prompts=list("aabbc")))
    assert found.data.attrs["independent"] == 3
    alone = uw.agree(made(guess, "atp", prompts=list("aaaaa")), made(exact, prompts=list("aaaaa")))
    assert alone.data.attrs["independent"] == 1
    assert np.isnan([cell(alone, f"{form}_{end}") for form in ("pearson", "spearman") for end in ("low", "high")]).all()
    assert cell(alone, "pearson") == cell(found, "pearson")
    # A chain: 0 shares its base with 1, 1 its source with 2.
    chained = made(exact[:3])
    chained.data["base_text"] = ("pair", ["x", "x", "y"])
    chained.data["source_text"] = ("pair", ["u", "v", "v"])
    assert uw.agree(chained, chained).data.attrs["independent"] == 1


def test_the_same_result_agrees_and_finds_each_in_its_turn() -> None:
    exact = made(drawn()[1])
    found = uw.agree(exact, exact, k=3)
    assert cell(found, "pearson") == pytest.approx(1, abs=1e-12)
    assert cell(found, "spearman") == pytest.approx(1, abs=1e-12)
    assert cell(found, "same_sign") == 1
    assert found.data.sizes["miss"] == 0
    np.testing.assert_array_equal(found["verified_cost"], 4 + np.array([1, 2, 3]))


def test_recall_by_hand() -> None:
    exact = [[5.0, -4.0, 3.0, 0.0, 0.0, 0.0], [5.0, 4.0, -3.0, 0.0, 0.0, 0.0]]
    guess = [[0.5, 4.0, 0.0, 3.0, 1.0, 0.0], [0.5, -4.0, 0.0, -3.0, 1.0, 0.0]]
    found = uw.agree(made(guess, "atp", cost=3.5), made(exact), k=5)
    # The guess's order: L0H1, L1H0, L1H1, L0H0, then the first of those that it says nothing of.
    assert list(found["top_node"].values[:3]) == ["L0H0", "L0H1", "MLP0"]
    np.testing.assert_array_equal(found["verified_cost"], [7.5, 7.5, 8.5, np.nan, np.nan])
    curve = found["recall"].sel(executed=[0, 1, 3, 4, 5])
    np.testing.assert_allclose(curve.sel(top=2), [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(curve.sel(top=3), [0, 1 / 3, 1 / 3, 2 / 3, 1])
    assert np.isnan(found["recall"].sel(top=4)).all()
    np.testing.assert_array_equal(found["cost"], 3.5 + found["executed"])
    # Rank 1 guessed as 7.5th (0.5 twice), times 5: the largest miss, in the first of both pairs.
    assert [found[f"miss_{name}"].values[0] for name in ("node", "pair", "exact", "guess")] == ["L0H0", 0, 5.0, 0.5]
    assert found["miss_rank_exact"].values[0] == 1.5
    assert found["miss_rank_guess"].values[0] == 7.5


def test_positions_behind_the_row_that_is_read_are_no_cells() -> None:
    guess, exact = drawn(positions=4)
    guess[0, :, 2:] = exact[0, :, 2:] = np.nan
    found = uw.agree(made(guess, "atp"), made(exact))
    kept = np.isfinite(exact)
    assert cell(found, "n") == kept.sum()
    assert cell(found, "pearson") == pytest.approx(stats.pearsonr(guess[kept], exact[kept]).statistic, rel=1e-12)
    flat = np.nan_to_num(np.abs(exact)).mean(0)
    node, position = np.unravel_index(flat.argmax(), flat.shape)
    assert found["top_node"].values[0] == f"{NODES[node]} at {position}"
    assert {"miss_position", "miss_node"} <= set(found.data)


def test_a_magnitude_is_compared_with_magnitudes() -> None:
    guess, exact = drawn()
    found = uw.agree(made(np.abs(guess), "atp*", signed=guess), made(exact))
    assert cell(found, "pearson") == pytest.approx(
        stats.pearsonr(np.abs(guess).ravel(), np.abs(exact).ravel()).statistic, rel=1e-12
    )
    assert cell(found, "pearson", reading="signed") == pytest.approx(
        stats.pearsonr(guess.ravel(), exact.ravel()).statistic, rel=1e-12
    )
    assert np.isnan(cell(found, "same_sign"))
    large = np.abs(exact) >= 0.05 * np.abs(exact).max(1, keepdims=True)
    assert cell(found, "same_sign", reading="signed") == (np.sign(guess) == np.sign(exact))[large].mean()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
def test_what_does_not_vary_has_no_correlation(value: float) -> None:
    guess, exact = drawn()
    found = uw.agree(made(np.full_like(guess, value), "atp"), made(exact))
    forms = [f"{form}{end}" for form in ("pearson", "spearman") for end in ("", "_low", "_high", "_median")]
    assert np.isnan([cell(found, form) for form in forms]).all()
    nothing = uw.agree(made(guess, "atp"), made(np.zeros_like(exact)))
    assert np.isnan([cell(nothing, form) for form in [*forms, "same_sign"]]).all()
    assert np.isnan(nothing["verified_cost"]).all()
    assert nothing.data.sizes["miss"] == 0


def test_what_cannot_be_compared_is_refused() -> None:
    guess, exact = drawn()
    right = made(exact)
    for words, other in {
        "pairs": made(guess, "atp", pairs="others"), "weights": made(guess, "atp", weights="v"),
        "at": made(guess, "atp", at="last"), "metric": made(guess, "atp", metric="prob"),
        "source": made(guess, "atp", source="zero"),
        "the same nodes": made(guess, "atp", nodes=[*NODES[:5], "MLP2"]),
        "not finite. Got: L0H1 of pair 2": made(_with(guess, (2, 1), np.nan), "atp"),
    }.items():  # fmt: skip
        with pytest.raises(ResultError, match=words):
            uw.agree(other, right)
    with pytest.raises(ResultError, match="not executed"):
        uw.agree(right, made(guess, "atp"))
    with pytest.raises(ResultError, match=r"no result of uw\.effects"):
        uw.agree(right, build("scan", xr.Dataset(), {}, {}, {}))
    with pytest.raises(NumericError, match="k is"):
        uw.agree(right, right, k=0)


def _with(values: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = values.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_of_a_model_saved_and_read(method: str, tmp_path: Path) -> None:
    lm = view(weights("llama", 0, num_hidden_layers=2, num_attention_heads=2))
    ids = torch.randint(3, 50, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    pairs = uw.pairs(ids[0], ids[1], [5, 6, 7], [8, 9, 10], position=[4, 3, 4])
    names = ["L0H0", "L1H1", "MLP0", "MLP1"]
    exact = uw.effects(lm, pairs, names)
    found = uw.agree(uw.effects(lm, pairs, names, method=method), exact, k=4)
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    table = again.table()
    readings = {"atp": ["effect"], "atp*": ["effect", "signed"], "ig": ["effect", "inputs"]}[method]
    assert list(table["reading"].unique()) == readings
    assert len(table) == 3 * len(readings)
    assert {"pearson", "spearman", "pearson_low", "same_sign", "n"} <= set(table)
    assert found["cost"].values[0] == pytest.approx(uw.effects(lm, pairs, names, method=method).data.attrs["cost"])
    for name, part in found.data.items():
        if part.dtype != object and name not in ("miss_pair", "miss_position"):
            assert {"units", "equation"} <= set(part.attrs), name


def test_ranks_of_weights_are_those_of_repeated_cells() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 30)).astype(float)
    cluster = np.arange(30) // 10
    assert ranks.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    low, high = ranks.spearman_interval(x, y, cluster)
    assert low < ranks.spearman(x, y) < high
