"""Which channel is read by whom, and what do runs say to it? Lines and words, from a result."""

from __future__ import annotations

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column
from unwrite.result import Result

# So many edges are listed.
_MOST = 200
HEADER = (
    Column("writer", holds="word"),
    Column("channel", "{best_channel}"),
    Column("reader", holds="word"),
    Column("score", "{best}"),
    Column("random", "{generic_best}, 95 %"),
    Column("head", "{whole}"),
    Column("angles", "{kernel}"),
    Column("rank", "{rank}"),
    Column("effect", "what the edge does to a metric, of uw.paths"),
)


def lines(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each edge: those of the largest executed effects first, or without any of the largest scores."""
    random, ranked = data["generic_best"].sel(quantile=0.95).values, "effect" in data
    found = []
    for at in _foremost(data):
        one = {name: data[name].values[at] for name in ("best", "best_channel", "whole", "kernel", "rank")}
        effect = f"{data['effect'].values[at]:+.2f}" if ranked and np.isfinite(data["effect"].values[at]) else "–"
        found.append((
            str(data["writer"].values[at[0]]), f"{one['best_channel']:.0f}", _reader(data, at), f"{one['best']:.2f}",
            f"{random[at[1:]]:.2f}", f"{one['whole']:.2f}", f"{one['kernel']:.2f}", f"{one['rank']:.0f}", effect,
        ))  # fmt: skip
    return found


def sentence(result: Result) -> str:
    """The edge that stands out, and whether weights foretell what edges do."""
    data = result.data
    if not (edges := int(data["best"].notnull().sum())):
        return "no reader lies behind a writer"
    at = _foremost(data)[0]
    best, random = data["best"].values[at], data["generic_best"].sel(quantile=0.95).values[at[1:]]
    channel = f"{data['writer'].values[at[0]]} channel {data['best_channel'].values[at]:.0f}"
    edge = f"{channel} → {_reader(data, at)} {best:.2f} (95 % of random heads below {random:.2f})"
    if "effect" not in data:
        return f"Of {counted(edges, 'edge')} by weights alone the largest score is {edge}; no run has been asked"
    there = data["best"].isel(reader=at[1], side=at[2]).notnull().sum().item()
    place = f"rank {data['rank'].values[at]:.0f} of {there} writers by its best channel"
    agree, whole = (data.attrs[name] for name in ("agreement", "agreement_whole"))
    return (
        f"Over {counted(data.attrs['edges'], 'edge')} Spearman's correlation of |effect| is {agree:.2f} with the best "
        f"channel's score and {whole:.2f} with the whole head's; the largest effect, "
        f"{data['effect'].values[at]:+.2f}, is that of {edge}, {place}"
    )


def _foremost(data: xr.Dataset) -> list[tuple[int, ...]]:
    size = np.abs(data["effect"].values) if "effect" in data else data["best"].values
    size = np.where(np.isfinite(data["best"].values), size, np.nan)
    order = np.argsort(-np.nan_to_num(size, nan=-1.0), axis=None, kind="stable")[:_MOST]
    at = zip(*(part.tolist() for part in np.unravel_index(order, size.shape)), strict=True)
    return [one for one in at if np.isfinite(size[one])]


def _reader(data: xr.Dataset, at: tuple[int, ...]) -> str:
    return f"{data['reader'].values[at[1]]}.{data['side'].values[at[2]]}"
