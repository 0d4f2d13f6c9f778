"""Are singular channels those of the weights, are they read as scored, and is a run's edit a change of weights?"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import tiny
import unwrite as uw
from executed import exact, weights
from methods import IDS, PAIRS
from test_tracking import PLANTED, by_hand
from unwrite.errors import NodeError, NumericError, ResultError
from unwrite.model.channels import compared
from unwrite.model.load import view
from unwrite.model.queries import turned
from unwrite.model.view import Model
from unwrite.report.views import listings, words

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
OFFSET, HEAD = 3, "L1H1"
POST_NORM = ("gemma2", "gemma3_text", "olmo2")


@cache
def model(family: str) -> Model:
    """As weights write: with constants in heads, and not centred. No bias, so that all that is seen is bilinear."""
    hf = weights(family, 1, num_attention_heads=2, vocab_size=50)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return view(hf, convention="raw")


@cache
def biased(family: str) -> Model:
    """As it is: what biases put into z is a part of it."""
    return view(weights(family, 2, num_attention_heads=2, vocab_size=50))


@cache
def found(family: str) -> uw.Result:
    return uw.channels(model(family), offset=OFFSET)


def logits(lm: Model, edits: Any = ()) -> Tensor:
    with torch.no_grad(), uw.trace(lm, edits=edits):
        return lm.hf(IDS).logits


@every_family
def test_a_heads_write_is_the_sum_of_its_channels(family: str) -> None:
    lm, one = model(family), found(family).data.sel(writer=HEAD)
    with exact(), torch.no_grad(), uw.trace(lm, HEAD, f"{HEAD}.z") as run:
        lm.hf(IDS)
    read, write = (torch.from_numpy(one[name].values) for name in ("z_read", "write"))
    summed = run[f"{HEAD}.z"] @ read.mT @ write
    scale = (run[HEAD] * summed).sum(-1) / summed.square().sum(-1)  # 1 but for that of a post-norm
    if lm.layers[1].post_attention_norm is None:
        scale = torch.ones_like(scale)
    torch.testing.assert_close(scale[..., None] * summed, run[HEAD], rtol=0, atol=1e-12)
    assert one["singular"].values.min() > 1e-6


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in POST_NORM])
def test_what_biases_put_into_a_head_is_no_part_of_its_node_nor_of_what_channels_move(family: str) -> None:
    """Of a model as it is, under the paper's convention: between two prompts all that changes is in the channels."""
    lm, z = biased(family), f"{HEAD}.z"
    one = uw.channels(lm, HEAD, HEAD, "v").data.sel(writer=HEAD)
    read, write = (torch.from_numpy(one[name].values) for name in ("z_read", "write"))
    with exact(), torch.no_grad(), uw.trace(lm, HEAD, z) as run:
        lm.hf(IDS)
    changed = [run[site][1:] - run[site][:1] for site in (z, HEAD)]
    torch.testing.assert_close(changed[0] @ read.mT @ write, changed[1], rtol=0, atol=1e-12)
    constant = run[z] @ read.mT @ write - run[HEAD]
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=0, atol=1e-12)


@every_family
def test_channels_are_unit_vectors_that_do_not_meet_and_biorthogonal_in_z(family: str) -> None:
    one = found(family).data.sel(writer=HEAD)
    for name in ("read", "write"):
        np.testing.assert_allclose(one[name].values @ one[name].values.T, np.eye(one.sizes["channel"]), atol=1e-12)
    dual = one["z_read"].values @ one["z_write"].values.T
    np.testing.assert_allclose(dual, np.eye(len(dual)), atol=1e-8)


@every_family
def test_queries_and_keys_are_compared_as_the_model_compares_them(family: str) -> None:
    """Of what the layer reads, in the direction of what its attention is given; norms' scales are left out."""
    lm = model(family)
    layer = lm.layers[1]
    with exact(), torch.no_grad():
        both = compared(lm, layer, turned(lm, [layer], OFFSET)[1])
        with uw.trace(lm, str(layer.reads), f"{HEAD}.q", f"{HEAD}.k") as run:
            lm.hf(IDS)
    stream = run[str(layer.reads)]
    for row, part, site in ((OFFSET, both[0], "q"), (0, both[1], "k")):
        made, seen = stream[:, row] @ part[1], run[f"{HEAD}.{site}"][:, row]
        cosine = torch.nn.functional.cosine_similarity(made, seen, dim=-1)
        torch.testing.assert_close(cosine, torch.ones(len(IDS), dtype=torch.float64), rtol=0, atol=1e-9)


