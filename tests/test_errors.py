"""Does an error say what happened, what was got, what was expected and what to do next, on one safe line?"""

from __future__ import annotations

import copy
import pickle
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from unwrite import errors
from unwrite.errors import ModelError, NodeError, NumericError, ResultError, TokensError, UnwriteError, one_of, plain


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "it broke."),
        ({"got": 3}, "it broke. Got: 3."),
        ({"expected": "4"}, "it broke. Expected: 4."),
        ({"fix": "try again"}, "it broke. Next: try again."),
        ({"got": (2, 3), "expected": (3, 2), "fix": "x"}, "it broke. Got: (2, 3). Expected: (3, 2). Next: x."),
        ({"got": 0}, "it broke. Got: 0."),
        ({"got": ""}, "it broke. Got: ."),
        ({"got": OSError("no. such. file.")}, "it broke. Got: no. such. file."),
    ],
)
def test_a_message_has_its_parts_in_order(arguments: dict, message: str) -> None:
    assert str(UnwriteError("it broke", **arguments)) == message


def test_a_sentence_keeps_a_single_full_stop() -> None:
    assert str(UnwriteError("it broke.", got="this.", fix="that.")) == "it broke. Got: this. Next: that."


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("value", "known", "also", "message"),
    [
        ("c", ("a", "b"), "", "at is unknown. Got: 'c'. Expected: 'a' or 'b'."),
        ("", ("a", "b", "c"), "", "at is unknown. Got: ''. Expected: 'a', 'b', 'c'."),
        (["a"], ("a", "b", "c"), "a function", "at is unknown. Got: ['a']. Expected: 'a', 'b', 'c', or a function."),
    ],
)
def test_a_setting_is_one_of_its_names(value: object, known: tuple[str, ...], also: str, message: str) -> None:
    one_of("at", "a", known, also)
    with pytest.raises(NumericError) as caught:
        one_of("at", value, known, also)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [ModelError, NodeError, TokensError, NumericError, ResultError])
def test_every_error_is_an_unwrite_error(kind: type[UnwriteError]) -> None:
    with pytest.raises(UnwriteError, match="Got: x"):
        raise kind("it broke", got="x")


@pytest.mark.promise("errors")
def test_there_is_no_other_kind_of_error() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(kind, UnwriteError) for kind in kinds)


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_survives_the_way_between_processes(again: object) -> None:
    error = NodeError("it broke", got="x\x1b", fix="try again")
    assert str(again(error)) == str(error)
    assert type(again(error)) is NodeError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ASCII", "plain ASCII"),
        ("café − 日本 😀", "café − 日本 😀"),
        ("a\nb", "a\\nb"),
        ("a\r\tb", "a\\r\\tb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_a_terminal_obeys_is_shown_instead(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(("value", "shown"), [(3, "3"), (None, "None"), (("a",), "('a',)")])
def test_anything_can_be_made_plain(value: object, shown: str) -> None:
    assert plain(value) == shown


@pytest.mark.promise("hostile")
@given(st.text(st.characters()))
def test_a_plain_text_is_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert plain(shown) == shown
    shown.encode()  # holds no half of a character


@pytest.mark.promise("hostile")
@given(st.text(st.characters()), st.text(st.characters()))
def test_no_stranger_breaks_the_line_of_a_message(got: str, fix: str) -> None:
    assert len(str(UnwriteError("it broke", got=got, fix=fix)).splitlines()) == 1
