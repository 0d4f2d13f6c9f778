"""Is every task what it says: roles on the right words, changes that change nothing else, no template more often?"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
import unwrite as uw
from unwrite.errors import NumericError, TokensError
from unwrite.model.load import view
from unwrite.tasks import NAMES
from unwrite.tasks.listed import TASKS
from unwrite.tasks.task import _own

CASES = [(name, change) for name in NAMES for change in TASKS[name].changes]


@cache
def tokenizer(digits: bool = False) -> Any:
    """As GPT-2's: bytes, a word with the space before it; numbers of two digits, or every digit by itself."""
    words = [word for kind in _own().values() for part in kind for word in ((part,) if isinstance(part, str) else part)]
    made = Tokenizer(BPE())
    numbers = pre_tokenizers.Split(Regex(r" ?\d" if digits else r" ?\d{1,2}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([numbers, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=9000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    spoken = [f" {word} {word}\n({word} {word}." for word in words]
    texts = [TASKS[name].example(seed) for name in NAMES for seed in range(9)] + [" is are he she is are he she"]
    made.train_from_iterator([*spoken, *texts, *(f"17{year:02} 17" for year in range(100))] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def made(name: str, n: int = 12, *, digits: bool = False, **asked: Any) -> uw.Pairs:
    return getattr(uw.tasks, name)(n, tokenizer(digits), **asked)


def text(tokens: uw.Tokens, i: int, digits: bool = False) -> str:
    return tokenizer(digits).decode(tokens.ids[i, : tokens.lengths[i]].tolist())


def word(tokens: uw.Tokens, i: int, row: int, digits: bool = False) -> str:
    return tokenizer(digits).decode([int(tokens.ids[i, row])])


# --- by hand ----------------------------------------------------------------------------------------------------------


def answered(name: str, prompt: str) -> str:
    """What goes on, found in the text alone, by rules that share nothing with how it was made."""
    if name == "ioi":
        names = re.findall("|".join([*_own()["female"], *_own()["male"]]), prompt)
        (left,) = [one for one, times in Counter(names).items() if times == 1]
        return f" {left}"
    if name == "laundry":
        first, rest = re.split(r"(?<=\w)\. ", prompt, maxsplit=1)
        items = re.findall(r"the (\w+)(?=[, ]|$)", first.replace("in the bag", ""))
        return f" {next(item for item in items if f'the {item}' not in rest)}"
    if name == "boxes":
        *places, asked = re.split(r"(?:, |\. )", prompt)
        letter = asked.split()[1]
        (place,) = [part for part in places if f"Box {letter}" in part]
        return " " + re.search(r"[Tt]he (\w+)", place)[1]  # pyright: ignore[reportOptionalSubscript]
    if name == "colored_objects":
        block = prompt.split("\nQ: ")[-1]
        thing = re.search(r"is the (\w+)\?", block)[1]  # pyright: ignore[reportOptionalSubscript]
        return " " + re.search(rf"a (\w+) {thing}[,.]", block)[1].capitalize()  # pyright: ignore
    if name in ("mcqa", "copy_colour"):
        capital = dict(_own()["country"])  # pyright: ignore[reportArgumentType]
        right = capital[re.search(r"of (\w+)\?", prompt)[1]] if name == "mcqa" else re.search(r"is (\w+)\.", prompt)[1]  # pyright: ignore
        letter = re.search(rf"^\(?(\w)[).] {right}$", prompt, re.MULTILINE)[1]  # pyright: ignore
        return letter if prompt.endswith("(") else f" {letter}"
    if name == "docstring":
        arguments = re.search(r"self, (.*)\)", prompt)[1].split(", ")  # pyright: ignore[reportOptionalSubscript]
        return f" {next(one for one in arguments if f'param {one}:' not in prompt)}"
    if name == "agreement":
        subject = prompt.split()[1]
        return " is" if any(subject == forms[0] for forms in _own()["noun"]) else " are"
    if name == "pronoun":
        return " she" if any(f" {one}" in prompt for one in _own()["female"]) else " he"
    if name == "capitals":
        return " " + next(row[1] for row in _own()["country"] if row[0] in prompt)
    raise AssertionError(name)


# Changes after which the prompt says something else, which is then what is compared to.
FLIPS = {
    ("ioi", "S2"), ("ioi", "both"), ("ioi", "names"), ("laundry", "missing"), ("laundry", "items"), ("boxes", "query"),
    ("boxes", "objects"), ("boxes", "labels"), ("colored_objects", "query"), ("colored_objects", "colors"),
    ("mcqa", "place"), ("mcqa", "labels"), ("mcqa", "question"), ("copy_colour", "place"), ("copy_colour", "labels"),
    ("mcqa", "shuffled"), ("mcqa", "following"), ("mcqa", "digits"), ("copy_colour", "shuffled"),
    ("copy_colour", "following"), ("copy_colour", "color"), ("docstring", "swap"), ("docstring", "answer"),
    ("agreement", "number"), ("pronoun", "gender"), ("capitals", "country"),
}  # fmt: skip
# Those after which it says the same.
STAYS = {
    ("ioi", "order"), ("laundry", "order"), ("agreement", "distractor"), ("agreement", "noun"), ("pronoun", "name"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), CASES)
@settings(max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_a_change_changes_what_it_says_and_nothing_else(name: str, change: str, seed: int) -> None:
    pairs = made(name, 8, change=change, seed=seed)
    moves = TASKS[name].changes[change].moves
    assert pairs.aligned
    for i in range(len(pairs)):
        length = pairs.base.lengths[i]
        rows = np.flatnonzero(pairs.base.ids[i, :length] != pairs.source.ids[i, :length])
        assert {*rows.tolist()} <= {int(pairs.roles[role][i]) for role in moves}
        assert rows.size
        base, source = text(pairs.base, i), text(pairs.source, i)
        answer, against = (tokenizer().decode([int(part[i])]) for part in (pairs.answer, np.asarray(pairs.against)))
        if name != "greater_than":
            assert answered(name, base) == answer
        if (name, change) in FLIPS:
            assert answered(name, source) == against
        if (name, change) in STAYS:
            assert answered(name, source) == answer != against
    assert all((pairs.roles[role] == pairs.source_roles[role]).all() for role in pairs.roles)


# What stands where a role is, by a pattern of the text in which the role is the group.
PLACES: dict[tuple[str, str], str] = {
    ("ioi", "S2"): r"(\w+)(?= (?:gave|handed|decided|passed))",
    ("ioi", "place"): r"(?:the|The) (\w+)(?=[,.]| \w+ and)",
    ("boxes", "query"): r"\. Box (\w)",
    ("colored_objects", "query"): r".*is the (\w+)\?",
    ("mcqa", "subject"): r"of (\w+)\?",
    ("copy_colour", "color"): r"is (\w+)\.",
    ("copy_colour", "query"): r"color is the (\w+)\?",
    ("docstring", "A_def"): r"self, (\w+)",
    ("docstring", "D_def"): r", (\w+)\)",
    ("docstring", "B_doc"): r"param \w+: .*\n.*param (\w+):",
    ("docstring", "name"): r"def (\w+)",
    ("agreement", "subject"): r"The (\w+)",
    ("agreement", "distractor"): r"the (\w+)$",
    ("capitals", "country"): r"of (\w+)",
}


@pytest.mark.parametrize(("name", "role"), PLACES)
def test_a_role_is_the_token_of_its_word(name: str, role: str) -> None:
    """Where the word stands more than once, also at the right place: the row is that of the text up to it."""
    pairs = made(name, 14)
    for i in range(len(pairs)):
        whole, row = text(pairs.base, i), int(pairs.roles[role][i])
        found = re.search(PLACES[name, role], whole, re.DOTALL if name == "colored_objects" else 0)
        assert found is not None
        assert word(pairs.base, i, row).strip() == found[1]
        assert len(tokenizer()(whole[: found.end(1)])["input_ids"]) == row + 1
        assert pairs.roles["end"][i] == pairs.base.lengths[i] - 1


def test_the_first_mention_and_the_second_are_different_roles() -> None:
    pairs = made("ioi", 28)
    for i in range(len(pairs)):
        s1, s2, io = (word(pairs.base, i, pairs.roles[role][i]) for role in ("S1", "S2", "IO"))
        assert s1 == s2 != io
        assert pairs.roles["S1"][i] < pairs.roles["S2"][i]
    pairs = made("laundry", 12, k=4)
    for i in range(len(pairs)):
        kept, bought = (
            {word(pairs.base, i, pairs.roles[f"{kind}{j}"][i]) for j in (1, 2, 3)} for kind in ("kept", "bought")
        )
        assert kept == bought
        assert word(pairs.base, i, pairs.roles["missing"][i]) not in kept


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_a_set_of_pairs_none_of_them_twice_and_no_template_more_often(name: str) -> None:
    few, many, other = made(name, 10, seed=3), made(name, 24, seed=3), made(name, 24, seed=4)
    assert few.about()["hash"] == many.take(np.arange(10)).about()["hash"] != other.take(np.arange(10)).about()["hash"]
    assert len({text(many.base, i) + text(many.source, i) for i in range(24)}) == 24
    counts = Counter(many.template)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) > 1
    assert "words of the kind" in many.base.notes[0]


@pytest.mark.parametrize("name", ["mcqa", "copy_colour", "boxes", "laundry", "colored_objects"])
def test_every_place_is_right_as_often(name: str) -> None:
    pairs = made(name, 36)
    role, others = {"laundry": ("missing", "kept"), "boxes": ("object", "object")}.get(name, ("label", "label"))
    role, others = ("object", "object") if name == "colored_objects" else (role, others)
    listed = [rows for known, rows in pairs.roles.items() if known.startswith(others)]
    places = Counter(sum((rows[i] < pairs.roles[role][i]) for rows in listed) for i in range(36))
    assert len({*places.values()}) == 1


def test_boxes_can_differ_in_the_letter_that_is_asked_for_or_in_its_place_alone() -> None:
    """What must then be said is found in the base prompt, by the letter or by the place of the source prompt."""
    for change in ("letter", "position"):
        pairs = made("boxes", 12, change=change, k=4)
        for i in range(len(pairs)):
            base, source = (re.split(r", |\. ", text(part, i)) for part in (pairs.base, pairs.source))
            letter, asked = source[-1].split()[1], base[-1].split()[1]
            places = [next(j for j, part in enumerate(one[:-1]) if f"Box {one[-1].split()[1]}" in part)
                      for one in (base, source)]  # fmt: skip
            against = tokenizer().decode([int(np.asarray(pairs.against)[i])]).strip()
            things, others = ({part.split()[1] for part in one[:-1]} for one in (base, source))
            assert not things & others
            if change == "letter":
                assert letter != asked
                assert places[0] == places[1]
                assert against in next(part for part in base if f"in Box {letter}" in part)
            else:
                assert not {part[-1] for part in base[:-1]} & {part[-1] for part in source[:-1]}
                assert places[0] != places[1]
                assert against in base[places[1]]


def test_other_labels_are_in_the_order_that_they_say() -> None:
    """Read off the source prompts, from the first option to the last."""

    def letters(change: str, of: int) -> list[str]:
        return re.findall(r"^\((\w)\)", text(made("mcqa", 8, change=change).source, of), re.MULTILINE)

    for i in range(8):
        shuffled, following, drawn = (letters(change, i) for change in ("shuffled", "following", "labels"))
        assert sorted(shuffled) == [*"ABCD"] != shuffled
        assert "".join(following) in "EFGHIJKLMNOPQRSTUVWXYZ"
        assert not {*drawn} & {*"ABCD"}
        assert letters("digits", i) == [*"1234"]
    assert len({tuple(letters("labels", i)) for i in range(8)}) > 4


def test_options_make_other_prompts() -> None:
    starts = [text(made("boxes", 1, form=form, k=2).base, 0) for form in ("box first", "in box", "colon")]
    assert [re.sub(r"Box \w", "Box", one).split(" the ")[0] for one in starts] == ["Box contains", "In Box is", "Box:"]
    assert [re.sub(r"Box \w", "Box", one).split(". ")[1] for one in starts] == [
        "Box contains the", "In Box is the", "Box: the"
    ]  # fmt: skip
    assert text(made("mcqa", 1, form="[A]").base, 0).endswith("Answer: [")
    assert made("boxes", 4, k=5).choices.shape == (4, 5)
    assert text(made("mcqa", 1, shots=2).base, 0).count("Question:") == 3
    assert text(made("copy_colour", 1).base, 0).endswith("Answer:")
    assert text(made("colored_objects", 1, shots=0).base, 0).count("Q:") == 1
    first = [
        pairs.roles["IO"] < pairs.roles["S1"]
        for pairs in (made("ioi", order=order) for order in ("ABB", "BAB", "both"))
    ]
    assert first[0].all()
    assert not first[1].any()
    assert {*first[2].tolist()} == {True, False}
    own = made("ioi", 8, words={"female": ["Anna", "Emma"], "male": ["Paul", "Peter"]})
    assert {word(own.base, i, own.roles["IO"][i]).strip() for i in range(8)} <= {"Anna", "Emma", "Paul", "Peter"}


def test_a_year_is_asked_for_as_the_tokenizer_cuts_it() -> None:
    for digits, pattern in ((False, r"17(\d\d) .*17$"), (True, r"17(\d)\d .*17$")):
        pairs = made("greater_than", 12, digits=digits)
        for i in range(len(pairs)):
            year = int(re.search(pattern, text(pairs.base, i, digits))[1])  # pyright: ignore[reportOptionalSubscript]
            later, earlier = (int(tokenizer(digits).decode([int(part[i])])) for part in (pairs.answer, pairs.against))
            assert earlier < year < later
            assert int(word(pairs.base, i, pairs.roles["year"][i], digits)) == year
            assert int(word(pairs.source, i, pairs.roles["year"][i], digits)) <= 1


BAD: dict[str, tuple[Any, type[uw.errors.UnwriteError], str]] = {
    "change": (lambda: made("ioi", change="S3"), NumericError, "change is unknown. Got: 'S3'. Expected: 'S2', 'order'"),
    "order": (lambda: made("ioi", order="ABA"), NumericError, "order is unknown"),
    "no pairs": (lambda: made("ioi", 0), NumericError, "n is a number of pairs"),
    "a seed": (lambda: made("ioi", seed=-1), NumericError, "seed is a number"),
    "no tokenizer": (lambda: uw.tasks.greater_than(3, None), TokensError, "needs a tokenizer"),
    "a model": (lambda: uw.tasks.ioi(3, object()), TokensError, "needs a tokenizer. Got: object"),
    "too many": (lambda: made("capitals", 5000, words={"country": [["France", "Paris"], ["Italy", "Rome"],
                 ["Japan", "Tokyo"], ["Spain", "Madrid"]]}), TokensError, "not so many different pairs of capitals"),
    "one item in order": (lambda: made("laundry", k=2, change="order"), NumericError, "one item has no order"),
    "items": (lambda: made("laundry", k=13), NumericError, "k is a number of items"),
    "form": (lambda: made("boxes", form="boxes"), NumericError, "form is unknown"),
    "shots": (lambda: made("mcqa", shots=-1), NumericError, "worked examples"),
    "few words": (lambda: made("laundry", words={"item": ["milk", "bread"]}), TokensError,
                  "needs words of the kind item .* Got: 2 for this tokenizer. Expected: 3"),
    "long words": (lambda: made("laundry", words={"item": ["qqxq", "zeppelinqq", "xxqqq"]}), TokensError, "Got: 0"),
    "another kind": (lambda: made("laundry", words={"fruit": ["milk"]}), TokensError, "no such kind of words"),
    "words are text": (lambda: made("laundry", words={"item": "milk"}), TokensError, "kind item cannot be these"),
    "two words": (lambda: made("laundry", words={"item": ["soy milk"]}), TokensError, "cannot be these"),
    "no capitals": (lambda: made("capitals", words={"country": ["France"]}), TokensError, "lists of 2 words, such as"),
    "words are a list": (lambda: made("laundry", words=["milk"]), TokensError, "lists by their kind"),
}  # fmt: skip


@pytest.mark.promise("errors")
@pytest.mark.parametrize("wrong", BAD)
def test_a_task_that_cannot_be_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make, kind, message = BAD[wrong]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_of_bytes_fills_no_template(name: str) -> None:
    with pytest.raises(TokensError, match=rf"{name} needs words of the kind|cannot fill year of greater_than"):
        getattr(uw.tasks, name)(4, uw.planted().tokenizer)


# --- solved -----------------------------------------------------------------------------------------------------------


def test_what_a_model_solves_is_what_its_logits_say() -> None:
    lm = view(tiny.model("gpt2", 0, vocab_size=len(tokenizer()), max_position_embeddings=64, n_positions=64))
    pairs = made("ioi", 14)
    found = uw.solves(lm, pairs, batch=5)
    with torch.no_grad():
        for i in range(len(pairs)):
            logits = lm.hf(torch.from_numpy(pairs.base.ids[i : i + 1, : pairs.base.lengths[i]])).logits[0, -1]
            own, other = logits[pairs.answer[i]], logits[pairs.choices[i][pairs.choices[i] != pairs.answer[i]]].max()
            assert float(found["margin"][i]) == pytest.approx(float(own - other), abs=1e-6)
            assert bool(found["solved"][i]) == bool(own > other)
            assert bool(found["top"][i]) == (int(logits.argmax()) == pairs.answer[i])
            assert float(found["prob"][i]) == pytest.approx(float(logits.softmax(-1)[pairs.answer[i]]), abs=1e-9)
    labels = np.array(pairs.template)
    for one in found["template"].values:
        mine = found["solved"].values[labels == one]
        assert float(found["accuracy"].sel(template=one)) == mine.mean()
        assert int(found["n"].sel(template=one)) == len(mine)
    assert str(int(found["solved"].sum())) in found.data.attrs["solves"]
    bare = uw.solves(lm, uw.pairs(pairs.base, pairs.source, pairs.answer))
    assert bare.data.attrs["chance"] == 0
    np.testing.assert_array_equal(bare["solved"], bare["top"])


def test_a_model_that_copies_solves_a_copy_and_a_random_one_does_not() -> None:
    lm = view(tiny.model("gpt2", 0))
    ids = torch.randint(3, 50, (40, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = lm.hf(ids).logits[:, -1].topk(2).indices
    right = uw.pairs(ids, ids + 0, best[:, 0].tolist(), best[:, 1].tolist())
    assert uw.solves(lm, right).data.attrs["verdict"] == "solved"
    wrong = uw.pairs(ids, ids + 0, best[:, 1].tolist(), best[:, 0].tolist())
    assert uw.solves(lm, wrong).data.attrs["verdict"] == "not solved"


@pytest.mark.parametrize("folder", ["smollm2-135m", "gemma3-270m"])
def test_real_tokenizers_fill_every_template(folder: str, real: Path) -> None:
    known = AutoTokenizer.from_pretrained(real / folder)
    for name, change in CASES:
        pairs = getattr(uw.tasks, name)(8, known, change=change)
        for i in range(8):
            length = pairs.base.lengths[i]
            rows = np.flatnonzero(pairs.base.ids[i, :length] != pairs.source.ids[i, :length])
            assert {*rows.tolist()} <= {int(pairs.roles[role][i]) for role in TASKS[name].changes[change].moves}
        for role in set(pairs.roles) - {"end", "year"}:
            assert known.decode([int(pairs.base.ids[0, pairs.roles[role][0]])]).strip().isalpha()
