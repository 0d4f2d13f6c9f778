"""Is every edge what three traced passes of the model itself find, and do edges add up to what they are edges of?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import tiny
import unwrite as uw
from executed import exact, weights
from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import from_ids
from unwrite.run.replay import paths as engine

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "granite": ("granite", {}),
    "opt": ("opt", {}),
}
LENGTHS, ROWS = [6, 5], [4, 3]
ANSWER, AGAINST = [5, 6], [9, 3]
SENDERS = ["embed", "L0H1", "L0.attn_out", "MLP0", "L1H0", "MLP2"]
RECEIVERS = ["L1H1", "L2H0.q", "L2H1.k", "L2H1.v", "MLP0", "MLP2", "logits"]
MODES = ("recompute", "frozen")
each_mode = pytest.mark.parametrize("mlps", MODES)
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    with exact():
        yield


@cache
def model(name: str) -> Model:
    family, settings = FAMILIES[name]
    chosen = {"num_hidden_layers": 3, "num_attention_heads": 2, **settings}
    with exact():
        return view(weights(family, 1, **chosen))


def ids(seed: int) -> Tensor:
    return torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(seed))


def pairs(first: int = 1) -> Pairs:
    """Two pairs of unequal lengths that differ from position `first` on."""
    base, source = ids(0), ids(1)
    source[:, :first] = base[:, :first]
    mask = np.arange(6) < np.array(LENGTHS)[:, None]
    made = [from_ids(part.numpy(), mask) for part in (base, source)]
    return uw.pairs(made[0], made[1], ANSWER, AGAINST, position=ROWS)


class Naive:
    """One pair, alone and without padding: every pass is a trace of the model with all edits said one by one."""

    def __init__(self, lm: Model, given: Pairs, pair: int):
        self.lm, self.pair = lm, pair
        n = given.base.lengths[pair]
        self.ids = [torch.from_numpy(part.ids[pair : pair + 1, :n]) for part in (given.base, given.source)]
        self.row, self.heads = given.row[pair], range(lm.n_heads)
        self.layers = range(len(lm.layers))
        z = [f"L{i}H{h}.z" for i in self.layers for h in self.heads]
        every = [*z, *(f"L{i}.attn_out" for i in self.layers), *(f"MLP{i}" for i in self.layers), "resid_pre0"]
        self.base, self.source = (self.run(part, [], every)[1] for part in self.ids)
        self.clean = self.run(self.ids[0], [])[0]

    def run(self, given: Tensor, edits: list[uw.Edit], wanted: list[str] | None = None) -> tuple[float, Mapping]:
        with uw.trace(self.lm, *(wanted or []), edits=edits) as t, torch.no_grad():
            logits = self.lm.hf(given).logits[0, self.row]
        return float(logits[ANSWER[self.pair]] - logits[AGAINST[self.pair]]), {w: t[w] for w in wanted or []}

    def effect(self, sender: str, receiver: str, mlps: str) -> float:
        """By three passes, the second for each receiver by itself."""
        sent = [self.site(part) for part in sender.split("+")]
        got = [self.site(part) for part in receiver.split("+")]
        edits = []
        for site in got:
            reach = layer_of(site)
            between = site.startswith("MLP") and not self.lm.parallel
            free = [int(part[1]) for part in sent if part.endswith("attn_out")]
            held = [
                f"L{i}H{h}.z"
                for i in range(min(reach + between, len(self.layers)))
                for h in self.heads
                if i not in free
            ]
            held += [f"MLP{i}" for i in range(reach)] if mlps == "frozen" else []
            second = [uw.Edit.set(part, self.base[part]) for part in held if part not in sent]
            second += [uw.Edit.set(part, self.source[part]) for part in sent if part in self.source]
            _, became = self.run(self.ids[0], second, [site])
            if site == self.end:
                _, last = self.run(self.ids[0], [], [site])
                edits.append(uw.Edit.add(site, became[site] - last[site]))
            else:
                edits.append(uw.Edit.set(site, became[site]))
        return self.run(self.ids[0], edits)[0] - self.clean

    def live(self, sender: str, receivers: list[str]) -> float:
        """Receivers in the order of a pass, each reading what the stream is by then and Δ."""
        if sender[0] == "L" and sender[2] == "H":
            attention = f"L{sender[1]}.attn_out"
            _, changed = self.run(self.ids[0], [uw.Edit.set(f"{sender}.z", self.source[f"{sender}.z"])], [attention])
            more = changed[attention] - self.base[attention]
        else:
            more = self.source[self.site(sender)] - self.base[self.site(sender)]
        edits: list[uw.Edit] = []
        for site in map(self.site, receivers):
            i = layer_of(site)
            reads = f"resid_mid{i}" if site.startswith("MLP") and not self.lm.parallel else f"resid_pre{i}"
            if site == self.end:
                edits.append(uw.Edit.add(site, more))
                continue
            _, stream = self.run(self.ids[0], edits, [reads])
            _, became = self.run(self.ids[0], [uw.Edit.set(reads, stream[reads] + more)], [site])
            edits.append(uw.Edit.set(site, became[site]))
        return self.run(self.ids[0], edits)[0] - self.clean

    @property
    def end(self) -> str:
        return f"resid_post{len(self.layers) - 1}"

    def site(self, name: str) -> str:
        if name in ("embed", "logits"):
            return "resid_pre0" if name == "embed" else self.end
        return f"{name}.z" if name[0] == "L" and "." not in name else name


def layer_of(site: str) -> int:
    """The final stream is what a further block would read."""
    return int(site[10:]) + 1 if site.startswith("resid_post") else int(site[3] if site[0] == "M" else site[1])


def exists(lm: Model, sender: str, receiver: str) -> bool:
    """By the order in which a block works, in words."""
    if sender == "embed" or receiver == "logits":
        return True
    one, other = (int(name[3] if name[0] == "M" else name[1]) for name in (sender, receiver))
    return one < other or (one == other and sender[0] == "L" and receiver[0] == "M" and not lm.parallel)


@pytest.mark.promise("executed")
@each_mode
@every_family
def test_an_edge_is_what_three_traced_passes_find(name: str, mlps: str) -> None:
    lm, given = model(name), pairs()
    found = uw.paths(lm, given, SENDERS, RECEIVERS, mlps)["effect"]
    naive = Naive(lm, given, 1)
    for sender in SENDERS:
        for receiver in RECEIVERS:
            got = float(found.sel(pair=1, sender=sender, receiver=receiver))
            if exists(lm, sender, receiver):
                assert got == pytest.approx(naive.effect(sender, receiver, mlps), abs=1e-12), (sender, receiver)
            else:
                assert np.isnan(got), (sender, receiver)
    other = Naive(lm, given, 0)
    for sender, receiver in (("L0H1", "L2H0.q"), ("MLP0", "MLP2"), ("embed", "logits")):
        got = float(found.sel(pair=0, sender=sender, receiver=receiver))
        assert got == pytest.approx(other.effect(sender, receiver, mlps), abs=1e-12)
    assert np.nanmax(np.abs(found)) > 1e-3


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - {family for family, _ in FAMILIES.values()}))
def test_in_every_other_family_too(family: str) -> None:
    lm, given = view(weights(family, 0, num_hidden_layers=2, num_attention_heads=2)), pairs()
    naive = Naive(lm, given, 1)
    for mlps in MODES:
        found = uw.paths(lm, given, ["L0H1", "MLP0"], ["L1H0", "MLP1", "logits"], mlps)["effect"].sel(pair=1)
        for sender, receiver in (("L0H1", "L1H0"), ("L0H1", "MLP1"), ("L0H1", "logits"), ("MLP0", "MLP1")):
            want = naive.effect(sender, receiver, mlps)
            assert float(found.sel(sender=sender, receiver=receiver)) == pytest.approx(want, abs=1e-12)
    edges = uw.paths(lm, given, ["L0H1", "MLP0"], everything(lm), "frozen")["effect"][:, :, 0]
    np.testing.assert_allclose(edges, uw.effects(lm, given, ["L0H1", "MLP0"], at="all")["effect"], atol=1e-12, rtol=0)


@each_mode
@pytest.mark.parametrize("name", ["gpt2", "neox parallel", "gemma2"])
def test_several_nodes_are_one_end(name: str, mlps: str) -> None:
    lm, given = model(name), pairs()
    senders = ["L0H0+L0H1", "embed+L0H1+MLP1", "MLP0+L1H0"]
    receivers = ["L2H0+L2H1.v", "L1H0+MLP2", "MLP1+L2H1+logits"]
    found = uw.paths(lm, given, senders, receivers, mlps)["effect"]
    naive = Naive(lm, given, 0)
    for sender in senders:
        got = float(found.sel(pair=0, sender=sender, receiver=receivers[0]))
        assert got == pytest.approx(naive.effect(sender, receivers[0], mlps), abs=1e-12), sender
    for receiver in receivers:
        got = float(found.sel(pair=0, sender=senders[0], receiver=receiver))
        if mlps == "recompute":
            assert got == pytest.approx(naive.effect(senders[0], receiver, mlps), abs=1e-12), receiver
        one = uw.paths(lm, given, ["L0H1", "MLP0"], receiver, mlps)["effect"].sel(pair=0, receiver=receiver)
        for sender in ("L0H1", "MLP0"):
            want = naive.live(sender, receiver.split("+")) if mlps == "frozen" else naive.effect(sender, receiver, mlps)
            assert float(one.sel(sender=sender)) == pytest.approx(want, abs=1e-12), (sender, receiver)


def everything(lm: Model, after: int = 0) -> str:
    """All that reads the stream, from a layer on, as one receiver."""
    layers = range(after, len(lm.layers))
    return "+".join([f"L{i}H{h}" for i in layers for h in range(lm.n_heads)] + [f"MLP{i}" for i in layers] + ["logits"])


@every_family
def test_all_edges_out_of_a_node_are_the_node(name: str) -> None:
    lm, given = model(name), pairs()
    senders = ["L0H1", "L1.attn_out", "MLP1", "MLP2", "embed"]
    edges = uw.paths(lm, given, senders, everything(lm), "frozen")["effect"][:, :, 0]
    nodes = uw.effects(lm, given, senders, at="all")["effect"].sel(node=senders)
    np.testing.assert_allclose(edges, nodes, atol=1e-12, rtol=0)


@every_family
def test_all_edges_into_a_node_are_the_node(name: str) -> None:
    lm, given = model(name), pairs()
    before = ["embed", "L0.attn_out", "MLP0", "L1.attn_out", "MLP1"]
    between = [] if lm.parallel else ["L2.attn_out"]
    heads = uw.paths(lm, given, "+".join(before), ["L2H0", "L2H1", "L2H1.v"], "frozen")["effect"][:, 0]
    mlp = uw.paths(lm, given, "+".join(before + between), "MLP2", "frozen")["effect"][:, 0]
    nodes = uw.effects(lm, given, ["L2H0", "L2H1", "L2H1.v", "MLP2"], at="all")["effect"]
    np.testing.assert_allclose(heads, nodes.sel(node=["L2H0", "L2H1", "L2H1.v"]), atol=1e-12, rtol=0)
    np.testing.assert_allclose(mlp, nodes.sel(node=["MLP2"]), atol=1e-12, rtol=0)


@every_family
def test_every_edge_replaced_is_the_source_run(name: str) -> None:
    lm, given = model(name), pairs()
    whole = "embed+" + "+".join(f"L{i}.attn_out+MLP{i}" for i in range(3))
    found = uw.paths(lm, given, ["embed", whole], ["logits", everything(lm)], "frozen")["effect"]
    turned = Naive(lm, given, 0), Naive(lm, given, 1)
    total = [one.run(one.ids[1], [])[0] - one.clean for one in turned]
    np.testing.assert_allclose(found[:, 0, 1], total, atol=1e-12, rtol=0)
    np.testing.assert_allclose(found[:, 1, 0], total, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_direct_edge_is_delta_arithmetic() -> None:
    """m(norm(x + Δz W_O)) − m(norm(x)), and through the last MLP m(norm(x − MLP(x) + MLP(x + Δz W_O))), by weights."""
    lm, given = model("gpt2"), pairs()
    naive, h = Naive(lm, given, 0), lm.hf.transformer
    _, seen = naive.run(naive.ids[0], [], ["resid_post2", "resid_mid2"])
    size = lm.head_dim
    delta = (naive.source["L1H1.z"] - naive.base["L1H1.z"]) @ h.h[1].attn.c_proj.weight[size : 2 * size]

    def answered(x: Tensor) -> float:
        logits = lm.hf.lm_head(h.ln_f(x))[0, naive.row]
        return float(logits[ANSWER[0]] - logits[AGAINST[0]])

    def mlp(x: Tensor) -> Tensor:
        return h.h[2].mlp(h.h[2].ln_2(x))

    x, mid = seen["resid_post2"], seen["resid_mid2"]
    want = [answered(x + delta) - answered(x), answered(x - mlp(mid) + mlp(mid + delta)) - answered(x)]
    found = uw.paths(lm, given, "L1H1", ["logits", "MLP2"], "frozen")["effect"][0, 0]
    np.testing.assert_allclose(found, want, atol=1e-13, rtol=0)


def linear() -> Model:
    """GPT-2 whose pattern is even, whose norms only scale, and whose MLPs are two matrices."""
    hf = weights("gpt2", 3, num_hidden_layers=3, num_attention_heads=2, scale_attn_weights=True)
    with torch.no_grad():
        for module in hf.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps, module.weight = 1e14, torch.nn.Parameter(module.weight * 1e7)
            if hasattr(module, "c_attn"):
                module.c_attn.weight[:, : 2 * hf.config.n_embd] = 0
                module.c_attn.bias[: 2 * hf.config.n_embd] = 0
            if hasattr(module, "act"):
                module.act = torch.nn.Identity()
    return view(hf)


def test_in_a_linear_model_paths_add_up_and_turn_round() -> None:
    lm, given = linear(), pairs()
    back = uw.pairs(given.source, given.base, ANSWER, AGAINST, position=ROWS)
    senders = ["embed", "L0H0", "MLP0", "L1H1"]
    heads = [f"L{i}H{h}" for i in range(3) for h in range(2)]
    total = uw.effects(lm, given, senders, at="all")["effect"].sel(node=senders)
    assert np.abs(total).min() > 1e-6
    for mlps, receivers in (("recompute", [*heads, "logits"]), ("frozen", [*heads, "mlp_out", "logits"])):
        there, again = (uw.paths(lm, part, senders, receivers, mlps)["effect"] for part in (given, back))
        # By the first head (or the first node at all) that a path goes through, or none.
        np.testing.assert_allclose(there.sum("receiver"), total, atol=1e-10, rtol=0)
        np.testing.assert_allclose(np.nan_to_num(there), -np.nan_to_num(again), atol=1e-10, rtol=0)


def test_the_two_meanings_are_one_where_no_mlp_lies_between_and_two_where_one_does() -> None:
    lm, given = model("llama"), pairs()
    found = [uw.paths(lm, given, ["embed", "L0H1", "MLP0"], ["L0H1", "L1H0", "MLP0", "L2H1", "logits"], mlps)["effect"]
             for mlps in MODES]  # fmt: skip
    same = [("embed", "L0H1"), ("L0H1", "MLP0"), ("MLP0", "L1H0")]
    for sender in ("embed", "L0H1", "MLP0"):
        for receiver in ("L0H1", "L1H0", "MLP0", "L2H1", "logits"):
            one, other = (part.sel(sender=sender, receiver=receiver).values for part in found)
            if (sender, receiver) in same or (sender, receiver) == ("embed", "MLP0"):
                np.testing.assert_allclose(one, other, atol=1e-13, rtol=0)
            elif np.isfinite(one).all():
                assert np.abs(one - other).min() > 1e-8, (sender, receiver)


@pytest.mark.promise("batches")
@each_mode
def test_any_batch_and_any_wave_give_the_same(mlps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = model("gemma2"), pairs(2)
    asked = ["heads", "mlp_out"], ["heads", "k", "L2KV0.k", "mlp_out", "logits"]
    whole = uw.paths(lm, given, *asked, mlps)
    monkeypatch.setattr(engine, "ROWS", 20)
    for batch in (1, 2):
        xr.testing.assert_allclose(uw.paths(lm, given, *asked, mlps, batch=batch).data, whole.data, atol=1e-13, rtol=0)


@each_mode
def test_nothing_comes_of_nothing(mlps: str) -> None:
    lm, given = model("llama"), pairs()
    same = uw.pairs(given.base, given.base, ANSWER, AGAINST, position=ROWS)
    found = uw.paths(lm, same, ["heads", "embed"], ["heads", "logits"], mlps)["effect"].values
    assert set(np.unique(found[np.isfinite(found)])) == {0.0}
    # Nor where another pair of the batch differs.
    mixed = given.source.ids.copy()
    mixed[0] = given.base.ids[0]
    one = uw.pairs(
        given.base, from_ids(mixed, np.arange(6) < np.array(LENGTHS)[:, None]), ANSWER, AGAINST, position=ROWS
    )
    found = uw.paths(lm, one, ["heads", "embed"], ["heads", "logits"], mlps, batch=2)["effect"].values
    assert set(np.unique(found[0][np.isfinite(found[0])])) == {0.0}
    assert np.nanmax(np.abs(found[1])) > 1e-3
    # What differs only behind the row that is read does nothing either.
    source = given.base.ids.copy()
    source[0, 5] += 1
    late = uw.pairs(from_ids(given.base.ids[:1]), from_ids(source[:1]), ANSWER[0], AGAINST[0], position=ROWS[0])
    found = uw.paths(lm, late, "heads", "heads", mlps)["effect"].values
    assert set(np.unique(found[np.isfinite(found)])) == {0.0}


@each_mode
def test_values_come_from_elsewhere_too(mlps: str) -> None:
    lm, given = model("llama"), pairs()
    found = uw.paths(lm, given, "L0H1", ["L2H0", "logits"], mlps, source="zero")["effect"]
    naive = Naive(lm, given, 1)
    naive.source = {**naive.source, "L0H1.z": torch.zeros_like(naive.source["L0H1.z"])}
    for receiver in ("L2H0", "logits"):
        want = naive.effect("L0H1", receiver, mlps)
        assert float(found.sel(pair=1, receiver=receiver)[0]) == pytest.approx(want, abs=1e-12)
    swapped = uw.paths(lm, given, "L0H1", "logits", mlps, source=lm)["effect"]
    np.testing.assert_array_equal(swapped, uw.paths(lm, given, "L0H1", "logits", mlps)["effect"])


def test_other_metrics_are_of_the_same_runs() -> None:
    lm, given = model("gpt2"), pairs()
    edges = "L0H1", ["L2H0", "logits"]
    own = uw.paths(lm, given, *edges, metric=lambda logits: logits[:, 7] - logits[:, 8])
    other = uw.pairs(given.base, given.source, 7, 8, position=ROWS)
    np.testing.assert_allclose(own["effect"], uw.paths(lm, other, *edges)["effect"], atol=1e-13)
    assert float(uw.paths(lm, given, *edges, metric="kl")["effect"].min()) > 0
    assert uw.paths(lm, given, *edges, metric="prob")["effect"].attrs["units"] == "prob"


def test_what_cannot_be_asked_is_refused() -> None:
    lm, given = model("neox parallel"), pairs()
    for senders, receivers in [("L1H0", "L0H1"), ("L1H0", "L1H0"), ("L1H0", "MLP1"), ("MLP2", ["L0H0", "MLP2"])]:
        with pytest.raises(NodeError, match="no such edge"):
            uw.paths(lm, given, senders, receivers)
    for senders, receivers, words in [
        ("L0H9", "logits", "no site L0H9"), ("L0H1.q", "logits", "cannot send"), ("logits", "logits", "not a site"),
        ("L0H1", "embed", "cannot receive"), ("L0H1", "L1.attn_out", "cannot receive"), ([], "logits", "two ends"),
        ("neurons", "logits", "no ends"), ("heads+MLP0", "logits", "several sites"), ("L0H1+L0H1", "logits", "twice"),
        ("L0.attn_out+L0H1", "logits", "twice"), ("L0H1", "L1H9.q", "no site"),
    ]:  # fmt: skip
        with pytest.raises(NodeError, match=words):
            uw.paths(lm, given, senders, receivers)
    with pytest.raises(NumericError, match="mlps is unknown"):
        uw.paths(lm, given, "L0H1", "logits", "freeze")
    with pytest.raises(NumericError, match="metric is unknown"):
        uw.paths(lm, given, "L0H1", "logits", metric="accuracy")
    with pytest.raises(TokensError, match="outside the vocabulary"):
        uw.paths(lm, uw.pairs(ids(0), ids(1), 10**6), "L0H1", "logits")


def test_a_family_that_hides_its_queries_says_so() -> None:
    hf = weights("falcon", 0, num_hidden_layers=2, num_attention_heads=2, alibi=False)
    hf.config._attn_implementation = "eager"
    lm = view(hf)
    with pytest.raises(NodeError, match="turned inside"):
        uw.paths(lm, pairs(), "L0H1", "L1H0.q")
    naive, found = Naive(lm, pairs(), 0), uw.paths(lm, pairs(), "L0H1", ["L1H0", "L1H0.v"])["effect"]
    for receiver in ("L1H0", "L1H0.v"):
        want = naive.effect("L0H1", receiver, "recompute")
        assert float(found.sel(pair=0, receiver=receiver)[0]) == pytest.approx(want, abs=1e-12)


def test_the_result_says_what_it_is(tmp_path: Path) -> None:
    lm, given = model("llama"), pairs()
    found = uw.paths(lm, given, ["L0H1", "MLP0"], ["L1H0.q", "MLP0", "logits"], "frozen")
    found.save(tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, found.data)
    table = again.table()
    places = [f"{end}_{part}" for end in ("sender", "receiver") for part in ("kind", "layer", "head")]
    assert list(table.columns) == ["pair", "sender", "receiver", "effect", *places]
    assert len(table) == 2 * 2 * 3
    assert found["effect"].attrs["units"] == "logit_diff"
    assert "x + Δ" in found["effect"].attrs["equation"]
    settings = found.provenance["settings"]
    assert settings["mlps"] == "frozen"
    assert settings["receivers"] == ["L1H0.q", "MLP0", "logits"]
    assert "hash" in found.provenance["tokens"][""]
    naive = Naive(lm, given, 0)
    assert float(found["base"][0]) == pytest.approx(naive.clean, abs=1e-12)
