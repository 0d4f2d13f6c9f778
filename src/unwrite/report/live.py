"""What does a person see while it runs? Bars, memory and a table that grows in a terminal; plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.cells import set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from unwrite.errors import plain
from unwrite.report import audited
from unwrite.report.terminal import grid
from unwrite.report.views import view
from unwrite.result import Result

_HEADER = audited.HEADER[:6]
_STAGE = 22  # cells for a stage's name: "search L0H3 (held out)"
# All of a line but its bar, which takes what the window leaves.
_FIXED, _NARROWEST, _WIDEST = 70, 6, 30
# A further pass over the same prompts is named after the first one: "verify L0H3, hidden".
_AGAIN = ", "
_STOPPING = "stopping as soon as this step is done; a second Ctrl-C does not wait"


@runtime_checkable
class Heard(Protocol):
    """What a listener hears: `done` of `total` prompts of a stage, or with a `result` that a part is finished.

    `begun` is how many more are done in part, and `doing` says so in what is counted there; `stopping`: an interrupt
    waits for what is under way.
    """

    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def before(self) -> int: ...
    @property
    def begun(self) -> float: ...
    @property
    def doing(self) -> str: ...
    @property
    def stopping(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def rate(self) -> float: ...
    @property
    def left(self) -> float: ...
    @property
    def result(self) -> Result | None: ...


@contextmanager
def listening(screen: Console, device: Callable[[], int], hint: str = "") -> Iterator[Callable[[Heard], None]]:
    """A listener that shows on `screen` what it hears: live in a terminal, else a line for a tenth of a stage.

    Arguments: `device` says how many bytes an accelerator held at most, 0 without one; `hint` is shown beside the
    memory. What was shown live is gone again at the end, but for one line a stage; after an error or an interrupt the
    table stays.
    """
    if not screen.is_interactive:
        yield _lines(screen)
        return
    shown = _Shown(screen, device, hint)
    with Live(
        console=screen, get_renderable=shown.frame, refresh_per_second=4, transient=True, redirect_stdout=False
    ) as live:
        try:
            yield shown.hear
            shown.settle()
        except BaseException:
            shown.over, live.transient = True, False
            raise


def _lines(screen: Console) -> Callable[[Heard], None]:
    """At most one line for every tenth of a stage, and one for every part that says something on its own."""
    tenths: dict[str, int] = {}

    def hear(step: Heard) -> None:
        if step.result is not None:
            if words := _words(step.result):
                screen.print(Text(words))
            return
        if step.stopping:
            screen.print(Text(_STOPPING))
            return
        tenth = int(10 * _reached(step) / step.total)
        if tenths.get(step.stage) != tenth:
            screen.print(Text(line(step, screen.width)))
        tenths[step.stage] = tenth

    return hear


class _Shown:
    """The stage that runs now, the writers that are verified, and the memory."""

    def __init__(self, screen: Console, device: Callable[[], int], hint: str):
        self.screen, self.device, self.hint = screen, device, hint
        self.now: Heard | None = None
        self.before: tuple[Heard, ...] = ()
        self.rows: tuple[tuple[str, ...], ...] = ()
        self.over = False
        self.spinner = Spinner("dots")

    def hear(self, step: Heard) -> None:
        """Keep a step for the next frame; a finished stage becomes a line above, a verified writer a row."""
        if step.result is not None:
            self.settle()
            if row := view(step.result).row(step.result):
                self.rows += (row[: len(_HEADER)],)
            elif words := _words(step.result):
                self.screen.print(Text(words))
            return
        passes = (*self.before, self.now) if self.now is not None else ()
        if passes and step.stage.startswith(passes[0].stage + _AGAIN):
            self.before = passes if step.stage != passes[-1].stage else self.before
        elif passes and (step.stage != passes[-1].stage or _reached(step) <= _reached(passes[-1])):
            self.settle()
        self.now = step

    def settle(self) -> None:
        """Leave the line of the stage that ran behind, above what is live."""
        if self.now is not None:
            self.screen.print(Text(line(self.now, self.screen.width, self.before), no_wrap=True))
        self.now, self.before = None, ()

    def frame(self) -> RenderableType:
        """What is live: the table, the stage that runs, the memory; of a run that is over the table alone."""
        table = [Text(""), grid("", _HEADER, self.rows)] if self.rows else []
        if self.over:
            return Group(*table)
        words = "computing …" if self.now is None else line(self.now, self.screen.width - 2)
        self.spinner.update(text=Text(words, no_wrap=True, overflow="ellipsis"))
        hint = f" · {_STOPPING}" if self.now is not None and self.now.stopping else self.hint
        memory = Text("  " + _memory(self.device()) + hint, "dim", no_wrap=True, overflow="ellipsis")
        return Group(*table, self.spinner, memory)


def line(step: Heard, width: int, before: Sequence[Heard] = ()) -> str:
    """A stage in one line that fits `width`; `before` are the ends of earlier passes over it, which count."""
    bar = max(_NARROWEST, min(_WIDEST, width - _FIXED))
    filled = int(bar * _reached(step) / step.total)
    name, rate, seconds = step.stage, step.rate, step.seconds
    if before:
        name, seconds = before[0].stage, sum(one.seconds for one in (*before, step))
        rate = sum(one.tokens for one in (*before, step)) / seconds if seconds else 0.0
    left = f"left {duration(step.left)}" if _reached(step) > step.before else ""
    left = f"in {duration(seconds)}" if step.done == step.total else left
    left = "done before" if step.before == step.total else left
    return (
        f"{set_cell_size(plain(name), _STAGE)} {'█' * filled}{'·' * (bar - filled)} "
        f"{plain(step.doing) or f'{step.done}/{step.total} prompts':>15}  {f'{rate:,.0f} tok/s':>12}  {left}"
    )


def _reached(step: Heard) -> float:
    """How many prompts are done, of those that are begun a part."""
    return step.done + step.begun


def _words(part: Result) -> str:
    """What a finished part says on its own, in one line; of a part that only matters in the whole, nothing."""
    shown = view(part)
    if not (row := shown.row(part)):
        return plain(shown.heard(part))
    writer, verdict, *numbers = row[: len(_HEADER)]
    names = [column.name for column in _HEADER[2:]]
    return plain(f"{writer}: {verdict}; {', '.join(map(' '.join, zip(names, numbers, strict=True)))}")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(device: int) -> str:
    """The most memory that this process held so far, and an accelerator for it."""
    held = [f"{_gib(most)} of memory"] if (most := _resident()) else []
    held += [f"{_gib(device)} on the device"] if device else []
    return f"at most {', '.join(held)}" if held else ""


def _resident() -> int:
    """Bytes at the peak; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    # Kibibytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
