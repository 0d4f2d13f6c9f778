"""What happens to an image if some layers read another prompt? Keys and values of the text exchanged while it is made.

(A) "kv": keys and values of the text are recorded at every step of the target's run and put into the source's run.
(B) "embedding": layers that make them of the prompt alone are given the target's embedding; the same by less memory.
Both replace only the rows of a batch that are the prompt's: under guidance the other half is another prompt's. Which
rows these are is seen, not assumed: those in which the two runs give the denoiser other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from unwrite.diffusion.view import TEXT, Image, Painter, TextLayer, text_of
from unwrite.errors import ModelError, NumericError, TokensError, counted
from unwrite.model.hooks import Call, Handle, after, called, given

Way = Literal["kv", "embedding"]
WAYS = ("kv", "embedding")


def way_of(layers: Sequence[TextLayer], wanted: str | None = None) -> Way:
    """How the text of these layers is exchanged: by the embedding where that is enough."""
    alone = all(layer.kind == "cross" for layer in layers)
    if wanted == "embedding" and not alone:
        other = next(layer for layer in layers if layer.kind != "cross")
        raise ModelError(
            "these layers do not make their keys of the prompt's embedding alone", got=f"{other.path}, {other.kind}",
            fix='put="kv"',
        )  # fmt: skip
    return "kv" if wanted == "kv" or not alone else "embedding"


@dataclass(eq=False)
class Clock:
    """Which call of the denoiser is this, and what text was it given? For one image."""

    texts: list[Tensor] = field(default_factory=list)

    @property
    def now(self) -> int:
        """The number of the call that is under way."""
        return len(self.texts) - 1

    def begin(self, call: Call) -> None:
        """A call begins."""
        self.texts.append(text_of(call))


@dataclass(eq=False)
class Exchange:
    """Two prompts, from the same noise: the image of one, in which chosen layers read the text of the other."""

    painter: Painter
    prompt: str
    target: str
    seed: int
    start: int
    way: Way
    layers: Sequence[TextLayer]
    # What the target's run has, by call of the denoiser, layer and what it is; and in which rows.
    _kept: dict[tuple[int, str, str], Tensor] = field(init=False, default_factory=dict)
    _rows: list[Int[Tensor, " row"]] = field(init=False, default_factory=list)
    _length: int = field(init=False, default=0)
    # One tensor is given to many layers, and at many steps: it is kept once.
    _last: tuple[Tensor, Tensor] | None = field(init=False, default=None)
    _texts: list[Tensor] = field(init=False, default_factory=list)

    def base(self) -> Image:
        """The prompt's own image. Raises NumericError where it is done in fewer steps than are left as they are."""
        clock = Clock()
        image = self.painter.paint(self.prompt, self.seed, self._timed(clock))
        self._texts = clock.texts
        return image

    def aim(self) -> Image:
        """The target's image, whose text is kept. Raises TokensError for prompts of unequal lengths."""
        clock = Clock()
        self._rows.clear()
        self._kept.clear()

        def visits() -> Iterator[Handle]:
            yield from self._timed(clock, self._compared)
            for layer, name, site in self._sites(self.layers):
                yield site(lambda seen, layer=layer, name=name: self._keep(clock.now, layer, name, seen))

        image = self.painter.paint(self.target, self.seed, visits())
        steps = sum(len(rows) > 0 for rows in self._rows)
        if len(clock.texts) != len(self._texts):
            raise ModelError(
                "the two runs take unequal numbers of steps", got=f"{len(self._texts)}, {len(clock.texts)}"
            )
        if self.start >= max(steps, 1) and steps:
            raise NumericError("start is after the last step", got=self.start, expected=f"at most {steps - 1}")
        return image

    def changed(self, layers: Sequence[TextLayer]) -> Image:
        """The prompt's image, with the target's text in these layers.

        Raises ModelError where one of them is never asked for its keys: it computes in another way.
        """
        clock, seen = Clock(), set[str]()

        def instead(layer: TextLayer, name: str, own: Tensor) -> Tensor | None:
            seen.add(layer.path)
            return self._put(clock.now, layer, name, own)

        def visits() -> Iterator[Handle]:
            yield from self._timed(clock)
            for layer, name, site in self._sites(layers):
                yield site(lambda own, layer=layer, name=name: instead(layer, name, own))

        image = self.painter.paint(self.prompt, self.seed, visits())
        missed = [layer.path for layer in layers if layer.path not in seen]
        if missed:
            raise ModelError(
                "a layer makes its keys and values in a way that cannot be seen", got=missed[0],
                fix="take off what fuses or replaces them (fused projections, IP-Adapters, a compiled denoiser)",
            )  # fmt: skip
        return image

    def _timed(self, clock: Clock, more: Callable[[Clock], None] = lambda _: None) -> Iterator[Handle]:
        def begin(call: Call) -> None:
            clock.begin(call)
            more(clock)

        yield called(self.painter.denoiser, begin)

    def _compared(self, clock: Clock) -> None:
        """In which rows does this call of the denoiser have other text than in the prompt's own run?"""
        i, theirs = clock.now, clock.texts[-1]
        if i >= len(self._texts):
            raise ModelError("the two runs take unequal numbers of steps", got=f"more than {counted(i, 'call')}")
        own = self._texts[i]
        if own.shape != theirs.shape:
            raise TokensError(
                "a prompt and its target are of unequal lengths", got=f"{own.shape[1]} and {theirs.shape[1]} positions",
                fix="have the pipeline pad both to one length",
            )  # fmt: skip
        self._length = theirs.shape[1]
        self._rows.append((own != theirs).flatten(1).any(1).nonzero()[:, 0])

    def _sites(self, layers: Iterable[TextLayer]) -> Iterator[tuple[TextLayer, str, Callable[..., Handle]]]:
        for layer in layers:
            if self.way == "embedding":
                yield layer, "text", lambda visit, layer=layer: given(layer.module, TEXT, visit)
                continue
            for name, module in zip(("key", "value"), layer.projections, strict=True):
                yield layer, name, lambda visit, module=module: after(module, visit)

    def _step(self, call: int) -> int:
        """Which step a call is: those that have other text count."""
        return sum(len(rows) > 0 for rows in self._rows[:call])

    def _keep(self, call: int, layer: TextLayer, name: str, seen: Tensor) -> None:
        rows = self._rows[call]
        if not len(rows) or self._step(call) < self.start:
            return
        if self._last is None or self._last[0] is not seen:
            self._last = seen, seen[rows, self._text(layer)].detach().cpu()
        self._kept[call, layer.path, name] = self._last[1]

    def _put(self, call: int, layer: TextLayer, name: str, own: Tensor) -> Tensor | None:
        theirs = self._kept.get((call, layer.path, name))
        if theirs is None:
            return None
        new = own.clone()
        new[self._rows[call], self._text(layer)] = theirs.to(new)
        return new

    def _text(self, layer: TextLayer) -> slice:
        """Where the text stands in what a layer reads."""
        return slice(self._length if layer.kind == "mixed" else None)


def painted(exchange: Exchange, layers: Sequence[TextLayer]) -> Image:
    """The image alone: both runs, then that with the target's text in these layers."""
    exchange.base()
    exchange.aim()
    return exchange.changed(layers)
