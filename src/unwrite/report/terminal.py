"""What does a person see in a terminal? Tables of a saved result; no control character of a stranger gets through."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from unwrite.errors import plain
from unwrite.report.rows import Row, disagreements, folded_line, rows, soundness, texts
from unwrite.report.verdict import verdict
from unwrite.report.verified import actors, sentence, trajectory
from unwrite.result import Result

_WIDE = 160


def console(stderr: bool = False) -> Console:
    """A console that keeps tables whole where nobody's window limits them (a pipe, a file)."""
    screen = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE, no_color=True)


def show(result: Result, screen: Console) -> None:
    """Print what a result says: model and certificate, its tables, and the verdict."""
    screen.print(Text(plain(headline(result)), style="bold"))
    screen.print(Text(plain(certificate(result))))
    for part in _verify(result) if result.method == "verify" else _scan(result):
        screen.print(part)


def _verify(result: Result) -> Iterator[RenderableType]:
    yield _grid("", ("location", "level", "background", "survival ± SE", "generic"), trajectory(result))
    yield Text("")
    header = ("node", "share", "without", "erased", "filled in", "through values", "how")
    yield _grid("later nodes that act on it", header, actors(result))
    yield Text("")
    yield Text(plain(last_word(result)))


def _grid(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i in (0, 6) else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _scan(result: Result) -> Iterator[RenderableType]:
    for name, data, read in texts(result):
        shown, folded = rows(data)
        yield _table(f"{name or read['source']}: {read['prompts']} × {read['length']} tokens", shown)
        if folded:
            yield Text(folded_line(folded), "dim")
        yield Text(soundness(data, result.provenance["settings"]), "dim")
    for line in disagreements(result):
        yield Text(plain(f"texts disagree: {line}"), style="yellow")
    yield Text("")
    yield Text(plain(last_word(result)))


def last_word(result: Result) -> str:
    """What the result amounts to: of a scan its paragraph, of a verification its sentence."""
    return sentence(result) if result.method == "verify" else result.data.attrs.get("verdict") or verdict(result)


def headline(result: Result) -> str:
    """Model, shape and convention in one line."""
    model = result.provenance["model"]
    centred = ", centred" if model["centred"] else ""
    return (
        f"{model['name']} · {model['family']} · {model['layers']} layers × {model['heads']} heads, d_model "
        f"{model['d_model']} · {model['dtype']} on {model['device']} · convention {model['convention']}{centred}"
    )


def certificate(result: Result) -> str:
    """The conservation check in one line."""
    model = result.provenance["model"]
    parts = ", ".join(f"{name} {error:.0e}" for name, error in model["certificate"].items())
    return f"certificate: {parts} (relative error, limit {model['certificate_limit']:.0e})"


def _table(title: str, shown: list[Row]) -> Table:
    table = Table(title=Text(plain(title)), title_justify="left", box=None, pad_edge=False)
    for name in ("writer", "‖w‖/‖x‖", "after", "end"):
        table.add_column(name, justify="left" if name == "writer" else "right", no_wrap=True)
    table.add_column("writes against it: share ± SE (median)", min_width=36)
    table.add_column("reading (energy-weighted)", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for row in shown:
        level = (f"{row.start:.2f}", f"{row.end:.2f}")
        table.add_row(row.writer, f"{row.relative_norm:.2f}", *level, row.against, row.reading, f"{row.n:,}")
    return table
