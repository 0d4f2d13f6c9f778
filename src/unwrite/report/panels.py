"""What does the page say of the few writers that were verified? Pictures, tables and token strips of a saved result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from unwrite.report import audited, verified
from unwrite.report.columns import Table, table
from unwrite.report.figures import places
from unwrite.report.paper import fig3
from unwrite.report.pictures import Picture, picture
from unwrite.report.whole import step
from unwrite.result import Result

_ACTORS = 40
_FULL = 2.0


@dataclass(frozen=True)
class Strip:
    """One prompt, token by token: (text, number in words, colour)."""

    title: str
    tokens: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Writer:
    """All that the page shows of one verified writer."""

    name: str
    verdict: str
    because: str
    sentence: str
    story: str
    pictures: tuple[Picture, ...]
    trajectory: Table
    actors: Table
    strips: tuple[Strip, ...]


def closely(result: Result) -> Iterator[Writer]:
    """The verified writers, furthest below generic first."""
    proofs = sorted(audited.verified(result), key=lambda proof: float(proof["gap"][-1]))
    for proof in proofs:
        name, one = proof.attrs["writer"], audited.alone(result, proof)
        read = one.provenance["tokens"][""]
        n = f"{read['prompts']} × {read['length']} tokens, which did not choose the writer"
        rising = "energy-weighted; generic: the mean of randomly turned writes"
        acting = "later nodes that act on it; shares of its energy"
        yield Writer(
            name=name,
            verdict=proof.attrs["verdict"],
            because=str(proof["because"].item()),
            sentence=verified.sentence(one),
            story=str(proof["story"].item()) if "story" in proof else "",
            pictures=tuple(picture(draw(one)) for draw in (fig3, places)),
            trajectory=table(rising, verified.TRAJECTORY, verified.trajectory(one), proof, n),
            actors=table(acting, verified.ACTORS, verified.actors(one), proof, n, most=_ACTORS),
            strips=tuple(_strips(proof)),
        )


def _strips(proof: xr.Dataset) -> Iterator[Strip]:
    for example in proof["example"].values:
        one = proof.sel(example=example)
        words, levels, kept = (one[f"strip_{name}"].values for name in ("token", "level", "survival"))
        shown = [
            (str(word), _says(level, survival), step(float(level), _FULL))
            for word, level, survival in zip(words, levels, kept, strict=True)
            if word
        ]
        yield Strip(f"prompt at the {float(example):.0%} quantile of survival", tuple(shown))


def _says(level: float, survival: float) -> str:
    if not np.isfinite(level):
        return "not counted"
    return f"level {level:+.2f}, survival {survival:+.2f}"
