"""What can be asked of a model? One list of methods, for every test that holds for all of them.

A new method gets a line in METHODS; a test fails until it has one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import unwrite as uw
from unwrite.model.view import Model
from unwrite.nodes import PROJECTED, parse_node
from unwrite.run.tally import without
from unwrite.stats import bootstrap

# A method of a model on little input. It passes on what all methods take: `checkpoint`, `listener` and, where a person
# chooses it, `batch`.
Method = Callable[..., uw.Result]

IDS = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
PAIRS = uw.pairs(IDS[:2], IDS[2:], 5, 9)
FOUR = uw.pairs(IDS, IDS.flip(0), 5, 9)
ROLES = uw.pairs(IDS[:2], IDS[2:, :5], 5, 9, roles={"a": [1, 2]}, source_roles={"a": [3, 0]})
HEADS = ("L0H0", "L1H1")


def there(lm: Model, *names: str) -> list[str]:
    """Nodes of these names; for a head of a layer without attention one of its mixer, or of the next that has one."""
    found: dict[str, None] = {}
    for node in map(parse_node, names):
        if node.kind == "head":
            later = [one for one in lm.parts if one.kind in PROJECTED and one.layer >= node.layer]
            own = [one for one in later if one.layer == later[0].layer]
            node = own[node.head % len(own)]
        found |= {str(node): None} if node in lm.parts else {}
    return [*found]


def chatting(lm: Model) -> Model:
    """The same model, with a tokenizer of bytes that has a chat template."""
    tokenizer = copy.deepcopy(uw.planted().tokenizer)
    tokenizer.chat_template = "{% for one in messages %}{{ one['role'][0] + ': ' + one['content'] + '\n' }}{% endfor %}"
    tokenizer.model_max_length = 1024
    return replace(lm, tokenizer=tokenizer)


def _star(lm: Model, **kept: Any) -> uw.Result:
    names = [*there(lm, *HEADS), *("L1H1.k",) * ("L1H1" in lm.nodes and lm.row.interface)]
    return uw.effects(lm, PAIRS, names, method="atp*", **kept)


def _bound(lm: Model, **kept: Any) -> uw.Result:
    guess = uw.effects(lm, PAIRS, method="atp")
    return uw.bound(lm, PAIRS, guess, subsets=12, p=0.5, **kept)


def _circuit(lm: Model, **kept: Any) -> uw.Result:
    names = there(lm, *HEADS, "MLP0")
    return uw.circuit(lm, PAIRS, names, nodes=names, draws=1, **kept)


def _estimated(method: str) -> Method:
    return lambda lm, **kept: uw.effects(lm, PAIRS, there(lm, *HEADS, "MLP0"), method=method, steps=2, **kept)


_FEW: dict[str, Any] = {"penalty": 0.1, "seeds": 2, "steps": 3, "held": "pair", "draws": 2}
_LEARNED: dict[str, Any] = {"seeds": 2, "steps": 3, "held": "pair", "draws": 2}
# The first word is the public name.
METHODS: dict[str, Method] = {
    "scan": lambda lm, **kept: uw.scan(lm, IDS, **kept),
    "survival": lambda lm, **kept: uw.survival(lm, IDS, there(lm, "embed", "L0H1", "MLP0"), decoys=2, **kept),
    "verify": lambda lm, **kept: uw.verify(lm, IDS, there(lm, "L0H0")[0], **kept),
    "verify erasers": lambda lm, **kept: uw.verify(lm, IDS, "L0H0", ["L1H0"], **kept),
    "dla texts": lambda lm, **kept: uw.dla(lm, IDS[:2], texts=IDS[2:], **kept),
    "dla": lambda lm, **kept: uw.dla(lm, IDS[:2], 5, 9, replace="resample", **kept),
    "corpus_dla": lambda lm, **kept: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0"], **kept),
    "adversarial": lambda lm, **kept: uw.adversarial(lm, IDS, "L0H0", **kept),
    "effects": lambda lm, **kept: uw.effects(lm, PAIRS, there(lm, *HEADS, "MLP0"), **kept),
    "effects atp": _estimated("atp"),
    "effects atp*": _star,
    "effects relp": _estimated("relp"),
    "effects ig": _estimated("ig"),
    "solves": lambda lm, **kept: uw.solves(lm, PAIRS, **kept),
    "mask": lambda lm, **kept: uw.mask(lm, FOUR, there(lm, *HEADS), "last", **{**_FEW, **kept}),
    "subspace": lambda lm, **kept: uw.subspace(lm, FOUR, ["resid_pre0", *there(lm, "MLP0")], **{**_LEARNED, **kept}),
    "paths": lambda lm, **kept: uw.paths(lm, PAIRS, "heads", ["L1H0.v", "MLP1", "logits"], "frozen", **kept),
    "paths recompute": lambda lm, **kept: uw.paths(lm, PAIRS, "heads", ["L1H0.v", "MLP1", "logits"], **kept),
    "paths eap-ig": lambda lm, **kept: uw.paths(lm, PAIRS, "all", "all", method="eap-ig", steps=2, **kept),
    "bound": _bound,
    "circuit": _circuit,
    "lens": lambda lm, **kept: uw.lens(lm, IDS, top=2, **kept),
    "decode": lambda lm, **kept: uw.decode(lm, IDS, 2, IDS[:1], placeholder=int(IDS[0, 3]), tokens=2, **kept),
    "graph": lambda lm, **kept: uw.graph(
        chatting(lm), ["Ships float.", "Stones float."], [True, False], locations=["resid_post0"], tokens=2, **kept
    ),
    "attention": lambda lm, **kept: uw.attention(lm, IDS, "value", **kept),
    "compare": lambda lm, **kept: uw.compare(lm, PAIRS, there(lm, *HEADS), methods=("atp", "exact"), **kept),
    "readers": lambda lm, **kept: uw.readers(lm, FOUR, there(lm, "L0H0")[0], **kept),
    "audit": lambda lm, **kept: uw.audit(lm, IDS, IDS[:2], most=1, **kept),
    "reproduce": lambda lm, **kept: uw.reproduce(weights=lm, tokens=IDS, **kept),
}
# The same methods with other settings, which lead other ways through a model.
VARIANTS: dict[str, Method] = {
    "dla mean": lambda lm, **kept: uw.dla(lm, IDS[:3], 5, 9, replace="mean", **kept),
    "dla position": lambda lm, **kept: uw.dla(lm, IDS[:3], replace="resample", at="position", **kept),
    "survival raw": lambda lm, **kept: uw.survival(lm, IDS, ["L0H0"], "raw", ["rotated"], 1, **kept),
    "effects states": lambda lm, **kept: uw.effects(lm, PAIRS, ["embed", "L1.attn_out", "L1H0.k"], **kept),
    "effects roles": lambda lm, **kept: uw.effects(lm, ROLES, there(lm, *HEADS), ["a", "end"], metric="match", **kept),
    "subspace kept": lambda lm, **kept: uw.subspace(
        lm, FOUR, "resid_post0", method="svd", restrict=True, held="pair", draws=2, **kept
    ),
    "effects kl": lambda lm, **kept: uw.effects(lm, PAIRS, HEADS, "all", metric="kl", source="mean", **kept),
    "effects atp prob": lambda lm, **kept: uw.effects(lm, PAIRS, method="atp", metric="prob", **kept),
    "effects net": lambda lm, **kept: uw.effects(lm, PAIRS, method="net", **kept),
}
# Made of the others.
COMBINED = ("audit", "reproduce", "compare", "readers", "graph")
# What each asks of a model's shape beside two layers of two heads: `reproduce` names heads of the paper's model.
SHAPES: dict[str, dict[str, int]] = {
    "reproduce": {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 32},
    "graph": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024,
    },
}  # fmt: skip


def shape(method: str) -> dict[str, int]:
    """The settings of a model that a method can be asked of."""
    return SHAPES.get(method, {"num_hidden_layers": 2, "num_attention_heads": 2})


def resumable() -> Iterator[str]:
    """Public names that take a `checkpoint` and read with a model, not with a tokenizer alone, nor with a pipeline.

    `localise`, which does, has the same tests of its own (test_localise.py).
    """
    for name in dir(uw):
        public = getattr(uw, name)
        asked = inspect.signature(public).parameters if inspect.isfunction(public) else {}
        if "checkpoint" in asked and not {"tokenizer", "pipe"} & {*asked}:
            yield name


@contextmanager
def few_draws() -> Iterator[None]:
    """Inside the `with`, what is random is repeated less often than in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_DRAWS", 9)
        # In this order: what is imported here for the first time takes the number that stands there.
        patch.setattr("unwrite.methods.verify.ROTATIONS", 2)
        patch.setattr(without, "ROTATIONS", 2)
        yield
