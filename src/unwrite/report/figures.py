"""What does a result look like? Altair charts, drawn from a saved result alone."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from unwrite.errors import ResultError, shown
from unwrite.files import write
from unwrite.report.curves import curve, drawing, precision, scatter
from unwrite.report.graphs import over_layers, snapshots
from unwrite.report.image_grid import images
from unwrite.report.maps import DIVERGING, attention, fitting, heatmap, matrix
from unwrite.report.paper import FIGURES, SAYS, finish, harmless, of_verified, series
from unwrite.report.ranked import bars
from unwrite.report.scanned import rows, texts
from unwrite.report.views import view
from unwrite.result import Result

# Rows; and of more columns than so many the numbers are left to the tooltips.
_MOST, _WIDE = 40, 24


def draw(
    result: Result, name: str | None = None, writer: str | None = None, of: str | None = None, **chosen: Any
) -> alt.TopLevelMixin:
    """The figure of this name; by default the method's main one, or the one that fits the variables.

    Raises ResultError for an unknown name, or what a result does not hold.
    """
    name = view(result).picture or fitting(result.data) if name is None else name
    if not isinstance(name, str) or name not in {*_NAMED, *_DRAWING}:
        raise ResultError("no such figure", got=shown(name), expected=", ".join((*_DRAWING, *_NAMED)))
    if not isinstance(of, (str, NoneType)):
        raise ResultError("a variable is named", got=shown(of), expected="one of the result's, such as share")
    if writer is not None and not isinstance(writer, str):
        raise ResultError("a writer is named", got=shown(writer), expected="one of the result's, such as L0H2")
    if name in _DRAWING:
        return _DRAWING[name](result, writer, of, chosen)
    if of is not None or chosen:
        got = shown(of) if of is not None else ", ".join(chosen)
        raise ResultError(f"{name} is of variables of its own", got=got, fix=f"ask for one of {', '.join(_DRAWING)}")
    return _NAMED[name](result, writer)


def save(chart: alt.TopLevelMixin, path: Path) -> Path:
    """Write a picture that needs no network, whole or not at all.

    Raises ResultError for a name that does not end in .png, .svg, .pdf or .html, or where it cannot be written.
    """
    if path.suffix not in _KINDS:
        raise ResultError("unknown kind of picture", got=path.name, expected=f"a name ending in {', '.join(_KINDS)}")
    # A page without network carries its scripts with it; a picture of pixels is twice as fine.
    fine, inline = 2 if path.suffix == ".png" else 1, path.suffix == ".html"
    return write(path, lambda place: chart.save(str(place), scale_factor=fine, inline=inline))


_KINDS = (".png", ".svg", ".pdf", ".html")


def places(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """Level and survival of a verified write at the end of the stream, by position in the prompt (± standard error)."""
    data = of_verified(result, writer)
    frames = []
    for name in ("level", "survival"):
        value, error = data[f"{name}_at"].values, np.nan_to_num(data[f"{name}_at_se"].values)
        rows_ = {"position": data["place"].values, "value": value, "low": value - error, "high": value + error}
        said = zip(data["place"].values, value, error, strict=True)
        says = [f"{name}, from position {place}: {v:+.2f} ± {e:.2f}" for place, v, e in said]
        frames.append(pd.DataFrame(rows_).assign(what=name, says=says))
    base = alt.Chart(pd.concat(frames).dropna()).encode(
        x=alt.X("position:Q", title="position in the prompt"), color=series(["level", "survival"])
    )
    lines = base.mark_line(point={"size": 20}).encode(y=alt.Y("value:Q", title="at the end, along the write"), **SAYS)
    spread = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
    return finish(alt.layer(lines, spread), f"{data.attrs['writer']} at the end, by position")


def levels(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """The median level of every state of the stream along every material write (the first text of several).

    Rows are writers, most energy moved first; columns are locations. White is 0, blue a level that rises, orange one
    that reverses; a box marks the location right after the write. Raises ResultError for a single `writer`.
    """
    if writer is not None:
        raise ResultError("the map of levels is of all writers", got=f"the writer {writer}", fix="ask for fig1 of it")
    if "level" not in result.data or "writer" not in result.data.dims:
        raise ResultError(f"a {result.method} has no picture", expected="a scan, a verification, dla or an audit")
    _, data, _ = next(texts(result))
    writers = [row.writer for row in rows(data)[0][:_MOST]]
    parts = data["level"].sel(writer=writers).transpose("writer", "location", "quantile")
    level = parts.sel(quantile=0.5).to_series().reset_index()
    middle = parts.sel(quantile=[0.25, 0.75]).values.reshape(-1, 2)
    said = zip(level["writer"], level["location"], level["level"], *middle.T, strict=True)
    level["says"] = [f"{w}, {at}: {v:+.2f}, middle half of positions {a:+.2f} to {b:+.2f}" for w, at, v, a, b in said]
    limit = max(2.0, float(np.nanquantile(np.abs(level["level"]), 0.9)))
    places = [harmless(place) for place in data["right_after"].sel(writer=writers).values]
    after = pd.DataFrame({"writer": writers, "location": places})
    x = alt.X("location:N", sort=list(data["location"].values), title=None, axis=alt.Axis(labelAngle=-40, orient="top"))
    y = alt.Y("writer:N", sort=writers, title="writer (most energy moved first)")
    colour = alt.Color(
        "level:Q",
        title="median level",
        scale=alt.Scale(domain=[-limit, 0, limit], range=list(DIVERGING), interpolate="rgb", clamp=True),
    )
    many = len(data["location"]) > _WIDE
    base = alt.Chart(level).encode(x=x, y=y, **SAYS)
    cells = base.mark_rect().encode(color=colour)
    dark = alt.condition(f"abs(datum.level) > {0.6 * limit}", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=9).encode(text=alt.Text("level:Q", format=".1f"), color=dark)
    boxes = alt.Chart(after).mark_rect(filled=False, stroke="black", strokeWidth=1.2, aria=False).encode(x=x, y=y)
    title = alt.Title(
        "How much of the stream lies along each write",
        subtitle=[
            _caption(result),
            "box: right after the write; a level counts all that lies along it, whoever wrote it",
        ],
        anchor="start",
    )
    layers = (cells, boxes) if many else (cells, numbers, boxes)
    return alt.layer(*layers, title=title).properties(width=alt.Step(14 if many else 46), height=alt.Step(15))


def _caption(result: Result) -> str:
    name, _, read = next(texts(result))
    model = result.provenance["model"]["name"]
    return harmless(f"{model} on {name or read['source']}, {read['prompts']} × {read['length']} tokens")


# Those that draw one variable, and those that know theirs.
_DRAWING = {"heatmap": heatmap, "bars": bars, "matrix": matrix, "attention": attention, "graph": over_layers,
            "snapshots": snapshots, "images": images}  # fmt: skip
_NAMED = {"levels": levels, **FIGURES, "positions": places, "curve": curve, "precision": precision, "circuit": drawing,
          "scatter": scatter}  # fmt: skip
