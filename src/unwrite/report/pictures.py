"""How does a picture become part of a page? As SVG, which needs no script; marks of a chart say on hover what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom

import vl_convert as vlc
from altair import TopLevelMixin
import numpy as np
import xarray as xr
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
    """A reading against the executed total: of each kind of node the points as one path, full at ±`limit` logits."""

    reading: str
    said: str
    limit: float
    paths: tuple[tuple[str, str], ...]
    cells: int
    beyond: int


def scatters(data: xr.Dataset) -> Iterator[Scatter]:
    """Every reading against what happened, all prompts and nodes; points that fall together are drawn once."""
    total = data["total"].transpose("prompt", "node").values
    kinds = np.array([_kind(str(name)) for name in data["node"].values])
    readings = [data[name].transpose("prompt", "node").values for name in believed.READINGS]
    finite = np.abs([total, *readings])
    limit = float(np.nanquantile(finite, _INSIDE)) or 1.0
    said = {row[0]: row[1:] for row in believed.trusted(data)}
    for i, (name, reading) in enumerate(zip(believed.READINGS, readings, strict=True)):
        measured = np.isfinite(reading) & np.isfinite(total)
        outside = measured & ((np.abs(reading) > limit) | (np.abs(total) > limit))
        paths = tuple(
            (kind, _points(reading[:, own][measured[:, own]], total[:, own][measured[:, own]], limit))
            for kind in ("other", "heads", "mlps")
            if (own := kinds == kind).any()
        )
        words = "; ".join(f"{group} {said[group][i]}" for group in ("heads", "mlps") if group in said)
        yield Scatter(name, words, limit, paths, int(measured.sum()), int(outside.sum()))


def _kind(name: str) -> str:
    kind = parse_node(name).kind
    return "heads" if kind in PROJECTED else "mlps" if kind in MLPS else "other"


def _points(x: np.ndarray, y: np.ndarray, limit: float) -> str:
    """Dots, as lines of no length with round ends."""
    at = np.rint(np.clip(np.stack([x, -y], -1) / limit, -1, 1) * _INNER).astype(int) + _HALF
    return "".join(f"M{column} {row}h0" for column, row in np.unique(at, axis=0).tolist())
