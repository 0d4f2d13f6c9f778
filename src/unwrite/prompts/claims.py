"""How is a model asked whether a claim is true, and for its facts? Two chats, and which words of a claim count.

The first chat asks of the claim itself. The second asks of a placeholder, where states of the first are put; its
examples are others, so that nothing of the claim stands in it. Instructions are part of the first message, since not
every chat template has a system role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from unwrite.errors import TokensError, counted, shown
from unwrite.prompts.encode import chats
from unwrite.prompts.spans import ends, holding, row_of
from unwrite.prompts.tokens import Tokens

HOLE = "x"
# What a tagger calls the words that count: of the universal tags, and of those of the Penn treebank.
COUNTED = ("NOUN", "PROPN", "VERB", "NN", "NNS", "NNP", "NNPS", "VB", "VBD", "VBG", "VBN", "VBP", "VBZ")
# What gives each of some words a class.
Tagger = Callable[[list[str]], Sequence[str]]
# Words of the closed classes, which name nothing: by rule, all others count.
_CLOSED = frozenset(
    """a an the this that these those some any each every no all both few many much more most other another such own i
    you he she it we they me him her us them my your his its our their who whom whose which what where when why how
    there here am is are was were be been being do does did has have had having will would shall should can could may
    might must not nor and or but if then than as so because while although though since until unless whether of in on
    at by for with from to into onto over under about after before between among through during against without within
    upon off out up down near along across behind beyond via per very too also only just even still again ever never
    always often quite rather yet already almost""".split()  # noqa: SIM905 - read as a text
)
_WORDS = re.compile(r"\w+(?:['’-]\w+)*")

_ASKED = (
    "Check a claim as a careful reporter would. Say whether it is true, and write down every fact that decides it. "
    'Answer with one JSON object and nothing else: "label" is true or false, "facts" is a list of short statements, '
    "each a predicate with its arguments in brackets."
)
_SHORTER = (
    'Check each claim. Answer with one JSON object: "label" is true or false, "facts" is a list of predicates with '
    "their arguments in brackets."
)
_FIRST = [
    ("The Danube flows through Vienna.", True, ["FlowsThrough(Danube, Vienna)", "CapitalOf(Austria, Vienna)"]),
]
_OTHERS = [
    ("Penguins live at the North Pole.", False, ["LiveIn(Penguins, Southern Hemisphere)", "¬LiveAt(Penguins, Arctic)"]),
    ("Beethoven wrote nine symphonies.", True, ["Wrote(Beethoven, Nine Symphonies)", "IsComposer(Beethoven)"]),
    ("Iron is lighter than water.", False, ["DenserThan(Iron, Water)", "IsMetal(Iron)"]),
]


# Predicates of the second chat's examples: where they are said of a claim, they may be an echo of these.
ECHOED = frozenset(fact.split("(")[0].lstrip("¬") for _, _, facts in _OTHERS for fact in facts)


def asked(claim: str) -> list[dict[str, str]]:
    """The chat that asks of a claim."""
    return _chat(_ASKED, _FIRST, claim)


def into(hole: str = HOLE) -> list[dict[str, str]]:
    """The chat that asks of a placeholder."""
    return _chat(_SHORTER, _OTHERS, hole)


def _chat(says: str, examples: Iterable[tuple[str, bool, list[str]]], last: str) -> list[dict[str, str]]:
    told: list[dict[str, str]] = []
    for claim, label, facts in examples:
        answer = json.dumps({"label": label, "facts": facts}, ensure_ascii=False)
        told += [{"role": "user", "content": claim}, {"role": "assistant", "content": answer}]
    told.append({"role": "user", "content": last})
    return [{"role": "user", "content": f"{says}\n\n{told[0]['content']}"}, *told[1:]]


def claims_of(claims: Any) -> list[str]:
    """Claims as texts. Raises TokensError for anything else."""
    listed = [claims] if isinstance(claims, str) else claims
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(one, str) for one in listed):
        raise TokensError("claims are texts", got=shown(claims), expected="a sentence, or a list of sentences")
    if empty := [one for one in listed if not _WORDS.search(one)]:
        raise TokensError("a claim has words", got=shown(empty[0]), expected="a sentence")
    return [one.strip() for one in listed]


def weighed(
    claims: list[str], tokenizer: Any, tagger: Tagger | None = None
) -> tuple[Tokens, Float[np.ndarray, "prompt position"]]:
    """The chats of claims, and the weight of every token: 1 for the last token of each word that counts, else 0.

    By rule a word counts unless it is of a closed class, or one letter; a tagger's nouns, names and verbs count. Raises
    TokensError for a claim that is not found in its chat, or of which no word counts, and what `chats` raises.
    """
    tokens = chats([asked(claim) for claim in claims], tokenizer)
    weight = np.zeros(tokens.ids.shape)
    for i, claim in enumerate(claims):
        ids = tokens.ids[i, : tokens.lengths[i]]
        holding(claim, ids, tokenizer, f"the chat of claim {i}")
        said, end = ends(ids, tokenizer)
        start = said.index(claim) - 1
        chosen = [row_of(end, start + word.end()) for word in counted_words(claim, tagger)]
        if not chosen:
            raise TokensError(
                f"no word of claim {i} counts", got=shown(claim), expected="a noun, a name or a verb",
                fix="write the claim as a sentence, or give tagger what knows its language",
            )  # fmt: skip
        weight[i, chosen] = 1.0
    return tokens, weight


def counted_words(claim: str, tagger: Tagger | None = None) -> list[re.Match[str]]:
    """The words of a claim that count, where they stand."""
    words = [*_WORDS.finditer(claim)]
    if tagger is None:
        return [word for word in words if word[0].lower() not in _CLOSED and len(word[0]) > 1]
    try:
        tags = list(tagger([word[0] for word in words]))
    except Exception as error:  # a stranger's own function may raise anything
        raise TokensError("the tagger did not give classes", got=error, expected="a class for each word") from error
    if len(tags) != len(words) or not all(isinstance(tag, str) for tag in tags):
        raise TokensError(
            "a tagger gives each word a class", got=counted(len(tags), "class"), expected=counted(len(words), "word")
        )
    return [word for word, tag in zip(words, tags, strict=True) if tag in COUNTED]
