"""A model that tracks entities, trained in minutes on a CPU.

    python examples/circuits/toy.py --out TOY [--seed 0 --steps 800]

A Llama of three layers reads `uw.tasks.boxes` in the words that carry something: its tokenizer skips "the", "is",
"in", "Box" and commas, so that "The pen is in Box C, … . Box C contains the" is "pen C … . C contains". It is trained
on scenes of four boxes with eight questions each, drawn with replacement and of three kinds: where a thing is ("pen" →
"C"), what is in a box ("C" → "pen"), and what a box contains ("C contains" → "pen"); of the last kind alone it stays
at chance for far longer. TOY/young is the model when it first named every second thing, TOY/model the same run at its
end.
"""

from __future__ import annotations

import numpy as np
import torch
from training import Asked, Course, arguments, llama, train

THINGS = ["pen", "cup", "book", "ball", "key", "phone", "hat", "bag", "ring", "plate"]
LETTERS = [*"ABCDEFGHKL"]
WORDS = ["?", ".", "contains", *THINGS, *LETTERS]
BOXES, QUESTIONS, BATCH, LOOKED_AT = 4, 8, 64, 256
WHERE, WHAT, CONTAINS = range(3)


def batch(random: np.random.Generator, n: int, kinds: np.ndarray) -> Asked:
    """Scenes with questions of these kinds."""

    def some(words: list[str]) -> np.ndarray:
        return random.permuted(np.tile(np.arange(len(words)), (n, 1)), axis=1)[:, :BOXES] + WORDS.index(words[0])

    things, letters, row = some(THINGS), some(LETTERS), np.arange(n)
    stop, contains = (np.full(n, WORDS.index(word)) for word in (".", "contains"))
    columns = [part[:, i] for i in range(BOXES) for part in (things, letters)]
    answers = []
    for kind, asked in zip(kinds, random.integers(BOXES, size=(len(kinds), n)), strict=True):
        thing, letter = things[row, asked], letters[row, asked]
        columns += {WHERE: [stop, thing, letter], WHAT: [stop, letter, thing],
                    CONTAINS: [stop, letter, contains, thing]}[int(kind)]  # fmt: skip
        answers.append(len(columns) - 1)
    return torch.from_numpy(np.stack(columns, 1)), answers


def drawn(seed: int, step: int) -> Asked:
    """The batch of a step."""
    random = np.random.default_rng((seed, step))
    return batch(random, BATCH, random.integers(3, size=QUESTIONS))


def looked(seed: int) -> Asked:
    """Scenes, none of which is trained on, of which it says what a box contains."""
    return batch(np.random.default_rng((seed, 2**32)), LOOKED_AT, np.array([CONTAINS]))


COURSE = Course((*WORDS,), r"\b([Tt]he|is|in|Box)\b|[,\s]+", llama, drawn, looked)

if __name__ == "__main__":
    train(COURSE, arguments(__doc__, 800))
