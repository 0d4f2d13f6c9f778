"""Does the protocol of entity tracking find what was planted, and are its numbers those of plain hooks? Is the toy's
training what it says?"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import unwrite as uw

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "circuits"))
toy, tracking, training = (importlib.import_module(name) for name in ("toy", "tracking", "training"))

# --- a model by hand --------------------------------------------------------------------------------------------------

# Coordinates of the stream: the thing, the letter, "contains", the position; which place it is as D, C and B write it;
# the thing that is said.
_THING, _LETTER, _CONTAINS, _PLACE, _D, _C, _B, _SAID, _BALLAST = 0, 10, 21, 22, 33, 37, 41, 45, 62
WIDTH, HEAD = 64, 32
_SHARP, _SOFT, _LOUD = 32.0, 8.0, 50.0
PLANTED = {"A": "L3H0", "B": "L2H0", "C": "L1H0", "D": "L0H0"}


@cache
def by_hand(lost: str = "") -> Any:
    """The paper's mechanism: one head in each of four layers, and an idle one beside it; what is `lost` writes nothing.

    At a label D writes which place it is, C at the query reads that where the same letter stood, B brings it to the
    end, and A looks there.
    """
    config = GPT2Config(
        vocab_size=len(toy.WORDS), n_positions=16, n_embd=WIDTH, n_layer=4, n_head=2, n_inner=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).double().eval()
    for name, part in hf.named_parameters():
        part.data.fill_(float("ln" in name and name.endswith("weight")))
    wte, things, letters = hf.transformer.wte.weight.data, *(toy.WORDS.index(w[0]) for w in (toy.THINGS, toy.LETTERS))
    wte[things : things + 10, _THING : _THING + 10] = torch.eye(10).double()
    wte[letters : letters + 10, _LETTER : _LETTER + 10] = torch.eye(10).double()
    wte[toy.WORDS.index("contains"), _CONTAINS] = 1
    wte[:, _BALLAST : _BALLAST + 2] = torch.tensor([11.3, -11.3])  # norms divide by nearly the same everywhere
    hf.transformer.wpe.weight.data[:11, _PLACE : _PLACE + 11] = torch.eye(11).double()
    hf.lm_head.weight.data[things : things + 10, _SAID : _SAID + 10] = _LOUD * torch.eye(10)
    for i in range(11):
        _reads(hf, 0, "qk", _PLACE + i, i, _SHARP)
    for i in range(10):
        _reads(hf, 1, "qk", _LETTER + i, i, _SHARP)
        _reads(hf, 1, "q", _LETTER + i, 10, _SHARP)
    _reads(hf, 1, "k", _PLACE + 9, 10, -2 * _SHARP)  # not where it is asked for
    _reads(hf, 2, "q", _CONTAINS, 0, _SHARP)
    _reads(hf, 2, "k", _PLACE + 9, 0, _SHARP)
    for i in range(4):
        _reads(hf, 3, "q", _B + i, i, _SOFT)
        _reads(hf, 3, "k", _PLACE + 2 * i, i, _SOFT)
        for layer, (name, read, into) in enumerate(
            (("D", _PLACE + 2 * i + 1, _D), ("C", _D + i, _C), ("B", _C + i, _B))
        ):
            _moves(hf, layer, read, i, into + i, 0.0 if lost == name else 2.0)
    for i in range(10):
        _moves(hf, 3, _THING + i, i, _SAID + i, 2.0)
    return uw.load(hf, tokenizer=toy.COURSE.tokenizer())


def _reads(hf: Any, layer: int, parts: str, read: int, into: int, size: float) -> None:
    for part in parts:
        hf.transformer.h[layer].attn.c_attn.weight.data[read, "qkv".index(part) * WIDTH + into] = size


def _moves(hf: Any, layer: int, read: int, of: int, into: int, size: float) -> None:
    _reads(hf, layer, "v", read, of, 1.0)
    hf.transformer.h[layer].attn.c_proj.weight.data[of, into] = size


# --- plain hooks ------------------------------------------------------------------------------------------------------

# z of all heads of a layer, [prompt, position, head, d].
Z = Mapping[int, Tensor]


def plain(lm: Any, ids: Tensor, held: Z | None = None, projected: Any = None) -> Any:
    """Logits at the last token, every layer's z, and its q, k and v as one.

    With z held, or with some of q, k and v set: {layer: (where, values)}.
    """
    seen: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    hooks = []

    def before(layer: int, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0] if held is None or layer not in held else held[layer].reshape(args[0].shape)
        seen[layer] = z.reshape(*z.shape[:2], 2, HEAD)
        return (z,)

    def after(layer: int, module: Any, args: Any, out: Tensor) -> Tensor:
        if projected is not None and layer in projected:
            where, values = projected[layer]
            out = torch.where(where, values, out)
        made[layer] = out
        return out

    for layer, block in enumerate(lm.hf.transformer.h):
        hooks.append(block.attn.c_proj.register_forward_pre_hook(lambda *a, at=layer: before(at, *a)))
        hooks.append(block.attn.c_attn.register_forward_hook(lambda *a, at=layer: after(at, *a)))
    try:
        with torch.no_grad():
            return lm.hf(input_ids=ids).logits[:, -1], seen, made
    finally:
        for hook in hooks:
            hook.remove()


def rows(pairs: uw.Pairs, role: str, source: bool = False) -> tuple[Tensor, Tensor]:
    named = pairs.source_roles if source else pairs.roles
    return torch.arange(len(pairs)), torch.from_numpy(named[role])


def number(head: str) -> tuple[int, int]:
    layer, _, unit = head[1:].partition("H")
    return int(layer), int(unit)


def path_patched(lm: Any, pairs: uw.Pairs, sender: str, role: str, receiver: str, side: str) -> Tensor:
    """Three runs (Wang et al. 2022): logits where the receiver alone has what it is when the sender has its source
    value and every other head is held."""
    base, source = torch.from_numpy(pairs.base.ids), torch.from_numpy(pairs.source.ids)
    (_, z, _), (_, other, _) = plain(lm, base), plain(lm, source)
    layer, unit = number(sender)
    held = {at: part.clone() for at, part in z.items()}
    held[layer][(*rows(pairs, role), unit)] = other[layer][(*rows(pairs, role, source=True), unit)]
    logits, _, became = plain(lm, base, held)
    if not receiver:
        return logits
    at, own = number(receiver)
    where = torch.zeros(3 * WIDTH, dtype=torch.bool)
    first = "qkv".index(side) * WIDTH + own * HEAD
    where[first : first + HEAD] = True
    return plain(lm, base, None, {at: (where, became[at])})[0]


def gap(logits: Tensor, pairs: uw.Pairs) -> Tensor:
    answer, against = torch.from_numpy(pairs.answer), torch.from_numpy(np.asarray(pairs.against))
    return (logits.gather(1, answer[:, None]) - logits.gather(1, against[:, None]))[:, 0]


def hits(logits: Tensor, asked: Any) -> float:
    return float((logits.argmax(-1) == torch.from_numpy(np.asarray(asked))).double().mean())


def replaced(lm: Any, pairs: uw.Pairs, kept: Mapping[str, Any], values: Z) -> Tensor:
    """Logits where all heads have other values, but for those that are kept at their roles; layer by layer, so that
    what is kept is computed of what is replaced."""
    ids, held = torch.from_numpy(pairs.base.ids), {}
    for layer in range(4):
        live = plain(lm, ids, held)[1][layer]
        held[layer] = values[layer].expand(live.shape).clone()
        for role, heads in kept.items():
            for unit in (unit for at, unit in map(number, heads) if at == layer):
                held[layer][(*rows(pairs, role), unit)] = live[(*rows(pairs, role), unit)]
    return plain(lm, ids, held)[0]


# --- the protocol -----------------------------------------------------------------------------------------------------


@cache
def asked(n: int = 24, seed: int = 0) -> uw.Pairs:
    return tracking.unanswerable(by_hand(), n, seed)


def test_what_is_knocked_out_is_a_mask_of_attention() -> None:
    lm = by_hand()
    pairs = tracking.scenes(lm, 24, 0, "position")
    found = tracking.knocked(lm, pairs)
    ids, n = torch.from_numpy(pairs.base.ids), np.arange(24)
    for query, key in (("end", "object"), ("query", "label"), ("end", "label")):
        mask = torch.zeros(24, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
        mask.masked_fill_(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1), -torch.inf)
        mask[n, 0, pairs.roles[query], pairs.roles[key]] = -torch.inf
        logits = lm.hf(ids, attention_mask=mask).logits[n, pairs.row]
        assert found[f"{query} → {key}"][0] == np.mean(logits.argmax(-1).numpy() == pairs.answer)
    # C looks in the second layer, A in the last.
    assert found["end → object"][:4] == [found["end → object"][0]] * 4
    assert found["end → object"][0] < 0.5
    assert found["query → label"][1] < 0.5
    assert found["query → label"][2:] == found["end → random"][2:] == [1.0] * 3


def test_source_prompts_ask_for_a_letter_that_is_in_neither() -> None:
    lm, pairs = by_hand(), asked()
    for i, (base, source) in enumerate(zip(pairs.base.ids, pairs.source.ids, strict=True)):
        letters = {*base[1:8:2].tolist(), *source[1:8:2].tolist()}
        assert source[9] not in letters
        assert base[9] in base[1:8:2]
        assert pairs.source_roles["label"][i] in (1, 3, 5, 7)
    assert {*pairs.source_roles["label"].tolist()} == {1, 3, 5, 7}
    assert uw.solves(lm, pairs).data["top"].all()


@cache
def groups() -> dict[str, Any]:
    return tracking.found_groups(by_hand(), asked())


@pytest.mark.promise("planted")
def test_the_planted_groups_are_found_and_nothing_else() -> None:
    found = {group: [one["head"] for one in part] for group, part in groups().items()}
    assert found == {**{group: [head] for group, head in PLANTED.items()}, "K": [], "V": []}


@pytest.mark.promise("executed")
@pytest.mark.parametrize("group", PLANTED)
def test_a_path_is_three_runs_with_plain_hooks(group: str) -> None:
    lm, pairs = by_hand(), asked()
    after, side = tracking.WRITES_TO.get(group, ("", ""))
    patched = path_patched(lm, pairs, PLANTED[group], tracking.GROUPS[group], PLANTED.get(after, ""), side)
    clean = plain(lm, torch.from_numpy(pairs.base.ids))[0]
    line = groups()[group][0]
    assert line["mean"] == pytest.approx(float(gap(patched, pairs).mean() / gap(clean, pairs).mean()) - 1, abs=1e-9)
    p, p0 = (x.softmax(-1).gather(1, torch.from_numpy(pairs.answer)[:, None]).mean() for x in (patched, clean))
    assert line["prob"] == pytest.approx(float(p / p0) - 1, abs=1e-9)


@pytest.mark.promise("executed")
def test_what_a_circuit_keeps_is_what_plain_hooks_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "DRAWS", 3)
    lm, pairs, own = by_hand(), asked(40, 1), tracking.cells(groups(), "ABCD")
    means = {at: part.mean(0, keepdim=True) for at, part in plain(lm, torch.from_numpy(pairs.source.ids))[1].items()}
    found = tracking.evaluated(lm, pairs, groups(), own)
    for name, kept in (("kept", own), ("none", {})):
        assert found[name] == pytest.approx(hits(replaced(lm, pairs, kept, means), pairs.answer), abs=1e-9)
    assert found["kept"] == found["model"] == 1 > 0.5 > found["none"]
    for group, head in PLANTED.items():
        role = tracking.GROUPS[group]
        less = tracking.without(own, {role: [head]})
        kept = hits(replaced(lm, pairs, less, means), pairs.answer)
        assert found["complete"][group][1] == pytest.approx(kept, abs=1e-9)
        minimal = next(one for one in found["minimal"] if one["head"] == head)
        assert minimal[""] == pytest.approx((1 - kept) / (1 - found["none"]), abs=1e-9)
    # What D writes at a label is the same in every prompt, so its mean is as good: which no mean can show is needed.
    assert tracking.pruned(lm, pairs, own) == {"end": own["end"], "query": own["query"]}
    assert max(found["random"]["roles and layers"]) < 1


@pytest.mark.promise("planted")
@pytest.mark.parametrize(("group", "what"), [("A", "object"), ("B", "position"), ("C", "position")])
def test_a_group_carries_what_was_planted(group: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("PENALTIES", (0.3,)), ("STEPS", 15), ("LEARNED_FROM", 16), ("HELD", 12)):
        monkeypatch.setattr(tracking, name, few)
    lm, role = by_hand(), tracking.GROUPS[group]
    for name, change in tracking.CARRIED.items():
        (line,) = tracking.carried(lm, [PLANTED[group]], role, change)
        pairs = tracking.scenes(lm, 12, 11, change)
        base, source = (torch.from_numpy(part.ids) for part in (pairs.base, pairs.source))
        patched = one_set(lm, base, PLANTED[group], rows(pairs, role), plain(lm, source)[1])
        assert line["rates"]["all"][0] == hits(patched, pairs.against) == float(name == what)
        # A difference of logits also falls where the answer is merely gone, so that more than these may be chosen.
        assert name != what or line["chosen"] == [PLANTED[group]]


def one_set(lm: Any, ids: Tensor, head: str, where: tuple[Tensor, Tensor], other: Z) -> Tensor:
    """Logits where one head is set at a row of each prompt, and all that follows runs on."""
    layer, unit = number(head)
    own = plain(lm, ids)[1][layer].clone()
    own[(*where, unit)] = other[layer][(*where, unit)]
    return plain(lm, ids, {layer: own})[0]


@pytest.mark.promise("executed")
def test_the_other_model_lends_what_a_model_has_lost() -> None:
    """C writes nothing in one of two models, so only C, B and A have what it lacks; D is the same in both."""
    young, lm, own = by_hand("C"), by_hand(), {group: tracking.cells(groups(), [group]) for group in PLANTED}
    prompts = tracking.same(tracking.scenes(lm, 20, 3, "position"))
    every = own | {"all": tracking.cells(groups(), PLANTED)}
    found, back = tracking.across(young, lm, prompts, every), tracking.across(lm, young, prompts, every)
    ids = torch.from_numpy(prompts.base.ids)
    theirs, mine = plain(lm, ids)[1], plain(young, ids)[1]
    assert found["itself"] == hits(plain(young, ids)[0], prompts.answer) < 0.5
    for group, head in PLANTED.items():
        where = rows(prompts, tracking.GROUPS[group])
        assert found["sets"][group] == pytest.approx(hits(one_set(young, ids, head, where, theirs), prompts.answer))
        assert back["sets"][group] == pytest.approx(hits(one_set(lm, ids, head, where, mine), prompts.answer))
    # What C reads is the same in both, and it is C's own weights that write it.
    assert {group: found["sets"][group] == 1 for group in PLANTED} == {"A": True, "B": True, "C": False, "D": False}


@pytest.mark.promise("executed")
def test_a_side_of_the_other_model_repairs_where_that_side_was_lost() -> None:
    """B writes nothing in one of two models: A's queries are what it lacks, and neither its keys nor its values."""
    inside = importlib.import_module("inside")
    young, lm = by_hand("B"), by_hand()
    prompts = tracking.same(tracking.scenes(lm, 20, 3, "position"))
    found = inside.inside(young, lm, prompts, ["L3H0", "L2H0"])
    ids, own = torch.from_numpy(prompts.base.ids), found[""][""]
    assert own == hits(plain(young, ids)[0], prompts.answer) < 0.5
    assert found["L3H0"] == {"q": 1.0, "k": own, "v": own, "": 1.0}
    # What B lacks is in its own weights: no side of it is better in the other model.
    assert set(found["L2H0"].values()) == {own}
    theirs, mine = plain(lm, ids)[2][3], torch.zeros(3 * WIDTH, dtype=torch.bool)
    mine[:HEAD] = True
    logits = plain(young, ids, projected={3: (mine, theirs)})[0]
    assert found["L3H0"]["q"] == hits(logits, prompts.answer)


