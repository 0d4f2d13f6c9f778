"""Are the measurements of examples/circuits and examples/channels on multiple choice, boxes, lists and names those of
plain passes by hand?"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unwrite as uw
from test_tracking import PLANTED, by_hand, toy, training

choice, choosing, boxes, reuse, measure = (
    importlib.import_module(name) for name in ("choice", "choosing", "boxes", "reuse", "measure")
)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "channels"))
names, inhibition, induction = (importlib.import_module(name) for name in ("names", "inhibition", "induction"))
DOCS = Path(__file__).parents[1] / "docs"


# --- multiple choice --------------------------------------------------------------------------------------------------


def test_what_the_toy_of_choices_is_trained_on_is_the_text_of_the_task() -> None:
    ids, answers = choice.batch(np.random.default_rng(0), 6, np.array([0, 1]), np.array([0, 0, 3, 16, 7, 1]))
    words, tokenizer = np.array(choice.WORDS)[ids.numpy()], choice.COURSE.tokenizer()
    capital = dict(choice.CAPITALS)
    for row, said in zip(ids.tolist(), words, strict=True):
        country, options, more = said[0], said[1:13].reshape(4, 3), said[14:]
        lines = "\n".join(f"({letter}) {city}" for _, letter, city in options)
        text = f"Question: What is the capital of {country}?\n{lines}\nAnswer: ("
        assert tokenizer(text)["input_ids"] == row[:14]
        letters = {city: letter for _, letter, city in options}
        assert "".join(letters.values()) in "ABCDEFGHIJKLMNOPQRST"
        assert more[0] == letters[capital[country]]
        assert (more[1], more[3], more[4]) == (".", "(", letters[capital[more[2]]])
        assert (more[5], more[7]) == (".", capital[more[6]])
        assert answers == [14, 18, 21]
    seen = choice.drawn(0, 3)[0][:, 2]
    assert 0.3 < float((seen == choice.WORDS.index("A")).float().mean()) < 0.8  # half of them, and by chance a few


@cache
def untrained() -> Any:
    return uw.load(choice.COURSE.build(0).double().eval(), tokenizer=choice.COURSE.tokenizer())


def test_no_direction_is_the_mean_and_all_directions_are_the_model() -> None:
    """Also against plain arithmetic: the loss is that of a softmax over the four labels alone."""
    lm, heads = untrained(), ["L1H1", "L2H0"]
    pairs = choosing.prompts(lm, 12, 1)
    with torch.no_grad():
        plain = lm.hf(torch.from_numpy(pairs.base.ids)).logits[:, -1].numpy()
    chosen = np.take_along_axis(plain, np.asarray(pairs.choices), 1)
    want = np.log(np.exp(chosen).sum(1)) - plain[np.arange(12), pairs.answer]
    np.testing.assert_allclose(choosing.loss(lm, pairs, pairs.base, pairs.answer, []), want, atol=1e-9)
    for side in ("q", "k"):
        with uw.trace(lm, *(f"{head}.{side}" for head in heads)) as seen, torch.no_grad():
            lm.hf(torch.from_numpy(pairs.base.ids))
        parts = {head: choosing.centred(seen[f"{head}.{side}"], pairs, side) for head in heads}
        bases = {head: torch.linalg.svd(part, full_matrices=True)[2] for head, (part, _) in parts.items()}
        means = {head: mean for head, (_, mean) in parts.items()}
        edits = [choosing.kept(pairs, side, bases, means, k) for k in (0, 16)]
        none, whole = (choosing.loss(lm, pairs, pairs.base, pairs.answer, part) for part in edits)
        np.testing.assert_allclose(whole, want, atol=1e-6)
        assert np.abs(none - want).max() > 1e-4
        with uw.trace(lm, f"{heads[0]}.{side}", edits=edits[0]) as seen, torch.no_grad():
            lm.hf(torch.from_numpy(pairs.base.ids))
        left = seen[f"{heads[0]}.{side}"][torch.arange(12)[:, None], choosing.rows(pairs, side)]
        assert float(left.std(0 if side == "q" else 1).max()) < 1e-6


def test_labels_are_answered_as_the_source_prompts_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "JUDGED", 16)
    lm = untrained()
    for line in choosing.answered(lm):
        change = "" if line["labels"] == "A to D" else line["labels"]
        pairs = choosing.prompts(lm, choosing.JUDGED, 3, change or "place")
        with torch.no_grad():
            top = lm.hf(torch.from_numpy((pairs.source if change else pairs.base).ids)).logits[:, -1].argmax(-1)
        right = np.asarray(pairs.against) if change else pairs.answer
        assert line["right"] == int((top.numpy() == right).sum())
        assert line["by place"] == int((top.numpy() == pairs.answer).sum())


# --- boxes ------------------------------------------------------------------------------------------------------------


def asked(change: str) -> uw.Pairs:
    chosen = {"thing": toy.THINGS, "letter": toy.LETTERS}
    return uw.tasks.boxes(16, by_hand().tokenizer, 0, change, k=4, words=chosen, bos=False)


@pytest.mark.promise("planted")
@pytest.mark.parametrize(
    ("change", "at", "head"), [("position", "end", "B"), ("position", "query", "C"), ("objects", "end", "A")]
)
def test_what_is_said_is_what_the_planted_head_carries(change: str, at: str, head: str) -> None:
    """And what another head destroys is told from it: A's things of another scene are none of the base prompt's."""
    lm, pairs = by_hand(), asked(change)
    patched = {"none": [], "all": [*PLANTED.values()], "own": [PLANTED[head]], "A": ["L3H0"]}
    found = boxes.said(lm, pairs, at, patched)
    assert found["none"] == [16, 0, 0, 0]
    assert found["own"] == [0, 16, 0, 0]
    if change == "position" and at == "end":
        assert found["A"] == [0, 0, 0, 16]


@pytest.mark.promise("planted")
def test_a_place_is_said_where_the_planted_head_hands_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """B brings the place; A, whose things are those of another prompt, says none of this one's places."""
    monkeypatch.setattr(boxes, "BOXES", 4)
    pairs = asked("position")
    places = [int(str(label).split()[1]) - 1 for label in pairs.template or ()]
    sources = [(torch.from_numpy(pairs.base.ids[i : i + 1]), place) for i, place in enumerate(places)]
    found = boxes.by_place(by_hand(), pairs, sources, ["L2H0"])
    assert found == {"pairs": 16, "both": 16, "first": 0, "last": 0, "own": 0, "third": 0, "else": 0}
    assert boxes.by_place(by_hand(), pairs, sources, ["L0H1"])["own"] == 16


