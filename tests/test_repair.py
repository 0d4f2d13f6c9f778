"""Is self-repair what plain runs lose less than direct says, and is each part of it what was planted?"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

import unwrite as uw
from executed import exact
from test_dla import PROSE, alone, model
from unwrite.errors import NumericError, ResultError
from unwrite.model.load import view
from unwrite.report.views import listings, words
from unwrite.result import Result
from unwrite.studies.repair import HEADS_EARLY, MLPS_EARLY, PARTS

# Twenty-one prompts of seven documents.
CORPUS = uw.Tokens(
    np.random.default_rng(1).integers(3, 50, (21, 6)), np.full(21, 6), np.arange(21) // 3
)  # fmt: skip
TOP, KEPT = 0.3, 7


@cache
def asked() -> Result:
    with exact():
        return uw.dla(model("gpt2"), CORPUS, 5, 9, at="position")


def test_repair_is_direct_less_what_a_plain_run_loses() -> None:
    """By hooks on the user's own model: the write at the last row taken away, and its direct effect by hand."""
    made = uw.self_repair(asked()).data
    with exact():
        for prompt, node in enumerate(("L0H1", "MLP0", "L1H0")):
            truth = alone(model("gpt2"), CORPUS, prompt, 5, 5, 9)
            change = torch.zeros_like(truth.writes[node])
            change[5] = truth.writes[node][5]
            missing = truth.direct(change[5]) - truth.total(node, change)
            got = made["repair"].sel(prompt=prompt, node=node)
            assert float(got.sel(part="all")) == pytest.approx(missing, abs=1e-9)
            assert float(got.sel(part=[*PARTS]).sum()) == pytest.approx(missing, abs=1e-9)
            why = truth.why(node, change)
            assert [float(got.sel(part=part)) for part in PARTS] == pytest.approx(
                [-float(why[part]) for part in PARTS], abs=1e-9
            )


def test_shares_and_their_intervals_are_those_of_loops_over_the_largest_direct_effects() -> None:
    data, made = asked().data, uw.self_repair(asked(), TOP).data
    direct, total = (data[name].values for name in ("direct", "total"))
    nodes = [str(node) for node in data["node"].values]

    def shared(some: list[str]) -> tuple[float, float, float]:
        """Σ (direct − total) / Σ direct, and the t interval on pseudo-values of documents left out."""
        cells = [
            (i // 3, direct[i, j], direct[i, j] - total[i, j]) for j in map(nodes.index, some)
            for i in sorted(range(21), key=lambda i, j=j: -direct[i, j])[:KEPT] if direct[i, j] > 0
        ]  # fmt: skip
        there = sorted({document for document, _, _ in cells})
        if not there:
            return np.nan, np.nan, np.nan

        def of(left: int | None) -> float:
            kept = [cell for cell in cells if cell[0] != left]
            return sum(repair for _, _, repair in kept) / sum(size for _, size, _ in kept)

        whole, n = of(None), len(there)
        if n < 6:
            return whole, np.nan, np.nan
        pseudo = [n * whole - (n - 1) * of(left) for left in there]
        low, high = stats.t.interval(0.95, n - 1, np.mean(pseudo), stats.sem(pseudo))
        return whole, float(low), float(high)

    for node in nodes:
        one = made.sel(node=node, part="all")
        got = [float(one[f"share{end}"]) for end in ("", "_low", "_high")]
        assert got == pytest.approx(shared([node]), nan_ok=True)
    early = {HEADS_EARLY: ["L0H0", "L0H1"], MLPS_EARLY: ["MLP0"], "L1.heads": ["L1H0", "L1H1"]}
    for group, members in early.items():
        one = made.sel(group=group, part="all")
        got = [float(one[f"group_share{end}"]) for end in ("", "_low", "_high")]
        assert got == pytest.approx(shared(members), nan_ok=True)
    assert np.isfinite(made["group_share_low"].sel(group=HEADS_EARLY, part="all"))
    np.testing.assert_allclose(
        made["share"].sel(part=[*PARTS]).sum("part", skipna=False), made["share"].sel(part="all")
    )
    counted = made["counted"].sel(node="MLP0").values
    assert float(made["mean_total"].sel(node="MLP0")) == pytest.approx(total[counted, nodes.index("MLP0")].mean())


def test_parts_of_planted_writers_are_what_was_planted() -> None:
    """What an eraser takes away is erased, what a dormant copy brings is filled in; a kept write is not repaired."""
    truth = uw.planted("gpt2", dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    for node, part in (("L0H0", "erased"), ("L0H2", "erased"), ("L0H3", "filled_in"), ("L0H5", None)):
        ids = torch.tensor(truth.tokenizer(PROSE)["input_ids"])
        with uw.trace(lm, node) as run, torch.no_grad():
            lm.hf(ids[None])
        logits = lm.hf.get_output_embeddings()(run[node][0, -1])
        found = uw.dla(lm, PROSE, int(logits.argmax()), int(logits.argmin()), at="position")
        share = uw.self_repair(found, 1.0)["share"].sel(node=node)
        if part is None:
            assert abs(float(share.sel(part="all"))) < 0.2
        else:
            assert float(share.sel(part=part)) > 0.6
            assert abs(float(share.sel(part={"erased": "filled_in", "filled_in": "erased"}[part]))) < 0.1


def test_it_says_how_much_and_of_how_many() -> None:
    made = uw.self_repair(asked(), TOP)
    said = words(made)
    assert "of direct is not missed" in said
    assert "21 prompts of 7 independent texts" in said
    groups, nodes = listings(made)
    assert [row[0] for row in groups.rows][:2] == [HEADS_EARLY, MLPS_EARLY]
    assert len(nodes.rows) == int(np.isfinite(made["mean_direct"]).sum())
    assert made.figure("scatter", "MLP0").to_dict()["layer"]
    with pytest.raises(ResultError, match="no such node"):
        made.figure("scatter", "L9H9")


def test_what_no_self_repair_can_be_told_of_is_refused() -> None:
    lm = model("gpt2")
    everywhere = uw.dla(lm, CORPUS.take(range(4)), 5, 9)
    with pytest.raises(ResultError, match="all rows"):
        uw.self_repair(everywhere)
    with pytest.raises(ResultError, match="nothing was executed"):
        uw.self_repair(uw.dla(lm, CORPUS.take(range(4)), 5, 9, at="position", total=False))
    with pytest.raises(ResultError, match="of attributions"):
        uw.self_repair(uw.scan(lm, CORPUS))
    for top in (0.0, 1.5, np.nan):
        with pytest.raises(NumericError, match="part of the prompts"):
            uw.self_repair(asked(), top)
