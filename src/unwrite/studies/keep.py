"""What stays of a long run that is stopped? The parts that were finished, each saved whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from unwrite import files
from unwrite.errors import Stopped
from unwrite.report import page
from unwrite.result import Result
from unwrite.run.loop.job import Job
from unwrite.run.loop.stream import Listener, Progress

# What a run was planned to be, in the folder of those that are planned.
PLAN = "plan.json"
# The stages of an audit, by the first word of their names.
_STAGES = ("scan", "survival", "verify", "search", "dla", "corpus")


class Parts:
    """A listener that passes on what it hears, and holds the parts of a run that are finished."""

    def __init__(self, listener: Listener | None = None):
        self.listener, self.last = listener, Progress("the start", 0, 1, 0, 0.0)
        self.done: list[Result] = []

    def __call__(self, progress: Progress) -> None:
        """Hear of a step, and tell the listener."""
        self.last = progress
        if progress.result is not None:
            self.done.append(progress.result)
        if self.listener is not None:
            self.listener(progress)

    def finish(self, part: Result) -> Result:
        """The same Result, after everyone has heard that this part is finished."""
        self(replace(self.last, done=self.last.total, result=part))
        return part


def keep(
    run: Callable[[Parts, Job], Result],
    out: str | Path | None,
    listener: Listener | None = None,
    job: Job | None = None,
) -> tuple[Result, tuple[str, ...]] | None:
    """What `run` finds, and the names of the files that hold it in the folder `out`; an interrupt saves what is done.

    `job`, by default one in `out`, holds what `run` can go on from, until all files are written. Of an interrupted run
    the first finished part becomes the folder's result, the others lie beside it as `verify_L0H2.nc`. A folder that was
    made for the run is gone again where nothing is finished, and so is its plan. None where `job` does a part of a run:
    that is done then.
    Raises Stopped for KeyboardInterrupt, ResultError where the folder cannot be written (before anything runs), and
    what `run` raises.
    """
    parts = listener if isinstance(listener, Parts) else Parts(listener)
    with ExitStack() as stack:
        place = None if out is None else stack.enter_context(files.folder(out))
        working = stack.enter_context(job or Job(place))
        for rest in () if place is None else files.unfinished(place, "*.nc", *page.BESIDE):
            rest.unlink(missing_ok=True)
        over = False
        try:
            found = run(parts, working)
            if place is None:
                return found, ()
            # From here on an interrupt finds the whole finished.
            over, parts.done, parts.last = True, [found], replace(parts.last, stage="saving")
            if not working.finished or not all((place / name).exists() for name in page.files(found)):
                page.save_all(found, place)
            return found, (*page.files(found), *_plan(place))
        except KeyboardInterrupt as stop:
            # Of a run that was stopped in the middle, what it can go on from.
            kept: tuple[str, ...] = ()
            if place is not None:
                begun = tuple(sorted(file.name for file in place.glob("*.npz")))
                kept = _save([working.signed(part, over) for part in parts.done], place) + begun
                if not kept:
                    (place / PLAN).unlink(missing_ok=True)
                kept += _plan(place)
            raise Stopped(parts.last.stage, place, kept, _missing(parts)) from stop
    return None


def _save(parts: list[Result], place: Path) -> tuple[str, ...]:
    """The names of the files that were written; a second interrupt gives up the rest."""
    files: list[str] = []
    try:
        for other in parts[1:]:
            files.append(other.save(place / f"{_name(other)}.nc").name)  # noqa: PERF401 - some are there if it stops
        # Last, since a page takes the longest.
        return (*(page.save_all(parts[0], place) if parts else ()), *files)
    except KeyboardInterrupt:
        return tuple(files)


def _plan(place: Path) -> tuple[str, ...]:
    """A plan is one of the files of a run that was planned: asked again, it goes on with the same prompts."""
    return (PLAN,) if (place / PLAN).exists() else ()


def _name(part: Result) -> str:
    # A name that came out of a file could lead elsewhere.
    words = (part.method, part.data.attrs.get("writer", ""))
    return "_".join(filter(None, (re.sub("[^A-Za-z0-9.+]+", "-", str(word)).strip(".-")[:40] for word in words)))


def _missing(parts: Parts) -> tuple[str, ...]:
    """The stages that were not finished; of a run without parts there is nothing to say."""
    word = parts.last.stage.split()[0]
    if not parts.done or word not in _STAGES:
        return ()
    # A verified writer may not be the last one.
    over = parts.last.result is not None and word != "verify"
    left = _STAGES[_STAGES.index(word) + over :]
    begun = any(part.method == "verify" for part in parts.done)
    return tuple(f"the rest of {stage}" if stage == "verify" and begun else stage for stage in left)
