"""Who reads a write, erases it, uses its space: planted steps, hooks by hand, linear models, nothing by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from test_paths import linear, pairs
from unwrite.errors import NodeError, NumericError
from unwrite.model.readers import weights
from unwrite.nodes import parse_node
from unwrite.report.views import listings, words
from unwrite.run.tally import reads
from unwrite.stats.reading import ENOUGH, read, reused

IDS = torch.randint(3, 50, (6, 7), generator=torch.Generator().manual_seed(0))
ALSO = [(), ("reader",), ("re-user",), ("reader", "re-user")]
_RNG = np.random.default_rng(0)
TEXTS = ["".join(map(chr, _RNG.integers(97, 123, 16))) for _ in range(6)]


def named(result: uw.Result) -> set[str]:
    """Who surely reads it, and through what."""
    data = result.data
    return {f"{data['node'].values[i]}.{data['way'].values[j]}" for i, j in np.argwhere(data["reads"].values)}


def nodes(result: uw.Result, which: str) -> set[str]:
    return {str(name) for name in result.data["node"].values[result.data[which].values]}


@pytest.mark.parametrize("also", ALSO, ids=" and ".join)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planted_steps_are_found_and_only_they(family: Any, also: tuple[str, ...]) -> None:
    weight = uw.planted(family, also=also)
    found = uw.readers(uw.load(weight.hf, weight.tokenizer), TEXTS, "L0H0")
    data = found.data
    assert named(found) == {"L1H0.v"} | ({"MLP0.all"} if "reader" in also else set())
    assert nodes(found, "erases") == {"L1H0"}
    assert data.attrs["verdict"] == "erased"
    assert nodes(found, "reuses") == ({"MLP2"} if "re-user" in also else set())
    assert data["gone"].sel(node=["MLP0", "L1H0", "MLP1", "MLP2"]).values.tolist() == [0, 0, 1, 1]
    steps = [data.attrs[step] for step in ("read", "erased", "reused")]
    assert steps == ["shown", "shown", "shown" if "re-user" in also else "not shown"]
    assert "L1H0.v 1.00" in words(found)
    assert [part.title for part in listings(found)] == ["who reads it", "who acts on it", "who writes into its space"]


def test_a_planted_writer_that_nobody_touches_is_read_by_nobody() -> None:
    weight = uw.planted("llama", also=("reader", "re-user"))
    found = uw.readers(uw.load(weight.hf, weight.tokenizer), TEXTS, "L0H5")
    assert (named(found), nodes(found, "erases"), nodes(found, "reuses")) == (set(), set(), set())
    assert "none reads it surely more than typical writes" in words(found)


# By hand: hooks of torch on modules of transformers, one layer at a time.


@contextmanager
def changed(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module puts out something else."""
    handle = module.register_forward_hook(lambda _, __, out: change(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seen(found: dict[str, Tensor], **modules: Any) -> Iterator[None]:
    """What modules put out; of "z" what goes in."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].clone()))
        if name == "z"
        else module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.clone()))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        [handle.remove() for handle in handles]


def by_hand(hf: Any, layer: int, write: Tensor, weight: Tensor) -> dict[str, np.ndarray]:
    """Of a Llama's heads: Σ‖·‖² of what each makes, by way, and of what each writes without the write that way."""
    block = hf.model.layers[layer]
    attention, heads = block.self_attn, hf.config.num_attention_heads
    modules = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "z": attention.o_proj}
    plain: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    with torch.no_grad(), seen(plain, **modules):
        hf(IDS)
    handle = block.register_forward_pre_hook(lambda _, args: (args[0] - write, *args[1:]))
    with torch.no_grad(), seen(other, **modules):
        hf(IDS)
    handle.remove()
    matrix = attention.o_proj.weight.unflatten(1, (heads, -1))

    def energy(z: Tensor) -> np.ndarray:
        vectors = torch.einsum("pthk,dhk->pthd", z.unflatten(2, (heads, -1)), matrix) * weight.sqrt()
        return vectors[:, 1:].square().sum((0, 1, 3)).detach().numpy()

    def own(part: Tensor) -> np.ndarray:
        each = part[:, 1:].unflatten(2, (-1, attention.head_dim)).square().sum((0, 1, 3)).numpy()
        return np.repeat(each, heads // len(each))

    found = {"written": energy(plain["z"]), "all": energy(other["z"] - plain["z"])}
    for way in "qkv":
        found[way], found[f"{way} made"] = own(other[way] - plain[way]), own(plain[way])
        alone: dict[str, Tensor] = {}
        with torch.no_grad(), changed(modules[way], lambda _, way=way: other[way]), seen(alone, z=modules["z"]):
            hf(IDS)
        found[f"{way} wrote"] = energy(alone["z"] - plain["z"])
    return found


@pytest.mark.promise("executed")
@pytest.mark.parametrize("writer", ["L0H1", "MLP1"])
def test_what_is_read_is_what_hooks_by_hand_say(writer: str) -> None:
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False}
    hf = tiny.model("llama", 0, **shape)
    lm = uw.load(hf)
    layer = 3
    data = uw.readers(lm, IDS, writer).data
    with uw.trace(lm, writer) as trace:
        lm.hf(IDS)
    write = trace[writer].clone()
    write[:, 0] = 0
    m = weights(lm, [parse_node(f"L{layer}H0")])[0]
    # Attention that shows its pattern has its softmax in float32, whatever the model's dtype.
    near = {"rtol": 1e-6, "atol": 1e-8}
    want = by_hand(hf, layer, write, m)
    heads = [f"L{layer}H{head}" for head in range(4)]
    here = data.sel(node=heads)
    np.testing.assert_allclose(here["wrote_all"], np.sqrt(want["all"] / want["written"]), **near)
    for way in "qkv":
        part = here.sel(way=way)
        np.testing.assert_allclose(part["read"], np.sqrt(want[way] / want[f"{way} made"]), **near)
        np.testing.assert_allclose(part["wrote"], np.sqrt(want[f"{way} wrote"] / want["written"]), **near)


def test_what_lies_before_a_write_does_not_read_it() -> None:
    data = uw.readers(uw.load(tiny.model("llama", 0)), IDS, "L1H0").data
    early = [str(name) for name in data["node"].values if int(parse_node(str(name)).layer) < 1]
    for name in ("wrote", "left"):
        assert data[name].sel(node=early).isnull().all()
    assert not data["reads"].sel(node=early).any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_asked(family: str) -> None:
    lm = uw.load(tiny.model(family, 0, **{"word_embed_proj_dim": None} if family == "opt" else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unwrite.methods.readers.DRAWS", 2)
        patch.setattr("unwrite.methods.readers.HELD_OUT", 1)
        data = uw.readers(lm, IDS[:3], "L0H1", erasers=["L1H0"]).data
    later = [str(node) for node in lm.parts if lm.can_read(node, parse_node("L0H1"))]
    several = [name for name in later if "H" in name]
    asked = data["wrote"].sel(node=several, way=["q", "k", "v"])
    assert np.isfinite(asked).all()
    # A change of a query is one of what it writes: all ways are read, none is another's.
    assert np.isfinite(data["wrote"].sel(node=[name for name in later if "H" not in name], way="all")).all()
    assert np.isfinite(data["freed"]).all()


def test_direct_edges_of_a_linear_model_add_up() -> None:
    data = uw.readers(linear(), pairs(), "L0H0").data
    assert abs(float(data["total"])) > 1e-6
    assert float(data["rest"]) == pytest.approx(0, abs=1e-9)
    assert float(np.nansum(data["effect"])) == pytest.approx(float(data["total"]), abs=1e-9)


def test_few_documents_say_nothing() -> None:
    found = uw.readers(uw.load(tiny.model("llama", 0)), IDS[:3], "L0H1")
    assert not found.data["reads"].any()
    assert {found.data.attrs[step] for step in ("read", "reused")} == {"undecided: too few documents"}


def test_a_write_of_an_mlp_has_no_space_of_its_own() -> None:
    found = uw.readers(uw.load(tiny.model("llama", 0)), IDS, "MLP0")
    assert "freed" not in found.data
    assert found.data.attrs["reused"].startswith("not measured")
    assert "its space: not measured" in words(found)


@pytest.mark.promise("statistics")
def test_typical_writes_and_random_models_are_read_no_more_often_than_stated() -> None:
    asked, called = np.zeros(2), np.zeros(2)
    found: dict[str, np.ndarray] = {}

    def kept(tally: Any, *args: Any) -> None:
        start(tally, *args)
        whole = tally.whole
        tally.whole = lambda: found.update(whole()) or dict(found)

    start = reads.ReadingTally.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads.ReadingTally, "__init__", kept)
        for seed in range(10):
            for family in ("gpt2", "llama"):
                lm = uw.load(tiny.model(family, seed))
                data = uw.readers(lm, IDS, "L0H0").data
                asked[0] += data.attrs["asked"]
                called[0] += int(data["reads"].sum())
                assert not data["reuses"].any()
                able = found["wrote"][:, 0].sum(0) > 0
                change, whole = found["wrote"][..., able], np.broadcast_to(
                    found["written"][..., None], found["made"].shape)[:, able]  # fmt: skip
                for put in range(1, change.shape[1]):
                    order = [put, *(i for i in range(1, change.shape[1]) if i != put)]
                    asked[1] += change.shape[-1]
                    called[1] += int(read(change[:, order], whole).surely.sum())
    assert called[0] <= 0.01 * asked[0]
    assert called[1] <= 0.01 * asked[1]


def test_rules_by_hand() -> None:
    # Six documents, one reader, four typical writes: a change of 0.5 beside 0.1, and one of 0.05 beside 0.01.
    change = np.ones((6, 5, 2)) * np.array([[0.25, 0.0025]] + [[0.01, 0.0001]] * 4)
    found = read(change, np.ones((6, 2)))
    np.testing.assert_allclose(found.found.value, [0.5, 0.05])
    np.testing.assert_allclose(found.typical, [0.1, 0.01])
    assert found.surely.tolist() == [bool(found.q[0] <= ENOUGH.q), False]
    # (1 + none of 8 decoys) / 8 · 2 writers / 1 = 0.25: so few draws cannot say it.
    assert found.q[0] == pytest.approx(0.25)
    use, held = np.full((6, 2), 0.5), np.zeros((6, 13, 2))
    held[:, 1:], held[:, 0, 1] = 0.5, 0.5
    again = reused(use, held, np.ones(6), np.zeros((6, 2)))
    np.testing.assert_allclose(again.found.value, [0.5, 0.0])
    assert again.surely.tolist() == [True, False]
    assert not reused(use[:4], held[:4], np.ones(4), np.zeros((4, 2))).surely.any()


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    lm = uw.load(tiny.model("llama", 0))
    with pytest.raises(NumericError, match=r"a metric is asked of pairs\. Got: metric='prob' of text"):
        uw.readers(lm, IDS, "L0H0", "prob")
    with pytest.raises(NodeError, match=r"L0H1 cannot read L1H0\. Expected: nodes after it"):
        uw.readers(lm, IDS, "L1H0", erasers=["L0H1"])
    with pytest.raises(NodeError):
        uw.readers(lm, IDS, "L9H0")


@pytest.mark.real
def test_inhibition_of_smollm2_is_read_by_queries_of_the_movers(real: Any) -> None:
    lm = uw.load(real / "smollm2-135m")
    data = uw.readers(lm, uw.tasks.ioi(16, lm.tokenizer, bos=False), "L20H0").data
    order = data["reader"].values[np.argsort(data["effect"].values)]
    assert set(order[:4]) == {"L23H0.q", "L23H7.q", "L23H2.q", "L23H1.q"}
    assert abs(float(data["rest"])) < 0.1 * abs(float(data["total"]))
