"""Are the facts of a claim those that were said, and do graphs overlap as much as sets worked by hand?"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import xarray as xr

import unwrite as uw
from executed import weights
from methods import METHODS, chatting, shape
from unwrite.errors import NumericError, ResultError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.claims import counted_words, into, weighed
from unwrite.report.views import listings, words
from unwrite.result import build
from unwrite.studies import graph as study


def without_words() -> Model:
    """A small model without a tokenizer."""
    settings: dict[str, Any] = {**shape("graph")}
    return view(weights("gpt2", 4, **settings))


@cache
def model() -> Model:
    return chatting(without_words())


def ids_of(texts: list[list[str]]) -> np.ndarray:
    """What would be said, as ids that are filled up behind their ends."""
    rows = [[model().tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in texts]
    most = max(len(row) for part in rows for row in part)
    return np.array([[[*row, *[-1] * (most - len(row))] for row in part] for part in rows])


def says(*facts: str, label: Any = True) -> str:
    return json.dumps({"label": label, "facts": list(facts)}, ensure_ascii=False)


def made() -> uw.Result:
    """Two claims at three states, of which the facts are known."""
    texts = [
        [says("In(Paris, France)"), says("In(paris, france)", "Has(Paris, <b>x</b>)"), "no JSON"],
        [says(), says("Float(Stones, Water)", label=False), says("¬Float(Stones, Water)", "DenserThan(Stones, Water)")],
    ]
    answers = [says("In(Paris, France)", "IsCity(Paris)"), says("¬Float(Stones, Water)", label=False)]
    found = xr.Dataset(
        {"id": (("prompt", "location", "step"), ids_of(texts))}, {"location": list(model().locations[:3])}
    )
    data = study._dataset(["Paris is in France.", "Stones float."], [True, True], answers, found, model())
    data.attrs["words"] = "rule"
    return build("graph", data, {}, {"name": "hand"}, {})


def test_graphs_overlap_as_their_sets_do() -> None:
    data = made().data
    np.testing.assert_array_equal(data["parsed"], [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(data["facts"], [[1, 2, 0], [0, 1, 2]])
    # {paris, france}, {paris, france, <b>x</b>}, {}; answer {paris, france, city}
    np.testing.assert_allclose(data["new_nodes"][0], [np.nan, 2 / 3, 0])
    np.testing.assert_allclose(data["answer_nodes"][0], [2 / 3, 2 / 4, 0])
    np.testing.assert_allclose(data["new_edges"][0], [np.nan, 1 / 2, 0])
    np.testing.assert_allclose(data["answer_edges"][0], [1 / 2, 1 / 3, 0])
    # What is denied is another fact of the same entities.
    np.testing.assert_allclose(data["new_edges"][1], [np.nan, 0, 0])
    np.testing.assert_allclose(data["new_nodes"][1], [np.nan, 0, 1])
    np.testing.assert_allclose(data["answer_edges"][1], [0, 0, 1 / 2])
    degree = {
        str(name): row.tolist() for name, row in zip(data["entity_name"].values, data["degree"].values, strict=True)
    }
    assert degree["paris"] == [1.0, 1.0, 0.0]
    assert degree["france"] == [1.0, 0.5, 0.0]
    assert data["verdict"].values.tolist() == ["true", "false"]
    assert data["right"].values.tolist() == [True, False]
    assert data.attrs["accuracy"] == 0.5
    assert data["echo"].values[data["predicate"].values == "DenserThan"].all()
    assert not data["echo"].values[data["predicate"].values == "In"].any()


def test_facts_are_shown_and_what_is_hostile_is_a_text() -> None:
    result = made()
    assert words(result).startswith("The model's verdict is right on 1 of 2 claims, 0.50 (95 %")
    first = listings(result)[0]
    assert first.rows[0][:2] == (model().locations[0], "Paris – In – France")
    assert first.rows[2][1] == "(no JSON)"
    assert len(result.table()) == int(result["facts"].sum()) + 3
    page = result._repr_html_()
    assert "<b>x</b>" not in page
    for name in ("graph", "snapshots"):
        assert "Paris is in France" in json.dumps(result.figure(name, claim=0).to_dict())
        with pytest.raises(ResultError, match="of one claim"):
            result.figure(name, claim=2)
    spec = result.figure("snapshots").to_dict()
    assert spec["params"][0]["bind"] == {"input": "range", "max": 3, "min": 0, "name": "snapshot ", "step": 1}
    edges = spec["layer"][0]["data"]["values"]
    assert [(one["step"], one["word"]) for one in edges if one["step"] == 3] == [(3, "In"), (3, "Is")]


def test_the_last_token_of_every_word_that_counts_is_put_into_the_other_chat() -> None:
    claim = "The Moon is not larger than the Earth."
    tokens, weight = weighed([claim], model().tokenizer)
    said = [model().tokenizer.decode(tokens.ids[0, : row + 1])[-5:] for row in np.flatnonzero(weight[0])]
    assert said == [" Moon", "arger", "Earth"]
    assert set(weight[0]) == {0.0, 1.0}
    lm, ask = model(), {"locations": ["resid_post0"], "tokens": 3}
    found = uw.graph(lm, [claim], **ask).data
    same = uw.decode(lm, tokens, weight, into(), place="embed", **ask).data
    assert found["text"].values[0, 0] == same["text"].values[0, 0]
    other = uw.decode(lm, tokens, weight * 0, into(), place="embed", **ask).data
    assert same["prob"].values.tolist() != other["prob"].values.tolist()


def test_a_tagger_says_which_words_count() -> None:
    tags = {"Moon": "PROPN", "orbits": "VERB", "bright": "ADJ"}
    found = counted_words("The bright Moon orbits", lambda words: [tags.get(word, "X") for word in words])
    assert [word[0] for word in found] == ["Moon", "orbits"]
    data = uw.graph(
        model(), "Ships float.", locations="resid_post0", tokens=1, tagger=lambda words: ["NOUN"] * len(words)
    )
    assert data.data.attrs["words"] == "tagger"


def test_what_is_no_claim_is_refused_by_name() -> None:
    cases: tuple[tuple[Any, str, Any, dict[str, Any]], ...] = (
        (TokensError, "claims are texts", 5, {}),
        (TokensError, "claims are texts", [], {}),
        (TokensError, "a claim has words", "?!", {}),
        (TokensError, "no word of claim 0 counts", "It is.", {}),
        (TokensError, "2 times", "The Danube flows through Vienna.", {}),
        (NumericError, "whether it is true", "Ships float.", {"labels": [1]}),
        (TokensError, "gives each word a class", "Ships float.", {"tagger": lambda words: []}),
        (TokensError, "did not give classes", "Ships float.", {"tagger": lambda words: 1 / 0}),
        (TokensError, "beyond the model's context", "Ships float.", {"tokens": 1000}),
    )
    for error, match, claims, settings in cases:
        with pytest.raises(error, match=match):
            uw.graph(model(), claims, **settings)
    plain = without_words()
    with pytest.raises(TokensError, match="needs a tokenizer"):
        uw.graph(plain, "Ships float.")
    with pytest.raises(ResultError, match="no graph of facts"):
        METHODS["lens"](plain).figure("snapshots")
