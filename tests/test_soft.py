"""Is a run with gains between base and source values what a trace with the same edits gives, and its slope, too?"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from executed import exact, weights
from patching import Alone, alone, contrasts, site
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.metrics import metric_of
from unwrite.run.backward.learn import Learning, Problem, sloped
from unwrite.run.backward.slopes import sloping
from unwrite.run.edit.slots import slots, values
from unwrite.run.replay.clean import Base, base_of
from unwrite.run.replay.soft import Blend, blend
from unwrite.run.replay.walk import Runs

# Inside attention, beside it, behind it, and a state between blocks.
NAMES = ["L0H1", "L1H0", "L1KV0.v", "MLP0", "L1.attn_out", "resid_pre1"]


@cache
def model(family: str) -> Model:
    return view(weights(family, 1, num_attention_heads=2, num_hidden_layers=2))


def blended(lm: Model, pairs: Pairs, names: Any, gate: Tensor) -> tuple[Base, Blend]:
    asked = slots(lm, names)
    base = base_of(lm, pairs, slice(0, len(pairs)), asked)
    return base, blend(base, values(lm, torch.from_numpy(pairs.source.ids), asked), gate)


def gates(pairs: Pairs, places: int, first: int = 0) -> Tensor:
    """Rows of places, one of them twice; none before `first` and behind the row that is read."""
    place = torch.arange(pairs.base.length).expand(len(pairs), -1) % (places + 1) - 1
    position = torch.arange(pairs.base.length)
    seen = (position >= first) & (position <= torch.from_numpy(pairs.row)[:, None])
    return place.masked_fill(~seen, -1)


def traced(lm: Model, one: Alone, names: list[str], gain: Tensor, gate: Tensor) -> Tensor:
    """The same by one trace of the user's model with an edit for each node: a prompt by itself, all of it."""
    given = one.values(names)
    at = torch.cat([gain, gain.new_zeros(len(names), 1)], 1)[:, gate[: len(one.base)]]
    edits = [uw.Edit.set(site(name), given[name][None], gain=at[i][None]) for i, name in enumerate(names)]
    with uw.trace(lm, edits=edits):
        return one.score(lm.hf(input_ids=one.base[None], use_cache=False).logits[:, one.row])[0]


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_blend_and_its_slope_are_those_of_one_trace_with_all_its_edits(family: str) -> None:
    """One gain a node and place, of pairs of unequal lengths that go through the blocks together from row 1 on."""
    with exact():
        lm, pairs = model(family), contrasts((5, 6))
        asked = slots(lm, NAMES)
        names = [name for slot in asked for name in slot.names]
        gain = torch.rand(len(names), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gate = gates(pairs, 2, first=1)
        metric = metric_of(lm, pairs, "logit_diff", slice(0, 2))
        _, made = blended(lm, pairs, NAMES, gate)
        for i, one in enumerate(alone(lm, pairs)):
            want = gain.clone().requires_grad_()
            value = traced(lm, one, names, want, gate[i])
            (slope,) = torch.autograd.grad(value, want)
            pair = torch.tensor([i])
            with sloping(lm):
                found, slopes = sloped(
                    {"gain": gain[None]}, lambda part, pair=pair: metric(made.finals(part["gain"], pair), pair)
                )
            assert float(found) == pytest.approx(float(value.detach()), abs=1e-11)
            torch.testing.assert_close(slopes["gain"][0], slope, rtol=0, atol=1e-10)
            assert slope.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_its_slope_is_the_difference_of_two_runs(family: str) -> None:
    with exact():
        lm, pairs = model(family), contrasts((5, 6, 6))
        _, made = blended(lm, pairs, "heads", gates(pairs, 2))
        metric, pair = metric_of(lm, pairs, "logit_diff", slice(0, 3)), torch.arange(3)
        gain = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def value(part: Tensor) -> Tensor:
            return metric(made.finals(part.expand(3, -1, -1), pair), pair).sum()[None]

        with sloping(lm):
            slope = sloped({"gain": gain}, lambda part: value(part["gain"]))[1]["gain"]
        step = 1e-6
        with torch.no_grad():
            for at in np.ndindex(4, 2):
                off = torch.zeros_like(gain)
                off[(0, *at)] = step
                assert float((value(gain + off) - value(gain - off)) / (2 * step)) == pytest.approx(
                    float(slope[(0, *at)]), abs=1e-6
                )


@pytest.mark.parametrize("kind", ["heads", "q", "shared_v", "mlp_out", "attn_out", "resid", "embed"])
def test_no_gain_is_the_same_run_to_the_bit_and_whole_gains_at_a_cut_are_the_source_run(kind: str) -> None:
    lm, pairs = model("gemma2"), contrasts((5, 6, 6))
    base, made = blended(lm, pairs, kind, gates(pairs, 1, first=2))
    asked, pair = len([name for slot in slots(lm, kind) for name in slot.names]), torch.arange(3)
    gain = torch.zeros(3, asked, 1, dtype=torch.float64, requires_grad=True)  # so that it is really looked at
    found = made.finals(gain, pair)
    plain = Runs(base, pair, [min(slot.layer for slot in made.source)] * 3, made.start, made.end, made.calls)
    with torch.no_grad():
        want = plain.finals(lambda index, x: x if index == len(lm.layers) else plain.block(index, x))
    assert found.requires_grad
    assert torch.equal(found.detach(), want)
    torch.testing.assert_close(want, base.final, rtol=1e-6, atol=1e-6)
    if kind in ("resid", "embed"):
        _, whole = blended(lm, pairs, kind, gates(pairs, 1) * 0)
        back = uw.pairs(pairs.source, pairs.base, pairs.answer, pairs.against)
        torch.testing.assert_close(
            whole.finals(torch.ones_like(gain), pair), base_of(lm, back, slice(0, 3), ()).final, rtol=1e-6, atol=1e-6,
            check_stride=False,
        )  # fmt: skip


# --- the optimiser ----------------------------------------------------------------------------------------------------


def problem(**more: Any) -> Problem:
    """Two fits of two parameters: the nearest point of a box to a target that each fit has of its own."""
    target = torch.tensor([[0.3, 2.0], [-1.0, 0.6]], dtype=torch.float64)

    def loss(part: dict[str, Tensor]) -> Any:
        for column in range(2):
            yield sloped(part, lambda own, c=column: (own["x"][:, c] - target[:, c]) ** 2)

    start = {"x": torch.full((2, 2), 0.9, dtype=torch.float64)}
    return Problem(start, loss, lambda part: {"x": part["x"].clamp(0, 1)}, **more)


def adam_by_hand(steps: int, rate: float) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, with the rate that falls and the box."""
    target = np.array([[0.3, 2.0], [-1.0, 0.6]])
    x = np.full((2, 2), 0.9)
    m, v, seen = np.zeros((2, 2)), np.zeros((2, 2)), []
    for step in range(steps):
        seen.append((((x - target) ** 2).sum(1), x.copy()))
        slope = 2 * (x - target)
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        moved = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        x = np.clip(x - rate * (1 - step / steps) * moved, 0, 1)
    seen.append((((x - target) ** 2).sum(1), x.copy()))
    best = np.argmin([losses for losses, _ in seen], 0)
    return np.stack([seen[best[fit]][1][fit] for fit in range(2)])


@pytest.mark.parametrize(("steps", "rate"), [(60, 0.1), (3, 0.5)])
def test_it_is_adam_in_a_box_and_the_best_iterate_stays(steps: int, rate: float) -> None:
    found, losses = Learning(problem(), steps, rate).run()
    np.testing.assert_allclose(found["x"], adam_by_hand(steps, rate), atol=1e-12)
    assert losses.shape == (2, steps)
    if steps == 60:
        np.testing.assert_allclose(found["x"], [[0.3, 1.0], [0.0, 0.6]], atol=1e-2)


def test_what_a_score_sees_decides_which_iterate_stays() -> None:
    start = Learning(problem(score=lambda part: part["x"].sum(1)), 20, 0.1).run()[0]["x"]
    assert float(start[1].sum()) == pytest.approx(1.8, abs=1e-12)  # where this one began
    assert float(start[0].sum()) >= 1.8


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("stop", [1, 7])
def test_what_is_kept_goes_on_to_the_same_bits(stop: int) -> None:
    want, losses = Learning(problem(), 12, 0.1).run()
    first = Learning(problem(), 12, 0.1)

    def tick(done: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(tick)
    second = Learning(problem(), 12, 0.1)
    second.kept |= {name: part.copy() for name, part in first.kept.items()}
    found, again = second.run()
    assert torch.equal(found["x"], want["x"])
    assert torch.equal(again, losses)


def test_a_loss_that_is_no_number_is_said() -> None:
    bad = problem()
    nan = Problem(bad.start, lambda part: (sloped(part, lambda own: own["x"].sum(1) * torch.nan),))
    with pytest.raises(uw.errors.NumericError, match="not finite at step 0"):
        Learning(nan, 3, 0.1).run()
