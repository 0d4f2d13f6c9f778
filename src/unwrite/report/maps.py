"""What does a variable look like at a glance? Heat maps of layers × heads or tokens, matrices, attention.

Colours are centred at 0; grey is what was not measured. Texts of models are labels, never code or markup.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from unwrite.axes import gridded, named, of_names, picked
from unwrite.errors import ResultError, counted, shown
from unwrite.report.paper import SAYS, harmless
from unwrite.report.views import view
from unwrite.result import Result

# Orange below, white at 0, blue above: told apart by colour-blind readers too.
DIVERGING = ("#d95f02", "#ffffff", "#2166ac")
_MISSING = "#c8c8c8"
# The foremost rows and columns that a matrix shows; the most of which the numbers are written into the cells; a label
# has so many pixels.
_ROWS, _COLUMNS = 40, 60
_HIGH, _WIDE = 48, 16
_LABEL = 11
# A few numbers beyond what nearly all stay below, times this, do not pale all others.
_NEARLY_ALL, _BEYOND = 0.98, 4
_WORDS = 84
# Axes whose names say whose write a number is about.
_WHOSE = ("writer", "verified", "removed", "sender")


@dataclass(frozen=True)
class _Cells:
    """Numbers [row, column], NaN where there is none, the names of both, and at which cells there could be one."""

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    down: str
    across: str
    there: np.ndarray | None = None
    full: float | None = None

    @cached_property
    def limit(self) -> float:
        """Where colours end."""
        size = np.abs(self.values[np.isfinite(self.values) & (self.values != 0)])
        if self.full is not None or not size.size:
            return self.full or 1.0
        nearly, most = float(np.quantile(size, _NEARLY_ALL)), float(size.max())
        return nearly if _BEYOND * nearly < most else most

    def foremost(self, rows: int, columns: int) -> _Cells:
        """The rows and columns in which the largest numbers are, in their order."""
        size = np.nan_to_num(np.abs(self.values))
        down, across = (
            np.sort(np.argsort(-size.max(axis, initial=0), kind="stable")[:most])
            for axis, most in ((1, rows), (0, columns))
        )
        there = None if self.there is None else self.there[np.ix_(down, across)]
        names = [[list_[i] for i in kept] for list_, kept in ((self.rows, down), (self.columns, across))]
        return replace(self, values=self.values[np.ix_(down, across)], rows=names[0], columns=names[1], there=there)


def heatmap(result: Result, writer: str | None, of: str | None, chosen: Mapping[str, Any]) -> alt.TopLevelMixin:
    """A variable of nodes as layers × heads, with MLPs beside them, or as layers or states × tokens."""
    name = of or _of(result, 1)
    part = part_of(result, name, writer, chosen)
    grid, full = gridded(part, {}), view(result).full if name in view(result).of else None
    # A layer without MLP has no cell, an MLP without a number a grey one.
    there = np.nan_to_num(gridded(xr.ones_like(part, dtype=float), {}).values) > 0
    down, across = map(str, grid.dims)
    cells = _Cells(grid.values.astype(float), labels(grid, down), labels(grid, across), down, across, there, full)
    few = cells.foremost(_ROWS, len(cells.columns)) if down == "node" and len(cells.rows) > 2 * _ROWS else cells
    left = [f"{len(few.rows)} of {len(cells.rows)} nodes: those with the largest numbers"] if few is not cells else []
    return framed(_drawn(few), result, part, [*left, _range(cells, few), *_outside(part)])


def matrix(result: Result, writer: str | None, of: str | None, chosen: Mapping[str, Any]) -> alt.TopLevelMixin:
    """A variable of two axes of names: each writer's numbers at each node, each sender's at each receiver."""
    part = part_of(result, of or _of(result, 2), writer, chosen)
    if of_names(part) == [*part.dims] == ["node"] and "writer" in result.data.attrs:
        part = part.expand_dims(writer=[str(result.data.attrs["writer"])])
    if len(part.dims) != 2:
        raise ResultError(
            f"{part.name} is no matrix", got=", ".join(map(str, part.dims)) or "one number", expected="two axes",
            fix="pick on the others, or ask for heatmap",
        )  # fmt: skip
    down, across = map(str, part.dims)
    cells = _Cells(part.values.astype(float), labels(part, down), labels(part, across), down, across)
    few = cells.foremost(_ROWS, _COLUMNS)
    sizes = [
        f"{len(kept)} of {counted(len(every), axis)}"
        for kept, every, axis in ((few.rows, cells.rows, down), (few.columns, cells.columns, across))
        if len(kept) < len(every)
    ]
    left = [f"{' and '.join(sizes)}: those with the largest numbers"] if sizes else []
    return framed(_drawn(few), result, part, [*left, _range(cells, few)])


def attention(result: Result, writer: str | None, of: str | None, chosen: Mapping[str, Any]) -> alt.TopLevelMixin:
    """A variable of queries × keys, of the first head and prompt where no other is picked."""
    fitting = [str(name) for name, part in result.data.items() if {"query", "key"} <= set(part.dims)]
    if not fitting if of is None else of not in fitting:
        expected = ", ".join(fitting) or "a variable with the axes query and key"
        raise ResultError(f"a {result.method} has no such attention", got=shown(of or "none"), expected=expected)
    part = result[of or fitting[0]]
    first = {str(axis): part[axis].values[0] for axis in part.dims if axis not in ("query", "key")}
    if writer is not None:
        first |= dict.fromkeys(of_names(part), writer)
    part = picked(part, {**first, **chosen}).transpose("query", "key")
    cells = _Cells(part.values.astype(float), labels(part, "query"), labels(part, "key"), "query", "key")
    return framed(_drawn(cells), result, part, [_range(cells, cells)])


def fitting(data: xr.Dataset) -> str:
    """The figure that fits a result whose method names none: by the axes of its variables."""
    every = [part for part in data.values() if part.dtype.kind in "fi"]
    if any({"query", "key"} <= set(part.dims) for part in every):
        return "attention"
    if any(_count(part) == 1 for part in every):
        return "heatmap"
    return "matrix" if any(_count(part) == 2 for part in every) else "bars"


def _count(part: xr.DataArray) -> int:
    """On how many axes of names it is all that it is; 0 where other axes would have to be picked on."""
    free = set(part.dims) - {*of_names(part), "pair", "prompt", "quantile", "position"}
    return 0 if free else len(of_names(part))


def _of(result: Result, axes: int) -> str:
    """The variable that is drawn where none is named: the method's, or the first that fits."""
    shown_ = view(result)
    wanted = shown_.of if axes == 1 else (shown_.matrix,)
    fits = [str(name) for name, part in result.data.items() if part.dtype.kind in "fi" and _count(part) == axes]
    for name in (*wanted, *fits):
        if name in result.data and result.data[name].notnull().any():
            return str(name)
    what = "of nodes" if axes == 1 else "of two axes of nodes"
    raise ResultError(f"a {result.method} has no variable {what}", expected="another figure, or of= a variable")


