"""What can be done from a shell? Thin: parses, calls one method, prints, saves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unwrite.errors import UnwriteError, plain

if TYPE_CHECKING:
    from unwrite.model.view import Model
    from unwrite.result import Result
    from unwrite.run.stream import Listener, Progress
    from unwrite.tokens import Tokens

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="What each part of a transformer writes into the residual stream, and who writes against it.",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A hub name, a folder of a model, or default.")]
TextPath = Annotated[
    list[str], typer.Option("--text", metavar="[NAME=]PATH", help="A text file or folder; several are compared.")
]
Prompts = Annotated[int, typer.Option("-n", min=1, help="At most this many prompts of each text.")]
Length = Annotated[
    int | None, typer.Option("--length", min=2, help="Tokens of a prompt, by default min(1024, context).")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for the result and its table.")]
TableOut = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for result.nc and table.csv.")]
Device = Annotated[str | None, typer.Option("--device", help="Where the model goes, such as cuda.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; by default that of the weights.")]
Convention = Annotated[str, typer.Option("--convention", help="paper or raw.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the verdict alone.")]


@app.callback()
def _app(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every command."""


@app.command()
def audit(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub name or folder, by default the bundled model.")
    ] = None,
    text: TextPath = [],  # noqa: B006 - typer copies it
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="Ask about this prompt; by default found ones.")
    ] = [],  # noqa: B006
    n: Prompts = 300,
    length: Length = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    quiet: Quiet = False,
) -> None:
    """Who writes, what survives, which attributions can be believed: scan, verify, dla and a verdict in words."""
    from unwrite.combined.audit import audit as run
    from unwrite.combined.audit import demonstration

    if model is None:
        if text:
            raise typer.BadParameter("a text needs a MODEL to read it", param_hint="--text")
        lm, tokens = demonstration(n, length)
    else:
        lm = _load(model, device, dtype, convention)
        tokens = _read(lm, text, n, length)
    _certified(lm, quiet)
    _produce(lambda: run(lm, tokens, prompt or None, listener=_listener(quiet)), out, quiet)


