"""Which facts does a model hold of a claim, layer by layer? States of a claim in words, and the words as a graph.

Source run: a chat asks for a verdict on the claim and for its facts; what is said is parsed, and is the graph of the
answer. Of every state, the sum over the last tokens of the claim's words that count is put at the placeholder of
another chat, in place of its embedding (`uw.decode`), and what is said of it is parsed: one graph for each state. Nodes
are entities, edges predicates. Bronzini et al. 2024, arXiv 2404.03623; prompts and parser are our own.

What is said of a state is what the second chat makes the model say of it: its examples invite facts, also where there
are none. So graphs of a model that is often wrong about claims say little, and `verdict` and `accuracy` stand first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import NumericError, counted, function, plain, require, whole
from unwrite.methods.decode import decode, put_at_of, require_saying, states_named
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.prompts.claims import ECHOED, HOLE, Tagger, claims_of, into, weighed
from unwrite.prompts.spans import said_by
from unwrite.prompts.triples import Statement, Triple, told
from unwrite.result import Result, build, quantity
from unwrite.run.answer.spoken import require_room, spoken
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, stream
from unwrite.stats.rates import wilson

# The snapshot that is no state: what the model answers to the claim itself.
ANSWER = "answer"


def graph(
    lm: Model, claims: Any, labels: Any = None, *, locations: Any = None, place: str = "embed",
    rescale: bool = False, tokens: int = 100, tagger: Tagger | None = None, batch: int | None = None,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """What an instruct model says of claims and of its states of them: facts as subject, predicate, object; graphs.

    Arguments: `claims` a sentence or several; `labels` whether each is true, where that is known; `locations`, `place`
    and `rescale` as in `uw.decode`; `tokens` so many are said of a state, and of the claim itself; `tagger` what gives
    each of a list of words a class (universal or Penn tags), of which nouns, names and verbs count: without one, by
    rule, all words but those of closed classes; `batch`, `checkpoint` as in `uw.dla`.
    Returns a Result. By `fact` (of all claims and snapshots, one after the other): `subject`, `predicate`, `object`,
    `negated`, where it was said: `of_claim` and `at`, the name of a state or "answer"; and `echo`: its predicate is one
    of the second chat's examples, which invites the model to repeat them. By [claim, location]:
    `text`, `parsed` (could it be read at all?), `repairs`, `dropped` facts, `facts`, and `new_nodes` and `new_edges`,
    Jaccard overlap of entities and of facts with the location before, `answer_nodes` and `answer_edges`, that with the
    answer; NaN where both are empty. By claim `verdict` ("true", "false", or "none" where none was read),
    `answer_text`, `answer_facts`; with labels `right`, and `accuracy`, `lower` and `upper` (Wilson's 95 % interval, no
    verdict counts as wrong) as attributes. By [entity, location] `degree`, the part of a graph's other entities that
    one is joined to, with `entity_claim` and `entity_name`.
    Raises TokensError for a tokenizer without a chat template, what is no claim, and a claim whose words are not found
    in its chat; else as `uw.decode`.

    Example: `uw.graph(lm, ["The capital of France is Paris."], [True]).data["subject"]`
    """
    require_saying(lm, rescale, tokens)
    function("tagger", tagger)
    sites = states_named(lm, locations)
    told_ = claims_of(claims)
    truth = _labels(labels, len(told_))
    read, weight = weighed(told_, lm.tokenizer, tagger)
    words = "rule" if tagger is None else "tagger"
    settings = {
        "labels": truth, "locations": [*map(str, sites)], "place": [*map(str, put_at_of(lm, place, sites))],
        "batch": None if batch is None else whole("batch is a number of prompts", batch, 1),
        "rescale": rescale, "tokens": tokens, "words": words,
        "weight": [np.flatnonzero(row).tolist() for row in weight],
    }  # fmt: skip
    with opened(checkpoint, listener) as job:
        if done := job.begin("graph", lm, {"": read.hash}, settings):
            return done
        rows = Rows(partial(_answered, lm, tokens))
        stream(lm, read, rows, 1, f"answers to {counted(len(read), 'claim')}", listener, job)
        answers = [_words(ids, lm) for ids in rows.whole()["id"]]
        found = decode(
            lm, read, weight, into(), placeholder=HOLE, locations=locations, place=place, rescale=rescale,
            tokens=tokens, batch=batch, checkpoint=job, listener=listener,
        ).data  # fmt: skip
        data = _dataset(told_, truth, answers, found, lm)
        data.attrs["words"] = words
        return job.signed(build("graph", data, settings, provenance(lm), {"": read.about()}))


def _labels(labels: Any, n: int) -> list[bool] | None:
    if labels is None:
        return None
    listed = list(labels) if isinstance(labels, (list, tuple, np.ndarray)) else []
    fits = len(listed) == n and all(isinstance(one, (bool, np.bool_)) for one in listed)
    require(fits, NumericError, "labels say of each claim whether it is true", labels, f"{n} of True or False")
    return [bool(one) for one in listed]


def _answered(lm: Model, steps: int, batch: Batch) -> dict[str, np.ndarray]:
    """What the model says to one chat."""
    length = int(batch.counted[0].sum())
    what = "a chat and its answer would go beyond the model's context"
    require_room(lm, length, steps, what, "say fewer tokens")
    return {"id": spoken(lm, batch.ids[:1, :length], steps).ids.numpy()}


def _words(ids: np.ndarray, lm: Model) -> str:
    """What was said, without what ends a turn."""
    special = {*getattr(lm.tokenizer, "all_special_ids", ())}
    return said_by([i for i in ids.tolist() if i >= 0 and i not in special], lm.tokenizer)


class _Graph:
    """Entities and facts of one snapshot; names are alike whatever their case."""

    def __init__(self, facts: Sequence[Triple]):
        self.edges = {(_key(one.subject), one.predicate.lower(), _key(one.object), one.negated) for one in facts}
        self.nodes = {name for edge in self.edges for name in (edge[0], edge[2])}

    def degree(self, name: str) -> float:
        """The part of all other entities that one is joined to."""
        joined = {edge[2 * (edge[0] == name)] for edge in self.edges if name in (edge[0], edge[2])} - {name}
        return len(joined) / (len(self.nodes) - 1) if name in self.nodes and len(self.nodes) > 1 else 0.0


def _key(name: str) -> str:
    return " ".join(name.casefold().split())


def _jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a or b else np.nan


_OVERLAP = {
    "new_nodes": "entities here and at the location before: those of both / those of either",
    "new_edges": "facts here and at the location before: those of both / those of either",
    "answer_nodes": "entities here and in the answer: those of both / those of either",
    "answer_edges": "facts here and in the answer: those of both / those of either",
}
_COUNTS = {
    "parsed": "could the text be read as JSON?", "repairs": "how often it was mended until then, 3 at most",
    "dropped": "lines of facts that state none", "facts": "facts that were read",
}  # fmt: skip


def _dataset(
    claims: list[str], truth: list[bool] | None, answers: list[str], found: xr.Dataset, lm: Model
) -> xr.Dataset:
    """Everything that was found, named."""
    places = [*map(str, found["location"].values)]
    texts = [[_words(row, lm) for row in rows] for rows in found["id"].values]
    read, last = [[told(text) for text in row] for row in texts], [told(text) for text in answers]
    cell = ("claim", "location")
    says = lambda values: np.array([[plain(one) for one in row] for row in values], dtype=object)  # noqa: E731
    counts = {"parsed": lambda one: one.whole, "repairs": lambda one: one.repairs, "dropped": lambda one: one.dropped,
              "facts": lambda one: len(one.facts)}  # fmt: skip
    variables: dict[str, Any] = {
        "text": (cell, says(texts)), "claim_text": ("claim", says([claims])[0]),
        "answer_text": ("claim", says([answers])[0]),
        "answer_facts": ("claim", np.array([len(one.facts) for one in last])),
        "answer_parsed": ("claim", np.array([one.whole for one in last])),
        "verdict": ("claim", np.array([_verdict(one) for one in last], dtype=object)),
        **{name: quantity(cell, np.array([[of(one) for one in row] for row in read]), "1", _COUNTS[name])
           for name, of in counts.items()},
        **_listed(read, last, places), **_compared(read, last),
    }  # fmt: skip
    data = xr.Dataset(variables, {"claim": np.arange(len(claims)), "location": places})
    return data if truth is None else _judged(data, last, truth)


def _verdict(one: Statement) -> str:
    return "none" if one.label is None else str(one.label).lower()


def _judged(data: xr.Dataset, last: list[Statement], truth: list[bool]) -> xr.Dataset:
    right = np.array([one.label is label for one, label in zip(last, truth, strict=True)])
    lower, upper = wilson(int(right.sum()), len(right))
    own = {"label": ("claim", np.array(truth)), "right": quantity(("claim",), right, "1", "verdict = label")}
    return data.assign(own).assign_attrs(accuracy=float(right.mean()), lower=lower, upper=upper)


def _listed(read: list[list[Statement]], last: list[Statement], places: list[str]) -> dict[str, Any]:
    """All facts, one after the other, with where they were said."""
    each = [(i, at, fact) for i, row in enumerate(read)
            for at, one in zip([*places, ANSWER], [*row, last[i]], strict=True) for fact in one.facts]  # fmt: skip
    words = {name: [plain(getattr(fact, name)) for _, _, fact in each] for name in ("subject", "predicate", "object")}
    variables = {name: ("fact", np.array(part, dtype=object)) for name, part in words.items()}
    return {
        **variables, "negated": ("fact", np.array([fact.negated for _, _, fact in each], dtype=bool)),
        "of_claim": ("fact", np.array([i for i, _, _ in each], dtype=np.int64)),
        "at": ("fact", np.array([at for _, at, _ in each], dtype=object)),
        "echo": ("fact", np.array([fact.predicate in ECHOED for _, _, fact in each], dtype=bool)),
    }  # fmt: skip


def _compared(read: list[list[Statement]], last: list[Statement]) -> dict[str, Any]:
    """How snapshots overlap, and how central their entities are."""
    found: dict[str, list[list[float]]] = {name: [] for name in _OVERLAP}
    names: list[tuple[int, str]] = []
    degrees: list[list[float]] = []
    for i, row in enumerate(read):
        graphs, end = [_Graph(one.facts) for one in row], _Graph(last[i].facts)
        for part in ("nodes", "edges"):
            own = [getattr(one, part) for one in graphs]
            found[f"new_{part}"].append([np.nan, *(_jaccard(a, b) for a, b in pairwise(own))])
            found[f"answer_{part}"].append([_jaccard(one, getattr(end, part)) for one in own])
        for name in sorted({name for one in graphs for name in one.nodes}):
            names.append((i, name))
            degrees.append([one.degree(name) for one in graphs])
    shape = (len(names), len(read[0]))
    says = "entities that it is joined to / all other entities of the graph"
    return {
        **{name: quantity(("claim", "location"), np.array(part), "1", _OVERLAP[name]) for name, part in found.items()},
        "degree": quantity(("entity", "location"), np.array(degrees).reshape(shape), "1", says),
        "entity_claim": ("entity", np.array([i for i, _ in names], dtype=np.int64)),
        "entity_name": ("entity", np.array([plain(name) for _, name in names], dtype=object)),
    }
