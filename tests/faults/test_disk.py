"""What does a full disk or one that cannot be written do to a run? It says so, leaves no half file, and loses nothing.

A disk is full where the system refuses to let a file grow, or where it says so when it is asked to write for good.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import disk
import pytest
from asked import ask, differing, found, keeping_methods, model, single_methods

import unwrite as uw
from unwrite.errors import ResultError
from unwrite.studies.keep import keep

FULL, READ_ONLY = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
LARGE = os.strerror(errno.EFBIG)


def goes_on(method: str, place: Path) -> None:
    """No file was left half written, and the same call ends in the same bits, with nothing left behind."""
    assert not [name for name in disk.state(place) if name.startswith(".")]
    assert not differing(ask(method, checkpoint=place), found(method))
    assert disk.state(place) == {}


@pytest.mark.promise("faults")
@pytest.mark.parametrize("at", [1, "last"])
@keeping_methods
def test_a_full_disk_while_a_checkpoint_is_written(method: str, at: int | str, tmp_path: Path) -> None:
    place, times = tmp_path / "run", at if isinstance(at, int) else _saved(method, tmp_path / "whole")
    with disk.full(times), pytest.raises(ResultError, match=f"cannot write .*npz. Got: {FULL}. Next: choose another"):
        ask(method, checkpoint=uw.Job(place, every=0.0))
    goes_on(method, place)


def _saved(method: str, place: Path) -> int:
    """How often a method writes a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        count, real = [0], os.fsync
        patch.setattr(os, "fsync", lambda handle: (count.__setitem__(0, count[0] + 1), real(handle)))
        ask(method, checkpoint=uw.Job(place, every=0.0))
    return count[0]


@pytest.mark.promise("faults")
@pytest.mark.parametrize("size", [1000])
@keeping_methods
def test_a_disk_that_has_room_for_a_part_of_a_checkpoint(method: str, size: int, tmp_path: Path) -> None:
    place = tmp_path / "run"
    with disk.limited(size), pytest.raises(ResultError, match=f"cannot write .*npz. Got: {LARGE}"):
        ask(method, checkpoint=place)
    goes_on(method, place)


@pytest.mark.promise("faults")
@pytest.mark.promise("whole")
@keeping_methods
def test_a_full_disk_while_a_result_is_saved(method: str, tmp_path: Path) -> None:
    result, file = found(method), tmp_path / "run" / "result.nc"
    size = result.save(tmp_path / "whole").stat().st_size
    for most in (0, size // 2, size - 1):
        with disk.limited(most), pytest.raises(ResultError, match=f"cannot write .*result.nc. Got: {LARGE}"):
            result.save(file)
        assert disk.state(file.parent) == {}
    with disk.limited(size):
        assert not differing(uw.read(result.save(file)), result)


@pytest.mark.promise("faults")
@pytest.mark.promise("whole")
def test_a_full_disk_between_the_files_of_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unwrite.report.page.page", lambda *_: "a page" * 10**5)
    result, place = found("scan"), tmp_path / "run"
    done = keep(lambda parts, job: result, tmp_path / "whole")
    assert done is not None
    names = done[1]
    sizes = [(tmp_path / "whole" / name).stat().st_size for name in names]
    assert sizes[1] < sizes[0] < sizes[2]  # else it is not the page that does not fit
    with disk.limited(sizes[2] - 1), pytest.raises(ResultError, match=f"cannot write .*report.html. Got: {LARGE}"):
        keep(lambda parts, job: result, place)
    assert set(disk.state(place)) == set(names[:2])
    keep(lambda parts, job: result, place)
    assert set(disk.state(place)) == set(names)


@pytest.mark.promise("faults")
@single_methods
def test_a_read_only_folder_is_said_before_anything_runs(method: str, tmp_path: Path) -> None:
    place, passes = tmp_path / "run", []
    handle = model(method).layers[0].out_proj.register_forward_hook(lambda *_: passes.append(1))
    place.mkdir()
    guess = 4 if method == "bound" else 0  # what it is given is estimated before, of a model that is still the same
    try:
        with disk.read_only(place), pytest.raises(ResultError, match=f"cannot write .*Got: {READ_ONLY}. Next: choose"):
            ask(method, checkpoint=place)
        assert len(passes) <= guess
        with disk.read_only(place), pytest.raises(ResultError, match=f"cannot write into .*Got: {READ_ONLY}"):
            keep(lambda parts, job: pytest.fail("it began"), place)
    finally:
        handle.remove()
    goes_on(method, place)


@pytest.mark.promise("faults")
@pytest.mark.parametrize("after", [3, "last"])
@keeping_methods
def test_a_folder_that_becomes_read_only(method: str, after: int | str, tmp_path: Path) -> None:
    """In the middle of the run, or when all is done and files are to be removed."""
    place = tmp_path / "run"
    calls = after if isinstance(after, int) else _calls(method, tmp_path / "whole") - 2
    with disk.read_only(place, calls), pytest.raises(ResultError, match=f"cannot (write|remove) .*Got: {READ_ONLY}"):
        ask(method, checkpoint=uw.Job(place, every=0.0))
    for rest in place.glob(".*"):
        rest.unlink()  # nobody could
    goes_on(method, place)


def _calls(method: str, place: Path) -> int:
    """How many calls change the folder."""
    with disk.read_only(place, 10**9) as calls:
        ask(method, checkpoint=uw.Job(place, every=0.0))
    return calls[0]
