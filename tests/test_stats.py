"""Do statistics say the same for every order, sharding and batch, and within their stated error the truth?"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis.extra import numpy as hnp

from unwrite.run.loop.ledger import Ledger
from unwrite.stats.mergeable import LENGTH, RATIO, ClusterSums, Grid, Histogram, Tree

Q = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)
GRIDS = pytest.mark.parametrize("grid", [RATIO, LENGTH], ids=["ratio", "length"])


# --- Grid -------------------------------------------------------------------------------------------------------------


def as_int(x: np.ndarray) -> np.ndarray:
    """Number of float32 between 0 and x, with its sign: neighbouring floats are neighbouring integers."""
    bits = x.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def as_float(number: np.ndarray) -> np.ndarray:
    """The inverse of `as_int`."""
    return np.where(number < 0, -1.0, 1.0).astype(np.float32) * np.abs(number).astype(np.int32).view(np.float32)


def bins(grid: Grid, x: np.ndarray) -> np.ndarray:
    return grid.index(torch.from_numpy(np.array(x, dtype=np.float32))).numpy()


def shown(grid: Grid, x: np.ndarray) -> np.ndarray:
    return grid.values[bins(grid, x)]


def walls(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The last float32 of every bin and the first of the next one, found by bisection between their values."""
    values = grid.values
    values[[0, -1]] = -np.finfo(np.float32).max, np.finfo(np.float32).max
    low, high = as_int(values[:-1]), as_int(values[1:])
    while (high - low).max() > 1:
        middle = (low + high) // 2
        inside = bins(grid, as_float(middle)) <= np.arange(len(low))
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return as_float(low), as_float(high)


def inside_every_bin(grid: Grid) -> np.ndarray:
    """Each bin's two ends and random values between them, without the bins beyond the limit."""
    last, first = (as_int(wall) for wall in walls(grid))
    between = np.random.default_rng(0).integers(first[:-1], last[1:], size=(20, len(last) - 1), endpoint=True)
    return as_float(np.concatenate([first[:-1], last[1:], between.ravel()]))


def ratio_bound(x: np.ndarray) -> np.ndarray:
    return 0.01 * np.maximum(1.0, np.abs(x))


@GRIDS
def test_every_bin_holds_its_own_value(grid: Grid) -> None:
    assert (bins(grid, grid.values[1:-1]) == np.arange(1, 2 * grid.reach)).all()
    assert (np.diff(grid.values) > 0).all()
    assert grid.values[grid.reach] == 0


@GRIDS
def test_bins_meet_without_gap_or_overlap(grid: Grid) -> None:
    last, first = walls(grid)
    assert (as_int(first) - as_int(last) == 1).all()
    assert (bins(grid, last) == np.arange(2 * grid.reach)).all()
    assert (bins(grid, first) == np.arange(1, 2 * grid.reach + 1)).all()


def test_a_ratio_is_shown_within_a_hundredth_all_through_every_bin() -> None:
    x = inside_every_bin(RATIO).astype(np.float64)
    x = x[np.abs(x) <= 100]
    assert (np.abs(shown(RATIO, x) - x) <= ratio_bound(x)).all()


def test_a_length_is_shown_within_its_relative_error_all_through_every_bin() -> None:
    x = inside_every_bin(LENGTH).astype(np.float64)
    x = x[(x >= 2.0**-40) & (x <= 2.0**40)]
    error = np.abs(shown(LENGTH, x) / x - 1)
    assert (error <= (1 + 2.0**-40 / x) / 128 + 2.0**-23).all()  # the last term: rounding of x + offset
    assert (error <= 1 / 64).all()
    assert (error[x > 2.0**-20] <= 1.0001 / 128).all()


@given(st.floats(-100, 100))
def test_any_ratio_is_shown_within_a_hundredth(x: float) -> None:
    index = RATIO.index(torch.tensor([x], dtype=torch.float64))
    assert abs(RATIO.values[int(index)] - x) <= 0.01 * max(1.0, abs(x))


@given(st.floats(2.0**-40, 2.0**40))
@example(2.0**-40)
def test_any_length_is_shown_within_its_relative_error(x: float) -> None:
    index = LENGTH.index(torch.tensor([x], dtype=torch.float64))
    assert abs(LENGTH.values[int(index)] / x - 1) <= (1 + 2.0**-40 / x) / 128 + 2.0**-22


