"""What does the page say about one writer? Its pictures, tables and token strips, read from a saved result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import vl_convert as vlc
import xarray as xr
from altair import TopLevelMixin
from markupsafe import Markup

from unwrite.report import audited, believed, verified
from unwrite.report.figures import DIVERGING, places
from unwrite.report.paper import fig1, fig2, fig3
from unwrite.result import Result

# Writers whose pictures are drawn: all that were verified, and of the others those that move most energy.
DRAWN = 12
TRAJECTORY = ("location", "level", "background", "survival ± SE", "generic", "decodable")
ACTORS = ("node", "share", "without", "erased", "filled in", "through values", "one-reader", "how")
READINGS = ("prompt", *believed.READINGS, "total", "fate", "input-blind")
_FULL = 2.0


@dataclass(frozen=True)
class Picture:
    """An SVG with the sentence that stands for it where it is not seen."""

    svg: Markup
    says: str


@dataclass(frozen=True)
class Strip:
    """One prompt, token by token: (text, number in words, colour)."""

    title: str
    tokens: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Writer:
    """All that the page shows of one writer; what was not measured is empty."""

    name: str
    verdict: str
    sentence: str
    where: Picture
    who: Picture
    causal: Picture | None
    by_position: Picture | None
    trajectory: tuple[tuple[str, ...], ...]
    actors: tuple[tuple[str, ...], ...]
    readings: tuple[tuple[str, ...], ...]
    strips: tuple[Strip, ...]


def writers(result: Result, names: list[str]) -> Iterator[Writer]:
    """The verified writers, furthest below generic first, then the first of `names` that were not."""
    proofs = list(audited.verified(result)) if result.method == "audit" else []
    proofs.sort(key=lambda proof: float(proof["gap"][-1]))
    for proof in proofs:
        yield _verified(result, proof)
    known = {proof.attrs["writer"] for proof in proofs}
    for name in [name for name in names if name not in known][: max(0, DRAWN - len(proofs))]:
        where, who = picture(fig1(result, name)), picture(fig2(result, name))
        says = f"{name} was not verified: its levels count all that lies along it, whoever wrote it."
        yield Writer(name, "", says, where, who, None, None, (), (), _readings(result, name), ())


def _verified(result: Result, proof: xr.Dataset) -> Writer:
    name = proof.attrs["writer"]
    one = Result(proof.assign_attrs(result.data.attrs | proof.attrs))
    judged = result.provenance["settings"]["judged"]
    return Writer(
        name=name,
        verdict=proof.attrs["verdict"],
        sentence=verified.sentence(one, judged),
        where=picture(fig1(result, name)),
        who=picture(fig2(result, name)),
        causal=picture(fig3(result, name)),
        by_position=picture(places(result, name)),
        trajectory=tuple(verified.trajectory(one)),
        actors=tuple(verified.actors(one)),
        readings=_readings(result, name),
        strips=tuple(_strips(proof)),
    )


def _readings(result: Result, writer: str) -> tuple[tuple[str, ...], ...]:
    """What a writer is credited with on every prompt, and what it does there."""
    if result.method != "audit" or writer not in result.data["node"].values:
        return ()
    one = result.data.sel(node=writer)
    return tuple(
        (str(int(one["prompt"][i])), *believed.row(one.isel(prompt=i))[1:]) for i in range(one.sizes["prompt"])
    )


def _strips(proof: xr.Dataset) -> Iterator[Strip]:
    for example in proof["example"].values:
        one = proof.sel(example=example)
        words, levels, kept = (one[f"strip_{name}"].values for name in ("token", "level", "survival"))
        shown = [
            (str(word), _says(level, survival), colour(float(level)))
            for word, level, survival in zip(words, levels, kept, strict=True)
            if word
        ]
        yield Strip(f"prompt at the {float(example):.0%} quantile of survival", tuple(shown))


def _says(level: float, survival: float) -> str:
    if not np.isfinite(level):
        return "not counted"
    return f"level {level:+.2f}, survival {survival:+.2f}"


def colour(level: float) -> str:
    """The figures' scale, full at ±2 and never too dark for black digits."""
    if not np.isfinite(level):
        return "#dddddd"
    weight = 0.75 * min(abs(level) / _FULL, 1.0)
    end = bytes.fromhex(DIVERGING[2 if level > 0 else 0][1:])
    return "#" + "".join(f"{round(255 + weight * (channel - 255)):02x}" for channel in end)


def picture(chart: TopLevelMixin) -> Picture:
    """The chart as SVG text; everything written in it was escaped by the library that drew it."""
    spec: dict[str, Any] = chart.to_dict(validate=False)  # checked by the tests, and slow
    spec["config"] |= {"background": "transparent"}  # the page is light or dark
    svg = vlc.vegalite_to_svg(json.dumps(spec))
    return Picture(Markup(svg), spec["title"]["text"])  # noqa: S704 - drawn here
