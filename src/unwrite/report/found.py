"""What did a walk over a corpus find: prompts on which attribution misleads, and whether two attributions cancel?"""

from __future__ import annotations

import xarray as xr

from unwrite.result import Result

HEADER = ("prompt", "row", "asked", "logit difference", "direct", "of its mean write", "total")
CORPUS_HEADER = ("erasers' attribution", "correlation [95 %]", "slope", "intercept")
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


def corpus_rows(data: xr.Dataset) -> list[tuple[str, ...]]:
    """One line for every way of counting what erasers write."""
    lines = []
    for path in data["path"].values:
        one = data.sel(path=path)
        low, high = float(one["correlation_low"]), float(one["correlation_high"])
        words = f"{float(one['correlation']):+.3f} [{low:+.3f}, {high:+.3f}]"
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