def part_of(result: Result, name: str, writer: str | None, chosen: Mapping[str, Any]) -> xr.DataArray:
    """What is picked of a variable, of this writer."""
    part = result[name]
    whose = [axis for axis in _WHOSE if axis in part.dims]
    if writer is not None and not whose:
        raise ResultError(f"{name} is not of one writer", got=shown(writer), fix="leave writer out")
    chosen = {axis: part[axis].values[0] for axis in view(result).apart if axis in part.dims} | {**chosen}
    return picked(part, {whose[0]: writer, **chosen} if writer is not None else chosen)


def labels(part: xr.DataArray, axis: str) -> list[str]:
    """What each place of an axis is called: its name, or its number, with the token that is there."""
    names = part[axis].values if axis in part.coords else np.arange(part.sizes[axis])
    said = [harmless(name) for name in names.tolist()]
    for token in ("token", f"{axis}_token"):
        if token in part.coords and part[token].dims == (axis,):
            return [f"{name} {harmless(word)}" for name, word in zip(said, part[token].values.tolist(), strict=True)]
    return said


def _outside(part: xr.DataArray) -> list[str]:
    """The numbers of what lies in no layer, which a grid leaves out."""
    (axis,) = of_names(part)
    if part.ndim > 1:
        return []
    out = part[{axis: part[named(part, axis, "layer")].values < 0}]
    numbers = zip(out[axis].values, out.values, strict=True)
    said = [f"{name} {value:+.3g}" for name, value in numbers if np.isfinite(value)]
    return [f"outside of the layers: {', '.join(said)}"] if said else []


def _range(cells: _Cells, drawn: _Cells) -> str:
    """The range of all numbers, and of the colours of those that are drawn where that is less; what has no colour."""
    known = cells.values[np.isfinite(cells.values)]
    if not known.size:
        return "no number was measured"
    ends = (
        f", colours end at ±{drawn.limit:.3g}"
        if np.abs(drawn.values[np.isfinite(drawn.values)]).max() > drawn.limit
        else ""
    )
    there = np.ones(drawn.values.shape, bool) if drawn.there is None else drawn.there
    grey = ", grey: no number" if (np.isnan(drawn.values) & there).any() else ""
    return f"{known.min():+.3g} to {known.max():+.3g}{ends}{grey}" + (
        ", blank: not asked or not there" if not there.all() else ""
    )


