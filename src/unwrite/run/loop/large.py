"""How is what is too large for memory written, batch by batch, into a file that is whole or not there?

A netCDF file is laid out at once with all that is small, and the room of every large variable in one piece; a batch is
then written at its place, so a run that was killed goes on in the same file to the same bytes. Until all is there it
has another name and no end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import xarray as xr

from unwrite.errors import ResultError
from unwrite.result import FILE, SEALED, layout_of, seal
from unwrite.run.loop.checkpoint import Arrays

_PART = "result.part"


@dataclass(eq=False)
class LargeFile:
    """A file in `folder` with the variables of `small` and room for `large`: axes and dtype of each, by name.

    `sizes` are those of all axes; the first is along which batches are written. It is a part of a `Ledger`.
    """

    folder: Path
    small: xr.Dataset
    large: Mapping[str, tuple[tuple[str, ...], np.dtype, Mapping[str, str]]]
    sizes: Mapping[str, int]
    _file: int | None = field(init=False, default=None)
    _offsets: dict[str, int] = field(init=False, default_factory=dict)

    @property
    def _path(self) -> Path:
        return self.folder / _PART

    def write(self, first: int, found: Mapping[str, np.ndarray]) -> None:
        """Put what was found of some prompts, the first of them number `first`, in its place."""
        if self._file is None:
            self._lay_out()
            self._open()
        assert self._file is not None  # noqa: S101 (just opened)
        try:
            for name, values in found.items():
                block = np.ascontiguousarray(values, self.large[name][1])
                _whole(self._file, memoryview(block.view(np.uint8).data), self._offsets[name] + first * block[0].nbytes)
        except OSError as error:
            raise ResultError(f"cannot write {self._path}", got=error.strerror, fix="choose another place") from None

    def state(self) -> Arrays:
        """What lasts is in the file: it is on the disk before anyone says so."""
        if self._file is not None:
            os.fsync(self._file)
        return {"there": np.array(self._file is not None)}

    def take(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on with the file of an earlier start. Raises ResultError where it is not there any more."""
        if bool(state["there"]):
            if not self._path.exists():
                raise ResultError(
                    f"{self.folder} has lost its {_PART}", got="a checkpoint that goes on in it",
                    fix="remove the folder to begin anew",
                )  # fmt: skip
            self._open()

    def finish(self) -> Path:
        """Give the file its end and its name."""
        if self._file is None:
            self._lay_out()
        else:
            os.fsync(self._file)
            self.close()
        seal(self._path)
        return self._path.replace(self.folder / FILE)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lay_out(self) -> None:
        room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        try:
            self.small.assign_attrs({SEALED: 1}).to_netcdf(self._path, engine="h5netcdf")
            with h5netcdf.File(self._path, "r+") as file:
                for axis, size in self.sizes.items():
                    if axis not in file.dimensions:
                        file.dimensions[axis] = size
                for name, (axes, dtype, about) in self.large.items():
                    made = file.create_variable(name, axes, dtype, dcpl=room)
                    made.attrs.update(about)
        except OSError as error:
            raise ResultError(
                f"cannot write {self._path}", got=error.strerror or error, fix="choose another place"
            ) from None

    def _open(self) -> None:
        self._offsets = layout_of(self._path, self.large)
        self._file = os.open(self._path, os.O_RDWR)


def _whole(file: int, block: memoryview, at: int) -> None:
    block = block.cast("B")
    while block:
        done = os.pwrite(file, block, at)
        block, at = block[done:], at + done
