"""Can a name that a stranger wrote, in a file or as an argument, put anything outside the folder that was named?"""

from __future__ import annotations

import json
from pathlib import Path

import disk
import pytest
from asked import ask, differing, found, keeping_methods, model

import unwrite as uw
from methods import IDS
from unwrite.errors import NodeError, ResultError, Stopped, UnwriteError
from unwrite.run.loop.job import Job
from unwrite.studies.keep import keep

NAMES = [
    "../../x", "/tmp/x", "..", ".", "a/b", "a\\b", "C:\\x", "\\\\server\\x", "a\0b", "x" * 300, "CON", "~", "\u2025/x",
    "\uff0e\uff0e\uff0fx", "a\nb", "\x1b[2J", "\ud800", " ", "", "*", "[0-9]*.npz", "🙂" * 80,
]  # fmt: skip
# Of every kind one.
HOSTILE = ["../../x", "a\0b", "x" * 300]
every_name = pytest.mark.parametrize("name", NAMES, ids=ascii)


def everything(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page takes long, and its name is always the same."""
    monkeypatch.setattr("unwrite.report.page.page", lambda *_: "")


@pytest.mark.promise("inside")
@every_name
def test_a_part_whose_writer_has_a_hostile_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "run"

    def stopped(parts, job):
        job.begin("solves", model("solves"), {}, {})
        parts.finish(found("solves"))
        parts.finish(uw.Result(found("solves").data.assign_attrs(writer=name.replace("\0", "").replace("\ud800", ""))))
        raise KeyboardInterrupt

    with pytest.raises(Stopped) as caught:
        keep(stopped, place)
    inside = {path for path in everything(tmp_path) if path.startswith("a/b/run/")}
    assert everything(tmp_path) == {"a", "a/b", "a/b/run"} | inside
    assert len(caught.value.kept) == 3
    assert all(file in disk.state(place) for file in caught.value.kept)
    assert sum(file.startswith("solves") and file.endswith(".nc") for file in caught.value.kept) == 1


@pytest.mark.promise("inside")
@every_name
def test_a_text_with_a_hostile_name_is_kept_in_the_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "a" / "run"
    with disk.watched(place) as states:
        uw.scan(model("scan"), {name: IDS[:2], "other": IDS[2:]}, batch=1, checkpoint=Job(place, every=0.0))
    assert everything(tmp_path) == {"a", "a/run"}
    names = {file for files in states for file in files}
    assert any(file.startswith("00-scan") for file in names)
    assert all(file.isascii() and len(file) < 100 and "/" not in file for file in names)


@pytest.mark.promise("inside")
@keeping_methods
def test_a_file_with_hostile_names_is_refused_or_writes_inside(method: str, tmp_path: Path) -> None:
    """Names of nodes and writers are nodes; names of models and texts are text."""
    data = found(method).data
    for number, name in enumerate(HOSTILE if method == "scan" else HOSTILE[:1]):
        file = tmp_path / f"{number}.nc"
        for axis in {"node", "writer"} & set(data.coords):
            names = [name, *map(str, data[axis].values[1:])]
            with pytest.raises(ResultError, match=r"not a readable result|netCDF cannot hold"):
                uw.read(uw.Result(data.assign_coords({axis: names})).save(file))
        record = found(method).provenance
        record["model"]["name"] = name
        uw.Result(data.assign_attrs(provenance=json.dumps(record))).save(file)
        assert uw.read(file).provenance["model"]["name"] == name
    before = everything(tmp_path)
    uw.read(file).save_table(tmp_path / "table.csv")
    assert everything(tmp_path) == before | {"table.csv"}


@pytest.mark.promise("inside")
@every_name
def test_a_hostile_name_of_a_figure_or_a_writer_is_an_error(name: str) -> None:
    with pytest.raises(ResultError):
        found("scan").figure(name or "?")
    with pytest.raises(UnwriteError):
        found("scan").figure("levels", writer=name or "?")
    with pytest.raises(NodeError):
        uw.verify(model("verify"), IDS, name)


@pytest.mark.promise("errors")
@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300], ids=ascii)
def test_a_place_that_cannot_be_is_said(name: str, tmp_path: Path) -> None:
    result = found("scan")
    for place in (tmp_path / name, tmp_path / f"{name}.nc", tmp_path / name / "a.nc"):
        with pytest.raises(ResultError):
            result.save(place)
        with pytest.raises(ResultError):
            uw.read(place)
    with pytest.raises(ResultError):
        ask("scan", checkpoint=tmp_path / name)
    with pytest.raises(ResultError):
        keep(lambda parts, job: result, tmp_path / name)
    with pytest.raises(ResultError):
        result.save_table(tmp_path / name / "table.csv")
    assert everything(tmp_path) == set()
    assert not differing(result, found("scan"))
