"""How long will it take? What a trial tells of a stage, and which seconds it counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from unwrite.model.devices import placed
from unwrite.model.view import Model


@dataclass(frozen=True)
class Taken:
    """Seconds that a stage takes once, and for each prompt."""

    once: float
    each: float

    def seconds(self, n: int | float) -> float:
        """For so many prompts."""
        return self.once + n * self.each


def clock(lm: Model) -> Callable[[], float]:
    """Which seconds a trial of this model counts: those of the processor where one thread does all the work.

    What else the machine does makes a run longer, not what the run asks for, and a moment's load would be foreseen for
    hours. Where several threads, an accelerator or a disk work, only the time that passes tells.
    """
    alone = torch.get_num_threads() == 1 and lm.device.type == "cpu" and not any(part.moves for part in placed(lm))
    return time.process_time if alone else time.monotonic
