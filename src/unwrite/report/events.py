"""What does another program read while it runs? One JSON object per line, in ASCII, without NaN."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np

from unwrite.report.live import Heard
from unwrite.report.terminal import last_word
from unwrite.result import Result

# Of a verification, at the end of the stream.
_AT_THE_END = ("survival", "survival_se", "gap", "gap_se")
_SUMMED = ("erased", "filled_in")


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
    words = last_word(result)
    said = {"method": result.method, "verdict": result.data.attrs.get("verdict", words), "words": words}
    if result.method != "verify":
        return said
    end = result.data.isel(location=-1)
    return said | {
        "writer": result.data.attrs["writer"],
        "erasers": result.data.attrs["erasers"].split(),
        **{name: float(end[name]) for name in _AT_THE_END},
        "generic": {str(bound): float(end["generic"].sel(bound=bound)) for bound in end["bound"].values},
        **{name: float(result.data[name].sum()) for name in _SUMMED},
    }


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
