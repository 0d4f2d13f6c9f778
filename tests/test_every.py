"""Does a model of every type of transformers open, or is it refused for a reason that was thought of?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import every
import survey
import unwrite as uw
from methods import PAIRS
from survey import COMMAND, OPENED, PAGE, STATUSES, TYPES
from unwrite.errors import ModelError
from unwrite.model.hooks import first_of
from unwrite.model.load import view

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
    known = KNOWN[mapping, kind]
    if known["status"] == survey.NOT_MADE:
        pytest.skip(f"not made where the survey was: {known['why']}")
    found = survey.record(kind, mapping)
    assert found["status"] != survey.BUG, found["why"]
    assert found["status"] == known["status"], f"{found.get('why', 'it opens')}: run `{COMMAND} {kind}`"
    assert found.get("why") or found["errors"]


@pytest.mark.parametrize("mapping", OPENED)
def test_no_fewer_types_open_than_ever_did(mapping: str) -> None:
    assert survey.opened(RECORDS, mapping) >= OPENED[mapping]


@pytest.mark.parametrize(("mapping", "what"), [("text", "causal language models"), ("images", "models of images")])
def test_the_readme_says_how_many_open(mapping: str, what: str) -> None:
    said = f"{survey.opened(RECORDS, mapping)} of {len([one for one in RECORDS if one['mapping'] == mapping])} {what}"
    assert said in " ".join((survey.ROOT / "README.md").read_text("utf-8").split())


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


def test_no_refusal_is_an_error_in_the_models_own_pass() -> None:
    assert not [one["type"] for one in RECORDS if "could not be run" in one.get("why", "")]


# Of a few always, of all that open with --slow: llama4's mixtures of experts give the rows of all prompts in one list.
EXECUTED = ("llama", "llama4_text", "glm4_moe")
OPEN = [one["type"] for one in RECORDS if one["mapping"] == "text" and "errors" in one]


@surveyed
@pytest.mark.promise("executed")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in EXECUTED else pytest.mark.slow) for kind in OPEN]
)
def test_exact_effects_of_an_mlp_are_those_of_a_patch_by_plain_hooks(kind: str) -> None:
    hf = every.model(kind)
    lm = view(hf)
    if "MLP1" not in lm.nodes:
        pytest.skip("its layer 1 has no MLP")
    got = uw.effects(lm, PAIRS, ["MLP1"]).data["effect"].sel(node="MLP1").values
    base, source = torch.as_tensor(PAIRS.base.ids), torch.as_tensor(PAIRS.source.ids)
    written = _written(hf, lm.layers[1].mlp_end, source)
    clean, positions = _difference(hf, base), range(base.shape[1])
    patched = [_difference(hf, base, lm.layers[1].mlp_end, written, position) for position in positions]
    want = torch.stack(patched, 1) - clean[:, None]
    assert want.abs().max() > 1e-3
    assert torch.allclose(torch.as_tensor(got).to(want), want, atol=1e-5)


def _written(hf: Any, module: nn.Module, ids: Tensor) -> Tensor:
    """What a module puts out for each prompt and position."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _, __, output: seen.append(first_of(output).clone())
    )  # Falcon adds to it later
    with torch.no_grad():
        hf(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].reshape(*ids.shape, -1)


def _difference(hf: Any, ids: Tensor, module: nn.Module | None = None, put: Any = None, at: int = 0) -> Tensor:
    """The last row's logit of token 5 above that of token 9, where `module` puts out another write at one position."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        own = first_of(output)
        new = own.reshape(put.shape).clone()
        new[:, at] = put[:, at]
        return new.reshape(own.shape) if output is own else (new.reshape(own.shape), *output[1:])

    handle = module.register_forward_hook(hook) if module is not None else None
    with torch.no_grad():
        logits = hf(input_ids=ids, use_cache=False).logits[:, -1]
    if handle is not None:
        handle.remove()
    return logits[:, 5] - logits[:, 9]


# What is surveyed, and with what.


@pytest.mark.parametrize("kind", ["llama", "mamba", "gpt_oss", "deepseek_v3"])
def test_every_parameter_is_drawn_anew_and_a_seed_says_how(kind: str) -> None:
    first, again, other = (dict(every.model(kind, seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert (parameter == other[name]).double().mean() < 0.01, name
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
def test_whatever_view_raises_is_in_the_record(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(hf: Any) -> None:
        raise error

    monkeypatch.setattr(survey, "view", refuse)
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
