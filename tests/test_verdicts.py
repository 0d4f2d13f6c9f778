"""Do the rules of a verdict say what they ask for, and are the numbers they rest on calibrated?"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from unwrite.stats.verdicts import (
    CRITERIA,
    Sums,
    by_document,
    by_erasing,
    cuts,
    estimate,
    judge,
    left_out,
    ratio,
    special,
    together,
    with_decoy,
)

DOCUMENTS, WRITERS, DECOYS = 8, 60, 4
DRAW = np.random.default_rng(0)


def sums(own: np.ndarray, decoys: np.ndarray, noise: float = 0.02, documents: int = DOCUMENTS) -> Sums:
    """Every write's energy is 1 in every document; survivals vary about these by `noise`. Signs are as decoys are."""
    level = np.concatenate([own[:, None], decoys, decoys], 1)
    draws = decoys.shape[1]
    y = level + noise * np.random.default_rng(1).standard_normal((documents, *level.shape))
    nobody = np.zeros((documents, len(own), 3))
    columns = {"typical": slice(1, 1 + draws), "signs": slice(1 + draws, 1 + 2 * draws)}
    depth = np.arange(len(own)) % 10
    return Sums(y, np.ones_like(y), columns, depth, nobody, nobody, np.array([0, 0, 1]))


def ordinary(level: float, spread: float = 0.05) -> np.ndarray:
    return level + spread * np.random.default_rng(2).standard_normal((WRITERS, DECOYS))


def test_a_ratio_s_interval_covers_the_truth_as_often_as_it_says() -> None:
    energy = DRAW.gamma(4.0, size=(20_000, 10))
    for n in (5, 10):
        x = energy[:, :n]
        y = 0.4 * x + 0.2 * np.sqrt(x) * DRAW.standard_normal(x.shape)
        # Documents first; each simulated study is a writer.
        found = estimate(ratio(left_out(y.T), left_out(x.T)))
        covers = ((found.low <= 0.4) & (found.high >= 0.4)).mean()
        assert 0.93 <= covers <= 0.97, (n, covers)


def test_one_document_has_no_interval() -> None:
    found = estimate(ratio(left_out(np.ones((1, 3))), left_out(np.ones((1, 3)))))
    np.testing.assert_array_equal(found.value, 1.0)
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


def slow_q(writers: np.ndarray, decoys: np.ndarray) -> list[float]:
    rates = {t: (1 + sum(decoys <= t)) / len(decoys) * len(writers) / sum(writers <= t) for t in writers}
    return [min(1.0, *(rate for t, rate in rates.items() if t >= z)) for z in writers]


@given(arrays(float, st.integers(1, 12), elements=st.floats(-5, 5)), arrays(float, 20, elements=st.floats(-5, 5)))
def test_q_is_the_lowest_rate_at_which_a_writer_is_among_the_special(writers: np.ndarray, decoys: np.ndarray) -> None:
    np.testing.assert_allclose(special(writers, decoys), slow_q(writers, decoys))


def test_of_what_is_called_special_no_more_is_so_by_chance_than_stated() -> None:
    false, true = [], []
    for _ in range(300):
        writers, decoys = DRAW.standard_t(3, size=100), DRAW.standard_t(3, size=400)
        writers[:15] -= 12.0
        called = special(writers, decoys) <= CRITERIA.q
        false.append(called[15:].sum() / max(1, called.sum()))
        true.append(called[:15].mean())
    assert np.mean(false) <= CRITERIA.q
    assert np.mean(true) >= 0.8


def test_among_ordinary_writes_hardly_one_is_special() -> None:
    found = judge(sums(ordinary(0.6)[:, 0], ordinary(0.6)))
    assert set(found.verdict) <= {"like others", "undecided"}


def cause(whole: Sums, erased: float, filled_in: float) -> Sums:
    """The same with two later blocks: one writes against every write, the other fills in for it when it is gone."""
    along = np.zeros((whole.documents, len(whole.depth), 3))
    acts = np.zeros_like(along)
    along[..., 1] = acts[..., 1] = -erased
    acts[..., 2] = -filled_in
    jitter = 1 + 0.05 * np.random.default_rng(3).standard_normal(along.shape)
    return replace(whole, along=along * jitter, acts=acts * jitter, block=np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("level", "by", "word"),
    [
        (0.05, (0.9, 0.1), "erased"),
        (0.05, (0.1, 0.9), "filled in"),
        (0.05, (0.0, 0.0), "reduced"),  # nobody knows by whom
        (0.40, (0.5, 0.0), "reduced"),  # more than half of the ordinary is left
        (1.05, (0.0, 0.0), "kept"),
        (1.60, (0.0, 0.0), "amplified"),
    ],
)
def test_each_word_is_said_of_what_it_asks_for(level: float, by: tuple[float, float], word: str) -> None:
    own = ordinary(0.7)[:, 0].copy()
    own[:12] = level
    found = judge(cause(sums(own, ordinary(0.7)), *by))
    assert found.verdict[:12] == [word] * 12
    assert not set(found.verdict[12:]) & {"erased", "filled in", "reduced", "kept", "amplified"}


