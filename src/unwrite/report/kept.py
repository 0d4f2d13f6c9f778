"""What does a circuit keep, and what do two results share? Lines for a terminal, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, Line, Listing, digits, spanned
from unwrite.result import Result

# Sizes that a table has room for.
_SIZES = 8
_INSIDE = (Column("score", "{score}"), Column("lost without it [95 %]", "{minimality}"))
# Of what a variable holds, where a result has it; the first ones always.
_BESIDE = {
    "node": Column("node", holds="word"),
    "chosen_by": Column("chosen by", holds="word"),
    "direct": Column("direct", "{direct}"),
    "net": Column("net", "{net}"),
    "total": Column("total [95 %]", "{total}"),
    "executed": Column("executed [95 %]", "{executed}"),
    "word": Column("is", "{word}", holds="word"),
    "looks": Column("looks at", "{looks}", holds="word"),
    "part": Column("part", "{part}", holds="word"),
    "category": Column("writes for", "{category}", holds="word"),
    "survival": Column("left at the end", "{survival}"),
    "verdict": Column("verdict", holds="word"),
}
SHARED = (
    Column("top", holds="word"),
    Column("stage", holds="word"),
    Column("shared", "{shared}"),
    Column("Jaccard", "{jaccard}"),
    Column("by chance", "{expected}"),
    Column("p", "{p}"),
    Column("its own halves: A, B", "{ceiling_a}; {ceiling_b}"),
    Column("both", "{both}", holds="words", least=24),
)


def unit_of(data: xr.Dataset) -> str:
    """What a circuit is made of."""
    return "edges" if "sender" in data.dims else "nodes"


def sentence(result: Result) -> str:
    """How few nodes are enough, what as many by chance keep, what decides alone."""
    data, settings = result.data, result.provenance["settings"]
    one = data.isel(order=0, by=0)
    name = str(data.attrs["chosen_order"])
    kept = _kept(one, settings["enough"], int(data.attrs["of"]))
    area = f"area {_spanned(one, 'area')}" if np.isfinite(one["area"]) else ""
    chance = f"random orders {float(data['random_area'].mean()):.2f}" if "random_area" in data and area else ""
    clusters = f"{data.attrs['clusters']} independent templates or pairs"
    beside = ", ".join(filter(None, [area, chance, clusters]))
    words = f"Of {settings['metric']}, the order {name} {kept} ({beside})."
    notes = f" {data.attrs['notes'][0].upper()}{data.attrs['notes'][1:]}." if data.attrs["notes"] else ""
    return f"{words}{notes} {data.attrs['solves']}"


def _kept(one: xr.Dataset, enough: float, cells: int) -> str:
    unit = unit_of(one)
    if np.isfinite(one["smallest"]):
        return f"keeps {enough:.0%} with {int(one['smallest'])} of {cells} {unit}"
    f = one["faithfulness"].values
    last = int(np.flatnonzero(np.isfinite(f))[-1])
    return f"keeps {f[last]:.0%} with all {int(one['size'][last])} {unit} that it has"


def curves(result: Result) -> Iterator[Line | Listing]:
    """Every order by each sign, its curve, and the circuit that was looked into."""
    data = result.data
    unit = unit_of(data)
    shown = [size for size in data["size"].values.tolist() if size > 0][:_SIZES]
    header = (
        Column("order", holds="word"), Column(f"{unit} enough", "{smallest}"), Column("area [95 %]", "{area}"),
        Column("distance", "{distance}"), *(Column(f"{size} {unit}", "{faithfulness}") for size in shown),
    )  # fmt: skip
    yield Listing("what is kept of the metric", header, list(_orders(data, shown)), data, None)
    columns = (Column(unit[:-1], holds="word"), *_INSIDE[: 1 + ("minimality" in data)])
    yield Listing(f"the circuit: {data.attrs['chosen_order']}", columns, list(_inside(data)), data)
    yield Line(f"{data.attrs['clusters']} independent templates or pairs; {int(data.attrs['cost']):,} runs", "dim")


def _orders(data: xr.Dataset, shown: list[int]) -> Iterator[tuple[str, ...]]:
    for order in data["order"].values:
        for by in data["by"].values:
            one = data.sel(order=order, by=by)
            smallest = f"{int(one['smallest'])}" if np.isfinite(one["smallest"]) else "none"
            curve = [digits(float(one["faithfulness"].sel(size=size))) for size in shown]
            yield (f"{order} {by}", smallest, _spanned(one, "area"), digits(float(one["distance"])), *curve)
    for draw in range(data.sizes["draw"] if "random" in data else 0):
        one = data.isel(draw=draw)
        curve = [digits(float(one["random"].sel(size=size))) for size in shown]
        yield (f"random {draw}", "", digits(float(one["random_area"])), "", *curve)


def _inside(data: xr.Dataset) -> Iterator[tuple[str, ...]]:
    """The nodes or edges of the circuit, the first ones first."""
    one = data.isel(order=0, by=0)
    rank = one["rank"].transpose(*(axis for axis in ("node", "role", "sender", "receiver") if axis in one["rank"].dims))
    joint = " at " if "node" in rank.dims else " → "
    places = np.argwhere(rank.values < data.attrs["chosen_size"])
    for at in sorted(map(tuple, places.tolist()), key=lambda at: rank.values[at]):
        cell = one.isel(dict(zip(rank.dims, at, strict=True)))
        words = joint.join(str(cell[axis].item()) for axis in rank.dims), f"{float(cell['score']):+.3f}"
        if "minimality" in data:
            words += (_spanned(cell, "minimality", 3, "+"),)
        yield words


def _spanned(one: xr.Dataset, name: str, n: int = 2, sign: str = "") -> str:
    return spanned(*(float(one[f"{name}{end}"]) for end in ("", "_low", "_high")), n=n, sign=sign)


def shared(result: Result) -> list[tuple[str, ...]]:
    """One line for each part and stage."""
    lines = []
    for top in range(result.data.sizes["top"]):
        for stage in range(result.data.sizes["stage"]):
            one = result.data.isel(top=top, stage=stage)
            part = float(one["top"])
            ceilings = ", ".join(digits(float(one[f"ceiling_{side}"])) for side in "ab")
            named = ("" if np.isnan(part) else f"{part:.3g}", str(one["stage"].item()))
            counts = (
                f"{int(one['shared'])} of {int(one['union'])}",
                digits(float(one["jaccard"])),
                digits(float(one["expected"])),
            )
            lines.append((*named, *counts, f"{float(one['p']):.2g}", ceilings, str(one["both"].item()) or "none"))
    return lines


def sharing(result: Result) -> str:
    """What is shared at the first part, beside chance and the ceilings."""
    one = result.data.isel(top=0, stage=-1)
    low = np.nanmin([float(one["ceiling_a"]), float(one["ceiling_b"]), np.inf])
    most = f", halves of their own pairs {low:.2f}" if np.isfinite(low) else ""
    stages = result.data.sizes["stage"]
    over = f" over {stages - 1} stages" if stages > 1 else ""
    tests = result.data.sizes["top"] * stages
    return (
        f"They share {int(one['shared'])} of {int(one['union'])} nodes{over}: Jaccard {float(one['jaccard']):.2f}, by "
        f"chance {float(one['expected']):.2f} (p {float(one['p']):.2g}, one of {tests}){most}."
    )


def listed(result: Result) -> str:
    """The nodes of a circuit."""
    nodes = ", ".join(map(str, result.data["node"].values[:24]))
    more = result.data.sizes["node"] - 24
    return f"{result.data.sizes['node']} nodes: {nodes}{f' and {more} more' if more > 0 else ''}"


def beside(result: Result) -> Iterator[Listing]:
    """One line for each node: readings, what was executed, what it is for, what survives of its write."""
    data = result.data
    names = [name for name in _BESIDE if name in data or name == "node"]
    rows = [tuple(_cell(data.isel(node=i), name) for name in names) for i in range(data.sizes["node"])]
    yield Listing("", tuple(_BESIDE[name] for name in names), rows, data)


def _cell(one: xr.Dataset, name: str) -> str:
    value = one[name].item()
    if isinstance(value, str):
        return value
    if name == "survival":
        return _spanned(one, name)
    return _spanned(one, name, sign="+") if f"{name}_low" in one else digits(value, sign="+")


def opposing(result: Result) -> str:
    """Who works against the answer, what heads are for, what the nodes do that direct alone would have chosen."""
    data = result.data
    output = _output(data)
    word, alone = data["word"].values, data["chosen_by"].values == "direct alone"
    against = ", ".join(map(str, data["node"].values[(word == "opponent") & ~alone])) or "none"
    help_, own = (int((word[some] == "helps").sum()) for some in (alone, ~alone))
    return (
        f"{output}Of {int((~alone).sum())} nodes {own} help, opponents: {against}.{_parts(data)} "
        f"Direct attribution alone would have chosen {int(alone.sum())} others, of which {help_} help when executed "
        f"({data.attrs['of']}, {data.sizes['node']} intervals)."
    )


def _output(data: xr.Dataset) -> str:
    """Which nodes write most to the answers, where they were looked for."""
    if "output" not in data.attrs:
        return ""
    low, high = (data.attrs[f"recovered_{end}"] for end in ("low", "high"))
    recovered = spanned(float(data.attrs["recovered"]), low, high)
    return (
        f"Output nodes: {data.attrs['output']}, with {data.attrs['explains']:.0%} of what heads and MLPs write to the "
        f"answers; their direct edges alone keep {recovered} of the loss over the choices. {data.attrs['solves']} "
    )


def _parts(data: xr.Dataset) -> str:
    """Heads by what they are for, where somebody asked."""
    if "part" not in data:
        return ""
    by: dict[str, list[str]] = {}
    for node, part in zip(data["node"].values, data["part"].values, strict=True):
        by.setdefault(str(part), []).append(str(node))
    by.pop("", None)
    words = "; ".join(f"{part}: {', '.join(nodes)}" for part, nodes in by.items()) or "no head is known to have one"
    return f" By what they attend to and write: {words}."
