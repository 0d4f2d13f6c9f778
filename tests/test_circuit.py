"""Is every run that keeps a set one trace with all its edits, and are curves, gates and controls what a hand makes?"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoConfig, AutoModelForCausalLM

import unwrite as uw
from executed import exact, weights
from patching import contrasts
from test_resume import same
from unwrite.errors import NodeError, NumericError, ResultError, TokensError
from unwrite.model import planted
from unwrite.model.load import view
from unwrite.model.planted_weights import WEIGHTS, Wiring, draw
from unwrite.model.view import Model
from unwrite.orders import halves, orders
from unwrite.prompts.pairs import Pairs
from unwrite.report.views import listings, words
from unwrite.run.answer.metrics import metric_of
from unwrite.run.loop import stream
from unwrite.run.loop.job import Stage
from unwrite.run.replay import edge_circuits
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edge_circuits import edge_table, kept_edges
from unwrite.run.source.values import donor
from unwrite.stats.curves import Shares, areas, between, faithfulness, falls_again

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
NODES = ["heads", "mlp_out"]


@pytest.fixture(autouse=True)
def _exactly():
    with exact():
        yield


@cache
def model(name: str) -> Model:
    family, settings = FAMILIES[name]
    with exact():
        return view(weights(family, 1, **{"num_hidden_layers": 2, "num_attention_heads": 2, **settings}))


@cache
def pairs() -> Pairs:
    """Four pairs of two lengths, with two roles."""
    made = contrasts((6, 5, 6, 5))
    roles = {"a": [1, 2, 1, 3]}
    return uw.pairs(made.base, made.source, made.answer, made.against, made.row, roles=roles)


def traced(lm: Model, given: Pairs, kept: dict[str, list[str]], elsewhere: bool = False) -> np.ndarray:
    """The logit difference of pairs where all nodes but the `kept` ones (by role; "" at all) are set, by one trace."""
    heads = {str(node): f"{node}.z" for node in lm.parts if node.kind == "head"}
    sites = heads | {str(node): str(node) for node in lm.parts if node.kind == "mlp"}
    found = []
    for pair in range(len(given)):
        n = int(given.base.lengths[pair])
        base, source = (torch.from_numpy(part.ids[pair : pair + 1, :n]) for part in (given.base, given.source))
        with torch.no_grad(), uw.trace(lm, *sites.values()) as t:
            lm.hf(source)
        edits = []
        for node, site in sites.items():
            rows = {int(given.roles[role][pair]) for role, names in kept.items() if role and node in names}
            named = {int(given.roles[role][pair]) for role in kept if role}
            free = {*range(n)} - named if elsewhere or node in kept.get("", ()) else set()
            at = sorted({*range(n)} - rows - free)
            edits += [uw.Edit.set(site, t[site][:, at], at=at)] if at else []
        with torch.no_grad(), uw.trace(lm, edits=edits):
            logits = lm.hf(base).logits[0, given.row[pair]]
        assert given.against is not None
        found.append(float(logits[given.answer[pair]] - logits[given.against[pair]]))
    return np.array(found)


_TRACED: dict[str, np.ndarray] = {}


def _known(lm: Model, given: Pairs, kept: dict[str, list[str]], **more: Any) -> np.ndarray:
    """The same, each once."""
    key = f"{lm.family} {given.about()['hash']} {sorted((role, sorted(names)) for role, names in kept.items())} {more}"
    if key not in _TRACED:
        _TRACED[key] = traced(lm, given, kept, **more)
    return _TRACED[key]


def share(lm: Model, given: Pairs, kept: dict[str, list[str]], **more: Any) -> float:
    """Faithfulness, from traces alone."""
    every = [str(node) for node in lm.parts if node.kind in ("head", "mlp")]
    value, empty, full = (_known(lm, given, one, **part) for one, part in ((kept, more), ({}, {}), ({"": every}, {})))
    return float((value - empty).sum() / (full - empty).sum())


@pytest.mark.promise("executed")
@every_family
def test_every_number_is_of_runs_that_one_trace_makes(name: str) -> None:
    lm, given = model(name), pairs()
    every = [str(node) for node in lm.parts if node.kind in ("head", "mlp")]
    order = [*np.random.default_rng(0).permutation(every)]
    found = uw.circuit(lm, given, order, [2, 3], choose=3, draws=2, enough=0.99).data.isel(order=0, by=0)
    for size in found["size"].values.tolist():
        first, rest = order[:size], order[size:]
        got = found.sel(size=size)
        assert float(got["faithfulness"]) == pytest.approx(share(lm, given, {"": first}), abs=1e-10)
        assert float(got["complement"]) == pytest.approx(share(lm, given, {"": rest}), abs=1e-10)
    assert found["faithfulness"].values[[0, -1]].tolist() == [0, 1]
    assert found["complement"].values[[0, -1]].tolist() == [1, 0]
    # The circuit of three: without each of its nodes, and without halves of it.
    chosen = order[:3]
    for node in every:
        less = found["minimality"].sel(node=node)
        assert np.isfinite(less) == (node in chosen)
        if node in chosen:
            want = share(lm, given, {"": chosen}) - share(lm, given, {"": [one for one in chosen if one != node]})
            assert float(less) == pytest.approx(want, abs=1e-10)
    cells = [every.index(one) for one in chosen]
    for draw_, half in enumerate(halves(cells, 2, 0)):
        out = [every[i] for i in half]
        inside, outside = ([one for one in part if one not in out] for part in (chosen, every))
        want = share(lm, given, {"": inside}) - share(lm, given, {"": outside})
        assert float(found["completeness"][draw_]) == pytest.approx(want, abs=1e-10)
    # Gates: of the first pairs, or of all where little is kept.
    few = given.take([0, 1])
    for node in every:
        rest = {"": [one for one in every if one != node]}
        first = share(lm, few, rest)
        want, of = (share(lm, given, rest), 4) if first < 0.5 else (first, 2)
        assert float(found["gate"].sel(node=node)) == pytest.approx(want, abs=1e-10)
        assert int(found["gate_pairs"].sel(node=node)) == of


@pytest.mark.promise("executed")
def test_by_position_everything_at_other_tokens_is_replaced() -> None:
    lm, given = model("gpt2"), pairs()
    roles = {"a": ["L0H0", "MLP0"], "end": ["L1H0", "L1H1", "MLP1"]}
    found = uw.circuit(lm, given, ["L1H1", "MLP0", "L0H0", "MLP1", "L1H0"], [2], roles=roles, draws=0, choose=2)
    one = found.data.isel(order=0, by=0)
    assert one["size"].values.tolist() == [0, 2, 5]
    want = {2: {"a": ["MLP0"], "end": ["L1H1"]}, 5: roles}
    for size, kept in want.items():
        assert float(one["faithfulness"].sel(size=size)) == pytest.approx(share(lm, given, kept), abs=1e-10)
    left = {"a": ["L0H0", "L0H1", "L1H0", "L1H1", "MLP1"], "end": ["L0H0", "L0H1", "L1H0", "MLP0", "MLP1"]}
    left |= {"": ["nobody"]}
    assert float(one["complement"].sel(size=2)) == pytest.approx(share(lm, given, left, elsewhere=True), abs=1e-10)
    assert float(one["rank"].sel(node="L1H1", role="end")) == 0
    assert np.isnan(one["rank"].sel(node="L1H1", role="a"))
    assert found.data.attrs["chosen"] == "L1H1 at end, MLP0 at a"
    circuit = uw.Circuit.of_result(found, size=3)
    assert circuit.cells == (("L1H1", "end"), ("MLP0", "a"), ("L0H0", "a"))
    by_role = uw.effects(lm, given, NODES, at=["a", "end"])
    ranked = uw.circuit(lm, given, by_role, [1], roles=["a", "end"], draws=0, gates=False)
    mean = by_role["effect"].mean("pair")
    first = ranked["rank"].isel(order=0, by=0)
    at = np.unravel_index(int(np.nanargmin(first.transpose("node", "role").values)), first.shape)
    assert abs(mean.transpose("node", "role").values[at]) == np.abs(mean.values).max()
    with pytest.raises(ResultError, match=r"of other roles.*ask for roles=\['a', 'end'\]"):
        uw.circuit(lm, given, by_role, [1])


def chain() -> tuple[Model, Pairs]:
    """Three heads, each of which reads what the one before it wrote; the answer reads the last one alone."""
    own = [
        Wiring("L0H2", {"token": 1.0}, "erased_by_head", back=1),
        Wiring("L1H4", {"erased_by_head": 1.0}, "erased_by_many"),
        Wiring("L2H1", {"erased_by_many": 1.0}, "erased_by_mlp"),
    ]
    quiet = planted._quiet({one.name for one in own})
    jobs = [*own, *(job for part in quiet.roles.values() for job in part)]
    draft = draw("gpt2", 0, jobs)
    config = AutoConfig.for_model("gpt2", **planted._SHAPE, **planted._OWN_SHAPE["gpt2"])
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    state = WEIGHTS["gpt2"](draft)
    code = draft.embedding @ draft.space["token"]
    gain, _ = draft.norms[3, "final"]
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    for token, sign in ((5, 1.0), (9, -1.0)):
        state["lm_head.weight"][token] = sign * draft.space["erased_by_mlp"] @ (code[20] - code[30]) / gain
    hf.load_state_dict(state)
    base = torch.randint(40, 90, (4, 6), generator=torch.Generator().manual_seed(3))
    source = base.clone()
    base[:, 4], source[:, 4] = 20, 30
    return view(hf), uw.pairs(base, source, 5, 9)


@pytest.mark.promise("planted")
def test_three_planted_heads_are_all_and_each_of_them_is_a_gate() -> None:
    lm, given = chain()
    guess = uw.effects(lm, given, NODES, at="all", method="atp")
    found = uw.circuit(lm, given, guess, [1, 2, 3, 4, 6, 12], draws=3)
    for by in ("absolute", "signed"):
        curve = found["faithfulness"].sel(order="atp", by=by)
        assert curve.sel(size=[1, 2]).values == pytest.approx([0, 0], abs=0.01)
        assert curve.sel(size=[3, 4, 6, 12]).values == pytest.approx(np.ones(4), abs=0.01)
    assert (found["smallest"] == 3).all()
    chosen = found.data.attrs["chosen"].split(", ")
    assert chosen == sorted(["L0H2", "L1H4", "L2H1"], key=guess_rank(guess))
    assert {*found.data.attrs["gates"].split(", ")} == {"L0H2", "L1H4", "L2H1"}
    assert "L0H2 decides everything: pass it as given" in found.data.attrs["notes"]
    assert found["minimality"].sel(node=["L0H2", "L1H4", "L2H1"]).values == pytest.approx(np.ones(3), abs=0.01)
    given_ = uw.circuit(lm, given, ["L2H1"], [1, 3], given=["L0H2", "L1H4"], draws=4)
    assert given_["faithfulness"].sel(by="signed", size=3).values == pytest.approx([1], abs=0.01)
    assert given_.data.attrs["gates"] == "L2H1"
    # What is given is in random orders, too: there the last of the three is missing, or everything is there.
    assert set(np.round(given_["random"].values.ravel(), 1)) <= {0.0, 1.0}


def guess_rank(guess: uw.Result) -> Any:
    size = abs(guess["effect"].mean("pair"))
    return lambda node: -float(size.sel(node=node))


def test_with_effects_of_one_sign_both_orders_are_one() -> None:
    lm, given = model("gpt2"), pairs()
    guess = uw.effects(lm, given, NODES, at="all", method="atp")
    hurt = uw.Result(guess.data.assign(effect=-abs(guess["effect"])).assign_attrs(guess.data.attrs))
    hurt.data["effect"].attrs |= guess["effect"].attrs
    found = uw.circuit(lm, given, hurt, [1, 2, 4], draws=0, gates=False)
    xr.testing.assert_equal(found["rank"].sel(by="absolute", drop=True), found["rank"].sel(by="signed", drop=True))
    both = uw.circuit(lm, given, {"hurt": hurt, "guess": guess}, [1, 2, 4], draws=0, gates=False)
    helps = -guess["effect"].mean("pair")
    ranked = both["rank"].sel(order="guess", by="signed")
    assert list(helps.sortby(ranked).values) == sorted(helps.values, reverse=True)
    np.testing.assert_array_equal(both["score"].sel(order="guess"), helps)


def test_where_no_node_reads_another_a_circuit_is_the_complement_of_the_turned_pairs() -> None:
    """One parallel layer: m(C) with the rest from source is m(rest) of the turned pairs with C from base."""
    with exact():
        lm = view(weights("gpt_neox", 2, use_parallel_residual=True, num_hidden_layers=1, num_attention_heads=2))
    made = contrasts((6, 6, 6))
    made.source.ids[:, -1] = made.base.ids[:, -1]  # what the read row embeds is nobody's
    one = uw.pairs(made.base.ids.copy(), made.source.ids.copy(), made.answer, made.against)
    other = uw.pairs(made.source.ids.copy(), made.base.ids.copy(), made.answer, made.against)
    first = uw.circuit(lm, one, ["L0H1", "MLP0", "L0H0"], [1, 2], draws=0, gates=False).data.isel(order=0, by=0)
    turned = uw.circuit(lm, other, ["L0H0", "MLP0", "L0H1"], [1, 2], draws=0, gates=False).data.isel(order=0, by=0)
    np.testing.assert_allclose(first["faithfulness"].values, 1 - turned["faithfulness"].values[::-1], atol=1e-10)


def test_pairs_in_another_order_give_the_same_and_batches_too() -> None:
    lm, given = model("gpt2"), pairs()
    guess = uw.effects(lm, given, NODES, at="all", method="relp")
    asked = {"sizes": [1, 3], "draws": 2, "gates": False, "enough": 0.5}
    found = uw.circuit(lm, given, guess, **asked)
    turned = uw.circuit(lm, given.take([3, 1, 0, 2]), guess, **asked, batch=1)
    for name in ("faithfulness", "complement", "random", "area", "distance", "smallest", "minimality", "completeness"):
        np.testing.assert_allclose(found[name], turned[name], atol=1e-10, err_msg=name)
    np.testing.assert_allclose(found["base"].values[[3, 1, 0, 2]], turned["base"].values, atol=1e-10)
    np.testing.assert_allclose(found["faithfulness_low"], turned["faithfulness_low"], atol=1e-9)


# Edges.


@cache
def edges(name: str, method: str = "eap") -> uw.Result:
    """Scores of all edges of a model."""
    return uw.paths(model(name), pairs(), "all", "all", method=method, steps=2)


def cells(found: xr.DataArray) -> list[tuple[str, str]]:
    """Edges by rank, the first ones first."""
    return [(str(one), str(other)) for one, other in found.stack(edge=("sender", "receiver")).dropna("edge").sortby(
        found.stack(edge=("sender", "receiver")).dropna("edge")).edge.values]  # fmt: skip


@every_family
def test_edges_are_kept_along_the_order_of_their_scores(name: str) -> None:
    """Each run is one of the engine (whose oracle are traces), of the edges that the mean score puts first."""
    lm, given = model(name), pairs()
    found = uw.circuit(lm, given, edges(name), [3, 20], draws=2, choose=3)
    table, rows = edge_table(lm), slice(0, len(given))
    assert [*found["sender"].values] == [*table.senders]
    assert [*found["receiver"].values] == [*table.receivers]
    base = base_of(lm, given, rows, table.sent)
    values = donor(lm, given, table.sent, "source").values(rows)

    def metric(kept: np.ndarray) -> float:
        final = kept_edges(base, values, table, torch.from_numpy(kept))
        return float(metric_of(lm, given, "logit_diff", rows)(final).detach().sum())

    score = -edges(name)["effect"].mean("pair").values
    none, full = metric(np.zeros_like(table.joins)), metric(table.joins)
    np.testing.assert_allclose(found["score"].sel(order="eap"), score, atol=1e-15)
    for by, value in (("absolute", np.abs(score)), ("signed", score)):
        ranked = np.argsort(-np.where(table.joins, value, -np.inf), axis=None)
        for size in found["size"].values.tolist():
            kept = np.zeros(table.joins.size, dtype=bool)
            kept[ranked[:size]] = True
            kept = kept.reshape(table.joins.shape)
            got = found.data.isel(order=0).sel(by=by, size=size)
            assert float(got["faithfulness"]) == pytest.approx((metric(kept) - none) / (full - none), abs=1e-10)
            left = (metric(table.joins & ~kept) - none) / (full - none)
            assert float(got["complement"]) == pytest.approx(left, abs=1e-10)
    count = int(table.joins.sum())
    for name_ in ("faithfulness", "random"):
        assert found[name_].sel(size=[0, count]).values == pytest.approx(
            np.broadcast_to([0, 1], (*found[name_].shape[:-1], 2))
        )
    f, part = found["faithfulness"].values, found["size"].values / count
    np.testing.assert_allclose(found["area"], np.trapezoid(f, part), atol=1e-12)
    for attrs in (found["area"].attrs, found["distance"].attrs):
        assert attrs["axis"] == "edges, each counting the same"
    assert found["smallest"].attrs["units"] == "edges"
    assert not {"gate", "minimality"} & {*found.data}


@pytest.mark.promise("executed")
@pytest.mark.parametrize("name", ["gpt2", "neox parallel"])
def test_a_circuit_of_all_edges_out_of_some_nodes_is_that_of_these_nodes(name: str) -> None:
    """Embeddings are kept: an edge from them is first. What traces find of nodes is what edges must."""
    lm, given, whole = model(name), pairs(), edges(name)
    every = [str(node) for node in lm.parts if node.kind in ("head", "mlp")]
    for kept in (["L0H0", "MLP0", "L1H1"], ["MLP1"], every[1:]):
        first = [sender in ("embed", *kept) for sender in whole["sender"].values]
        score = xr.where(xr.DataArray(first, dims="sender"), -1.0, -0.1) * xr.ones_like(whole["effect"])
        score = (
            score.where(whole["effect"].notnull()).transpose(*whole["effect"].dims).assign_attrs(whole["effect"].attrs)
        )
        size = int(score.isel(pair=0).values[first].size - np.isnan(score.isel(pair=0).values[first]).sum())
        order = uw.Result(whole.data.assign(effect=score))
        found = uw.circuit(lm, given, order, [size], "source", "signed", draws=0, choose=1)
        got = found.data.isel(order=0, by=0)
        base, empty = (float(got[name].sum()) for name in ("base", "empty"))
        want = (_known(lm, given, {"": kept}).sum() - empty) / (base - empty)
        assert float(got["faithfulness"].sel(size=size)) == pytest.approx(want, abs=1e-9)


@pytest.mark.promise("planted")
def test_a_planted_chain_is_four_edges() -> None:
    lm, given = chain()
    whole = uw.paths(lm, given, "all", "all", method="eap")
    found = uw.circuit(lm, given, whole, [3, 4, 8], draws=2, gates=True, choose=4, enough=0.9)
    own = {("embed", "L0H2.v"), ("L0H2", "L1H4.v"), ("L1H4", "L2H1.v"), ("L2H1", "logits")}
    for by in ("absolute", "signed"):
        one = found.data.sel(order="eap", by=by)
        assert {*cells(one["rank"])[:4]} == own
        assert one["faithfulness"].sel(size=[3, 4, 8]).values == pytest.approx([0, 1, 1], abs=0.05)
        assert one["complement"].sel(size=[3, 4]).values == pytest.approx([0, 0], abs=0.05)
    assert (found["smallest"] == 4).all()
    assert {*found.data.attrs["gates"].split(", ")} == {" → ".join(edge) for edge in own}
    for sender, receiver in own:
        assert float(found["minimality"].sel(sender=sender, receiver=receiver)) == pytest.approx(1, abs=0.05)


def test_a_circuit_of_edges_says_so(tmp_path: Path) -> None:
    lm, given, whole = model("gpt2"), pairs(), edges("gpt2", "eap-ig")
    found = uw.circuit(lm, given, {"scores": whole}, [5], draws=1, enough=0.5)
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    assert "of 46 edges" in words(again)
    listed = listings(again)
    assert listed[0].columns[1].name == "edges enough"
    assert [row[0] for row in listed[1].rows] == again.data.attrs["chosen"].split(", ")
    assert "edges kept" in str(again.figure().to_dict(validate=False))
    assert len(again.table()) == 2 * 3
    with pytest.raises(ResultError, match="is one of edges"):
        uw.Circuit.of_result(found)
    named = uw.circuit(lm, given, whole, [2], draws=0, gates=False, nodes=NODES)
    assert named["rank"].dims == ("order", "by", "node")
    for wrong, more in {
        "edges carry every position": {"roles": ["a"]}, "edges are kept by their order": {"given": ["L0H0"]},
        "is no order of edges": {"order": ["L0H0"], "nodes": "edges"},
        "of other receivers": {"order": uw.Result(whole.data.isel(receiver=slice(1, None)))},
        "of each role": {"order": uw.paths(lm, given, "all", "all", method="eap", at=["a", "end"])},
    }.items():  # fmt: skip
        with pytest.raises((NodeError, NumericError, ResultError), match=wrong):
            uw.circuit(lm, given, **{"order": whole, **more})


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_circuit_of_edges_that_was_stopped_goes_on_to_the_same_bits(
    part: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its curves, of its bisection, of what is inside: at most one run is made again."""
    lm, given, whole = model("gpt2"), pairs(), edges("gpt2")
    ask = partial(uw.circuit, lm, given, whole, [20], draws=2, by="signed", enough=0.5, choose=6, batch=2)
    ran, stop = [0], [0]

    def counted(*asked: Any) -> torch.Tensor:
        ran[0] += 1
        if ran[0] == stop[0]:
            raise KeyboardInterrupt
        return kept_edges(*asked)

    monkeypatch.setattr(edge_circuits, "kept_edges", counted)
    monkeypatch.setattr(Stage, "due", property(lambda self: True))
    monkeypatch.setattr(stream, "_BETWEEN", 0.0)
    want, every = ask(), ran[0]
    ran[0], stop[0] = 0, int(part * every)
    with pytest.raises(KeyboardInterrupt):
        ask(checkpoint=tmp_path)
    found = ask(checkpoint=tmp_path)
    assert every - 1 <= ran[0] <= every + 1
    assert same(found, want)


