"""What of a long run is done already? A file that only the same run can go on from, and the one before it.

A file is the SHA-256 of what follows it, then arrays by name. A newest one that is damaged is noticed by that, and the
one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
from filelock import FileLock, Timeout

from unwrite.errors import ResultError
from unwrite.files import possible, write
from unwrite.model.identity import LOGITS

_DIGEST = hashlib.sha256().digest_size
Arrays = dict[str, np.ndarray]
# Logits of one model are within this of each other, relative to the largest.
_DIGITS = 2e-3
# So many names of what differs are said.
_NAMED = 4


def save(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Put arrays into a file at once; what was there before stays beside it. `key` says all that they depend on.

    Raises ResultError where it cannot be written.
    """

    def make(place: Path) -> None:
        with place.open("w+b") as file:
            file.write(bytes(_DIGEST))
            _pack(file, {"key": np.array(key), **arrays})
            digest = _digest(file)
            file.seek(0)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())  # or a machine that fails leaves the name of a file that was never written
        # Stopped between the two replacements, the one before is the newest.
        if path.exists():
            path.replace(_before(path))

    write(path, make)


def _pack(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """What `numpy.load` reads, deflated as fast as can be: counts are mostly zeros, a thirteenth is left of them."""
    with ZipFile(file, "w", ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read(path: Path, key: str) -> Arrays:
    """The arrays of the newest file that is whole; none where there is no file.

    Raises ResultError where the file is of another run, and where it and the one before are damaged.
    """
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
        if not alike(own, key):
            raise ResultError(
                f"{file} is the checkpoint of another run", got=f"another {differing(own, key)}",
                expected="the same model, input and settings", fix="choose another place, or remove it to begin anew",
            )  # fmt: skip
        return found
    if damage is not None:
        raise ResultError(
            f"{path} is no readable checkpoint, and neither is the one before", got=damage,
            fix="remove it to begin anew",
        )  # fmt: skip
    return {}


def belongs(file: Path, asked: str) -> bool:
    """Is this whole, and kept of some stage of the run that was asked for so?"""
    try:
        own, wanted = json.loads(str(_unpacked(file, "key")["key"])), json.loads(asked)
    except Exception:  # noqa: BLE001 - whatever is no checkpoint raises
        return False
    if not isinstance(own, dict):
        return False
    run, mine = own.get("run"), json.dumps({name: own.get(name) for name in wanted})
    return (isinstance(run, str) and alike(run, asked)) or alike(mine, asked)


def remove(path: Path) -> None:
    """The file and the one before it, where there are any. Raises ResultError where they cannot be removed."""
    for file in (path, _before(path)):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ResultError(f"cannot remove {file}", got=error.strerror, fix="ask again: all of it is done") from None


def alike(one: str, other: str) -> bool:
    """Are two keys of one run? Logits may differ in their last digits, as machines round."""
    return one == other or not _differing(one, other)


def differing(one: str, other: str) -> str:
    """The names of what differs between two keys, which are JSON objects."""
    # Weights are what a reader knows; logits tell only what nothing else does.
    names = sorted(_differing(one, other), key=lambda name: (name != "model weights", name))
    names = [name for name in names if not name.endswith(f" {LOGITS}")] or names
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _differing(one: str, other: str) -> list[str]:
    try:
        first, second = (_flat(json.loads(key)) for key in (one, other))
    except (ValueError, AttributeError):
        return ["key"]
    return sorted(name for name in first.keys() | second.keys() if not _same(name, first.get(name), second.get(name)))


def _same(name: str, one: Any, other: Any) -> bool:
    if not name.endswith(f" {LOGITS}") or not (isinstance(one, list) and isinstance(other, list)):
        # The key of the run around a part of it is a string.
        return alike(one, other) if name == "run" and isinstance(one, str) and isinstance(other, str) else one == other
    size = max((abs(value) for value in one), default=0.0)
    return np.allclose(one, other, rtol=0, atol=_DIGITS * size)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        path = f"{prefix} {name}".strip()
        flat |= _flat(part, path) if isinstance(part, Mapping) else {path: part}
    return flat


def locked(file: Path) -> FileLock:
    """A lock that dies with the process. Raises ResultError where another one holds it, or it cannot be written."""
    possible(file)
    lock = FileLock(file, thread_local=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultError(
            f"another process works with {file.parent}", fix="wait for it, or choose another place"
        ) from None
    except OSError as error:
        raise ResultError(f"cannot write {file}", got=error.strerror or error, fix="choose another place") from None
    return lock


def unlocked(lock: FileLock) -> None:
    """Let go of a lock, and of its file."""
    with suppress(OSError):  # some systems keep a file that is open
        Path(lock.lock_file).unlink()
    lock.release()


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def _unpacked(path: Path, *names: str) -> Arrays:
    """Arrays of these names, or all, of a file that is whole."""
    with path.open("rb") as file:
        if file.read(_DIGEST) != _digest(file):
            raise ValueError(f"its {path.stat().st_size} bytes are not those that were written")
        file.seek(_DIGEST)
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in names or kept.files}


def _digest(file: IO[bytes]) -> bytes:
    """Of all that follows the digest's own place."""
    file.seek(_DIGEST)
    sha = hashlib.sha256()
    while block := file.read(2**24):
        sha.update(block)
    return sha.digest()
