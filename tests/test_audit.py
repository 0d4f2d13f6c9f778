"""Does the scan find what was planted and only that, and does the audit say so?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import unwrite as uw
from unwrite.combined.audit import demonstration
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.report.rows import rows
from unwrite.tokens import windows

PROSE = (
    "It was the best of times, it was the worst of times; 1775 was the year, and all of it was told by a clerk. " * 60
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def found(request: pytest.FixtureRequest) -> tuple[uw.Result, object]:
    model = planted(request.param, dtype=torch.float64)
    lm = view(model.hf, model.tokenizer)
    return uw.scan(lm, windows(PROSE, model.tokenizer, n=12, length=128)), model


def test_every_planted_share_is_measured(found) -> None:
    result, model = found
    for pair in model.pairs:
        share = float(result["share"].sel(writer=pair.writer, node=pair.eraser))
        assert share == pytest.approx(pair.share, abs=0.02), pair


def test_planted_opponents_and_only_they_stand_out(found) -> None:
    result, model = found
    shown, _ = rows(result.data)
    named = {(row.writer, node) for row in shown for node in opposed_by(result, row.writer)}
    can_read = {pair for pair in model.pairs if ".bias" not in pair.eraser}
    assert named == {(pair.writer, pair.eraser) for pair in can_read if pair.share < -0.1}


def opposed_by(result: uw.Result, writer: str) -> list[str]:
    return str(result["opposed_by"].sel(writer=writer).item()).split()


def test_readings_follow_the_planted_levels(found) -> None:
    result, _ = found
    first = {str(w): str(result["in_words"].sel(writer=w).item()).split()[0] for w in result["writer"].values}
    assert first["L0H0"] == "reverses"
    assert first["L0H1"] == first["L0H2"] == first["L0H4"] == "falls"
    assert first["L0H3"] == first["L0H5"] == "level"


def test_a_scan_never_says_erased_or_kept(found) -> None:
    result, _ = found
    said = " ".join(map(str, result["in_words"].values))
    assert "erased" not in said
    assert "kept" not in said


def test_several_texts_stand_side_by_side_and_disagree_where_they_do() -> None:
    lm, _ = demonstration(n=4, length=64)
    texts = uw.text({"prose": PROSE, "digits": "0123456789" * 300}, lm.tokenizer, n=4, length=64)
    both = uw.scan(lm, texts)
    assert list(both["text"].values) == ["prose", "digits"]
    for name in texts:
        alone = uw.scan(lm, texts[name])
        xr.testing.assert_equal(both["level"].sel(text=name, drop=True), alone["level"])
    assert set(both.table()["text"]) == {"prose", "digits"}


def test_audit_writes_everything_it_promises(tmp_path) -> None:
    lm, tokens = demonstration(n=6, length=64)
    result = uw.audit(lm, tokens, out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html", "result.nc", "table.csv"]
    again = uw.read(tmp_path / "out")
    xr.testing.assert_identical(again.data, result.data)
    assert "L0H0 reverses" in again.data.attrs["verdict"]
    assert again.provenance["tokens"][""]["source"] == "Python's documentation topics"


def test_a_failed_audit_leaves_no_folder(tmp_path) -> None:
    lm, _ = demonstration(n=2, length=64)
    with pytest.raises(uw.errors.TokensError):
        uw.audit(lm, np.array([[10**6, 1, 2]]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demonstration_needs_no_file_and_names_its_text() -> None:
    lm, tokens = demonstration(n=3)
    assert lm.certificate.ok
    assert tokens.ids.shape == (3, 256)
    assert tokens.source == "Python's documentation topics"


def test_doctor_measures_identities_memory_and_time() -> None:
    lm, _ = demonstration(n=2, length=64)
    diagnosis = uw.doctor(lm, n=100, length=128)
    assert diagnosis.ok
    assert {check.name for check in diagnosis.checks} >= {f"identity {name}" for name in lm.certificate}
    assert diagnosis.memory > sum(parameter.nbytes for parameter in lm.hf.parameters())
    assert diagnosis.seconds > 0
    assert uw.doctor(lm, n=100, length=10**6).length == lm.context
