"""Does a text become the facts that it states? Fixed texts, and what they mean."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unwrite.prompts.triples import Statement, Triple, told, triples

TABLE: list[tuple[str, list[tuple[str, str, str, bool]]]] = [
    ("CapitalOf(Germany, Berlin)", [("Germany", "CapitalOf", "Berlin", False)]),
    ("Won(Marie_Curie, Physics, Chemistry)",
     [("Marie Curie", "Won", "Physics", False), ("Marie Curie", "Won", "Chemistry", False)]),
    ("IsCapitalOf(Germany, Berlin)", [("Berlin", "IsCapitalOf", "Germany", False)]),
    ("hasMoon(Earth, Moon)", [("Moon", "hasMoon", "Earth", False)]),
    ("IsCity(Berlin)", [("Berlin", "Is", "City", False)]),
    ("HasThickAtmosphere(Venus)", [("Venus", "Has", "Thick Atmosphere", False)]),
    ("City(Berlin)", [("Berlin", "Is", "City", False)]),
    ("¬CapitalOf(Germany, Bonn)", [("Germany", "CapitalOf", "Bonn", True)]),
    ("NotCapitalOf(Germany, Bonn)", [("Germany", "CapitalOf", "Bonn", True)]),
    ("¬IsCity(Rhine)", [("Rhine", "Is", "City", True)]),
    ("¬NotIn(Bonn, Germany)", [("Bonn", "In", "Germany", False)]),
    ("¬(In(Bonn, France) ∧ IsRiver(Bonn))", [("Bonn", "In", "France", True), ("Bonn", "Is", "River", True)]),
    ("In(Bonn, Germany) ∧ In(Lyon, France) ∨ City(Lyon)",
     [("Bonn", "In", "Germany", False), ("Lyon", "In", "France", False), ("Lyon", "Is", "City", False)]),
    ("In(Bonn, Germany, True)", [("Bonn", "In", "Germany", False)]),
    ("In(Bonn, France, False)", [("Bonn", "In", "France", True)]),
    ("¬In(Bonn, France, False)", [("Bonn", "In", "France", False)]),
    ("Wrote(Goethe, 'Faust', etc.)", [("Goethe", "Wrote", "Faust", False)]),
    ("A ≠ B", []),
    ("Wrote()", []),
    ("just words", []),
    ("Is(Berlin)", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "facts"), TABLE)
def test_a_line_of_facts_is_these_triples(text: str, facts: list[tuple[str, str, str, bool]]) -> None:
    assert triples(text) == [Triple(*fact) for fact in facts]


FACT = (Triple("Bonn", "In", "Germany"),)
BROKEN: list[tuple[str, Statement]] = [
    ('{"label": true, "facts": ["In(Bonn, Germany)"]}', Statement(FACT, True, 0, True)),
    ('Here it is:\n{"label": false, "facts": ["In(Bonn, Germany)"]}\nI hope so.', Statement(FACT, False, 1, True)),
    ('```json\n{"facts": "In(Bonn, Germany)"}```', Statement(FACT, None, 1, True)),
    ('{"label": true, "facts": ["In(Bonn, Germany)", "In(Bo', Statement(FACT, True, 2, True, 1)),
    ('Well: {"label": true, "facts": ["In(Bonn, Germany)"', Statement(FACT, True, 2, True)),
    ('{"label": true, "facts": ["In(Bonn, Germany)", ]', Statement(FACT, True, 3, True)),
    ('{"label": true, "facts": ["In(Bonn, Germany)", In(Bonn, Fr', Statement(FACT, True, 3, True)),
    ('{"label": "maybe", "facts": ["In(Bonn, Germany)", 7, "words"]}', Statement(FACT, None, 0, True, 2)),
    ("no braces at all", Statement(repairs=3)),
    ("[1, 2]", Statement(repairs=3)),
    ("", Statement(repairs=3)),
]


@pytest.mark.parametrize(("text", "found"), BROKEN)
def test_broken_json_is_mended_three_times_and_no_more(text: str, found: Statement) -> None:
    assert told(text) == found


@given(st.text(alphabet='{}[]"\\,:¬∧∨()aZ \n0', max_size=60) | st.text(max_size=60))
def test_no_text_raises(text: str) -> None:
    found = told(text)
    assert found.repairs <= 3
    assert not (found.facts and not found.whole)


@given(st.lists(st.sampled_from([text for text, facts in TABLE if facts]), min_size=1, max_size=4), st.booleans())
def test_what_is_whole_is_read_as_it_is(lines: list[str], label: bool) -> None:
    found = told(json.dumps({"label": label, "facts": lines}))
    assert (found.label, found.repairs, found.dropped) == (label, 0, 0)
    assert found.facts == tuple(dict.fromkeys(triple for line in lines for triple in triples(line)))
