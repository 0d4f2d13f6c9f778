"""Who read a write, who erased it, who used its space? Words and lines for a terminal, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, Line, Listing, spanned
from unwrite.result import Result

_NAMED, _HALF = 3, 0.5
# Lines of a table that stand for all of them.
_FIRST = range(10)
READ = (
    Column("reader", holds="word"),
    Column("what it writes changes by", "{wrote}, with {wrote_low}"),
    Column("typical writes", "{typical_wrote}"),
    Column("q", "{read_q}"),
    Column("itself", "{read}"),
    Column("pattern", "{turned}"),
    Column("of the write is there", "{left}"),
    Column("of its erasure is done", "{gone}"),
)
ERASED = (Column("node", holds="word"), Column("acts on it", "{acts}, with {acts_low}"))
USED = (
    Column("node", holds="word"),
    Column("in the space", "{use}"),
    Column("because it was freed", "{freed}, with {freed_low}"),
    Column("a typical write", "{freed_typical}"),
    Column("other spaces", "{freed_elsewhere}"),
)
EDGES = (Column("reader", holds="word"), Column("direct edge", "{effect}, with {effect_low}"))


def parts(result: Result) -> Iterator[Line | Listing]:
    """The steps, one table each."""
    data = result.data
    yield Listing("who reads it", READ, [_reader(data, *at) for at in _readers(data)], data, _FIRST)
    yield Listing("who acts on it", ERASED, [_actor(data, i) for i in _most(data["acts"])], data, _FIRST)
    if "freed" in data:
        yield Listing("who writes into its space", USED, [_user(data, i) for i in _most(data["freed"])], data, _FIRST)
    if "effect" in data:
        yield Line(_total(data), "dim")
        yield Listing(
            "what each reader does with it", EDGES, [_edge(data, i) for i in _most(data["effect"])], data, _FIRST
        )


def sentence(result: Result) -> str:
    """The three steps of one write, effect and interval first, and what could not be shown."""
    return told(result.data)


def told(data: xr.Dataset) -> str:
    """The same of what is no result yet."""
    steps = [_read(data), _erased(data), _reused(data)]
    where = f"{data.attrs['writer']}, {data.attrs['documents']} documents: "
    return where + "; ".join(steps) + "."


def _read(data: xr.Dataset) -> str:
    surely = [at for at in _readers(data) if bool(data["reads"].values[at])]
    if not surely:
        return f"of {data.attrs['asked']} readers none reads it surely more than typical writes"
    named = ", ".join(f"{_name(data, *at)} {_interval(data, 'wrote', at)}" for at in surely[:_NAMED])
    more = f" and {len(surely) - _NAMED} more" if len(surely) > _NAMED else ""
    gone = np.array([float(data["gone"].values[node]) for node, _ in surely])
    early = int((gone < _HALF).sum())
    before = f"; {early} of {len(surely)} before half of its erasure" if np.isfinite(gone).all() else ""
    return f"read by {named}{more} (of {data.attrs['asked']} asked; part of what they write that changes){before}"


def _erased(data: xr.Dataset) -> str:
    left = f"{spanned(*(float(data[f'end{end}']) for end in ('', '_low', '_high')))} of it is left"
    by = [i for i in _most(data["acts"]) if bool(data["erases"].values[i])][:_NAMED]
    named = ", ".join(f"{data['node'].values[i]} {_interval(data, 'acts', i)}" for i in by)
    return f"{left} ({data.attrs['verdict']})" + (f", against it {named}" if named else ", nobody surely against it")


def _reused(data: xr.Dataset) -> str:
    if "freed" not in data:
        return f"its space: {data.attrs['reused']}"
    by = [i for i in _most(data["freed"]) if bool(data["reuses"].values[i])][:_NAMED]
    if not by:
        return "nobody surely uses its space because it was freed"
    return "space used again by " + ", ".join(f"{data['node'].values[i]} {_interval(data, 'freed', i)}" for i in by)


def _readers(data: xr.Dataset) -> list[tuple[int, int]]:
    """Those that were asked, the surest first, and then the most changed."""
    wrote, surely = data["wrote"].values, data["reads"].values
    asked = np.argwhere(np.isfinite(wrote))
    order = np.lexsort((-wrote[tuple(asked.T)], ~surely[tuple(asked.T)]))
    return [(int(node), int(way)) for node, way in asked[order]]


def _most(part: xr.DataArray) -> list[int]:
    values = np.nan_to_num(part.values)
    return [int(i) for i in np.argsort(-np.abs(values), kind="stable") if values[i] != 0]


def _name(data: xr.Dataset, node: int, way: int) -> str:
    name, through = str(data["node"].values[node]), str(data["way"].values[way])
    return name if through == "all" else f"{name}.{through}"


def _interval(data: xr.Dataset, name: str, at: tuple[int, ...] | int) -> str:
    return spanned(*(float(data[f"{name}{end}"].values[at]) for end in ("", "_low", "_high")))


def _reader(data: xr.Dataset, node: int, way: int) -> tuple[str, ...]:
    at = node, way
    typical, q, itself, turned = (
        float(data[name].values[at]) for name in ("typical_wrote", "read_q", "read", "turned")
    )
    left, pattern = float(data["left"].values[node]), "" if np.isnan(turned) else f"{turned:.2f}"
    numbers = _interval(data, "wrote", at), f"{typical:.2f}", f"{q:.2f}", f"{itself:.2f}", pattern, f"{left:.2f}"
    gone = float(data["gone"].values[node])
    return _name(data, node, way), *numbers, "" if np.isnan(gone) else f"{gone:.2f}"


def _actor(data: xr.Dataset, i: int) -> tuple[str, ...]:
    return str(data["node"].values[i]), _interval(data, "acts", i)


def _user(data: xr.Dataset, i: int) -> tuple[str, ...]:
    use, typical, others = (float(data[name].values[i]) for name in ("use", "freed_typical", "freed_elsewhere"))
    return str(data["node"].values[i]), f"{use:.2f}", _interval(data, "freed", i), f"{typical:.3f}", f"{others:.3f}"


def _edge(data: xr.Dataset, i: int) -> tuple[str, ...]:
    return str(data["reader"].values[i]), _interval(data, "effect", i)


def _total(data: xr.Dataset) -> str:
    named = {"total": "in all", "through": "through its readers", "rest": "not through one of them"}
    each = (f"{text} {_interval(data, name, ())}" for name, text in named.items())
    return "effect of the write: " + ", ".join(each)
