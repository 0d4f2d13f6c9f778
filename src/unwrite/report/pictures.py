"""How does a chart become part of a page? As SVG that says on hover what each mark stands for, without a script."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom

import vl_convert as vlc
from altair import TopLevelMixin
from markupsafe import Markup

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
