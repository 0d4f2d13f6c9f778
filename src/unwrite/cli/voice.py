"""Who listens to a command: a person, a person who wants the verdict alone, or another program?"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from unwrite.errors import counted, plain

if TYPE_CHECKING:
    from rich.console import Console

    from unwrite.model.view import Model
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener
    from unwrite.studies.doctor import Diagnosis
    from unwrite.studies.plan import Planned

JSON = "--json"
_WIDE = 120


@dataclass(frozen=True)
class Voice:
    """Who listens: a person, a person who wants the verdict alone, or another program."""

    quiet: bool
    as_json: bool
    hint: str = ""

    def start(self, lm: Model, tokens: Tokens | dict[str, Tokens]) -> None:
        """Say what is about to be read by which model, and that the model is exact."""
        from unwrite.model.load import provenance
        from unwrite.report import events, terminal

        if self.as_json:
            read = {name: part.about() for name, part in (tokens if isinstance(tokens, dict) else {"": tokens}).items()}
            events.say("start", model=provenance(lm), tokens=read, certificate=lm.certificate.explain())
        elif not self.quiet:
            terminal.console(stderr=True).print(plain(f"certificate: {lm.certificate.explain()}"))

    def plan(self, plan: Planned) -> None:
        """Say what a run consists of and how long it will take, before it is begun."""
        from unwrite.report import events, terminal
        from unwrite.report.live import duration

        if self.as_json:
            events.say("plan", n=plan.n, length=plan.length, seconds=dict(plan.seconds), total=plan.total)
        elif not self.quiet:
            stages = " · ".join(f"{name} {duration(seconds)}" for name, seconds in plan.seconds.items())
            whole = f"; about {duration(plan.total)} in all" if len(plan.seconds) > 1 else ""
            allowed = "" if plan.budget is None else f"--budget {duration(plan.budget)}; "
            prompts = counted(plan.n, "prompt")
            terminal.console(stderr=True).print(plain(
                f"plan: {prompts} of {plan.length} tokens; {stages}{whole} ({allowed}-n and --length say otherwise)"
            ))  # fmt: skip

    @contextmanager
    def listening(self) -> Iterator[Listener | None]:
        """What a method tells of its way: events, a live screen, plain lines, or nobody listens."""
        from unwrite.report import events, live, terminal
        from unwrite.run.loop.stream import device_memory

        with ExitStack() as stack:
            listener = None
            if self.as_json and not self.quiet:
                listener = events.hear
            elif not self.quiet:
                screen = terminal.console(stderr=True)
                listener = stack.enter_context(live.listening(screen, device_memory, self.hint))
            yield stack.enter_context(_asked(listener))

    def part(self, job: Job) -> None:
        """Say that a shard is done, and what to do with it."""
        from unwrite.report import events, terminal

        part, of = job.shard
        if self.as_json:
            events.say("shard", shard=part, of=of, out=str(job.folder))
        else:
            words = f"shard {part}/{of} is done and kept in {job.folder}. With all {of}: unwrite merge DIR… --out DIR"
            terminal.console().print(plain(words))

    def end(self, found: Result, out: Path | None, files: tuple[str, ...], whole: bool = False) -> None:
        """Say what was found, and where it is."""
        from unwrite.report import events, terminal, views

        if self.as_json:
            events.say("result", **events.found(found), out=None if out is None else str(out), files=files)
            return
        screen = terminal.console()
        if self.quiet:
            screen.print(plain(views.words(found)))
            return
        terminal.show(found, screen, whole)
        if files:
            screen.print("\n" + plain(f"written: {out}/{', '.join(files)}"))


@contextmanager
def _asked(listener: Listener | None) -> Iterator[Listener]:
    """A listener that passes on what it hears, and at the signal SIGUSR1 says how far the run is."""
    last: list[Any] = []

    def hear(step: Any) -> None:
        last[:] = [step]
        if listener is not None:
            listener(step)

    def answer(*_: object) -> None:
        from unwrite.report import live

        line = live.line(last[0], _WIDE) if last else "nothing is done yet"
        print(plain(line), file=sys.stderr, flush=True)  # noqa: T201

    number = getattr(signal, "SIGUSR1", None)
    before = None if number is None else signal.signal(number, answer)
    try:
        yield hear
    finally:
        if number is not None:
            signal.signal(number, before)


Read = TypeVar("Read", bound="Tokens | dict[str, Tokens]")


def produce(
    lm: Model,
    read: Callable[[Job], Read],
    method: Callable[[Read, Listener, Job], Result],
    out: Path | None,
    voice: Voice,
    job: Job,
) -> None:
    """Read and run a method into a folder that was found to be writable before, and say what it finds."""
    from unwrite.studies.keep import keep

    def run(listener: Listener, working: Job) -> Result:
        tokens = read(working)
        voice.start(lm, tokens)
        return method(tokens, listener, working)

    with voice.listening() as listener:
        kept = keep(run, out, listener, job)
    if kept is not None:
        voice.end(kept[0], out, kept[1])
    elif job.peers is None:
        voice.part(job)


def diagnose(diagnosis: Diagnosis, screen: Console, when: str = "") -> None:
    """Say where weights lie, if that is more than one place, and what was checked."""
    if when or len(diagnosis.regions) > 1:
        for line in (*map(str, diagnosis.regions), *filter(None, [diagnosis.per_pass])):
            screen.print(plain(f"{when}{line}"))
    for check in diagnosis.checks:
        line = f"{'✓' if check.ok else '✗'} {check.name}: {check.found}"
        screen.print(plain(when + line + ("" if check.ok or not check.fix else f". Next: {check.fix}")))


def fail(kind: str, message: str, code: int, **more: object) -> NoReturn:
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc()
    if not event(kind, message, code, **more):
        print(f"error: {message}" if code == 1 else message, file=sys.stderr)  # noqa: T201
    sys.exit(code)


def event(kind: str, message: str, code: int, **more: object) -> bool:
    """Tell another program of an error, if one listens."""
    if JSON not in sys.argv:
        return False
    from unwrite.report import events

    events.say("error", kind=kind, message=message, code=code, **more)
    return True
