"""How does a method see its prompts? The one loop over batches: fixed batches, memory back-off, progress."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unwrite.errors import NumericError, TokensError, counted, number, whole
from unwrite.model.capture import run
from unwrite.model.fold import Folded
from unwrite.model.images import images
from unwrite.model.now import same_now
from unwrite.model.view import Model, require_model
from unwrite.model.writes import Writes
from unwrite.prompts.given import given, holds_images
from unwrite.prompts.given_pairs import pairs_of
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import Tokens
from unwrite.result import Result
from unwrite.run.loop.finite import not_finite, require_finite
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Lasting

_BATCH_TOKENS = 4096
_BATCH_BYTES = 2**28
# Tokens that a processor is done with before a person is impatient; a block is nearly as fast on so few.
_SOON = 256
# Seconds between two words of one step.
_BETWEEN = 0.5


@dataclass(frozen=True)
class Batch:
    """Prompts [first, first + len(counted)) of the tokens, filled up with repeats so that every batch has one shape.

    `ids` [prompt, position] as the model sees them; `counted` says which rows are real tokens and not a repeat; `share`
    (k, n): of what is to be done with them the part k of n, where a stage divides that.
    """

    index: int
    first: int
    real: int
    ids: Int[Tensor, "prompt position"]
    counted: Bool[Tensor, "prompt position"]
    share: tuple[int, int] = (0, 1)

    def beyond(self, skip: int) -> Bool[Tensor, "prompt position"]:
        """The counted rows without the first `skip` positions of each prompt."""
        return self.counted & (torch.arange(self.ids.shape[1]) >= skip)

    def part(self, rows: slice) -> Batch:
        """Some of its prompts; `real` is 0 where they are all repeats."""
        real = max(0, min(self.real, rows.stop) - rows.start)
        return Batch(self.index, self.first + rows.start, real, self.ids[rows], self.counted[rows], self.share)

    def require_finite(self, lm: Model, finite: Bool[Tensor, "row node"], prompt: Tensor, place: Tensor) -> None:
        """Raise NumericError naming the first node, in write order, that is not finite at some row of this batch.

        In write order, since a bad write spoils the later ones, at other positions too.
        """
        if finite.all():
            return
        node, row = (int(index) for index in (~finite).t().nonzero()[0])
        layer = lm.parts[node].layer
        raise not_finite(
            f"an activation is not finite: {lm.parts[node]} ({f'layer {layer}' if layer >= 0 else 'input'}) "
            f"at prompt {self.first + int(prompt[row])}, position {int(place[row])}"
        )

    def require_sums(self, sums: Iterable[Tensor], what: str) -> None:
        """Raise NumericError naming these prompts where `what`, summed over some of their rows, is not finite."""
        if not all(part.isfinite().all() for part in sums):
            among = f"{what} is not finite among prompts {self.first} to {self.first + self.real - 1}"
            raise not_finite(among, "find the prompt by smaller batches and leave it out")

    def require_numbers(self, finite: Bool[Tensor, "prompt position"], what: str) -> None:
        """Raise NumericError naming the first prompt and position at which `what` is not finite."""
        require_finite(finite, f"{what} is not finite at {{prompt}}, {{position}}", prompt=self.first, position=0)


@dataclass(frozen=True)
class Progress:
    """How far a method is: `done` of `total` prompts, tokens so far, seconds since the start.

    `before` of them were done before this start of a run. `result` is there where a part of a longer run is finished:
    what it found. Where a batch takes long, `begun` is how much of its prompts is done, and `doing` says that in what
    the method counts there ("87/301 nodes"). `stopping`: an interrupt came, and waits for the step that is under way.
    """

    stage: str
    done: int
    total: int
    tokens: int
    seconds: float
    result: Result | None = None
    before: int = 0
    begun: float = 0.0
    doing: str = ""
    stopping: bool = False

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float:
        """Seconds to go at the rate so far."""
        done = self.done + self.begun
        now = done - self.before
        return self.seconds * (self.total - done) / now if now else float("inf")


Listener = Callable[[Progress], None]


@runtime_checkable
class Tally(Protocol):
    """What a method keeps while batches go by."""

    @property
    def kept(self) -> Lasting:
        """All that it keeps between two batches."""
        ...

    def step(self, batch: Batch) -> None:
        """Count one batch."""


def batch_size(lm: Model, tokens: Tokens, wanted: int | None = None, held: int = 1, whole_only: bool = False) -> int:
    """Prompts per batch: `wanted`, or about 4,096 tokens, fewer where the factors of all writes would pass 256 MiB.

    `held`: how many such runs a method holds at once; each gets its part. `whole_only`: a batch that is begun has to be
    done before an interrupt is obeyed, so on a processor it is short.

    Raises NumericError unless `wanted` is a positive integer.
    """
    if wanted is not None:
        return min(whole("batch is a number of prompts", wanted, 1), len(tokens))
    most = _SOON if whole_only and lm.device.type == "cpu" else _BATCH_TOKENS
    factors = (2 * len(lm.layers) + 2) * lm.d_model * torch.finfo(lm.compute_dtype).bits // 8
    return max(1, min(len(tokens), min(most, _BATCH_BYTES // factors) // (held * tokens.length)))


def alike(pairs: Pairs, keys: Iterable[object], most: int) -> Iterator[Batch]:
    """Pairs of one key that are neighbours, at most so many at a time."""
    first = 0
    for _, same in groupby(keys):
        last = first + len(list(same))
        for start in range(first, last, most):
            own = pairs.base.take(range(start, min(start + most, last)))
            yield replace(next(batches(own, len(own))), first=start)
        first = last


def admit(
    lm: Model, tokens: Any, mask: Any, skip: int, bos: int | bool | None = None, *, files: bool = True,
    sees: bool = False,
) -> Tokens:  # fmt: skip
    """`tokens`, or text in any shape that `given` takes, as Tokens that this model can read and count.

    Where the method `sees`, also what a processor returned, with images. Raises TokensError for ids or lengths that the
    model does not have, NumericError if `skip` leaves nothing, and ModelError for what is no model.
    """
    require_model(lm)
    if sees and mask is None and bos is None and holds_images(tokens):
        tokens = images(lm, tokens)
    tokens = given(tokens, lm.tokenizer, mask, bos, lm.context, files)
    _require_seen(lm, tokens, sees)
    tokens.check(lm.vocabulary, lm.context)
    longest = int(tokens.lengths.max())
    whole("skip leaves no position to count", skip, 0, longest - 1)
    return tokens


def _require_seen(lm: Model, tokens: Tokens, sees: bool) -> None:
    """Raise TokensError for images where a method reads text alone, and for those that another model saw."""
    if tokens.images is not None and not sees:
        raise TokensError(
            "this method reads text alone", got=tokens.source, expected="prompts without images",
            fix="scan, verify, survival, dla, effects and paths take prompts with images",
        )  # fmt: skip
    if tokens.images is not None and tokens.images not in lm.images:
        raise TokensError(
            "another model saw the images of these prompts", fix="read them with uw.images and the model that is asked"
        )


def admit_pairs(lm: Model, pairs: Any, bos: int | bool | None = None, sees: bool = False) -> Pairs:
    """Pairs, in any shape that `pairs_of` takes, that this model can read. Raises TokensError as these do."""
    require_model(lm)
    lm.require("logits")
    pairs = pairs_of(pairs, lm.tokenizer, bos)
    for part in (pairs.base, pairs.source):
        _require_seen(lm, part, sees)
    pairs.check(lm.vocabulary, lm.context)
    return pairs


def admit_floor(floor: float) -> float:
    """`floor` as a fraction of the stream's norm. Raises NumericError for anything but a number in [0, 1)."""
    number("floor is a fraction of the stream's norm", floor, "at least 0, below 1", lambda floor: 0 <= floor < 1)
    return floor


