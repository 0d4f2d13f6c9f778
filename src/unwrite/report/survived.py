"""What does a survival say about all writers, in rows and in one paragraph?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column
from unwrite.result import Result

# Of many names so many are said, and how many more there are.
_NAMED = 3
# What a node does to a write is named from this on.
_ACTS = 0.02
# What is out of the ordinary, in the order in which it is told.
SPECIAL = ("erased", "filled in", "reduced", "amplified", "kept")
HEADER = (
    Column("writer", holds="word"),
    Column("survives [95 %]", "{end}: [{end_low}, {end_high}]"),
    Column("ordinary writes [5 % to 95 %]", "{ordinary}"),
    Column("gap [95 %]", "{gap}"),
    Column("q", "{q}; above ordinary: {q_above}"),
    Column("verdict", "size, interval, controls, q and blocks, by the rules of unwrite.stats.verdicts", "word"),
    Column("who acts on it", "the strongest of {acts}", "words", least=30),
)


def rows(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for every writer: what is out of the ordinary first, then what is farthest from ordinary writes."""
    verdict, away = [str(word) for word in data["verdict"].values], -np.abs(np.nan_to_num(data["gap"].values))
    order = sorted(range(len(verdict)), key=lambda i: ((*SPECIAL, verdict[i]).index(verdict[i]), away[i]))
    each = _each(data)
    return [_row(each[i]) for i in order]


def _each(data: xr.Dataset) -> list[dict[str, Any]]:
    """Of every writer the numbers that are told, by name; what is ordinary by the first control."""
    ends = [f"{name}{end}" for name in ("end", "gap", "acts") for end in ("", "_low", "_high")]
    parts = {name: data[name].transpose("writer", ...).values for name in (*ends, "writer", "q", "q_above", "verdict")}
    ordinary = data["ordinary"].isel(control=0)
    parts |= {str(bound): ordinary.sel(bound=bound).values for bound in ordinary["bound"].values}
    node = data["node"].values
    return [{name: part[i] for name, part in parts.items()} | {"node": node} for i in range(data.sizes["writer"])]


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    low, middle, high = (float(one[bound]) for bound in ("low", "median", "high"))
    gap = float(one["gap"])
    q = float(one["q"] if gap <= 0 else one["q_above"])
    return (
        str(one["writer"]), between(one, "end", ""), f"{number(middle)} [{number(low)}, {number(high)}]",
        between(one, "gap", "+"), number(q), str(one["verdict"]), actors(one),
    )  # fmt: skip


def number(value: float, sign: str = "") -> str:
    """A number with two digits; what is beyond a hundred is said to be so."""
    if value != value:
        return "–"
    return f"{value:{sign}.2f}" if abs(value) <= 100 else ("beyond 100" if value > 0 else "beyond −100")


def between(one: Mapping[Any, Any], name: str, sign: str) -> str:
    """A number with its interval, where it has one."""
    value, low, high = (float(one[f"{name}{end}"]) for end in ("", "_low", "_high"))
    interval = f" [{number(low, sign)}, {number(high, sign)}]" if low == low else " (no interval)"
    return f"{number(value, sign)}{interval}"


def actors(one: Mapping[str, Any]) -> str:
    """Who writes along it because it is there, the strongest first, where the interval leaves no doubt of that."""
    acts, low, high = (one[f"acts{end}"] for end in ("", "_low", "_high"))
    sure = (np.abs(acts) >= _ACTS) & ((low > 0) | (high < 0))
    order = [i for i in np.argsort(-np.abs(acts), kind="stable") if sure[i]]
    named = [f"{one['node'][i]} {acts[i]:+.2f}" for i in order[:_NAMED]]
    rest = order[_NAMED:]
    more = [f"{len(rest)} more {acts[rest].sum():+.2f} in all"] if rest else []
    return ", ".join([*named, *more]) or "–"


def sentence(result: Result) -> str:
    """What is out of the ordinary, with its numbers; how many are undecided; what that rests on."""
    return " ".join(told(result.data))


def told(data: xr.Dataset) -> tuple[str, str, str]:
    """What is out of the ordinary, what is not or undecided, and what that rests on."""
    verdict = [str(word) for word in data["verdict"].values]
    count = Counter(verdict)
    documents, writers = int(data.attrs["documents"]), len(verdict)
    of = f"{counted(writers, 'writer')} on {counted(documents, 'document')}"
    hangs = int(data["hangs"].sum()) if "hangs" in data else 0
    return (_found(data, verdict, of), _rest(count, documents, hangs), _sound(data))


def _found(data: xr.Dataset, verdict: list[str], of: str) -> str:
    parts = []
    for word in SPECIAL:
        chosen = [i for i, own in enumerate(verdict) if own == word]
        chosen.sort(key=lambda i: -abs(float(data["gap"][i])))
        if chosen:
            parts.append(f"{len(chosen)} {word} ({_named(data, chosen)})")
    if parts:
        return f"Of {of}: {'; '.join(parts)}."
    lowest = int(np.nanargmin(np.where(np.isnan(data["gap"]), np.inf, data["gap"])))
    one = _each(data.isel(writer=[lowest]))[0]
    level, q = number(float(one["median"])), float(one["q"])
    among = "" if np.isnan(q) else f" (q {q:.2f})"
    return (
        f"None of {of} ends out of the ordinary. The lowest beside ordinary writes is {one['writer']}: "
        f"{between(one, 'end', '')} of it survives, of such writes {level}{among}."
    )


def _named(data: xr.Dataset, chosen: list[int]) -> str:
    said = []
    for one in _each(data.isel(writer=chosen[:_NAMED])):
        end, level = between(one, "end", ""), number(float(one["median"]))
        said.append(f"{one['writer']}: {end} survives, of ordinary writes there {level}")
    more = len(chosen) - _NAMED
    return "; ".join(said) + (f"; and {more} more" if more > 0 else "")


def _rest(count: Counter[str], documents: int, hangs: int) -> str:
    undecided, others = count["undecided"], count["like others"]
    if documents < 5:
        return f"All are undecided: {counted(documents, 'document')} give no interval worth the name, five would."
    ends = "ends" if others == 1 else "end"
    of_these = f", {hangs} of them since their word hangs on three channels" if hangs else ""
    return f"{counted(others, 'writer')} {ends} like others, {undecided} are undecided{of_these}."


def _sound(data: xr.Dataset) -> str:
    sinks, rows = int(data.attrs["sinks"]), int(data.attrs["rows"])
    return (
        f"Channels are weighed by {data.attrs['weigh']}; {rows:,} rows, of which {sinks} "
        f"{'is a sink' if sinks == 1 else 'are sinks'}."
    )
