"""How does what is kept grow with a circuit, where do its nodes lie, what is repaired? Charts, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from unwrite.errors import ResultError
from unwrite.nodes import parse_site
from unwrite.report.kept import unit_of
from unwrite.report.maps import framed
from unwrite.report.paper import COLOURS, GREY, SAYS, harmless
from unwrite.report.repaired import share_of
from unwrite.result import Result

_SERIES = (COLOURS["level"], COLOURS["survival"], COLOURS["hidden from values"], COLOURS["total"], "#a6761d", "#666666")


def curve(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """Faithfulness over how many nodes are kept: an order by size as a line, by sign dashed, random draws in grey.

    Raises ResultError for a result without such curves.
    """
    data = result.data
    if "faithfulness" not in data or writer is not None:
        raise ResultError(f"this {result.method} has no such curve", expected="a result of uw.circuit, and no writer")
    names, unit = [harmless(name) for name in data["order"].values], unit_of(data)
    lines = list(_points(data))
    x = alt.X("size:Q", title=f"{unit} kept", scale=alt.Scale(type="symlog", constant=5))
    y = alt.Y("f:Q", title="faithfulness")
    colour = alt.Color(
        "order:N",
        title=None,
        scale=alt.Scale(domain=names, range=[_SERIES[i % len(_SERIES)] for i in range(len(names))]),
    )
    base = alt.Chart(alt.Data(values=lines)).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q", detail="by:N")
    drawn = base.mark_line(point={"size": 24}).encode(y=y, strokeDash=alt.StrokeDash("by:N", title=None), **SAYS)
    chance = alt.Chart(alt.Data(values=list(_chance(data)))).mark_line(color=GREY, opacity=0.5, strokeWidth=1)
    one = alt.Chart(alt.Data(values=[{"f": 1}])).mark_rule(color=GREY, strokeDash=[2, 3]).encode(y="f:Q")
    layers = [one, chance.encode(x=x, y=y, detail="draw:N"), band, drawn]
    chart = alt.layer(*layers).properties(width=360, height=240)
    return framed(chart, result, data["faithfulness"], [f"grey: {unit} in an order of chance"], "faithfulness")


def _points(data: xr.Dataset) -> Iterator[dict[str, Any]]:
    unit = unit_of(data)
    for order in data["order"].values:
        for by in data["by"].values:
            one = data.sel(order=order, by=by)
            for i, size in enumerate(one["size"].values.tolist()):
                f, low, high = (float(one[f"faithfulness{end}"][i]) for end in ("", "_low", "_high"))
                if np.isfinite(f):
                    ends = {"low": low, "high": high} if np.isfinite(low) else {"low": f, "high": f}
                    says = f"{order} {by}, {size} {unit}: {f:.3f}"
                    yield {
                        "order": harmless(order),
                        "by": harmless(by),
                        "size": size,
                        "f": f,
                        "says": harmless(says),
                        **ends,
                    }


def _chance(data: xr.Dataset) -> Iterator[dict[str, Any]]:
    for draw in range(data.sizes["draw"] if "random" in data else 0):
        for size, f in zip(data["size"].values.tolist(), data["random"].values[draw].tolist(), strict=True):
            yield {"draw": draw, "size": size, "f": f}


def precision(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """How often what is said of a state is right, over locations, with its interval, and the lens beside it.

    Raises ResultError for a result without answers.
    """
    data = result.data
    if "precision" not in data or writer is not None:
        fix = "give answer, or draw another figure: heatmap"
        raise ResultError(f"this {result.method} says nothing that is right or wrong", got="no precision", fix=fix)
    places = [*map(str, data["location"].values)]
    points = [
        {"way": _WAYS[str(way)], "at": at, "says": f"{at}, {_WAYS[str(way)]}: {rate:.2f} ({low:.2f} to {high:.2f})",
         "rate": rate, "low": low, "high": high}
        for way in data["way"].values
        for at, rate, low, high in zip(
            places, *(data[name].sel(way=way).values.tolist() for name in ("precision", "lower", "upper")), strict=True
        )
    ]  # fmt: skip
    names = list(dict.fromkeys(one["way"] for one in points))
    colour = alt.Color("way:N", title=None, scale=alt.Scale(domain=names, range=list(_SERIES[: len(names)])))
    x = alt.X("at:N", sort=places, title=None, axis=alt.Axis(labelAngle=-40))
    base = alt.Chart(alt.Data(values=points)).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q")
    scale = alt.Scale(domain=[0, 1])
    drawn = base.mark_line(point={"size": 24}).encode(y=alt.Y("rate:Q", title="right", scale=scale), **SAYS)
    chart = alt.layer(band, drawn).properties(width=alt.Step(18), height=220)
    return framed(chart, result, data["precision"], [f"of {data.sizes['prompt']} prompts"], "precision")


_WAYS = {"match": "first token", "said": "in the text", "lens_match": "lens"}


def drawing(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """A circuit's nodes by layer, upwards: blue helps, orange works against; what a head looks at, where that is known.

    Raises ResultError for a result that is no circuit.
    """
    data = result.data
    if result.method != "Circuit" or writer is not None:
        raise ResultError(f"a {result.method} is no circuit", fix="draw uw.Circuit.of_result(found).figure()")
    marks = [_mark(data.isel(node=i)) for i in range(data.sizes["node"])]
    columns = list(dict.fromkeys(one["column"] for one in sorted(marks, key=lambda one: one["order"])))
    x = alt.X("column:N", sort=columns, title=None, axis=alt.Axis(orient="bottom", labelAngle=0))
    y = alt.Y("layer:O", sort="descending", title="layer")
    kinds = ["helps", "works against", "unknown"]
    colour = alt.Color(
        "kind:N", title=None, scale=alt.Scale(domain=kinds, range=[COLOURS["level"], COLOURS["survival"], GREY])
    )
    base = alt.Chart(alt.Data(values=marks)).encode(x=x, y=y)
    nodes = base.mark_square(size=170, opacity=0.85).encode(color=colour, **SAYS)
    text = base.mark_text(dy=13, fontSize=8).encode(text="looks:N")
    chart = alt.layer(nodes, text).properties(width=alt.Step(46), height=alt.Step(30))
    return framed(chart, result, data["score"], [f"{len(marks)} nodes"], "nodes")


def _mark(one: xr.Dataset) -> dict[str, Any]:
    site, score = parse_site(str(one["node"].item())), float(one["score"])
    role, looks = str(one["role"].item()), str(one["looks"].item())
    kind = "unknown" if np.isnan(score) else "works against" if score < 0 else "helps"
    at = f" at {role}" if role else ""
    says = f"{site}{at}: {kind}{'' if np.isnan(score) else f' ({score:+.3g})'}{f', looks at {looks}' if looks else ''}"
    words = " ".join(filter(None, [f"@{role}" if role else "", f"→ {looks}" if looks else ""]))
    return {
        "layer": site.layer, "column": harmless(site.within), "order": [*map(int, site.order[1:])], "kind": kind,
        "looks": harmless(words), "says": harmless(says),
    }  # fmt: skip


def scatter(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """What a logit loses without a write, over its direct effect: below the line less is missed than direct says.

    Each point is a node, by the mean over its counted prompts, or of one `writer` each prompt. (Rushing and Nanda 2024,
    figure 2, with the change of the logit turned upwards.) Raises ResultError for a result without self-repair.
    """
    data = result.data
    if result.method != "self_repair":
        raise ResultError(f"a {result.method} has no self-repair", expected="a result of uw.self_repair")
    if writer is not None and writer not in data["node"].values:
        raise ResultError("no such node", got=writer, expected=", ".join(map(str, data["node"].values[:8])) + " …")
    points = list(_nodes(data) if writer is None else _prompts(data.sel(node=writer)))
    ends = [min(one["direct"] for one in points), max(one["direct"] for one in points)] if points else [0.0, 1.0]
    line = [{"direct": end, "total": end} for end in (min(0.0, ends[0]), max(0.0, ends[1]))]
    x = alt.X("direct:Q", title="direct effect, logits")
    y = alt.Y("total:Q", title="lost without the write, logits")
    names = [*dict.fromkeys(one["kind"] for one in points)]
    colours = [COLOURS["level"], COLOURS["survival"], GREY, COLOURS["total"], COLOURS["hidden from values"]]
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=names, range=colours[: len(names)]))
    even = alt.Chart(alt.Data(values=line)).mark_line(color=GREY, strokeDash=[2, 3]).encode(x=x, y=y)
    dots = alt.Chart(alt.Data(values=points)).mark_circle(size=36, opacity=0.7).encode(x=x, y=y, color=colour, **SAYS)
    chart = alt.layer(even, dots).properties(width=360, height=300)
    what = "each point a node, by its counted prompts" if writer is None else f"each point a prompt, {writer}"
    return framed(chart, result, data["mean_total"], [what, "dashed: nothing is repaired"], "self-repair")


def _nodes(data: xr.Dataset) -> Iterator[dict[str, Any]]:
    for i in range(data.sizes["node"]):
        one = data.isel(node=i)
        direct, total = float(one["mean_direct"]), float(one["mean_total"])
        if np.isfinite(direct):
            node, kind = str(one["node"].item()), str(one["kind"].item())
            says = f"{node}: direct {direct:+.2f}, lost {total:+.2f}, not missed {share_of(one, 'share', 'all')}"
            yield {"direct": direct, "total": total, "kind": kind, "says": harmless(says)}


def _prompts(data: xr.Dataset) -> Iterator[dict[str, Any]]:
    for i in range(data.sizes["prompt"]):
        one = data.isel(prompt=i)
        direct, total = float(one["direct"]), float(one["total"])
        if np.isfinite(direct):
            says = f"prompt {int(one['prompt'])}: direct {direct:+.2f}, lost {total:+.2f}"
            kind = "counted" if bool(one["counted"]) else "other prompts"
            yield {"direct": direct, "total": total, "kind": kind, "says": harmless(says)}
