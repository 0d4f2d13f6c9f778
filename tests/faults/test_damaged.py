"""Is a file that was damaged, or is of another version, ever read as numbers other than those that were written?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import disk
import numpy as np
import pytest
from asked import ask, differing, found, keeping_methods, single_methods, written

import unwrite as uw
from unwrite import files
from unwrite import result as results
from unwrite.errors import ResultError
from unwrite.run.loop import checkpoint

Damage = Callable[[bytes], bytes]


def flipped(at: float) -> Damage:
    """One bit, `at` a fraction of the file."""
    return lambda whole: _flip(whole, int(at * (len(whole) - 1)), 4)


def _flip(whole: bytes, at: int, bit: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


DAMAGES: dict[str, Damage] = {
    "empty": lambda whole: b"",
    "cut in the head": lambda whole: whole[:20],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "without the last byte": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "the last block is lost": lambda whole: whole[: -len(whole) // 4] + bytes(len(whole) // 4),
    "zeros": lambda whole: bytes(len(whole)),
    "a bit in the head": flipped(0.0),
    "a bit in the middle": flipped(0.5),
    "a bit at the end": flipped(1.0),
}
# Asked without a choice of the batch, all prompts are one: a checkpoint has none before it.
ONE_BATCH = ("audit", "reproduce")
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def _stopped(method: str) -> disk.State:
    """The folder of a run at a late moment when there is a checkpoint and, of several batches, the one before it."""
    whole = [{name: content for name, content in files.items() if name[0] != "."} for files in written(method)]
    return [files for files in whole if files][-1] if method in ONE_BATCH else [f for f in whole if _newest(f)][-1]


def _newest(files: disk.State) -> str | None:
    """The newest checkpoint that has another before it."""
    return next((name for name in reversed(files) if f"{name}.before" in files), None)


@pytest.mark.promise("faults")
@pytest.mark.promise("damaged")
@keeping_methods
def test_a_damaged_checkpoint_is_never_a_number(method: str, tmp_path: Path) -> None:
    files = _stopped(method)
    damage = DAMAGES["a bit in the middle"]  # a checkpoint is the same kind of file for all of them; see below
    if newest := _newest(files):
        place = disk.put(tmp_path / "newest", {**files, newest: damage(files[newest])})
        assert not differing(ask(method, checkpoint=place), found(method))
    place = disk.put(tmp_path / "all", {name: damage(whole) for name, whole in files.items()})
    with pytest.raises(ResultError, match=r"no readable checkpoint.*Next: remove it to begin anew"):
        ask(method, checkpoint=place)


@pytest.mark.promise("damaged")
@every_damage
def test_every_kind_of_damage_of_a_checkpoint_is_noticed(damage: Damage, tmp_path: Path) -> None:
    file, old = tmp_path / "a.npz", {"x": np.arange(3.0)}
    checkpoint.save(file, "key", old)
    checkpoint.save(file, "key", {"x": np.arange(4.0)})
    file.write_bytes(damage(file.read_bytes()))
    assert checkpoint.read(file, "key")["x"].tolist() == old["x"].tolist()
    before = tmp_path / "a.npz.before"
    before.write_bytes(damage(before.read_bytes()))
    with pytest.raises(ResultError, match="no readable checkpoint"):
        checkpoint.read(file, "key")


@pytest.mark.promise("damaged")
def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    checkpoint.save(file, "key", {"x": np.arange(3.0)})
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(_flip(whole, at, at % 8))
        with pytest.raises(ResultError, match="no readable checkpoint"):
            checkpoint.read(file, "key")


@pytest.mark.promise("damaged")
@single_methods
def test_a_checkpoint_of_another_version_is_refused(method: str, tmp_path: Path) -> None:
    package = "unwrite" if method == "scan" else "torch"
    place, real = disk.put(tmp_path / "old", _stopped(method)), files.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "version", lambda name: "999" if name == package else real(name))
        with pytest.raises(ResultError, match=f"checkpoint of another run. Got: another versions {package}"):
            ask(method, checkpoint=place)


@pytest.mark.promise("whole")
@single_methods
def test_a_result_is_read_as_it_was_saved(method: str, tmp_path: Path) -> None:
    assert not differing(uw.read(found(method).save(tmp_path / "a.nc")), found(method))


@pytest.mark.promise("faults")
@pytest.mark.promise("whole")
@keeping_methods
def test_a_damaged_result_is_an_error(method: str, tmp_path: Path) -> None:
    file = found(method).save(tmp_path / "a.nc")
    whole = file.read_bytes()
    for name, damage in DAMAGES.items():
        file.write_bytes(damage(whole))
        with pytest.raises(ResultError, match="not a readable result"):
            pytest.fail(f"{name}: {uw.read(file).method}")


@pytest.mark.promise("whole")
def test_every_bit_of_a_result_counts(tmp_path: Path) -> None:
    """HDF5 notices few of them, and may not come back from others: what was written is compared before it is read."""
    file = found("corpus_dla").save(tmp_path / "a.nc")
    whole = file.read_bytes()
    head, end = range(0, 600, 7), range(len(whole) - 49, len(whole))
    for at in itertools.chain(head, range(600, len(whole), 101), end):
        file.write_bytes(_flip(whole, at, at % 8))
        with pytest.raises(ResultError, match="not a readable result"):
            uw.read(file)


@pytest.mark.promise("whole")
def test_a_result_of_an_earlier_version_is_read_and_saved_with_its_hash(tmp_path: Path) -> None:
    result = found("scan")
    result.data.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    old = uw.read(tmp_path / "old.nc")
    assert not differing(old, result)
    again = uw.read(old.save(tmp_path / "new.nc"))
    assert not differing(again, result)
    assert again.data.attrs == old.data.attrs


@pytest.mark.promise("whole")
def test_what_another_program_has_rewritten_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    import xarray as xr

    file = found("scan").save(tmp_path / "a.nc")
    with xr.open_dataset(file, engine="h5netcdf") as opened:
        data = opened.load()
    data.to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match=r"rewritten it: save it by uw.Result\(data\).save"):
        uw.read(tmp_path / "b.nc")
    assert not differing(uw.read(uw.Result(data).save(tmp_path / "c.nc")), found("scan"))


@pytest.mark.promise("faults")
@keeping_methods
def test_a_result_of_a_newer_version_says_so_whatever_it_holds(method: str, tmp_path: Path) -> None:
    data = found(method).data.assign_attrs(schema=results.SCHEMA + 1)
    names = {axis: [f"{i}@new" for i in range(data.sizes[axis])] for axis in ("node", "writer") if axis in data.coords}
    file = uw.Result(data.assign_coords(names)).save(tmp_path)
    with pytest.raises(ResultError, match=f"newer unwrite. Got: schema {results.SCHEMA + 1}.*Next: update unwrite"):
        uw.read(file)
