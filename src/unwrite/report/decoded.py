"""What is said of states? A table of texts, location by location, beside the lens, and how often each is right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, Listing
from unwrite.report.looked import foremost
from unwrite.result import Result

_PROMPTS, _LOCATIONS, _LONG = 3, 24, 60
_TEXTS = (
    Column("location", holds="word"),
    Column("what is said of it", "the likeliest tokens, one after the other", holds="words"),
    Column("first: how probable", "{prob}"),
    Column("lens", "{lens_id}", holds="word"),
    Column("lens: how probable", "{lens_prob}"),
)
_WAYS = {"match": "first token right", "said": "said in the text", "lens_match": "lens right"}


def parts(result: Result) -> Iterator[Listing]:
    """How often what is said is right, and what is said of the first prompts."""
    data = result.data
    if "precision" in data:
        ways = [str(way) for way in data["way"].values]
        columns = [Column("location", holds="word"), *(Column(_WAYS[way], "{precision}") for way in ways)]
        rows = [(str(one["location"].item()), *(_rate(one.sel(way=way)) for way in ways)) for one in _each(data)]
        title = f"of {data.sizes['prompt']} prompts, with 95 % intervals"
        yield Listing(title, columns, rows, data, foremost(data, _LOCATIONS))
    for prompt in range(min(_PROMPTS, data.sizes["prompt"])):
        own = data.isel(prompt=prompt)
        asked = f"; right is “{own['answer'].item()}”" if "answer" in own else ""
        title = f"{prompt}: “{own['read'].item()}”{asked}"
        yield Listing(title, _TEXTS, [_text(one) for one in _each(own)], data, foremost(data, _LOCATIONS))


def _each(data: xr.Dataset) -> Iterator[xr.Dataset]:
    return (data.isel(location=i) for i in range(data.sizes["location"]))


def _rate(one: xr.Dataset) -> str:
    return f"{float(one['precision']):.2f} ({float(one['lower']):.2f} to {float(one['upper']):.2f})"


def _text(one: xr.Dataset) -> tuple[str, ...]:
    text, first = str(one["text"].item()), float(one["prob"].isel(step=0))
    shown = text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"
    lens = str(one["lens_token"].item())
    return str(one["location"].item()), f"“{shown}”", f"{first:.2f}", f"“{lens}”", f"{float(one['lens_prob']):.2f}"


def sentence(result: Result) -> str:
    """Where what is said is right most often, with its interval, beside the lens there."""
    data = result.data
    if "precision" not in data:
        last = data.isel(prompt=0, location=-1)
        return f"Of {last['location'].item()} of prompt 0 the model says “{last['text'].item()}”."
    ways = [str(way) for way in data["way"].values]
    way = "said" if "said" in ways else "match"
    best = data.isel(location=int(np.argmax(data["precision"].sel(way=way).values)))
    n, where = data.sizes["prompt"], best["location"].item()
    says = "says the answer" if way == "said" else "begins with the answer"
    return (
        f"Of {where} the model {says} in {_rate(best.sel(way=way))} of {n} prompts, more than of any other "
        f"location; its lens is right there in {_rate(best.sel(way='lens_match'))}."
    )
