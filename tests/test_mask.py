"""Does a mask find the heads that carry a variable, those alone, and say what patching them really does?"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import unwrite as uw
from executed import exact, weights
from patching import alone, contrasts, site
from unwrite import cli
from unwrite.cli.options import Common
from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.orders import orders
from unwrite.report.views import listings, words
from unwrite.stats import masks

# --- a model by hand --------------------------------------------------------------------------------------------------

# "A B first ." goes on with A, "A B second ." with B. Coordinates of the stream: a token's name, the word of order, the
# full stop, the position, what is written of order, and the name that is said.
NAMES, FIRST, SECOND, STOP = 8, 8, 9, 10
_NAME, _ORDER, _STOP, _PLACE, _SIGNAL, _SAID, _OTHER = 0, 8, 10, 11, 15, 17, 25
WIDTH, HEAD = 32, 16
# A ballast keeps what norms divide by nearly the same; the second look is soft enough for a slope through its softmax.
_BALLAST, _SHARP, _SOFT, _LOUD = 8.0, 16.0, 7.5, 50.0
POSITION, MOVER = "L0H0", "L1H0"


def _set(block: Any, head: int, part: str, reads: int, into: int, size: float) -> None:
    """One number of the matrices of a head: it reads a coordinate of the stream as its query, key or value."""
    block.attn.c_attn.weight.data[reads, "qkv".index(part) * WIDTH + head * HEAD + into] = size


def _writes(block: Any, head: int, of: int, into: int, size: float) -> None:
    block.attn.c_proj.weight.data[head * HEAD + of, into] = size


@cache
def by_hand(first: int = 0) -> Model:
    """Two layers of two heads, of which number `first` does the work.

    The full stop asks the word of order (layer 0), then looks at the place it says and moves the name there (layer 1).
    The other heads take means over all tokens to coordinates that nobody reads.
    """
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=4, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).double().eval()
    for name, part in hf.named_parameters():
        part.data.fill_(float("ln" in name and name.endswith("weight")))
    hf.transformer.wte.weight.data[:, :11] = torch.eye(11)
    hf.transformer.wte.weight.data[:, 29:31] = torch.tensor([_BALLAST, -_BALLAST])
    hf.transformer.wpe.weight.data[:4, _PLACE : _PLACE + 4] = torch.eye(4)
    asks, moves = hf.transformer.h
    _set(asks, first, "q", _STOP, 0, _SHARP)
    for i in range(2):
        _set(asks, first, "k", _ORDER + i, 0, _SHARP)
        _set(asks, first, "v", _ORDER + i, i, 1.0)
        _writes(asks, first, i, _SIGNAL + i, 2.0)
        _set(moves, first, "q", _SIGNAL + i, i, _SOFT)
        _set(moves, first, "k", _PLACE + i, i, _SOFT)
    for i in range(NAMES):
        _set(moves, first, "v", _NAME + i, i, 1.0)
        _writes(moves, first, i, _SAID + i, 1.0)
        hf.lm_head.weight.data[i, _SAID + i] = _LOUD
    for block in (asks, moves):
        for i in range(4):
            _set(block, 1 - first, "v", _NAME + i, i, 1.0)
            _writes(block, 1 - first, i, _OTHER + i, 1.0)
    return view(hf)


def scenes(change: str, n: int = 48, seed: int = 0) -> uw.Pairs:
    """Base and source prompts, and what the base must say once the variable that they differ in has its source value.

    "order": the names change places, and so does the word of order, so that both prompts say the same. "both": the
    names change places. "names": other names. "word": the word of order.
    """
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        a, b, c, d = rng.permutation(NAMES)[:4].tolist()
        base = [a, b, FIRST + i % 2, STOP]
        other = FIRST + (i + 1) % 2
        source, said = {
            "order": ([b, a, other, STOP], base[1 - i % 2]), "both": ([b, a, base[2], STOP], base[1 - i % 2]),
            "names": ([c, d, base[2], STOP], (c, d)[i % 2]), "word": ([a, b, other, STOP], base[1 - i % 2]),
        }[change]  # fmt: skip
        rows.append((base, source, base[i % 2], said))
    base, source, answer, against = zip(*rows, strict=True)
    return uw.pairs(
        torch.tensor(base), torch.tensor(source), [*answer], [*against], roles={"a": 0, "word": 2},
        template=[f"t{i // 2 % 6}" for i in range(n)],
    )  # fmt: skip


def asked(change: str, **more: Any) -> uw.Result:
    settings: dict[str, Any] = {"penalty": 0.3, "seeds": 2, "steps": 12, "lr": 0.3, "draws": 12}
    return uw.mask(by_hand(), scenes(change), **(settings | more))


def chosen(found: uw.Result, penalty: int = 0) -> list[str]:
    return [str(name) for name in found["node"].values[found["chosen"].isel(penalty=penalty).values]]


def rate(found: uw.Result, what: str) -> float:
    return float(found["rate"].isel(penalty=0).sel(set=what))


def test_the_model_by_hand_does_what_it_says() -> None:
    solved = uw.solves(by_hand(), scenes("word"))
    assert solved.data.attrs["verdict"] == "solved"
    assert solved["top"].values.all()


@pytest.mark.promise("planted")
def test_two_counterfactuals_tell_two_variables_apart() -> None:
    """Patching all heads cannot show where the order is kept: the other head brings the other prompt's name along."""
    place, name = asked("order"), asked("both")
    assert chosen(place) == [POSITION]
    assert chosen(name) == [MOVER] == chosen(asked("names"))
    for found in (place, name):
        assert rate(found, "none") == 0
        assert rate(found, "chosen") == 1
        assert rate(found, "complement") == 0
        assert found["stable"].item() == 1
        assert found.data.attrs["found"] == "found"
        assert found.data.attrs["solves"].startswith("The model solves 48 of 48")
    assert rate(place, "all") == 0
    assert rate(name, "all") == 1


