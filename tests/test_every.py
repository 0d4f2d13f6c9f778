"""Does a model of every type of transformers open, or is it refused for a reason that was thought of?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import every
import survey
from survey import COMMAND, OPENED, PAGE, STATUSES, TYPES
from unwrite.errors import ModelError

VERSIONS, RECORDS = survey.kept()
KNOWN = {(one["mapping"], one["type"]): one for one in RECORDS}
CASES = [(mapping, kind) for mapping, types in TYPES.items() for kind in types]

# Of another release of transformers the survey says nothing; that it is of the pinned one is tested below.
surveyed = pytest.mark.skipif(
    transformers.__version__ != VERSIONS["transformers"], reason=f"the survey is of {VERSIONS['transformers']}"
)


@surveyed
@pytest.mark.promise("exact")
@pytest.mark.parametrize(("mapping", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_a_type_opens_or_is_refused_as_the_page_says_and_for_a_reason(mapping: str, kind: str) -> None:
    found = survey.record(kind, mapping)
    assert found["status"] != survey.BUG, found["why"]
    known = KNOWN[mapping, kind]
    assert found["status"] == known["status"], f"{found.get('why', 'it opens')}: run `{COMMAND} {kind}`"
    assert found.get("why") or found["errors"]
    assert found["status"] != survey.NOT_MADE or found["why"] == known["why"]


@pytest.mark.parametrize("mapping", OPENED)
def test_no_fewer_types_open_than_ever_did(mapping: str) -> None:
    assert survey.opened(RECORDS, mapping) >= OPENED[mapping]


@surveyed
def test_every_type_has_one_record() -> None:
    assert [(one["mapping"], one["type"]) for one in RECORDS] == CASES
    assert {one["status"] for one in RECORDS} <= set(STATUSES)


def test_the_page_is_what_the_survey_found() -> None:
    assert PAGE.read_text("utf-8") == survey.page(VERSIONS, RECORDS), f"run `{COMMAND}`"


def test_the_survey_is_of_the_pinned_release() -> None:
    pins = (survey.ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert f"transformers=={VERSIONS['transformers']}" in pins, f"run `{COMMAND}`"


def test_a_method_that_does_not_apply_says_why_and_none_breaks() -> None:
    answers = [answer for one in RECORDS for answer in one.get("methods", {}).values()]
    assert answers
    assert not [answer for answer in answers if answer.startswith(survey.BUG)]


# What is surveyed, and with what.


@pytest.mark.parametrize("kind", ["llama", "mamba", "gpt_oss", "deepseek_v3"])
def test_every_parameter_is_drawn_anew_and_a_seed_says_how(kind: str) -> None:
    first, again, other = (dict(every.model(kind, seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert not torch.isclose(parameter, other[name]).any(), name
        assert parameter.numel() == 1 or parameter.unique().numel() > 1, name


def test_lists_of_layers_keep_every_kind_of_layer() -> None:
    assert every.config("gemma2").layer_types == ["sliding_attention", "full_attention"] * 2
    assert set(every.config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert every.config("llama").num_hidden_layers == every.LAYERS


def _broken() -> Iterator[tuple[str, BaseException, bool]]:
    refused = ModelError("it has no heads")
    caught = ModelError("could not be run")
    caught.__cause__ = KeyError("layers")
    again = ModelError("refused")
    again.__cause__ = refused
    yield from (("raised", refused, True), ("of another refusal", again, True), ("caught", caught, False))
    yield "a stranger's", KeyError("layers"), False


@pytest.mark.parametrize(("error", "thought_of"), [pytest.param(*rest, id=name) for name, *rest in _broken()])
def test_a_refusal_that_was_caught_and_not_made_is_an_inner_error(error: BaseException, thought_of: bool) -> None:
    assert survey.made(error) is thought_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelError("it has no heads", expected="heads", fix="use another"), survey.REFUSED),
        (IndexError("tuple index out of range"), survey.BUG),
    ],
)
def test_whatever_view_raises_is_in_the_record(
    error: Exception, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def view(hf: Any) -> None:
        raise error

    monkeypatch.setattr(survey, "view", view)
    found = survey.record("llama", "text")
    assert (found["status"], found["why"]) == (status, str(error).split(". ")[0])


def test_types_that_are_named_are_surveyed_again_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LINES", "PAGE"):
        monkeypatch.setattr(survey, name, tmp_path / getattr(survey, name).name)
    other = {"mapping": "text", "type": "mamba", "status": survey.REFUSED, "why": "a|reason"}
    survey.write([other, {"mapping": "text", "type": "gpt2", "status": survey.NOT_MADE, "why": "…"}])
    survey.main("gpt2")
    _, (first, second) = survey.kept()
    assert second == other
    assert (first["type"], first["status"], first["class"]) == ("gpt2", survey.BY_HAND, "GPT2LMHeadModel")
    page = survey.PAGE.read_text("utf-8")
    assert "| Causal language models | 2 | 1 | 0 | 1 | 0 |" in page
    assert "| `mamba` | refused | a\\|reason |" in page
