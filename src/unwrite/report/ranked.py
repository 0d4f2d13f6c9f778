"""Which numbers of a variable are the largest? Ranked bars, with their intervals where a result has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from unwrite.errors import ResultError
from unwrite.report.maps import framed, labels, part_of
from unwrite.report.paper import COLOURS, SAYS, harmless
from unwrite.report.views import view
from unwrite.result import Result

# In all, so many bars.
_MOST = 40
_SERIES = (COLOURS["total"], COLOURS["level"], COLOURS["survival"])


def bars(result: Result, writer: str | None, of: str | None, chosen: Mapping[str, Any]) -> alt.TopLevelMixin:
    """The largest numbers of a variable, of either sign; of some methods two variables side by side."""
    names = [of] if of is not None else _of(result)
    parts = [part_of(result, name, writer, chosen) for name in names]
    axes = [str(axis) for axis in parts[0].dims]
    if not axes:
        raise ResultError(f"{names[0]} is one number", got=f"{float(parts[0]):.3g}", expected="an axis")
    values = np.stack([part.transpose(*axes).values.astype(float).ravel() for part in parts])
    size = np.nan_to_num(np.abs(values), nan=-1.0).max(0)
    order = [int(i) for i in np.argsort(-size, kind="stable")[: _MOST // len(names)] if size[i] >= 0]
    words = _called(result.data, parts[0])
    lines = [
        {"y": words[i], "what": name, "value": float(row[i]), "says": f"{name}, {words[i]}: {row[i]:+.4g}"}
        for i in order for name, row in zip(names, values, strict=True) if np.isfinite(row[i])
    ]  # fmt: skip
    y = alt.Y("y:N", sort=[words[i] for i in order], title=None, axis=alt.Axis(labelLimit=320, labelOverlap=False))
    colour = alt.Color(
        "what:N", title=None, scale=alt.Scale(domain=names, range=list(_SERIES[: len(names)])),
        legend=alt.Legend(orient="top") if len(names) > 1 else None,
    )  # fmt: skip
    x = alt.X("value:Q", title=None)
    chart = alt.Chart(alt.Data(values=lines)).mark_bar().encode(x=x, y=y, color=colour, **SAYS)
    if len(names) > 1:
        chart = chart.encode(yOffset=alt.YOffset("what:N", sort=names))
    else:
        chart += _intervals(result, parts[0], writer, chosen, words, order).encode(y=y)
    by = " or ".join(f"|{name}|" for name in names)
    left = [f"the {len(order)} of {size.size:,} with the largest {by}"] if len(order) < size.size else []
    drawn = chart.properties(width=360, height=alt.Step(14 if len(names) == 1 else 18, **{"for": "position"}))
    return framed(drawn, result, parts[0], left, " and ".join(names))


def _of(result: Result) -> list[str]:
    """The variables that are drawn where none is named: the method's, or the first one of numbers with an axis."""
    known = [name for name in view(result).of if name in result.data and result.data[name].notnull().any()]
    fits = [str(name) for name, part in result.data.items() if part.dtype.kind in "fi" and part.dims]
    if not known + fits:
        raise ResultError(f"a {result.method} has no numbers to draw", expected="a variable with an axis")
    return known or fits[:1]


def _intervals(
    result: Result,
    part: xr.DataArray,
    writer: str | None,
    chosen: Mapping[str, Any],
    words: list[str],
    order: list[int],
) -> alt.Chart:
    """Rules from the low to the high end of an interval; none where a mean is drawn, which has no such interval."""
    ends = [f"{part.name}_{end}" for end in ("low", "high")]
    there = all(end in result.data and result.data[end].dims == result.data[part.name].dims for end in ends)
    whole = there and not {"pair", "prompt"} & set(result.data[part.name].dims)
    low, high = (
        [part_of(result, end, writer, chosen).transpose(*part.dims).values.ravel() for end in ends]
        if whole else (np.full(len(words), np.nan),) * 2
    )  # fmt: skip
    lines = [{"y": words[i], "low": float(low[i]), "high": float(high[i])} for i in order if np.isfinite(low[i])]
    return alt.Chart(alt.Data(values=lines)).mark_rule().encode(x="low:Q", x2="high:Q")


def _called(data: xr.Dataset, part: xr.DataArray) -> list[str]:
    """A name for each number: those of its places on all axes."""
    each = [_names(data, part, str(axis)) for axis in part.dims]
    return [" · ".join(names[i] for names, i in zip(each, at, strict=True)) for at in np.ndindex(*part.shape)]


def _names(data: xr.Dataset, part: xr.DataArray, axis: str) -> list[str]:
    if axis in part.coords:
        said = labels(part, axis)
        return said if part[axis].dtype.kind in "UO" else [f"{axis} {name}" for name in said]
    # An axis without names is called by the texts that the result has on it.
    texts = [one for one in data.values() if one.dims == (axis,) and one.dtype.kind in "UO"]
    return [f"{i}: {', '.join(harmless(one.values[i]) for one in texts)}" for i in range(part.sizes[axis])]