# Statistics, by hand.


def test_area_and_distance_of_four_nodes_are_those_of_a_hand() -> None:
    part, f = np.array([0, 0.25, 0.5, 1.0]), np.array([0.0, 1.2, 0.8, 1.0])
    area, distance = areas(part, Shares(f, f[None]))
    # .25 · .6 + .25 · 1.0 + .5 · .9, and .25 · (1 + .2)/2 + .25 · (.2 + .2)/2 + .5 · (.2 + 0)/2
    assert float(area.whole) == pytest.approx(0.15 + 0.25 + 0.45)
    assert float(distance.whole) == pytest.approx(0.15 + 0.05 + 0.05)
    value = np.array([[3.0, 1.0], [5.0, 2.0], [4.0, 0.0]])
    found = faithfulness(value, np.array([1.0, 0.0, 0.0]), np.array([5.0, 4.0, 2.0]), np.arange(3))
    assert found.whole.tolist() == pytest.approx([11 / 10, 2 / 10])
    assert found.without[:, 0].tolist() == pytest.approx([9 / 6, 6 / 6, 7 / 8])
    one = faithfulness(value, np.array([1.0, 0.0, 0.0]), np.array([5.0, 4.0, 2.0]), np.zeros(3, dtype=int))
    assert np.isnan(one.interval[0]).all()


