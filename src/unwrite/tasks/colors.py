"""What colour is it? Colored Objects (Srivastava et al. 2022; Merullo et al. 2024, arXiv 2310.08744)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from unwrite.errors import whole
from unwrite.prompts.pairs import Pairs
from unwrite.tasks.task import Change, Draw, Scene, Task, Words, made

SEEN = ("there is", "you see", "I see")
_K, _MOST = 3, 4


def _block(seen: str, surface: str, slots: list[tuple[str, str]], query: str) -> str:
    """A question about things with colours, up to its answer."""
    *first, last = [f"a {color} {thing}" for color, thing in slots]
    return f"Q: On the {surface}, {seen} {', '.join(first)}, and {last}. What color is the {query}?\nA:"


def _example(draw: Draw) -> str:
    """A question with its answer."""
    colors, things = draw.some("color", _K), draw.some("thing", _K)
    asked = int(draw.rng.integers(_K))
    named = [(color[0], thing) for color, thing in zip(colors, things, strict=True)]
    block = _block(SEEN[int(draw.rng.integers(len(SEEN)))], draw.one("surface"), named, things[asked])
    return f"{block} {colors[asked][1]}\n"


def _scene(shots: int, draw: Draw) -> Scene:
    """The thing that is asked about has the slots without a number."""
    seen, asked = draw.turn(range(len(SEEN))), draw.turn(range(_K))
    colors, things = draw.some("color", _K), draw.some("thing", _K)
    numbers = ["", "2", "3"]
    words = {f"color{i}": color[0] for i, color in zip(numbers, colors, strict=True)}
    words |= {f"object{i}": thing for i, thing in zip(numbers, things, strict=True)}
    places = numbers[1:]
    places.insert(asked, "")
    block = _block(SEEN[seen], "{surface}", [(f"{{color{i}}}", f"{{object{i}}}") for i in places], "{query}")
    text = "".join(_example(draw) for _ in range(shots)) + block
    words |= {"query": things[0], "surface": draw.one("surface")}
    return Scene(f"t{seen}", text, words, tuple(f" {color[1]}" for color in colors))


def _query(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"query": scene.words["object2"]}, scene.options[1]


def _colors(scene: Scene, _: Draw) -> tuple[Mapping[str, str], str]:
    return {"color": scene.words["color2"], "color2": scene.words["color"]}, scene.options[1]


TASK = Task(
    "colored_objects", "Three things with colours: what colour is this one?", ("color", "thing", "surface"),
    {
        "query": Change("another thing is asked about", ("query",), _query),
        "colors": Change("the thing and another one change colours", ("color", "color2"), _colors),
    },
    partial(_scene, 1),
)  # fmt: skip


def colored_objects(
    n: int, tokenizer: Any, seed: int = 0, change: str = "query", *, shots: int = 1, words: Words | None = None,
    bos: int | bool | None = None,
) -> Pairs:  # fmt: skip
    """Things with colours: "Q: On the table, there is a red pen, … What color is the cup?\\nA:" → " Blue".

    Three templates, each as often with either place of the thing that is asked about. Roles: "object" and "color" (of
    the thing that is asked about), "object2", "color2", … (of the others, in their order), "query", "surface", "end".
    Arguments as in `uw.tasks.ioi`; `change` "query", "colors"; `shots` worked examples before, 0 to 4; `words` of the
    kinds "color" (each as in a sentence and as an answer), "thing", "surface". `against` is the other colour.
    Raises as `uw.tasks.ioi` does. Source: Merullo et al. 2024, arXiv 2310.08744.

    Example: `uw.tasks.colored_objects(50, lm.tokenizer, shots=2)`
    """
    whole("shots is a number of worked examples", shots, 0, _MOST)
    task = Task(TASK.name, TASK.says, TASK.kinds, TASK.changes, partial(_scene, shots))
    return made(task, n, tokenizer, seed, change, words, bos)
