"""Do heads, MLPs, states of the stream and patches agree with TransformerLens on the same model, raw weights?"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from unwrite.model import capture
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.model.writes import expand
from unwrite.nodes import parse_location
from unwrite.run.answer.metrics import metric_of
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edge_circuits import edge_table, kept_edges
from unwrite.run.source.values import donor

# The other library's import and its own deprecations are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore")

# What TransformerLens 4.3 shows otherwise, by family, is not compared: GPT-2 ignores the two settings pinned here;
# gpt_neo, gptj and opt have no result per head; heads of gemma2, gemma3_text and olmo2 are taken before the norm that
# follows; bloom's attention and block outputs are not what is added to the stream; falcon splits fused values wrongly.
SETTINGS = {"gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}}
SETTINGS |= {"opt": {"do_layer_norm_before": True, "word_embed_proj_dim": None}}
NO_HEADS = ("gpt_neo", "gptj", "opt", "gemma2", "gemma3_text", "olmo2")
LEFT_OUT = ("bloom", "falcon")


# What a patch replaces, in the order of TransformerLens's stacked results.
OF_HEADS = ("heads", "q", "k", "v")
OF_BLOCKS = (["resid_pre0", "resid_post0"], ["L0.attn_out", "L1.attn_out"], ["MLP0", "MLP1"])


class Both(NamedTuple):
    """One model's writes and states by this library, and a cache of the other's."""

    lm: Model
    writes: dict[str, Tensor]
    states: dict[str, Tensor]
    cache: Any


def bridged(hf: Any) -> Any:
    """The same model as the other library sees it, which rebuilds what it is given."""
    sources = pytest.importorskip("transformer_lens.model_bridge.sources")
    return sources.build_bridge_from_module(copy.deepcopy(hf), type(hf).__name__, hf_config=hf.config)


def both(family: str, seed: int) -> Both:
    hf = tiny.model(family, seed, attn_implementation="eager", **SETTINGS.get(family, {}))
    lm = view(hf, convention="raw")
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(seed))
    folded = fold(lm)
    rows = capture.run(lm, ids, folded).map(lambda part: part.flatten(0, 1))
    nodes = expand(lm, folded, rows).unflatten(1, ids.shape)
    states = torch.einsum("ln,nptd->lptd", lm.holds().to(nodes), nodes)
    bridge = bridged(hf)
    if family not in NO_HEADS:
        bridge.set_use_attn_result(True)
    with torch.no_grad():
        cache = bridge.run_with_cache(ids)[1]
    return Both(lm, dict(zip(lm.nodes, nodes, strict=True)), dict(zip(lm.locations, states, strict=True)), cache)


def close(got: Tensor, want: Tensor) -> None:
    # Several families compute norms and the softmax in float32, whatever the weights are.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.promise("others")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in LEFT_OUT])
def test_transformer_lens_sees_the_same_writes_and_states(family: str, seed: int) -> None:
    lm, writes, states, cache = both(family, seed)
    for name in ("embed", "pos_embed"):
        if name in writes:
            close(cache[f"hook_{name}"], writes[name])
    for layer in range(len(lm.layers)):
        heads = torch.stack([writes[f"L{layer}H{head}"] for head in range(lm.n_heads)], 2)
        close(cache[f"blocks.{layer}.hook_attn_out"], heads.sum(2) + writes.get(f"L{layer}.bias", 0))
        close(cache[f"blocks.{layer}.hook_mlp_out"], writes[f"MLP{layer}"])
        if family not in NO_HEADS:
            close(cache[f"blocks.{layer}.attn.hook_result"], heads)
    for name, state in states.items():
        location = parse_location(name)
        close(cache[f"blocks.{location.layer}.hook_resid_{location.state}"], state)


@pytest.mark.promise("others")
def test_transformer_lens_has_the_same_lenses() -> None:
    hf = tiny.model("gpt2", 0, attn_implementation="eager", **SETTINGS["gpt2"])
    lm, bridge = view(hf), bridged(hf)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
        states = [f"blocks.{layer}.hook_resid_{part}" for layer in range(len(lm.layers)) for part in ("mid", "post")]
        streams = torch.stack([cache["blocks.0.hook_resid_pre"], *(cache[name] for name in states)])
        norm = hf.transformer.ln_f
        centred = streams - streams.mean(-1, keepdim=True)
        held = centred / cache["ln_final.hook_scale"] * norm.weight + norm.bias
        want = {"logit": bridge.unembed(bridge.ln_final(streams)), "frozen": bridge.unembed(held)}
    for kind, of_kind in want.items():
        torch.testing.assert_close(of_kind[-1], logits)
        found = uw.lens(lm, ids, kind, top=lm.vocabulary)
        got = np.take_along_axis(found["logit"].values, found["id"].values.argsort(-1), -1)
        np.testing.assert_allclose(got, of_kind.transpose(0, 1), rtol=0, atol=2e-6 * float(of_kind.abs().max()))


class Patched(NamedTuple):
    """One pair of prompts, and how the other library asks what the base run says."""

    lm: Model
    bridge: Any
    pairs: Any
    base: Tensor
    source: Tensor

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 9]

    def effects(self, nodes: Any, method: str) -> Any:
        return uw.effects(self.lm, self.pairs, nodes, method=method)["effect"].squeeze("pair")


def patched() -> Patched:
    hf = tiny.model("gpt2", 1, attn_implementation="eager", num_hidden_layers=2, **SETTINGS["gpt2"])
    base = torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(1))
    source = torch.where(torch.arange(6) % 3 == 1, 3 + (base + 7) % 40, base)
    return Patched(view(hf), bridged(hf), uw.pairs(base, source, 5, 9), base, source)


@pytest.mark.promise("others")
def test_transformer_lens_guesses_the_same_by_the_slope() -> None:
    one = patched()
    analysis = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    scores = analysis.attribution_patch(one.bridge, one.source, one.base, one.metric).node_scores
    heads = [name for name in one.lm.nodes if "H" in name]
    found = one.effects(["embed", *heads, "MLP0", "MLP1"], "atp")
    names = {"embed": "embed", "attn_head_out": "L{0}H{1}", "mlp_out": "MLP{0}"}
    theirs = {(names[n.kind].format(n.layer, n.head), n.position): score for n, score in scores.items()}
    assert len(theirs) == found.size
    ours = [float(found.sel(node=name, position=position)) for name, position in theirs]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(list(theirs.values())), rtol=0, atol=1e-6)


@pytest.mark.promise("others")
def test_transformer_lens_patches_the_same() -> None:
    one = patched()
    patching = pytest.importorskip("transformer_lens.patching")
    with torch.no_grad():
        cache = one.bridge.run_with_cache(one.source)[1]
        heads = patching.get_act_patch_attn_head_by_pos_every(one.bridge, one.base, cache, one.metric)
        blocks = patching.get_act_patch_block_every(one.bridge, one.base, cache, one.metric)
        clean = one.metric(one.bridge(one.base)).float()
    for kind, theirs in zip(OF_HEADS, heads, strict=False):
        ours = one.effects(kind, "exact").values.reshape(2, one.lm.n_heads, 6)
        close(theirs.transpose(1, 2) - clean, torch.from_numpy(ours).float())
    for nodes, theirs in zip(OF_BLOCKS, blocks, strict=True):
        close(theirs - clean, torch.from_numpy(one.effects(nodes, "exact").sel(node=nodes).values).float())


def edge_of(writer: Any, reader: Any) -> tuple[str, str]:
    """What the other library's edge is called here."""
    sender = {"embed": "embed", "attn_head_out": "L{0}H{1}", "mlp_out": "MLP{0}"}[writer.kind]
    part = reader.kind.removesuffix("_input")
    receiver = {"mlp_in": "MLP{0}", "logits": "logits"}.get(reader.kind, f"L{{0}}H{{1}}.{part}")
    return sender.format(writer.layer, writer.head), receiver.format(reader.layer, reader.head)


