"""What does one look up day by day? Lines of a lens for a terminal, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column
from unwrite.result import Result

# Prompts that are shown, and tokens of each state.
_PROMPTS, _TOKENS = 3, 4
LENS = (
    Column("location", holds="word"),
    Column("first choices, and how probable they are", "{prob}", holds="word"),
    Column("followed", "{followed_prob}"),
    Column("rank", "{followed_rank}"),
    Column("KL", "{kl}"),
)


def lenses(data: xr.Dataset) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Of the first prompts, what every state says at the last position: a title, and a line for each location."""
    for one, text in _ends(data):
        said = f"{int(one['prompt'])}: “{text}”, last position; followed: “{one['followed'].item()}”"
        yield said, [_choices(one.isel(location=i)) for i in range(one.sizes["location"])]


def _ends(data: xr.Dataset) -> Iterator[tuple[xr.Dataset, str]]:
    """Prompt by prompt, what is said at its last position, and what was read until there."""
    for prompt in range(min(_PROMPTS, data.sizes["prompt"])):
        one = data.isel(prompt=prompt)
        length = int(one["kl"].notnull().isel(location=-1).sum())
        yield one.isel(position=length - 1), "".join(map(str, one["read"].values[:length]))


def _choices(one: xr.Dataset) -> tuple[str, ...]:
    pairs = zip(one["token"].values[:_TOKENS], one["prob"].values, strict=False)
    choices = " · ".join(f"“{token}” {prob:.2f}" for token, prob in pairs)
    followed, rank, kl = (float(one[name]) for name in ("followed_prob", "followed_rank", "kl"))
    return str(one["location"].item()), choices, f"{followed:.2g}", f"{rank:.0f}", f"{kl:.2f}"


def foremost(data: xr.Dataset, most: int) -> list[int]:
    """So many locations at most: evenly among the states between blocks, the first and the last among them."""
    between = [i for i, name in enumerate(data["location"].values) if not str(name).startswith("resid_mid")]
    return [between[i] for i in sorted({round(i) for i in np.linspace(0, len(between) - 1, min(len(between), most))})]


def first_choice(result: Result) -> str:
    """From which state on the followed token is the first choice, of the first prompt."""
    one, _ = next(_ends(result.data))
    last, places = one["followed_rank"].values, one["location"].values
    token, end = one["followed"].item(), f"prompt {int(one['prompt'])}"
    if last[-1] != 1:
        return f"At the end of {end} “{token}” is choice {int(last[-1])} of the model."
    later = np.flatnonzero(last != 1)
    since = places[0 if not len(later) else later[-1] + 1]
    return f"At the end of {end} “{token}” is the first choice from {since} on."
