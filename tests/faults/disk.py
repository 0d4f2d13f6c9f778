"""What can a disk do to files that are being written? Patches of the calls by which all of them reach it."""

from __future__ import annotations

import errno
import io
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# What a folder holds: the bytes of its files by name.
State = dict[str, bytes]
# After each of these the disk may be another one than before it.
_WRITES = ((tempfile, "mkstemp"), (os, "fsync"), (os, "replace"), (os, "unlink"))


def state(folder: Path) -> State:
    """All files of a folder but locks, which die with their process."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix != ".lock"] if folder.exists() else []
    return {file.name: file.read_bytes() for file in files}


def put(folder: Path, files: State) -> Path:
    """A folder that holds these files."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def watched(folder: Path) -> Iterator[list[State]]:
    """Inside the `with`, all that a process killed between two calls would leave in the folder.

    Also where it is killed while it writes: then the newest file is there by half, under the name it has until then.
    """
    states: list[State] = []

    def see() -> None:
        if (now := state(folder)) not in states[-1:]:
            half = {name: now[name][: len(now[name]) // 2] for name in now if name.startswith(".") and now[name]}
            states.extend([{**now, **half}] * bool(half) + [now])

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _WRITES:
            patch.setattr(module, name, _before(getattr(module, name), see))
        yield states
    see()


@contextmanager
def calling(function: Callable[[int], None]) -> Iterator[list[int]]:
    """Inside the `with`, `function` is told of every call that writes, by its number, before it is made."""
    count = [0]

    def told() -> None:
        count[0] += 1
        function(count[0])

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _WRITES:
            patch.setattr(module, name, _before(getattr(module, name), told))
        yield count


def _before(real: Callable[..., Any], first: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **settings: Any) -> Any:
        first()
        return real(*args, **settings)

    return both


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Inside the `with`, the system refuses to let any file grow beyond `size` bytes, as a full disk does."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@contextmanager
def full(at: int) -> Iterator[None]:
    """Inside the `with`, the disk takes nothing more when it is really asked to, for the `at`-th time."""
    count, real = [0], os.fsync

    def fsync(handle: int) -> None:
        count[0] += 1
        if count[0] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@contextmanager
def read_only(folder: Path, after: int = 0) -> Iterator[list[int]]:
    """Inside the `with`, nothing in the folder can be changed, from the `after`-th such call on.

    No permissions, since whoever runs tests may be allowed everything.
    """
    calls = [0]

    def refused(path: Any) -> None:
        if Path(os.fsdecode(path)).absolute().is_relative_to(folder):
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def guarded(module: Any, name: str, writes: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def call(path: Any, *args: Any, **settings: Any) -> Any:
            if not isinstance(path, int) and writes(*args, **settings):
                refused(path)
            return real(path, *args, **settings)

        patch.setattr(module, name, call)

    with pytest.MonkeyPatch.context() as patch:
        guarded(os, "open", lambda flags=0, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        guarded(io, "open", lambda mode="r", *_, **__: mode not in ("r", "rb"))
        for name in ("mkdir", "replace", "unlink", "rmdir"):
            guarded(os, name, lambda *_, **__: True)
        yield calls
