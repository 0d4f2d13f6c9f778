"""Are scores of edges the slopes of edges that are executed, and do they add up to those of nodes?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import every
import tiny
import unwrite as uw
from edging import Edged
from executed import exact, weights
from test_paths import AGAINST, ANSWER, FAMILIES, ROWS, every_family, ids, linear, model, pairs
from unwrite.errors import NodeError, NumericError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import from_ids
from unwrite.report.views import listings, words
from unwrite.run.loop.stream import Progress

GUESSES = ("eap", "eap-ig")
# Heads behind a post-norm: what one of them writes is no linear map of its z.
POST_NORM = ("gemma2", "gemma3_text", "olmo2")


@pytest.fixture(autouse=True)
def _exactly(request: pytest.FixtureRequest) -> Iterator[None]:
    """In float64, but for types of transformers, which compute as they do."""
    with nullcontext() if "kind" in request.fixturenames else exact():
        yield


def additive(lm: Model) -> list[str]:
    """Senders whose write is linear in the value that AtP replaces."""
    heads = [] if lm.layers[0].post_attention_norm is not None else ["heads"]
    return ["embed", *heads, "attn_out", "mlp_out"]


@pytest.mark.promise("estimates")
@every_family
def test_a_score_is_the_slope_of_the_executed_edge(name: str) -> None:
    lm, given = model(name), pairs()
    key, value = ("L2KV0.k", "L1KV0.v") if lm.kv_heads < lm.n_heads else ("L2H1.k", "L1H0.v")
    edges = [("L0H1", "L1H0.q"), ("L0H1", key), ("MLP0", value), ("MLP0", "MLP1"), ("L0H1", "L2H0"), ("MLP0", "logits")]
    found = uw.paths(lm, given, ["L0H1", "MLP0"], [receiver for _, receiver in edges], method="eap")["effect"]
    one = Edged(lm, given, 1)
    more = {sender: one.more(sender) for sender in ("L0H1", "MLP0")}
    for sender, receiver in edges:
        want = one.slope(more[sender], receiver, [])
        got = float(found.sel(pair=1, sender=sender, receiver=receiver))
        assert got == pytest.approx(want, abs=2e-7), (sender, receiver)
        assert abs(got) > 1e-5, (sender, receiver)


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_integrated_scores_are_a_loop_over_runs_between_source_and_base(name: str) -> None:
    lm, given, steps = model(name), pairs(), 3
    edges = [("embed", "L0H0.q"), ("L0H1", "MLP2"), ("MLP0", "logits")]
    senders, receivers = ([*dict.fromkeys(part)] for part in zip(*edges, strict=True))
    found = uw.paths(lm, given, senders, receivers, method="eap-ig", steps=steps)["effect"].sel(pair=0)
    one = Edged(lm, given, 0)
    start, end = (one.run([], ["resid_pre0"], of)[1]["resid_pre0"] for of in (one.source, one.base))
    way = [[uw.Edit.set("resid_pre0", start + (end - start) * k / steps)] for k in range(1, steps + 1)]
    for sender, receiver in edges:
        more = one.more(sender)
        want = np.mean([one.slope(more, receiver, before) for before in way])
        assert float(found.sel(sender=sender, receiver=receiver)) == pytest.approx(want, abs=5e-7), (sender, receiver)


@pytest.mark.promise("estimates")
@pytest.mark.parametrize("name", [*FAMILIES, *sorted({*tiny.FAMILIES} - {family for family, _ in FAMILIES.values()})])
def test_scores_of_all_edges_out_of_a_node_are_its_atp(name: str) -> None:
    lm = model(name) if name in FAMILIES else view(weights(name, 0, num_hidden_layers=2, num_attention_heads=2))
    given, senders = pairs(), additive(lm)
    receivers = "all" if lm.row.interface else ["heads", "mlp_out", "logits"]
    found = uw.paths(lm, given, senders, receivers, method="eap")["effect"]
    nodes = uw.effects(lm, given, senders, "all", "atp")["effect"].sel(node=found["sender"].values)
    np.testing.assert_allclose(found.sum("receiver"), nodes, atol=1e-13, rtol=0)
    assert np.abs(nodes).min() > 1e-4


@pytest.mark.parametrize("kind", ["jamba", "gpt_oss"])
def test_mixers_experts_and_sinks_read_the_stream_as_they_are(kind: str) -> None:
    lm = view(every.model(kind))
    base, source = every.some_ids(1), every.some_ids(2)
    given = uw.pairs(base, source, 5, 9)
    found = uw.paths(lm, given, ["embed", "mlp_out", "attn_out"], "all", method="eap")["effect"]
    senders = found["sender"].values
    nodes = uw.effects(lm, given, senders, "all", "atp")["effect"].sel(node=senders)
    scale = float(np.abs(nodes).max())
    np.testing.assert_allclose(found.sum("receiver"), nodes, atol=1e-5 * scale, rtol=0)


def test_one_step_of_eap_ig_is_eap_and_several_are_not() -> None:
    lm, given = model("llama"), pairs()
    eap, one, three = (
        uw.paths(lm, given, "all", "all", method=method, steps=steps)["effect"]
        for method, steps in (("eap", 7), ("eap-ig", 1), ("eap-ig", 3))
    )
    np.testing.assert_array_equal(one, eap)
    assert np.nanmax(np.abs(three - eap)) > 1e-3


@pytest.mark.parametrize("method", GUESSES)
def test_in_a_linear_model_scores_are_executed_edges(method: str) -> None:
    lm, given = linear(), pairs()
    senders, receivers = ["embed", "L0H0", "MLP0", "L1H1", "L0H0+L1H1"], ["v", "mlp_out", "logits", "L2H0.v+MLP1"]
    guessed = uw.paths(lm, given, senders, receivers, method=method)["effect"]
    executed = uw.paths(lm, given, senders, receivers, "frozen")["effect"]
    single = executed["receiver"].values[:-1]
    np.testing.assert_allclose(guessed.sel(receiver=single), executed.sel(receiver=single), atol=1e-10, rtol=0)
    parts = guessed.sel(receiver=["L2H0.v", "MLP1"]).sum("receiver")
    np.testing.assert_allclose(guessed.sel(receiver="L2H0.v+MLP1").fillna(0), parts, atol=1e-12, rtol=0)
    assert np.nanmax(np.abs(executed)) > 1e-3


def test_scores_of_all_senders_into_a_receiver_follow_all_that_it_reads() -> None:
    """Σ over senders = ⟨x_source − x_base, slope⟩: nothing of the stream is left out, nothing counted twice."""
    lm, given = model("gpt2"), pairs()
    found = uw.paths(lm, given, "all", ["L2H0.q", "MLP1", "logits"], method="eap")["effect"]
    for pair in (0, 1):
        one = Edged(lm, given, pair)
        for receiver in found["receiver"].values.tolist():
            reads = one.reads(receiver)
            change = one.run([], [reads], one.source)[1][reads] - one.run([], [reads])[1][reads]
            want = one.slope(change, receiver, [])
            assert float(found.sel(pair=pair, receiver=receiver).sum()) == pytest.approx(want, abs=2e-7)


@pytest.mark.parametrize("method", GUESSES)
def test_nothing_comes_of_nothing(method: str) -> None:
    lm, given = model("llama"), pairs()
    same = uw.pairs(given.base, given.base, ANSWER, AGAINST, position=ROWS)
    found = uw.paths(lm, same, "all", "all", method=method)["effect"].values
    assert set(np.unique(found[np.isfinite(found)])) == {0.0}
    # What differs only behind the row that is read does nothing either.
    source = given.base.ids.copy()
    source[0, 5] += 1
    late = uw.pairs(from_ids(given.base.ids[:1]), from_ids(source[:1]), ANSWER[0], AGAINST[0], position=ROWS[0])
    found = uw.paths(lm, late, "all", "all", method=method)["effect"].values
    assert np.nanmax(np.abs(found)) == 0.0


@pytest.mark.promise("batches")
@pytest.mark.parametrize("method", GUESSES)
def test_any_batch_gives_the_same(method: str) -> None:
    lm, given = model("gemma2"), pairs(2)
    whole, one = (uw.paths(lm, given, "all", "all", method=method, batch=batch).data for batch in (2, 1))
    xr.testing.assert_allclose(one, whole, atol=1e-13, rtol=0)


def test_scores_at_positions_add_up() -> None:
    lm, given = model("gpt2"), pairs()
    placed = uw.pairs(
        given.base, given.source, ANSWER, AGAINST, position=ROWS,
        roles={f"at {i}": [min(i, row) for row in ROWS] for i in range(1, 5)},
    )  # fmt: skip
    each = uw.paths(lm, placed, "all", "all", method="eap", at=[f"at {i}" for i in range(1, 5)])["effect"]
    whole = uw.paths(lm, given, "all", "all", method="eap")["effect"]
    # The second pair is read at position 3, so that its last two roles are one place.
    np.testing.assert_allclose(each[0].sum("role"), whole[0].fillna(0), atol=1e-13, rtol=0)
    np.testing.assert_allclose(each[1, ..., :3].sum("role"), whole[1].fillna(0), atol=1e-13, rtol=0)
    last = uw.paths(lm, given, "all", "all", method="eap", at="last")["effect"]
    np.testing.assert_allclose(each[:, :, :, 3], last, atol=1e-13, rtol=0)


@pytest.mark.parametrize("source", ["mean", "zero", "resample"])
def test_values_come_from_elsewhere_too(source: str) -> None:
    lm, given = model("gpt2"), uw.pairs(ids(0), ids(1), ANSWER, AGAINST)
    senders = ["heads", "mlp_out"]
    found = uw.paths(lm, given, senders, "all", source=source, method="eap")["effect"]
    nodes = uw.effects(lm, given, senders, "all", "atp", source=source)["effect"].sel(node=found["sender"].values)
    np.testing.assert_allclose(found.sum("receiver"), nodes, atol=1e-13, rtol=0)


def test_other_metrics_have_slopes_too() -> None:
    lm, given = model("gpt2"), pairs()
    nodes = uw.effects(lm, given, "mlp_out", "all", "atp", metric="prob")["effect"]
    found = uw.paths(lm, given, "mlp_out", "all", metric="prob", method="eap")["effect"]
    np.testing.assert_allclose(found.sum("receiver"), nodes, atol=1e-13, rtol=0)
    divergence = uw.paths(lm, given, "mlp_out", "logits", metric="kl", method="eap-ig", steps=2)
    assert float(np.abs(divergence["effect"]).max()) > 1e-4
    assert np.abs(divergence["base"]).max() < 1e-12


def test_all_names_every_node_and_all_that_each_reads_once() -> None:
    lm = model("llama")
    found = uw.paths(lm, pairs(), "all", "all", method="eap")["effect"]
    heads, layers = range(4), range(3)
    assert {*found["sender"].values} == {"embed", *(f"L{i}H{h}" for i in layers for h in heads), "MLP0", "MLP1", "MLP2"}
    reads = {f"L{i}H{h}.q" for i in layers for h in heads} | {
        f"L{i}KV{h}.{p}" for i in layers for h in (0, 1) for p in "kv"
    }
    assert {*found["receiver"].values} == reads | {"MLP0", "MLP1", "MLP2", "logits"}
    # A head's copy of a shared key is a part of what the group reads.
    copies = uw.paths(lm, pairs(), ["embed"], ["L1H0.k", "L1H1.k", "L1KV0.k"], method="eap")["effect"][:, 0]
    np.testing.assert_allclose(copies[:, :2].sum("receiver"), copies[:, 2], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    {
        "unknown": ({"method": "eapig"}, NumericError, "method is unknown.*'eap-ig'"),
        "recompute": ({"method": "eap", "mlps": "recompute"}, NumericError, "past all MLPs.*leave mlps out"),
        "unknown mlps": ({"method": "eap", "mlps": "held"}, NumericError, "mlps is unknown"),
        "no steps": ({"method": "eap-ig", "steps": 0}, NumericError, "steps is a number of steps"),
        "another source": ({"method": "eap-ig", "source": "mean"}, NumericError, "from base to source prompts"),
        "kl": ({"method": "eap", "metric": "kl"}, NumericError, "kl has no slope at the base run"),
        "kl in a step": ({"method": "eap-ig", "metric": "kl", "steps": 1}, NumericError, "kl has no slope"),
        "match": ({"method": "eap-ig", "metric": "match"}, NumericError, "what counts answers has no slope"),
        "top": ({"method": "eap", "metric": "top"}, NumericError, "nothing of top: what counts answers has no slope"),
        "receivers": ({"method": "eap", "receivers": ["L1H0.q", "L7H0"]}, NodeError, "no site L7H0"),
        "nothing reads": ({"method": "eap", "senders": "L2H0", "receivers": "L1H0.q"}, NodeError, "no such edge"),
    }.values(),
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        uw.paths(model("gpt2"), pairs(), **settings)


@pytest.mark.parametrize("kind", ["gemma4_text"])
def test_keys_of_another_layer_are_refused_by_name(kind: str) -> None:
    lm = view(every.model(kind))
    given = uw.pairs(every.some_ids(1), every.some_ids(2), 5, 9)
    with pytest.raises(NodeError, match=r"slopes of L\dKV\d\.k are those of layer \d"):
        uw.paths(lm, given, "all", "all", method="eap")
    assert np.isfinite(uw.paths(lm, given, "embed", ["q", "mlp_out", "logits"], method="eap")["effect"]).all()


def test_what_it_costs_is_said_before_it_is_paid() -> None:
    told: list[Progress] = []
    found = uw.paths(model("gpt2"), pairs(), "all", "all", method="eap-ig", steps=4, listener=told.append)
    assert told[0].stage == "paths eap-ig, 10 passes"
    assert (told[0].done, told[-1].done, told[0].seconds) == (0, 2, 0.0)
    assert found.data.attrs["cost"] == 10
    executed = uw.paths(model("gpt2"), pairs(), "embed", ["L1H0.q", "logits"], "frozen").data.attrs["cost"]
    # The clean runs, and of three layers the two behind the query; the final stream is behind all.
    assert executed == pytest.approx(2 + 2 / 3)


def test_the_result_says_what_it_is(tmp_path: Path) -> None:
    found = uw.paths(model("llama"), pairs(), "all", "all", method="eap-ig", steps=2)
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    settings = again.provenance["settings"]
    assert (settings["method"], settings["steps"], settings["mlps"]) == ("eap-ig", 2, "frozen")
    assert "e_source + k/m" in again["effect"].attrs["equation"]
    assert "eap-ig, a guess of the direct edge" in repr(again)
    assert again.figure().to_dict()


def test_the_foremost_edges_are_listed_with_intervals() -> None:
    base, source = (torch.randint(3, 50, (6, 6), generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    found = uw.paths(model("gpt2"), uw.pairs(base, source, 5, 9), "all", "all", method="eap")
    (table,) = listings(found)
    mean = found["mean"].to_series().dropna()
    order = mean.abs().sort_values(ascending=False).index[: len(table.rows)]
    assert [row[:2] for row in table.rows] == [*order]
    for row, edge in zip(table.rows, order, strict=True):
        low, high = (float(found[name].sel(sender=edge[0], receiver=edge[1])) for name in ("mean_low", "mean_high"))
        assert low < high
        assert row[3] == f"{mean[edge]:+.3f} [{low:+.3f}, {high:+.3f}]"
    most = np.abs(found["effect"]).mean("pair").to_series().dropna()
    edge = " → ".join(most.idxmax())
    assert f"Of {len(mean)} edges {edge} does most: {most.max():.3f} on average over 6 pairs" in words(found)


def test_inside_inference_mode_and_without_gradients_it_is_the_same() -> None:
    lm, given = model("gpt2"), pairs()
    want = uw.paths(lm, given, "all", "all", method="eap")["effect"]
    with torch.inference_mode():
        np.testing.assert_array_equal(uw.paths(lm, given, "all", "all", method="eap")["effect"], want)
    assert not any(parameter.grad is not None for parameter in lm.hf.parameters())