@pytest.mark.parametrize(("grid", "limit"), [(RATIO, 100.0), (LENGTH, 2.0**40)], ids=["ratio", "length"])
def test_beyond_the_limit_a_value_is_infinite(grid: Grid, limit: float) -> None:
    beyond = limit * (1 + 1 / 64)
    values = np.array([limit, beyond, 1e30, np.inf])
    assert np.isfinite(shown(grid, values)).tolist() == [True, False, False, False]
    assert (shown(grid, values[1:]) == np.inf).all()
    assert (shown(grid, -values[1:]) == -np.inf).all()


@GRIDS
def test_nan_lands_beyond_the_limit(grid: Grid) -> None:
    assert np.isinf(shown(grid, np.array([np.nan, -np.nan]))).all()


@GRIDS
def test_the_grid_is_symmetric(grid: Grid) -> None:
    x = inside_every_bin(grid)
    assert (bins(grid, -x) == 2 * grid.reach - bins(grid, x)).all()
    assert (shown(grid, -x) == -shown(grid, x)).all()


@GRIDS
@given(hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False)))
def test_a_larger_value_is_never_in_a_lower_bin(grid: Grid, x: np.ndarray) -> None:
    assert (np.diff(bins(grid, np.sort(x))) >= 0).all()


@GRIDS
def test_zero_has_no_sign(grid: Grid) -> None:
    assert (shown(grid, np.array([0.0, -0.0])) == 0).all()


@pytest.mark.parametrize("centre", [0.0, 0.5, 1.0])
def test_values_that_occur_in_masses_are_no_nearer_than_1e4_to_an_edge(centre: float) -> None:
    near = np.linspace(centre - 1e-4, centre + 1e-4, 101)
    assert len(set(bins(RATIO, near))) == len(set(bins(RATIO, -near))) == 1


def test_no_round_number_lies_on_an_edge() -> None:
    round_ = np.concatenate([np.arange(1001) / 10, np.arange(401) / 4, np.arange(17) / 8])
    assert (bins(RATIO, round_ * (1 - 1e-6)) == bins(RATIO, round_ * (1 + 1e-6))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_bin_is_that_of_the_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5).to(dtype)
    assert torch.equal(RATIO.index(x), RATIO.index(x.float()))


def test_reading_the_bin_leaves_the_values_alone() -> None:
    x = torch.tensor([-1.5, 0.0, 2.5])
    RATIO.index(x)
    assert x.tolist() == [-1.5, 0.0, 2.5]


# --- Histogram --------------------------------------------------------------------------------------------------------


def histogram(
    values: np.ndarray, keep: np.ndarray | None = None, cuts: tuple[int, ...] = (), grid: Grid = RATIO
) -> Histogram:
    """A histogram to which the rows of `values` are given in the parts that `cuts` makes."""
    counted = Histogram(values.shape[1], grid, max(1, len(values)))
    kept = [None] * (len(cuts) + 1) if keep is None else np.split(keep, cuts)
    for part, mask in zip(np.split(values, cuts), kept, strict=True):
        counted.add(torch.from_numpy(part), None if mask is None else torch.from_numpy(mask))
    return counted


def assert_near_numpy(counted: Histogram, values: np.ndarray, q: tuple[float, ...] = Q) -> None:
    """Each order statistic may be off by the bound; what is interpolated between two, by the larger."""
    values = values.astype(np.float64)
    truth = np.quantile(values, q, axis=0, method="linear").T
    neighbours = [np.quantile(values, q, axis=0, method=method).T for method in ("lower", "higher")]
    assert (np.abs(counted.quantiles(q) - truth) <= np.maximum(*map(ratio_bound, neighbours)) + 1e-12).all()


@st.composite
def tables(draw: st.DrawFn, limit: float = 100.0) -> tuple[np.ndarray, tuple[int, ...]]:
    """Values [row, channel] and where to cut the rows."""
    shape = draw(st.tuples(st.integers(1, 30), st.integers(1, 3)))
    values = draw(hnp.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32)))
    return values, tuple(sorted(draw(st.lists(st.integers(0, shape[0]), max_size=4))))


@pytest.mark.promise("statistics")
@given(tables())
def test_quantiles_are_numpys_within_the_bound_for_any_chunks(table: tuple[np.ndarray, tuple[int, ...]]) -> None:
    values, cuts = table
    assert_near_numpy(histogram(values, cuts=cuts), values)


