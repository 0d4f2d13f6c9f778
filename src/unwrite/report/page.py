"""What does a person see in a browser? One plain, self-contained page of a saved result."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from unwrite.files import write
from unwrite.report import audited, believed, panels
from unwrite.report.columns import Column, table
from unwrite.report.paper import FIGURES
from unwrite.report.pictures import picture
from unwrite.report.scanned import HEADER, Row, folded_line, rows, soundness, texts
from unwrite.report.templates import own, render
from unwrite.report.terminal import certificate, headline
from unwrite.report.views import alerts, view
from unwrite.result import FILE, Result

# Cells of the map of levels, and bytes of a file that the page carries with it.
_CELLS = 5000
_INLINE = 2**19
# What lies beside a result's own file; the page only of what it can show.
BESIDE = ("table.csv", "report.html")
_KINDS = {".csv": "text/csv", ".nc": "application/x-netcdf"}
_EQUATIONS = (Column("variable", holds="word"), Column("unit", holds="word"), Column("equation", holds="words"))


def page(result: Result, beside: Iterable[Path] = ()) -> str:
    """The result as one HTML document without network; every text in it is escaped.

    Its one script (which writer is looked at) is the only one that its content policy lets run; without it all writers
    stand below each other. Files that will lie `beside` it can be saved from it: small ones it carries with it.
    """
    settings = result.provenance["settings"]
    shown: list[dict[str, Any]] = [
        _panel(name, data, read) | {"sound": soundness(data, settings)} for name, data, read in texts(result)
    ]
    script = own("page.js")
    made = render(
        "page.html.j2",
        headline=headline(result),
        certificate=certificate(result),
        verdict=view(result).words(result),
        alerts=[(alert.kind, alert.words) for alert in alerts(result)],
        panels=shown,
        writers=list(panels.writers(result, [row.writer for row in shown[0]["rows"]])),
        audit=_audited(result) if "verified" in result.data.dims else None,
        provenance=_flat(result.provenance),
        equations=table("", _EQUATIONS, _equations(result.data), result.data),
        downloads=[(file.name, _address(file)) for file in beside],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=own("page.css"),
    )
    return str(made)


def save(result: Result, path: Path, beside: Iterable[Path] = ()) -> Path:
    """Write the page to `path`, whole or not at all. Raises ResultError where it cannot be written."""
    # A lone surrogate has no UTF-8; `plain` has made it an escape everywhere it could come from outside.
    return write(path, lambda place: place.write_text(page(result, beside), encoding="utf-8"))


def save_all(result: Result, folder: Path) -> tuple[str, ...]:
    """Write `result.nc`, `table.csv` and, of a scan or an audit, `report.html` into a folder; returns their names.

    Raises ResultError where it cannot be written.
    """
    written = [result.save(folder), result.save_table(folder / files(result)[1])]
    if len(files(result)) > len(written):
        save(result, folder / files(result)[2], tuple(written))
    return files(result)


def files(result: Result) -> tuple[str, ...]:
    """The names of the files that `save_all` writes."""
    return (FILE, *(BESIDE if view(result).page else BESIDE[:1]))


def _address(file: Path) -> str:
    """A link that carries a small file's content; of a large one to the file."""
    if file.stat().st_size > _INLINE:
        return file.name
    return f"data:{_KINDS[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _equations(data: xr.Dataset) -> Iterator[tuple[str, str, str]]:
    """Every variable's name, unit and equation."""
    for name, part in data.variables.items():
        if equation := part.attrs.get("equation"):
            yield (str(name), str(part.attrs.get("units", "")), str(equation))


def _audited(result: Result) -> dict[str, Any]:
    """The panels that only an audit has; names and texts in them were made plain where they were read."""
    # Without erasers there is no corpus of what they take back.
    pictures = ("fig4", "fig5") if "corpus_sample_x" in result.data else ("fig4",)
    data, proofs, judged = result.data, list(audited.verified(result)), result.provenance["settings"]["judged"]
    n = f"{judged['prompts']} × {judged['length']} tokens, which did not choose the writer"
    return {
        "verified": table("", audited.HEADER, map(audited.row, proofs), proofs[0], n),
        "asked": [
            (one.title, one.sums, table("", believed.header(data), one.rows, data, "one prompt"))
            for one in believed.asked(data)
        ],
        "pictures": [picture(FIGURES[name](result)) for name in pictures],
        "trust": [
            table(believed.title(data, kind), believed.TRUST_HEADER, believed.trusted(data, kind), data)
            for kind in believed.REPLACEMENTS
        ],
        "search": audited.search(result),
    }


def _panel(name: str, data: xr.Dataset, read: Mapping[str, Any]) -> dict[str, Any]:
    """The map of levels of one text, and who writes against whom."""
    found, folded = rows(data)
    title = f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"
    shown = found[: (most := _CELLS // data.sizes["location"])]
    notes = [f"{row.n:,} positions of {int(data['n_clusters'])} independent prompts" for row in found]
    return {
        "title": title,
        "equation": data["level"].attrs.get("equation", ""),
        "locations": [str(place) for place in data["location"].values],
        "rows": shown,
        "notes": notes,
        "cells": _cells(data, shown),
        "against": table(title, HEADER, (row.cells for row in found), data, notes, most),
        "left_out": len(found) - len(shown),
        "folded": folded_line(folded) if folded else "",
    }


def _cells(data: xr.Dataset, shown: list[Row]) -> Iterator[list[tuple[str, str, str, bool]]]:
    """Of each row the levels: in figures, the middle half of positions, a colour, and is it the one after the write?"""
    one = data[["level", "right_after"]].sel(writer=[row.writer for row in shown])
    levels = one["level"].sel(quantile=[0.25, 0.5, 0.75]).transpose("writer", "location", "quantile").values
    for level, after in zip(levels, one["right_after"].values, strict=True):
        yield [
            (f"{middle:.2f}", f"{low:.2f} to {high:.2f}", panels.colour(middle), str(place) == str(after))
            for place, (low, middle, high) in zip(data["location"].values, level.tolist(), strict=True)
        ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += _flat(value, f"{name} · ") if isinstance(value, dict) else [(name, str(value))]
    return lines
