"""What does a tally keep between two batches? Sums and counts by name, to which those of other batches are added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from unwrite.run.loop.checkpoint import Arrays


@runtime_checkable
class Lasting(Protocol):
    """What stays between two batches, and can be written down."""

    def state(self) -> Arrays:
        """All of it, as arrays by name."""
        ...

    def take(self, state: Mapping[str, np.ndarray]) -> None:
        """Add what the same question kept of other batches."""


@dataclass(frozen=True, eq=False)
class Ledger:
    """What a tally keeps, by name: what lasts by itself, sums (added in place), arrays by name (the newest stay)."""

    parts: Mapping[str, Lasting | np.ndarray | Tensor | Arrays]

    def only(self, names: Iterable[str]) -> Ledger:
        """The parts of these names alone."""
        return Ledger({name: self.parts[name] for name in names})

    def state(self) -> Arrays:
        """All parts, each array's name behind that of its part."""
        return {f"{name}/{path}": one for name, part in self.parts.items() for path, one in _state(part).items()}

    def take(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the `state` of a ledger of the same parts."""
        for name, part in self.parts.items():
            own = {path[len(name) + 1 :]: one for path, one in state.items() if path.startswith(f"{name}/")}
            if isinstance(part, dict):
                part.update(own)
            elif isinstance(part, (np.ndarray, Tensor)):
                total = torch.as_tensor(part)  # the same memory
                total += torch.from_numpy(own[""]).to(total)
            else:
                part.take(own)


class Begun:
    """What is done of batches that take long: arrays by name, and how many steps. `kept` is a part of a `Ledger`."""

    def __init__(self):
        self.kept: Arrays = {}

    def held(self, of: str, empty: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """What there is of a batch (or its part), like what is `empty`, and how many of its steps are done."""
        if f"{of} steps" not in self.kept:
            return dict(empty), 0
        found = {name: torch.from_numpy(self.kept[f"{of} {name}"].copy()).to(like) for name, like in empty.items()}
        return found, int(self.kept[f"{of} steps"])

    def keep(self, of: str, found: Mapping[str, Tensor], steps: int) -> None:
        """So many steps are done, and this is what they found; it takes the place of all that was kept."""
        self.kept.clear()
        self.kept |= {f"{of} {name}": part.cpu().numpy().copy() for name, part in found.items()}
        self.kept[f"{of} steps"] = np.array(steps)

    def clear(self) -> None:
        """The batch is done."""
        self.kept.clear()


def _state(part: Lasting | np.ndarray | Tensor | Arrays) -> Arrays:
    if isinstance(part, dict):
        return part
    return {"": torch.as_tensor(part).cpu().numpy()} if isinstance(part, (np.ndarray, Tensor)) else part.state()
