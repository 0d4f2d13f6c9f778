"""Is a step through a softmax exact where one score alone moves, however saturated the row?"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from unwrite.run.backward.saturation import exact_change

GAPS = (0.0, 1.0, 5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0)


def brute_force(scores: Tensor, step: Tensor, worth: Tensor) -> Tensor:
    """Σ_k (p'_k − p_k) worth_k, a softmax of the whole row for every key that moves, in float64."""
    scores, step, worth = (part.double() for part in (scores, step, worth))
    before = scores.softmax(-1)
    made = []
    for key in range(scores.shape[-1]):
        moved = scores.clone()
        moved[..., key] += torch.where(scores[..., key].isfinite(), step[..., key], 0.0)
        made.append(((moved.softmax(-1) - before) * worth).sum(-1))
    return torch.stack(made, -1)


def rows(gap: float, keys: int = 9, seed: int = 0, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in which one key leads by about `gap`, steps of every size and either sign, and what each key is worth."""
    draw = torch.Generator().manual_seed(seed)
    scores, worth = (torch.randn(n, keys, generator=draw) for _ in range(2))
    lead = torch.randint(keys, (n, 1), generator=draw)
    scores.scatter_add_(-1, lead, torch.full((n, 1), gap))
    step = torch.randn(n, keys, generator=draw) * torch.logspace(-3, 2, n)[:, None]
    # A patch that brings down the key that leads is what the fix is for.
    step[n // 2 :] = step[n // 2 :].scatter(-1, lead[n // 2 :], -gap * torch.rand(n - n // 2, 1, generator=draw) * 2)
    # Each row's last keys lie behind the query and are not seen, the first row's all but one.
    hidden = torch.arange(keys) > torch.arange(n)[:, None]
    scores = scores.masked_fill(hidden & ~torch.zeros_like(hidden).scatter(-1, lead, True), -torch.inf)
    return scores, step, worth


@pytest.mark.parametrize("gap", GAPS)
def test_float32_says_what_a_softmax_in_float64_says(gap: float) -> None:
    worst = 0.0
    for seed in range(8):
        scores, step, worth = rows(gap, seed=seed)
        got = exact_change(scores, step, worth)
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        worst = max(worst, float((got.double() - brute_force(scores, step, worth)).abs().max() / worth.abs().max()))
    assert worst <= 1e-6


@pytest.mark.parametrize("gap", GAPS)
def test_float64_is_exact_to_its_own_digits(gap: float) -> None:
    scores, step, worth = (part.double() for part in rows(gap))
    got = exact_change(scores, step, worth)
    torch.testing.assert_close(got, brute_force(scores, step, worth), rtol=0, atol=1e-14 * float(worth.abs().max()))


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=6),
    st.lists(st.floats(-200, 200, width=32), min_size=6, max_size=6),
    st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6),
)
def test_any_row_is_exact(scores: list[float], step: list[float], worth: list[float]) -> None:
    """Ties, keys far apart, steps far beyond the others."""
    made = [torch.tensor(part[: len(scores)], dtype=torch.float64) for part in (scores, step, worth)]
    got = exact_change(*made)
    assert got.isfinite().all()
    torch.testing.assert_close(got, brute_force(*made), rtol=0, atol=1e-12)


def test_a_small_step_is_what_the_slope_says() -> None:
    """c(e_t − p) with c = p δ to first order: the rest is a quarter at half the step."""
    scores, step, worth = (part.double() for part in rows(1.0))
    p = scores.softmax(-1)
    slope = p * (worth - (p * worth).sum(-1, keepdim=True))
    step = step.sign().where(scores.isfinite(), 0.0)
    rest = [(exact_change(scores, e * step, worth) - e * step * slope).abs().max() for e in (1e-3, 5e-4)]
    assert float(rest[0] / rest[1]) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0])
def test_what_is_left_of_a_saturated_row_keeps_its_digits(gap: float) -> None:
    """The key that holds nearly all of it goes a little up or down: what changes is small, and not rounding."""
    scores = torch.tensor([0.3, gap, -0.2, 0.1])
    worth = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for move in (3.0, 0.5, -0.5, -3.0):
        step = torch.tensor([0.0, move, 0.0, 0.0])
        want = brute_force(scores - gap, step, worth)[1] if gap < 30 else -_left(scores, move, worth)
        assert float(exact_change(scores, step, worth)[1]) == pytest.approx(float(want), rel=1e-4)


def _left(scores: Tensor, move: float, worth: Tensor) -> float:
    """What the others of a row gain, as exponentials: beside 1 they are nothing."""
    others = (scores.double() - scores[1].double()).exp()
    others[1] = 0
    gain = (others * (worth - worth[1]).double()).sum()
    return float(gain - gain * np.exp(-move))


def test_a_row_of_one_key_and_keys_that_are_not_seen_change_nothing() -> None:
    scores = torch.tensor([[3.0, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf]])
    got = exact_change(scores, torch.full((2, 3), 7.0), torch.tensor([1.0, -2.0, 5.0]).expand(2, 3))
    assert not got[0].any()
    assert got[1, 2] == 0
    assert got[1, :2].all()
    # What an unseen key would step by is of no account, whatever it is.
    wild = torch.tensor([[7.0, torch.inf, torch.nan], [7.0, 7.0, torch.nan]])
    assert torch.equal(exact_change(scores, wild, torch.tensor([1.0, -2.0, 5.0]).expand(2, 3)), got)


def test_a_step_that_would_overflow_is_a_whole_turn() -> None:
    """The key takes all, or gives all away to the others in their proportions."""
    scores, worth = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    p = np.exp([0.0, 1, 2]) / np.exp([0.0, 1, 2]).sum()
    for key in range(3):
        for sign in (1, -1):
            step = torch.zeros(1, 3)
            step[0, key] = sign * 1e4
            gone = np.delete(p, key) / np.delete(p, key).sum() @ np.delete([1.0, 2, 4], key)
            want = ([1.0, 2, 4][key] if sign > 0 else gone) - p @ [1.0, 2, 4]
            assert float(exact_change(scores, step, worth)[0, key]) == pytest.approx(want, rel=1e-5)
