"""What do patches do, by every estimator that was asked? Lines for a terminal, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column, spanned
from unwrite.result import Result

# Pairs that are shown, and nodes of each.
_PAIRS, _NODES = 3, 12
# Edges that are shown.
_EDGES = 24
# Characters of a prompt's end.
_WIDE = 48
_ALONE = ("effect", "signed", "inputs")
# The axis of places, where there is one.
_WHERE = ("position", "role")
RATES = (
    Column("template", holds="word"),
    Column("pairs", "{n}"),
    Column("right [95 %]", "{accuracy}"),
    Column("top of all tokens", "{top_accuracy}"),
    Column("verdict", "{verdict}", holds="word"),
    Column("its first prompt, and what the model says", holds="word"),
)
EDGES = (
    Column("sender", holds="word"),
    Column("receiver", holds="word"),
    Column("at", holds="word"),
    Column("mean effect [95 %]", "{mean}"),
    Column("largest of a pair", "{effect}"),
)
AGREEMENT = (
    Column("estimator", holds="word"),
    Column("passes", "{cost}"),
    Column("correlation with exact [95 %]", "{pearson}"),
    Column("of ranks", "{spearman}"),
)


@dataclass(frozen=True)
class Shown:
    """What is shown of one pair."""

    title: str
    sums: str
    header: tuple[Column, ...]
    rows: list[tuple[str, ...]]


def shown(data: xr.Dataset) -> Iterator[Shown]:
    """The first pairs, with the nodes that do most."""
    names = estimates(data)
    where = [axis for axis in _WHERE if axis in data.dims]
    header = (Column("node", holds="word"), *map(Column, where), *(Column(name, f"{{{name}}}") for name in names))
    for pair in range(min(_PAIRS, data.sizes["pair"])):
        one = data.isel(pair=pair)
        yield Shown(_title(one), _sums(one, names), header, _rows(one, names))


def estimates(data: xr.Dataset) -> list[str]:
    """The variables that hold effects: one for each estimator, or those of a lone one."""
    names = data["estimator"].values if "estimator" in data.coords else _ALONE
    return [str(name) for name in names if str(name) in data.data_vars]


def _lead(data: xr.Dataset) -> xr.DataArray:
    """What nodes are ordered by: what was executed, where it was."""
    names = estimates(data)
    return data["exact" if "exact" in names else names[0]]


def _title(one: xr.Dataset) -> str:
    against = f" − “{one['against'].item()}”" if "against" in one else ""
    return f"{int(one['pair'])}: “{one['base_text'].item()}” → “{one['answer'].item()}”{against}"


def _sums(one: xr.Dataset, names: list[str]) -> str:
    unit = one["base"].attrs.get("units", one[names[0]].attrs["units"])
    return f"values from “{one['source_text'].item()}”; {unit} of the base run {float(one['base']):+.3f}"


def _rows(one: xr.Dataset, names: list[str]) -> list[tuple[str, ...]]:
    """One line for every node (and position) that does most, by what was executed where it was."""
    size = np.nan_to_num(np.abs(_lead(one).values))
    order = np.argsort(-size, axis=None, kind="stable")[:_NODES]
    lines = []
    for place in zip(*np.unravel_index(order, size.shape), strict=True):
        where = [str(one[axis].values[place[1]]) for axis in _WHERE if axis in one.dims]
        numbers = [f"{float(one[name].values[place]):+.3f}" for name in names]
        lines.append((str(one["node"].values[place[0]]), *where, *numbers))
    return lines


def left_out(data: xr.Dataset) -> str:
    """What is not shown, in words; empty where everything is."""
    more = data.sizes["pair"] - _PAIRS
    return f"{more} more pairs are in the table" if more > 0 else ""


def agreement(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each estimator: what it costs, and how well it predicts what was executed."""
    if "pearson" not in data:
        return []
    lines = []
    for name in data["estimator"].values:
        one = data.sel(estimator=name)
        low, high = float(one["pearson_low"]), float(one["pearson_high"])
        pearson, cost = spanned(float(one["pearson"]), low, high, n=3, sign="+"), f"{float(one['cost']):.1f}"
        lines.append((str(name), cost, pearson, f"{float(one['spearman']):+.3f}"))
    return lines