@given(st.integers(0, 2**32 - 1), st.integers(257, 1500), st.lists(st.integers(0, 1500), max_size=6))
def test_quantiles_are_numpys_for_more_rows_than_are_stashed(seed: int, rows: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, 3)) * [0.3, 3, 15]).clip(-100, 100)
    assert_near_numpy(histogram(values, cuts=tuple(sorted(min(cut, rows) for cut in cuts))), values)


def test_quantiles_are_numpys_for_many_channels() -> None:
    values = np.random.default_rng(0).standard_normal((300, 9000)).astype(np.float32)
    assert_near_numpy(histogram(values), values, (0.125, 0.5))


@pytest.mark.promise("batches")
@given(tables(), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_the_order(table: tuple[np.ndarray, tuple[int, ...]], rng: random.Random) -> None:
    values, cuts = table
    order = rng.sample(range(len(values)), len(values))
    once, again = histogram(values), histogram(values[order], cuts=cuts)
    assert (once.counts == again.counts).all()
    assert (once.quantiles(Q) == again.quantiles(Q)).all()


@given(tables(), st.data())
def test_what_is_not_kept_is_counted_apart(table: tuple[np.ndarray, tuple[int, ...]], data: st.DataObject) -> None:
    values, cuts = table
    keep = data.draw(hnp.arrays(bool, values.shape))
    counted = histogram(np.where(keep, values, np.nan), keep, cuts)
    assert counted.left_out.tolist() == (~keep).sum(axis=0).tolist()
    for channel, kept in enumerate(keep.T):
        alone = histogram(values[kept, channel : channel + 1])
        assert (counted.counts[channel] == alone.counts[0]).all()
        assert np.array_equal(counted.quantiles(Q)[channel], alone.quantiles(Q)[0], equal_nan=True)


@given(tables(1e6), st.integers(0, 30), st.data())
def test_merged_is_whole(table: tuple[np.ndarray, tuple[int, ...]], at: int, data: st.DataObject) -> None:
    values, cuts = table
    keep = data.draw(hnp.arrays(bool, values.shape))
    left, right = histogram(values[:at], keep[:at]), histogram(values[at:], keep[at:])
    left.take(right.state())
    whole = histogram(values, keep, cuts)
    assert (left.counts == whole.counts).all()
    assert (left.left_out == whole.left_out).all()


def test_asking_half_way_changes_nothing() -> None:
    values = np.random.default_rng(0).standard_normal((700, 2))
    counted = histogram(values[:300])
    assert counted.counts.sum() == 600
    assert counted.left_out.sum() == 0
    counted.add(torch.from_numpy(values[300:]))
    assert (counted.counts == histogram(values).counts).all()


@given(tables(1e6))
def test_the_mirrored_values_have_the_mirrored_quantiles(table: tuple[np.ndarray, tuple[int, ...]]) -> None:
    values = table[0]
    mirrored = -histogram(-values).quantiles(tuple(1 - q for q in Q))
    np.testing.assert_allclose(histogram(values).quantiles(Q), mirrored, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([-1e6, -2, 0, 3, 1e6], (0.0, 0.5, 1.0), [-np.inf, 0, np.inf]),
        ([-1e6, -2, 0, 3, 1e6], (0.1, 0.9), [-np.inf, np.inf]),  # between a finite and an infinite one
        ([-1e6, -2e6, 1e6, 2e6], (0.1, 0.9), [-np.inf, np.inf]),  # between two infinite ones
        ([-1e6, 1e6], (0.5,), [np.nan]),  # anything between −∞ and ∞
    ],
)
def test_an_order_statistic_beyond_the_limit_is_infinite(values: list, q: tuple, expected: list) -> None:
    counted = histogram(np.array(values, dtype=np.float64)[:, None])
    assert np.array_equal(counted.quantiles(q)[0], expected, equal_nan=True)


def test_an_empty_channel_is_nan_and_its_neighbours_are_not() -> None:
    values = np.tile([1.0, 0.0, -1.0], (5, 1))
    keep = np.tile([True, False, True], (5, 1))
    median = histogram(values, keep).quantiles((0.5,))[:, 0]
    assert np.isnan(median).tolist() == [False, True, False]
    assert median[0] == -median[2] == pytest.approx(1, abs=0.01)


def test_a_histogram_of_nothing_is_nan() -> None:
    assert np.isnan(Histogram(2, RATIO, 10).quantiles(Q)).all()


