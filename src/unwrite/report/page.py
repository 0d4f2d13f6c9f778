"""What does a person see in a browser? One plain, self-contained page of a saved result."""

from __future__ import annotations

import base64
import hashlib
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from unwrite.errors import plain
from unwrite.report import audited, believed, panels
from unwrite.report.alerts import alerts
from unwrite.report.paper import FIGURES
from unwrite.report.rows import folded_line, rows, soundness, texts
from unwrite.report.terminal import certificate, headline
from unwrite.report.verdict import verdict
from unwrite.result import Result, write

# Rows of the map of levels, and bytes of a file that the page carries with it.
_ROWS = 200
_INLINE = 2**19


def page(result: Result) -> str:
    """The result as one HTML document without network; every text in it is escaped.

    Its one script (which writer is looked at) is the only one that its content policy lets run; without it all writers
    stand below each other.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable)
    settings = result.provenance["settings"]
    shown: list[dict[str, Any]] = [
        _panel(name, data, read) | {"sound": soundness(data, settings)} for name, data, read in texts(result)
    ]
    names = [row.writer for row in shown[0]["rows"]]
    script = _file("page.js")
    return environment.from_string(_file("page.html.j2")).render(
        headline=headline(result),
        certificate=certificate(result),
        verdict=result.data.attrs.get("verdict") or verdict(result),
        alerts=[(alert.kind, alert.words) for alert in alerts(result)],
        panels=shown,
        writers=list(panels.writers(result, names)),
        headers=(panels.TRAJECTORY, panels.ACTORS, panels.READINGS),
        audit=_audited(result) if result.method == "audit" else None,
        provenance=_flat(result.provenance),
        equations=_equations(result),
        downloads=_downloads(result),
        script=markupsafe.Markup(script),  # noqa: S704 - the package's own
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=markupsafe.Markup(_file("page.css")),  # noqa: S704 - the package's own
    )


def _printable(value: object) -> object:
    """Whatever a template prints, without control characters and the like; markup is the package's own."""
    return plain(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def _file(name: str) -> str:
    return resources.files("unwrite.report").joinpath(name).read_text("utf-8")


def _equations(result: Result) -> list[tuple[str, str, str]]:
    """Every variable's name, unit and equation."""
    found = []
    for name, part in result.data.items():
        if equation := part.attrs.get("equation"):
            found.append((str(name), str(part.attrs.get("units", "")), str(equation)))
    return found


def _downloads(result: Result) -> list[tuple[str, str]]:
    """The table and the result as links that carry their content; of what is large, to the file beside the page."""
    with tempfile.TemporaryDirectory() as place:
        files = {"text/csv": result.save_table(Path(place) / "table.csv")}
        files["application/x-netcdf"] = result.save(Path(place) / "result.nc")
        return [(file.name, _address(kind, file)) for kind, file in files.items()]


def _address(kind: str, file: Path) -> str:
    if file.stat().st_size > _INLINE:
        return file.name
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def save(result: Result, path: Path) -> Path:
    """Write the page to `path`, whole or not at all. Raises ResultError where it cannot be written."""
    # A lone surrogate has no UTF-8; `plain` has made it an escape everywhere it could come from outside.
    return write(path, lambda place: place.write_text(page(result), encoding="utf-8"))


def save_all(result: Result, folder: Path) -> tuple[str, ...]:
    """Write `result.nc`, `table.csv` and, of a scan or an audit, `report.html` into a folder; returns their names.

    Raises ResultError where it cannot be written.
    """
    files = [result.save(folder), result.save_table(folder / "table.csv")]
    if result.method in ("scan", "audit"):
        files.append(save(result, folder / "report.html"))
    return tuple(file.name for file in files)


def _audited(result: Result) -> dict:
    """The panels that only an audit has; names and texts in them were made plain where they were read."""
    # Without erasers there is no corpus of what they take back.
    pictures = ("fig4", "fig5") if "corpus_sample_x" in result.data else ("fig4",)
    return {
        "verified": (audited.HEADER, [audited.row(data) for data in audited.verified(result)]),
        "asked": [(one.title, one.sums, believed.HEADER, one.rows) for one in believed.asked(result.data)],
        "pictures": [panels.picture(FIGURES[name](result)) for name in pictures],
        "trust": [
            (replacement, believed.TRUST_HEADER, believed.trusted(result.data, replacement))
            for replacement in believed.REPLACEMENTS
        ],
        "search": audited.search(result),
    }


def _panel(name: str, data, read) -> dict:
    found, folded = rows(data)
    shown = found[:_ROWS]
    level = data["level"].sel(quantile=0.5)
    after = {row.writer: str(data["right_after"].sel(writer=row.writer).item()) for row in shown}
    cells = {
        row.writer: [
            (float(value), panels.colour(float(value)), str(place) == after[row.writer])
            for place, value in zip(data["location"].values, level.sel(writer=row.writer).values, strict=True)
        ]
        for row in shown
    }
    return {
        "title": f"{name or read['source']}: {read['prompts']} × {read['length']} tokens",
        "locations": [str(place) for place in data["location"].values],
        "rows": shown,
        "cells": cells,
        "left_out": len(found) - len(shown),
        "folded": folded_line(folded) if folded else "",
    }


def _flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += _flat(value, f"{name} · ") if isinstance(value, dict) else [(name, str(value))]
    return lines
