"""What does the page know of every writer? A row of a table, a word to find it by, and the numbers that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from unwrite.report import audited, believed, scanned, survived
from unwrite.report.columns import Column, Table, table
from unwrite.report.scanned import texts
from unwrite.result import Result

# So many nodes that act on a writer are drawn, and none that would be said to do 0.00.
_ACTORS, _NOTHING = 8, 0.005
# Ratios beyond this were counted at the border, and are drawn there.
_BORDER = 100.0
_SIZE = "‖w‖/‖x‖"
NOT_TAKEN, SMALL = "not taken out", "small"


@dataclass(frozen=True)
class Writers:
    """A table with a row for each writer, what is out of the ordinary first, and of each a word that it is found by."""

    table: Table
    kinds: tuple[str, ...]

    @property
    def by_name(self) -> dict[str, str]:
        """What was found of each writer."""
        return {row[0]: kind for row, kind in zip(self.table.rows, self.kinds, strict=True)}

    @property
    def counts(self) -> list[tuple[str, int]]:
        """Every word, and of how many writers it is said, in the order of the table."""
        return [(kind, self.kinds.count(kind)) for kind in dict.fromkeys(self.kinds)]


def found(result: Result) -> Writers:
    """All of them: of an audit what survives of each, of a scan how its level changes."""
    return _survived(result) if result.method == "audit" else _scanned(result)


def _survived(result: Result) -> Writers:
    left, first = audited.removed(result), next(texts(result))[1]
    sizes = _sizes(first)
    size = Column(_SIZE, f"median of {first['relative_norm'].attrs.get('equation', '')}")
    header = (survived.HEADER[0], size, *survived.HEADER[1:])
    rows = [(name, sizes[name], *cells) for name, *cells in survived.rows(left)]
    kinds = [row[-2] for row in rows]
    known = {row[0] for row in rows}
    material, small = scanned.rows(first)
    against = {row.writer: row.against for row in material}
    rest = [name for name in (*against, *small) if name not in known]
    dashes = ("–",) * (len(header) - 4)
    rows += [(name, sizes[name], *dashes, NOT_TAKEN, against.get(name, "–")) for name in rest]
    made = table("", header, rows, left, _notes(first, rows), most=len(rows))
    return Writers(made, (*kinds, *[NOT_TAKEN] * len(rest)))


def _scanned(result: Result) -> Writers:
    """By the first text; of each other one, how the level changes there."""
    (_, first, _), *others = texts(result)
    material, small = scanned.rows(first)
    sizes = _sizes(first)
    rows = [row.cells for row in material]
    rows += [(name, sizes[name], "–", "–", "–", SMALL, "–") for name in small]
    kinds = [row.says.partition(" ")[0] for row in material] + [SMALL] * len(small)
    header = list(scanned.HEADER)
    for name, data, _ in others:
        header.append(Column(f"reading on {name}", holds="word"))
        says = dict(zip(map(str, data["writer"].values), map(str, data["in_words"].values), strict=True))
        rows = [(*row, says[row[0]]) for row in rows]
    made = table("", header, rows, first, _notes(first, rows), most=len(rows))
    return Writers(made, tuple(kinds))


def _sizes(data: xr.Dataset) -> dict[str, str]:
    values = data["relative_norm"].sel(quantile=0.5).values
    return {str(name): survived.number(float(v)) for name, v in zip(data["writer"].values, values, strict=True)}


def _notes(data: xr.Dataset, rows: list[tuple[str, ...]]) -> list[str]:
    counted = dict(zip(map(str, data["writer"].values), data["n_positions"].values.tolist(), strict=True))
    clusters = int(data["n_clusters"])
    return [f"{counted[row[0]]:,} positions of {clusters} independent prompts" for row in rows]


def drawn(result: Result) -> dict[str, Any]:
    """What the page's script draws, in hundredths: of every writer its numbers, under the names of what there is."""
    data = next(texts(result))[1]
    asked = result.data if "direct" in result.data and "total" in result.data else None
    of: dict[str, dict[str, Any]] = {str(name): {} for name in data["node"].values}
    left = audited.removed(result) if "removed" in result.data.dims else None
    where = _largest(data) if "largest_norm" in data else ()  # which results of older versions have not
    looks = _looks(data) if "attended_text" in data else ()
    for part in (_levels(data), _shares(data), where, looks, _kept(left) if left is not None else (), _given(asked)):
        for name, numbers in part:
            of[name] |= numbers
    return {
        "places": [str(place) for place in data["location"].values],
        "nodes": list(of),
        "controls": [] if left is None else list(map(str, left["control"].values)),
        "readings": [] if asked is None else [*believed.READINGS, "total"],
        "prompts": [] if asked is None else believed.titles(asked),
        "writers": of,
    }


_Numbers = Iterator[tuple[str, dict[str, Any]]]


def _levels(data: xr.Dataset) -> _Numbers:
    """The level along each write from the state right after it: quartiles over positions."""
    places = {str(place): i for i, place in enumerate(data["location"].values)}
    level = hundredths(data["level"].sel(quantile=[0.25, 0.5, 0.75]).transpose("writer", "quantile", "location").values)
    for name, after, one in zip(data["writer"].values, data["right_after"].values, level, strict=True):
        begin = places.get(str(after), 0)
        yield str(name), {"from": begin, "level": _about([row[begin:] for row in one])}


