"""Is every method that can be resumed in the list that all of these tests go through?"""

from __future__ import annotations

import pytest

import unwrite as uw
from methods import COMBINED, METHODS, SHAPES, resumable


@pytest.mark.promise("faults")
def test_every_method_that_takes_a_checkpoint_is_listed() -> None:
    listed = {name.split()[0] for name in METHODS}
    missing = set(resumable()) - listed
    assert not missing, f"give {', '.join(sorted(missing))} a line in METHODS of tests/methods.py"
    assert listed == set(resumable())
    assert {*COMBINED, *SHAPES} <= set(METHODS)


def test_a_new_method_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(lm: object, *, checkpoint: object = None) -> None: ...

    monkeypatch.setattr(uw, "__dir__", lambda: ["scan", "another", "text", "Job"])
    monkeypatch.setattr(uw, "another", another, raising=False)
    assert list(resumable()) == ["another", "scan"]
