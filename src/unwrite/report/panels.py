"""What does the page say about one writer? Its pictures, tables and token strips, read from a saved result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from unwrite.report import audited, believed, verified
from unwrite.report.columns import Column, Table, table
from unwrite.report.figures import places
from unwrite.report.maps import DIVERGING
from unwrite.report.paper import fig1, fig2, fig3
from unwrite.report.pictures import Picture, picture
from unwrite.result import Result

# Writers whose pictures are drawn: all that were verified, and of the others those that move most energy.
DRAWN = 12
READINGS = (Column("prompt", holds="word"), *believed.HEADER[1:])
_ACTORS = 40
_FULL = 2.0


@dataclass(frozen=True)
class Strip:
    """One prompt, token by token: (text, number in words, colour)."""

    title: str
    tokens: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Writer:
    """All that the page shows of one writer; what was not measured is missing."""

    name: str
    verdict: str
    sentence: str
    where: Picture
    who: Picture
    causal: Picture | None = None
    by_position: Picture | None = None
    trajectory: Table | None = None
    actors: Table | None = None
    readings: Table | None = None
    strips: tuple[Strip, ...] = ()


def writers(result: Result, names: list[str]) -> Iterator[Writer]:
    """The verified writers, furthest below generic first, then the first of `names` that were not."""
    proofs = list(audited.verified(result)) if "verified" in result.data.dims else []
    proofs.sort(key=lambda proof: float(proof["gap"][-1]))
    for proof in proofs:
        yield _verified(result, proof)
    known = {proof.attrs["writer"] for proof in proofs}
    for name in [name for name in names if name not in known][: max(0, DRAWN - len(proofs))]:
        where, who = picture(fig1(result, name)), picture(fig2(result, name))
        says = f"{name} was not verified: its levels count all that lies along it, whoever wrote it."
        yield Writer(name, "", says, where, who, readings=_readings(result, name))


def _verified(result: Result, proof: xr.Dataset) -> Writer:
    name, one = proof.attrs["writer"], audited.alone(result, proof)
    read = one.provenance["tokens"][""]
    n = f"{read['prompts']} × {read['length']} tokens, which did not choose the writer"
    rising = "energy-weighted; generic: the mean of randomly turned writes"
    acting = "later nodes that act on it; shares of its energy"
    return Writer(
        name=name,
        verdict=proof.attrs["verdict"],
        sentence=verified.sentence(one),
        where=picture(fig1(one)),
        who=picture(fig2(one)),
        causal=picture(fig3(one)),
        by_position=picture(places(one)),
        trajectory=table(rising, verified.TRAJECTORY, verified.trajectory(one), proof, n),
        actors=table(acting, verified.ACTORS, verified.actors(one), proof, n, most=_ACTORS),
        readings=_readings(result, name),
        strips=tuple(_strips(proof)),
    )


def _readings(result: Result, writer: str) -> Table | None:
    """What a writer is credited with on every prompt, and what it does there."""
    if "verified" not in result.data.dims or writer not in result.data["node"].values:
        return None
    one = result.data[list(believed.CELLS)].sel(node=writer)
    rows = [(str(int(prompt)), *believed.row(one.sel(prompt=prompt))[1:]) for prompt in one["prompt"].values]
    return table("", READINGS, rows, result.data, notes="one prompt")


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