def _shares(data: xr.Dataset) -> _Numbers:
    """Who writes against it, by the energy-weighted share and two standard errors."""
    parts = [data[name].transpose("writer", "node").values for name in ("share", "share_se", "eraser")]
    for name, share, error, against in zip(data["writer"].values, *parts, strict=True):
        order = np.array([i for i in np.argsort(share, kind="stable") if against[i]], dtype=int)
        yield str(name), {"acts": _actors(order, share, share - 2 * error, share + 2 * error), "caused": False}


def _largest(data: xr.Dataset) -> _Numbers:
    """Where in the text each write is largest: how many times its median norm, and the token with some before it."""
    axes = ("writer", "largest")
    norms, says = (data[f"largest_{name}"].transpose(*axes).values for name in ("norm", "text"))
    medians = data["norm"].sel(quantile=0.5).values
    with np.errstate(divide="ignore", invalid="ignore"):
        times = hundredths(norms / medians[:, None], _BORDER**2)
    for name, one, texts_ in zip(data["writer"].values, times, says, strict=True):
        yield str(name), {"where": [[size, str(text)] for size, text in zip(one, texts_, strict=True) if text]}


def _looks(data: xr.Dataset) -> _Numbers:
    """From which tokens heads bring most at one of these places, and which share of it."""
    axes = ("writer", "attended")
    names, texts_ = (data[name].values for name in ("writer", "attended_text"))
    tokens, shares = (data[f"attended_{name}"].transpose(*axes).values for name in ("token", "share"))
    for name, text, words, share in zip(names, texts_, tokens, hundredths(shares), strict=True):
        if text:
            met = [[str(word), part] for word, part in zip(words, share, strict=True) if part]
            yield str(name), {"looks": [str(text), met]}


def _kept(left: xr.Dataset) -> _Numbers:
    """What survives of each write with its interval, what does of ordinary ones, and who acts on it."""
    ends = ("_low", "", "_high")
    places = np.stack([left[f"survival{end}"].isel(weigh=0).transpose("writer", "location").values for end in ends], 1)
    kept, ordinary = hundredths(places), hundredths(left["ordinary"].transpose("writer", "control", "bound").values)
    acts = [left[f"acts{end}"].transpose("writer", "node").values for end in ("", "_low", "_high")]
    for i, name in enumerate(left["writer"].values):
        begin = int(np.isfinite(places[i, 1]).argmax())
        size = np.abs(np.nan_to_num(acts[0][i]))
        order = np.argsort(-size, kind="stable")[: np.count_nonzero(size)]
        yield (
            str(name),
            {
                "begin": begin,
                "kept": _about([row[begin:] for row in kept[i]]),
                "ordinary": ordinary[i],
                "acts": _actors(order, *(part[i] for part in acts)),
                "caused": True,
            },
        )


def _actors(order: np.ndarray, *value_and_ends: np.ndarray) -> dict[str, Any]:
    """The first nodes by their indices, with their numbers and intervals; of the others how many, and their sum."""
    value = value_and_ends[0]
    first = [k for k in order[:_ACTORS] if abs(value[k]) >= _NOTHING]
    rest = value[order[len(first) :]]
    rows = np.stack([part[first] for part in value_and_ends], -1)
    return {
        "nodes": list(map(int, first)),
        "rows": hundredths(rows),
        "more": len(rest),
        "sum": hundredths([np.sum(rest)])[0],
    }


def _given(data: xr.Dataset | None) -> _Numbers:
    """What each node is credited with on every prompt by each reading, and what happened without it, in logits."""
    if data is None:
        return
    cells = np.stack([data[name].transpose("node", "prompt").values for name in (*believed.READINGS, "total")], 1)
    for name, one in zip(data["node"].values, hundredths(cells, _BORDER**2), strict=True):
        yield str(name), {"given": one}


def _about(band: list[list[Any]]) -> list[list[Any]]:
    """Low, middle and high by their steps, the ends as how far they are from the middle, which takes fewer digits."""
    low, middle, high = band
    below = [None if a is None or m is None else m - a for a, m in zip(low, middle, strict=True)]
    above = [None if b is None or m is None else b - m for b, m in zip(high, middle, strict=True)]
    return [_steps(row) for row in (below, middle, above)]


def _steps(row: list[Any]) -> list[Any]:
    """By how much each is more than the last that is there, which takes fewer digits still."""
    last, found = 0, []
    for value in row:
        found.append(None if value is None else value - last)
        last = last if value is None else value
    return found


def hundredths(values: Any, border: float = _BORDER) -> Any:
    """Numbers with two digits, times a hundred; what is beyond the border is at it, and NaN is None."""
    whole = np.rint(100 * np.clip(np.asarray(values, dtype=float), -border, border))
    integers = np.array(np.nan_to_num(whole), dtype=int).astype(object)
    integers[np.isnan(whole)] = None
    return integers.tolist()