@pytest.mark.parametrize("rows", [1, 2**15 - 1, 2**15, 2**31 - 1, 2**31])
def test_a_count_has_room_for_all_rows(rows: int) -> None:
    assert np.iinfo(Histogram(1, RATIO, rows).counts.dtype).max >= rows


def test_a_full_narrow_counter_does_not_overflow_when_channels_are_summed() -> None:
    full = Histogram(3, RATIO, 2**15 - 1)
    full.add(torch.full((2**15 - 1, 3), 200.0))
    assert full.beyond.sum() == 3 * (2**15 - 1)
    assert (full.quantiles((0.5,)) == np.inf).all()


def test_lengths_are_counted_on_their_own_grid() -> None:
    values = 2.0 ** np.random.default_rng(0).uniform(-20, 39, (501, 1))
    truth = np.quantile(values, Q, axis=0).T
    np.testing.assert_allclose(histogram(values, grid=LENGTH).quantiles(Q), truth, rtol=1.0001 / 128)


# --- Tree -------------------------------------------------------------------------------------------------------------


def tree_of(parts: dict[int, object], combine: Callable = add, *codec: Callable) -> Tree:
    tree = Tree(combine, *codec)
    for batch, value in parts.items():
        tree.add(batch, value)
    return tree


def bracket(left: str, right: str) -> str:
    return f"({left}{right})"


def pairwise(values: list[torch.Tensor]) -> torch.Tensor:
    half = len(values) // 2
    return pairwise(values[:half]) + pairwise(values[half:]) if half else values[0]


def rough(n: int, seed: int) -> list[torch.Tensor]:
    """Vectors whose sum depends on the order of addition."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy((rng.standard_normal(64) * 10.0 ** rng.integers(-4, 4, 64)).astype("f")) for _ in range(n)]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, "0"),
        (2, "(01)"),
        (3, "((01)2)"),
        (4, "((01)(23))"),
        (5, "(((01)(23))4)"),
        (7, "((((01)(23))(45))6)"),
        (8, "(((01)(23))((45)(67)))"),
        (10, "((((01)(23))((45)(67)))(89))"),
    ],
)
def test_the_batches_are_combined_as_brackets_say(n: int, expected: str) -> None:
    assert tree_of({batch: str(batch) for batch in range(n)}, bracket).total() == expected


@pytest.mark.parametrize(
    ("batches", "expected"),
    [([3, 4, 5, 6, 7], "(3((45)(67)))"), ([0, 2, 3], "(0(23))"), ([1, 2], "(12)"), ([9, 5, 4, 0], "((0(45))9)")],
)
def test_part_of_the_batches_is_combined_in_the_order_of_the_batches(batches: list[int], expected: str) -> None:
    assert tree_of({batch: str(batch) for batch in batches}, bracket).total() == expected


def numbered(text: str) -> dict[str, torch.Tensor]:
    return {"": torch.tensor([*map(ord, text)])}


def spelled(named: dict[str, torch.Tensor]) -> str:
    return "".join(map(chr, named[""].tolist()))


@given(st.integers(1, 40), st.data())
def test_no_arrival_order_and_no_partition_changes_the_brackets(n: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(n)))
    owner = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    texts = [f"[{i}]" for i in range(n)]
    mine = [{i: texts[i] for i in order if owner[i] == k} for k in range(3)]
    first, *others = [tree_of(parts, bracket, numbered, spelled) for parts in mine]
    for other in others:
        first.take(other.state())
    assert first.total() == tree_of(dict(enumerate(texts)), bracket).total()


@pytest.mark.promise("batches")
@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_floats_have_the_same_bits_for_any_arrival_order_and_partition(n: int, seed: int, data: st.DataObject) -> None:
    values = rough(n, seed)
    order = data.draw(st.permutations(range(n)))
    cut = data.draw(st.integers(0, n))
    left, right = ({i: values[i] for i in part} for part in (order[:cut], order[cut:]))
    merged = tree_of(left)
    merged.take(tree_of(right).state())
    assert torch.equal(merged.total(), tree_of(dict(enumerate(values))).total())


@pytest.mark.parametrize("n", [1, 2, 4, 16, 128])
def test_floats_are_added_pairwise(n: int) -> None:
    values = rough(n, seed=n)
    total = tree_of(dict(enumerate(values))).total()
    assert torch.equal(total, pairwise(values))
    if n > 4:
        assert not torch.equal(total, reduce(add, values)), "the values are too tame to tell one order from another"


def test_in_order_no_more_than_log2_of_the_parts_are_alive() -> None:
    class Part:
        pass

    alive: weakref.WeakSet[Part] = weakref.WeakSet()

    def part() -> Part:
        alive.add(made := Part())
        return made

    tree = Tree[Part](lambda left, right: part())
    for batch in range(1000):
        tree.add(batch, part())
        assert len(alive) <= np.log2(batch + 1) + 1


def test_asking_for_the_total_leaves_the_tree_as_it_is() -> None:
    tree = tree_of({i: str(i) for i in range(3)}, bracket)
    assert tree.total() == tree.total() == "((01)2)"
    tree.add(3, "3")
    assert tree.total() == "((01)(23))"


def test_an_empty_tree_has_no_total() -> None:
    with pytest.raises(KeyError, match="empty tree"):
        Tree(add).total()


# --- ClusterSums ------------------------------------------------------------------------------------------------------


def prompts(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters of these sizes: cluster [prompt], y [prompt, node = 3, writer = 2], x [prompt, writer]."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.gamma(3.0, 1.0, (len(cluster), 2)) * (1 + rng.gamma(2.0, 1.0, (len(sizes), 1)))[cluster]
    slope = rng.normal([[-0.4], [0.1], [0.9]], 0.3, (len(sizes), 3, 1))[cluster]
    return cluster, slope * x[:, None] + rng.normal(0, 0.5, (len(cluster), 3, 2)), x


def sums_of(cluster: np.ndarray, y: np.ndarray, x: np.ndarray) -> list[ClusterSums]:
    return [
        ClusterSums.of(int(c), torch.from_numpy(b), torch.from_numpy(a)) for c, b, a in zip(cluster, y, x, strict=True)
    ]


def by_cluster(cluster: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.stack([values[cluster == c].sum(axis=0) for c in np.unique(cluster)])


def by_formula(cluster: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share and its standard error from the residuals of the clusters."""
    y, x = by_cluster(cluster, y), by_cluster(cluster, x)
    share = y.sum(axis=0) / x.sum(axis=0)
    residual = y - share * x[:, None]
    n = len(x)
    return share, np.sqrt(n / (n - 1) * (residual**2).sum(axis=0)) / x.sum(axis=0)