def test_random_sets_have_as_many_heads_of_every_layer_or_none_of_those_chosen() -> None:
    heads = [f"L{layer}H{unit}" for layer in range(5) for unit in range(4)]
    made = boxes.sets(heads, ["L1H0", "L1H2", "L3H1"])
    assert made["others"] == [head for head in heads if head not in made["chosen"]]
    for name, drawn in made.items():
        if name.startswith("same"):
            assert sorted(head[:2] for head in drawn) == ["L1", "L1", "L3"]
            assert {*drawn} != {*made["chosen"]}
        if name.startswith("any"):
            assert len({*drawn} & {*made["others"]}) == 3


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("executed")
def test_an_override_of_the_last_token_is_that_of_a_whole_pass() -> None:
    """All but the last token is read once; here everything is read again, with the pattern written by hand."""
    lm = uw.load("default")
    pairs = uw.tasks.laundry(6, lm.tokenizer, 0, k=3, bos=False)
    rows, head = reuse.bought(pairs, 3), "L2H1"
    got = reuse.answered(
        lm, pairs, {"none": None, "half": reuse.Override((head,), rows, 0.5), "out": reuse.Override((head,), None)}
    )
    for name in got:
        want = []
        for i in range(6):
            ids = torch.from_numpy(pairs.base.ids[i : i + 1, : pairs.row[i] + 1])

            def half(pattern: torch.Tensor, i: int = i) -> torch.Tensor:
                new = pattern.clone()
                new[:, -1] *= 0.5
                new[:, -1, rows[i]] += 0.25
                return new

            edits = {"none": [], "half": [uw.Edit.set(f"{head}.pattern", half)], "out": [uw.Edit.set(head, 0.0, at=-1)]}
            with uw.trace(lm, edits=edits[name]), torch.no_grad():
                logits = lm.hf(ids).logits[0, -1]
            choices = np.asarray(pairs.choices[i])
            want.append(choices[int(logits[choices].argmax())] == pairs.answer[i])
        assert got[name].tolist() == want


def test_the_interval_of_a_gain_is_that_of_agresti_and_min() -> None:
    """Of 1,600 asked twice 150 changed one way and 86 the other (Agresti's approval ratings): −.06 to −.02."""
    low, high = reuse.gained(86, 150, 1600)
    assert (round(low, 3), round(high, 3)) == (-0.059, -0.021)
    assert reuse.gained(0, 0, 120)[0] < 0 < reuse.gained(0, 0, 120)[1]