def test_a_mask_does_not_know_the_order_of_heads() -> None:
    settings: dict[str, Any] = {"penalty": 0.3, "seeds": 2, "steps": 4, "lr": 0.3, "draws": 1}
    one, other = (uw.mask(by_hand(i), scenes("order"), **settings) for i in (0, 1))
    turned = one["gain"].sel(node=["L0H1", "L0H0", "L1H1", "L1H0"]).values
    np.testing.assert_allclose(other["gain"].values, turned, atol=1e-9)
    np.testing.assert_allclose(other["difference"].sel(set="chosen"), one["difference"].sel(set="chosen"), atol=1e-9)


def test_the_penalty_is_a_path_from_everything_that_helps_to_nothing() -> None:
    found = asked("word", penalty=(100.0, 4.0, 0.01))
    sizes = found["size"].values
    assert sizes[0] == 0
    assert (np.diff(sizes) >= 0).all()
    assert not found["gain"].isel(penalty=0).values.any()
    assert found.data.attrs["best"] != 100.0
    alone_ = asked("word", penalty=100.0)
    assert alone_.data.attrs["found"] == "nothing found"


@pytest.mark.parametrize(("stays", "left"), [("order", MOVER), ("both", POSITION)])
def test_what_is_to_stay_decides_between_two_ways(stays: str, left: str) -> None:
    """Either head turns the answer; only one of them leaves the answer to another pair as it is."""
    free, found = asked("word", penalty=4.0), asked("word", keep=scenes(stays, seed=1), penalty=4.0)
    assert chosen(free) == [POSITION, MOVER]
    assert chosen(found) == [left]
    assert rate(found, "chosen") == 1
    same = found["kept_same"].isel(penalty=0)
    assert same.sel(set="chosen").values.all()
    assert not same.sel(set="complement").values.any()
    assert np.abs(found["kept_change"].isel(penalty=0).sel(set="chosen")).max() < 1
    assert "kept_same" not in free.data


def test_where_a_variable_lies_is_found_by_role() -> None:
    """The value of the word of order is that of its own token; later it is the full stop's."""
    found = asked("word", nodes=["resid_pre0", "resid_post0"], at=["a", "word", "end"], penalty=1.0)
    where = found["chosen"].isel(penalty=0)
    assert where.dims == ("node", "role")
    np.testing.assert_array_equal(where.transpose("node", "role"), [[False, True, False], [False, False, True]])
    assert np.isnan(rate(found, "random"))  # of one node a layer there is no other
    assert found.data.attrs["found"] == "found"


# --- what patching really does ----------------------------------------------------------------------------------------


@cache
def model(seed: int = 1) -> Model:
    return view(weights("llama", seed, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2))


