"""How often was a run started until now, for how many seconds did it run, and where?"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch

from unwrite.run.loop.checkpoint import Arrays

# As a checkpoint and a result keep it.
_SPENT, HOSTS = "spent", "hosts"


@dataclass(frozen=True)
class Spent:
    """How often a run was started, for how many seconds it ran, and where: bits may depend on the kind of machine."""

    starts: int = 0
    seconds: float = 0.0
    hosts: frozenset[str] = frozenset()

    def and_now(self, seconds: float) -> Spent:
        """With this start, which began so many seconds ago."""
        here = f"{platform.node()} ({platform.machine()}, {torch.get_num_threads()} threads)"
        return Spent(self.starts + 1, self.seconds + seconds, self.hosts | {here})

    def beside(self, other: Spent) -> Spent:
        """What two parts of a run that went side by side spent."""
        return Spent(max(self.starts, other.starts), max(self.seconds, other.seconds), self.hosts | other.hosts)

    def state(self) -> Arrays:
        """As arrays by name, which `taken` reads."""
        return {_SPENT: np.array([self.starts, self.seconds]), HOSTS: np.array(sorted(self.hosts))}

    @classmethod
    def taken(cls, state: Arrays) -> Spent:
        """Out of arrays by name, from which it is removed."""
        starts, seconds = state.pop(_SPENT)
        return cls(int(starts), float(seconds), frozenset(map(str, state.pop(HOSTS))))
