"""What stands in a table? Columns that know how their numbers come about; terminal, page and card all set them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import xarray as xr

from unwrite.result import Result

_MOST, _COLUMNS, _FOREMOST = 200, 8, 24


def digits(value: float, n: int = 2, sign: str = "") -> str:
    """A number with so many digits, no zero with a sign that it has by rounding, and a dash for what is none."""
    return f"{round(float(value), n) + 0.0:{sign}.{n}f}" if math.isfinite(value) else "–"


def spanned(value: float, low: float, high: float, *, n: int = 2, sign: str = "") -> str:
    """A number with its 95 % interval, where it has one."""
    return (
        f"{digits(value, n, sign)} [{digits(low, n, sign)}, {digits(high, n, sign)}]"
        if low == low
        else digits(value, n, sign)
    )


@dataclass(frozen=True)
class Column:
    """A name, and how what stands below it comes about, where `{share}` is the equation of that variable.

    It holds numbers, a word, or words that take several lines, of at least so many cells in a terminal.
    """

    name: str
    equation: str = ""
    holds: Literal["numbers", "word", "words"] = "numbers"
    least: int | None = None

    @property
    def short(self) -> str:
        """The name without its explanation."""
        return self.name.partition(":")[0].partition(" (")[0]


@dataclass(frozen=True)
class Line:
    """A line of words beside tables: plain, quiet ("dim") or a warning ("yellow")."""

    words: str
    tone: Literal["", "dim", "yellow"] = ""


@dataclass(frozen=True)
class Listing:
    """A table that is not set yet: all its rows, and the data whose equations its columns name.

    `foremost` are the numbers of those rows that stand for all of them where there is little room, None: all do.
    """

    title: str
    columns: Iterable[Column]
    rows: list[tuple[str, ...]]
    data: xr.Dataset
    foremost: Iterable[int] | None = range(_FOREMOST)


@dataclass(frozen=True)
class Table:
    """Rows under columns with what each says on hover, a note on each row, and how many rows there is no room for."""

    caption: str
    columns: tuple[tuple[Column, str], ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    left_out: int

    @property
    def wordy(self) -> bool:
        """Are there words that take several lines?"""
        return any(column.holds == "words" for column, _ in self.columns)


def table(
    caption: str,
    columns: Iterable[Column],
    rows: Iterable[tuple[str, ...]],
    data: xr.Dataset,
    notes: str | Iterable[str] = "",
    most: int = _MOST,
) -> Table:
    """A `Table` of the first rows, its equations those of `data`; `notes` one for each row, or the same for all."""
    known = {str(name): part.attrs.get("equation", "") for name, part in data.variables.items()}
    lines = tuple(rows)
    every = (notes,) * len(lines) if isinstance(notes, str) else tuple(notes)
    heads = tuple((column, column.equation.format_map(known)) for column in columns)
    return Table(caption, heads, lines[:most], every[:most], max(0, len(lines) - most))


def listed(result: Result) -> Listing:
    """The first columns of a result's table, of a method that has no view of its own."""
    frame = result.table().iloc[:, :_COLUMNS]
    columns = [Column(str(name), f"{{{name}}}" if name in result.data else "") for name in frame.columns]
    lines = [tuple(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row) for row in frame.to_numpy(object)]
    return Listing("", columns, lines, result.data)