@pytest.mark.promise("planted")
def test_effects_by_role_are_an_order_whose_circuit_is_the_planted_one() -> None:
    """All but D, which writes the same in every prompt; without any of the three next to nothing is kept."""
    lm, roles = by_hand(), [*tracking.ROLES]
    ranked, judged = (tracking.scenes(lm, 16, seed, "position") for seed in (2, 3))
    order = uw.effects(lm, ranked, "heads", roles)
    found = uw.circuit(lm, judged, order, [1, 2, 3], "source", roles=roles, nodes="heads", draws=2, gates=False)
    for by in ("absolute", "signed"):
        circuit = uw.Circuit.of_result(found, by=by)
        assert {*circuit.cells} == {("L3H0", "end"), ("L2H0", "end"), ("L1H0", "query")}
        kept = found["faithfulness"].sel(order="exact", by=by)
        assert float(kept.sel(size=3)) == pytest.approx(1, abs=1e-7)  # a planted head looks elsewhere by about e⁻²⁰
        assert (kept.sel(size=[1, 2]) < 0.5).all()


# --- the toy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(3))
def test_what_is_trained_on_is_the_text_of_the_task(kind: int) -> None:
    ids, answers = toy.batch(np.random.default_rng(0), 5, np.array([kind, kind]))
    words = np.array(toy.WORDS)[ids.numpy()]
    tokenizer = toy.COURSE.tokenizer()
    for row, said in zip(ids.tolist(), words, strict=True):
        places = [f"the {thing} is in Box {letter}" for thing, letter in said[:8].reshape(4, 2)]
        asked = said[8:].reshape(2, -1)
        texts = {
            toy.WHERE: [f"The {one[1]} is in Box {one[2]}" for one in asked],
            toy.WHAT: [f"Box {one[1]} the {one[2]}" for one in asked],
            toy.CONTAINS: [f"Box {one[1]} contains the {one[3]}" for one in asked] if kind == toy.CONTAINS else [],
        }[kind]
        text = f"{', '.join(places)}. {'. '.join(texts)}".replace("the", "The", 1)
        assert tokenizer(text)["input_ids"] == row
        boxes = dict(said[:8].reshape(4, 2))
        for one, place in zip(asked, answers, strict=True):
            thing, letter = (one[1], one[2]) if kind == toy.WHERE else (one[-1], one[1])
            assert boxes[thing] == letter
            assert said[place] == one[-1]