def random_pairs() -> uw.Pairs:
    made = contrasts((5, 6, 6, 5, 7, 6, 5, 6))
    return uw.pairs(
        made.base, made.source, made.answer, made.against, roles={"a": 1},
        choices=[[int(a), int(a) + 9, 3] for a in made.answer], template=[f"t{i // 2}" for i in range(8)],
    )  # fmt: skip


@pytest.mark.promise("executed")
@pytest.mark.parametrize("at", ["end", "all", "a"])
def test_what_a_set_does_is_what_a_trace_does_with_all_of_it_set(at: str) -> None:
    lm, pairs = model(), random_pairs()
    with exact():
        found = uw.mask(lm, pairs, "heads", at, penalty=1e-4, seeds=1, steps=6, lr=0.5, draws=2, batch=3)
        one, picked = found.data.isel(penalty=0), set(chosen(found))
        every = [str(name) for name in found["node"].values]
        assert picked
        sets = {"none": set(), "all": {*every}, "chosen": picked, "complement": {*every} - picked}
        prompts = [*alone(lm, pairs)]
        for place, number in enumerate(found["pair"].values):
            prompt = prompts[number]
            given = prompt.values(every)
            rows = {"end": [prompt.row], "all": [*range(prompt.row + 1)], "a": [1]}[at]
            for what, names in sets.items():
                edits = [uw.Edit.set(site(name), given[name][rows][None], at=rows) for name in names]
                with uw.trace(lm, edits=edits), torch.no_grad():
                    logits = lm.hf(prompt.base[None], use_cache=False).logits[0, prompt.row]
                here = one.sel(set=what).isel(pair=place)
                a, b = int(pairs.answer[number]), int(pairs.against[number])
                assert float(here["difference"]) == pytest.approx(float(logits[b] - logits[a]), abs=1e-10)
                assert bool(here["match"]) == (int(logits.argmax()) == b)
                assert bool(here["restricted"]) == bool(logits[b] > max(logits[a], logits[3]))


def test_held_out_pairs_are_those_of_other_templates_in_their_order() -> None:
    pairs = random_pairs()
    found = uw.mask(model(), pairs, ["L0H0", "L1H1"], penalty=1.0, seeds=1, steps=1, draws=1)
    judged = [pairs.template[i] for i in found["pair"].values]
    assert judged == [*found["template"].values]
    learned = {label for i, label in enumerate(pairs.template) if i not in found["pair"].values}
    assert not learned & {*judged}
    assert [*found["pair"].values] == sorted(found["pair"].values)
    other = uw.mask(model(), pairs, ["L0H0"], penalty=1.0, seeds=1, steps=1, draws=1, held=pairs.take([5, 2]))
    assert other.data.attrs["learned_from"] == 8
    np.testing.assert_array_equal(other["pair"], [0, 1])


def test_the_first_slope_is_attribution_patching() -> None:
    """Where no node is set yet, a gain's slope is ⟨source − base, slope of the metric⟩: AtP, with tests of its own."""
    lm, pairs = model(), random_pairs()
    with exact():
        guess = uw.effects(lm, pairs, "heads", "end", "atp")["effect"].values
        found = uw.mask(lm, pairs, "heads", "end", penalty=1e-9, seeds=1, steps=1, lr=1e-3, held=pairs, draws=1)
        base = float(uw.effects(lm, pairs, ["L0H0"], "end")["base"].mean())
    # The first step of Adam goes by its rate against the sign of the slope, and stays where the loss is least.
    down = guess.mean(0) < -1e-6
    np.testing.assert_allclose(found["gain"].values[0, 0], 1e-3 * down, atol=1e-5)
    assert down.any()
    assert not down.all()
    assert found["loss"].item() == pytest.approx(base, abs=1e-9)


# --- values of another model ------------------------------------------------------------------------------------------


def test_the_same_model_as_source_changes_nothing() -> None:
    lm, pairs = model(), random_pairs()
    same = uw.pairs(pairs.base, pairs.base, pairs.answer, pairs.against, template=[*(pairs.template or ())])
    found = uw.mask(lm, same, "heads", "end", source=lm, penalty=0.1, seeds=2, steps=5, draws=2)
    assert not found["gain"].values.any()
    spread = found["difference"].values - found["difference"].sel(set="none").values[:, None]
    assert np.nanmax(np.abs(spread)) < 1e-6
    assert found.data.attrs["found"] == "nothing found"


