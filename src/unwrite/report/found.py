"""What was found on a corpus: prompts on which attribution misleads, whether attributions cancel, a paper's numbers?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, spanned
from unwrite.result import Result

HEADER = (
    Column("prompt", holds="word"),
    Column("row"),
    Column("asked", holds="word"),
    Column("logit difference", "{logit_diff}"),
    Column("direct", "{direct}"),
    Column("of its mean write", "{direct_mean}"),
    Column("total", "{total}"),
)
CORPUS_HEADER = (
    Column("erasers' attribution", holds="word"),
    Column("correlation [95 %]", "{correlation}"),
    Column("slope", "{slope}"),
    Column("intercept", "{intercept}"),
)
# Numbers were read off images to about this, and a corpus is drawn anew.
_NEAR = 0.05
_PATHS = {
    "raw": "all that they write",
    "values": "because their values read the writer",
    "same_position": "the same without attention weights",
}


def rows(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for every prompt found."""
    numbers = ("logit_diff", "direct", "direct_mean", "total")
    return [
        (
            str(int(one["prompt"])),
            str(int(one["row"])),
            f"“{one['answer'].item()}” − “{one['against'].item()}”",
            *(f"{float(one[name]):+.3f}" for name in numbers),
        )
        for one in (data.isel(hit=i) for i in range(data.sizes["hit"]))
    ]


def sentence(result: Result) -> str:
    """How often prompts are found, and how often they would be by chance."""
    return rates(result.data, result.data.attrs["writer"])


def rates(data: xr.Dataset, writer: str) -> str:
    """Rates of hits on the text that was searched and on the one that was not, beside those of turned writes."""
    words = []
    for text in data["text"].values:
        own, generic = (float(data["rate"].sel(text=text, source=source)) for source in ("writer", "generic"))
        words.append(f"{own:.2%} of positions {str(text).replace('_', ' ')} (randomly turned writes {generic:.2%})")
    return f"Prompts on which direct attribution of {writer} is large and without effect: {', '.join(words)}."


CLAIMS_HEADER = (
    Column("figure", holds="word"),
    Column("quantity", holds="word"),
    Column("setting", holds="word"),
    Column("paper"),
    Column("ours"),
)


def claims(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for every number of a paper."""
    parts = zip(*(data[column.name].values for column in CLAIMS_HEADER), strict=True)
    return [
        (*map(str, words), *(f"{value:+.3f}" if value == value else "–" for value in (paper, ours)))
        for *words, paper, ours in parts
    ]


def claims_sentence(result: Result) -> str:
    """How near the numbers are, and what goes beyond them."""
    data = result.data
    gap = np.abs(data["difference"].values)
    measured = np.isfinite(gap)
    own = result.provenance["settings"]["paper_text"]
    text = "the paper's own text" if own else "another text than the paper's, so differences are to be expected"
    near = int((gap[measured] <= _NEAR).sum())
    return (
        f"{near} of {int(measured.sum())} numbers within {_NEAR} of the paper, on {text}. "
        f"By executed runs without it the writer is: {data.attrs['verdict']}."
    )


def corpus_rows(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for every way of counting what erasers write."""
    lines = []
    for path in data["path"].values:
        one = data.sel(path=path)
        low, high = float(one["correlation_low"]), float(one["correlation_high"])
        words = spanned(float(one["correlation"]), low, high, n=3, sign="+")
        lines.append((_PATHS[str(path)], words, f"{float(one['slope']):+.3f}", f"{float(one['intercept']):+.3f}"))
    return lines


def corpus_sentence(result: Result) -> str:
    """Whether erasers take back what the writer is credited with."""
    data = result.data
    slope, correlation = (float(data.sel(path="values")[name]) for name in ("slope", "correlation"))
    return (
        f"Where {data.attrs['writer']} is credited with one logit, {data.attrs['erasers']} take back {-slope:+.2f} "
        f"because their values read it (correlation {correlation:+.3f}, {int(data['n']):,} positions; perfect clean-up "
        "would be +1.00 and −1)."
    )