def assert_same(sums: ClusterSums, truth: tuple[np.ndarray, np.ndarray]) -> None:
    share, error = sums.share()
    np.testing.assert_allclose(share, truth[0], rtol=1e-10)
    np.testing.assert_allclose(error, truth[1], rtol=1e-8)


def fold_at_random(sums: list[ClusterSums], rng: random.Random) -> ClusterSums:
    if len(sums) == 1:
        return sums[0]
    at = rng.randrange(1, len(sums))
    return fold_at_random(sums[:at], rng) + fold_at_random(sums[at:], rng)


def test_a_share_worked_by_hand() -> None:
    # Clusters (Y, X) = (1, 1) and (1, 3): β = 2/4; residuals ±1/2; SE = √(2 · (1/4 + 1/4)) / 4.
    one, three = (ClusterSums.of(i, torch.ones(1, 1), torch.tensor([x])) for i, x in enumerate((1.0, 3.0)))
    share, error = (one + three).share()
    assert (share.item(), error.item()) == (0.5, 0.25)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=40), st.floats(-3, 3))
@example([1.0, 1.21875], 5.7687801799979055e-158)
def test_an_error_of_rounding_alone_is_none_and_a_small_one_stays(x: list[float], share: float) -> None:
    energy = torch.tensor(x, dtype=torch.float64)[:, None]
    near = share * energy[:, None] + 1e-3 * energy[:, None] * (torch.arange(len(x)) % 2)[:, None, None]
    exact, apart = (ClusterSums.over(np.arange(len(x)), y, energy).share()[1] for y in (share * energy[:, None], near))
    assert exact.item() == 0
    residual = near[:, 0] - near.sum() / energy.sum() * energy
    want = float((len(x) / (len(x) - 1) * residual.square().sum()).sqrt() / energy.sum())
    assert apart.item() == pytest.approx(want, rel=1e-3)


