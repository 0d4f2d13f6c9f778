"""What does the page know of every writer? A row of a table, a word to find it by, and the numbers that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import plain
from unwrite.report import audited, believed, scanned, survived
from unwrite.report.columns import Column, Table, table
from unwrite.report.scanned import texts
from unwrite.result import Result

# Of a writer so many nodes that act on it are drawn, and so many prompts are told.
_ACTORS, _PROMPTS = 8, 8
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
    """What the page's script draws: states of the stream, nodes and prompts by name, and of every writer its numbers."""
    data = next(texts(result))[1]
    asked = result.data if "direct" in result.data and "total" in result.data else None
    of: dict[str, dict[str, Any]] = {str(name): {} for name in data["node"].values}
    for name, numbers in (*_levels(data), *_shares(data)):
        of[name] |= numbers
    for name, numbers in _kept(audited.removed(result)) if "removed" in result.data.dims else ():
        of[name] |= numbers
    for name, numbers in _given(asked) if asked is not None else ():
        of[name] |= numbers
    return {
        "places": [str(place) for place in data["location"].values],
        "nodes": list(of),
        "readings": [*believed.READINGS, "total"] if asked is not None else [],
        "prompts": [plain(title) for title in believed.titles(asked)] if asked is not None else [],
        "writers": of,
    }


_Numbers = Iterator[tuple[str, dict[str, Any]]]


def _levels(data: xr.Dataset) -> _Numbers:
    """The level along each write from the state right after it: the quarter, the median and three quarters of positions."""
    places = {str(place): i for i, place in enumerate(data["location"].values)}
    level = data["level"].sel(quantile=[0.25, 0.5, 0.75]).transpose("writer", "quantile", "location").values
    for name, after, one in zip(data["writer"].values, data["right_after"].values, level, strict=True):
        begin = places.get(str(after), 0)
        yield str(name), {"from": begin, "level": short(one[:, begin:])}


def _shares(data: xr.Dataset) -> _Numbers:
    """Who writes against it, by the energy-weighted share and two standard errors."""
    nodes = list(data["node"].values)
    parts = [data[name].transpose("writer", "node").values for name in ("share", "share_se", "eraser")]
    for name, share, error, against in zip(data["writer"].values, *parts, strict=True):
        order = [i for i in np.argsort(share, kind="stable") if against[i]]
        rows = [(share[i], share[i] - 2 * error[i], share[i] + 2 * error[i]) for i in order[:_ACTORS]]
        rest = share[order[_ACTORS:]]
        yield (
            str(name),
            {"against": {"nodes": [nodes[i] for i in order[:_ACTORS]], "rows": short(rows), "more": _more(rest)}},
        )


def _kept(left: xr.Dataset) -> _Numbers:
    """What survives of each write with its interval, what does of ordinary ones, and who acts on it."""
    names = [f"survival{end}" for end in ("_low", "", "_high")]
    kept = np.stack([left[name].isel(weigh=0).transpose("writer", "location").values for name in names], 1)
    ordinary = left["ordinary"].transpose("writer", "control", "bound").values
    acts = np.stack([left[f"acts{end}"].transpose("writer", "node").values for end in ("", "_low", "_high")], -1)
    nodes = [str(node) for node in left["node"].values]
    for i, name in enumerate(left["writer"].values):
        begin = int(np.isfinite(kept[i, 1]).argmax())
        order = np.argsort(-np.abs(np.nan_to_num(acts[i, :, 0])), kind="stable")
        own = [k for k in order if acts[i, k, 0] == acts[i, k, 0] and acts[i, k, 0] != 0]
        yield (
            str(name),
            {
                "kept": {"from": begin, "rows": short(kept[i, :, begin:])},
                "ordinary": dict(zip(map(str, left["control"].values), short(ordinary[i]), strict=True)),
                "acts": {
                    "nodes": [nodes[k] for k in own[:_ACTORS]],
                    "rows": short(acts[i, own[:_ACTORS]]),
                    "more": _more(acts[i, own[_ACTORS:], 0]),
                },
            },
        )


def _given(data: xr.Dataset) -> _Numbers:
    """What each node is credited with on every prompt by each reading, and what happened without it, in logits."""
    cells = np.stack([data[name].transpose("node", "prompt").values for name in (*believed.READINGS, "total")], 1)
    for name, one in zip(data["node"].values, cells, strict=True):
        yield str(name), {"given": short(one, _BORDER**2)}


def _more(values: np.ndarray) -> list[float]:
    return [len(values), *short([np.nansum(values)])]


def short(values: Any, border: float = _BORDER) -> Any:
    """Numbers to three digits, those beyond the border at it, and nothing where there is none: as JSON has them."""
    if isinstance(values, np.ndarray) and values.ndim > 1 or isinstance(values, list) and np.ndim(values) > 1:
        return [short(part, border) for part in values]
    return [
        None if value != value else float(f"{min(max(value, -border), border):.3g}")
        for value in np.asarray(values, dtype=float).tolist()
    ]
