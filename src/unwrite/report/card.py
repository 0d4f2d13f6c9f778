"""What does a notebook show of a result? A card: what was found, the main picture, the first rows, how to see more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from unwrite.errors import ResultError
from unwrite.report import audited, believed, found, verified
from unwrite.report.alerts import alerts
from unwrite.report.columns import Column, Table, listed, table
from unwrite.report.pictures import Picture, picture
from unwrite.report.scanned import HEADER, rows, texts
from unwrite.report.templates import own, render
from unwrite.report.terminal import headline, last_word
from unwrite.result import Result

_ROWS = 5
_Rows = Callable[[Result], Iterable[tuple[str, ...]]]


def card(result: Result) -> str:
    """A fragment of HTML without scripts and network; every text in it is escaped."""
    made = render(
        "card.html.j2",
        headline=headline(result),
        words=last_word(result),
        alerts=alerts(result),
        picture=_picture(result),
        table=_first(result),
        style=own("card.css"),
    )
    return str(made)


def _picture(result: Result) -> Picture | None:
    """Of an audit its foremost writer, since the map of levels is large; some results have no picture."""
    try:
        return picture(result.figure("fig1" if result.method == "audit" else None))
    except ResultError:
        return None


def _first(result: Result) -> Table:
    """What a terminal shows first of this method."""
    if result.method not in _TABLES:
        return table("", *listed(result), result.data, most=_ROWS)
    columns, lines = _TABLES[result.method]
    columns = believed.header(result.data) if result.method == "dla" else columns
    data = next(audited.verified(result)) if result.method == "audit" else result.data
    return table("", columns, lines(result), data, most=_ROWS)


_TABLES: dict[str, tuple[Iterable[Column], _Rows]] = {
    "scan": (HEADER, lambda result: [row.cells for row in rows(next(texts(result))[1])[0]]),
    "verify": (verified.ACTORS, verified.actors),
    "dla": (believed.HEADER, lambda result: next(believed.asked(result.data)).rows),
    "audit": (audited.HEADER, lambda result: map(audited.row, audited.verified(result))),
    "adversarial": (found.HEADER, lambda result: found.rows(result.data)),
    "corpus_dla": (found.CORPUS_HEADER, lambda result: found.corpus_rows(result.data)),
    "reproduce": (found.CLAIMS_HEADER, lambda result: found.claims(result.data)),
}
