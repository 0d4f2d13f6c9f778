"""What of direct effects is repaired, and by what? Lines for a terminal, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, Listing, digits, spanned
from unwrite.result import Result

_PARTS = {
    "norm": "the final norm",
    "filled_in": "nodes that fill in, less what they pass on",
    "erased": "erasure that is not needed",
}
HEADER = (
    Column("node", holds="word"),
    Column("direct", "{mean_direct}"),
    Column("total", "{mean_total}"),
    Column("not missed [95 %]", "{share}, all"),
    *(Column(name.replace("_", " "), f"{{share}}, {name}: {says}") for name, says in _PARTS.items()),
    Column("prompts", "counted prompts: the largest direct effects", "numbers"),
)
GROUPS = (Column("nodes", holds="word"), *HEADER[3:-1])


def sentence(result: Result) -> str:
    """Of heads, and of MLPs, which part of direct is not missed, and what it is made of."""
    data, said = result.data, []
    for group in [str(name) for name in data["group"].values][:2]:
        one = data.sel(group=group)
        if group.startswith("L") or not np.isfinite(one["group_share"].sel(part="all")):
            continue
        parts = ", ".join(f"{float(one['group_share'].sel(part=name)):+.2f} {says}" for name, says in _PARTS.items())
        said.append(f"of {group} {share_of(one, 'group_share', 'all')} of direct is not missed ({parts})")
    prompts = f"{data.attrs['n_prompts']} prompts of {data.attrs['clusters']} independent texts"
    words = "; ".join(said) or "no node before the last layer has a direct effect above 0"
    return f"{words[0].upper()}{words[1:]}; of each node the largest direct effects of {prompts}."


def parts(result: Result) -> Iterator[Listing]:
    """Groups, and then the nodes with most direct effect."""
    yield Listing("", GROUPS, list(_groups(result.data)), result.data, None)
    yield Listing("by the mean of their largest direct effects", HEADER, list(_nodes(result.data)), result.data)


def _groups(data: xr.Dataset) -> Iterator[tuple[str, ...]]:
    for i in range(data.sizes["group"]):
        one = data.isel(group=i)
        yield (str(one["group"].item()), *_shares(one, "group_share"))


def _nodes(data: xr.Dataset) -> Iterator[tuple[str, ...]]:
    size = np.nan_to_num(data["mean_direct"].values, nan=-np.inf)
    for i in np.argsort(-size, kind="stable"):
        one = data.isel(node=int(i))
        if np.isfinite(size[i]):
            means = (f"{float(one[f'mean_{name}']):+.3f}" for name in ("direct", "total"))
            yield (str(one["node"].item()), *means, *_shares(one, "share"), str(int(one["counted"].sum())))


def _shares(one: xr.Dataset, name: str) -> Iterator[str]:
    yield share_of(one, name, "all")
    for part in _PARTS:
        yield digits(float(one[name].sel(part=part)), sign="+")


def share_of(one: xr.Dataset, name: str, part: str) -> str:
    """A share with its interval, where there is one."""
    value, low, high = (float(one[f"{name}{end}"].sel(part=part)) for end in ("", "_low", "_high"))
    return spanned(value, low, high, sign="+")
