"""Who gets it? Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from unwrite.errors import one_of
from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave a {object} to",
    "Then, {A} and {B} went to the {place}. {S2} gave a {object} to",
    "After {A} and {B} had a long talk at the {place}, {S2} handed a {object} to",
    "Then, {A} and {B} were working at the {place}. {S2} decided to give a {object} to",
    "While {A} and {B} were sitting in the {place}, {S2} passed the {object} to",
    "Friends {A} and {B} found a {object} at the {place}. {S2} gave it to",
    "The {place} {A} and {B} went to had a {object}. {S2} gave it to",
)
ORDERS = ("ABB", "BAB")
_NAMED = "female|male"


def _scene(orders: tuple[str, ...], draw: Draw) -> Scene:
    template, order = draw.turn(range(len(TEMPLATES))), draw.turn(orders)
    io, s = draw.some(_NAMED, 2)
    slots = ("{IO}", "{S1}") if order == "ABB" else ("{S1}", "{IO}")
    text = TEMPLATES[template].replace("{A}", slots[0]).replace("{B}", slots[1])
    words = {"IO": io, "S1": s, "S2": s, "place": draw.one("place"), "object": draw.one("object")}
    return Scene(f"t{template}", text, words, (f" {io}", f" {s}"))


def _swapped(moves: Mapping[str, str]) -> Any:
    """Slots that get the word of another one; what is compared to is always S."""
    return lambda scene, _: ({to: scene.words[of] for to, of in moves.items()}, scene.options[1])


def _renamed(order: bool, distinct: bool, scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    """Other names: in the same order, in the other order, or all three of them different."""
    one, other, third = draw.some(_NAMED, 3, (scene.words["IO"], scene.words["S1"]))
    words = {"IO": one, "S1": other, "S2": third if distinct else one if order else other}
    return words, scene.options[1] if order or distinct else f" {one}"


_NAMES = ("IO", "S1", "S2")
TASK = Task(
    "ioi", "Two people, one of whom gives something: who gets it?", ("female", "male", "place", "object"),
    {
        "S2": Change("the other one gives: the answer is the other name", ("S2",), _swapped({"S2": "IO"})),
        "order": Change(
            "the two names change places; who gives, and the answer, stay: where S1 is, alone", ("IO", "S1"),
            _swapped({"IO": "S1", "S1": "IO"}),
        ),
        "both": Change(
            "the names change places and the other one gives: who S is, alone", _NAMES,
            _swapped({"IO": "S1", "S1": "IO", "S2": "IO"}),
        ),
        "names": Change("other names in the same places", _NAMES, partial(_renamed, False, False)),
        "names+order": Change("other names, S1 in the other place", _NAMES, partial(_renamed, True, False)),
        "ABC": Change("three other names: nothing says who gets it", _NAMES, partial(_renamed, False, True)),
    },
    partial(_scene, ORDERS),
)  # fmt: skip


def ioi(
    n: int, tokenizer: Any, seed: int = 0, change: str = "S2", *, order: str = "both", words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Indirect object identification: "When Mary and John went to the store, John gave a drink to" → " Mary".

    Seven templates, each as often in either order of the names. Roles: "IO", "S1", "S2", "place", "object", "end".
    Arguments: `n` pairs; `tokenizer` as transformers has it; `seed`; `change` what is another in the source prompts:
    "S2", "order", "both", "names", "names+order", "ABC"; `order` "ABB", "BAB" or "both"; `words` lists of the caller's
    own by kind ("female", "male", "place", "object"), such as names that another set of pairs does not have; `bos` as
    in `uw.text`. `against` is S, but for "names" the new IO.
    Raises NumericError for unknown settings, TokensError for a tokenizer that cannot fill a template.
    Source: Wang et al. 2022, arXiv 2211.00593.

    Example: `uw.effects(lm, uw.tasks.ioi(32, lm.tokenizer), at=["S2", "end"])`
    """
    one_of("order", order, (*ORDERS, "both"))
    orders = ORDERS if order == "both" else (order,)
    return made(replace(TASK, scene=partial(_scene, orders)), n, tokenizer, seed, change, words, bos)
