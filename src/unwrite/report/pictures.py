"""How does a picture become part of a page? As SVG; marks of a chart say on hover what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom

import numpy as np
import vl_convert as vlc
import xarray as xr
from altair import TopLevelMixin
from markupsafe import Markup

from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.report import believed

# A line or an area is named after its first point alone, and lies above others' points.
_WHOLE = ("line mark", "area mark")
_LONG = re.compile(r"\d+\.\d{3,}")


@dataclass(frozen=True)
class Picture:
    """An SVG with the sentence that stands for it where it is not seen."""

    svg: Markup
    says: str


def picture(chart: TopLevelMixin) -> Picture:
    """The chart as SVG text; everything written in it was escaped by the libraries that drew and parsed it."""
    spec: dict[str, Any] = chart.to_dict(validate=False)  # checked by the tests, and slow
    spec["config"] = {**spec.get("config", {}), "background": "transparent"}  # the page is light or dark
    svg = _hovered(vlc.vegalite_to_svg(json.dumps(spec)))
    return Picture(Markup(svg), spec["title"]["text"])  # noqa: S704 - drawn here


def _hovered(svg: str) -> str:
    """The same picture, with the label of each mark as a title that browsers show, and coordinates to a hundredth.

    The picture is one image to those who do not see it, so labels and roles inside of it say nothing to anyone.
    """
    document = minidom.parseString(svg)  # noqa: S318 - drawn here
    for element in document.getElementsByTagName("*"):
        said = dict(element.attributes.items())
        label = said.get("aria-label")
        if said.get("aria-roledescription") in _WHOLE:
            element.setAttribute("pointer-events", "none")
        elif label and element.tagName != "g":
            title = document.createElement("title")
            title.appendChild(document.createTextNode(label))
            element.insertBefore(title, element.firstChild)
        for name, value in said.items():
            if name == "role" or name.startswith("aria-"):
                element.removeAttribute(name)
            elif name in ("d", "transform"):
                element.setAttribute(name, _LONG.sub(lambda found: f"{float(found[0]):.2f}", value))
    return "".join(child.toxml() for child in document.childNodes)  # without the declaration of a file


# Half the width of a scatter, and of the square that its points lie in, in units of the picture.
_HALF, _INNER = 120, 112
# The largest part of cells that is drawn inside; the others lie at the border, and the page says how many.
_INSIDE = 0.998


@dataclass(frozen=True)
class Scatter:
    """One thing against another: of each kind the points as one path, full at ±`limit`, and how many lie beyond it."""

    name: str
    said: str
    limit: float
    paths: tuple[tuple[str, str], ...]
    cells: int
    beyond: int


def scatters(data: xr.Dataset) -> Iterator[Scatter]:
    """Every reading across and what really happened up, of all prompts and nodes."""
    total = data["total"].transpose("prompt", "node").values
    readings = [data[name].transpose("prompt", "node").values for name in believed.READINGS]
    limit = _limit(total, *readings)
    kinds = np.broadcast_to([_kind(str(name)) for name in data["node"].values], total.shape)
    groups = [group for group in ("heads", "mlps") if group in data["group"].values]
    said = [[f"{row[0]} {cell}" for cell in row[1:]] for row in believed.trusted(data.sel(group=groups))]
    for i, (name, reading) in enumerate(zip(believed.READINGS, readings, strict=True)):
        yield _scatter(name, "; ".join(cells[i] for cells in said), limit, reading, total, kinds)


def taken_back(data: xr.Dataset) -> Iterator[Scatter]:
    """What a writer is credited with across, and what its erasers take back because their values read it up."""
    one = data.sel(path="values")
    x, y = one["corpus_sample_x"].values, one["corpus_sample_y"].values
    said = f"{float(one['corpus_correlation']):+.2f}, slope {float(one['corpus_slope']):+.2f} (−1: all taken back)"
    yield _scatter("taken back", said, _limit(x, y), x, y, np.full(x.shape, "heads"))


def _scatter(name: str, said: str, limit: float, x: np.ndarray, y: np.ndarray, kinds: np.ndarray) -> Scatter:
    measured = np.isfinite(x) & np.isfinite(y)
    outside = measured & ((np.abs(x) > limit) | (np.abs(y) > limit))
    paths = tuple(
        (kind, _points(x[own], y[own], limit))
        for kind in ("other", "heads", "mlps")
        if (own := measured & (kinds == kind)).any()
    )
    return Scatter(name, said, limit, paths, int(measured.sum()), int(outside.sum()))


def _limit(*values: np.ndarray) -> float:
    return float(np.nanquantile(np.abs(np.stack(values)), _INSIDE)) or 1.0


def _kind(name: str) -> str:
    kind = parse_node(name).kind
    return "heads" if kind in PROJECTED else "mlps" if kind in MLPS else "other"


def _points(x: np.ndarray, y: np.ndarray, limit: float) -> str:
    """Dots, as lines of no length with round ends; those that fall together are one."""
    at = np.rint(np.clip(np.stack([x, -y], -1) / limit, -1, 1) * _INNER).astype(int) + _HALF
    return "".join(f"M{column} {row}h0" for column, row in np.unique(at, axis=0).tolist())
