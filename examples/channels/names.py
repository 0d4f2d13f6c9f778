"""A model that says who gets it, trained in a minute on a CPU.

    python examples/channels/names.py --out TOY [--seed 0 --steps 400]

A GPT-2 of three layers and width 48 reads `uw.tasks.ioi` in the words that carry something: its tokenizer leaves of
"When Mary and John went to the store, John gave a drink to" only "Mary John store John drink to". It is trained on the
name that comes then, and on nothing else. TOY/young is the model when it first named every second one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config

sys.path.append(str(Path(__file__).parents[1] / "circuits"))

from training import Asked, Course, arguments, train

NAMES = [
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Anna", "Alice", "Emma", "Kate", "Laura", "Sarah", "Jack",
    "Peter", "Mark", "Paul", "Simon", "Adam", "Ben", "Ruth", "Lucy", "Rose", "Jane",
]  # fmt: skip
PLACES, OBJECTS = ["store", "park", "school", "station"], ["drink", "book", "ring", "ball"]
WORDS = ["?", "to", *NAMES, *PLACES, *OBJECTS]
# In what order the words of a prompt stand, over the seven templates of the task.
LAYOUTS = [
    *5 * [("A", "B", "place", "S", "object")], ("A", "B", "object", "place", "S"), ("place", "A", "B", "object", "S"),
]  # fmt: skip
BATCH, LOOKED_AT = 128, 512
ASKED = {"female": NAMES[::2], "male": NAMES[1::2], "place": PLACES, "object": OBJECTS}


def batch(random: np.random.Generator, n: int) -> Asked:
    """Prompts with the name that comes then, in the seven templates and both orders by chance."""

    def some(words: list[str], k: int) -> np.ndarray:
        return random.permuted(np.tile(np.arange(len(words)), (n, 1)), axis=1)[:, :k].T + WORDS.index(words[0])

    (one, other), place, thing = some(NAMES, 2), *some(PLACES, 1), *some(OBJECTS, 1)
    second = random.random(n) < 0.5
    slots = {"A": one, "B": other, "S": np.where(second, other, one), "place": place, "object": thing}
    layouts = random.integers(len(LAYOUTS), size=n)
    ids = np.empty((n, 7), np.int64)
    for i, layout in enumerate(LAYOUTS):
        rows = layouts == i
        ids[rows, :5] = np.stack([slots[slot][rows] for slot in layout], 1)
    ids[:, 5], ids[:, 6] = WORDS.index("to"), np.where(second, one, other)
    return torch.from_numpy(ids), [6]


_KEPT = "|".join(["to(?! [a-z])", *PLACES, *OBJECTS])
COURSE = Course(
    (*WORDS,), rf"\b(?!({_KEPT})\b)[a-z]+\b|\b(When|Then|After|While|Friends|The)\b|[,.\s]+",
    lambda words: GPT2Config(
        vocab_size=words, n_embd=48, n_layer=3, n_head=4, n_positions=16, initializer_range=0.1, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    ),
    lambda seed, step: batch(np.random.default_rng((seed, step)), BATCH),
    lambda seed: batch(np.random.default_rng((seed, 2**32)), LOOKED_AT),
)  # fmt: skip

if __name__ == "__main__":
    train(COURSE, arguments(__doc__, 400))
