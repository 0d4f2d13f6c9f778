"""What does an attribution say, and how far can it be believed? Rows and a sentence from a result of `uw.dla`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, spanned
from unwrite.result import Result

READINGS = ("direct", "net", "relp", "gradient")
CELLS = (*READINGS, "total", "fate", "input_blind")
# Removing a write moves the stream where the model has never been; its mean leaves it where it usually is.
HEADLINE = "mean"
REPLACEMENTS = ("mean", "zero")
# Independent prompts below which a correlation has no interval, and a layer no line of its own.
FEWEST = 6
# The rule by which a reading is recommended: of all four its interval reaches highest at its lower end, and this high.
# Correlated less, more than a third of what happens to nodes (1 − .8²) is not what the reading says.
ENOUGH = 0.8
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


def shown(data: xr.Dataset) -> tuple[str, ...]:
    """Which columns say anything: without executed runs no total; a fate only where the read row alone was replaced."""
    return tuple(name for name in CELLS if name in data and (name in READINGS or _says(data[name])))


def _says(part: xr.DataArray) -> bool:
    return bool(part.notnull().any()) if part.dtype.kind == "f" else any(part.values.ravel())


def header(data: xr.Dataset) -> tuple[Column, ...]:
    """The columns of `asked`."""
    kept = shown(data)
    return (HEADER[0], *(column for name, column in zip(CELLS, HEADER[1:], strict=True) if name in kept))


def asked(data: xr.Dataset) -> Iterator[Attribution]:
    """The first prompts, each with the nodes whose direct reading or total is largest."""
    names = shown(data)
    ranked = [name for name in ("direct", "total") if name in names]
    for i in range(min(_SHOWN_PROMPTS, data.sizes["prompt"])):
        one = data.isel(prompt=i)
        size = np.nan_to_num(np.abs(np.stack([one[name].values for name in ranked]))).max(0)
        order = np.argsort(-size, kind="stable")[:_SHOWN_NODES]
        by = "the larger of |direct| and |total|" if "total" in names else "|direct|"
        says = f"{_sums(one)}; {len(order)} of {len(size)} nodes, by {by}"
        cells = one[list(names)]
        yield Attribution(_title(one), says, tuple(row(cells.isel(node=k), names) for k in order))


def titles(data: xr.Dataset) -> list[str]:
    """Every prompt by the end of its text and what was asked about it."""
    return [_title(data.isel(prompt=i)) for i in range(data.sizes["prompt"])]


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
        f"logit difference {float(one['logit_diff']):+.3f}{cap}: all nodes, and {float(one['constant']):+.3f} from "
        f"biases behind them (unexplained {float(one['unexplained']):.0e})"
    )


def row(cell: xr.Dataset, names: Sequence[str] = CELLS) -> tuple[str, ...]:
    """One node on one prompt: its readings, the truth, and what became of it."""
    return (str(cell["node"].item()), *(_cell(name, cell[name].item()) for name in names))


def _cell(name: str, value: Any) -> str:
    if name == "input_blind":
        return "yes" if value else ""
    return str(value).replace("_", " ") if name == "fate" else f"{float(value):+.3f}"


TRUST_HEADER = (
    Column("nodes", holds="word"),
    *(Column(name, f"{{trust}}, its 95 % interval; {name}: {{{name}}}") for name in READINGS),
    Column("cells", "{trust_n}"),
)


def trusted(data: xr.Dataset, replacement: str = HEADLINE) -> list[tuple[str, ...]]:
    """By group of nodes: each reading's correlation with the executed total, with its 95 % interval."""
    one = data.sel(form="pooled", replacement=replacement)
    found = []
    for group in data["group"].values:
        own = one.sel(group=group)
        cells = [_interval(own.sel(reading=name)) for name in READINGS]
        if any(cells) and (_clusters(own) >= FEWEST or not re.fullmatch(r"L\d+\.heads", str(group))):
            found.append((str(group), *(cell or "–" for cell in cells), f"{int(own['trust_n'].max()):,}"))
    return found


def title(data: xr.Dataset, replacement: str) -> str:
    """What the table of correlations is about, and what its numbers are worth."""
    n = _clusters(data.sel(form="pooled", replacement=replacement))
    return (
        f"how each reading correlates with the executed total, writes replaced by {replacement} "
        f"({f'[95 %], {n} prompts' if n >= FEWEST else _few(n)})"
    )


def _few(n: int) -> str:
    """What is said of too few prompts, in place of an interval."""
    return f"{'one prompt' if n == 1 else f'{n} prompts'}: indicative only, no interval"


def _clusters(one: xr.Dataset) -> int:
    """Independent prompts; of results from before they were counted, none."""
    return int(one["trust_clusters"].max()) if "trust_clusters" in one else 0


def _interval(one: xr.Dataset) -> str:
    """The correlation, with its interval where it has one."""
    middle, low, high = (float(one[name]) for name in ("trust", "trust_low", "trust_high"))
    return spanned(middle, low, high) if np.isfinite(middle) else ""


def sentence(result: Result) -> str:
    """What a result of `uw.dla` amounts to: which readings to go by."""
    words = belief(result.data)
    return f"{words[0].upper()}{words[1:]}."


def added(data: xr.Dataset) -> str:
    """Whether readings add up, and what direct effects were lost again."""
    worst = float(np.abs(data["unexplained"]).max())
    return f"Readings add up to the logit differences to {worst:.0e}{_lost(data)}."


def _lost(data: xr.Dataset) -> str:
    words = ("erased", "filled_in", "reversed", "norm")
    lost = {word: int((data["fate"] == word).sum()) for word in words} if "fate" in data else {}
    tail = ", ".join(f"{word.replace('_', ' ')} {n}" for word, n in lost.items() if n)
    return f". Direct effects lost again: {tail}" if tail else ""


def belief(data: xr.Dataset) -> str:
    """Which reading to go by, of heads and of MLPs, and why; or that none is good enough, or that nobody can say."""
    if "trust" not in data:
        return "nothing was executed, so which reading to go by is not known"
    one = data.sel(form="pooled", replacement=HEADLINE)
    if not np.isfinite(one["trust"]).any():
        one = data.sel(form="pooled", replacement="zero")
    kinds = {"heads": "heads", "mlps": "MLPs"}
    said = [_best(one.sel(group=group), words) for group, words in kinds.items() if group in data["group"].values]
    words = "; ".join(part for part in said if part)
    return words or "too few cells to say which reading to go by"


def _best(one: xr.Dataset, group: str) -> str:
    """One reading for a group of nodes, by `ENOUGH`; with too few prompts the nearest, and no advice."""
    if not np.isfinite(one["trust"]).any():
        return ""
    n, sure = _clusters(one), np.isfinite(one["trust_low"]).any()
    rank = one["trust_low"] if sure else one["trust"]
    best = READINGS[int(np.nanargmax(rank.values))]
    number = f"r {_interval(one.sel(reading=best))}"
    if not sure:
        return f"for {group}, {best} is nearest to what happens ({number}; {_few(n)})"
    if float(rank.sel(reading=best)) >= ENOUGH:
        return f"for {group} read {best} ({number}, {n} prompts)"
    return (
        f"for {group} no reading is good enough (the best is {best}, {number}, {n} prompts; r should surely be at "
        f"least {ENOUGH:.1f}): go by total"
    )
