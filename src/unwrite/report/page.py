"""What does a person see in a browser? One self-contained page of a saved result."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xarray as xr
from markupsafe import Markup

from unwrite.files import write
from unwrite.report import audited, believed, panels, writers
from unwrite.report.columns import Column, Table, table
from unwrite.report.paper import fig4
from unwrite.report.pictures import picture, scatters, taken_back
from unwrite.report.scanned import soundness, texts
from unwrite.report.templates import embedded, own, render
from unwrite.report.terminal import certificate, headline
from unwrite.report.views import alerts, view
from unwrite.report.whole import STEPS, Whole, special, whole
from unwrite.result import FILE, Result

# Rows of the table of writers that are open; its script turns it over, without one the others are folded.
OPEN = 20
# What lies beside a result's own file; the page only of what it can show.
BESIDE = ("table.csv", "report.html")
_EQUATIONS = (Column("variable", holds="word"), Column("unit", holds="word"), Column("equation", holds="words"))


def page(result: Result, beside: Iterable[Path] = ()) -> str:
    """The result as one HTML document without network; every text in it is escaped.

    Its content policy lets run one script (which writer is looked at, and by which number) and one style, named by
    their hashes, and takes no text for markup. Without the script the picture and all tables are there. It links to
    files that will lie `beside` it, and can save what it shows itself.
    """
    settings, claimed = result.provenance["settings"], view(result).claims
    found = writers.found(result)
    seen = whole(result, found.by_name)
    script, style = own("page.js"), own("page.css") + _shades(seen)
    made = render(
        "page.html.j2",
        headline=headline(result),
        certificate=certificate(result),
        claims=claimed(result) if claimed else [(view(result).words(result), "")],
        alerts=[(alert.kind, alert.words) for alert in alerts(result)],
        texts=[(_title(name, read), soundness(data, settings)) for name, data, read in texts(result)],
        whole=seen,
        special=special,
        writers=found,
        open=OPEN,
        drawn=embedded(_drawn(result, seen)),
        truth=list(scatters(result.data)) if "total" in result.data else [],
        audit=_audited(result) if "verified" in result.data.dims else None,
        provenance=_flat(result.provenance),
        equations=table("", _EQUATIONS, _equations(result.data), result.data),
        downloads=[file.name for file in beside],
        script=script,
        script_hash=_hash(script),
        style=style,
        style_hash=_hash(style),
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
    return (FILE, *(BESIDE if view(result).claims else BESIDE[:1]))


def _hash(text: str) -> str:
    """As a content policy names a script or a style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _shades(seen: Whole) -> Markup:
    """The style of what the picture has so many of: steps of its colours, and columns and rows."""
    steps = "".join(f".{side}{i}{{--w:{100 * i // STEPS}%}}" for side in "du" for i in range(STEPS + 1))
    return Markup(f"{steps}:root{{--columns:{len(seen.columns)};--rows:{len(seen.rows)}}}\n")  # noqa: S704 - numbers


def _drawn(result: Result, seen: Whole) -> dict[str, Any]:
    """What the script needs, as JSON has it."""
    measures = [{"name": one.name, "says": one.says, "limit": one.limit, "values": one.short} for one in seen.measures]
    return writers.drawn(result) | {"measures": measures, "open": OPEN}


def _title(name: str, read: Mapping[str, Any]) -> str:
    return f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"


def _equations(data: xr.Dataset) -> Iterator[tuple[str, str, str]]:
    """Every variable's name, unit and equation."""
    for name, part in data.variables.items():
        if equation := part.attrs.get("equation"):
            yield (str(name), str(part.attrs.get("units", "")), str(equation))


def _audited(result: Result) -> dict[str, Any]:
    """The panels that only an audit has; names and texts in them were made plain where they were read."""
    data, proofs, judged = result.data, list(audited.verified(result)), result.provenance["settings"]["judged"]
    n = f"{judged['prompts']} × {judged['length']} tokens, which did not choose the writer"
    return {
        "verified": table("", audited.HEADER, map(audited.row, proofs), proofs[0], n),
        "closely": list(panels.closely(result)),
        "asked": [
            (one.title, one.sums, table("", believed.header(data), one.rows, data, "one prompt"))
            for one in believed.asked(data)
        ],
        "searched": picture(fig4(result)),
        # Without erasers there is no corpus of what they take back.
        "taken": list(taken_back(data)) if "corpus_sample_x" in data else [],
        "trust": list(_trust(data)),
        "writer": data.attrs["searched"],
        "search": audited.search(result),
    }


def _trust(data: xr.Dataset) -> Iterator[Table]:
    for kind in believed.REPLACEMENTS:
        yield table(believed.title(data, kind), believed.TRUST_HEADER, believed.trusted(data, kind), data)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += _flat(value, f"{name} · ") if isinstance(value, dict) else [(name, str(value))]
    return lines