def batches(tokens: Tokens, size: int, which: range | None = None) -> Iterator[Batch]:
    """The batches of `tokens`, fixed by the prompts' global index: batch i holds prompts i·size … (i+1)·size − 1."""
    position = torch.arange(tokens.length)
    for index in range(-(-len(tokens) // size)) if which is None else which:
        first = index * size
        real = min(size, len(tokens) - first)
        prompts = [first + min(i, real - 1) for i in range(size)]
        counted = position < torch.from_numpy(tokens.lengths[prompts])[:, None]
        counted[real:] = False
        yield Batch(index, first, real, torch.from_numpy(tokens.ids[prompts]), counted)


def stream(
    lm: Model, tokens: Tokens, tally: Tally, size: int, stage: str, listener: Listener | None, job: Job,
    everywhere: bool = False, divided: bool = False,
) -> None:  # fmt: skip
    """Give the tally every batch that is this job's and not done yet, in order, and tell the listener how far it is.

    Afterwards the tally holds the whole, or in a job that does a part of the work that part. A step that takes long
    says between whiles how far it is, by `job.tick(kept, 0.29, "87/301 nodes")`, which also keeps what is done. In a
    job that does a part, what is short and decides about the rest is done `everywhere`: all batches of it. What is to
    be done with a batch may be `divided`, too, so that no process has more to do than another.
    """
    done = job.stage(stage, -(-len(tokens) // size), [tokens.hash, size], everywhere, divided)
    left, parts = done.resume(tally.kept), done.parts
    first, end = done.span.start // parts * size, min(-(-done.span.stop // parts) * size, len(tokens))
    start, seen, before = time.monotonic(), 0, max(min(left.start // parts * size, end) - first, 0)
    told = start

    def tell(prompts: int, part: float = 0.0, doing: str = "", stopping: bool = False, of: Batch | None = None) -> None:
        nonlocal told
        soon = of is not None and not stopping and time.monotonic() < told + _BETWEEN
        if listener is None or end <= first or soon:
            return
        told = time.monotonic()
        tokens, begun = (0, 0.0) if of is None else (int(part * int(of.counted.sum())), part * of.real)
        step = Progress(stage, prompts, end - first, seen + tokens, told - start, before=before)
        listener(replace(step, begun=begun, doing=doing, stopping=stopping))

    if not left:
        tell(end - first)
    for unit in left:
        batch = _unit(tokens, size, unit, parts)
        if not job.checked:
            _require_same(lm, batch)
            job.checked = True
        job.heard = partial(tell, batch.first - first, of=batch)
        with job.unbroken():
            tally.step(batch)
            done.done(tally.kept, unit, now=job.interrupted)
        seen += int(batch.counted.sum()) // parts
        over = unit + 1 == done.span.stop or (unit + 1) % parts == 0
        tell(batch.first + batch.real * over - first)
        if job.interrupted:
            raise KeyboardInterrupt
    if not everywhere:
        job.gather(tally.kept)


def _unit(tokens: Tokens, size: int, unit: int, parts: int) -> Batch:
    """A batch, or of what is to be done with it one of so many parts."""
    index, part = divmod(unit, parts)
    return replace(next(batches(tokens, size, range(index, index + 1))), share=(part, parts))


def _require_same(lm: Model, batch: Batch) -> None:
    """Raise ModelError unless what is recorded of the shortest prompt is the model; for two prompts' part of a pass."""
    if lm.certificate is None:
        return
    lengths = batch.counted[: batch.real].sum(1)
    shortest, length = int(lengths.argmin()), int(lengths.min())
    ids = batch.part(slice(shortest, shortest + 1))
    if batch.real == 1:  # two passes, each of half a prompt
        length = min(length, -(-ids.ids.shape[1] // 2))
        ids = replace(ids, ids=ids.ids[:, :length], counted=ids.counted[:, :length])
    for _ in parts(ids, lambda part: same_now(lm, part.ids, length)):
        pass


def forward(lm: Model, batch: Batch, folded: tuple[Folded, ...]) -> Iterator[tuple[slice, Writes]]:
    """The writes of a batch, in as many parts as memory asks for. Raises NumericError as `parts` does."""
    return parts(batch, lambda part: run(lm, part.ids, folded))


V = TypeVar("V")


def parts(batch: Batch, measure: Callable[[Batch], V]) -> Iterator[tuple[slice, V]]:
    """What `measure` finds in a batch, in as many parts as memory asks for.

    Out of memory, what nobody uses is given back and the part repeated, to the same bits; where that did not help,
    parts are halved, which rounds otherwise. `measure` must only compute: what is handed out was computed to the end,
    so whoever adds it up counts nothing twice. Raises NumericError when even one prompt does not fit.
    """
    at, size, cleared = 0, len(batch.ids), False
    while at < len(batch.ids):
        rows = slice(at, min(at + size, len(batch.ids)))
        try:
            found = measure(batch.part(rows))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if cleared and size == 1:
                raise NumericError(
                    f"prompt {batch.first + at} does not fit into memory",
                    got=counted(batch.ids.shape[1], "token"), fix="use a smaller length, or a device with more memory",
                ) from error  # fmt: skip
        else:
            yield rows, found
            at = rows.stop
            continue
        # Only here, since the error held all that was computed.
        if cleared:
            size = -(-size // 2)
        else:
            _give_back()
            cleared = True


def fitting(work: Callable[[], V], what: str) -> V:
    """What work of no batch finds, once more after what nobody uses was given back; NumericError if it does not fit."""
    for last in (False, True):
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if last:
                raise NumericError(f"{what} does not fit into memory", fix="use a device with more memory") from error
        _give_back()
    raise AssertionError


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def device_memory() -> int:
    """Bytes that this process held at most on all CUDA devices; 0 where it used none."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return sum(torch.cuda.max_memory_allocated(device) for device in devices)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
