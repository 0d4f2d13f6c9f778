"""What does one look up day by day? Lines of a lens and of attention for a terminal, from a saved result."""

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


ATTENTION = (Column("head", holds="word"), Column("the last token looks at", "{weight}", holds="words"))


def looks(data: xr.Dataset) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Of the first prompts, where each head looks from the last token: those that look most past the first one."""
    for prompt in range(min(_PROMPTS, data.sizes["prompt"])):
        weight, words = _last(data.isel(prompt=prompt))
        lines = [(str(data["head"].values[head]), _keys(weight[head], words)) for head in _by_past(weight)]
        yield f"{prompt}: “{''.join(words)}”", lines


def _last(one: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """Weights [head, key] of the last token of a prompt, and its words."""
    length = int(one["weight"].isel(head=0, key=0).notnull().sum())
    weight = one["weight"].transpose("head", "query", "key").values[:, length - 1, :length]
    return weight, [str(word) for word in one["read"].values[:length]]


def _by_past(weight: np.ndarray) -> np.ndarray:
    return np.argsort(-weight[:, 1:].max(1, initial=-1.0), kind="stable")


def _keys(weight: np.ndarray, words: list[str]) -> str:
    most = np.argsort(-weight, kind="stable")[:_TOKENS]
    return " · ".join(f"“{words[key]}” ({key}) {weight[key]:.3g}" for key in most)


def looks_most(result: Result) -> str:
    """Which head looks most at something else than the first token, from the last one of the first prompt."""
    weight, words = _last(result.data.isel(prompt=0))
    if len(words) < 2:
        return "One token looks at nothing but itself."
    head, key = np.unravel_index(int(weight[:, 1:].argmax()), weight[:, 1:].shape)
    name, size = result.data["head"].values[head], weight[head, key + 1]
    return f"From the last token of prompt 0, {name} looks most past the first: {size:.3g} at “{words[key + 1]}”."
