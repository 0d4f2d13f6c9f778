"""Does every recipe of the workbench do what its page says, on the bundled model?"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from test_several import saved

PAGE = (Path(__file__).resolve().parents[1] / "docs/workbench.md").read_text(encoding="utf-8")
PARTS = {title.strip(): part for title, part in re.findall(r"^## (.*)\n((?:(?!^## )[\s\S])*)", PAGE, re.M)}
RECIPES = {title: code[0] for title, part in PARTS.items() if (code := re.findall(r"```python\n(.*?)```", part, re.S))}


@cache
def _begun() -> dict[str, Any]:
    known: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0], known)
    return known


def run(title: str, **more: Any) -> dict[str, Any]:
    """All that a recipe names, when it has run."""
    known = {**_begun(), **more}
    exec(RECIPES[title], known)
    return known


def test_there_are_ten_of_three_lines() -> None:
    assert len(RECIPES) == 10
    assert all(len(code.strip().splitlines()) <= 3 for code in RECIPES.values())


def test_the_lens_ends_in_what_the_model_says() -> None:
    known = run("What would each layer say?")
    last = known["found"]["id"].isel(prompt=0, position=-1, top=0, location=-1)
    lm = known["lm"]
    with torch.no_grad():
        assert int(last) == int(lm.hf(_ids(known)).logits[0, -1].argmax())


def _ids(known: dict[str, Any]) -> torch.Tensor:
    """As `uw.lens` begins the prompt."""
    from unwrite.prompts.encode import prompts

    return torch.from_numpy(prompts([known["prompt"]], known["lm"].tokenizer).ids)


@pytest.mark.parametrize(
    ("title", "name", "axes"),
    [
        ("Which node is responsible for the answer?", "direct", ("prompt", "node")),
        ("Patching, as a map", "effect", ("pair", "node", "position")),
        ("Along one path", "effect", ("pair", "sender", "receiver")),
        ("Where does a head look?", "weight", ("prompt", "head", "query", "key")),
    ],
)
def test_a_result_has_the_axes_that_are_said(title: str, name: str, axes: tuple[str, ...]) -> None:
    found = run(title)["found"]
    assert found[name].dims == axes
    assert np.isfinite(found[name]).any()


def test_heads_are_silenced() -> None:
    known = run("Without some heads")
    with torch.no_grad():
        assert not torch.allclose(known["logits"], known["lm"].hf(known["ids"]).logits)


def test_steering_keeps_every_pass() -> None:
    known = run("Steering")
    passes = torch.cat(known["trace"].passes("resid_post2"), 1)
    assert passes.shape[1] == known["text"].shape[1] - 1


def test_a_feature_is_removed(tmp_path: Path) -> None:
    d = _begun()["lm"].d_model
    saved(tmp_path / "sae", "standard", d, d, features=32)
    known = run("Features of an autoencoder", folder=tmp_path / "sae")
    assert known["logits"].isfinite().all()


def test_activations_are_kept(tmp_path: Path) -> None:
    known = run("Activations for a probe", book="A book is a long text. " * 40, out=tmp_path / "acts")
    assert known["states"].shape == (2, 32, known["lm"].d_model)


def test_what_was_missed_is_bounded() -> None:
    assert float(run("Which nodes at all, and what was missed?")["missed"].max()) > 0