def test_values_of_another_model_go_through_this_models_own_weights() -> None:
    """Of two models that differ in W_O alone every z is the same where nothing has gone through W_O before."""
    lm, pairs = model(), random_pairs()
    tuned, other = (view(copy.deepcopy(lm.hf)) for _ in range(2))
    tuned.layers[1].out_proj.weight.data.mul_(3.0)
    other.hf.get_input_embeddings().weight.data.neg_()
    ends = [uw.effects(one, pairs, ["L0H0"], "end")["base"].values for one in (lm, tuned)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-3
    same = uw.pairs(pairs.base, pairs.base, pairs.answer, pairs.against, template=[*(pairs.template or ())])
    found = uw.mask(lm, same, "heads", "all", source=tuned, penalty=0.1, seeds=1, steps=3, draws=1)
    assert not found["gain"].values.any()
    found = uw.mask(lm, same, ["L1H0", "L1H2"], "end", source=other, penalty=1e-3, seeds=1, steps=3, draws=1)
    number = int(found["pair"][0])
    prompt = [*alone(lm, same)][number]
    with uw.trace(other, "L1H0.z", "L1H2.z") as t, torch.no_grad():
        other.hf(prompt.base[None], use_cache=False)
    edits = [uw.Edit.set(name, t[name][:, [prompt.row]], at=[prompt.row]) for name in ("L1H0.z", "L1H2.z")]
    with uw.trace(lm, edits=edits), torch.no_grad():
        logits = lm.hf(prompt.base[None], use_cache=False).logits[0, prompt.row]
    want = float(logits[prompt.against] - logits[prompt.answer])
    assert float(found["difference"].isel(penalty=0, pair=0).sel(set="all")) == pytest.approx(want, abs=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"penalty": 0.0}, NumericError, "penalty is what a node costs"),
        ({"penalty": (0.3, -1.0)}, NumericError, "penalty is what a node costs"),
        ({"penalty": ()}, NumericError, "penalty is what a node costs"),
        ({"penalty": (0.3, 0.3)}, NumericError, "penalty names each once"),
        ({"penalty": float("nan")}, NumericError, "penalty is what a node costs"),
        ({"lr": 0.0}, NumericError, "lr is a rate"),
        ({"seeds": 0}, NumericError, "seeds is a number of masks"),
        ({"steps": 0}, NumericError, "steps is a number of steps"),
        ({"at": "S2"}, NumericError, "at is unknown.*'a', 'end'"),
        ({"at": ["a", "a"]}, NumericError, "at names each role once"),
        ({"nodes": "L9H0"}, NodeError, "L9H0"),
        ({"held": "name"}, NumericError, "held is unknown.*template"),
        ({"source": "others"}, NumericError, "source is unknown"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        uw.mask(model(), random_pairs(), **({"nodes": ["L0H0"]} | settings))


def test_pairs_that_cannot_be_learned_from_are_refused() -> None:
    lm, pairs = model(), random_pairs()
    bare = uw.pairs(pairs.base, pairs.source, pairs.answer, pairs.against)
    with pytest.raises(TokensError, match=r'no template can be held out.*held="pair"'):
        uw.mask(lm, bare)
    with pytest.raises(TokensError, match="have against"):
        uw.mask(lm, uw.pairs(pairs.base, pairs.source, pairs.answer), held="pair")
    with pytest.raises(TokensError, match="are the same up to the row"):
        uw.mask(lm, uw.pairs(pairs.base, pairs.base, pairs.answer, pairs.against), held="pair")
    with pytest.raises(TokensError, match="only one sort"):
        uw.mask(lm, pairs, keep=uw.pairs(pairs.base, pairs.source, 5, 9, template=["x"] * 8))
    twice = uw.pairs(pairs.base, pairs.source, pairs.answer, pairs.against, roles={"a": 1, "b": 1})
    with pytest.raises(NumericError, match="two roles are one token"):
        uw.mask(lm, twice, at=["a", "b"], held="pair")


def test_more_gates_than_can_be_learned_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unwrite.methods.mask._MOST_GATES", 40)
    with pytest.raises(NumericError, match=r"a mask of so many gates\. Got: 56\. Expected: at most 40"):
        uw.mask(model(), random_pairs(), "heads", "each")


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_how_alike_masks_are_by_hand() -> None:
    one = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    assert masks.jaccard(one[:2]) == pytest.approx(1 / 3)
    assert masks.jaccard(one) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert masks.jaccard(one[[2, 2]]) == 1
    assert np.isnan(masks.jaccard(one[:1]))


def test_random_sets_have_as_many_nodes_of_every_layer_at_every_place() -> None:
    rng, group = np.random.default_rng(0), np.repeat([0, 1, 2], [4, 3, 5])
    picked = rng.random((12, 2)) < 0.4
    made = masks.alike(picked, group, 30, 0)
    for layer in range(3):
        own = group == layer
        np.testing.assert_array_equal(made[:, own].sum(1), np.tile(picked[own].sum(0), (30, 1)))
    assert len({one.tobytes() for one in made}) > 10
    np.testing.assert_array_equal(made, masks.alike(picked, group, 30, 0))
    assert (masks.alike(picked, group, 30, 1) != made).any()


def test_compared_sets_come_back_where_they_were() -> None:
    picked = np.random.default_rng(1).random((2, 6, 1)) < 0.5
    sets = masks.compared(picked, np.repeat([0, 1], 3), 3)
    each = sets.reshape(len(sets), -1) @ 2.0 ** np.arange(6)
    fixed, random = masks.arranged(each[:, None], 2)
    of = picked.reshape(2, -1) @ 2.0 ** np.arange(6)
    np.testing.assert_array_equal(fixed[..., 0], [[0, 63, one, 63 - one] for one in of])
    assert random.shape == (2, 3, 1)
    np.testing.assert_array_equal(masks.repeated(sets, 2), random[..., 0] == of[:, None])


def test_an_interval_of_matches_is_the_wider_of_two() -> None:
    """All pairs of three templates match: the jackknife has no width. One template of three does not: Wilson's has."""
    cluster = np.repeat([0, 1, 2], 4)
    whole, one = np.ones(12, dtype=bool), np.repeat([True, True, False], 4)
    rate, low, high = masks.matched(np.stack([whole, one]), cluster)
    n, z = 12, 1.959963984540054
    assert low[0] == pytest.approx((1 + z**2 / 2 / n - z * np.sqrt(z**2 / 4 / n**2)) / (1 + z**2 / n))
    assert (rate[0], high[0]) == (1.0, 1.0)
    # θ without each template: ½, ½, 1; SE² = 2/3 Σ (θ − mean)², t of two degrees of freedom.
    without = np.array([0.5, 0.5, 1.0])
    half = 4.302652729749464 * np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert rate[1] == pytest.approx(2 / 3)
    assert low[1] == max(0.0, 2 / 3 - half) == 0.0
    assert high[1] == min(1.0, 2 / 3 + half) == 1.0
    assert np.isnan(masks.matched(whole[None, :8], cluster[:8])[1])


def test_a_word_is_said_of_its_interval_alone() -> None:
    assert masks.word(0.8, 1.0, 3, 0.0, 0.5) == "found"
    assert masks.word(0.4, 1.0, 3, 0.0, 0.5) == "undecided"
    assert masks.word(0.8, 1.0, 3, 0.9, 0.5) == "undecided"
    assert masks.word(0.0, 0.4, 3, 0.0, 0.5) == "nothing found"
    assert masks.word(0.8, 1.0, 0, 0.0, 0.5) == "nothing found"
    assert masks.word(np.nan, np.nan, 3, 0.0, 0.5) == "undecided"
    assert masks.word(0.8, 1.0, 3, 0.0, np.nan) == "found"


def test_a_mask_is_an_order_of_nodes() -> None:
    (order,) = orders(asked("both", penalty=(4.0, 0.3)))
    assert order.nodes[int(order.size.argmax())] == MOVER
    assert order.helps.max() > 0.5 > np.sort(order.helps)[-2]
    named = asked("both", at=["word", "end"], penalty=(4.0, 0.3))
    (order,) = orders(named)
    assert (order.roles, order.helps.shape) == (("word", "end"), (4, 2))
    assert order.helps[order.nodes.index(MOVER)].argmax() == 1
    found = uw.circuit(by_hand(), scenes("both", 12), named, [1], nodes="heads", roles=["word", "end"], draws=0)
    assert found.data.attrs["chosen"].split(", ")[0] == f"{MOVER} at end"
    # What is learned of all pairs has none to halve.
    assert np.isnan(uw.overlap(named, named)["ceiling_a"]).all()


# --- as it is shown ---------------------------------------------------------------------------------------------------


def test_a_result_says_its_interval_before_its_word() -> None:
    found = asked("both", penalty=(4.0, 0.3))
    said = words(found)
    assert said.index("95 %") < said.index(": found (L1H0)")
    assert "24 pairs held out, 3 clusters" in said
    assert said.endswith(found.data.attrs["solves"])
    path, picked = listings(found)
    assert [row[:2] for row in path.rows] == [("4", "1"), ("0.3", "1")]
    assert picked.rows == [(MOVER, "end", "1.00")]
    assert found.table().shape[0] == 8
    for figure in (None, "bars"):
        assert found.figure(figure).to_dict()


def shell(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """How a command ends."""
    monkeypatch.setattr("sys.argv", ["unwrite", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_from_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Common, "load", lambda *_: uw.load("default"))
    out = tmp_path / "out"
    few = ("--nodes", "L0H0,L1H1", "-n", 8, "--steps", 1, "--seeds", 1, "--penalty", "0.5,2", "--keep", "distractor")
    assert shell(monkeypatch, "mask", "default", "--task", "agreement", *few, "--out", out) == 0
    assert "held out" in capsys.readouterr().out
    found = uw.read(out)
    assert [*found["penalty"].values] == [0.5, 2.0]
    assert found["kept_same"].dims == ("penalty", "set", "kept")
    assert shell(monkeypatch, "mask", "default", "--task", "agreement", "--penalty", "much") == 1
    assert "penalty is what a node costs" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_real_model_the_place_of_a_name_and_the_name_are_other_heads(real: Path) -> None:
    """Wang et al. 2022: heads that say where S1 was come before those that move the name, and are not these."""
    lm = uw.load(real / "smollm2-135m")
    heads = [f"L{layer}H{head}" for layer in range(18, 25) for head in range(9)]
    asked_: dict[str, Any] = {"penalty": 0.3, "seeds": 1, "steps": 30, "draws": 5}
    place, name = (
        uw.mask(lm, uw.tasks.ioi(42, lm.tokenizer, change=change, bos=False), heads, **asked_)
        for change in ("names+order", "names")
    )
    assert {"L19H2", "L20H0"} <= {*chosen(place)}
    assert {"L23H0", "L23H1", "L23H7"} <= {*chosen(name)}
    assert not {"L19H2", "L20H0"} & {*chosen(name)}
    assert not {"L23H0", "L23H1", "L23H7"} & {*chosen(place)}
    assert rate(place, "all") < rate(place, "chosen") > rate(place, "random")
    assert rate(place, "none") < 0.2
    assert rate(name, "none") < 0.2 < rate(name, "chosen")


@pytest.mark.slow
def test_in_a_real_model_that_was_hurt_the_whole_one_as_source_names_the_hurt_heads(real: Path) -> None:
    """Cross-model patching: in a copy of SmolLM2 the queries of three heads are gone."""
    whole = uw.load(real / "smollm2-135m", dtype="float32")
    twin, hurt = copy.deepcopy(whole.hf), ("L19H2", "L20H0", "L23H3")
    with torch.no_grad():
        for layer, head in ((19, 2), (20, 0), (23, 3)):
            twin.model.layers[layer].self_attn.q_proj.weight[64 * head : 64 * head + 64] = 0
    lm = uw.load(twin, whole.tokenizer)
    asked = uw.tasks.ioi(28, whole.tokenizer, seed=3, bos=False)
    # The hurt model says the other name more often; the whole one's is wanted.
    pairs = uw.pairs(
        asked.base, asked.base, asked.against, asked.answer, asked.row, template=list(asked.template or ())
    )
    nodes = [f"L{layer}H{head}" for layer in range(19, 24) for head in range(9)]
    found = uw.mask(lm, pairs, nodes, "end", penalty=0.1, seeds=1, steps=45, source=whole, draws=5)
    gain = found["mean_gain"].isel(penalty=0).squeeze(drop=True).to_series().sort_values(ascending=False)
    assert {*gain.index[:3]} == {*hurt}
    none, chosen_, random = found["mean_difference"].isel(penalty=0).sel(set=["none", "chosen", "random"]).values
    assert chosen_ > none + 2
    assert chosen_ > random + 1