@every_family
@pytest.mark.parametrize("factor", [0.0, -1.0, 2.5])
def test_a_channel_edited_in_a_run_is_its_weights_changed(family: str, factor: float) -> None:
    lm, before = biased(family), tiny.snapshot(biased(family).hf)["state"]
    made = uw.channels(lm, HEAD, HEAD, "v")
    edit = uw.Edit.channel(made, HEAD, 0, factor)
    run, clean = logits(lm, edit), logits(lm)
    with uw.rewritten(lm, edit):
        changed = logits(lm)
        assert tiny.snapshot(lm.hf)["state"] != before
    assert float((run - changed).abs().max()) <= 1e-12 * float(run.abs().max())
    assert float((run - clean).abs().max()) > 1e-7
    assert tiny.snapshot(lm.hf)["state"] == before
    assert torch.equal(logits(lm, uw.Edit.channel(made, HEAD, 0, 1.0)), clean)


def test_all_channels_removed_is_a_head_without_its_z() -> None:
    lm, every = model("gemma3_text"), range(found("gemma3_text").data.sizes["channel"])
    gone = logits(lm, uw.Edit.channel(found("gemma3_text"), HEAD, every))
    torch.testing.assert_close(gone, logits(lm, uw.Edit.set(f"{HEAD}.z", 0.0)), rtol=0, atol=1e-12)


# --- scores against products that are made whole ----------------------------------------------------------------------


def rotation(width: int, offset: int, theta: float) -> np.ndarray:
    """How rotary positions turn a row, as Su et al. 2021 have it, in the halves of Llama."""
    angle = offset / theta ** (np.arange(0, width, 2) / width)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return np.block([[cos, sin], [-sin, cos]])


