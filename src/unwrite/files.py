"""How does a file come to be there whole or not at all, and what may it be called?"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from unwrite.errors import ResultError, UnwriteError, shown


@contextmanager
def folder(path: str | Path) -> Iterator[Path]:
    """A folder that can be written, asked before a long run; made if need be, and gone again if the run fails empty.

    Raises ResultError where files cannot be written.
    """
    place = possible(path)
    made = not place.exists()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ResultError(f"cannot write into {place}", got=error.strerror, fix="choose another folder") from None
    try:
        yield place
    finally:
        if made and not any(place.iterdir()):
            place.rmdir()


def write(file: Path, make: Callable[[Path], object]) -> Path:
    """Let `make` write a file beside `file`, then put it in place at once: never half a file."""
    file = possible(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _beside(file) as place:
            make(place)
            place.replace(file)
    except OSError as error:
        raise ResultError(f"cannot write {file}", got=error.strerror or error, fix="choose another place") from None
    return file


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=file.suffix)
    os.close(handle)
    place = Path(name)
    try:
        place.chmod(0o644)
        yield place
    finally:
        place.unlink(missing_ok=True)


def possible(path: str | Path, wrong: type[UnwriteError] = ResultError) -> Path:
    """A path again. Raises `wrong` for what is none, and where no file can be called so."""
    if not isinstance(path, (str, Path)) or path == "":
        raise wrong("this is no path", got=shown(path), expected="the name of a file or folder")
    try:
        os.lstat(path)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            what = f"no file can be called {shown(str(path))}"
            raise wrong(what, got=error, fix="choose another place") from None
    return Path(path)


def unfinished(place: Path, *names: str) -> Iterator[Path]:
    """What a process that was killed had begun to `write` in a folder, of files whose names match."""
    for name in names:
        yield from place.glob(f".{name}.*")


@cache
def version(package: str) -> str:
    """The version that is installed of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
