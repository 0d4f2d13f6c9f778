"""Which argument is described next? A docstring (Heimersheim and Janiak 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

TEMPLATES = (
    'def {name}(self, {A_def}, {B_def}, {C_def}, {D_def}):\n    """0 1 2\n\n    :param {A_doc}: 3 4\n    '
    ":param {B_doc}: 5 6\n    :param",
    'def {name}(self, {A_def}, {B_def}, {C_def}, {D_def}):\n    """0 1\n\n    @param {A_doc}: 2 3\n    '
    "@param {B_doc}: 4 5 6\n    @param",
)
_ARGUMENTS, _WORDS = 4, 7


def _scene(draw: Draw) -> Scene:
    template = draw.turn(range(len(TEMPLATES)))
    name, *arguments = draw.some("argument", _ARGUMENTS + 1)
    text = TEMPLATES[template]
    for i, word in enumerate(draw.some("filler", _WORDS)):
        text = text.replace(str(i), word)
    a, b, c, d = arguments
    words = {"name": name, "A_def": a, "B_def": b, "C_def": c, "D_def": d, "A_doc": a, "B_doc": b}
    return Scene(f"t{template}", text, words, tuple(f" {word}" for word in (c, a, b, d)))


def _swap(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"C_def": scene.words["D_def"], "D_def": scene.words["C_def"]}, f" {scene.words['D_def']}"


def _answer(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    other = draw.one("argument", [*scene.words.values()])
    return {"C_def": other}, f" {other}"


def _described(scene: Scene, draw: Draw) -> tuple[Mapping[str, str], str]:
    one, other = draw.some("argument", 2, [*scene.words.values()])
    return {"A_doc": one, "B_doc": other}, f" {scene.words['A_def']}"


TASK = Task(
    "docstring", "Arguments of a function, described one by one: which is next?", ("argument", "filler"),
    {
        "swap": Change("the third and fourth argument change places", ("C_def", "D_def"), _swap),
        "answer": Change("the third argument has another name", ("C_def",), _answer),
        "described": Change("other names are described: nothing says which is next", ("A_doc", "B_doc"), _described),
    },
    _scene,
)  # fmt: skip


def docstring(
    n: int, tokenizer: Any, seed: int = 0, change: str = "swap", *, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Four arguments, of which two are described: "def port(self, load, size, files, last): …" → " files".

    Two templates. Roles: "A_def" … "D_def" (the arguments), "A_doc", "B_doc" (where they are described), "name", "end".
    Arguments as in `uw.tasks.ioi`; `change` "swap", "answer", "described"; `words` of the kinds "argument", "filler".
    The choices are the four arguments; `against` the third one of the source prompt, for "described" the first.
    Raises as `uw.tasks.ioi` does. Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer
    attention-only transformer".

    Example: `uw.tasks.docstring(50, lm.tokenizer)`
    """
    return made(TASK, n, tokenizer, seed, change, words, bos)
