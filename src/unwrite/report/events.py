"""What does another program read while it runs? One JSON object per line, in ASCII, without NaN."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np

from unwrite.report.live import Heard
from unwrite.report.views import view
from unwrite.result import Result


def say(event: str, **fields: Any) -> None:
    """Print one event at once: a reader sees it while the run goes on.

    A string of a stranger reaches no terminal raw: all that is not printable ASCII is escaped.
    """
    line = json.dumps({"event": event, **_finite(fields)}, ensure_ascii=True, allow_nan=False)
    # The one control character that json leaves as it is.
    sys.stdout.write(line.replace("\x7f", "\\u007f") + "\n")
    sys.stdout.flush()


def hear(step: Heard) -> None:
    """A listener: `progress`, `done` for the last step of a stage, `part` with what a finished part of a run says."""
    if step.result is not None:
        say("part", stage=step.stage, **found(step.result))
        return
    names = ("stage", "done", "total", "tokens", "seconds", "rate", "left", "before", "begun", "doing", "stopping")
    say("done" if step.done == step.total else "progress", **{name: getattr(step, name) for name in names})


def found(result: Result) -> dict[str, Any]:
    """Method and verdict of a result; of a verification also writer, erasers and its numbers at the end."""
    shown = view(result)
    words = shown.words(result)
    said = {"method": result.method, "verdict": result.data.attrs.get("verdict", words), "words": words}
    return said | shown.numbers(result)


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
