"""What does a person see in a terminal? Tables of a saved result; no control character of a stranger gets through."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unwrite.errors import plain
from unwrite.report.columns import Column, Listing
from unwrite.report.views import view
from unwrite.result import Result

_WIDE = 160


def console(stderr: bool = False) -> Console:
    """A console that keeps tables whole where nobody's window limits them (a pipe, a file), and text as it is."""
    stream = sys.stderr if stderr else sys.stdout
    settings: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    # Colours can be forced into a pipe by the environment; what moves the cursor cannot.
    screen = Console(**settings, force_interactive=None if stream.isatty() else False)
    return screen if screen.is_terminal else Console(**settings, force_interactive=False, width=_WIDE, no_color=True)


def show(result: Result, screen: Console, whole: bool = False) -> None:
    """Print what a result says: model and certificate, its tables (the foremost rows, or all), and the verdict."""
    screen.print(Text(plain(headline(result)), style="bold"))
    screen.print(Text(plain(certificate(result))))
    shown = view(result)
    for part in shown.parts(result):
        if isinstance(part, Listing):
            _list(part, screen, whole)
        else:
            screen.print(Text(plain(part.words), part.tone))
    screen.print(Text(plain(shown.words(result))))


def _list(listing: Listing, screen: Console, whole: bool) -> None:
    """A table of all lines or the foremost, how many are left out, and an empty line."""
    lines = listing.rows
    few = not whole and listing.foremost is not None
    kept = [lines[i] for i in listing.foremost or () if i < len(lines)] if few else lines
    screen.print(grid(listing.title, listing.columns, kept))
    if more := len(lines) - len(kept):
        screen.print(Text(f"{more} more: unwrite show DIR --all", "dim"))
    screen.print()


def grid(title: str, header: Iterable[Column], lines: Iterable[tuple[str, ...]]) -> Table:
    """A table with a title and a header, every cell plain; it keeps its words together where there is room."""
    table = Table(title=Text(plain(title)) if title else None, title_justify="left", box=None, pad_edge=False)
    for column in header:
        side, wraps = "right" if column.holds == "numbers" else "left", column.holds == "words"
        table.add_column(column.name, justify=side, no_wrap=not wraps, min_width=column.least)
    for line in lines:
        table.add_row(*map(plain, line))
    return table


def headline(result: Result) -> str:
    """Model, shape and convention in one line."""
    model = result.provenance["model"]
    if "certificate" not in model:  # of a circuit that was taken from a result
        return " · ".join(
            filter(None, [model.get("name", ""), f"weights {model.get('weights', '')[:12] or 'unknown'}"])
        )
    centred = ", centred" if model["centred"] else ""
    row = f" · row: {model['row']}" if model.get("row", "by hand") != "by hand" else ""
    return (
        f"{model['name']} · {model['family']}{row} · {model['layers']} layers × {model['heads']} heads, d_model "
        f"{model['d_model']} · {model['dtype']} on {model['device']} · convention {model['convention']}{centred}"
    )


def certificate(result: Result) -> str:
    """The conservation check in one line."""
    model = result.provenance["model"]
    if "pipeline" in model:
        return "certificate: none; images are those of the pipeline as it is, with text exchanged where that is said"
    if "certificate" not in model:
        return "certificate: that of the result it was taken from"
    parts = ", ".join(f"{name} {error:.0e}" for name, error in model["certificate"].items())
    said = f"certificate: {parts} (relative error, limit {model['certificate_limit']:.0e})"
    beyond = model.get("certificate_beyond")
    return (
        said if beyond is None else f"{said}; not checked beyond {beyond:,} tokens, where the model computes otherwise"
    )
