"""Does a name mean the rows that it says, in both kinds of arrays?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from unwrite.prompts.positions import rows_at

UP_TO = [[True, False, False, False], [True, True, True, False]]
ALONE = [[True, False, False, False], [False, False, True, False]]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(("at", "meant"), [("each", UP_TO), ("all", UP_TO), ("last", ALONE), ("position", ALONE)])
def test_a_name_means_rows(at: str, meant: list[list[bool]], kind: Callable[[Any], Any]) -> None:
    assert rows_at(at, kind([0, 2]), kind(range(4))).tolist() == meant
