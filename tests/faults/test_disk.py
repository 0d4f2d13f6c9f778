"""What does a full disk or one that cannot be written do to a run? It says so, leaves no half file, and loses nothing.

A disk is full where the system refuses to let a file grow, or where it says so when it is asked to write for good.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import disk
import unwrite as uw
from asked import ask, differing, every_method, found, model
from unwrite.combined.keep import keep
from unwrite.errors import ResultError

FULL, READ_ONLY = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
LARGE = os.strerror(errno.EFBIG)


def goes_on(method: str, place: Path) -> None:
    """No file was left half written, and the same call ends in the same bits, with nothing left behind."""
    assert not [name for name in disk.state(place) if name.startswith(".")]
    assert not differing(ask(method, checkpoint=place), found(method))
    assert disk.state(place) == {}


@pytest.mark.promise("faults")
@pytest.mark.parametrize("at", [1, 2, "last"])
@every_method
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
@pytest.mark.parametrize("size", [0, 1000])
@every_method
def test_a_disk_that_has_room_for_a_part_of_a_checkpoint(method: str, size: int, tmp_path: Path) -> None:
    place = tmp_path / "run"
    with disk.limited(size), pytest.raises(ResultError, match=f"cannot write .*npz. Got: {LARGE}"):
        ask(method, checkpoint=place)
    goes_on(method, place)


@pytest.mark.promise("faults")
@pytest.mark.promise("whole")
@pytest.mark.parametrize("file", ["result.nc", "table.csv", "report.html"])
@every_method
def test_a_full_disk_while_results_are_saved(method: str, file: str, tmp_path: Path) -> None:
    result, place = found(method), tmp_path / "run"
    written = _files(result, tmp_path / "whole")
    if file not in written:
        pytest.skip("this method has no page")
    # As large as all that come before it, so that it is this file that does not fit.
    before = [size for name, size in written.items() if list(written).index(name) < list(written).index(file)]
    if before and max(before) >= written[file]:
        pytest.skip("it would fit wherever the files before it do")
    with disk.limited(written[file] - 1), pytest.raises(ResultError, match=f"cannot write .*{file}. Got: {LARGE}"):
        keep(lambda parts, job: result, place)
    left = disk.state(place)
    assert set(left) == {name for name in written if list(written).index(name) < list(written).index(file)}
    keep(lambda parts, job: result, place)
    assert not differing(uw.read(place), result)
    assert set(disk.state(place)) == set(written)


def _files(result: uw.Result, place: Path) -> dict[str, int]:
    """The sizes of a result's files, in the order in which they are written."""
    done = keep(lambda parts, job: result, place)
    assert done is not None
    return {name: (place / name).stat().st_size for name in done[1]}


@pytest.mark.promise("faults")
@every_method
def test_a_read_only_folder_is_said_before_anything_runs(method: str, tmp_path: Path) -> None:
    place, passes = tmp_path / "run", []
    handle = model(method).layers[0].out_proj.register_forward_hook(lambda *_: passes.append(1))
    place.mkdir()
    guess = 2 if method == "bound" else 0  # what it is given is estimated before
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
@pytest.mark.parametrize("after", [3, 8, "last"])
@every_method
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
