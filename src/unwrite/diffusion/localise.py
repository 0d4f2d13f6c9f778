"""Which layers write the text in an image? Each one given the text of another prompt, while all else is as it was.

Staniszewski et al. 2025, arXiv 2502.09935, sections 3 and 4.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from unwrite.diffusion.passes import WAYS, Exchange, Way, way_of
from unwrite.diffusion.scores import Comparison, Measures, quoted, scores
from unwrite.diffusion.view import Image, Painter, TextLayer, painter, written
from unwrite.errors import NodeError, NumericError, TokensError, counted, one_of, require, shown, whole
from unwrite.files import version
from unwrite.result import Result, build, quantity
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Listener, Progress
from unwrite.stats.text_layers import RULES, changes, shares, word

SOURCE, TARGET, ALL = "source", "target", "all"
_SHARE = "Σ over prompts of (value − that of source) / Σ of (that of all − that of source)"
_ALL_TOGETHER = "95 % interval, so wide that those of all layers hold together"
# A picture of the grid has at most so many rows and columns of pixels.
_PIXELS = 96


def localise(
    pipe: Any, prompts: Any, targets: Any, layers: Any = None, start: int = 0, *, read: Any = None, score: Any = None,
    put: str | None = None, call: Any = None, seed: int = 0, pictures: int = 4,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """Which cross- or joint-attention layers write the text in an image (needs `unwrite[diffusion]`).

    Every prompt is drawn from one noise as it is, as its target is, and as it is with the target's text in all layers
    and in each of `layers`: so many images, prompts × (3 + layers), are what it costs. Under guidance only the rows of
    the prompt are exchanged, and a pooled embedding, which is a second way for text into an image, never is.
    Arguments: `pipe` a pipeline of diffusers with a UNet or a transformer (SDXL, IF, SD3, FLUX); `prompts` and
    `targets` strings, one target for each; `layers` numbers in the order of execution, names ("L55"), or sets of them
    ("L55+L56", [55, 56]), by default each by itself; `start` the first step with the target's text; `read` what reads
    text in an image ([row, column, channel] from 0 to 1), such as `uw.diffusion.tesseract()`; `score` more scores by
    name, functions (image, scene) whose scene holds prompt, target, text, target_text, base and aim (the images of
    source and target); `put` "kv" (A: keys and values of every step of the target's run) or "embedding" (B: the
    target's embedding, in cross-attention alone), by default B where it is enough; `call` what else the pipeline is
    called with, such as {"num_inference_steps": 28}; `seed` of the first prompt's noise, the next has the next;
    `pictures` of how many prompts images are kept, small; `checkpoint` as in `uw.scan`: functions are known by name.
    Returns a Result by `run` (source, target, all, and each of `layers`): `value[score, run, prompt]`, `mean[score,
    run]`; of the score that says how much of the target's text is there (`target_text`: F1 of words that are read;
    without `read` the first of `score`) `share[run]` of what all layers together do, `low`, `high` and `verdict` by
    rules that are its equation; `path[run]`, `parameters[run]` (weights that make keys and values of text), and
    `image[picture, run, row, column, channel]`, which `figure()` sets into a grid.
    Raises ModelError for what is no such pipeline and without the extra, TokensError for prompts that are no texts,
    NodeError for unknown layers, NumericError for a score that is no number.

    Example: `uw.localise(pipe, 'A sign that says "STOP"', 'A sign that says "TAXI"', read=uw.diffusion.tesseract())`
    """
    asked = _asked(prompts, targets, start, put, seed, pictures, scores(read, score), _plain(call))
    one = painter(pipe, asked.prompts[0], call)
    sets = sets_of(one, layers)
    settings = {**asked.settings, "layers": [*sets], "call": _plain(call)}
    about = one.about((*asked.prompts, *asked.targets))
    input_ = hashlib.sha256(json.dumps([asked.prompts, asked.targets]).encode()).hexdigest()
    with opened(checkpoint, listener) as job:
        if done := job.asked("localise", about, {"": input_}, settings):
            return done
        tally = _Tally(asked, one, {ALL: one.layers, **sets}, way_of(one.layers, put), job)
        _stream(tally, listener, input_)
        model = {**about, "diffusers": version("diffusers")}
        read_ = {"": {"source": "prompts", "prompts": len(asked.prompts), "hash": input_}}
        return job.signed(build("localise", _dataset(tally), settings, model, read_))


@dataclass(frozen=True, eq=False)
class _Asked:
    prompts: list[str]
    targets: list[str]
    start: int
    seed: int
    pictures: int
    scores: Measures
    settings: Mapping[str, Any]

    def scene(self, i: int, base: Image, aim: Image) -> Comparison:
        """What the images of a prompt are compared with."""
        own, theirs = self.prompts[i], self.targets[i]
        return Comparison(own, theirs, quoted(own), quoted(theirs), base, aim)


def _asked(
    prompts: Any, targets: Any, start: Any, put: Any, seed: Any, pictures: Any, measured: Measures, call: Any
) -> _Asked:
    own, theirs = written("prompts", prompts), written("targets", targets)
    if len(own) != len(theirs):
        raise TokensError("every prompt has one target", got=f"{len(own)} prompts, {len(theirs)} targets")
    silent = [text for text in (*own, *theirs) if measured.read is not None and not quoted(text)]
    if silent:
        raise TokensError("a prompt quotes no text that could be read", got=shown(silent[0]), expected='… "STOP"')
    if put is not None:
        one_of("put", put, WAYS, "None")
    start = whole("start is a step", start, 0, 10**6)
    seed, pictures = whole("seed", seed, 0), whole("pictures is a number of prompts", pictures, 0)
    settings = {
        "prompts": own, "targets": theirs, "start": start, "put": put, "seed": seed, "pictures": pictures,
        "scores": measured.about,
    }  # fmt: skip
    return _Asked(own, theirs, start, seed, pictures, measured, settings)


def _plain(call: Any) -> Any:
    """What a pipeline is called with, as it can be written down."""
    try:
        return json.loads(json.dumps(call, default=np.generic.item))
    except (TypeError, ValueError):
        raise NumericError(
            "call is what the pipeline is called with", got=shown(call), expected="numbers, texts and lists by name"
        ) from None


def sets_of(one: Painter, layers: Any) -> dict[str, tuple[TextLayer, ...]]:
    """Sets of layers by name, each layer by itself where none are named. Raises NodeError for unknown ones."""
    if layers is None:
        return {f"L{i}": (layer,) for i, layer in enumerate(one.layers)}
    listed: Any = layers
    if isinstance(layers, (str, int, np.integer)) and not isinstance(layers, bool):
        listed = [layers]
    fits = isinstance(listed, (list, tuple, range)) and len(listed) > 0
    require(fits, NodeError, "layers are numbers or names", layers, '"L3"')
    found: dict[str, tuple[TextLayer, ...]] = {}
    for each in listed:
        numbers = sorted({number for part in _several(each) for number in _numbers(part, len(one.layers))})
        found["+".join(f"L{i}" for i in numbers)] = tuple(one.layers[i] for i in numbers)
    return found


def _several(each: Any) -> Iterable[Any]:
    if isinstance(each, (list, tuple, range)) and len(each):
        return each
    return each.split("+") if isinstance(each, str) else [each]


def _numbers(part: Any, most: int) -> Iterable[int]:
    number = part.strip().removeprefix("L") if isinstance(part, str) else part
    known = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    i = int(number) if known or (isinstance(number, str) and number.isascii() and number.isdecimal()) else -1
    if not 0 <= i < most:
        raise NodeError("no such layer reads text", got=shown(part), expected=f"L0 to L{most - 1}")
    return [i]


class _Tally:
    """What is found of every prompt and run, and images of the first prompts."""

    def __init__(self, asked: _Asked, one: Painter, sets: Mapping[str, tuple[TextLayer, ...]], way: Way, job: Job):
        self.asked, self.painter, self.sets, self.job = asked, one, sets, job
        self._way: Way = way
        self.runs = (SOURCE, TARGET, *sets)
        self.found: Arrays = {}
        self.kept = Ledger({"found": self.found})

    def step(self, i: int) -> None:
        """All images of one prompt that are not there yet."""
        asked = self.asked
        exchange = Exchange(
            self.painter,
            asked.prompts[i],
            asked.targets[i],
            asked.seed + i,
            asked.start,
            self._way,
            self.painter.layers,
        )
        scene = asked.scene(i, exchange.base(), exchange.aim())
        images = {SOURCE: lambda: scene.base, TARGET: lambda: scene.aim}
        images |= {name: lambda layers=layers: exchange.changed(layers) for name, layers in self.sets.items()}
        for n, (run, image) in enumerate(images.items(), 1):
            if f"{i} {run}" not in self.found:
                self._keep(i, run, image(), scene)
                self.job.tick(self.kept, n / len(self.runs), f"{n}/{len(self.runs)} images")

    def _keep(self, i: int, run: str, image: Image, scene: Comparison) -> None:
        own = {f"{i} {run}": self.asked.scores.of(image, scene)}
        if i < self.asked.pictures:
            own[f"{i} {run} image"] = small(image)
        self.found |= own

    def values(self) -> np.ndarray:
        """[score, run, prompt]."""
        n = len(self.asked.prompts)
        return np.array([[self.found[f"{i} {run}"] for i in range(n)] for run in self.runs]).transpose(2, 0, 1)

    def images(self) -> np.ndarray:
        """[picture, run, row, column, channel]; of prompts with images of other sizes none."""
        shown_ = [[self.found.get(f"{i} {run} image") for run in self.runs] for i in range(self.asked.pictures)]
        there = [each for each in shown_ if each[0] is not None]
        alike = [each for each in there if {one.shape for one in each} == {there[0][0].shape}]  # pyright: ignore
        return np.array(alike) if alike else np.zeros((0, len(self.runs), 1, 1, 1), dtype=np.uint8)


def small(image: Image) -> np.ndarray:
    """An image in 8 bits, of at most 96 rows and columns: means of squares of pixels."""
    by = -(-max(image.shape[:2]) // _PIXELS)
    rows, columns = (size // by * by for size in image.shape[:2])
    squares = image[:rows, :columns].reshape(rows // by, by, columns // by, by, -1).mean((1, 3))
    return np.clip(255 * squares + 0.5, 0, 255).astype(np.uint8)


def _stream(tally: _Tally, listener: Listener | None, input_: str) -> None:
    """Prompt by prompt, kept and told as every long run is; the first thing told is how many images there will be."""
    job, total = tally.job, len(tally.asked.prompts)
    stage = job.stage("localise", total, input_)
    left, began = stage.resume(tally.kept), time.monotonic()
    each = counted(len(tally.runs), "image")

    def tell(done: int, part: float = 0.0, doing: str = "", stopping: bool = False) -> None:
        if listener is not None:
            spent = time.monotonic() - began
            listener(Progress("localise", done, total, 0, spent, None, left.start, part, doing, stopping))

    tell(left.start, doing=f"{each} for each of {counted(len(left), 'prompt')}")
    for i in left:
        job.heard = lambda part, doing, stopping, i=i: tell(i, part, doing, stopping)
        with job.unbroken():
            tally.step(i)
            stage.done(tally.kept, i, now=job.interrupted)
        tell(i + 1)
        if job.interrupted:
            raise KeyboardInterrupt


def _dataset(tally: _Tally) -> xr.Dataset:
    """Everything that was found, named."""
    measured, values, layers = tally.asked.scores, tally.values(), tally.sets
    with np.errstate(invalid="ignore"):
        mean = values.mean(-1)
    how = "; ".join(f"{name}: {measured.equation(name)}" for name in measured.names)
    paths = ["", "", *(" ".join(layer.path for layer in own) if name != ALL else "" for name, own in layers.items())]
    weights = [0, 0, *(sum(layer.parameters for layer in own) for own in layers.values())]
    variables: dict[str, Any] = {
        "value": quantity(("score", "run", "prompt"), values, "1", how),
        "mean": quantity(("score", "run"), mean, "1", "mean over prompts of value"),
        "path": ("run", np.array(paths, dtype=object)),
        "parameters": quantity(("run",), np.array(weights), "weights", "of keys and values of text, without biases"),
        "image": quantity(
            ("picture", "run", "row", "column", "channel"), tally.images(), "1", "grey values of 8 bits, made small"
        ),
        "prompt_text": ("prompt", np.array(tally.asked.prompts, dtype=object)),
        "target_text": ("prompt", np.array(tally.asked.targets, dtype=object)),
    }
    axes = {
        "score": np.array(measured.names, dtype=object), "run": np.array(tally.runs, dtype=object),
        "prompt": np.arange(values.shape[-1]),
    }  # fmt: skip
    judged, attributes = _judged(tally, values)
    return xr.Dataset(variables | judged, axes).assign_attrs(attributes)


def _judged(tally: _Tally, values: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shares of each set of layers, with intervals and words; of a run without a score of text none."""
    by, runs = tally.asked.scores.by, tally.runs
    attributes: dict[str, Any] = {"by": by, "start": tally.asked.start, "layers": len(tally.painter.layers)}
    attributes |= {"put": tally._way, "prompts": values.shape[-1]}
    if not by:
        return {}, attributes
    own = values[tally.asked.scores.names.index(by)]
    gain, every = (own - own[0]).T, own[runs.index(ALL)] - own[0]
    first = runs.index(ALL) + 1
    moved = changes(every)
    found = [np.full((first, 3), np.nan), np.stack(shares(gain[:, first:], every), -1)]
    share, low, high = np.concatenate(found).T
    words = [""] * first + [word(*ends, len(every), moved[1]) for ends in zip(low[first:], high[first:], strict=True)]
    rules = "; ".join(f"{name}: {rule}" for name, rule in RULES.items())
    attributes |= dict(zip(("moved", "moved_low", "moved_high"), moved, strict=True))
    return {
        "share": quantity(("run",), share, "1", f"{_SHARE}, by {by}"),
        "low": quantity(("run",), low, "1", _ALL_TOGETHER), "high": quantity(("run",), high, "1", _ALL_TOGETHER),
        "verdict": quantity(("run",), np.array(words, dtype=object), "1", rules),
    }, attributes  # fmt: skip
