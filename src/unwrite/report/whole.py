"""What is the picture of the whole model? A cell for every node, where it stands, and the numbers to colour it by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from unwrite.nodes import KINDS, PROJECTED, Node, parse_node
from unwrite.report import survived
from unwrite.report.scanned import texts
from unwrite.result import Result

# Colours to either side of none at all.
STEPS = 10
# What a picture can show, foremost first: in words, the variable, and the number that has the full colour; without one
# that is nearly the largest there is.
_ASKED = (
    ("survival", "removed_end", 1.0),
    ("gap to ordinary writes", "removed_gap", 1.0),
    ("norm, ‖w‖/‖x‖", "relative_norm", None),
    ("level at the end", "level_share", 1.0),
    ("change of the level", "change_share", 1.0),
    ("erased by later nodes", "removed_erased_by", 1.0),
    ("filled in by later nodes", "removed_filled_in_by", 1.0),
    ("direct", "direct", None),
    ("net", "net", None),
    ("relp", "relp", None),
    ("gradient", "gradient", None),
    ("total, executed", "total", None),
    ("concentration: energy in three channels", "removed_energy_top3", 1.0),
    ("channels that hold the energy", "removed_participation", None),
)
_NODES = ("removed", "writer", "node")
_NEARLY = 0.98
# Of more columns the numbers are not written into the cells.
WIDE = 14


@dataclass(frozen=True)
class Measure:
    """Numbers to colour the picture by, one for every node, NaN where it was not measured; `limit` has full colour."""

    name: str
    says: str
    limit: float
    values: tuple[float, ...]

    @property
    def short(self) -> list[float | None]:
        """The numbers to three digits, None where there is none: as JSON has them."""
        return [float(f"{value:.3g}") if value == value else None for value in self.values]

    def step(self, i: int) -> str:
        """The colour of a node."""
        return step(self.values[i], self.limit)


@dataclass(frozen=True)
class Cell:
    """One node in the picture: its index, name, and what was found of it, which is a word of `kinds`."""

    index: int
    name: str
    kind: str


@dataclass(frozen=True)
class Whole:
    """Rows of cells in the order of the stream, each with its name; None where a layer has no such node."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    measures: tuple[Measure, ...]

    @property
    def wide(self) -> bool:
        """Are there more columns than numbers have room?"""
        return len(self.columns) > WIDE


def whole(result: Result, kinds: Mapping[str, str]) -> Whole:
    """The picture of a scan or an audit; `kinds` says in a word what was found of each node."""
    names = [str(name) for name in result.data["node"].values]
    nodes = [parse_node(name) for name in names]
    slots = _slots(nodes)
    rows: dict[str, list[Cell | None]] = {}
    for i, (name, node) in enumerate(zip(names, nodes, strict=True)):
        alone = node.layer < 0
        cells = rows.setdefault(name if alone else str(node.layer), [None] * len(slots))
        cells[0 if alone else slots[_slot(node)]] = Cell(i, name, kinds.get(name, ""))
    named = tuple((name, tuple(cells)) for name, cells in rows.items())
    columns = tuple(_label(nodes, *slot, bare=len(slots) > WIDE) for slot in slots)
    return Whole(columns, named, tuple(_measures(result, names)))


def _slot(node: Node) -> tuple[str, int]:
    """Heads and mixers stand in the same columns: no layer has both."""
    return ("head" if node.kind in PROJECTED else node.kind, node.head)


def _slots(nodes: list[Node]) -> dict[tuple[str, int], int]:
    order = list(KINDS)
    found = {_slot(node) for node in nodes if node.layer >= 0} or {("head", 0)}
    # Heads first, then what else a layer has, in the order in which it writes.
    ranked = sorted(found, key=lambda slot: (slot[0] != "head", order.index(slot[0]), slot[1]))
    return {slot: column for column, slot in enumerate(ranked)}


def _label(nodes: list[Node], kind: str, head: int, bare: bool) -> str:
    """A node's name without its layer; of a head the number alone where there is no room, or mixers beside."""
    kinds = {node.kind for node in nodes if node.kind in PROJECTED} if kind == "head" else {kind}
    if kind == "head" and (bare or len(kinds) > 1):
        return str(head)
    return KINDS[next(iter(kinds), "head")].printed.replace("L{layer}", "").format(layer="", head=head).strip(".")


def _measures(result: Result, names: list[str]) -> Iterator[Measure]:
    for words, variable, limit in _ASKED:
        if variable not in result.data:
            continue
        if "text" in result.data[variable].dims:
            for text, data, _ in texts(result):
                yield _measure(f"{words}, {text}", data[variable], limit, names)
        else:
            yield _measure(words, result.data[variable], limit, names)


def _measure(words: str, part: xr.DataArray, limit: float | None, names: list[str]) -> Measure:
    """One number a node: of quantiles the median, of states the last, of prompts the mean, of other axes the first."""
    said = str(part.attrs.get("equation", ""))
    if "prompt" in part.dims:
        said, words = f"mean over prompts of {said}", f"{words}, mean of {part.sizes['prompt']} prompts"
        part = part.mean("prompt")
    if "quantile" in part.dims:
        said, part = f"median of {said}", part.sel(quantile=0.5)
    if "location" in part.dims:
        said, part = f"{said}, at the end of the stream", part.isel(location=-1)
    part = part.isel({axis: 0 for axis in ("weigh", "cut") if axis in part.dims})
    (axis,) = set(part.dims) & set(_NODES)
    known = dict(zip(map(str, part[axis].values), part.values.tolist(), strict=True))
    values = tuple(float(np.clip(known.get(name, np.nan), -1e6, 1e6)) for name in names)
    return Measure(words, said, _limit(values) if limit is None else limit, values)


def _limit(values: tuple[float, ...]) -> float:
    finite = np.abs([value for value in values if value == value])
    return float(np.quantile(finite, _NEARLY)) or 1.0 if finite.size else 1.0


def step(value: float, limit: float) -> str:
    """A colour of the scale: so many steps down or up, all of them at the limit; "none" where there is no number."""
    if not np.isfinite(value):
        return "none"
    steps = round(STEPS * max(-1.0, min(1.0, value / limit)))
    return f"{'d' if steps < 0 else 'u'}{abs(steps)}"


def special(kind: str) -> bool:
    """Is this a word for what is out of the ordinary?"""
    return kind in survived.SPECIAL
