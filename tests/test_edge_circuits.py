"""Is a circuit of edges what traced passes with every edit find, and what single edges and sets of nodes are?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import every
import unwrite as uw
from edging import Edged
from executed import exact, weights
from test_paths import AGAINST, ANSWER, FAMILIES, every_family, ids, model, pairs
from unwrite.errors import ModelError, NumericError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.metrics import metric_of
from unwrite.run.replay import edge_circuits as engine
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edge_circuits import edge_table, kept_edges
from unwrite.run.replay.walk import patched_together
from unwrite.run.source.values import donor

PLAIN = [name for name in FAMILIES if name != "gemma2"]  # without a post-norm: what nodes write adds up at any scale


@pytest.fixture(autouse=True)
def _exactly(request: pytest.FixtureRequest) -> Iterator[None]:
    """In float64, but for types of transformers, which compute as they do."""
    with nullcontext() if "kind" in request.fixturenames else exact():
        yield


def answers(lm: Model, given: Pairs, kept: Tensor, source: str = "source") -> np.ndarray:
    """The metric of each pair when these edges are kept."""
    table, rows = edge_table(lm), slice(0, len(given))
    base = base_of(lm, given, rows, table.slots)
    final = kept_edges(base, donor(lm, given, table.sent, source).values(rows), table, kept)
    return metric_of(lm, given, "logit_diff", rows)(final).detach().numpy()


def joins(lm: Model) -> Tensor:
    return torch.from_numpy(edge_table(lm).joins)


def without(lm: Model, *edges: tuple[str, str]) -> Tensor:
    """All edges but these."""
    table, kept = edge_table(lm), joins(lm)
    for sender, receiver in edges:
        kept[[*table.senders].index(sender), [*table.receivers].index(receiver)] = False
    return kept


def clean(lm: Model, given: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The metric of base prompts and of source prompts, alone and without padding."""
    every_ = [Edged(lm, given, pair) for pair in range(len(given))]
    return np.array([one.clean for one in every_]), np.array([one.run([], of=one.source)[0] for one in every_])


@pytest.mark.promise("executed")
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen2_moe", "gemma3_text", "olmo2", "cohere", "phi"])
def test_all_edges_are_the_base_run_and_none_the_source_run(name: str) -> None:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_bias": False}
    lm, given = model(name) if name in FAMILIES else view(weights(name, 0, **settings)), pairs()
    every_ = joins(lm)
    base, source = clean(lm, given)
    np.testing.assert_allclose(answers(lm, given, every_), base, atol=1e-12, rtol=0)
    np.testing.assert_allclose(answers(lm, given, torch.zeros_like(every_)), source, atol=1e-12, rtol=0)
    assert np.abs(base - source).min() > 1e-2


@pytest.mark.promise("executed")
@pytest.mark.parametrize("name", ["gpt2", "neox parallel", "llama", "gemma2", "granite"])
def test_a_circuit_is_what_traced_passes_find(name: str) -> None:
    lm, given = model(name), pairs()
    table, every_ = edge_table(lm), joins(lm)
    kept = every_ & (torch.rand(every_.shape, generator=torch.Generator().manual_seed(3)) < 0.6)
    senders, one = [*table.senders], Edged(lm, given, 1)
    cut = {
        receiver: [sender for i, sender in enumerate(senders) if every_[i, j] and not kept[i, j]]
        for j, receiver in enumerate(table.receivers)
    }
    order = {"q": 0, "k": 0, "v": 0, "MLP": 1}
    passes = sorted(cut, key=lambda name: (9, 0) if name == "logits" else (int(name[3] if name[0] == "M" else name[1]),
                                                                         order.get(name[-1], 1)))  # fmt: skip
    want = one.circuit(senders, {receiver: cut[receiver] for receiver in passes})
    assert answers(lm, given, kept)[1] == pytest.approx(want, abs=1e-12)
    base, source = clean(lm, given)
    assert min(abs(want - base[1]), abs(want - source[1])) > 1e-3


