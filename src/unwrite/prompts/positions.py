"""At which rows of its prompts? What a name means: "each" and "all" up to the row that is read, "last" this one."""

from __future__ import annotations

from typing import Any

# `uw.dla`, whose prompts are read at a position of their own, calls the last one by that.
_ALONE = ("last", "position")


def rows_at(at: str, read: Any, position: Any) -> Any:
    """Bool [prompt, position]: whether `at` means a position [position] of prompts that are `read` at a row [prompt].

    Of numpy or torch, as both are given.
    """
    return position == read[:, None] if at in _ALONE else position <= read[:, None]
