"""Does `uw.localise` find the layers that were planted, and what do they do to prompts it was not asked about?

    python examples/diffusion/toy.py WORK
    python examples/diffusion/localising.py WORK

WORK is what `toy.py` trained. Layers are found by 24 prompts whose targets have another digit and another shape; 24
others are then edited in these alone, from several steps on, and prompts with forbidden digits are kept from showing
them. What was found is kept as `results/toy.json` beside this file, from which docs/diffusion.md is made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shown
import torch
import toy

import unwrite as uw
from unwrite.diffusion.scores import quoted, ssim

RESULTS = Path(__file__).parent / "results" / "toy.json"
FOUND_BY, JUDGED_BY = 24, 24
STARTS = (0, 5, 10, 15)
FORBIDDEN, INSTEAD = ("6", "9"), "0"


def asked(seed: int, n: int) -> tuple[list[str], list[str]]:
    """Prompts, and targets with another digit and another shape."""
    rng = np.random.default_rng(seed)
    own = toy.prompts(rng, n)
    moves = zip(own, rng.integers(1, 4, n), rng.integers(1, 10, n), strict=True)
    shapes, digits = toy.SHAPES, toy.DIGITS
    other = [(shapes[(shapes.index(s) + i) % 4], digits[(int(d) + j) % 10]) for (s, d), i, j in moves]
    return [said(*each) for each in own], [said(*each) for each in other]


def said(shape: str, digit: str) -> str:
    """A prompt."""
    return f'{shape} "{digit}"'


def rest(image: np.ndarray, base: np.ndarray) -> float:
    """Structural similarity of all that is left of the digit."""
    left = slice(0, toy.PLACE[1].start - 1)
    return ssim(image[:, left], base[:, left])


SCORES = {
    "target_shape": lambda image, scene: toy.shape_of(image) == scene.target.split()[0],
    "rest": lambda image, scene: rest(image, scene.base),
}


def localised(pipe: Any, work: Path) -> dict[str, Any]:
    """Shares of every layer, by the digit that is read; and by the shape, which another layer draws."""
    own, targets = asked(0, FOUND_BY)
    ask = partial(uw.localise, pipe, own, targets, call=toy.CALL)
    digits = ask(read=toy.read, score=SCORES, checkpoint=work / "digits")
    shapes = ask(score={"target_shape": SCORES["target_shape"]}, pictures=0, checkpoint=work / "shapes")
    return {"digit": told(digits), "shape": told(shapes), "images": pictures(digits)}


def told(found: uw.Result) -> dict[str, Any]:
    """A result as plain values."""
    data = found.data
    names = ("share", "low", "high", "verdict", "path", "parameters")
    return {
        "runs": data["run"].values.tolist(), "words": repr(found).splitlines()[0],
        **{name: data[name].values.tolist() for name in names},
        "mean": {
            str(name): data["mean"].sel(score=name).values.tolist() for name in data["score"].values if name != "psnr"
        },
    }  # fmt: skip


def pictures(found: uw.Result) -> list[Any]:
    """Small images of two prompts, [picture, run, row, column]."""
    return found["image"].values[:2, ..., 0].tolist()


def edited(pipe: Any, layers: Sequence[str]) -> list[dict[str, Any]]:
    """What becomes of prompts that nothing was found by, from several steps on."""
    own, targets = asked(1, JUDGED_BY)
    lines = []
    for start in STARTS:
        seen = []
        for i, (prompt, target) in enumerate(zip(own, targets, strict=True)):
            base, image = (
                uw.diffusion.edit(pipe, prompt, to, layers, start, seed=100 + i, call=toy.CALL)
                for to in (prompt, target)
            )
            seen.append((
                toy.read(image) == quoted(target), toy.read(image) == quoted(prompt),
                toy.shape_of(image) == toy.shape_of(base), rest(image, base),
            ))  # fmt: skip
        new, old, kept, like = np.array(seen, dtype=float).mean(0)
        lines.append({"start": start, "new_digit": new, "old_digit": old, "shape_kept": kept, "rest_ssim": like})
    return lines


def prevented(pipe: Any, layers: Sequence[str]) -> dict[str, Any]:
    """How often a forbidden digit is read in images of prompts that ask for one, without and with prevention."""
    rng, shown, kept = np.random.default_rng(2), [], []
    for i in range(JUDGED_BY):
        prompt = said(toy.SHAPES[rng.integers(4)], FORBIDDEN[i % len(FORBIDDEN)])
        target = uw.diffusion.harmless(prompt, lambda text: text in FORBIDDEN, INSTEAD)
        images = [
            uw.diffusion.edit(pipe, prompt, to, layers, seed=200 + i, call=toy.CALL) for to in (prompt, target)
        ]  # fmt: skip
        shown.append([toy.read(image) in FORBIDDEN for image in images])
        kept.append(toy.shape_of(images[0]) == toy.shape_of(images[1]))
    without, with_ = np.array(shown).mean(0)
    return {"without": float(without), "with": float(with_), "shape_kept": float(np.mean(kept)), "n": JUDGED_BY}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    asked_for = parser.parse_args()
    torch.set_num_threads(1)
    pipe = toy.kept(asked_for.work)
    found = localised(pipe, asked_for.work)
    layers = [run for run, word in zip(found["digit"]["runs"], found["digit"]["verdict"], strict=True)
              if word == "writes the text"]  # fmt: skip
    found |= {
        "planted": {name: f"L{i}" for name, i in toy.PLANTED.items()},
        "layers": layers,
        "steps": toy.CALL["num_inference_steps"],
        "found_by": FOUND_BY,
        "judged_by": JUDGED_BY,
        "edited": edited(pipe, layers),
        "prevented": prevented(pipe, layers),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found) + "\n")
    print(shown.shares(found["digit"]), shown.shares(found["shape"]), shown.edits(found), sep="\n")
    print(found["prevented"])
