"""Who listens to a command: a person, a person who wants the verdict alone, or another program?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from unwrite.errors import plain

if TYPE_CHECKING:
    from unwrite.model.view import Model
    from unwrite.result import Result
    from unwrite.run.stream import Listener
    from unwrite.tokens import Tokens

JSON = "--json"


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

    @contextmanager
    def listening(self) -> Iterator[Listener | None]:
        """What a method tells of its way: events, a live screen, plain lines, or nobody listens."""
        from unwrite.report import events, live, terminal
        from unwrite.run.stream import device_memory

        if self.quiet:
            yield None
        elif self.as_json:
            yield events.hear
        else:
            with live.listening(terminal.console(stderr=True), device_memory, self.hint) as listener:
                yield listener

    def end(self, found: Result, out: Path | None, files: tuple[str, ...]) -> None:
        """Say what was found, and where it is."""
        from unwrite.report import events, terminal

        if self.as_json:
            events.say("result", **events.found(found), out=None if out is None else str(out), files=files)
            return
        screen = terminal.console()
        if self.quiet:
            screen.print(plain(terminal.last_word(found)))
            return
        terminal.show(found, screen)
        if files:
            screen.print("\n" + plain(f"written: {out}/{', '.join(files)}"))


def produce(
    lm: Model, tokens: Tokens | dict[str, Tokens], run: Callable[[Listener], Result], out: Path | None, voice: Voice
) -> None:
    """Run a method into a folder that was found to be writable before, and say what it finds."""
    from unwrite.combined.keep import keep

    voice.start(lm, tokens)
    with voice.listening() as listener:
        found, files = keep(run, out, listener)
    voice.end(found, out, files)


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
