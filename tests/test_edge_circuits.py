"""Is a circuit of edges what traced passes with every edit find, and what single edges and sets of nodes are?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

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
from unwrite.run.edit.slots import Values
from unwrite.run.replay import edge_circuits as engine
from unwrite.run.replay.clean import Base, base_of
from unwrite.run.replay.edge_circuits import edge_table, kept_edges
from unwrite.run.replay.edges import Ends
from unwrite.run.replay.walk import patched_together
from unwrite.run.source.values import donor

PLAIN = [name for name in FAMILIES if name != "gemma2"]  # without a post-norm: what nodes write adds up at any scale


@pytest.fixture(autouse=True)
def _exactly(request: pytest.FixtureRequest) -> Iterator[None]:
    """In float64, but for types of transformers, which compute as they do."""
    with nullcontext() if "kind" in request.fixturenames else exact():
        yield


@dataclass(frozen=True, eq=False)
class Asked:
    """Two pairs, or others, of a model, and what every circuit of its edges begins with."""

    lm: Model
    given: Pairs
    source: str = "source"

    @cached_property
    def table(self) -> Ends:
        return edge_table(self.lm)

    @cached_property
    def joins(self) -> Tensor:
        return torch.from_numpy(self.table.joins)

    @cached_property
    def base(self) -> Base:
        return base_of(self.lm, self.given, slice(0, len(self.given)), self.table.sent)

    @cached_property
    def values(self) -> Values:
        return donor(self.lm, self.given, self.table.sent, self.source).values(slice(0, len(self.given)))

    def metric(self, final: Tensor) -> np.ndarray:
        return metric_of(self.lm, self.given, "logit_diff", slice(0, len(self.given)))(final).detach().numpy()

    def answers(self, kept: Tensor) -> np.ndarray:
        """The metric of each pair when these edges are kept."""
        return self.metric(kept_edges(self.base, self.values, self.table, kept))

    def without(self, *edges: tuple[str, str]) -> np.ndarray:
        """The same of all edges but these."""
        kept, (senders, receivers) = self.joins.clone(), ([*self.table.senders], [*self.table.receivers])
        for sender, receiver in edges:
            kept[senders.index(sender), receivers.index(receiver)] = False
        return self.answers(kept)

    def some(self, share: float) -> Tensor:
        """A mask of edges drawn at random."""
        drawn = torch.rand(self.joins.shape, generator=torch.Generator().manual_seed(3))
        return self.joins & (drawn < share)


@cache
def asked(name: str) -> Asked:
    return Asked(model(name), pairs())


def clean(lm: Model, given: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The metric of base prompts and of source prompts, alone and without padding."""
    every_ = [Edged(lm, given, pair) for pair in range(len(given))]
    return np.array([one.clean for one in every_]), np.array([one.run([], of=one.source)[0] for one in every_])


@pytest.mark.promise("executed")
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen2_moe", "gemma3_text", "olmo2", "cohere", "phi"])
def test_all_edges_are_the_base_run_and_none_the_source_run(name: str) -> None:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_bias": False}
    one = asked(name) if name in FAMILIES else Asked(view(weights(name, 0, **settings)), pairs())
    base, source = clean(one.lm, one.given)
    np.testing.assert_allclose(one.answers(one.joins), base, atol=1e-12, rtol=0)
    np.testing.assert_allclose(one.answers(torch.zeros_like(one.joins)), source, atol=1e-12, rtol=0)
    assert np.abs(base - source).min() > 1e-2


