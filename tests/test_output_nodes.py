"""Are the output nodes of a task with choices the planted ones, and are their numbers those of plain arithmetic?

Oracles of systems.md §4.6: a centred logit is linear, the last MLP's total effect is its direct one, labels that rise
together change nothing, what a pattern cannot see changes nothing, a planted subspace of queries is found.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

import unwrite as uw
from executed import weights
from test_cli import run
from test_tracking import HEAD, by_hand, plain, toy
from unwrite.errors import NumericError, TokensError
from unwrite.model.load import view
from unwrite.report.views import listings, words
from unwrite.studies.categories import category
from unwrite.studies.output_nodes import output_nodes

IDS = torch.randint(3, 50, (6, 7), generator=torch.Generator().manual_seed(1))
OPTIONS = [3, 7, 9, 11]
ANSWER = [3, 7, 9, 11, 3, 7]


@cache
def model(kind: str = "gpt2") -> Any:
    return view(weights(kind, 1, torch.float64))


def contrasts() -> uw.Pairs:
    other = torch.randint(3, 50, IDS.shape, generator=torch.Generator().manual_seed(2))
    return uw.pairs(IDS, other, ANSWER, [7, 9, 11, 3, 7, 9], choices=OPTIONS)


def logits_of(lm: Any, ids: Tensor = IDS) -> np.ndarray:
    with torch.no_grad():
        return lm.hf(input_ids=ids, use_cache=False).logits[:, -1].numpy()


def centred(logits: np.ndarray, answer: Any, options: Any) -> np.ndarray:
    return logits[np.arange(len(logits)), answer] - logits[:, options].mean(1)


def loss(logits: np.ndarray, answer: Any, options: Any) -> np.ndarray:
    return np.log(np.exp(logits[:, options]).sum(1)) - logits[np.arange(len(logits)), answer]


# --- centred logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_against_several_every_reading_is_the_mean_of_those_against_each(kind: str) -> None:
    """All are linear in what is asked; a soft-cap (gemma2) alone is not, and is the model's own."""
    lm, shape = model(kind), (len(IDS), 1)
    whole = uw.dla(lm, IDS, [3] * 6, np.tile([7, 9, 11], shape))
    each = [uw.dla(lm, IDS, [3] * 6, one) for one in (7, 9, 11)]
    for name in ("direct", "net", "relp", "gradient", "total", "logit_diff", "constant"):
        want = np.mean([one[name].values for one in each], 0)
        np.testing.assert_allclose(whole[name].values, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole["unexplained"].values, 0, atol=1e-6)
    logits = logits_of(lm)
    np.testing.assert_allclose(whole["capped"].values, logits[:, 3] - logits[:, [7, 9, 11]].mean(1), atol=1e-6)
    assert whole.data["against_id"].dims == ("prompt", "option")
    assert str(whole["against"].values[0]).startswith("mean of ")


@pytest.mark.promise("executed")
def test_a_centred_effect_is_that_of_the_logits_and_a_slope_that_of_a_direct_one() -> None:
    lm, pairs = model(), contrasts()
    found = uw.effects(lm, pairs, ["MLP1", "L0H1"], "end", "exact", "centred")
    np.testing.assert_allclose(found["base"].values, centred(logits_of(lm), ANSWER, OPTIONS), atol=1e-10)
    with uw.trace(lm, "MLP1") as source:
        logits_of(lm, torch.from_numpy(pairs.source.ids))
    with uw.trace(lm, edits=[uw.Edit.set("MLP1", source["MLP1"][:, -1], at=-1)]):
        patched = centred(logits_of(lm), ANSWER, OPTIONS)
    np.testing.assert_allclose(found["effect"].sel(node="MLP1").values, patched - found["base"].values, atol=1e-10)
    direct = uw.effects(lm, pairs, ["MLP0", "MLP1"], "end", "direct", "centred", "zero")
    dla = uw.dla(lm, IDS, ANSWER, pairs.choices, total=False)
    for node in ("MLP0", "MLP1"):
        want = dla["direct"].sel(node=node).values
        np.testing.assert_allclose(-direct["effect"].sel(node=node).values, want, atol=1e-6)


