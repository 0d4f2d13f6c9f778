"""Which layers write the text of an image? Words and lines, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column, Line, Listing, spanned
from unwrite.result import Result

HEADER = (
    Column("with the target in", holds="word"),
    Column("share [95 %]", "{share}; {low}"),
    Column("verdict", "{verdict}", holds="word"),
    Column("weights", "{parameters}"),
)
# Runs with no share: the prompt's own image, the target's, and that with the target's text in all layers.
_ENDS = ("source", "target", "all")
_WRITES, _NAMED = "writes the text", 4
# Of all scores these stand in a table, beside the one that says which text is there.
_SHOWN = ("ssim", "mse")


def parts(result: Result) -> Iterator[Line | Listing]:
    """What all layers do, then each of those that were asked, the largest share first, with all scores."""
    data = result.data
    put = {"kv": "keys and values of its run", "embedding": "its embedding"}[str(data.attrs["put"])]
    each = f"{counted(int(data.attrs['prompts']), 'prompt')}, {counted(int(data.attrs['layers']), 'layer')} read text"
    yield Line(f"{each}; of the target {put}, from step {data.attrs['start']} on", "dim")
    scores = [name for name in (data.attrs["by"], *_SHOWN) if name in data["score"].values]
    columns = (*HEADER, *(Column(name, "{value}") for name in scores), Column("layer", holds="word"))
    yield Listing("", columns, [_row(data, i, scores) for i in _order(data)], data)


def _order(data: xr.Dataset) -> list[int]:
    share = data["share"].values if "share" in data else np.full(data.sizes["run"], np.nan)
    own = [i for i, run in enumerate(data["run"].values) if run in _ENDS]
    rest = [i for i in range(data.sizes["run"]) if i not in own]
    return [*own, *sorted(rest, key=lambda i: -np.nan_to_num(share[i], nan=-np.inf))]


def _row(data: xr.Dataset, i: int, scores: list[str]) -> tuple[str, ...]:
    run, path = str(data["run"].values[i]), str(data["path"].values[i])
    verdict = str(data["verdict"].values[i]) if "verdict" in data else ""
    weights = int(data["parameters"].values[i])
    values = [f"{float(data['mean'].sel(score=name)[i]):.3g}" for name in scores]
    return run, interval(data, i), verdict, f"{weights:,}" if weights else "", *values, path


def interval(data: xr.Dataset, i: int) -> str:
    """A share and how far it may be from that; "" where there is none."""
    if "share" not in data or np.isnan(data["share"].values[i]):
        return ""
    share, low, high = (float(data[name].values[i]) for name in ("share", "low", "high"))
    return spanned(share, low, high)


def sentence(result: Result) -> str:
    """What all layers together do, then the layers that surely do more than half of it, or that none surely does."""
    data = result.data
    n = counted(int(data.attrs["prompts"]), "prompt")
    if not data.attrs["by"]:
        change = data["mean"].sel(score="mse").values
        most = int(np.argmax(np.where(np.isin(data["run"].values, _ENDS), -np.inf, change)))
        named = f"{data['run'].values[most]} changes images most (MSE {change[most]:.3g} grey values²)"
        return f"{named}, {n}. No score says which text is there: pass `read`, or `score`"
    moved, low, high = (float(data.attrs[name]) for name in ("moved", "moved_low", "moved_high"))
    every = f"all layers together change {data.attrs['by']} by {spanned(moved, low, high)} ({n})"
    if not low > 0:
        return f"{every}: that the text follows the target at all is not sure, so no layer can be said to write it"
    return f"{every}; {_layers(data)}"


def _layers(data: xr.Dataset) -> str:
    order = [i for i in _order(data) if data["run"].values[i] not in _ENDS]
    writes = [i for i in order if data["verdict"].values[i] == _WRITES]
    asked = counted(len(order), "set of layers" if any("+" in str(run) for run in data["run"].values) else "layer")
    if not writes:
        best = f"; most by {data['run'].values[order[0]]}, {interval(data, order[0])}" if order else ""
        return f"of {asked} none surely does more than half of that by itself{best}"
    named = ", ".join(f"{data['run'].values[i]} {interval(data, i)}" for i in writes[:_NAMED])
    more = f" and {len(writes) - _NAMED} more" if len(writes) > _NAMED else ""
    return f"of {asked} these write it, by their shares of that: {named}{more}"