def test_the_first_size_that_is_enough_lies_between_executed_ones() -> None:
    sizes = np.array([0, 2, 5, 9])
    assert between(sizes, np.array([False, False, True, True])) == (2, 5)
    assert between(sizes, np.zeros(4, dtype=bool)) is None
    assert falls_again(sizes, np.array([False, True, False, True])) == 5
    assert falls_again(sizes, np.array([False, False, True, True])) is None


def test_the_smallest_is_the_first_crossing_of_a_curve_of_every_size() -> None:
    lm, given = model("gemma2"), pairs()
    guess = uw.effects(lm, given, NODES, at="all", method="atp")
    whole = uw.circuit(lm, given, guess, range(7), draws=0, gates=False, enough=0.5)
    found = uw.circuit(lm, given, guess, [3], draws=0, gates=False, enough=0.5)
    for by in ("absolute", "signed"):
        curve = whole["faithfulness"].sel(order="atp", by=by).values
        assert int(whole["smallest"].sel(order="atp", by=by)) == int((curve >= 0.5).argmax())
        size = int(found["smallest"].sel(order="atp", by=by))
        assert curve[size] >= 0.5 > curve[size - 1]


# What it says, and what is refused.


def test_it_says_what_it_is(tmp_path: Path) -> None:
    lm, given = model("gpt2"), pairs()
    guess = uw.effects(lm, given, NODES, at="all", method="relp")
    found = uw.circuit(lm, given, {"relp": guess, "mine": ["L0H0", "MLP1"]}, [1, 2], draws=2, replace="mean")
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    assert len(again.table()) == 2 * 2 * 4
    for name in ("area", "distance"):
        attrs = again[name].attrs
        assert (attrs["axis"], attrs["grid"], attrs["ablation"]) == ("nodes, each counting the same", "0 1 2 6", "mean")
        assert attrs["sign"] == "absolute signed"
    mine = found["faithfulness"].sel(order="mine")
    np.testing.assert_array_equal(mine.sel(by="absolute"), mine.sel(by="signed"))
    assert np.isnan(mine.sel(size=6)).all()
    assert np.isnan(found["area"].sel(order="mine")).all()
    for name, part in found.data.items():
        assert {"units", "equation"} <= set(part.attrs), name
    assert "bisection" in found.data.attrs["assumes"]
    assert found.data.attrs["clusters"] == 4
    assert found.data.attrs["solves"] in words(found)
    drawn = found.figure().to_dict(validate=False)
    assert "faithfulness" in drawn["title"]["text"]


