"""What does a scan say about each writer, in one row? What the terminal and the page show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from unwrite.report.columns import Column
from unwrite.result import Result

_OPPONENTS = 2
HEADER = (
    Column("writer", holds="word"),
    Column("‖w‖/‖x‖", "median of {relative_norm}"),
    Column("after", "median of {level}, x right after the write"),
    Column("end", "median of {level}, x at the end of the stream"),
    Column("writes against it: share ± SE (median)", "{share} ± {share_se} (median of {pr})", "words", least=36),
    Column("reading (energy-weighted)", "{level_share}, x right after the write → at the end", "word"),
    Column("n", "{n_positions}"),
)


@dataclass(frozen=True)
class Opponent:
    """A candidate eraser of a writer: additive share with standard error, and the median ratio."""

    node: str
    share: float
    error: float
    median: float

    def __str__(self) -> str:
        return f"{self.node} {self.share:+.3f} ± {self.error:.3f} (median {self.median:+.2f})"


@dataclass(frozen=True)
class Row:
    """A writer: how large it writes, its median levels, who opposes it and what that amounts to."""

    writer: str
    relative_norm: float
    moved: float
    start: float
    end: float
    opponents: tuple[Opponent, ...]
    more_opponents: int
    says: str
    n: int

    @property
    def against(self) -> str:
        """The strongest opponents in words."""
        if not self.opponents:
            return "–"
        return ", ".join(map(str, self.opponents)) + (f", +{self.more_opponents} more" if self.more_opponents else "")

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands in a table, below `HEADER`."""
        numbers = (f"{value:.2f}" for value in (self.relative_norm, self.start, self.end))
        return (self.writer, *numbers, self.against, self.says, f"{self.n:,}")


def texts(result: Result) -> Iterator[tuple[str, xr.Dataset, Mapping[str, Any]]]:
    """(name, data, what was read) for every text of a scan; the name is empty where there is only one."""
    tokens = result.provenance["tokens"]
    if "text" not in result.data.dims:
        yield "", result.data, tokens[""]
        return
    for name in result.data["text"].values:
        yield str(name), result.data.sel(text=name), tokens[str(name)]


def rows(data: xr.Dataset) -> tuple[list[Row], list[str]]:
    """Rows of the material writers, most energy moved first, and the names of the others (which stay in the result)."""
    order = np.argsort(-data["moved"].fillna(-1).values, kind="stable")
    material = data["material"].values.astype(bool)
    median = data.sel(quantile=0.5)
    columns = {name: median[name].values for name in ("relative_norm", "moved", "level_after", "level_end")}
    pairs = {name: data[name].transpose("writer", "node").values for name in ("eraser", "share", "share_se")}
    pairs["pr"] = median["pr"].transpose("writer", "node").values
    names, nodes = data["writer"].values, data["node"].values
    shown = []
    for i in (i for i in order if material[i]):
        against = [int(k) for k in np.flatnonzero(pairs["eraser"][i])]
        against.sort(key=lambda k: pairs["share"][i, k])
        foremost = tuple(
            Opponent(str(nodes[k]), *(float(pairs[part][i, k]) for part in ("share", "share_se", "pr")))
            for k in against[:_OPPONENTS]
        )
        size, moved, start, end = (float(column[i]) for column in columns.values())
        says, n = str(data["in_words"].values[i]), int(data["n_positions"].values[i])
        more = len(against) - len(foremost)
        shown.append(Row(str(names[i]), size, moved, start, end, foremost, more, says, n))
    return shown, [str(names[i]) for i in order if not material[i]]


def disagreements(result: Result) -> list[str]:
    """Writers whose reading differs in kind between the texts of a scan, in words."""
    if "text" not in result.data.dims:
        return []
    found = []
    for i, writer in enumerate(result.data["writer"].values):
        here = result.data.isel(writer=i)
        words = {str(name): str(here.sel(text=name)["in_words"].item()) for name in result.data["text"].values}
        if here["material"].any() and len({says.split()[0] for says in words.values()}) > 1:
            found.append(f"{writer}: " + "; ".join(f"{says} on {name}" for name, says in words.items()))
    return found


def soundness(data: xr.Dataset, settings: Mapping[str, Any]) -> str:
    """What was counted and what was not, in one line."""
    skip = settings["skip"]
    line = (
        f"{int(data['n_positions'].max()):,} positions from {int(data['n_clusters'])} independent prompts; left out "
        f"below the floor {int(data['n_below_floor'].sum()):,}, ratios beyond ±100 {int(data['n_beyond_grid'].sum()):,}"
    )
    if not skip:
        return line
    times = at_the_start(data)
    largest = int(times.argmax())
    return (
        f"{line}; the first {skip} of each prompt counted apart: there {data['writer'].values[largest]} writes "
        f"{float(times[largest]):.1f} × its usual norm"
    )


def at_the_start(data: xr.Dataset) -> np.ndarray:
    """How many times its usual norm each writer writes at the skipped positions; 0 of immaterial ones."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = data["skipped_norm"].values / data["norm"].sel(quantile=0.5).values
    return np.where(data["material"].values, times, 0.0)


def folded_line(folded: list[str]) -> str:
    """The immaterial writers in one line."""
    writers = "1 writer" if len(folded) == 1 else f"{len(folded)} writers"
    return f"{writers} below 5 % of the stream's norm in the median: {', '.join(folded)} (in the result)"
