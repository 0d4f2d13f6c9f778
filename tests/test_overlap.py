"""Is what two results share counted by hand, is chance what scipy and draws say? What stands beside a circuit?"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import unwrite as uw
from executed import weights
from test_architecture import _python
from unwrite.errors import NumericError, ResultError
from unwrite.model.load import view
from unwrite.report.views import listings, words
from unwrite.result import Result, build, quantity

N = 40
NODES = [f"L{layer}H{head}" for layer in range(10) for head in range(4)]


def made(effect: np.ndarray, of: str = "w", nodes: list[str] | None = None) -> Result:
    """As `uw.effects` gives it, of these effects [pair, node]."""
    data = xr.Dataset(
        {"effect": quantity(("pair", "node"), np.atleast_2d(effect), "logit_diff", "how")},
        {"pair": np.arange(len(np.atleast_2d(effect))), "node": nodes or NODES},
    )
    settings = {"metric": "logit_diff", "method": "relp"}
    model: dict[str, Any] = {"name": "m", "weights": of}
    return build("effects", data, settings, model, {})


@cache
def two() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=N), rng.normal(size=N)


def test_counts_are_those_of_a_hand_and_chance_that_of_scipy() -> None:
    a, b = two()
    found = uw.overlap(made(a), made(b), top=[0.1, 0.25])
    for top, k in ((0.1, 4), (0.25, 10)):
        first, other = (set(np.argsort(-np.abs(part))[:k]) for part in (a, b))
        one = found.data.sel(top=top, stage="0")
        assert one["shared"].item() == len(first & other)
        assert one["jaccard"].item() == len(first & other) / len(first | other)
        assert one["expected"].item() == pytest.approx(k / (2 * N - k))
        table = [[len(first & other), k - len(first & other)], [k - len(first & other), N - 2 * k + len(first & other)]]
        assert one["p"].item() == pytest.approx(stats.fisher_exact(table, "greater")[1])
        assert {*filter(None, str(one["both"].item()).split(", "))} == {NODES[i] for i in first & other}
        assert len(str(one["only_a"].item()).split(", ")) == k - len(first & other)
    assert float(found["spearman"][0]) == pytest.approx(stats.spearmanr(np.abs(a), np.abs(b))[0])


def test_with_itself_it_is_one_and_of_random_rankings_what_chance_gives() -> None:
    a, _ = two()
    same = uw.overlap(made(a), made(a), top=0.1)
    assert (same["jaccard"].item(), same["spearman"].item()) == (1, pytest.approx(1))
    rng, shared, union, p = np.random.default_rng(1), 0, 0, []
    for _ in range(150):
        found = uw.overlap(made(rng.normal(size=N)), made(rng.normal(size=N)), top=0.25)
        shared, union, p = shared + found["shared"].item(), union + found["union"].item(), [*p, found["p"].item()]
    # Mean shared has a standard error of .11 of 2.5.
    assert shared / union == pytest.approx(10 / (2 * N - 10), abs=0.02)
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * 0.018


def test_stages_are_added_above_and_below_the_line() -> None:
    rng = np.random.default_rng(2)
    a, b = ([made(rng.normal(size=N)) for _ in range(3)] for _ in range(2))
    found = uw.overlap(a, b, top=0.2)
    each, whole = found.data.isel(top=0, stage=slice(0, 3)), found.data.isel(top=0).sel(stage="all")
    assert whole["shared"].item() == int(each["shared"].sum())
    assert whole["jaccard"].item() == pytest.approx(float(each["shared"].sum() / each["union"].sum()))
    draws = np.random.default_rng(3).hypergeometric(8, N - 8, 8, size=(40_000, 3)).sum(1)
    assert whole["p"].item() == pytest.approx((draws >= whole["shared"].item()).mean(), abs=0.01)
    named = uw.overlap({"early": a[0], "late": a[1]}, {"early": b[0], "late": b[1]}, top=0.2)
    assert [*named["stage"].values] == ["early", "late", "all"]


def test_the_ceiling_is_how_well_halves_agree() -> None:
    rng = np.random.default_rng(4)
    own = rng.normal(size=N)
    sure, unsure = own + 1e-6 * rng.normal(size=(8, N)), own + 9 * rng.normal(size=(8, N))
    found = uw.overlap(made(sure), made(unsure), top=0.25)
    assert found["ceiling_a"].item() == 1
    assert found["ceiling_b"].item() < 0.5
    assert np.isnan(uw.overlap(made(own), made(own))["ceiling_a"]).all()
    two_pairs = np.stack([own, own[::-1]])
    halves = uw.overlap(made(two_pairs), made(two_pairs), top=0.25)["ceiling_a"]
    k = [set(np.argsort(-np.abs(part), kind="stable")[:10]) for part in two_pairs]
    assert halves.item() == pytest.approx(len(k[0] & k[1]) / len(k[0] | k[1]))


def test_circuits_of_other_sizes_are_compared_as_they_are(tmp_path: Path) -> None:
    a = uw.Circuit(("L0H0", "L0H1", "L1H0"), of=N)
    b = uw.Circuit(("L0H1", "L1H0", "L2H0", "L3H0"), of=N)
    found = uw.overlap(a, b)
    assert (found["shared"].item(), found["union"].item()) == (2, 5)
    assert found["expected"].item() == pytest.approx((12 / N) / (7 - 12 / N))
    assert found["p"].item() == pytest.approx(stats.hypergeom.sf(1, N, 3, 4))
    assert "They share 2 of 5 nodes: Jaccard 0.40, by chance 0.04" in words(found)
    found.save(tmp_path)
    xr.testing.assert_identical(uw.read(tmp_path).data, found.data)
    with pytest.raises(ResultError, match="chosen from the same nodes"):
        uw.overlap(a, uw.Circuit(("L0H0",), of=5))
    with pytest.raises(ResultError, match="with a circuit"):
        uw.overlap(a, made(two()[0]))


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = (made(part) for part in two())
    with pytest.raises(ResultError, match="of two models"):
        uw.overlap(a, made(two()[1], of="another"))
    with pytest.raises(ResultError, match="of other nodes"):
        uw.overlap(a, made(two()[1], nodes=[*NODES[:-1], "L11H0"]))
    with pytest.raises(ResultError, match="stages are compared one by one"):
        uw.overlap([a, b], [a])
    with pytest.raises(ResultError, match="stages have other names"):
        uw.overlap({"x": a}, {"y": b})
    with pytest.raises(ResultError, match="two results, or circuits"):
        uw.overlap(a, "b")
    for top in (0, 1.0, "some", [], [0.1, 0.1], float("nan")):
        with pytest.raises(NumericError, match="top"):
            uw.overlap(a, b, top=top)


@pytest.mark.promise("no-torch")
def test_it_needs_no_torch() -> None:
    code = "import sys, unwrite as uw; uw.overlap(uw.Circuit(('L0H0',), of=4), uw.Circuit(('L0H1',), of=4))"
    assert _python(f"{code}; print({{'torch', 'transformers'}} & {{*sys.modules}})").strip() == "set()"


def test_beside_its_nodes_stand_readings_what_was_executed_and_what_survives() -> None:
    lm = view(weights("gpt2", 1, num_hidden_layers=2, num_attention_heads=2))
    prompts = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(5))
    dla = uw.dla(lm, prompts, 5, 9)
    left = uw.survival(lm, prompts, ["L1H0", "MLP0"], decoys=1)
    circuit = uw.Circuit(("L1H0", "L0H1"), scores=(2.0, -1.0), weights=dla.provenance["model"]["weights"])
    found = uw.beside(circuit, dla, left)
    nodes = [str(name) for name in found["node"].values]
    able = [str(node) for node in lm.parts if node.kind in ("head", "mlp")]
    size = abs(dla["direct"].mean("prompt")).sel(node=able).to_series().sort_values(ascending=False)
    assert nodes == ["L1H0", "L0H1", *(name for name in size.index[:2] if name not in circuit)]
    for i, name in enumerate(nodes):
        total = dla["total"].sel(node=name).values
        assert float(found["total"][i]) == pytest.approx(total.mean(), abs=1e-12)
        assert float(found["direct"][i]) == pytest.approx(dla["direct"].sel(node=name).values.mean(), abs=1e-12)
        # The jackknife of a mean is its t interval.
        half = 3.182446305 * total.std(ddof=1) / 2
        assert float(found["total_low"][i]) == pytest.approx(total.mean() - half, abs=1e-6)
        want = "helps" if total.mean() > half else "opponent" if total.mean() < -half else "undecided"
        assert str(found["word"].values[i]) == want
        chosen = {True: "both", False: "circuit"}[name in size.index[:2]] if name in circuit else "direct alone"
        assert str(found["chosen_by"].values[i]) == chosen
    assert float(found["survival"][0]) == float(left["end"].sel(writer="L1H0"))
    assert np.isnan(found["survival"].values[nodes.index("L0H1")])
    assert len(found.table()) == len(nodes)
    assert "opponents: " in words(found)
    with pytest.raises(ResultError, match="another model than the circuit"):
        uw.beside(uw.Circuit(("L1H0",), weights="other"), dla)
    with pytest.raises(ResultError, match="no executed totals"):
        uw.beside(circuit, uw.dla(lm, prompts, 5, 9, total=False))
    with pytest.raises(ResultError, match="none of the circuit's nodes"):
        uw.beside(uw.Circuit(("L1.attn_out",)), dla)


def test_a_part_is_what_a_head_attends_to_and_which_way_it_writes_about_it() -> None:
    """Attention is put there by hand, on tokens that are the answer, the alternative, or neither."""
    lm = view(weights("gpt2", 1, num_hidden_layers=2, num_attention_heads=2))
    ids = torch.randint(3, 50, (6, 6), generator=torch.Generator().manual_seed(5))
    ids[:, 1], ids[:, 2] = 10, 20
    other = ids.clone()
    other[:, 2] += 1
    where = {"IO": [1] * 6, "S": [2] * 6, "place": [3] * 6}
    pairs = uw.pairs(ids, other, ids[:, 1].tolist(), ids[:, 2].tolist(), roles=where)
    dla = uw.dla(lm, pairs.base, pairs.answer, pairs.against, total=False)
    effects = uw.effects(lm, pairs, ["heads", "mlp_out"], at="all")
    heads = [str(node) for node in lm.parts if node.kind == "head"]
    each = {head: dla["direct"].sel(node=head).values for head in heads}
    mean = {head: float(part.mean()) for head, part in each.items()}
    sure = {head: abs(mean[head]) > 2.5705818 * float(part.std(ddof=1)) / 6**0.5 for head, part in each.items()}
    assert {*sure.values()} == {True, False}  # of the signs some are decided, and some are not
    circuit, whole = uw.Circuit(tuple(heads)), uw.attention(lm, pairs.base)
    for role, to in (("IO", "answer"), ("S", "against"), ("place", "")):
        for weight in (0.9, 0.2):
            looked = whole.data["weight"] * 0
            looked[:, :, -1, where[role][0]] = weight
            found = uw.beside(
                circuit, dla, effects=effects, attention=uw.Result(whole.data.assign(weight=looked)), pairs=pairs
            )
            for head in heads:
                one = found.data.sel(node=head)
                size = abs(mean[head]) >= 0.01 * abs(float(dla["logit_diff"].mean()))
                named = {
                    ("answer", True): "mover", ("answer", False): "negative mover", ("against", True): "suppressor",
                    ("against", False): "mover of the alternative",
                }.get((to, mean[head] > 0), "")  # fmt: skip
                assert one["part"].item() == (named if size and sure[head] and weight == 0.9 else "")
                assert one["looks"].item() == f"{role} .{round(100 * weight)}"
                assert one["executed"].item() == pytest.approx(
                    -float(effects["effect"].sel(node=head).mean()), abs=1e-12
                )
                assert one["executed_low"] <= one["executed"] <= one["executed_high"]
    assert "By what they attend to and write: no head" in words(found)
    assert {column.name for column in next(iter(listings(found))).columns} >= {"part", "executed [95 %]"}
    with pytest.raises(ResultError, match="say a part together"):
        uw.beside(circuit, dla, effects=effects, attention=whole)
    with pytest.raises(ResultError, match="of other prompts"):
        uw.beside(circuit, dla, effects=effects, attention=whole, pairs=pairs.take(range(5)))
    with pytest.raises(ResultError, match="not executed"):
        uw.beside(circuit, dla, effects=uw.effects(lm, pairs, at="all", method="atp"))


def test_a_real_model_has_a_gate_and_tasks_share_heads(real: Path) -> None:
    """SmolLM2 (docs/circuits.md); inequalities alone, since weights are quantised."""
    lm = uw.load(real / "smollm2-135m", dtype="float32")
    nodes = ["heads", "mlp_out"]
    ranking, judged = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((8, 0), (6, 1)))
    orders = {name: uw.effects(lm, ranking, nodes, at="all", method=name) for name in ("relp", "direct")}
    free = uw.circuit(lm, judged, orders, [80], by="absolute", draws=0, choose=80, enough=0.6)
    assert free.data.attrs["gates"] == "MLP0"
    assert free["faithfulness"].sel(order="direct", size=80).item() < 0.05
    held = uw.circuit(lm, judged, orders, [80], by="absolute", given=["MLP0"], draws=0, gates=False, enough=0.6)
    relp, direct = held["faithfulness"].sel(size=80, by="absolute").values
    assert relp > 0.6 > 0.5 > direct
    agreement = uw.tasks.agreement(8, lm.tokenizer, 0, bos=False)
    others = [uw.effects(lm, pairs, at="all", method="relp") for pairs in (ranking, judged, agreement)]
    same, other = (uw.overlap(others[0], one, 0.05)["jaccard"].item() for one in others[1:])
    assert same > 0.5 > 0.2 > other


def test_in_a_real_model_the_largest_head_suppresses_and_movers_have_an_opponent(real: Path) -> None:
    """SmolLM2 (docs/circuits.md): words alone, since weights are quantised."""
    lm = uw.load(real / "smollm2-135m", dtype="float32")
    pairs = uw.tasks.ioi(24, lm.tokenizer, seed=1, bos=False)
    heads = ["L23H3", "L24H4", "L23H0", "L20H0"]
    dla = uw.dla(lm, pairs.base, pairs.answer, pairs.against, total=False)
    effects, attention = uw.effects(lm, pairs, heads, at="all"), uw.attention(lm, pairs.base, heads=heads)
    found = uw.beside(uw.Circuit(tuple(heads)), dla, effects=effects, attention=attention, pairs=pairs)
    one = found.data.sel(node=heads)
    assert [*one["part"].values] == ["suppressor", "negative mover", "mover", ""]
    assert [*one["word"].values] == ["helps", "opponent", "helps", "helps"]


@pytest.mark.slow
def test_in_a_real_model_few_edges_are_enough_and_one_decides(real: Path) -> None:
    """SmolLM2 (docs/circuits.md); inequalities alone, since weights are quantised."""
    lm = uw.load(real / "smollm2-135m", dtype="float32")
    rank, judge = (uw.tasks.ioi(n, lm.tokenizer, seed, bos=False) for n, seed in ((4, 0), (3, 1)))
    orders_ = {name: uw.paths(lm, rank, "all", "all", method=name) for name in ("eap-ig", "eap")}
    mean = orders_["eap-ig"]["mean"]
    assert mean.sel(sender="embed", receiver="MLP0") == mean.min()
    found = uw.circuit(lm, judge, orders_, [100, 3000], by="absolute", draws=1, enough=0.2, choose=1)
    few, many = found["faithfulness"].sel(order="eap-ig", by="absolute", size=[100, 3000]).values
    assert 0.2 < few < 0.8 < many < 1.2
    assert abs(found["random"].sel(size=3000)).max() < 0.1
    without = orders_["eap-ig"].data["effect"].copy()
    without.loc[{"sender": "embed", "receiver": "MLP0"}] = 0.0  # last by size
    other = uw.circuit(
        lm, judge, uw.Result(orders_["eap-ig"].data.assign(effect=without)), [3000], by="absolute", draws=0, choose=1
    )
    assert abs(other["faithfulness"].sel(size=3000).item()) < 0.1
