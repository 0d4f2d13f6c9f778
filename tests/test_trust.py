"""Are correlation, slope, sign agreement and interval those of scipy and pandas on the same cells?"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from unwrite.stats.bootstrap import moments
from unwrite.stats.jackknife import interval
from unwrite.stats.ranks import MATERIAL, by_size, same_sign
from unwrite.stats.trust import FORMS, trust

PROMPTS, NODES = 14, 5
ALONE, PAIRS = np.arange(PROMPTS), np.arange(PROMPTS) // 2
each_form = pytest.mark.parametrize("form", FORMS)


def cells(seed: int = 0, prompts: int = PROMPTS, nodes: int = NODES) -> tuple[np.ndarray, np.ndarray]:
    """Readings and totals with means of their own for every node and prompt, so that the three forms differ."""
    rng = np.random.default_rng(seed)
    reading = rng.normal(size=(prompts, nodes)) + 2 * rng.normal(size=nodes) + rng.normal(size=(prompts, 1))
    total = (
        0.5 * reading + rng.normal(size=(prompts, nodes)) - 3 * rng.normal(size=nodes) + rng.normal(size=(prompts, 1))
    )
    return reading, total


def centred(reading: np.ndarray, total: np.ndarray, form: str) -> pd.DataFrame:
    """One row per cell, less the mean of its node or prompt, by pandas."""
    prompt, node = np.indices(reading.shape)
    frame = pd.DataFrame({"x": reading.ravel(), "y": total.ravel(), "prompt": prompt.ravel(), "node": node.ravel()})
    if form == "pooled":
        return frame
    means = frame.groupby(form.removeprefix("within_"))[["x", "y"]].transform("mean")
    return frame.assign(x=frame.x - means.x, y=frame.y - means.y)


def same(one: object, other: object) -> None:
    for name, value in dataclasses.asdict(one).items():
        assert value == pytest.approx(getattr(other, name), rel=1e-9, nan_ok=True), name


@each_form
@pytest.mark.parametrize("seed", range(3))
def test_correlation_and_slope_are_those_of_scipy(form: str, seed: int) -> None:
    reading, total = cells(seed)
    found, frame = trust(reading, total, PAIRS, form), centred(reading, total, form)
    assert found.correlation == pytest.approx(stats.pearsonr(frame.x, frame.y).statistic, rel=1e-10)
    assert found.slope == pytest.approx(stats.linregress(frame.x, frame.y).slope, rel=1e-10)
    assert found.n == PROMPTS * NODES
    assert found.low < found.correlation < found.high


def test_the_three_forms_are_three_numbers() -> None:
    found = [trust(*cells(), ALONE, form).correlation for form in FORMS]
    assert min(abs(a - b) for i, a in enumerate(found) for b in found[:i]) > 0.05


@each_form
@pytest.mark.parametrize("cluster", [ALONE, PAIRS], ids=["prompts", "pairs"])
def test_the_interval_is_a_t_interval_on_the_jackknife_of_fishers_z(form: str, cluster: np.ndarray) -> None:
    """By pandas and scipy, with each cluster's rows really left out."""
    reading, total = cells(4)

    def z(kept: np.ndarray) -> float:
        frame = centred(reading[kept], total[kept], form)
        return float(np.arctanh(stats.pearsonr(frame.x, frame.y).statistic))

    owners = np.unique(cluster)
    n, whole = len(owners), z(np.full(PROMPTS, True))
    each = np.array([n * whole - (n - 1) * z(cluster != owner) for owner in owners])
    want = np.tanh(stats.t.interval(0.95, n - 1, each.mean(), stats.sem(each)))
    ours = trust(reading, total, cluster, form)
    assert (ours.low, ours.high) == pytest.approx(tuple(want), rel=1e-9)
    assert ours.clusters == n


@each_form
def test_fewer_than_six_clusters_have_no_interval(form: str) -> None:
    reading, total = cells(4)
    for n in (1, 2, 5, 6):
        found = trust(reading, total, np.arange(PROMPTS) % n, form)
        assert np.isfinite(found.correlation)
        assert np.isfinite([found.low, found.high]).all() == (n == 6)
        assert found.clusters == n


def test_prompts_of_one_document_count_once() -> None:
    """Thirty-five copies of seven documents are seven pieces of evidence: the interval is that of the seven."""
    reading, total = cells(1, prompts=7)
    once = trust(reading, total, np.arange(7), "pooled")
    copies = np.repeat(np.arange(7), 5)
    same_documents = trust(reading[copies], total[copies], copies, "pooled")
    assert (same_documents.low, same_documents.high) == pytest.approx((once.low, once.high), rel=1e-9)
    apart = trust(reading[copies], total[copies], np.arange(35), "pooled")
    assert apart.high - apart.low < 0.8 * (once.high - once.low)


@each_form
def test_the_order_of_nodes_and_prompts_says_nothing(form: str) -> None:
    reading, total = cells(2)
    want, rng = trust(reading, total, PAIRS, form), np.random.default_rng(0)
    nodes, prompts = rng.permutation(NODES), rng.permutation(PROMPTS)
    same(trust(reading[:, nodes], total[:, nodes], PAIRS, form), want)
    same(trust(reading[prompts], total[prompts], PAIRS[prompts], form), want)


@each_form
def test_prompts_without_a_number_are_left_out(form: str) -> None:
    reading, total = cells(3)
    kept = np.setdiff1d(ALONE, [2, 5, 9])
    want = trust(reading[kept], total[kept], PAIRS[kept], form)
    reading[2, 1], total[5, :], total[9, 0] = np.nan, np.nan, np.inf
    same(trust(reading, total, PAIRS, form), want)
    assert want.n == len(kept) * NODES


