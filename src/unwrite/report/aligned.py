"""What does a subspace do to pairs that it was not made of, beside its parts and controls? Lines, from a result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column, Line, Listing, spanned
from unwrite.result import Result

PATCHES = (
    Column("patched", holds="word"),
    Column("FLDD % [95 %]", "{fldd}"),
    Column("says the other answer", "{rate}"),
    Column("share of the effect", "{share}"),
)
SITES = (
    Column("site", holds="word"),
    Column("FLDD % [95 %]", "{fldd}"),
    Column("says the other answer", "{rate}"),
    Column("whole value", "FLDD of the source prompt's whole value"),
    Column("row part", "FLDD of the part that is read"),
    Column("most of controls", "the largest FLDD of a control"),
    Column("verdict", "{verdict}", holds="word"),
)
RANKS = (
    Column("directions"),
    Column("kept [95 %]", "{kept}"),
    Column("right answer", "{top}"),
    Column("variance", "{variance}"),
    Column("random (to the most)", "{random_kept}"),
)
_CONTROLS = ("random", "arbitrary", "untrained")


def each(data: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Every site by its name."""
    if "site" not in data.dims:
        yield str(data.attrs["site"]), data
    for name in data["site"].values if "site" in data.dims else ():
        yield str(name), data.sel(site=name)


def parts(result: Result) -> Iterator[Line | Listing]:
    """A table of the sites, where there are several; of each what was patched, or how many directions it kept."""
    found, data = [*each(result.data)], result.data
    pairs = f"{counted(data.sizes['pair'], 'pair')} of {counted(int(data.attrs['templates']), 'cluster')} held out"
    yield Line(f"{pairs}; bases of {counted(int(data.attrs['learned_from']), 'other pair')}", "dim")
    if "kept" in data:
        for name, one in found:
            yield Listing(f"{name}: kept alone", RANKS, ranks(one), one, None)
        return
    if len(found) > 1:
        yield Listing("by site", SITES, [site(name, one) for name, one in found], data, None)
    for name, one in found:
        yield Listing(f"{name}: {one['verdict'].item()}", PATCHES, patches(one), one, None)
        if np.isfinite(one["spread"].values).any():
            yield Line(_dormant(one), "dim")
    if "untrained" in data.attrs:
        yield Line(f"no untrained model: {data.attrs['untrained']}", "yellow")


def patches(one: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each patch of a site that there is."""
    lines = []
    for name in one["patch"].values:
        of = one.sel(patch=name)
        if np.isfinite(of["fldd"]):
            cells = (_number(of, "fldd", 1), _number(of, "rate", 2), "" if name == "clean" else _number(of, "share", 2))
            lines.append((str(name), *cells))
    return lines


def site(name: str, one: xr.Dataset) -> tuple[str, ...]:
    """A line for a site among others."""
    own, value = one.sel(patch="subspace"), one["fldd"]
    most = np.nanmax([*value.sel(patch=[*_CONTROLS]).values, -np.inf])
    whole, row = (float(value.sel(patch=patch)) for patch in ("full", "row"))
    cells = [f"{x:.1f}" if np.isfinite(x) else "–" for x in (whole, row, most)]
    return (name, _number(own, "fldd", 1), _number(own, "rate", 2), *cells, str(one["verdict"].item()))


def ranks(one: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each number of directions that are kept."""
    lines = []
    for rank in one["rank"].values:
        of = one.sel(rank=rank)
        random = of["random_kept"].values
        numbers = (
            f"{float(of['top']):.2f}",
            f"{float(of['variance']):.2f}",
            f"{random.mean():.2f} ({random.max():.2f})",
        )
        lines.append((str(int(rank)), _number(of, "kept", 2), *numbers))
    return lines


def sentence(result: Result) -> str:
    """What each site's subspace does, its interval and controls first, and then the word."""
    data = result.data
    found = [*each(data)]
    k = data.sizes["direction"]
    if len(found) > 1:
        words = [f"{name} {one['verdict'].item()}" for name, one in found]
        looks = f"intervals hold for all {len(found)} together"
        said = f"{counted(k, 'direction')} of each of {len(found)} sites, {looks}: {', '.join(words)}"
    else:
        name, one = found[0]
        verdict, because = one["verdict"].item(), one["because"].item()
        of = f"{counted(k, 'direction')} of {name}"
        said = f"{of}: {verdict}; {because}" if "kept" in data else f"{of} {because}: {verdict}"
    pairs = f"{counted(data.sizes['pair'], 'pair')} of {counted(int(data.attrs['templates']), 'cluster')} held out"
    return f"{said} ({pairs}). {data.attrs['solves']}"


def _number(of: xr.Dataset, name: str, n: int) -> str:
    value, low, high = (float(of[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return spanned(value, low, high, n=n)


def _dormant(one: xr.Dataset) -> str:
    norm, spread, moved = (one[name].values for name in ("norm", "spread", "moved"))
    both = [f"{name}: length {n:.2f}, values vary by {s:.3g}, an exchange moves them by {m:.3g}"
            for name, n, s, m in zip(("row", "null"), norm, spread, moved, strict=True)]  # fmt: skip
    return "; ".join(both)