@pytest.mark.promise("others")
def test_transformer_lens_scores_edges_the_same() -> None:
    one = patched()
    analysis = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    asked = analysis.EdgeAttributionConfig(granularity="edge")
    scores = analysis.attribution_patch(one.bridge, one.source, one.base, one.metric, asked).edge_scores
    found = uw.paths(one.lm, one.pairs, "all", "all", method="eap")["effect"][0]
    theirs = dict.fromkeys((edge_of(*edge) for edge in scores), 0.0)
    for edge, score in scores.items():  # theirs are of each position
        theirs[edge_of(*edge)] += score
    assert len(theirs) == int(found.notnull().sum())
    ours = [float(found.sel(sender=sender, receiver=receiver)) for sender, receiver in theirs]
    np.testing.assert_allclose(ours, [*theirs.values()], rtol=0, atol=1e-6)
    assert max(map(abs, ours)) > 1e-2


@pytest.mark.promise("others")
def test_transformer_lens_finds_the_same_of_a_circuit_of_edges() -> None:
    one = patched()
    analysis = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    table = edge_table(one.lm)
    drawn = torch.rand(table.joins.shape, generator=torch.Generator().manual_seed(2))
    kept = torch.from_numpy(table.joins) & (drawn < 0.7)
    asked = analysis.EdgeAttributionConfig(granularity="edge")
    senders, receivers = [*table.senders], [*table.receivers]
    circuit = [
        edge for edge in analysis.attribution_patch(one.bridge, one.source, one.base, one.metric, asked).edge_scores
        if kept[senders.index(edge_of(*edge)[0]), receivers.index(edge_of(*edge)[1])]
    ]  # fmt: skip
    theirs = analysis.faithfulness(one.bridge, one.base, one.source, one.metric, circuit)
    base = base_of(one.lm, one.pairs, slice(0, 1), table.sent)
    final = kept_edges(base, donor(one.lm, one.pairs, table.sent, "source").values(slice(0, 1)), table, kept)
    ours = float(metric_of(one.lm, one.pairs, "logit_diff", slice(0, 1))(final).detach())
    recovered = (ours - theirs.corrupt_metric) / (theirs.full_metric - theirs.corrupt_metric)
    assert recovered == pytest.approx(theirs.recovered, abs=1e-5)
    assert min(abs(recovered), abs(recovered - 1)) > 1e-3
