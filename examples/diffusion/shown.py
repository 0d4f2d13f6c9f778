"""What was found of the toy, as tables and a picture for docs/diffusion.md: from `results/`, without diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).parent / "results"
# Pixels of an image and the space beside it; above this grey value there is ink.
_SIDE, _SPACE, _INK = 16, 2, 127
_EDITED = {
    "start": "start", "new_digit": "target's digit", "old_digit": "prompt's digit", "shape_kept": "same shape",
    "rest_ssim": "SSIM beside the digit",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawing that a notebook shows."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def kept(name: str) -> dict[str, Any]:
    """What a script has kept."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def shares(one: dict[str, Any]) -> pd.DataFrame:
    """Layers by their shares of what all do."""
    ends = zip(one["share"], one["low"], one["high"], strict=True)
    said = [f"{share:.2f} [{low:.2f}, {high:.2f}]" for share, low, high in ends]
    columns = {"share [95 %]": said, "verdict": one["verdict"], "layer": one["path"]}
    return pd.DataFrame(columns, one["runs"]).iloc[3:]


def edits(found: dict[str, Any]) -> pd.DataFrame:
    """What becomes of other prompts, by the first step that reads the target."""
    return pd.DataFrame(found["edited"]).rename(columns=_EDITED).round(2).set_index("start")


def adapters() -> pd.DataFrame:
    """What a LoRA learned in the layer that was found, and in another one."""
    lines = {}
    for name in ("digit-layer", "other-layer"):
        one = kept(f"lora-{name}")
        said = {
            f"{what.replace('_', ' ')}, {when}": round(one[when][what], 2)
            for what in ("new_digit", "shape")
            for when in ("before", "after")
        }
        lines[one["layers"]] = {"weights": one["weights"], "steps": one["steps"], **said}
    return pd.DataFrame(lines).T


def grid(found: dict[str, Any]) -> Picture:
    """The images of two prompts, a row each, in black and white."""
    runs, marks = found["digit"]["runs"], []
    for row, images in enumerate(found["images"]):
        for column, image in enumerate(images):
            left, top = column * (_SIDE + _SPACE), row * (_SIDE + _SPACE) + 6
            if row == 0:
                marks.append(f'<text x="{left}" y="4" font-size="4">{runs[column]}</text>')
            marks.append(f'<rect x="{left}" y="{top}" width="{_SIDE}" height="{_SIDE}" fill="white" stroke="none"/>')
            lines = enumerate(image)
            ink = (
                f"M{left + j} {top + i + 0.5}h1" for i, line in lines for j, value in enumerate(line) if value > _INK
            )
            marks.append(f'<path d="{"".join(ink)}" stroke="black"/>')
    wide, high = len(runs) * (_SIDE + _SPACE), len(found["images"]) * (_SIDE + _SPACE) + 6
    said = "two prompts: their own images, their targets', and those in which layers read the target's text"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="680" role="img"'
    return Picture(f'{head} aria-label="{said}">{"".join(marks)}</svg>')