@each_form
@given(
    scale=st.floats(0.01, 100), offset=st.floats(-10, 10), unit=st.floats(0.01, 100), sign=st.sampled_from([-1.0, 1.0])
)
def test_units_change_the_slope_and_a_sign_turns_the_correlation(
    form: str, scale: float, offset: float, unit: float, sign: float
) -> None:
    reading, total = cells(5)
    want = trust(reading, total, ALONE, form)
    found = trust(sign * scale * reading + offset, unit * total, ALONE, form)
    assert found.correlation == pytest.approx(sign * want.correlation, rel=1e-6)
    assert found.slope == pytest.approx(sign * want.slope * unit / scale, rel=1e-6)
    assert sorted((found.low, found.high)) == pytest.approx(sorted((sign * want.low, sign * want.high)), rel=1e-6)


def test_signs_are_compared_where_a_total_is_material() -> None:
    reading = np.array([[1.0, -1.0, 1.0, 0.0], [-1.0, 5.0, 5.0, -2.0]])
    total = np.array([[10.0, 0.51, 0.49, -3.0], [-0.1, 0.0, -0.002, -0.004]])
    # Of the first prompt 10 and 0.51 and −3 count: +, −, 0 against +, +, −. Of the second only −0.1: − against −.
    assert MATERIAL == 0.05
    assert trust(reading, total, np.arange(2), "pooled").same_sign == pytest.approx(2 / 4)
    assert np.isnan(trust(reading, 0 * total, np.arange(2), "pooled").same_sign)


@each_form
def test_perfect_readings_are_believed(form: str) -> None:
    reading, _ = cells(6)
    for factor in (2.0, -0.5):
        found = trust(reading, factor * reading, ALONE, form)
        ideal = np.sign(factor)
        assert (found.correlation, found.low, found.high) == pytest.approx((ideal, ideal, ideal), rel=1e-12)
        assert found.slope == pytest.approx(factor)
        assert found.same_sign == (factor > 0)


@each_form
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 4), (4, 1), (2, 3)])
def test_what_too_few_cells_say_is_nothing_and_no_warning(form: str, shape: tuple[int, int]) -> None:
    """Warnings are errors here. Two prompts have draws of one prompt twice, whose spread is none."""
    reading, total = (part[: shape[0], : shape[1]] for part in cells())
    found = trust(reading, total, np.arange(shape[0]), form)
    known = not (0 in shape or shape == (1, 1) or (form == "within_node" and shape[0] == 1))
    known &= not (form == "within_prompt" and shape[1] == 1)
    assert np.isfinite(found.correlation) == known
    if shape[0] < 2:
        assert np.isnan([found.low, found.high]).all()
    if np.isfinite(found.low):
        assert -1 - 1e-12 <= found.low <= found.high <= 1 + 1e-12


@each_form
@pytest.mark.parametrize("level", [0.0, 1e-3, 7.3, 1e6])
def test_a_reading_that_does_not_vary_has_no_correlation(form: str, level: float) -> None:
    """Also where the sums of its squares, less its mean, leave a rest of rounding."""
    _, total = cells(7)
    for reading, truth in ((np.full_like(total, level), total), (total, np.full_like(total, level))):
        found = trust(reading, truth, ALONE, form)
        assert np.isnan([found.correlation, found.low, found.high]).all()


def drawn(kind: str, rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of prompts whose readings and totals are alike, share what is the prompt's, or are large in few."""
    x, noise = rng.normal(size=(2, prompts, 30))
    own, more = rng.normal(size=(2, prompts, 1))
    if kind == "alike":
        return x, 0.6 * x + 0.8 * noise
    if kind == "of the prompt":
        return x + own, 0.8 * (x + own) + 0.5 * noise + 0.5 * more
    size = np.exp(np.random.default_rng(5).normal(size=30)) * np.exp(0.5 * own)
    return size * x, size * x * (0.8 + 0.3 * more) + 0.5 * size * noise


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("kind", ["alike", "of the prompt", "large in few"])
@pytest.mark.parametrize("prompts", [6, 10, 20])
def test_an_interval_holds_what_it_should(kind: str, prompts: int) -> None:
    """Of 600 samples about 95 % of the intervals hold the correlation that 100,000 prompts have."""
    rng = np.random.default_rng(0)
    truth = np.corrcoef(*(part.ravel() for part in drawn(kind, rng, 100_000)))[0, 1]
    bounds = [interval(moments(*drawn(kind, rng, prompts)).sum(2, keepdims=True)) for _ in range(600)]
    low, high = np.array(bounds).T
    assert 0.90 <= ((low < truth) & (truth < high)).mean() <= 0.98


def test_signs_are_compared_where_a_cell_is_material_to_its_owner() -> None:
    y = np.array([1.0, -0.04, 0.05, 0.0, -0.001, 0.0, 0.0])
    owner = np.array([0, 0, 0, 3, 3, 1, 1])
    # Of owner 0 the first and third count, of owner 3 the fifth; of owner 1 none.
    assert same_sign(np.array([2.0, 1, -1, 1, -1, 1, -1]), y, owner) == 2 / 3
    assert np.isnan(same_sign(y[5:], y[5:], owner[5:]))
    assert np.isnan(same_sign(y[:0], y[:0], owner[:0]))


def test_cells_are_ordered_by_their_mean_size_over_pairs() -> None:
    size, order = by_size(np.array([[[1.0, -4], [0, np.nan]], [[1, 0], [-2, -6]]]))
    assert size.tolist() == [1, 2, 1, 3]
    assert order.tolist() == [3, 1, 0, 2]
