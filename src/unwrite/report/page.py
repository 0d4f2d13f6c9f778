"""What does a person see in a browser? One plain, self-contained page of a saved result."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2
import numpy as np

from unwrite.errors import plain
from unwrite.report import audited, believed
from unwrite.report.figures import DIVERGING
from unwrite.report.rows import disagreements, folded_line, rows, soundness, texts
from unwrite.report.terminal import certificate, headline
from unwrite.report.verdict import verdict
from unwrite.result import Result, write


def page(result: Result) -> str:
    """The result as one HTML document without scripts or network; every text in it is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    settings = result.provenance["settings"]
    template = environment.from_string(resources.files("unwrite.report").joinpath("page.html.j2").read_text("utf-8"))
    return template.render(
        headline=plain(headline(result)),
        certificate=plain(certificate(result)),
        verdict=plain(result.data.attrs.get("verdict") or verdict(result)),
        disagreements=[plain(line) for line in disagreements(result)],
        panels=[_panel(name, data, read) | {"sound": soundness(data, settings)} for name, data, read in texts(result)],
        audit=_audited(result) if result.method == "audit" else None,
        provenance=_flat(result.provenance),
    )


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
    return {
        "verified": (audited.HEADER, [audited.row(data) for data in audited.verified(result)]),
        "asked": [(one.title, one.sums, believed.HEADER, one.rows) for one in believed.asked(result.data)],
        "trust": [
            (replacement, believed.TRUST_HEADER, believed.trusted(result.data, replacement))
            for replacement in believed.REPLACEMENTS
        ],
        "search": audited.search(result),
    }


def _panel(name: str, data, read) -> dict:
    shown, folded = rows(data)
    level = data["level"].sel(quantile=0.5)
    after = {row.writer: str(data["right_after"].sel(writer=row.writer).item()) for row in shown}
    cells = {
        row.writer: [
            (float(value), _colour(float(value)), str(place) == after[row.writer])
            for place, value in zip(data["location"].values, level.sel(writer=row.writer).values, strict=True)
        ]
        for row in shown
    }
    return {
        "title": plain(f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"),
        "locations": [str(place) for place in data["location"].values],
        "rows": shown,
        "cells": cells,
        "folded": folded_line(folded) if folded else "",
    }


def _colour(level: float) -> str:
    """The figure's scale, full at ±2 and never too dark for black digits."""
    if not np.isfinite(level):
        return "#dddddd"
    weight = 0.75 * min(abs(level) / 2, 1.0)
    end = bytes.fromhex(DIVERGING[2 if level > 0 else 0][1:])
    return "#" + "".join(f"{round(255 + weight * (channel - 255)):02x}" for channel in end)


def _flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        name = f"{prefix}{plain(key)}"
        lines += _flat(value, f"{name} · ") if isinstance(value, dict) else [(name, plain(value))]
    return lines
