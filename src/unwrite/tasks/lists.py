"""Which one is left of a list? Items named again but for one: the Laundry List (Merullo et al. 2024, 2406.09519)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from unwrite.errors import NumericError, whole
from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

TEMPLATES = (
    "We need to buy {all}. We have bought {some}. We still need to buy the",
    "The list says to get {all}. Anna already got {some}. Now she only has to get the",
    "Please bring {all}. Thank you for {some}. You only forgot the",
    "There should be {all} in the bag. I found {some}. What was missing is the",
)
_MOST = 12


def _scene(k: int, draw: Draw) -> Scene:
    template, missing = draw.turn(range(len(TEMPLATES))), draw.turn(range(k))
    items = draw.some("item", k)
    rest = [item for i, item in enumerate(items) if i != missing]
    slots = [f"kept{i}" for i in range(1, k)]
    slots.insert(missing, "missing")
    words = {"missing": items[missing], **{f"kept{i + 1}": item for i, item in enumerate(rest)}}
    words |= {f"bought{i + 1}": item for i, item in enumerate(draw.shuffled(rest))}
    named = {"all": _listed(slots), "some": _listed([f"bought{i}" for i in range(1, k)])}
    return Scene(
        f"t{template}",
        TEMPLATES[template].format_map(named),
        words,
        tuple(f" {item}" for item in [words["missing"], *rest]),
    )


def _listed(slots: list[str]) -> str:
    """the {a}, the {b} and the {c}"""
    *first, last = [f"the {{{slot}}}" for slot in slots]
    return f"{', '.join(first)} and {last}" if first else last


def _missing(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"bought1": scene.words["missing"]}, f" {scene.words['bought1']}"


def _order(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    bought = [slot for slot in scene.words if slot.startswith("bought")]
    if len(bought) < 2:
        raise NumericError("one item has no order", got="k=2", expected="k=3 or more", fix="choose another change")
    turned = [*bought[1:], bought[0]]
    return {to: scene.words[of] for to, of in zip(bought, turned, strict=True)}, scene.options[1]


def _items(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    """Other items, each in all the places of one."""
    there = list(dict.fromkeys(scene.words.values()))
    others = dict(zip(there, draw.some("item", len(there), there), strict=True))
    return {slot: others[word] for slot, word in scene.words.items()}, f" {others[scene.words['missing']]}"


def _task(k: int) -> Task:
    bought = tuple(f"bought{i}" for i in range(1, k))
    every = ("missing", *(f"kept{i}" for i in range(1, k)), *bought)
    return Task(
        "laundry", "A list, then all of it but one item again: which is left?", ("item",),
        {
            "missing": Change("the item that was missing is named instead of another one", ("bought1",), _missing),
            "order": Change("the items are named again in another order; the answer stays", bought, _order),
            "items": Change("other items in the same places", every, _items),
        },
        partial(_scene, k),
    )  # fmt: skip


TASK = _task(3)


def laundry(
    n: int, tokenizer: Any, seed: int = 0, change: str = "missing", *, k: int = 3, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """A list of `k` items, then all but one again: "We need to buy the milk, … We still need to buy the" → " milk".

    Four templates of our own, each as often with either place of the missing item in the list. Roles: "missing",
    "kept1", … (first mentions), "bought1", … (second mentions), "end". Arguments as in `uw.tasks.ioi`; `change`
    "missing", "order", "items"; `k` from 2 to 12; `words` of the kind "item". `against` is the item that would be left
    instead; for "order" another item.
    Raises as `uw.tasks.ioi` does. Source: Merullo et al. 2024, arXiv 2406.09519 (the task, not its wording).

    Example: `uw.solves(lm, uw.tasks.laundry(50, lm.tokenizer, k=6))`
    """
    whole("k is a number of items", k, 2, _MOST)
    return made(_task(k), n, tokenizer, seed, change, words, bos)