def sentence(result: Result) -> str:
    """Which guess comes nearest to what was executed; without guesses, which node does most."""
    data = result.data
    if "pearson" in data:
        named = zip(data["estimator"].values, data["pearson"].values, strict=True)
        known = [(float(r), str(name)) for name, r in named if name != "exact" and np.isfinite(r)]
        if known:
            r, name = max(known)
            nearest = f"correlation {r:+.3f} over all cells. {_solves(data)}"
            return f"Of the guesses {name} comes nearest to the executed effects: {nearest}".strip()
    size = np.abs(_lead(data).transpose("node", ...).values)
    each = np.nanmean(size.reshape(len(size), -1), 1)
    node = data["node"].values[int(np.nanargmax(each))]
    return f"{node} does most: {np.nanmax(each):.3f} on average, of either sign. {_solves(data)}".strip()


def _solves(data: xr.Dataset) -> str:
    """Whether the model does at all what the effects are of; a result of an earlier version does not say."""
    return str(data.attrs.get("solves", ""))


def agreed(result: Result) -> str:
    """How well a guess predicts what was executed."""
    one = result.data.sel(group="all").isel(reading=-1)
    r, ranks = float(one["pearson"]), float(one["spearman"])
    cells = f"{int(one['n']):,} cells"
    return f"The guess agrees with the executed effects: correlation {r:+.3f}, of ranks {ranks:+.3f}, {cells}."


def bounded(result: Result) -> str:
    """What a guess may have missed, of the pair where that is most."""
    return str(result.data["says"].values[int(np.nanargmax(result.data["theta"].values))])


def along(result: Result) -> str:
    """The edge that does most, of how many."""
    # NaN where no pair has such an edge.
    size = abs(result.data["effect"]).mean("pair").transpose("sender", "receiver", ...)
    sender, receiver, *role = np.unravel_index(int(np.nanargmax(size.values)), size.shape)
    edge = f"{size['sender'].values[sender]} → {size['receiver'].values[receiver]}"
    at = "".join(f" at {size['role'].values[one]}" for one in role)
    edges, pairs = int(size.notnull().sum()), counted(result.data.sizes["pair"], "pair")
    most = f"{float(size.max()):.3f} on average over {pairs}, of either sign ({_how(result)})"
    return f"Of {counted(edges, 'edge')} {edge}{at} does most: {most}. {_solves(result.data)}".strip()


def edges(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each of the edges that do most on average, the largest first."""
    mean = data["mean"].transpose("sender", "receiver", ...)
    order = np.argsort(-np.nan_to_num(np.abs(mean.values)), axis=None, kind="stable")[:_EDGES]
    places = zip(*np.unravel_index(order, mean.shape), strict=True)
    lines = []
    for place in places:
        at = dict(zip(mean.dims, place, strict=True))
        one, cells = data.isel(at), data["effect"].isel(at).values
        if np.isnan(float(one["mean"])):
            break
        role = str(one["role"].item()) if "role" in data.coords else "all"
        low, high = float(one["mean_low"]), float(one["mean_high"])
        numbers = spanned(float(one["mean"]), low, high, n=3, sign="+"), f"{cells[np.abs(cells).argmax()]:+.3f}"
        lines.append((str(one["sender"].item()), str(one["receiver"].item()), role, *numbers))
    return lines


def rates(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for each template: how often the answer is right, and what that says."""
    lines = []
    for name in data["template"].values:
        one = data.sel(template=name)
        numbers = (spanned(*(float(one[name]) for name in ("accuracy", "lower", "upper"))),)
        first = int(np.flatnonzero(data["label"].values == name)[0])
        text = f"{data['base_text'].values[first]}"[-_WIDE:]
        said = f"…{text} →{data['says'].values[first]}"
        lines.append(
            (
                str(name),
                str(int(one["n"])),
                *numbers,
                f"{float(one['top_accuracy']):.2f}",
                str(one["verdict"].item()),
                said,
            )
        )
    return lines


def solving(result: Result) -> str:
    """Whether the model does it."""
    return str(result.data.attrs["solves"])


def _how(result: Result) -> str:
    """How the numbers of edges come about; a result of an earlier version was executed."""
    settings = result.provenance["settings"]
    method = settings.get("method", "exact")
    return f"MLPs {settings['mlps']}" if method == "exact" else f"{method}, a guess of the direct edge"