def test_a_cut_run_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, name, few in (
        (toy, "BATCH", 4), (toy, "LOOKED_AT", 4), (training, "SAVE_EVERY", 2), (training, "YOUNG", 0.0)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, few)
    asked = argparse.Namespace(out=tmp_path / "whole", seed=0, steps=7, lr=0.01)
    training.train(toy.COURSE, asked)
    step, cut = training.Run.step, argparse.Namespace(**{**vars(asked), "out": tmp_path / "cut"})

    def until(self: Any) -> float:
        if self.record["step"] == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(training.Run, "step", until)
    with pytest.raises(KeyboardInterrupt):
        training.train(toy.COURSE, cut)
    assert json.loads((tmp_path / "cut" / "run.json").read_text("utf-8"))["step"] == 4
    monkeypatch.setattr(training.Run, "step", step)
    training.train(toy.COURSE, cut)
    whole, resumed = (load_file(tmp_path / name / "newest.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    young = uw.load(tmp_path / "cut" / "young")
    assert uw.solves(young, tracking.scenes(young, 4, 0, "query")).data.sizes["pair"] == 4
    with pytest.raises(SystemExit, match="other settings"):
        training.train(toy.COURSE, argparse.Namespace(**{**vars(cut), "steps": 9}))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_kept() -> None:
    tracked = importlib.import_module("tracked")
    found = tracked.kept("entity-tracking")
    own = found["found"]["model"]
    groups = tracked.groups(found, "model")
    for group, part in own["groups"].items():
        heads = [groups.loc[group, "head"]] if len(part) < 2 else groups.loc[group, "head"].tolist()
        assert heads == ([one["head"] for one in part] or ["none"])
    kept = own["circuits"]["all groups"]["kept"]
    assert tracked.circuits(found).loc[("model", "all groups"), "right"].startswith(f"{kept:.2f} [")
    assert {*tracked.across(found).index} >= {
        "nothing",
        "all",
        *(group for group, part in own["groups"].items() if part),
    }
    for by in ("roles", "groups"):
        table = tracked.carried(found, by)
        assert {*table.index.get_level_values("other")} == {*tracking.CARRIED}
    assert tracked.share(0.5, 4) == "0.50 [0.15, 0.85]"  # Wilson 1927, by hand
    assert found["weights"]["model"] != found["weights"]["young"]
    pages = Path(__file__).parents[1] / "docs" / "entity-tracking.md"
    assert set(re.findall(r"tracked\.(\w+)\(", pages.read_text("utf-8"))) <= {*vars(tracked)}
