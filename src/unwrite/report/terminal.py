"""What does a person see in a terminal? Tables of a saved result; no control character of a stranger gets through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from xarray import Dataset

from unwrite.errors import plain
from unwrite.report import audited, believed, found, looked, patched, survived
from unwrite.report.columns import Column, listed
from unwrite.report.scanned import HEADER, disagreements, folded_line, rows, soundness, texts
from unwrite.report.verdict import verdict
from unwrite.report.verified import ACTORS, TRAJECTORY, actors, sentence, trajectory, turns
from unwrite.result import Result

# Of a result, in full or its foremost rows.
_Shown = Callable[[Result, bool], Iterator[RenderableType]]

# A title and lines, prompt by prompt.
_ByPrompt = Callable[[Dataset], Iterator[tuple[str, list[tuple[str, ...]]]]]

_WIDE, _LINES = 160, 24


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
    for part in _PARTS.get(result.method, _any)(result, whole):
        screen.print(part)


def _verify(result: Result, whole: bool) -> Iterator[RenderableType]:
    yield from _foremost("", TRAJECTORY, trajectory(result), whole, turns(result, _LINES // 2))
    yield Text("")
    yield from _foremost("later nodes that act on it", ACTORS, actors(result), whole)
    yield Text("")
    yield Text(plain(last_word(result)))


def _dla(result: Result, _: bool) -> Iterator[RenderableType]:
    yield from _attribution(result)
    yield Text("")
    yield Text(plain(last_word(result)))


def _attribution(result: Result) -> Iterator[RenderableType]:
    for one in believed.asked(result.data):
        yield Text(plain(one.title))
        yield Text(plain(one.sums), "dim")
        yield grid("", believed.header(result.data), one.rows)
        yield Text("")
    for replacement in believed.REPLACEMENTS if "trust" in result.data else ():
        if lines := believed.trusted(result.data, replacement):
            yield grid(believed.title(result.data, replacement), believed.TRUST_HEADER, lines)
            yield Text("")
    yield Text(plain(believed.added(result.data)), "dim")


def _audit(result: Result, whole: bool) -> Iterator[RenderableType]:
    for name, data, read in texts(result):
        yield Text(plain(f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"))
        yield Text(soundness(data, result.provenance["settings"]), "dim")
    left = audited.removed(result)
    title = "what survives of every material write, by runs without it"
    yield from _foremost(title, survived.HEADER, survived.rows(left), whole)
    yield Text("")
    yield grid("writers verified, by runs without them", audited.HEADER, map(audited.row, audited.verified(result)))
    yield Text("")
    yield from _attribution(result)
    yield Text(plain(audited.search(result)))
    yield Text("")
    yield Text(plain(last_word(result)))


def _patched(result: Result, _: bool) -> Iterator[RenderableType]:
    for one in patched.shown(result.data):
        yield Text(plain(one.title))
        yield Text(plain(one.sums), "dim")
        yield grid("", one.header, one.rows)
        yield Text("")
    if more := patched.left_out(result.data):
        yield Text(more, "dim")
    if lines := patched.agreement(result.data):
        yield grid("how estimates agree with what was executed", patched.AGREEMENT, lines)
        yield Text("")
    yield Text(plain(last_word(result)))


def _lens(result: Result, whole: bool) -> Iterator[RenderableType]:
    yield from _by_prompt(result, looked.LENS, looked.lenses, whole, looked.foremost(result.data, _LINES))


def _attention(result: Result, whole: bool) -> Iterator[RenderableType]:
    yield from _by_prompt(result, looked.ATTENTION, looked.looks, whole, range(_LINES))


def _by_prompt(
    result: Result, header: Iterable[Column], lines: _ByPrompt, whole: bool, which: Iterable[int]
) -> Iterator[RenderableType]:
    """A table for each of the first prompts, and a sentence."""
    for title, rows_ in lines(result.data):
        yield from _foremost(title, header, rows_, whole, which)
        yield Text("")
    yield Text(plain(last_word(result)))


def _any(result: Result, whole: bool) -> Iterator[RenderableType]:
    columns, lines = listed(result)
    yield from _foremost("", columns, lines, whole)
    yield Text("")
    yield Text(plain(last_word(result)))


def _listed(header: Iterable[Column], rows: Callable[[Dataset], list[tuple[str, ...]]], always: bool = False) -> _Shown:
    """A result that is one table, `always` in full, and a sentence."""

    def parts(result: Result, whole: bool) -> Iterator[RenderableType]:
        yield from _foremost("", header, rows(result.data), whole or always)
        yield Text("")
        yield Text(plain(last_word(result)))

    return parts


def _foremost(
    title: str,
    header: Iterable[Column],
    lines: list[tuple[str, ...]],
    whole: bool,
    which: Iterable[int] = range(_LINES),
) -> Iterator[RenderableType]:
    """A table of all lines or the foremost, by default the first, and how many are left out."""
    kept = lines if whole else [lines[i] for i in which if i < len(lines)]
    yield grid(title, header, kept)
    if more := len(lines) - len(kept):
        yield Text(f"{more} more: unwrite show DIR --all", "dim")


def grid(title: str, header: Iterable[Column], lines: Iterable[tuple[str, ...]]) -> Table:
    """A table with a title and a header, every cell plain; it keeps its words together where there is room."""
    table = Table(title=Text(plain(title)) if title else None, title_justify="left", box=None, pad_edge=False)
    for column in header:
        side, wraps = "right" if column.holds == "numbers" else "left", column.holds == "words"
        table.add_column(column.name, justify=side, no_wrap=not wraps, min_width=column.least)
    for line in lines:
        table.add_row(*map(plain, line))
    return table


def _scan(result: Result, _: bool) -> Iterator[RenderableType]:
    yield from _scanned(result)
    yield Text("")
    yield Text(plain(last_word(result)))


def _scanned(result: Result) -> Iterator[RenderableType]:
    for name, data, read in texts(result):
        shown, folded = rows(data)
        title = f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"
        yield grid(title, HEADER, (row.cells for row in shown))
        if folded:
            yield Text(folded_line(folded), "dim")
        yield Text(soundness(data, result.provenance["settings"]), "dim")
    for line in disagreements(result):
        yield Text(plain(f"texts disagree: {line}"), style="yellow")


def last_word(result: Result) -> str:
    """What the result amounts to: of a scan or an audit its paragraph, of the others a sentence."""
    if result.method in _WORDS:
        return _WORDS[result.method](result)
    own = result.data.attrs.get("verdict")
    return own or (verdict(result) if result.method in ("scan", "audit") else result.method)


def headline(result: Result) -> str:
    """Model, shape and convention in one line."""
    model = result.provenance["model"]
    centred = ", centred" if model["centred"] else ""
    row = f" · row: {model['row']}" if model.get("row", "by hand") != "by hand" else ""
    return (
        f"{model['name']} · {model['family']}{row} · {model['layers']} layers × {model['heads']} heads, d_model "
        f"{model['d_model']} · {model['dtype']} on {model['device']} · convention {model['convention']}{centred}"
    )


def certificate(result: Result) -> str:
    """The conservation check in one line."""
    model = result.provenance["model"]
    parts = ", ".join(f"{name} {error:.0e}" for name, error in model["certificate"].items())
    said = f"certificate: {parts} (relative error, limit {model['certificate_limit']:.0e})"
    beyond = model.get("certificate_beyond")
    return (
        said if beyond is None else f"{said}; not checked beyond {beyond:,} tokens, where the model computes otherwise"
    )


_PARTS: dict[str, _Shown] = {
    "scan": _scan,
    "survival": _listed(survived.HEADER, survived.rows),
    "verify": _verify,
    "dla": _dla,
    "audit": _audit,
    "effects": _patched,
    "lens": _lens,
    "attention": _attention,
    "compare": _patched,
    "adversarial": _listed(found.HEADER, found.rows),
    "corpus_dla": _listed(found.CORPUS_HEADER, found.corpus_rows),
    "reproduce": _listed(found.CLAIMS_HEADER, found.claims, always=True),
}
_WORDS: dict[str, Callable[[Result], str]] = {
    "survival": survived.sentence,
    "verify": sentence,
    "dla": believed.sentence,
    "effects": patched.sentence,
    "lens": looked.first_choice,
    "attention": looked.looks_most,
    "compare": patched.sentence,
    "agree": patched.agreed,
    "bound": patched.bounded,
    "paths": patched.along,
    "adversarial": found.sentence,
    "corpus_dla": found.corpus_sentence,
    "reproduce": found.claims_sentence,
}