@pytest.mark.promise("statistics")
@given(st.lists(st.integers(1, 4), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_share_and_error_are_the_formulas_wherever_clusters_are_split(sizes: list[int], rng: random.Random) -> None:
    data = prompts(sizes)
    folded = fold_at_random(sums_of(*data), rng)
    assert_same(folded, by_formula(*data))
    assert folded.closed().n == len(sizes)
    np.testing.assert_allclose(folded.closed().x, data[2].sum(axis=0))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=8), st.permutations(range(40)))
def test_share_and_error_come_out_of_a_tree_in_any_arrival_order(sizes: list[int], order: list[int]) -> None:
    data = prompts(sizes)
    sums = sums_of(*data)
    tree = tree_of({i: sums[i] for i in order if i < len(sums)})
    assert_same(tree.total(), by_formula(*data))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 100])
def test_a_cluster_over_a_batch_border_counts_as_one(batch: int) -> None:
    data = prompts([3, 1, 4, 2, 6, 5])
    sums = sums_of(*data)
    batches = [reduce(add, sums[first : first + batch]) for first in range(0, len(sums), batch)]
    assert_same(reduce(add, batches), by_formula(*data))


def test_every_split_point_gives_the_same_value() -> None:
    data = prompts([2, 3, 1, 4])
    sums = sums_of(*data)
    for at in range(1, len(sums)):
        assert_same(reduce(add, sums[:at]) + reduce(add, sums[at:]), by_formula(*data))


@pytest.mark.promise("statistics")
def test_the_error_is_what_a_bootstrap_over_clusters_finds() -> None:
    data = prompts(np.random.default_rng(1).integers(1, 4, 200).tolist())
    y, x = by_cluster(data[0], data[1]), by_cluster(data[0], data[2])
    drawn = np.random.default_rng(2).multinomial(len(x), np.full(len(x), 1 / len(x)), size=4000).astype(float)
    shares = np.einsum("bc,cew->bew", drawn, y) / (drawn @ x)[:, None]
    error = reduce(add, sums_of(*data)).share()[1]
    np.testing.assert_allclose(error, shares.std(axis=0), rtol=0.1)


def test_prompts_of_one_document_are_not_independent_evidence() -> None:
    cluster, y, x = prompts([1] * 30)
    copies = [np.repeat(part, 5, axis=0) for part in (cluster, y, x)]
    alone, copied = (reduce(add, sums_of(*data)) for data in ((cluster, y, x), copies))
    np.testing.assert_allclose(copied.share()[1], alone.share()[1])
    assert copied.closed().n == alone.closed().n == 30


def test_one_cluster_has_a_share_and_no_error() -> None:
    share, error = reduce(add, sums_of(*prompts([3]))).share()
    assert np.isfinite(share).all()
    assert np.isnan(error).all()


def test_a_writer_that_never_writes_has_no_share() -> None:
    cluster, y, x = prompts([1, 1, 1])
    y[..., 1], x[..., 1] = 0, 0
    share, error = reduce(add, sums_of(cluster, y, x)).share()
    assert np.isnan(share).tolist() == np.isnan(error).tolist() == [[False, True]] * 3


def test_equal_shares_in_all_clusters_have_no_error() -> None:
    cluster, y, x = prompts([2, 1, 3])
    share, error = reduce(add, sums_of(cluster, 0.3 * x[:, None] + 0 * y, x)).share()
    np.testing.assert_allclose(share, 0.3)
    np.testing.assert_allclose(error, 0, atol=1e-7)


# --- Ledger -----------------------------------------------------------------------------------------------------------


def test_a_ledger_adds_sums_in_place_and_replaces_what_has_a_name() -> None:
    def kept(value: float) -> tuple[Ledger, dict[str, Any]]:
        tree = tree_of({int(value): torch.tensor(value)})
        parts = {"sum": np.full(2, value), "total": torch.tensor(value), "said": {f"{value}": np.array(value)}}
        return Ledger({**parts, "inner": Ledger({"tree": tree})}), {**parts, "tree": tree}

    (mine, parts), (other, _) = kept(2.0), kept(3.0)
    mine.take(other.state())
    assert parts["sum"].tolist() == [5.0, 5.0]
    assert parts["total"] == 5
    assert parts["tree"].total() == 5
    assert parts["said"] == {"2.0": 2.0, "3.0": 3.0}
    mine.only(["sum"]).take(other.only(["sum", "total"]).state())
    assert (parts["sum"].tolist(), float(parts["total"])) == ([8.0, 8.0], 5.0)