def test_what_raises_all_choices_alike_is_neither_in_a_centred_logit_nor_in_the_loss_over_them() -> None:
    pairs, found = contrasts(), []
    for shift in (0.0, 1.0):
        hf = weights("gpt2", 1, torch.float64, tie_word_embeddings=False)
        more = torch.randn(hf.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        hf.lm_head.weight.data[OPTIONS] += shift * more
        lm = view(hf)
        names = ("centred", "restricted", "logit_diff", "log_prob")
        found.append({name: uw.effects(lm, pairs, ["MLP0", "L1H0"], "end", "exact", name) for name in names})
    for name in ("centred", "restricted", "logit_diff"):
        for part in ("base", "effect"):
            np.testing.assert_allclose(found[0][name][part].values, found[1][name][part].values, atol=1e-10)
    assert np.abs(found[0]["log_prob"]["base"].values - found[1]["log_prob"]["base"].values).max() > 0.1
    each = [uw.dla(lm, IDS, one, [OPTIONS] * 6, total=False)["logit_diff"].values for one in OPTIONS]
    np.testing.assert_allclose(np.sum(each, 0), 0, atol=1e-6)


@pytest.mark.promise("executed")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_total_effect_of_the_last_mlp_is_its_direct_edge(kind: str) -> None:
    lm, pairs = model(kind), contrasts()
    last = len(lm.layers) - 1
    nodes = [f"MLP{last}", f"L{last}H0"]
    total = uw.effects(lm, pairs, nodes, "end", "exact", "centred", "resample")
    edge = uw.paths(lm, pairs, nodes, "logits", "frozen", "centred", "resample", at="last")
    mlp, head = (total["effect"].sel(node=n).values - edge["effect"].sel(sender=n).values[:, 0] for n in nodes)
    np.testing.assert_allclose(mlp, 0, atol=1e-6)
    assert np.abs(head).max() > 1e-4  # the MLP behind it reads it


# --- low rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_pattern_sees_of_a_query_what_lies_in_the_span_of_centred_keys(kind: str) -> None:
    # A llama's softmax is computed in float32.
    lm, head, rounding = model(kind), "L1H1", 1e-12 if kind == "gpt2" else 2e-7
    with uw.trace(lm, f"{head}.q", f"{head}.k", f"{head}.pattern") as seen:
        logits_of(lm, IDS[:1])
    q, k, pattern = (seen[f"{head}.{part}"][0].double() for part in ("q", "k", "pattern"))
    for length in (3, 7):  # of fewer keys than there are dimensions, and of all
        keys = k[:length] - k[:length].mean(0)
        _, size, v = torch.linalg.svd(keys, full_matrices=True)
        rank = int((size > 1e-9 * size[0]).sum())
        inside, outside, row = v[:rank], v[rank:], length - 1
        noise = 5 * outside.sum(0) if len(outside) else torch.zeros_like(q[0])
        with uw.trace(lm, f"{head}.pattern", edits=[
            uw.Edit.set(f"{head}.q", (inside.T @ inside @ q[row] + noise)[None], at=row)
        ]) as other:  # fmt: skip
            logits_of(lm, IDS[:1])
        np.testing.assert_allclose(other[f"{head}.pattern"][0, row], pattern[row], atol=rounding)
    with uw.trace(lm, f"{head}.pattern", edits=[uw.Edit.add(f"{head}.k", 3 * q[0])]) as other:
        logits_of(lm, IDS[:1])
    np.testing.assert_allclose(other[f"{head}.pattern"], pattern[None], atol=rounding)


def boxed(n: int, seed: int) -> uw.Pairs:
    """Of four things and four boxes, each thing being right in about a quarter."""
    chosen = {"thing": toy.THINGS[:4], "letter": toy.LETTERS}
    return uw.tasks.boxes(n, by_hand().tokenizer, seed, k=4, words=chosen, bos=False)


@pytest.mark.promise("planted")
def test_queries_are_kept_by_as_many_directions_as_were_planted() -> None:
    """Four places, one coordinate each: three dimensions once they are centred. Chosen on other prompts."""
    lm, site = by_hand(), "L3H0.q"
    first, held = boxed(40, 0), boxed(40, 1)
    with uw.trace(lm, site) as seen:
        plain(lm, torch.from_numpy(first.base.ids))
    queries = seen[site][:, -1].double()
    _, size, v = torch.linalg.svd(queries - queries.mean(0), full_matrices=True)
    assert size[3] < 1e-4 * size[2]
    planted = np.zeros((HEAD, 4))
    planted[:4] = np.eye(4) - 0.25
    assert subspace_angles(v[:3].T.numpy(), planted[:, :3]).max() < 1e-3
    kept, ids = [], torch.from_numpy(held.base.ids)
    for k in range(4):
        edit = uw.Edit(site, source=queries.mean(0), alpha=1.0, beta=-1.0, basis=v[k:], at=-1)
        with uw.trace(lm, edits=[edit]):
            kept.append(float(uw_loss(plain(lm, ids)[0], held).mean()))
    none, two, three = kept[0], kept[2], kept[3]
    whole = float(uw_loss(plain(lm, ids)[0], held).mean())
    assert (none - three) / (none - whole) == pytest.approx(1, abs=1e-4)
    assert (none - two) / (none - whole) < 0.95


def uw_loss(logits: Tensor, pairs: uw.Pairs) -> np.ndarray:
    chosen = logits.numpy()[np.arange(len(pairs))[:, None], np.asarray(pairs.choices)]
    return np.log(np.exp(chosen).sum(1)) - logits.numpy()[np.arange(len(pairs)), pairs.answer]


# --- output nodes -----------------------------------------------------------------------------------------------------


@cache
def found() -> uw.Result:
    return output_nodes(by_hand(), boxed(24, 2), boxed(32, 3))


@pytest.mark.promise("planted")
def test_the_planted_writer_is_the_output_node_and_who_tells_it_where_works_through_it() -> None:
    """A writes the thing; B tells it where to look, and writes nothing that is read; D writes the same everywhere."""
    data = found().data
    assert data.attrs["output"] == "L3H0"
    assert data.attrs["explains"] == pytest.approx(1, abs=1e-3)
    table = {str(name): data.sel(node=str(name)) for name in data["node"].values}
    assert table["L3H0"]["category"].item() == "correct answer"
    assert table["L2H0"]["category"].item() == "through others"
    for head, role in (("L3H0", "object"), ("L2H0", "query")):
        share = brought(head, role)
        assert table[head]["looks"].item() == f"{role} {share:.2f}".replace(" 0.", " .")
        assert share > 0.7
    for head in ("L2H0", "L3H0"):
        assert table[head]["executed_low"].item() > 1
    assert {*data["answer"].values} == {*toy.THINGS[:4]}
    assert "Output nodes: L3H0, with 100%" in words(found())
    assert "writes for" in {column.name for column in next(iter(listings(found()))).columns}


def brought(head: str, role: str) -> float:
    """The mean share of ‖A v W_O‖ at the last token that comes from a role, of plain weights and hooks."""
    lm, pairs = by_hand(), boxed(32, 3)
    layer, unit = int(head[1]), int(head[3])
    attn = lm.hf.transformer.h[layer].attn
    _, _, made = plain(lm, torch.from_numpy(pairs.base.ids))
    q, k, v = (part.unflatten(-1, (2, HEAD))[:, :, unit] for part in made[layer].split(2 * HEAD, -1))
    pattern = (q[:, -1:] @ k.transpose(1, 2) / HEAD**0.5).softmax(-1)[:, 0]
    written = v @ attn.c_proj.weight.detach()[unit * HEAD : (unit + 1) * HEAD]
    size = pattern * (written - written.mean(-1, keepdim=True)).norm(dim=-1)
    return float((size[torch.arange(32), pairs.roles[role]] / size.sum(-1)).mean())


@pytest.mark.promise("executed")
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_what_direct_edges_keep_is_what_is_lost_by_the_final_stream_without_the_others(share: float) -> None:
    """Plain arithmetic on the last stream: the others' writes exchanged, through the model's own norm and head."""
    lm, pairs = model(), contrasts()
    result = output_nodes(lm, pairs, pairs, share)
    order = np.random.default_rng(0).permutation(6)
    names = [str(node) for node in lm.parts if node.kind in ("head", "mlp")]
    own, other = (writes(lm, names, part) for part in (pairs.base.ids[order], pairs.source.ids[np.roll(order, -1)]))
    final, lost = own.pop("final"), {}
    output = result.data.attrs["output"].split(", ")
    for label, changed in (("none", []), ("others", [one for one in names if one not in output]), ("all", names)):
        with torch.no_grad():
            stream = final + sum((other[name] - own[name] for name in changed), torch.zeros_like(final))
            lost[label] = loss(lm.hf.lm_head(lm.final_norm(stream)).numpy(), np.array(ANSWER)[order], OPTIONS).mean()
    want = (lost["all"] - lost["others"]) / (lost["all"] - lost["none"])
    assert result.data.attrs["recovered"] == pytest.approx(want, abs=1e-8)


def writes(lm: Any, names: list[str], ids: np.ndarray) -> dict[str, Tensor]:
    """What nodes write at the last row, and the final stream there."""
    sites = {name: f"{name}.out" if "H" in name else name for name in names}
    with uw.trace(lm, *sites.values(), "resid_post1") as seen:
        logits_of(lm, torch.from_numpy(ids))
    return {name: seen[site][:, -1] for name, site in sites.items()} | {"final": seen["resid_post1"][:, -1]}


def test_a_category_is_by_intervals_and_sizes() -> None:
    up, down, none = np.array([1.0, 0.5, 1.5]), np.array([-1.0, -1.5, -0.5]), np.array([0.0, -0.2, 0.2])
    unknown, tiny = np.full(3, np.nan), np.array([0.01, 0.005, 0.015])
    for want, whole, each, executed, itself in (
        ("correct answer", up, (up, up), unknown, False), ("amplifies", up, (up, up), up, True),
        ("some answers (A)", up, (up, none), unknown, False), ("constant", none, (up, down), unknown, False),
        ("against", down, (down, down), unknown, False), ("through others", none, (none, none), up, False),
        ("correct answer", tiny, (tiny, tiny), up, False), ("", none, (none, none), none, False),
        ("", none, (tiny, -tiny[[0, 2, 1]]), unknown, False), ("against", down, (down, none), up, False),
    ):  # fmt: skip
        assert category(whole, dict(zip("AB", each, strict=True)), executed, 0.1, itself) == want


@pytest.mark.promise("errors")
def test_what_cannot_have_output_nodes_is_refused() -> None:
    lm, pairs = model(), contrasts()
    bare = uw.pairs(IDS, torch.from_numpy(pairs.source.ids), ANSWER, [7, 9, 11, 3, 7, 9])
    with pytest.raises(TokensError, match="one of several choices"):
        output_nodes(lm, bare, bare)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(NumericError, match="share is a part"):
            output_nodes(lm, pairs, pairs, share)
    for against in ([[7], [9]], [[7, 9]] * 5, [[7, 9]] * 5 + [[7]], [[7, 9]] * 5 + [["x", 9]], [[3, 3]] * 6):
        with pytest.raises(TokensError):
            uw.dla(lm, IDS, 3, against, total=False)


def test_the_command_says_it_and_takes_it_up_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("nodes", "default", "--task", "boxes", "-n", 6, "--rank", 6, "--out", tmp_path)
    assert run(monkeypatch, *asked) == 0
    first, said = uw.read(tmp_path), " ".join(capsys.readouterr().out.split())
    assert f"Output nodes: {first.data.attrs['output']}, with" in said
    assert run(monkeypatch, *asked) == 0
    assert uw.read(tmp_path).data.identical(first.data)
    assert run(monkeypatch, *asked[:3], "years") == 1
