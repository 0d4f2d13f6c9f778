"""What does a result look like? Altair charts, drawn from a saved result alone."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from unwrite.report.rows import rows, texts
from unwrite.result import Result

_MOST = 40
# Orange below, white at 0, blue above: told apart by colour-blind readers too.
DIVERGING = ("#d95f02", "#ffffff", "#2166ac")


def main(result: Result) -> alt.TopLevelMixin:
    """The picture of a result: of a scan the map of levels, of a verification what survives."""
    return survival(result) if result.method == "verify" else levels(result)


def survival(result: Result) -> alt.TopLevelMixin:
    """What survives of a write at every later location, beside randomly turned writes (band: 95 % of them)."""
    data = result.data
    places = list(data["location"].values)
    lines = data[["survival", "background", "level_share"]].to_dataframe().reset_index()
    lines = lines.rename(columns={"level_share": "level"}).melt("location", var_name="what").dropna()
    band = data["generic"].to_dataframe()["generic"].unstack("bound").reset_index().dropna()
    x = alt.X("location:N", sort=places, title=None, axis=alt.Axis(labelAngle=-40))
    low = alt.Y("low:Q", title="along the write, as a share of it")
    generic = alt.Chart(band).mark_area(opacity=0.3, color="gray").encode(x=x, y=low, y2="high:Q")
    kept = alt.Chart(lines).mark_line(point=True).encode(x=x, y="value:Q", color=alt.Color("what:N", title=None))
    title = f"{data.attrs['writer']}: {data.attrs['verdict']} (grey: randomly turned writes)"
    return alt.layer(generic, kept, title=alt.Title(title, anchor="start")).properties(width=480, height=260)


def levels(result: Result) -> alt.TopLevelMixin:
    """The median level of every state of the stream along every material write (the first text of several).

    Rows are writers, most energy moved first; columns are locations. White is 0, blue a level that rises, orange one
    that reverses; a box marks the location right after the write.
    """
    _, data, _ = next(texts(result))
    writers = [row.writer for row in rows(data)[0][:_MOST]]
    level = data["level"].sel(quantile=0.5, writer=writers).to_dataframe().reset_index()
    limit = max(2.0, float(np.nanquantile(np.abs(level["level"]), 0.9)))
    after = pd.DataFrame({"writer": writers, "location": data["right_after"].sel(writer=writers).values})
    x = alt.X("location:N", sort=list(data["location"].values), title=None, axis=alt.Axis(labelAngle=-40, orient="top"))
    y = alt.Y("writer:N", sort=writers, title="writer (most energy moved first)")
    colour = alt.Color(
        "level:Q",
        title="median level",
        scale=alt.Scale(domain=[-limit, 0, limit], range=list(DIVERGING), interpolate="rgb", clamp=True),
    )
    base = alt.Chart(level).encode(x=x, y=y)
    cells = base.mark_rect().encode(color=colour, tooltip=["writer", "location", alt.Tooltip("level:Q", format=".2f")])
    dark = alt.condition(f"abs(datum.level) > {0.6 * limit}", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=9).encode(text=alt.Text("level:Q", format=".1f"), color=dark)
    boxes = alt.Chart(after).mark_rect(filled=False, stroke="black", strokeWidth=1.2).encode(x=x, y=y)
    title = alt.Title(
        "How much of the stream lies along each write",
        subtitle=[
            _caption(result),
            "box: right after the write; a level counts all that lies along it, whoever wrote it",
        ],
        anchor="start",
    )
    return alt.layer(cells, numbers, boxes, title=title).properties(width=alt.Step(46), height=alt.Step(15))


def _caption(result: Result) -> str:
    name, _, read = next(texts(result))
    model = result.provenance["model"]["name"]
    return f"{model} on {name or read['source']}, {read['prompts']} × {read['length']} tokens"
