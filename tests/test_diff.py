"""Is what two results differ by their difference, with an interval that holds it as often as it says?"""

from __future__ import annotations

from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats

import unwrite as uw
from executed import weights
from methods import IDS, PAIRS
from unwrite.errors import ModelError, NumericError, ResultError
from unwrite.model.load import view
from unwrite.model.view import Model

LONG = torch.randint(3, 50, (6, 8), generator=torch.Generator().manual_seed(5))


@cache
def models() -> tuple[Model, Model]:
    """A model, and the same with another head L1H0."""
    one, other = (view(weights("llama", 2, num_hidden_layers=2, num_attention_heads=2)) for _ in range(2))
    with torch.no_grad():
        other.hf.model.layers[1].self_attn.o_proj.weight[:, :4] *= -1.5
    return one, view(other.hf)


def test_two_scans_are_subtracted_and_their_errors_added() -> None:
    a, b = (uw.scan(lm, LONG) for lm in models())
    found = uw.diff(a, b)
    np.testing.assert_allclose(found["change_share_change"], b["change_share"] - a["change_share"])
    t = stats.t.ppf(0.975, int(a["n_clusters"]) - 1)
    reach = t * np.hypot(a["level_share_se"], b["level_share_se"])
    np.testing.assert_allclose(found["level_share_high"] - found["level_share_change"], reach, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["level_share_change"] - found["level_share_low"], reach, rtol=1e-9, atol=1e-12)
    assert {"writer", "change_share_a", "change_share_b", "change_share_change"} <= set(found.table())
    same = uw.diff(a, a)
    assert float(abs(same["level_share_change"]).max()) == 0.0


def test_effects_are_subtracted_pair_by_pair() -> None:
    a, b = (uw.effects(lm, PAIRS, "heads", "all") for lm in models())
    found, each = uw.diff(a, b), (b["effect"] - a["effect"]).values
    want = stats.ttest_1samp(each, 0.0, axis=0).confidence_interval(0.95)
    np.testing.assert_allclose(found["effect_low"], want.low, rtol=1e-9)
    np.testing.assert_allclose(found["effect_high"], want.high, rtol=1e-9)
    np.testing.assert_allclose(found["effect_change"], each.mean(0))
    other = uw.effects(models()[1], uw.pairs(IDS[2:], IDS[:2], 5, 9), "heads", "all")
    with pytest.raises(ResultError, match="other pairs"):
        uw.diff(a, other)


def test_two_models_are_their_results_side_by_side() -> None:
    one, other = models()
    found = uw.diff(one, other, LONG, PAIRS)
    a, b = (uw.scan(lm, LONG)["change_share"] for lm in models())
    np.testing.assert_allclose(found["change_share_change"].sel(writer=a["writer"].values), b - a)
    ends = [uw.survival(lm, LONG, ["L0H0"])["end"] for lm in models()]
    np.testing.assert_allclose(found["end_a"].sel(writer="L0H0"), ends[0].values[0], rtol=1e-6)
    np.testing.assert_allclose(found["effect_change"].sel(node="L0H0"), uw.diff(
        *(uw.effects(lm, PAIRS, "heads", "all") for lm in models()))["effect_change"].sel(node="L0H0"))  # fmt: skip
    # What comes before the head that was changed is the same in both.
    assert float(abs(found["level_share_change"].sel(writer="L0H0", location="resid_post0"))) < 1e-9


def test_each_names_the_other_where_it_is_given_the_wrong_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    one, other = models()
    a = uw.scan(one, LONG)
    wrong: Any = uw.compare
    with pytest.raises(ModelError, match=r"uw\.diff"):
        wrong(a, a)
    with pytest.raises(ModelError, match=r"uw\.diff"):
        wrong(one, other)
    wrong = uw.diff
    with pytest.raises(ResultError, match=r"uw\.compare"):
        wrong(one, PAIRS)
    with pytest.raises(ResultError, match="two methods"):
        uw.diff(a, uw.effects(one, PAIRS, "heads", "all"))
    with pytest.raises(NumericError, match="on prompts"):
        uw.diff(one, other)
    with pytest.raises(ModelError, match="one shape"):
        uw.diff(one, view(weights("gpt2", 1)), LONG)