@pytest.mark.slow
def test_a_real_model_hands_a_place_on_and_does_not_choose_by_letter(real: Path) -> None:
    """Gemma 3 270M (docs/masks.md, docs/multiple-choice.md); inequalities alone, since weights are quantised."""
    lm = uw.load(real / "gemma3-270m", dtype="float32")
    pairs, _ = boxes.solved(lm, "position", boxes.JUDGED, 2)
    heads = ["L9H2", "L10H0", "L10H1", "L10H3", "L12H2"]
    found = boxes.said(lm, pairs.take(range(24)), "end", {"all": boxes.heads_from(lm, 0), "chosen": heads})
    assert found["all"][1] == 0
    assert found["chosen"][1] > 2 * found["chosen"][2]
    assert uw.solves(lm, uw.tasks.mcqa(40, lm.tokenizer)).data.attrs["verdict"] == "not solved"


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_was_kept() -> None:
    for name in ("multiple-choice", "multiple-choice-1"):
        own = {one["labels"]: one for one in measure.kept(name, "mcqa")["answered"]["model"]}
        assert own["A to D"]["right"] > 0.95 * 240 > 0.95 * own["following"]["right"] > 0.85 * 240
        assert own["shuffled"]["by place"] > 0.7 * 240
        assert own["labels"]["right"] < 0.25 * 240
        assert measure.kept(name, "mcqa")["about"]["output"].startswith("MLP2")
    found = measure.kept("multiple-choice", "mcqa")
    nodes = choosing.kept_nodes(found)
    assert [*nodes.index[nodes["output"]]] == found["about"]["output"].split(", ")
    answers = choosing.kept_answers(found)
    own = {one["labels"]: one for one in found["answered"]["model"]}
    for labels, one in own.items():
        assert answers.loc[labels, ("model", "right")].startswith(f"{one['right'] / one['n']:.2f} [")
    assert choosing.recovered(found["ranks"]["k"]["svd"], found["ranks"]["k"]["whole"])[1] > 0.95
    lists = measure.kept("smollm2-135m", "reuse")
    assert len(reuse.kept_choices(lists)) == 6
    assert reuse.kept_repairs(lists).shape[0] == 12
    for one in measure.kept("gemma3-270m", "boxes")["lines"]:
        own, demanded, third, _ = one["says"]["chosen"]
        assert own + demanded + third <= one["pairs"]
        if (one["change"], one["at"]) == ("position", "end"):
            assert demanded > 3 * third
            assert one["says"]["all"][1] == 0
        if one["change"] == "letter":
            assert demanded == 0
    assert len(boxes.kept_boxes(measure.kept("gemma3-270m", "boxes"))) == 8
    moved = {one["variant"]: one for one in measure.kept("gemma3-270m", "places")["lines"]}
    for variant in ("as the base prompt", "fewer words", "other words", "text before"):
        assert moved[variant]["both"] > 1.9 * moved[variant]["third"]
    assert moved["things first"]["both"] < moved["things first"]["third"]
    assert len(boxes.kept_places({"lines": [*moved.values()]})) == 9
    for page, module in (("multiple-choice", choosing), ("circuits", reuse), ("masks", boxes)):
        text = (DOCS / f"{page}.md").read_text("utf-8")
        assert set(re.findall(rf"\b{module.__name__}\.(\w+)\(", text)) <= {*vars(module)}


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_the_toy_of_names_is_trained_on_is_the_text_of_the_task() -> None:
    """Every prompt of the task is one that training draws: the same slots in the same places, and what comes then."""
    tokenizer = names.COURSE.tokenizer()
    pairs = uw.tasks.ioi(70, tokenizer, words=names.ASKED, bos=False)
    drawn = {pattern(row[:6], row[6]) for row in names.batch(np.random.default_rng(0), 600)[0].tolist()}
    assert {pattern(row, answer) for row, answer in zip(pairs.base.ids.tolist(), pairs.answer, strict=True)} == drawn
    assert len(drawn) == 6  # three layouts in two orders


def pattern(ids: list[int], answer: int) -> tuple[Any, ...]:
    """Of each token its kind, of names which of those before it is the same, and of the answer, too."""
    words = [names.WORDS[i] for i in [*ids, answer]]
    kinds = ["name" if w in names.NAMES else "place" if w in names.PLACES else "object" if w in names.OBJECTS else w
             for w in words]  # fmt: skip
    return tuple((kind, words.index(word) if kind == "name" else 0) for kind, word in zip(kinds, words, strict=True))


@pytest.mark.slow
def test_a_trained_toy_turns_away_from_a_name_wherever_it_stood(tmp_path: Path) -> None:
    """Sheet 6f: all right after 200 steps, and what the last token knows of S is who, not where."""
    training.train(names.COURSE, argparse.Namespace(out=tmp_path, seed=0, steps=200, lr=0.01))
    lm = uw.load(tmp_path / "model")
    found = inhibition.carried(lm)
    assert float(uw.solves(lm, inhibition.pairs(lm, 9, 200))["top"].mean()) > 0.97
    for layer in range(3):
        where, who, both = (found[what]["effect"][layer] for what in ("where S1 is", "who S is", "both"))
        assert abs(where) < 0.05 * abs(who)
        assert who == pytest.approx(both, rel=0.05)
        assert who < -1.5 * found["both"]["clean"]  # the answer is the other name then


@pytest.mark.slow
def test_what_finds_a_letter_in_a_trained_toy_reads_the_previous_token_head_by_its_keys(tmp_path: Path) -> None:
    """Sheet 6e: patterns name the heads, and weights alone the edge; by queries and values it is another's, or none."""
    training.train(toy.COURSE, argparse.Namespace(out=tmp_path, seed=0, steps=800, lr=0.01))
    found = induction.measured(str(tmp_path))
    assert len(found["previous"]) == 1
    lines = [line for line in found["lines"] if line["again"] > 0.9]
    assert len({line["reader"] for line in lines}) >= 2
    for line in lines:
        first = line["rank"] == line["rank_whole"] == 1 and line["score"] > line["random"]
        assert first == (line["side"] == "k")