def test_a_difference_that_is_small_is_none() -> None:
    own = np.full(WRITERS, 0.85)
    found = judge(sums(own, ordinary(0.92, 0.005), noise=0.002))
    assert set(found.verdict) == {"like others"}


def test_where_ordinary_writes_end_anywhere_nothing_is_said() -> None:
    own = np.full(WRITERS, -3.0)
    found = judge(sums(own, ordinary(0.5, 2.0)))
    assert set(found.verdict) == {"undecided"}
    assert np.isnan(found.z).all()


def test_few_documents_decide_nothing() -> None:
    own = ordinary(0.7)[:, 0].copy()
    own[:12] = 0.0
    found = judge(sums(own, ordinary(0.7), documents=CRITERIA.documents - 1))
    assert set(found.verdict) == {"undecided"}


def test_what_survives_as_little_with_other_signs_is_not_reduced() -> None:
    own = ordinary(0.7)[:, 0].copy()
    own[:12] = 0.05
    whole = sums(own, ordinary(0.7))
    y = whole.y.copy()
    y[:, :12, whole.columns["signs"]] -= 0.65
    found = judge(replace(whole, y=y))
    assert not set(found.verdict) & {"erased", "filled in", "reduced"}


def test_a_decoy_put_in_as_a_writer_is_called_special_no_more_often_than_stated() -> None:
    own = ordinary(0.7)[:, 0].copy()
    own[:12] = 0.05
    whole, called = sums(own, ordinary(0.7)), 0
    for draw in range(DECOYS):
        asked = with_decoy(whole, "typical", draw)
        np.testing.assert_array_equal(asked.y[..., 0], whole.y[..., 1 + draw])
        assert asked.columns == {"typical": slice(1, DECOYS), "signs": slice(DECOYS, 2 * DECOYS)}
        called += sum(word not in ("like others", "undecided") for word in judge(asked).verdict)
    assert called <= CRITERIA.q * WRITERS * DECOYS


@given(arrays(float, (3, 2, 6), elements=st.floats(-2, 2)), arrays(float, (3, 2, 6), elements=st.floats(-2, 2)))
def test_however_nodes_are_put_together_both_parts_sum_to_what_they_do(along: np.ndarray, acts: np.ndarray) -> None:
    block, energy = np.array([0, 0, 1, 1, 1, 2]), np.ones((3, 2))
    for a, b in ((along, acts), (together(along, block), together(acts, block))):
        erased, filled_in = cuts(a, b, energy)
        np.testing.assert_allclose(erased + filled_in, acts.sum(-1), atol=1e-12)


def test_by_whom_is_undecided_where_blocks_say_otherwise() -> None:
    whole = sums(np.zeros(2), np.zeros((2, 2)))
    along, acts = np.zeros((DOCUMENTS, 2, 3)), np.zeros((DOCUMENTS, 2, 3))
    # Two heads of one block: one writes against it, the other for it, and both only because it is there …
    along[..., 0], along[..., 1] = -1.0, 0.4
    acts[..., 0], acts[..., 1] = -1.0, 0.0
    # … so the block as a whole writes −.6 with it and +.4 without: it is filled in as much as erased.
    acts[:, 1, 1] = 0.0
    along[:, 1, 1] = 1.6
    jitter = 1 + 0.01 * np.random.default_rng(3).standard_normal(along.shape)
    whole = replace(whole, along=along * jitter, acts=acts * jitter, block=np.array([0, 0, 1]))
    assert by_erasing(whole).tolist() == [-1, 0]


def test_prompts_of_one_document_are_one() -> None:
    found = by_document(np.arange(8.0).reshape(4, 2), np.array([7, 3, 7, 3]))
    np.testing.assert_array_equal(found, [[2 + 6, 3 + 7], [0 + 4, 1 + 5]])


def test_a_word_that_hangs_on_few_channels_is_not_said_unless_these_hold_the_write() -> None:
    own = ordinary(0.7)[:, 0].copy()
    own[:12] = 0.05
    whole, others = cause(sums(own, ordinary(0.7)), 0.9, 0.1), ordinary(0.7)
    fewer = cause(sums(np.where(np.arange(WRITERS) < 6, 0.7, own), others), 0.9, 0.1)
    # Of the first three hardly any energy is left without those channels: the word is about these.
    x, y = fewer.x.copy(), fewer.y.copy()
    x[:, :3] *= 0.3
    y[:, :3] *= 0.3
    found = judge(whole, fewer=replace(fewer, x=x, y=y))
    assert found.verdict[:12] == ["erased"] * 3 + ["undecided"] * 3 + ["erased"] * 6
    np.testing.assert_array_equal(np.flatnonzero(found.hangs[:12]), [3, 4, 5])
    assert found.verdict[12:] == judge(whole).verdict[12:]