@app.command()
def scan(
    model: ModelName,
    text: TextPath,
    writers: Annotated[str | None, typer.Option("--writers", help="Nodes, such as L0H1,MLP2; by default all.")] = None,
    n: Prompts = 300,
    length: Length = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    skip: Annotated[int, typer.Option("--skip", min=0, help="Positions at the start of a prompt, apart.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Who writes, how the level along each write changes, and who writes against it."""
    from unwrite.methods.scan import scan as run

    lm = _load(model, device, dtype, convention)
    tokens = _read(lm, text, n, length)
    _certified(lm, quiet)
    _produce(lambda: run(lm, tokens, _names(writers), skip, listener=_listener(quiet)), out, quiet)


@app.command()
def verify(
    model: ModelName,
    writer: Annotated[str, typer.Argument(metavar="WRITER", help="One node, such as L0H2.")],
    text: TextPath,
    erasers: Annotated[str | None, typer.Option("--erasers", help="Heads to hide it from, such as L2H3,L2H4.")] = None,
    n: Prompts = 100,
    length: Length = None,
    out: TableOut = None,
    device: Device = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    quiet: Quiet = False,
) -> None:
    """What survives of one node's write, and who removes it because of it? By executed runs without the write."""
    from unwrite.methods.verify import verify as run

    lm = _load(model, device, dtype, convention)
    tokens = _one_text(lm, text, n, length)
    _certified(lm, quiet)
    _produce(lambda: run(lm, tokens, writer, _names(erasers), listener=_listener(quiet)), out, quiet)


@app.command()
def dla(
    model: ModelName,
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="A prompt; several may be given.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="One token, such as ' Paris'; by default the model's first choice.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The token it is compared with; by default the second choice.")
    ] = None,
    at: Annotated[str, typer.Option("--at", help="Replace writes at 'all' rows, or at the last 'position'.")] = "all",
    replace: Annotated[str, typer.Option("--replace", help="By zero, mean or resample.")] = "zero",
    text: Annotated[
        list[str], typer.Option("--text", metavar="PATH", help="Other text, for means and invariance.")
    ] = [],  # noqa: B006 - typer copies it
    n: Prompts = 100,
    out: TableOut = None,
    device: Device = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    quiet: Quiet = False,
) -> None:
    """What does each node do to a logit difference: four readings, the executed truth, and which to believe."""
    from unwrite.methods.dla import dla as run
    from unwrite.tokens import prompts

    lm = _load(model, device, dtype, convention)
    longest = max(2, prompts(prompt, lm.tokenizer).length)
    texts = _one_text(lm, text, n, longest) if text else None
    _certified(lm, quiet)
    _produce(
        lambda: run(lm, prompt, answer, against, at=at, replace=replace, texts=texts, listener=_listener(quiet)),
        out,
        quiet,
    )


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gelu-4l.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="DIR", help="The checkpoint's folder; by default the hub's.")
    ] = None,
    text: Annotated[
        list[str], typer.Option("--text", metavar="PATH", help="A text; by default the paper's own, from the hub.")
    ] = [],  # noqa: B006 - typer copies it
    n: Prompts = 300,
    length: Length = None,
    out: TableOut = None,
    quiet: Quiet = False,
) -> None:
    """The five figures of Dao, Lau, Rager and Janiak 2023: the paper's numbers beside ours."""
    from unwrite.combined.reproduce import WEIGHTS
    from unwrite.combined.reproduce import reproduce as run

    lm = _load(str(weights or WEIGHTS), None, None, "paper")
    tokens = _one_text(lm, text, n, length) if text else None
    _certified(lm, quiet)
    _produce(lambda: run(name, lm, tokens, n, listener=_listener(quiet)), out, quiet)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a result.nc.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Save the picture: .png, .svg, .pdf or .html.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Print a saved result again, or save its picture."""
    from unwrite.result import read, write

    found = read(folder)
    if out is None:
        _finish(found, quiet)
        return
    if out.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise typer.BadParameter("the picture's name must end in .png, .svg, .pdf or .html", param_hint="--out")
    chart = found.figure()
    write(out, lambda place: chart.save(str(place), scale_factor=2))


@app.command()
def doctor(
    model: ModelName,
    n: Prompts = 300,
    length: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
) -> None:
    """Is the decomposition exact, will a scan fit, and how long will it take?"""
    from unwrite.combined.doctor import doctor as run
    from unwrite.report import terminal

    lm = _load(model, device, dtype, convention)
    diagnosis, screen = run(lm, n, length), terminal.console()
    screen.print(plain(repr(lm)), markup=False)
    for check in diagnosis.checks:
        line = f"{'✓' if check.ok else '✗'} {check.name}: {check.found}"
        screen.print(line + ("" if check.ok or not check.fix else f". Next: {check.fix}"), markup=False)
    screen.print(
        f"a scan of {diagnosis.n} × {diagnosis.length} tokens: about {diagnosis.memory / 2**30:.2f} GiB, "
        f"{_duration(diagnosis.seconds)}",
        markup=False,
    )
    if not diagnosis.ok:
        raise typer.Exit(1)


def _load(model: str, device: str | None, dtype: str | None, convention: str) -> Model:
    from unwrite.errors import ModelError
    from unwrite.model.load import load, quieten

    quieten()
    if dtype is not None and dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise ModelError("unknown dtype", got=dtype, expected="float64, float32, float16 or bfloat16")
    return load(model, device=device, dtype=dtype, convention=convention)


def _read(lm: Model, paths: list[str], n: int, length: int | None) -> Tokens | dict[str, Tokens]:
    from unwrite.tokens import text

    if not paths:
        raise typer.BadParameter("name the text that the model should read", param_hint="--text")
    named = [path.split("=", 1) if "=" in path and not Path(path).exists() else [path, path] for path in paths]
    length = length or min(1024, lm.context or 1024)
    if len(named) == 1:
        return text(Path(named[0][1]), lm.tokenizer, n, length)
    sources: dict[str, Any] = {name: Path(path) for name, path in named}
    if len(sources) < len(named):
        raise typer.BadParameter("two texts have the same name; write NAME=PATH", param_hint="--text")
    return text(sources, lm.tokenizer, n, length)  # pyright: ignore[reportReturnType]


def _certified(lm: Model, quiet: bool) -> None:
    if not quiet:
        from unwrite.report import terminal

        terminal.console(stderr=True).print(f"certificate: {plain(lm.certificate.explain())}", markup=False)


def _listener(quiet: bool) -> Listener | None:
    """Live progress in a terminal; a plain line every tenth of the way elsewhere."""
    if quiet:
        return None
    from unwrite.report import terminal

    screen = terminal.console(stderr=True)
    shown: dict[str, int] = {}

    def line(progress: Progress) -> None:
        tenth = 10 * progress.done // progress.total
        if screen.is_terminal:
            screen.print(_progress(progress), end="\n" if progress.done == progress.total else "\r", markup=False)
        elif shown.get(progress.stage) != tenth:
            screen.print(_progress(progress), markup=False)
        shown[progress.stage] = tenth

    return line


def _progress(progress: Progress) -> str:
    filled = 30 * progress.done // progress.total
    bar = "█" * filled + "·" * (30 - filled)
    left = f"left {_duration(progress.left)}" if progress.done < progress.total else f"in {_duration(progress.seconds)}"
    return (
        f"{plain(progress.stage)} {bar} {progress.done}/{progress.total} prompts  {progress.rate:,.0f} tok/s  {left}   "
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _one_text(lm: Model, paths: list[str], n: int, length: int | None) -> Tokens:
    tokens = _read(lm, paths, n, length)
    if isinstance(tokens, dict):
        raise typer.BadParameter("one text at a time", param_hint="--text")
    return tokens


def _names(listed: str | None) -> list[str] | None:
    return listed.split(",") if listed else None


def _produce(run: Callable[[], Result], out: Path | None, quiet: bool) -> None:
    """Run a method into a folder that was found to be writable before, and print what it says."""
    from contextlib import nullcontext

    from unwrite import result as results
    from unwrite.report import page, terminal

    with nullcontext() if out is None else results.folder(out):
        found = run()
        files = () if out is None else page.save_all(found, out)
    _finish(found, quiet)
    if out is not None:
        terminal.console().print(f"\nwritten: {plain(out)}/{', '.join(files)}", markup=False)


def _finish(found: Result, quiet: bool) -> None:
    from unwrite.report import terminal

    screen = terminal.console()
    if quiet:
        screen.print(plain(terminal.last_word(found)), markup=False)
    else:
        terminal.show(found, screen)


def main() -> None:
    """Entry point: one clear message and exit code 1 for what a user can cause, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    try:
        app()
    except UnwriteError as error:
        _fail(str(error), debug)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _fail(message: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
