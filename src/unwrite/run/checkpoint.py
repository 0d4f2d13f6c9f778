"""What of a long run is done already? A file that only the same run can go on from, and the one before it.

A file is the SHA-256 of what follows it, then arrays by name. A newest one that is damaged is noticed by that, and the
one before it is used. Whoever works with a file holds a lock beside it, which dies with the process.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from unwrite.errors import ResultError
from unwrite.result import write

SECONDS = 30.0
_DIGEST = hashlib.sha256().digest_size
Arrays = dict[str, np.ndarray]


@dataclass(eq=False)
class Checkpoint:
    """Arrays by name, kept at `path` every `seconds` inside the `with`; `key` says all that they depend on.

    Raises ResultError where the file is of another run or in use, where it cannot be written, and where it and the one
    before are damaged.
    """

    path: Path
    key: str
    seconds: float = SECONDS
    arrays: Arrays = field(init=False, default_factory=dict)
    _saved: float = field(init=False, default_factory=time.monotonic)
    _lock: IO[bytes] | None = field(init=False, default=None)

    @property
    def due(self) -> bool:
        """Is it time to write?"""
        return time.monotonic() - self._saved >= self.seconds

    def keep(self, arrays: Mapping[str, np.ndarray], now: bool = False) -> None:
        """Hold these arrays beside those held before, and write all where it is time to, or `now`."""
        self.arrays |= arrays
        if now or self.due:
            self.save(self.arrays)

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write these arrays, and hold nothing: they may be too large to be there twice."""
        write(self.path, lambda place: self._replace(place, arrays))
        self._saved = time.monotonic()

    def __enter__(self) -> Checkpoint:
        self._lock = _locked(self.path)
        try:
            # What a process that was killed had not written to its end; nobody else works here.
            for rest in self.path.parent.glob(f".{self.path.name}.*"):
                rest.unlink()
            self.arrays = _read(self.path, self.key)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is held stays where the run was stopped; after its end nothing is left to go on from."""
        try:
            if kind is None:
                self.path.unlink(missing_ok=True)
                _before(self.path).unlink(missing_ok=True)
            elif self.arrays:
                self.keep({}, now=True)
        finally:
            self._release()

    def _release(self) -> None:
        _lock_of(self.path).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def _replace(self, place: Path, arrays: Mapping[str, np.ndarray]) -> None:
        with place.open("w+b") as file:
            file.write(bytes(_DIGEST))
            np.savez(file, allow_pickle=False, key=np.array(self.key), **arrays)
            digest = _digest(file)
            file.seek(0)
            file.write(digest)
        # Stopped between the two replacements, the one before is the newest.
        if self.path.exists():
            self.path.replace(_before(self.path))


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locked(path: Path) -> IO[bytes]:
    import fcntl  # where there is none, everything but checkpoints works

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock_of(path).open("wb")
    except OSError as error:
        raise ResultError(f"cannot write {path}", got=error.strerror or error, fix="choose another place") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock that its holder has removed in the meantime locks nothing.
        mine = os.path.samestat(os.fstat(file.fileno()), _lock_of(path).stat())
    except OSError:
        mine = False
    if not mine:
        file.close()
        raise ResultError(f"another process works with {path}", fix="wait for it, or choose another place")
    return file


def _read(path: Path, key: str) -> Arrays:
    """The arrays of the newest file that is whole; none where there is no file."""
    damage = None
    for file in (path, _before(path)):
        if not file.exists():
            continue
        try:
            found = _unpacked(file)
            own = str(found.pop("key"))
        except Exception as error:  # noqa: BLE001 - whatever a damaged archive raises means the same to the user
            damage = error
            continue
        if own != key:
            raise ResultError(
                f"{file} is the checkpoint of another run", expected="the same model, input and settings",
                fix="choose another place, or remove it",
            )  # fmt: skip
        return found
    if damage is not None:
        raise ResultError(
            f"{path} is no readable checkpoint", got=f"{type(damage).__name__}: {damage}",
            fix="remove it, and begin anew",
        )  # fmt: skip
    return {}


def _unpacked(path: Path) -> Arrays:
    with path.open("rb") as file:
        if file.read(_DIGEST) != _digest(file):
            raise ValueError(f"its {path.stat().st_size} bytes are not those that were written")
        file.seek(_DIGEST)
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}


def _digest(file: IO[bytes]) -> bytes:
    """Of all that follows the digest's own place."""
    file.seek(_DIGEST)
    sha = hashlib.sha256()
    while block := file.read(2**24):
        sha.update(block)
    return sha.digest()