@every_family
def test_a_single_edge_that_is_cut_is_the_executed_edge(name: str) -> None:
    """But for what a head behind a post-norm writes, which is scaled as all heads are in its own run."""
    lm, given = model(name), pairs()
    sender = "L0H1" if name in PLAIN else "MLP0"
    key = "L2KV0.k" if lm.kv_heads < lm.n_heads else "L2H1.k"
    receivers = ["L1H0.q", key, "MLP1", "logits"]
    found = uw.paths(lm, given, [sender, "embed"], receivers, "frozen")
    for one in (sender, "embed"):
        for receiver in receivers:
            changed = answers(lm, given, without(lm, (one, receiver))) - found["base"].values
            want = found["effect"].sel(sender=one, receiver=receiver).values
            np.testing.assert_allclose(changed, want, atol=1e-12, rtol=0)
            assert np.abs(want).max() > 1e-6


@every_family
def test_a_receiver_whose_edges_are_all_cut_is_that_receiver_patched(name: str) -> None:
    lm, given = model(name), pairs()
    table = edge_table(lm)
    receivers = ["L1H0.q", "L2KV0.v" if lm.kv_heads < lm.n_heads else "L2H1.v", "MLP2"]
    effects = uw.effects(lm, given, receivers, "all")
    for receiver in receivers:
        changed = answers(lm, given, without(lm, *((sender, receiver) for sender in table.senders)))
        want = effects["base"] + effects["effect"].sel(node=receiver)
        np.testing.assert_allclose(changed, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_where_all_edges_out_of_some_nodes_are_cut_it_is_the_circuit_of_the_other_nodes(name: str) -> None:
    lm, given, rows = model(name), pairs(), slice(0, 2)
    table = edge_table(lm)
    inside = torch.rand(len(table.senders), generator=torch.Generator().manual_seed(0)) < 0.5
    base = base_of(lm, given, rows, table.slots)
    source = donor(lm, given, table.sent, "source").values(rows)
    outside = {slot: [not inside[[*table.senders].index(name)] for name in slot.names] for slot in table.sent}
    chosen = {slot: torch.tensor(part).expand(2, 6, -1) for slot, part in outside.items() if any(part)}
    final = patched_together(base, {slot: source[slot] for slot in chosen}, chosen, torch.arange(2), 0)
    want = metric_of(lm, given, "logit_diff", rows)(final).detach().numpy()
    np.testing.assert_allclose(answers(lm, given, joins(lm) & inside[:, None]), want, atol=1e-12, rtol=0)
    assert 0 < int(inside.sum()) < len(inside)


@pytest.mark.promise("batches")
def test_any_batch_and_any_wave_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = model("llama"), pairs(2)
    kept = joins(lm) & (torch.rand(joins(lm).shape, generator=torch.Generator().manual_seed(5)) < 0.7)
    whole = answers(lm, given, kept)
    monkeypatch.setattr(engine, "ROWS", 20)
    np.testing.assert_allclose(answers(lm, given, kept), whole, atol=1e-13, rtol=0)


def test_nothing_comes_of_nothing() -> None:
    lm, given = model("llama"), pairs()
    same = uw.pairs(given.base, given.base, ANSWER, AGAINST, position=[4, 3])
    base = uw.paths(lm, same, "embed", "logits")["base"]
    np.testing.assert_array_equal(answers(lm, same, torch.zeros_like(joins(lm))), base)


def test_values_come_from_elsewhere_too() -> None:
    """Every head and MLP at its mean, and the embedding: nothing is left of a prompt but its length."""
    lm, given = model("llama"), uw.pairs(ids(0), ids(1), ANSWER, AGAINST)
    found = answers(lm, given, torch.zeros_like(joins(lm)), "mean")
    other = uw.pairs(ids(2), ids(1), ANSWER, AGAINST)
    np.testing.assert_allclose(answers(lm, other, torch.zeros_like(joins(lm)), "mean"), found, atol=1e-12, rtol=0)


def test_a_mask_of_another_shape_is_refused() -> None:
    lm = model("gpt2")
    with pytest.raises(NumericError, match="whether it is kept"):
        answers(lm, pairs(), joins(lm)[:-1])


def test_a_bias_behind_a_post_norm_is_refused_by_name() -> None:
    lm = view(weights("gemma2", 0, num_hidden_layers=2, num_attention_heads=2, attention_bias=True))
    with pytest.raises(ModelError, match="layer 0 of gemma2 scales a bias by a post-norm"):
        edge_table(lm)


@pytest.mark.parametrize("kind", ["gemma4_text"])
def test_what_no_edge_says_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError, match=r"layer 0 of gemma4\w* writes by a second module beside its MLP"):
        edge_table(view(every.model(kind)))
