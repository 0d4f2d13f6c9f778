"""Which letter has the right answer? Multiple choice, of what a model knows and of what it was just told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from unwrite.errors import TokensError, one_of, whole
from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

# How an option stands, how the answer is asked for, and what comes before and after the letter that follows.
FORMS = {
    "(A)": ("({label}) {option}", "Answer: (", "", ")"),
    "[A]": ("[ {label} ] {option}", "Answer: [", " ", " ]"),
    "A.": ("{label}. {option}", "Answer:", " ", ""),
}
_K, _MOST = 4, 5
_NUMBERS = ("", *map(str, range(2, _K + 1)))
_LETTERS, _DIGITS = "ABCD", "1234"
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _block(form: str, question: str, places: list[str]) -> str:
    """A question with its options, up to the letter."""
    option, ask, *_ = FORMS[form]
    lines = [option.format(label=f"{{label{i}}}", option=f"{{option{i}}}") for i in places]
    return "\n".join([question, *lines, ask])


def _asked(form: str, shots: int, known: bool, draw: Draw) -> Scene:
    """The right option has the slots without a number; the others are counted from 2."""
    examples = [_one(form, known, int(draw.rng.integers(_K)), draw) for _ in range(shots)]
    asked = _one(form, known, draw.turn(range(_K)), draw)
    end = f"{FORMS[form][3]}\n\n"
    before = [part.text.format_map(part.words) + part.options[0] + end for part in examples]
    return replace(asked, text="".join(before) + asked.text)


def _one(form: str, known: bool, place: int, draw: Draw) -> Scene:
    fillers = draw.some("country" if known else "color", _K)
    places = list(_NUMBERS[1:])
    places.insert(place, "")
    words = {f"label{i}": letter for i, letter in zip(places, _LETTERS, strict=True)}
    words |= {f"option{i}": part[1] if known else part[0] for i, part in zip(_NUMBERS, fillers, strict=True)}
    if known:
        question = "Question: What is the capital of {subject}?"
        words["subject"] = fillers[0][0]
    else:
        question = "The {thing} is {color}. What color is the {query}?"
        thing = draw.one("thing")
        words |= {"thing": thing, "query": thing, "color": fillers[0][0]}
    options = tuple(f"{FORMS[form][2]}{words[f'label{i}']}" for i in _NUMBERS)
    return Scene(f"{_LETTERS[place]} is right", _block(form, question, places), words, options)


def _place(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"option": scene.words["option2"], "option2": scene.words["option"]}, scene.options[1]


def _called(scene: Scene, labels: Sequence[str]) -> tuple[Mapping[str, str], str]:
    """Other labels, in the order in which the options stand, and that of the right option."""
    slots = sorted((f"label{i}" for i in _NUMBERS), key=scene.words.__getitem__)
    words = dict(zip(slots, labels, strict=True))
    space = scene.options[0][: -len(scene.words["label"])]
    return words, f"{space}{words['label']}"


def _labels(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    return _called(scene, draw.some("letter", _K, [*_LETTERS]))


def _shuffled(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    """Drawn until the right option has another letter; it has with three orders of four."""
    while (moved := _called(scene, draw.shuffled(_LETTERS)))[0]["label"] == scene.words["label"]:
        pass
    return moved


def _following(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    runs = [_ALPHABET[i : i + _K] for i in range(_K, len(_ALPHABET) - _K + 1)]
    known = [run for run in runs if set(run) <= set(draw.words["letter"])]
    if not known:
        got = ", ".join(map(str, draw.words["letter"])) or "none"
        raise TokensError("no four letters behind D that follow each other", got=got, fix="give them by words")
    return _called(scene, known[int(draw.rng.integers(len(known)))])


def _digits(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return _called(scene, _DIGITS)


def _color(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"color": scene.words["option2"]}, scene.options[1]


def _question(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    other = next(country for country, capital in draw.words["country"] if capital == scene.words["option2"])
    return {"subject": other}, scene.options[1]


_PLACE = Change("the right option and another one change places", ("option", "option2"), _place)
_NAMED = tuple(f"label{i}" for i in _NUMBERS)
_BOTH = {
    "place": _PLACE,
    "labels": Change("other letters, in no order", _NAMED, _labels),
    "shuffled": Change("the same letters in another order", _NAMED, _shuffled),
    "following": Change("other letters that follow each other", _NAMED, _following),
}
# After a space a digit is a token of its own for few tokenizers: not of what is asked for by "Answer:".
_DIGIT = Change("1 to 4 instead of letters", _NAMED, _digits)
MCQA = Task(
    "mcqa", "A question with four options: which letter?", ("country", "letter"),
    {**_BOTH, "digits": _DIGIT, "question": Change("another of them is right", ("subject",), _question)},
    partial(_asked, "(A)", 0, True),
)  # fmt: skip
COPY_COLOUR = Task(
    "copy_colour", "A thing has a colour, which is one of four options: which letter?", ("color", "thing", "letter"),
    {**_BOTH, "color": Change("the thing has another colour", ("color",), _color)},
    partial(_asked, "(A)", 0, False),
)  # fmt: skip


def mcqa(
    n: int, tokenizer: Any, seed: int = 0, change: str = "place", *, shots: int = 0, form: str = "(A)",
    words: Words | None = None, bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Multiple choice of capitals by letter: "Question: What is the capital of …?\\n(A) …\\nAnswer: (" → "B".

    Each letter is right as often; the templates are the letters. Roles: "option" and "label" (of the right one),
    "option2", "label2", … (of the others, in their order), "subject", "end". Arguments as in `uw.tasks.ioi`; `change`
    "place" and "question", or, with the letters of the source prompts, "labels" (others, in no order), "shuffled" (the
    same, in another order), "following" (E to H and the like), "digits"; `shots` worked examples before, 0 to 5; `form`
    "(A)", "[A]" or "A."; `words` of the kinds "country" (each with its capital) and "letter". `against` is what base
    prompts must give instead.
    Raises as `uw.tasks.ioi` does. Source: Lieberum et al. 2023, arXiv 2307.09458 (the form).

    Example: `uw.solves(lm, uw.tasks.mcqa(48, lm.tokenizer, shots=3))`
    """
    return _made(MCQA, True, n, tokenizer, seed, change, shots, form, words, bos)


def copy_colour(
    n: int, tokenizer: Any, seed: int = 0, change: str = "place", *, shots: int = 0, form: str = "A.",
    words: Words | None = None, bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Multiple choice of a colour that was just named: "The cup is red. What color is the cup?\\nA. …" → " B".

    As `uw.tasks.mcqa`, with the roles "thing", "color" and "query" in the place of "subject", the change "color" in
    that of "question", and none to digits; `words` of the kinds "color", "thing" and "letter". It asks for symbols
    alone: nothing has to be known.
    Source: Wiegreffe et al. 2024, arXiv 2407.15018.

    Example: `uw.solves(lm, uw.tasks.copy_colour(48, lm.tokenizer))`
    """
    return _made(COPY_COLOUR, False, n, tokenizer, seed, change, shots, form, words, bos)


def _made(
    task: Task, known: bool, n: int, tokenizer: Any, seed: int, change: str, shots: Any, form: Any, words: Any, bos: Any
) -> Pairs:
    whole("shots is a number of worked examples", shots, 0, _MOST)
    one_of("form", form, [*FORMS])
    return made(replace(task, scene=partial(_asked, form, shots, known)), n, tokenizer, seed, change, words, bos)
