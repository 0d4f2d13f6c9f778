"""Which nodes does a mask choose, and what do they do to pairs that it has not seen? Lines and words, from a result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column
from unwrite.result import Result

# Of many names so many are said.
_NAMED = 10
PATH = (
    Column("penalty"),
    Column("nodes", "{size}"),
    Column("match [95 %]", "{match}"),
    Column("above all choices", "{restricted_rate}"),
    Column("difference", "{mean_difference}"),
    Column("the other nodes", "match where all but the chosen nodes are patched"),
    Column("random nodes (to the most)", "{random_match}"),
    Column("stable", "{stable}"),
)
CHOSEN = (Column("node", holds="word"), Column("at", holds="word"), Column("gain", "{mean_gain}"))


def path(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each penalty: how many nodes it leaves, and what they do."""
    lines = []
    for i, penalty in enumerate(data["penalty"].values):
        one = data.isel(penalty=i)
        own, random = one.sel(set="chosen"), one.sel(set="random")
        stable = float(one["stable"])
        lines.append((
            f"{float(penalty):g}", str(int(one["size"])), _rate(own), f"{float(own['restricted_rate']):.2f}",
            f"{float(own['mean_difference']):+.2f}", f"{float(one['rate'].sel(set='complement')):.2f}",
            "–" if np.isnan(random["rate"]) else f"{float(random['rate']):.2f} ({float(random['rate_high']):.2f})",
            "–" if np.isnan(stable) else f"{stable:.2f}",
        ))  # fmt: skip
    return lines


def chosen(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each node and place that the best mask chooses, the largest gain first."""
    best, axes = _best(data), ("node", *(axis for axis in ("role", "position") if axis in data["chosen"].dims))
    gain, picked = (best[name].transpose(*axes).values for name in ("mean_gain", "chosen"))
    found = sorted(zip(*np.nonzero(picked), strict=True), key=lambda at: -gain[at])
    at = str(data.attrs["at"])
    return [
        (
            str(data["node"].values[one[0]]),
            str(data[axes[1]].values[one[1]]) if len(one) > 1 else at,
            f"{gain[one]:.2f}",
        )
        for one in found
    ]


def ends(data: xr.Dataset) -> str:
    """What happens with no node patched, and with all of them."""
    none, every = (float(_best(data)["rate"].sel(set=name)) for name in ("none", "all"))
    return f"match without a patch {none:.2f}, with all {counted(data.sizes['node'], 'node')} patched {every:.2f}"


def sentence(result: Result) -> str:
    """How often the best mask's nodes turn the answer, beside the others, and then in a word what that says."""
    data = result.data
    best = _best(data)
    names, size = list(_names(data)), int(best["size"])
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    others = {name: float(best["rate"].sel(set=name)) for name in ("none", "all", "random")}
    pairs, templates = (
        counted(int(n), thing) for n, thing in ((data.sizes["pair"], "pair"), (data.attrs["templates"], "cluster"))
    )
    of = f"penalty {float(data.attrs['best']):g}" + (f", best of {n} here" if (n := data.sizes["penalty"]) > 1 else "")
    rate = _rate(best.sel(set="chosen"), "95 % {} to {}")
    words = f"With {counted(size, 'node')} set ({of}) {rate} of {pairs} held out, {templates}, say the other answer"
    random = "" if np.isnan(others["random"]) else f", random ones of the same layers {others['random']:.2f}"
    beside = f"without {others['none']:.2f}, all nodes {others['all']:.2f}{random}"
    return f"{words}; {beside}: {data.attrs['found']}{f' ({listed})' if names else ''}. {data.attrs['solves']}"


def _best(data: xr.Dataset) -> xr.Dataset:
    return data.sel(penalty=float(data.attrs["best"]))


def _names(data: xr.Dataset) -> Iterator[str]:
    picked = _best(data)["chosen"].transpose("node", ...).values.reshape(data.sizes["node"], -1).any(1)
    return (str(name) for name in data["node"].values[picked])


def _rate(one: xr.Dataset, ends: str = "{}, {}") -> str:
    low, high = float(one["rate_low"]), float(one["rate_high"])
    rate = f"{float(one['rate']):.2f}"
    if np.isnan(low):
        return rate
    said = ends.format(f"{low:.2f}", f"{high:.2f}")
    return f"{rate} ({said})" if "%" in ends else f"{rate} [{said}]"
