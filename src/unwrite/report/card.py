"""What does a notebook show of a result? A card: what was found, the main picture, the first rows, how to see more."""

from __future__ import annotations

from unwrite.errors import ResultError
from unwrite.report.columns import table
from unwrite.report.pictures import Picture, picture
from unwrite.report.templates import own, render
from unwrite.report.terminal import headline
from unwrite.report.views import alerts, listings, view
from unwrite.result import Result

_ROWS = 5


def card(result: Result) -> str:
    """A fragment of HTML without scripts and network; every text in it is escaped."""
    shown = view(result)
    first = listings(result)[shown.foremost]
    made = render(
        "card.html.j2",
        headline=headline(result),
        words=shown.words(result),
        alerts=alerts(result),
        picture=_picture(result),
        table=table("", first.columns, first.rows, first.data, most=_ROWS),
        style=own("card.css"),
    )
    return str(made)


def _picture(result: Result) -> Picture | None:
    """The main picture; what someone cut out of a result may have none."""
    try:
        return picture(result.figure(view(result).small))
    except ResultError:
        return None