def composition(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_scores_are_those_of_whole_products_by_hand(family: str) -> None:
    """Gains folded, keys and values shared by a group, rotary positions at an offset, norms of queries and keys."""
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8}
    hf = weights(family, 0, num_hidden_layers=2, attention_bias=False, **settings)
    made = uw.channels(view(hf), offset=OFFSET).data
    numbers, one = {name: part.double().numpy() for name, part in hf.state_dict().items()}, float(family == "gemma")

    def whole(layer: int, name: str, head: int) -> np.ndarray:
        """[d_model, d_head] of a head of its own, from the stream."""
        gain = numbers[f"model.layers.{layer}.input_layernorm.weight"] + one
        head = head if name == "q" else head // 2
        return (
            gain[:, None] * numbers[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T[:, 8 * head : 8 * head + 8]
        )

    def ov(layer: int, head: int) -> np.ndarray:
        out = numbers[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        return whole(layer, "v", head) @ out[8 * head : 8 * head + 8]

    def qk(head: int) -> np.ndarray:
        query, key = (
            whole(1, name, head) * numbers.get(f"model.layers.1.self_attn.{name}_norm.weight", 1.0) for name in "qk"
        )
        return query @ rotation(8, OFFSET, hf.config.rope_parameters["rope_theta"]) @ key.T

    for writer in range(4):
        left, singular, right = np.linalg.svd(ov(0, writer))
        sent = made.sel(writer=f"L0H{writer}")
        np.testing.assert_allclose(sent["singular"], singular[:8], rtol=1e-9)
        np.testing.assert_allclose(np.abs((sent["write"].values * right[:8]).sum(1)), 1, atol=1e-7)
        np.testing.assert_allclose(np.abs((sent["read"].values * left[:, :8].T).sum(1)), 1, atol=1e-7)
        for reader in range(4):
            sides = {"q": qk(reader), "k": qk(reader).T, "v": ov(1, reader)}
            for side, matrix in sides.items():
                got = sent.sel(reader=f"L1H{reader}", side=side)
                assert float(got["whole"]) == pytest.approx(composition(ov(0, writer), matrix), abs=1e-6)
                by_hand = [composition(row[None], matrix) for row in right[:8]]
                np.testing.assert_allclose(got["score"], by_hand, atol=1e-6)
                assert float(got["best"]) == pytest.approx(max(by_hand), abs=1e-6)
                assert int(got["best_channel"]) == int(np.argmax(by_hand))
    ranks = made["best"].sel(reader="L1H2", side="q").to_series().rank(ascending=False)
    assert made["rank"].sel(reader="L1H2", side="q").to_series().dropna().astype(int).equals(ranks.dropna().astype(int))
    # A group's heads share their keys and values, and so what they read by them.
    for side in "kv":
        pairs = [made["kernel"].sel(reader=f"L1H{i}", side=side).values for i in range(4)]
        np.testing.assert_allclose(pairs[0], pairs[1], atol=1e-12)
        assert np.nanmax(np.abs(pairs[1] - pairs[2])) > 1e-3
    assert made["score"].sel(reader=["L0H0", "L0H3"]).isnull().all()  # nobody writes before the first layer


@cache
def planted() -> Model:
    """Width 64, heads of 8: L1H0's queries read one direction, what the third channel of L0H0 writes. Else chance."""
    hf = weights("llama", 2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, hidden_size=64,
                 head_dim=8, attention_bias=False)  # fmt: skip
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
        third = uw.channels(view(hf)).data["write"].sel(writer="L0H0").values[2]
        hf.model.layers[1].self_attn.q_proj.weight[:8] = torch.randn(8, 1) * torch.from_numpy(third)
    return view(hf)


def test_a_planted_channel_is_the_one_that_is_read() -> None:
    made = uw.channels(planted())
    score = made["score"].sel(writer="L0H0", reader="L1H0", side="q").values
    np.testing.assert_allclose(score, np.eye(8)[2], atol=1e-12)
    assert int(made["best_channel"].sel(writer="L0H0", reader="L1H0", side="q")) == 2
    assert int(made["rank"].sel(writer="L0H0", reader="L1H0", side="q")) == 1
    singular = made["singular"].sel(writer="L0H0").values
    head = float(made["whole"].sel(writer="L0H0", reader="L1H0", side="q"))
    assert head == pytest.approx(singular[2] / np.linalg.norm(singular), abs=1e-12)
    assert "L0H0 channel 2 → L1H0.q 1.00" in words(made)
    assert listings(made)[0].rows[0][:4] == ("L0H0", "2", "L1H0.q", "1.00")


def test_scores_do_not_hang_on_how_a_head_is_written_down() -> None:
    """W_V G G⁻¹ W_O is the same head, and so is W_Q G (W_K G⁻ᵀ)ᵀ where nothing turns them."""
    lm, generator = planted(), torch.Generator().manual_seed(1)
    before = uw.channels(lm).data
    turn = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    back, first, second = torch.linalg.inv(turn), lm.hf.model.layers[0].self_attn, lm.hf.model.layers[1].self_attn
    with torch.no_grad():
        for weight, by in ((first.v_proj.weight, turn.T), (first.o_proj.weight.T, back), (second.q_proj.weight, turn.T),
                           (second.k_proj.weight, back)):  # fmt: skip
            weight[:8] = by @ weight[:8]
    after = uw.channels(lm).data
    with torch.no_grad():
        for weight, by in ((first.v_proj.weight, back.T), (first.o_proj.weight.T, turn), (second.q_proj.weight, back.T),
                           (second.k_proj.weight, turn)):  # fmt: skip
            weight[:8] = by @ weight[:8]
    for name in ("singular", "score", "whole", "kernel"):
        np.testing.assert_allclose(after[name], before[name], atol=1e-9)


def test_random_directions_and_random_heads_are_read_alike() -> None:
    """About 1/√d where a reader reads all directions alike; where it reads one, most random ones are hardly read."""
    made = uw.channels(planted()).data
    chance = made.sel(reader="L1H1", side="q")
    others = chance["score"].values[np.isfinite(chance["score"].values)]
    assert float(chance["generic"].sel(quantile=0.5)) == pytest.approx(np.median(others), abs=0.02)
    assert float(chance["generic"].sel(quantile=0.5)) == pytest.approx(1 / 8, abs=0.02)
    assert float(chance["generic_best"].sel(quantile=0.5)) > float(chance["generic"].sel(quantile=0.5))
    one = made.sel(reader="L1H0", side="q")["generic"]
    assert float(one.sel(quantile=0.5)) < 0.1 < float(one.sel(quantile=0.95))


# --- beside runs ------------------------------------------------------------------------------------------------------


def test_executed_edges_stand_beside_what_weights_score() -> None:
    lm = view(weights("llama", 4, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2))
    paths = uw.paths(lm, PAIRS, "heads", ["L1H0.q", "L2H1.q", "L2H1.v", "logits"], "frozen")
    made = uw.channels(lm, sides="vq", executed=paths)
    assert [*made.data["side"].values] == ["q", "v"]
    effect, best = made["effect"], made["best"]
    want = paths["effect"].mean("pair").sel(sender="L0H1", receiver="L2H1.v")
    assert float(effect.sel(writer="L0H1", reader="L2H1", side="v")) == pytest.approx(float(want))
    assert effect.attrs["units"] == paths["effect"].attrs["units"]
    assert int(effect.notnull().sum()) == made.data.attrs["edges"] == 2 + 4 + 4
    there = effect.notnull().values
    rho = spearmanr(best.values[there], np.abs(effect.values[there])).statistic
    assert made.data.attrs["agreement"] == pytest.approx(rho)
    of_one = spearmanr(best.sel(reader="L2H1", side="q")[:4], np.abs(effect.sel(reader="L2H1", side="q")[:4])).statistic
    assert float(made["agreement"].sel(reader="L2H1", side="q")) == pytest.approx(of_one)
    assert np.isnan(made["agreement"].sel(reader="L1H0", side="q"))  # two writers have no order to speak of
    assert "10 edges" in words(made)


def test_what_is_no_channel_is_refused() -> None:
    lm, other = model("llama"), view(weights("llama", 5))
    for wrong, error, said in (
        ({"writers": "L9H0"}, NodeError, "no node L9H0"),
        ({"readers": ["MLP0"]}, NodeError, "readers are heads of attention"),
        ({"sides": "qx"}, NumericError, "some of 'qkv'"),
        ({"offset": -1}, NumericError, "offset"),
        ({"executed": uw.paths(other, PAIRS, "heads", "q", "frozen")}, ResultError, "another model"),
        ({"executed": uw.paths(lm, PAIRS, "heads", "logits")}, ResultError, "none of these edges"),
        ({"executed": found("llama")}, ResultError, "no result of uw.paths"),
    ):
        with pytest.raises(error, match=said):
            uw.channels(lm, **wrong)


@pytest.mark.parametrize(
    ("kind", "sides", "said"),
    [
        ("deepseek_v3", "q", "made in two steps"),
        ("codegen", "q", "another order"),
        ("qwen3_next", "v", "moves with the prompt"),
        ("mamba", "v", "heads"),
    ],
)
def test_a_family_without_such_a_matrix_is_refused_with_the_reason(kind: str, sides: str, said: str) -> None:
    import every

    lm = view(every.model(kind))
    with pytest.raises(NodeError, match=said):
        uw.channels(lm, sides=sides)


def test_channels_that_are_one_subspace_go_together() -> None:
    hf = weights(
        "llama", 3, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=32, head_dim=4
    )
    with torch.no_grad():
        attention = hf.model.layers[0].self_attn
        hf.model.layers[0].input_layernorm.weight.fill_(1.0)
        for part in (attention.v_proj.weight, attention.o_proj.weight.T):
            part[:4] = torch.linalg.qr(torch.randn(32, 4, dtype=torch.float64)).Q.T
    lm = view(hf)
    made = uw.channels(lm)
    assert made["block"].sel(writer="L0H0").values.tolist() == [0, 0, 0, 0]
    assert len(set(made["block"].sel(writer="L0H1").values)) > 1
    with pytest.raises(NodeError, match=r"channels 0, 1, 2, 3|\[0, 1, 2, 3\]"):
        uw.Edit.channel(made, "L0H0", 1)
    torch.testing.assert_close(
        logits(lm, uw.Edit.channel(made, "L0H0", range(4))), logits(lm, uw.Edit.set("L0H0.z", 0.0)), rtol=0, atol=1e-12
    )
    for wrong in (9, [0, 0], [], True):
        with pytest.raises(NodeError, match="no such channels"):
            uw.Edit.channel(made, "L0H1", wrong)


def test_a_saved_result_says_the_same(tmp_path: Any) -> None:
    made = found("llama")
    again = uw.read(made.save(tmp_path))
    assert words(again) == words(made)
    assert made.table().shape[0] == made.data.sizes["writer"] * made.data.sizes["reader"] * 3


# --- models that were trained -----------------------------------------------------------------------------------------


def test_the_chain_of_a_model_made_by_hand_is_read_from_its_weights() -> None:
    """D hands to C by its values, C to B by its values, and B says by the queries of A where to look."""
    made = uw.channels(by_hand()).data
    for writer, reader, side in (("D", "C", "v"), ("C", "B", "v"), ("B", "A", "q")):
        one = made.sel(reader=PLANTED[reader], side=side)
        assert one["rank"].sel(writer=PLANTED[writer]) == 1
        # It reads four directions alike, and each channel writes one of them.
        assert float(one["best"].sel(writer=PLANTED[writer])) == pytest.approx(0.5, abs=0.03)
        assert float(one["generic_best"].sel(quantile=0.99)) < 0.3
        others = one["best"].to_series().dropna().drop(PLANTED[writer])
        assert (others < 0.1).all()


@pytest.mark.real
def test_induction_heads_read_previous_token_heads_by_their_keys(real: Any) -> None:
    """SmolLM2: patterns name the heads, and then weights alone the edges between them."""
    lm = uw.load(real / "smollm2-135m", dtype="float32")
    made = uw.channels(lm, readers=["L17H4", "L18H6", "L20H6", "L23H2"], sides="qk", offset=19).data
    for writer, reader in (("L16H0", "L17H4"), ("L16H0", "L18H6"), ("L19H3", "L20H6"), ("L22H1", "L23H2")):
        one = made.sel(writer=writer, reader=reader)
        assert int(one["rank"].sel(side="k")) == 1 < int(one["rank"].sel(side="q"))
        assert float(one["best"].sel(side="k")) > 2 * made["generic_best"].sel(quantile=0.99, reader=reader, side="k")


@pytest.mark.real
def test_one_channel_of_a_real_head_turns_the_heads_that_it_inhibits(real: Any) -> None:
    """SmolLM2: without channel 0 of L20H0 the mover L23H0 looks less at the name to be said, reversed at the other."""
    lm = uw.load(real / "smollm2-135m", dtype="float32")
    pairs = uw.tasks.ioi(12, lm.tokenizer, 4, bos=False)
    made = uw.channels(lm, readers="L23H0", sides="q", offset=10)
    assert int(made["best_channel"].sel(writer="L20H0", reader="L23H0", side="q")) == 0
    assert int(made["rank"].sel(writer="L20H0", reader="L23H0", side="q")) <= 3

    def turned(*edits: uw.Edit) -> float:
        ids, pair = torch.from_numpy(pairs.base.ids), torch.arange(len(pairs))
        with torch.no_grad(), uw.trace(lm, "L23H0.pattern", edits=edits) as run:
            lm.decoder(ids)
        row, *places = (torch.from_numpy(part) for part in (pairs.row, pairs.roles["IO"], pairs.roles["S1"]))
        wanted, other = (run["L23H0.pattern"][pair, row, place].mean() for place in places)
        return float(wanted - other)

    rows = torch.from_numpy(pairs.row)
    plain, gone = turned(), turned(uw.Edit.set("L20H0", 0.0, at=rows))
    less, reversed_, other = (
        turned(uw.Edit.channel(made, "L20H0", channel, factor, at=rows))
        for channel, factor in ((0, 0), (0, -1), (1, 0))
    )
    assert plain - less > 0.6 * (plain - gone) > 0.05
    assert reversed_ < 0 < less
    assert abs(plain - other) < 0.3 * (plain - less)
    ids = torch.from_numpy(pairs.base.ids)
    edit = uw.Edit.channel(made, "L20H0", 0)
    with torch.no_grad():
        with uw.trace(lm, edits=edit):
            run = lm.hf(ids).logits
        with uw.rewritten(lm, edit):
            changed = lm.hf(ids).logits
        clean = lm.hf(ids).logits
    assert float((run - changed).abs().max()) < 1e-3 < 0.1 < float((run - clean).abs().max())
