"""What does an attribution say, and how far can it be believed? Rows and a sentence from a result of `uw.dla`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from unwrite.report.columns import Column
from unwrite.result import Result

READINGS = ("direct", "net", "relp", "gradient")
CELLS = (*READINGS, "total", "fate", "input_blind")
# Removing a write moves the stream where the model has never been; its mean leaves it where it usually is.
HEADLINE = "mean"
REPLACEMENTS = ("mean", "zero")
_SHOWN_PROMPTS, _SHOWN_NODES = 4, 10


@dataclass(frozen=True)
class Attribution:
    """One prompt: the end of its text, what was asked, how the difference is made up, and its foremost nodes."""

    title: str
    sums: str
    rows: tuple[tuple[str, ...], ...]


HEADER = (
    Column("node", holds="word"),
    *(Column(name, f"{{{name}}}") for name in (*READINGS, "total")),
    Column("fate", "what became of direct: {why}", "word"),
    Column("input-blind", "direct stays what it is, to a quarter, with half of all other texts as its input", "word"),
)


def asked(data: xr.Dataset) -> Iterator[Attribution]:
    """The first prompts, each with the nodes whose direct reading or total is largest."""
    for i in range(min(_SHOWN_PROMPTS, data.sizes["prompt"])):
        one = data.isel(prompt=i)
        size = np.fmax(np.abs(one["direct"].values), np.abs(np.nan_to_num(one["total"].values)))
        order = np.argsort(-size, kind="stable")[:_SHOWN_NODES]
        cells = one[list(CELLS)]
        yield Attribution(_title(one), _sums(one), tuple(row(cells.isel(node=k)) for k in order))


def _title(one: xr.Dataset) -> str:
    text = str(one["prompt_text"].item())
    against = f" − “{one['against'].item()}”" if "against" in one else ""
    kind = f"{one['prompt_kind'].item()} prompt " if "prompt_kind" in one else "prompt "
    return (
        f"{kind}{int(one['prompt'])}: “{'…' if len(text) > 60 else ''}{text[-60:]}” → “{one['answer'].item()}”{against}"
    )


def _sums(one: xr.Dataset) -> str:
    cap = "" if np.isclose(one["capped"], one["logit_diff"]) else f" (after the soft-cap {float(one['capped']):+.3f})"
    return (
        f"logit difference {float(one['logit_diff']):+.3f}{cap}, of which no node's {float(one['constant']):+.3f}, "
        f"unexplained {float(one['unexplained']):.0e}"
    )


def row(cell: xr.Dataset) -> tuple[str, ...]:
    """One node on one prompt: its readings, the truth, and what became of it."""
    numbers = tuple(f"{float(cell[name]):+.3f}" for name in (*READINGS, "total"))
    blind = "yes" if bool(cell["input_blind"]) else ""
    return (str(cell["node"].item()), *numbers, str(cell["fate"].item()).replace("_", " "), blind)


TRUST_HEADER = (
    Column("nodes", holds="word"),
    *(Column(name, f"{{trust}}, its 95 % interval over resampled prompts; {name}: {{{name}}}") for name in READINGS),
    Column("cells", "{trust_n}"),
)


def trusted(data: xr.Dataset, replacement: str = HEADLINE) -> list[tuple[str, ...]]:
    """By group of nodes: each reading's correlation with the executed total, with its 95 % interval."""
    one = data.sel(form="pooled", replacement=replacement)
    found = []
    for group in data["group"].values:
        cells = [_interval(one.sel(group=group, reading=name)).partition(" (")[0] for name in READINGS]
        n = int(one["trust_n"].sel(group=group, reading=READINGS[0]))
        if any(cells):
            found.append((str(group), *(cell or "–" for cell in cells), f"{n:,}"))
    return found


def _interval(one: xr.Dataset) -> str:
    middle = float(one["trust"])
    if not np.isfinite(middle):
        return ""
    low, high = float(one["trust_low"]), float(one["trust_high"])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(low) else f"{middle:.2f} (one prompt: no interval)"


def sentence(result: Result) -> str:
    """What a result of `uw.dla` amounts to."""
    words = belief(result.data)
    worst = float(np.abs(result.data["unexplained"]).max())
    return f"{words[0].upper()}{words[1:]}. Readings add up to the logit differences to {worst:.0e}."


def belief(data: xr.Dataset) -> str:
    """Which reading predicts the executed truth best, of heads and of MLPs, and how direct fares."""
    one = data.sel(form="pooled", replacement=HEADLINE)
    if not np.isfinite(one["trust"]).any():
        one = data.sel(form="pooled", replacement="zero")
    said = [_best(one.sel(group=group), group) for group in ("heads", "mlps")]
    lost = {word: int((data["fate"] == word).sum()) for word in ("erased", "filled_in", "reversed", "norm")}
    words = "; ".join(part for part in said if part)
    tail = ", ".join(f"{word.replace('_', ' ')} {n}" for word, n in lost.items() if n)
    return (words or "too few prompts to say which reading to believe") + (
        f". Direct effects lost again: {tail}" if tail else ""
    )


def _best(one: xr.Dataset, group: str) -> str:
    values = one["trust"].values
    if not np.isfinite(values).any():
        return ""
    best = READINGS[int(np.nanargmax(values))]
    direct = _interval(one.sel(reading="direct"))
    line = f"for {group}, direct attribution correlates {direct} with the executed effect"
    return line if best == "direct" else f"{line}, {best} {_interval(one.sel(reading=best))}"
