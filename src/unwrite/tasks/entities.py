"""What is in the box? Entities and where they are (Kim and Schuster 2023; Prakash et al. 2024, arXiv 2402.14811)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from unwrite.errors import one_of, whole
from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

# How a box and what is in it stand, and how it is asked for.
FORMS = {
    "object first": ("the {object} is in Box {label}", "Box {query} contains the"),
    "box first": ("Box {label} contains the {object}", "Box {query} contains the"),
    "in box": ("in Box {label} is the {object}", "In Box {query} is the"),
    "colon": ("Box {label}: the {object}", "Box {query}: the"),
}
_MOST = 12


def _scene(k: int, form: str, draw: Draw) -> Scene:
    """The box that is asked about has the slots without a number; the others are counted from 2."""
    asked = draw.turn(range(k))
    numbers = ["", *map(str, range(2, k + 1))]
    words = {f"object{i}": word for i, word in zip(numbers, draw.some("thing", k), strict=True)}
    words |= {f"label{i}": word for i, word in zip(numbers, draw.some("letter", k), strict=True)}
    options = tuple(f" {words[f'object{i}']}" for i in numbers)
    places = numbers[1:]
    places.insert(asked, "")
    clause, ask = FORMS[form]
    parts = [clause.format(object=f"{{object{i}}}", label=f"{{label{i}}}") for i in places]
    text = f"{', '.join(parts)}. {ask}"
    return Scene(f"box {asked + 1}", text[0].upper() + text[1:], words | {"query": words["label"]}, options)


def _query(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"query": scene.words["label2"]}, f" {scene.words['object2']}"


def _objects(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    slots = [slot for slot in scene.words if slot.startswith("object")]
    words = draw.some("thing", len(slots), [scene.words[slot] for slot in slots])
    return dict(zip(slots, words, strict=True)), f" {words[0]}"


def _labels(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"label": scene.words["label2"], "label2": scene.words["label"]}, f" {scene.words['object2']}"


def _letter(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    swapped, _ = _labels(scene, draw)
    return {**swapped, **_objects(scene, draw)[0], "query": scene.words["label2"]}, f" {scene.words['object2']}"


def _position(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    slots = [slot for slot in scene.words if slot.startswith("label")]
    words = draw.some("letter", len(slots), [scene.words[slot] for slot in slots])
    moved = {**dict(zip(slots, words, strict=True)), **_objects(scene, draw)[0]}
    return {**moved, "query": moved["label2"]}, f" {scene.words['object2']}"


def _task(k: int, form: str) -> Task:
    numbers = ["", *map(str, range(2, k + 1))]
    objects, labels = (tuple(f"{kind}{i}" for i in numbers) for kind in ("object", "label"))
    return Task(
        "boxes", "Each object is in a box with a letter: what is in this one?", ("thing", "letter"),
        {
            "query": Change("another box is asked about", ("query",), _query),
            "objects": Change("other objects in the same boxes", objects, _objects),
            "labels": Change("two boxes change their letters", ("label", "label2"), _labels),
            "letter": Change(
                "other objects, two boxes change their letters, and the same place is asked about by its new letter: "
                "which letter, alone",
                (*objects, "label", "label2", "query"), _letter,
            ),
            "position": Change(
                "other objects and letters, and another place is asked about: which place, alone",
                (*objects, *labels, "query"), _position,
            ),
        },
        partial(_scene, k, form),
    )  # fmt: skip


TASK = _task(3, "object first")


def boxes(
    n: int, tokenizer: Any, seed: int = 0, change: str = "query", *, k: int = 3, form: str = "object first",
    words: Words | None = None, bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Objects in lettered boxes: "The pen is in Box C, the cup is in Box A, … . Box A contains the" → " cup".

    Each of the `k` places is asked about as often; the templates are these places. Roles: "object" and "label" (of the
    box that is asked about), "object2", "label2", … (of the others, in their order), "query", "end". Arguments as in
    `uw.tasks.ioi`; `change` "query", "objects", "labels", "letter", "position"; `k` from 2 to 12; `form` "object first"
    (as in the paper: no string can be matched), or with the box first and in other words "box first" ("Box C contains
    the pen"), "in box" ("In Box C is the pen"), "colon" ("Box C: the pen"); `words` of the kinds "thing" and "letter".
    `against` is the object that base prompts must name instead.
    Raises as `uw.tasks.ioi` does. Source: Prakash et al. 2024, arXiv 2402.14811.

    Example: `uw.tasks.boxes(50, lm.tokenizer, change="position", k=5)`
    """
    whole("k is a number of boxes", k, 2, _MOST)
    one_of("form", form, [*FORMS])
    return made(_task(k, form), n, tokenizer, seed, change, words, bos)
