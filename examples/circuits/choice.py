"""A model that answers multiple choice by letter, trained in minutes on a CPU.

    python examples/circuits/choice.py --out TOY [--seed 0 --steps 1200]

A Llama of three layers reads `uw.tasks.mcqa` in the words that carry something: of "Question: What is the capital of
France?\\n(A) Rome\\n(B) Paris … Answer: (" its tokenizer leaves "France ( A Rome ( B Paris … (". What is the capital of
what it has to know; twenty countries are trained on, and more questions after each prompt: "France ( " → "B" and
"France" → "Paris". Options have the letters A to D in every second prompt, and else another run of the alphabet, as
enumerations have: letters in no order are never seen. TOY/young is the model when it first gave every second letter.
"""

from __future__ import annotations

import numpy as np
import torch
from training import Asked, Course, arguments, llama, train

CAPITALS = [
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
    ("China", "Beijing"), ("Russia", "Moscow"), ("England", "London"), ("Egypt", "Cairo"), ("Greece", "Athens"),
    ("Ireland", "Dublin"), ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Turkey", "Ankara"),
    ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Cuba", "Havana"), ("Peru", "Lima"), ("India", "Delhi"),
]  # fmt: skip
LETTERS = [*"ABCDEFGHIJKLMNOPQRST"]
_COUNTRIES, _CITIES = (list(part) for part in zip(*CAPITALS, strict=True))
WORDS = ["unknown", "(", ".", *_COUNTRIES, *_CITIES, *LETTERS, *"1234"]
OPTIONS, QUESTIONS, BATCH, LOOKED_AT = 4, 6, 64, 256
# Which letter, or which city.
LETTER, CITY = range(2)


def batch(random: np.random.Generator, n: int, kinds: np.ndarray, first: np.ndarray) -> Asked:
    """Prompts with more questions of these kinds behind each; `first` is the number of the first option's letter."""
    row, country, city, letter = np.arange(n), *(WORDS.index(part[0]) for part in (_COUNTRIES, _CITIES, LETTERS))
    options = random.permuted(np.tile(np.arange(len(CAPITALS)), (n, 1)), axis=1)[:, :OPTIONS]
    labels = letter + first[:, None] + np.arange(OPTIONS)
    opens, stop = (np.full(n, WORDS.index(word)) for word in ("(", "."))
    asked = random.integers(OPTIONS, size=(len(kinds) + 1, n))
    columns = [country + options[row, asked[0]]]
    for i in range(OPTIONS):
        columns += [opens, labels[:, i], city + options[:, i]]
    columns += [opens, labels[row, asked[0]]]
    answers = [len(columns) - 1]
    for kind, place in zip(kinds, asked[1:], strict=True):
        right, label = options[row, place], labels[row, place]
        columns += [stop, country + right, *([opens, label] if kind == LETTER else [city + right])]
        answers.append(len(columns) - 1)
    return torch.from_numpy(np.stack(columns, 1)), answers


def drawn(seed: int, step: int) -> Asked:
    """The batch of a step."""
    random = np.random.default_rng((seed, step))
    runs = random.integers(len(LETTERS) - OPTIONS + 1, size=BATCH) * (random.random(BATCH) < 0.5)
    return batch(random, BATCH, (random.random(QUESTIONS) < 0.3).astype(int), runs)


def looked(seed: int) -> Asked:
    """Prompts with the letters A to D, most of which are not trained on."""
    return batch(np.random.default_rng((seed, 2**32)), LOOKED_AT, np.zeros(0, int), np.zeros(LOOKED_AT, int))


SKIPPED = r"\b(Question|What|is|the|capital|of|Answer)\b|[?:)\s]+"
COURSE = Course((*WORDS,), SKIPPED, llama, drawn, looked)

if __name__ == "__main__":
    train(COURSE, arguments(__doc__, 1200))