def _drawn(cells: _Cells) -> alt.TopLevelMixin:
    """A cell for every number; the numbers themselves where there is room for them."""
    high, wide = len(cells.rows), len(cells.columns)
    written = wide <= _WIDE and high <= _HIGH
    tall, broad = 15 if high <= _HIGH else 9, 36 if written else (15 if wide <= _HIGH else 9)
    limit = cells.limit
    flat = wide <= _WIDE and max(map(len, cells.columns), default=0) <= 5
    base = alt.Chart(alt.Data(values=_records(cells))).encode(
        x=alt.X("x:N", sort=[*cells.columns], title=_title(cells.across), axis=alt.Axis(
            orient="top", labelAngle=0 if flat else -60, values=_every(cells.columns, broad), labelOverlap=False)),
        y=alt.Y("y:N", sort=[*cells.rows], title=_title(cells.down), axis=alt.Axis(
            values=_every(cells.rows, tall), labelOverlap=False)),
        **SAYS,
    )  # fmt: skip
    scale = alt.Scale(domain=[-limit, 0, limit], range=list(DIVERGING), interpolate="rgb", clamp=True)
    colour = alt.Color("value:Q", title=None, scale=scale, legend=alt.Legend(format=".2~g", gradientLength=90))
    known = alt.condition("datum.value === null", alt.value(_MISSING), colour)
    drawn = base.mark_rect(stroke="#e8e8e8", strokeWidth=0.5, invalid=None).encode(color=known)
    if written:
        ink = alt.condition(f"abs(datum.value) > {0.6 * limit}", alt.value("white"), alt.value("black"))
        drawn += base.mark_text(fontSize=8, invalid=None).encode(text="number:N", color=ink)
    return drawn.properties(width=alt.Step(broad), height=alt.Step(tall))


def _records(cells: _Cells) -> list[dict[str, Any]]:
    digits = min(4, max(0, 2 - math.floor(math.log10(cells.limit))))
    found = []
    for (i, k), value in np.ndenumerate(cells.values):
        known = bool(np.isfinite(value))
        if known or cells.there is None or cells.there[i, k]:
            place = f"{cells.down} {cells.rows[i]}, {cells.across} {cells.columns[k]}"
            found.append({
                "x": cells.columns[k], "y": cells.rows[i], "value": float(value) if known else None,
                "number": _written(float(value), digits) if known else "",
                "says": f"{place}: {value:+.4g}" if known else f"{place}: no number",
            })  # fmt: skip
    return found


def _written(value: float, digits: int) -> str:
    """A number in a cell; what is next to nothing is 0."""
    return "0" if abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}".replace("-", "−")


def _every(names: Sequence[str], step: int) -> list[str]:
    """As many of the names as there is room for."""
    return list(names[:: math.ceil(_LABEL / step)])


def _title(axis: str) -> str | None:
    return None if axis in ("node", "head", "location") else axis


def framed(chart: Any, result: Result, part: xr.DataArray, said: Sequence[str], name: str = "") -> alt.TopLevelMixin:
    """With a title, and below it how the numbers come about, what else is `said`, and what was picked."""
    unit = part.attrs.get("units", "1")
    lines = [*([unit] if unit != "1" else []), *said, *_picks(result, part)]
    texts = (part.attrs.get("equation", ""), "; ".join(lines))
    below = [line for text in texts for line in textwrap.wrap(harmless(text), _WORDS)]
    model = result.provenance["model"].get("name", "a model")
    title = alt.Title(
        harmless(f"{name or part.name}: {result.method} of {model}"), subtitle=below, anchor="start", fontSize=12,
        subtitleColor="#555555",
    )  # fmt: skip
    return chart.properties(title=title).configure(
        font="sans-serif", background="white", view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(labelFontSize=9, titleFontSize=10, titleFontWeight="normal", grid=False),
    )  # fmt: skip


def _picks(result: Result, part: xr.DataArray) -> list[str]:
    """What was picked on axes that are gone, or averaged over."""
    before = result.data[part.name]
    gone = [axis for axis in before.dims if axis not in part.dims and before.sizes[axis] > 1]
    own = {axis: part.coords.get(axis) for axis in gone}
    if "layer" in part.dims or "head" in part.dims:
        own = {axis: at for axis, at in own.items() if axis != "node"}
    return [
        f"mean of {counted(before.sizes[axis], str(axis))}" if at is None else f"{axis} {harmless(at.item())}"
        for axis, at in own.items()
    ]
