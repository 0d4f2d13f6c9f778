"""What stands in a table? Columns that know how their numbers come about; the terminal and the page both set them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import xarray as xr

_MOST = 200


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