def test_a_circuit_is_a_value(tmp_path: Path) -> None:
    a = uw.Circuit(("L1H0", "MLP0", "L0H1"), scores=(2.0, -1.0, 0.5), model="m", weights="w", of=6)
    b = uw.Circuit(("MLP0", "L1H1"), of=6)
    assert (a | b).nodes == ("L1H0", "MLP0", "L0H1", "L1H1")
    assert (a & b).nodes == ("MLP0",)
    assert (a - b).nodes == ("L1H0", "L0H1")
    assert ((b & a).weights, (a | b).of, (a | uw.Circuit(("L1H1",))).of) == ("w", 6, 0)
    assert (a.opponents, "MLP0" in a, len(a)) == (("MLP0",), True, 3)
    hostile = uw.Circuit(a.nodes, a.roles, a.scores, ("<b>\x1b[2J", "", ""), "=m", "w", 6)
    hostile.save(tmp_path / "c.nc")
    assert uw.Circuit.read(tmp_path / "c.nc") == hostile
    drawn = str(hostile.figure().to_dict(validate=False))
    assert "\x1b" not in drawn
    both = uw.Circuit(("L1H0", "L1H0"), ("a", "end"))
    assert both.ranked == ("L1H0",)
    assert [one.nodes for one in orders({"it": a})] == [("L1H0", "MLP0", "L0H1")]
    with pytest.raises(NodeError, match="names every node once"):
        uw.Circuit(("L1H0", "L1H0"))
    with pytest.raises(NodeError, match="not a site"):
        uw.Circuit(("L1X0",))
    with pytest.raises(ResultError, match="of two models"):
        assert a | uw.Circuit(("L1H0",), weights="other")
    with pytest.raises(ResultError, match="scores of each node"):
        uw.Circuit(("L1H0",), scores=(1.0, 2.0))


