"""What is measured of every prompt by itself? Arrays by name, put together in the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np

from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, parts


class Rows:
    """A tally of what is measured of every prompt by itself: arrays by name, the prompts' axis first.

    `join` puts two parts of what is measured of the same prompts together, where that is divided.
    """

    def __init__(self, measure: Callable[[Batch], Mapping[str, np.ndarray]], join: Callable[..., Arrays] | None = None):
        self._measure, self._join = measure, join
        self._parts: Arrays = {}  # by the first prompt of each part, its share and name
        self.kept = Ledger({"parts": self._parts})

    def step(self, batch: Batch) -> None:
        """Measure the prompts of one batch, in as many parts as memory asks for."""
        for rows, found in parts(batch.part(slice(0, batch.real)), self._measure):
            first, size = batch.first + rows.start, rows.stop - rows.start
            if batch.share[1] == 1:
                self._parts |= {f"{first}/{name}": part for name, part in found.items()}
                continue
            # Elsewhere memory may ask for other parts, so here every prompt is one.
            for i in range(size):
                share = f"{first + i}+{batch.share[0]}"
                self._parts |= {f"{share}/{name}": part[i : i + 1] for name, part in found.items()}

    def whole(self) -> Arrays:
        """What was found of all prompts, in their order."""
        found: dict[int, dict[str, Arrays]] = {}
        for path, part in self._parts.items():
            (first, _, share), name = path.split("/", 1)[0].partition("+"), path.split("/", 1)[1]
            found.setdefault(int(first), {}).setdefault(share, {})[name] = part
        each = [reduce(self._join or (lambda one, _: one), found[first].values()) for first in sorted(found)]
        return {name: np.concatenate([one[name] for one in each]) for name in (each[0] if each else ())}
