"""What do images look like in which a layer reads another text? A grid of them, from a saved result."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np

from unwrite.errors import ResultError, shown
from unwrite.report.maps import framed
from unwrite.report.paper import SAYS, harmless
from unwrite.result import Result

# Images in a row, the side of each in the picture, and the height of its name.
_ROW, _SIDE, _LABEL = 12, 84, 16


def images(result: Result, writer: str | None, of: str | None, chosen: Mapping[str, Any]) -> alt.TopLevelMixin:
    """The images of the first prompts, a row for each, or where there are many layers those of one, row by row.

    `chosen` may say which: `picture=1`. Raises ResultError for a result that holds no images.
    """
    if (
        "image" not in result.data
        or not result.data.sizes["picture"]
        or writer is not None
        or of not in (None, "image")
    ):
        raise ResultError(f"this {result.method} has no images", expected="a result of uw.localise with pictures")
    part, runs = result["image"], [str(run) for run in result["run"].values]
    which = _which(chosen, part.sizes["picture"], len(runs))
    places = [(row, run) for row in which for run in range(len(runs))]
    marks = [_mark(result, picture, run, n) for n, (picture, run) in enumerate(places)]
    high = 1 + max(mark["y"] for mark in marks)
    wide = min(_ROW, len(runs))
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, wide], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[high, 0], nice=False))
    base = alt.Chart(alt.Data(values=marks)).encode(x=x, y=y)
    size = _SIDE - 4
    shown_ = base.mark_image(width=size, height=size, align="left", baseline="top").encode(url="url:N", **SAYS)
    words = base.mark_text(align="left", baseline="bottom", fontSize=10, dy=-1, limit=size).encode(text="run:N")
    chart = alt.layer(shown_, words).properties(width=wide * _SIDE, height=high * (_SIDE + _LABEL))
    said = [f"{i}: {result['prompt_text'].values[i]} → {result['target_text'].values[i]}" for i in which]
    return framed(chart, result, part, [*said, "by which layers read the target's text"], "images")


def _which(chosen: Mapping[str, Any], pictures: int, runs: int) -> list[int]:
    picture = chosen.get("picture")
    known = isinstance(picture, (int, np.integer)) and not isinstance(picture, bool) and 0 <= picture < pictures
    if set(chosen) - {"picture"} or not (picture is None or known):
        got = ", ".join(f"{name}={shown(value)}" for name, value in chosen.items())
        raise ResultError("no such picture", got=got, expected=f"picture from 0 to {pictures - 1}")
    if picture is not None:
        return [int(picture)]
    return [*range(pictures)] if runs <= _ROW else [0]


def _mark(result: Result, picture: int, run: int, n: int) -> dict[str, Any]:
    data = result.data
    name = str(data["run"].values[run])
    values = dict(zip(data["score"].values, data["value"].values[:, run, picture], strict=True))
    says = ", ".join([name, *(f"{score} {value:.3g}" for score, value in values.items())])
    return {
        "x": n % _ROW if data.sizes["run"] > _ROW else run, "y": n // min(_ROW, data.sizes["run"]),
        "run": harmless(name), "says": harmless(says), "url": png(data["image"].values[picture, run]),
    }  # fmt: skip


def png(pixels: np.ndarray) -> str:
    """An image of 8 bits, [row, column, channel], grey or of colours, as a data URL: nothing is fetched for it."""
    rows, columns, channels = pixels.shape
    if channels not in (1, 3):
        raise ResultError("an image is grey or has three colours", got=f"{channels} channels")
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], 1).tobytes()
    head = struct.pack(">IIBBBBB", columns, rows, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    whole = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + whole).decode("ascii")