@pytest.mark.parametrize("kind", ["jamba", "gpt_oss", "deepseek_v3"])
def test_so_they_are_with_mixers_sinks_and_latent_values(kind: str) -> None:
    one = Asked(view(every.model(kind)), uw.pairs(every.some_ids(1), every.some_ids(2), 5, 9))
    source = base_of(one.lm, uw.pairs(one.given.source, one.given.base, 5, 9), slice(0, 2), ()).final
    none = one.answers(torch.zeros_like(one.joins))
    np.testing.assert_allclose(none, one.metric(source), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(one.answers(one.joins), one.metric(one.base.final))
    assert np.abs(none - one.metric(one.base.final)).min() > 1e-2


@pytest.mark.promise("executed")
@pytest.mark.parametrize("name", ["gpt2", "neox parallel", "llama", "gemma2", "granite"])
def test_a_circuit_is_what_traced_passes_find(name: str) -> None:
    one = asked(name)
    kept, senders, alone = one.some(0.6), [*one.table.senders], Edged(one.lm, one.given, 1)
    cut = {
        receiver: [sender for i, sender in enumerate(senders) if one.joins[i, j] and not kept[i, j]]
        for j, receiver in enumerate(one.table.receivers)
    }
    order = {"q": 0, "k": 0, "v": 0, "MLP": 1}
    passes = sorted(cut, key=lambda name: (9, 0) if name == "logits" else (int(name[3] if name[0] == "M" else name[1]),
                                                                         order.get(name[-1], 1)))  # fmt: skip
    want = alone.circuit(senders, {receiver: cut[receiver] for receiver in passes})
    assert one.answers(kept)[1] == pytest.approx(want, abs=1e-12)
    base, source = clean(one.lm, one.given)
    assert min(abs(want - base[1]), abs(want - source[1])) > 1e-3


@every_family
def test_a_single_edge_that_is_cut_is_the_executed_edge(name: str) -> None:
    """But for what a head behind a post-norm writes, which is scaled as all heads are in its own run."""
    one = asked(name)
    sender = "L0H1" if name in PLAIN else "MLP0"
    receivers = ["L1H0.q", "L2KV0.k" if one.lm.kv_heads < one.lm.n_heads else "L2H1.k", "MLP1", "logits"]
    found = uw.paths(one.lm, one.given, sender, receivers, "frozen")
    for receiver in receivers:
        changed = one.without((sender, receiver)) - found["base"].values
        want = found["effect"].sel(sender=sender, receiver=receiver).values
        np.testing.assert_allclose(changed, want, atol=1e-12, rtol=0)
        assert np.abs(want).max() > 1e-6


@every_family
def test_a_receiver_whose_edges_are_all_cut_is_that_receiver_patched(name: str) -> None:
    one = asked(name)
    receivers = ["L1H0.q", "L2KV0.v" if one.lm.kv_heads < one.lm.n_heads else "L2H1.v", "MLP2"]
    effects = uw.effects(one.lm, one.given, receivers, "all")
    for receiver in receivers:
        changed = one.without(*((sender, receiver) for sender in one.table.senders))
        np.testing.assert_allclose(changed, effects["base"] + effects["effect"].sel(node=receiver), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_where_all_edges_out_of_some_nodes_are_cut_it_is_the_circuit_of_the_other_nodes(name: str) -> None:
    one = asked(name)
    inside = torch.rand(len(one.table.senders), generator=torch.Generator().manual_seed(0)) < 0.5
    outside = {slot: [not inside[[*one.table.senders].index(name)] for name in slot.names] for slot in one.table.sent}
    chosen = {slot: torch.tensor(part).expand(2, 6, -1) for slot, part in outside.items() if any(part)}
    final = patched_together(one.base, {slot: one.values[slot] for slot in chosen}, chosen, torch.arange(2), 0)
    np.testing.assert_allclose(one.answers(one.joins & inside[:, None]), one.metric(final), atol=1e-12, rtol=0)
    assert 0 < int(inside.sum()) < len(inside)


@pytest.mark.promise("batches")
def test_any_batch_and_any_wave_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Asked(model("llama"), pairs(2))
    whole = one.answers(one.some(0.7))
    monkeypatch.setattr(engine, "ROWS", 20)
    np.testing.assert_allclose(one.answers(one.some(0.7)), whole, atol=1e-13, rtol=0)


def test_nothing_comes_of_nothing() -> None:
    base = pairs().base
    one = Asked(model("llama"), uw.pairs(base, base, ANSWER, AGAINST, position=[4, 3]))
    np.testing.assert_array_equal(one.answers(torch.zeros_like(one.joins)), one.metric(one.base.final))


def test_values_come_from_elsewhere_too() -> None:
    """Every head and MLP at its mean, and the embedding: nothing is left of a prompt."""
    every_ = [Asked(model("llama"), uw.pairs(ids(seed), ids(1), ANSWER, AGAINST), "mean") for seed in (0, 2)]
    found, other = (one.answers(torch.zeros_like(one.joins)) for one in every_)
    np.testing.assert_allclose(other, found, atol=1e-12, rtol=0)


def test_a_mask_of_another_shape_is_refused() -> None:
    one = asked("gpt2")
    with pytest.raises(NumericError, match="whether it is kept"):
        one.answers(one.joins[:-1])


def test_a_bias_behind_a_post_norm_is_refused_by_name() -> None:
    lm = view(weights("gemma2", 0, num_hidden_layers=2, num_attention_heads=2, attention_bias=True))
    with pytest.raises(ModelError, match="layer 0 of gemma2 scales a bias by a post-norm"):
        edge_table(lm)


@pytest.mark.parametrize("kind", ["gemma4_text"])
def test_what_no_edge_says_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError, match=r"layer 0 of gemma4\w* writes by a second module beside its MLP"):
        edge_table(view(every.model(kind)))
