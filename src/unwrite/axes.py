"""Where in a model does what an axis names lie? Layer, head and kind beside the names; layer × head as a grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import NodeError, ResultError, plain, shown
from unwrite.nodes import Site, parse_site

# What every axis of nodes, states or sites carries beside their names.
PLACES = ("kind", "layer", "head")
# The end of a path lies outside of all layers.
_ENDS = {"logits": ("logits", -1, -1)}
# Axes of prompts, over which a grid is a mean.
_AVERAGED = ("pair", "prompt")
_LISTED = 12


def placed(data: xr.Dataset) -> xr.Dataset:
    """The same with kind, layer and head of everything that the names of an axis name, made anew of these names."""
    found: dict[str, Any] = {}
    for axis in data.dims:
        names = data.variables.get(axis)
        places = [_place(name) for name in names.values] if names is not None and names.dtype.kind in "UO" else []
        if places and None not in places:
            columns = zip(*places, strict=True)  # pyright: ignore[reportArgumentType]
            found |= {named(data, axis, part): (axis, [*all_]) for part, all_ in zip(PLACES, columns, strict=True)}
    return data.assign_coords(found)


def bare(data: xr.Dataset) -> xr.Dataset:
    """The same without what stands beside the names of its axes, which another data set may call alike."""
    return data.drop_vars([name for name in data.coords if name not in data.dims])


def named(data: xr.Dataset | xr.DataArray, axis: Hashable, part: str) -> str:
    """What a coordinate of an axis is called: of nodes `layer`, if no axis is called so; of others `writer_layer`."""
    return part if axis == "node" and part not in data.dims else f"{axis}_{part}"


@lru_cache(2**16)
def _place(name: object) -> tuple[str, int, int] | None:
    """Kind, layer and head of what a name names; None where it names nothing of a model."""
    try:
        site = parse_site(name)
    except NodeError:
        return _ENDS.get(name) if isinstance(name, str) else None
    return site.kind, site.layer, site.head


def of_names(part: xr.DataArray) -> list[str]:
    """The axes of a variable whose names are nodes, states or sites."""
    return [str(axis) for axis in part.dims if named(part, axis, "layer") in part.coords]


def picked(part: xr.DataArray, chosen: Mapping[str, Any]) -> xr.DataArray:
    """What is `chosen` of a variable; of pairs and prompts else the mean, of quantiles the median.

    Raises ResultError for what is no number, and for an axis or a name that it does not have.
    """
    if part.dtype.kind not in "fiub":
        raise ResultError(f"{part.name} holds no numbers", got=part.dtype, expected="a variable of numbers")
    for axis, which in chosen.items():
        part = _at(part, axis, which)
    part = part.sel(quantile=0.5) if "quantile" in part.dims else part
    over = [axis for axis in _AVERAGED if axis in part.dims]
    if not over:
        return part
    tokens, mean = part.coords.get("token"), part.mean(over, keep_attrs=True)
    # Where all prompts have the same token, their mean has it, too.
    if tokens is not None and "position" in tokens.dims and (tokens == tokens.isel({over[0]: 0})).all():
        return mean.assign_coords(token=tokens.isel({over[0]: 0}, drop=True))
    return mean


def _at(part: xr.DataArray, axis: str, which: Any) -> xr.DataArray:
    if axis not in part.dims:
        expected = ", ".join(map(str, part.dims)) or "none"
        raise ResultError(f"{part.name} has no such axis", got=shown(axis), expected=expected)
    try:
        return part.sel({axis: which})
    except (KeyError, TypeError, ValueError, IndexError):
        known = [str(name) for name in part[axis].values[:_LISTED]]
        expected = plain(", ".join(known)) + (" …" if part.sizes[axis] > _LISTED else "")
        raise ResultError(f"{part.name} has no such {axis}", got=shown(which), expected=expected) from None


def gridded(part: xr.DataArray, chosen: Mapping[str, Any]) -> xr.DataArray:
    """The grid of a variable, as `Result.grid` says."""
    part = picked(part, chosen)
    axes = of_names(part)
    if not axes:
        raise ResultError(f"{part.name} is not of nodes", got=", ".join(map(str, part.dims)) or "one number")
    if free := [str(axis) for axis in part.dims if axis not in (axes[-1], "position")]:
        raise ResultError(
            f"{part.name} has more axes than a grid", got=", ".join(map(str, part.dims)),
            expected="one of nodes, and positions", fix=f"pick on another, as {free[0]}={part[free[0]].values[0]!s}",
        )  # fmt: skip
    (axis,) = axes
    part = part.isel({axis: part[named(part, axis, "layer")].values >= 0})
    sites = [parse_site(name) for name in part[axis].values]
    part = part.drop_vars([named(part, axis, place) for place in PLACES])
    if "position" not in part.dims:
        return _by_head(part, sites)
    layers = [site.layer for site in sites]
    one_each = len(set(layers)) == len(layers)
    part = part.transpose(axis, "position")
    return part.assign_coords({axis: layers}).rename({axis: "layer"}) if one_each else part


def _by_head(part: xr.DataArray, sites: list[Site]) -> xr.DataArray:
    """[layer, head], NaN where a layer has none."""
    layers = sorted({site.layer for site in sites})
    columns = list(dict.fromkeys(site.within for site in sorted(sites, key=lambda site: site.order[1:])))
    made = np.full((len(layers), len(columns)), np.nan)
    for site, value in zip(sites, part.values, strict=True):
        made[layers.index(site.layer), columns.index(site.within)] = value
    rest = {str(name): at for name, at in part.coords.items() if not at.dims and name not in ("layer", "head")}
    return xr.DataArray(made, {"layer": layers, "head": columns, **rest}, ("layer", "head"), part.name, part.attrs)
