"""Which word fits a short sentence? A verb that agrees, a pronoun, a capital."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

BETWEEN = ("near", "behind", "beside", "in front of", "next to", "across from")
PRONOUN = (
    "So {name} is a really great friend, isn't",
    "When {name} came home from work,",
    "I saw {name} at the station yesterday, but I do not think that",
    "Everybody likes {name}, because",
)
CAPITAL = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "As everybody knows, the capital of {country} is",
    "Q: What is the capital of {country}?\nA:",
)
_VERBS, _PRONOUNS, _OPTIONS = (" is", " are"), {"female": " she", "male": " he"}, 4


def _agreement(draw: Draw) -> Scene:
    """A noun of one number, and one of the other between it and the verb."""
    between, number = draw.turn(range(len(BETWEEN))), draw.turn((0, 1))
    subject, other = draw.some("noun", 2)
    words = {"subject": subject[number], "distractor": other[1 - number]}
    options = (_VERBS[number], _VERBS[1 - number])
    return Scene(f"t{between}", f"The {{subject}} {BETWEEN[between]} the {{distractor}}", words, options)


def _turned(slot: str) -> Any:
    """The noun of a slot in its other number."""

    def make(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
        forms = next(forms for forms in draw.words["noun"] if scene.words[slot] in forms)
        return {slot: forms[1 - forms.index(scene.words[slot])]}, scene.options[1]

    return make


def _noun(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    there = [forms for forms in draw.words["noun"] if {*scene.words.values()} & {*forms}]
    return {"subject": draw.one("noun", there)[_VERBS.index(scene.options[0])]}, scene.options[1]


def _pronoun(draw: Draw) -> Scene:
    template, kind = draw.turn(range(len(PRONOUN))), draw.turn(("female", "male"))
    other = "male" if kind == "female" else "female"
    return Scene(f"t{template}", PRONOUN[template], {"name": draw.one(kind)}, (_PRONOUNS[kind], _PRONOUNS[other]))


def _gender(other: bool) -> Any:
    """A name of the other gender, or of the same."""

    def make(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
        kind = next(kind for kind, word in _PRONOUNS.items() if word == scene.options[1 if other else 0])
        return {"name": draw.one(kind, [scene.words["name"]])}, scene.options[1]

    return make


def _capital(draw: Draw) -> Scene:
    template = draw.turn(range(len(CAPITAL)))
    listed = draw.some("country", _OPTIONS)
    return Scene(f"t{template}", CAPITAL[template], {"country": listed[0][0]}, tuple(f" {row[1]}" for row in listed))


def _country(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    country, capital = next(row for row in draw.words["country"] if f" {row[1]}" == scene.options[1])
    return {"country": country}, f" {capital}"


AGREEMENT = Task(
    "agreement", "A subject, and a noun of the other number before the verb: is or are?", ("noun",),
    {
        "number": Change("the subject is of the other number", ("subject",), _turned("subject")),
        "distractor": Change(
            "the noun between is of the other number; the answer stays", ("distractor",), _turned("distractor")
        ),
        "noun": Change("another subject of the same number; the answer stays", ("subject",), _noun),
    },
    _agreement,
)  # fmt: skip
PRONOUNS = Task(
    "pronoun", "A person by name: he or she?", ("female", "male"),
    {
        "gender": Change("a name of the other gender", ("name",), _gender(True)),
        "name": Change("another name of the same gender; the answer stays", ("name",), _gender(False)),
    },
    _pronoun,
)  # fmt: skip
CAPITALS = Task(
    "capitals", "A country: what is its capital?", ("country",),
    {"country": Change("another country", ("country",), _country)}, _capital,
)  # fmt: skip


def agreement(
    n: int, tokenizer: Any, seed: int = 0, change: str = "number", *, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """A verb that agrees with its subject: "The key near the cabinets" → " is" against " are".

    Six templates, each as often of either number. Roles: "subject", "distractor" (which is also the "end"). Arguments
    as in `uw.tasks.ioi`; `change` "number", "distractor", "noun"; `words` of the kind "noun" (each as one and as
    several). `against` is the other verb.
    Raises as `uw.tasks.ioi` does. Source: Linzen et al. 2016, arXiv 1611.01368.

    Example: `uw.effects(lm, uw.tasks.agreement(60, lm.tokenizer), at="subject")`
    """
    return made(AGREEMENT, n, tokenizer, seed, change, words, bos)


def pronoun(
    n: int, tokenizer: Any, seed: int = 0, change: str = "gender", *, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """A pronoun for a name: "So Mary is a really great friend, isn't" → " she" against " he".

    Four templates, each as often of either gender. Roles: "name", "end". Arguments as in `uw.tasks.ioi`; `change`
    "gender", "name"; `words` of the kinds "female" and "male".
    Raises as `uw.tasks.ioi` does. Source: Mathwin et al. 2023, "Identifying a preliminary circuit for predicting
    gendered pronouns in GPT-2 small" (the task, not its wording).

    Example: `uw.tasks.pronoun(60, lm.tokenizer)`
    """
    return made(PRONOUNS, n, tokenizer, seed, change, words, bos)


def capitals(
    n: int, tokenizer: Any, seed: int = 0, change: str = "country", *, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """A capital: "The capital of France is" → " Paris", against that of the source prompt's country.

    Four templates; the choices are four capitals. Roles: "country", "end". Arguments as in `uw.tasks.ioi`; `change`
    "country"; `words` of the kind "country" (each with its capital).
    Raises as `uw.tasks.ioi` does.

    Example: `uw.tasks.capitals(40, lm.tokenizer)`
    """
    return made(CAPITALS, n, tokenizer, seed, change, words, bos)