def test_what_heads_look_at_is_said_by_role() -> None:
    lm, given = model("gpt2"), pairs()
    seen = uw.attention(lm, given.base)
    circuit = uw.Circuit(("L1H0", "MLP0")).looking(seen, given.roles)
    weight = seen["weight"].sel(head="L1H0").values
    mean = {role: np.mean([weight[i, given.row[i], rows[i]] for i in range(4)]) for role, rows in given.roles.items()}
    role = max(mean, key=lambda name: mean[name])
    assert circuit.looks == (f"{role} {mean[role]:.2f}".replace(" 0.", " ."), "")
    with pytest.raises(ResultError, match="other prompts"):
        circuit.looking(seen, {"end": [1]})


def test_orders_are_read_from_every_result_that_has_a_number_a_node() -> None:
    lm, given = model("gpt2"), pairs()
    dla = uw.dla(lm, given.base, 5, 9, total=False)
    names = [one.name for one in orders(dla)]
    assert names == ["direct", "net", "relp", "gradient"]
    mean = dla["direct"].mean("prompt")
    np.testing.assert_array_equal(orders(dla)[0].helps, mean.transpose("node"))
    found = uw.circuit(lm, given, {"dla": dla}, [2], draws=0, gates=False)
    assert [*found["order"].values] == [f"dla {name}" for name in names]
    compared = uw.compare(lm, given, NODES, at="all", methods=("atp", "exact"))
    assert [one.name for one in orders(compared)] == ["atp", "exact"]
    paths = uw.paths(lm, given, "heads", ["logits"])
    np.testing.assert_array_equal(orders(paths)[0].helps, -paths["effect"].isel(receiver=0).mean("pair"))
    with pytest.raises(ResultError, match="several receivers"):
        orders(uw.paths(lm, given, "heads", ["L1H0.v", "logits"]))
    every = uw.paths(lm, given, "all", "all", method="eap")
    (summed,) = orders(every)
    nodes = uw.effects(lm, given, summed.nodes, "all", "atp")["effect"].mean("pair").sel(node=[*summed.nodes])
    np.testing.assert_allclose(summed.helps, -nodes, atol=1e-13)
    np.testing.assert_allclose(summed.size, abs(nodes), atol=1e-13)
    for some in (every.data.isel(receiver=slice(2, None)), uw.paths(lm, given, "heads", "all", "frozen").data):
        with pytest.raises(ResultError, match="several receivers"):
            orders(uw.Result(some))
    with pytest.raises(ResultError, match="each position"):
        orders(uw.effects(lm, given, "heads", at="each", method="atp"))
    with pytest.raises(ResultError, match="no number that says how much a node helps"):
        orders(uw.solves(lm, given))
    with pytest.raises(ResultError, match="two orders have one name"):
        orders({"x": compared, "x atp": ["L0H0"]})


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "no node L9H0|no site L9H0|not among those": (NodeError, {"order": ["L9H0"]}),
    "names every node once": (NodeError, {"order": ["L0H0", "L0H0"]}),
    "no order": (ResultError, {"order": {}}),
    "is no order of nodes": (ResultError, {"order": 3}),
    "no size was given": (NumericError, {"sizes": []}),
    "a size is a number of nodes": (NumericError, {"sizes": [7]}),
    "by is unknown": (NumericError, {"by": ["upwards"]}),
    "by names each sign once": (NumericError, {"by": []}),
    "source is unknown": (NumericError, {"replace": "nothing"}),
    "at is unknown": (NumericError, {"roles": ["subject"]}),
    "roles are names of tokens": (NumericError, {"roles": "all"}),
    "the nodes at a|not among|none of the nodes": (NodeError, {"roles": {"a": ["L9H9"]}}),
    "is given, and none|no site": (NodeError, {"given": ["L0.attn_out"]}),
    "fldd is a part": (NumericError, {"metric": "fldd"}),
    "draws is": (NumericError, {"draws": -1}),
    "enough is": (NumericError, {"enough": 1.5}),
    "choose is": (NumericError, {"choose": 9}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_asked_is_refused(what: str) -> None:
    kind, settings = BAD[what]
    asked: dict[str, Any] = {"order": ["L0H0", "L0H1", "L1H0", "L1H1", "MLP0", "MLP1"], **settings}
    with pytest.raises(kind, match=what):
        uw.circuit(model("gpt2"), pairs(), **asked)


def test_orders_of_other_models_and_pairs_that_say_nothing_are_refused() -> None:
    lm, given = model("gpt2"), pairs()
    other = uw.effects(model("gemma2"), given, NODES, at="all", method="atp")
    with pytest.raises(ResultError, match="of another model"):
        uw.circuit(lm, given, other)
    same = uw.pairs(given.base, given.base, given.answer, given.against, given.row)
    with pytest.raises(TokensError, match="pair 0 are the same"):
        uw.circuit(lm, same, ["L0H0"])
    longer = uw.pairs(given.base, contrasts((7, 6, 7, 6)).source, 5, 9, given.row, source_roles={"end": 3})
    with pytest.raises(TokensError, match="equal numbers"):
        uw.circuit(lm, longer, ["L0H0"])
    still = lambda logits: 0 * logits[:, 0] + 1  # noqa: E731
    with pytest.raises(NumericError, match="the same when all nodes are replaced"):
        uw.circuit(lm, given, ["L0H0"], metric=still)
