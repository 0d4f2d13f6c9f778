"""What of a long sweep is done already? One file, replaced whole, that only the same sweep can go on from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unwrite.errors import ResultError
from unwrite.result import write

_SECONDS = 30.0


@dataclass(eq=False)
class Checkpoint:
    """Arrays by name, kept at `path` every `seconds` inside the `with`; `key` says all that they depend on."""

    path: Path
    key: str
    seconds: float = _SECONDS
    arrays: dict[str, np.ndarray] = field(init=False)
    _saved: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.arrays = _read(self.path, self.key) if self.path.exists() else {}

    def keep(self, arrays: dict[str, np.ndarray], now: bool = False) -> None:
        """Hold these arrays, and write all to the file where it is time to, or `now`.

        Raises ResultError where the file cannot be written.
        """
        self.arrays |= arrays
        if not now and time.monotonic() - self._saved < self.seconds:
            return
        write(self.path, lambda place: _write(place, self.key, self.arrays))
        self._saved = time.monotonic()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is done stays where the sweep was stopped; after its end nothing is left to go on from."""
        if kind is None:
            self.path.unlink(missing_ok=True)
        elif self.arrays:
            self.keep({}, now=True)


def _write(place: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    with place.open("wb") as file:
        np.savez(file, allow_pickle=False, key=np.array(key), **arrays)


def _read(path: Path, key: str) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            found = {name: kept[name] for name in kept.files}
            own = str(found.pop("key"))
    except Exception as error:  # noqa: BLE001 - whatever a damaged archive raises means the same to the user
        raise ResultError(
            f"{path} is no readable checkpoint", got=f"{type(error).__name__}: {error}", fix="remove it, and begin anew"
        ) from None
    if own != key:
        raise ResultError(
            f"{path} is the checkpoint of another sweep", expected="the same model, pairs and settings",
            fix="name another file, or remove it",
        )  # fmt: skip
    return found
