"""Where does a long run keep what is done, and which part of the work is its own?

A run that was stopped, however, goes on from its folder to the same bits: what is kept are whole batches, and the sums
over them do not depend on who added them or when. So several processes can share the batches, too: shards of any
scheduler, each with a folder of its own, or the ranks of torchrun, which tell each other.
"""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from unwrite import files
from unwrite import result as results
from unwrite.errors import ModelError, ResultError, function, number, require, several
from unwrite.model.identity import identity
from unwrite.model.load import weights_hash
from unwrite.model.onednn import fast
from unwrite.model.view import Model
from unwrite.result import Result
from unwrite.run.loop import checkpoint
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.ledger import Lasting
from unwrite.run.loop.spent import HOSTS, Spent

SECONDS = 30.0
_KEY, _UNFINISHED = "key", "unfinished"
# The array of a stage that says which batch comes next.
_NEXT = "next"
_LOCK = "unwrite.lock"


@runtime_checkable
class Peers(Protocol):
    """Other processes that work on the same run."""

    def gather(self, state: Arrays) -> Iterator[Arrays]:
        """What all others kept, at the first of them; nothing elsewhere."""
        ...


class _PartDone(Exception):
    """A part of a run is done; the rest of the method wants the whole."""


@dataclass(eq=False)
class Job:
    """A long run's folder, inside a `with`; hand it to a method as its `checkpoint`.

    Every `every` seconds what is done goes to a file in `folder` (None: nothing is kept); the same call goes on from
    there. `shard` (i, n) does the i-th of n parts of the batches: the `with` ends where the whole is needed, and a
    Job with the folders of all n shards as `of` puts them together. Whoever works in a folder holds a lock in it, which
    dies with the process.
    Raises ResultError where the folder is in use, cannot be written or holds another run.

    Example: `with uw.Job("run", every=600) as job: found = uw.scan(lm, tokens, checkpoint=job)`
    """

    folder: str | Path | None = None
    every: float = SECONDS
    shard: tuple[int, int] = (1, 1)
    of: Iterable[str | Path] = ()
    peers: Peers | None = None
    # What the first method asked, which those that it combines are parts of; and what each asked last.
    key: str = field(init=False, default="")
    _asked: dict[str, str] = field(init=False, default_factory=dict)
    finished: bool = field(init=False, default=False)
    # Was the model found to be what is recorded of it? Once is enough for all methods of a run.
    checked: bool = field(init=False, default=False)
    _now: str = field(init=False, default="")
    _stages: list[Stage] = field(init=False, default_factory=list)
    _open: bool = field(init=False, default=False)
    _came: list[int] = field(init=False, default_factory=list)
    # Who wants to know how far a step is: which part of its batch is done, that in words, and is the run to stop?
    heard: Callable[[float, str, bool], object] = field(init=False, default=lambda *_: None)
    _done: tuple[float, str] = field(init=False, default=(0.0, ""))
    _began: float = field(init=False, default_factory=time.monotonic)
    # In earlier starts of the same run, and elsewhere.
    _before: Spent = field(init=False, default=Spent())
    # Until its end: its lock, and what makes the products of all passes.
    _held: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.folder = None if self.folder is None else files.possible(self.folder)
        number("every is a number of seconds", self.every, "0 or more", lambda every: every >= 0)
        part, of = self.shard if isinstance(self.shard, tuple) and len(self.shard) == 2 else (0, 0)
        fits = type(part) is type(of) is int and 1 <= part <= of
        require(fits, ResultError, "a shard is a part of a run", self.shard, "(i, n) with 1 ≤ i ≤ n")
        self.of = tuple(map(files.possible, several("of says where shards are", self.of, "their folders", ResultError)))
        fits = isinstance(self.peers, Peers | None)
        require(fits, ResultError, "peers are other processes", self.peers, "what has a method gather")

    def __enter__(self) -> Job:
        if self.folder is not None:
            place = Path(self.folder)
            self._held.callback(checkpoint.unlocked, checkpoint.locked(self._named(place, _LOCK)))
            # What a process that was killed had not written to its end; nobody else works on these.
            for rest in place.glob(f"{self._named(place, '.*.npz').name}.*"):
                rest.unlink()
        self._open, self._began, self._before = True, time.monotonic(), Spent()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """What is done stays where the run was stopped, and of a shard; after the end of a run nothing is left."""
        try:
            if kind is None:
                for path in self._left():
                    checkpoint.remove(path)
                for path in (stage.path for stage in self._stages if stage.path is not None):
                    for other in [path] if self.peers is None else path.parent.glob(f"{path.name.split('.')[0]}.*.npz"):
                        checkpoint.remove(other)
        finally:
            self._stages, self._open, self.key, self._asked, self._now = [], False, "", {}, ""
            self.checked = False
            self._held.close()
        return kind is _PartDone

    def _left(self) -> list[Path]:
        """Where the folder had the result already: what a process did not come to remove that was killed after that."""
        if self.folder is None or not self.finished:
            return []
        kept = self._named(Path(self.folder), "[0-9][0-9]-*.npz")
        return [file for file in kept.parent.glob(f"{kept.name}*") if checkpoint.belongs(file, self.key)]

    def _named(self, place: Path, name: str) -> Path:
        """A file of this shard."""
        part, of = self.shard
        stem, _, suffix = name.rpartition(".")
        return place / (name if of == 1 else f"{stem}.{part}-of-{of}.{suffix}")

    def begin(self, method: str, lm: Model, read: Mapping, settings: Mapping, in_parts: bool = False) -> Result | None:
        """Say what is asked, `read` being names and hashes of all input; the Result, if the folder has it already.

        The first to say it inside the `with` says it for all: methods that it combines are parts of it. What can be
        done `in_parts` calls `together` before it needs the whole.
        Raises ResultError where the folder holds the result of another run, ModelError for shards of a method that
        cannot be put together.
        """
        model = {
            "weights": weights_hash(lm), "dtype": str(lm.dtype), "device": lm.device.type, "convention": lm.convention,
            "attention": lm.config._attn_implementation,
        }  # fmt: skip
        # What is asked without a folder is compared with nothing.
        model |= identity(lm) if self.folder is not None or self.of else {}
        if not self.key:
            self._held.enter_context(fast(lm.hf))
        return self.asked(method, model, read, settings, in_parts)

    def asked(self, method: str, model: Any, read: Mapping, settings: Mapping, in_parts: bool = False) -> Result | None:
        """The same of any model, by all that tells it from another one."""
        asked = {"method": method, "model": dict(model), "input": dict(read), "settings": dict(settings)}
        self._asked[method] = self._now = results.record(asked)
        if self.key:
            return None
        self.key = self._now
        if (self.shard[1] > 1 or self.of) and not in_parts:
            raise ModelError(f"{method} cannot be done in parts", expected="a scan, or survival")
        return None if self.folder is None else self._found(Path(self.folder))

    def _found(self, folder: Path) -> Result | None:
        if not (folder / results.FILE).exists():
            return None
        found = results.read(folder)
        own = found.data.attrs.get(_KEY)
        if own is None or not checkpoint.alike(str(own), self.key):
            raise ResultError(
                f"{folder} holds the result of another run",
                got=f"a {found.method}" if own is None else f"another {checkpoint.differing(str(own), self.key)}",
                expected="the same model, input and settings", fix="choose another folder, or remove this one",
            )  # fmt: skip
        self.finished = _UNFINISHED not in found.data.attrs
        return found if self.finished else None

    def signed(self, found: Result, finished: bool = True) -> Result:
        """A result that says of which run it is, so that its folder can be found finished, and how long that took.

        Of a run that is not finished, a part is signed as what there is of the whole.
        """
        spent = self.spent
        key = self._asked.get(found.method, self.key) if finished else self.key
        marks = {_KEY: key, **asdict(spent), HOSTS: "; ".join(sorted(spent.hosts))}
        marks |= {} if finished else {_UNFINISHED: 1}
        return found if self.folder is None else Result(found.data.assign_attrs(marks))

    def mark(self, method: str) -> dict[str, str]:
        """By what a result in the folder is known to be of this run: for one that is written before it is whole."""
        return {_KEY: self._asked.get(method, self.key)}

    @property
    def spent(self) -> Spent:
        """What the run took until now."""
        return self._before.and_now(time.monotonic() - self._began)

    def goes_on(self, spent: Spent) -> None:
        """A part of the run was done by an earlier start of it, or elsewhere."""
        self._before = self._before.beside(spent)

    def stage(
        self, name: str, total: int, more: object = None, everywhere: bool = False, divided: bool = False
    ) -> Stage:
        """What is kept of one pass over `total` batches, all of them in every shard if they are done `everywhere`;
        `more` says what it depends on beside the job's key. Where batches may be `divided`, so that each shard has as
        much to do as any other, the stage says into how many parts.

        Raises ResultError outside of the `with`.
        """
        if not self._open:
            raise ResultError("this job is not open", fix="with uw.Job(…) as job: …")
        label = f"{len(self._stages):02}-{re.sub('[^A-Za-z0-9]+', '-', name)[:40].strip('-')}.npz"
        versions = {package: files.version(package) for package in results.VERSIONS}
        own = {"stage": name, "batches": total, "more": more, "versions": versions}
        run = {} if self._now == self.key else {"run": self.key}
        key = json.dumps({**json.loads(self._now or "{}"), **run, **own}, sort_keys=True)
        (part, of), others = ((1, 1), ()) if everywhere else (self.shard, self.of)
        parts = _parts(total, of) if divided else 1
        units = total * parts
        stage = Stage(
            self, None if self.folder is None else self._named(Path(self.folder), label), key,
            range(0) if others else range(units * (part - 1) // of, units * part // of),
            _whole(others, label, key, divided) if others else None, parts,
        )  # fmt: skip
        self._stages.append(stage)
        return stage

    def tick(self, lasting: Lasting, done: float = 0.0, doing: str = "") -> None:
        """Where a step takes long: what lasts is whole here, `done` of its batch, and an interrupt need not wait."""
        self._stages[-1].tick(lasting, now=self.interrupted)
        self._done = done, doing
        self.heard(done, doing, self.interrupted)
        if self.interrupted:
            raise KeyboardInterrupt

    @property
    def interrupted(self) -> bool:
        """Did an interrupt come while a batch was being counted?"""
        return bool(self._came)

    def gather(self, lasting: Lasting) -> None:
        """Add up what all peers kept, at the first of them."""
        if self.peers is not None:
            for state in self.peers.gather({**self.spent.state(), **lasting.state()}):
                self._before = replace(self._before, hosts=self._before.hosts | Spent.taken(state).hosts)
                lasting.take(state)

    def together(self) -> None:
        """From here on the whole is needed: the `with` of a part ends here."""
        if self.shard[0] > 1 or (self.shard[1] > 1 and self.peers is None):
            raise _PartDone

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Inside the `with` a first interrupt waits until `tick` or the end, and is said; a second does not wait."""
        self._came.clear()
        self._done = 0.0, ""
        before = signal.getsignal(signal.SIGINT)
        # A process in the background may ignore interrupts, and only the main thread can take them.
        heard = callable(before) and threading.current_thread() is threading.main_thread()
        if self.folder is None or not heard:
            yield
            return

        def wait(number: int, _: Any) -> None:
            self._came.append(number)
            if len(self._came) > 1:
                raise KeyboardInterrupt
            self.heard(*self._done, True)

        signal.signal(signal.SIGINT, wait)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def opened(place: Job | str | Path | None, listener: object = None) -> Iterator[Job]:
    """A method's `checkpoint` as a Job, one that is open already staying so. Raises NumericError for no `listener`."""
    function("listener", listener)
    job = place if isinstance(place, Job) else Job(place)
    if job._open:
        yield job
    elif job.shard[1] > 1:
        raise ResultError("a shard has no result to return", fix="write: with uw.Job(…, shard=…) as job: uw.scan(…)")
    else:
        with job:
            yield job


@dataclass(eq=False)
class Stage:
    """What is kept at `path` (None: nothing) of one pass over batches, of which those in `span` are to be done here.

    `whole`: what shards kept of all of them, one after the other, since each may be large. `parts`: into how many each
    batch is divided, which are then what `span` counts.
    """

    job: Job
    path: Path | None
    key: str
    span: range
    whole: Iterator[Arrays] | None
    parts: int = 1
    _saved: float = field(init=False, default_factory=time.monotonic)
    _next: int = field(init=False, default=0)

    @property
    def due(self) -> bool:
        """Is it time to write?"""
        return time.monotonic() - self._saved >= self.job.every

    def resume(self, lasting: Lasting) -> range:
        """Add what is done already to what lasts; the batches that are left."""
        for state in self.whole or ():
            self._take(lasting, state)
        if self.whole is not None:
            return range(0)
        self._next = self.span.start
        found = {} if self.path is None else checkpoint.read(self.path, self.key)
        if found:
            self._take(lasting, found)
        elif not self.span:
            self.tick(lasting, now=True)  # of more shards than batches, some have none: that is said, too
        return range(self._next, self.span.stop)

    def _take(self, lasting: Lasting, state: Arrays) -> None:
        self._next = int(state.pop(_NEXT))
        self.job.goes_on(Spent.taken(state))
        lasting.take(state)

    def tick(self, lasting: Lasting, now: bool = False) -> None:
        """Write what lasts, where it is time to, or `now`."""
        if self.path is not None and (now or self.due):
            own = {_NEXT: np.array(self._next), **self.job.spent.state()}
            checkpoint.save(self.path, self.key, {**own, **lasting.state()})
            self._saved = time.monotonic()

    def done(self, lasting: Lasting, batch: int, now: bool) -> None:
        """A batch is counted; the last one is always written, since other stages may follow."""
        self._next = batch + 1
        self.tick(lasting, now or self._next == self.span.stop)


def _parts(total: int, of: int) -> int:
    """Into how many parts each of so many batches is divided, so that so many shards have equally many."""
    return of // math.gcd(total, of)


def _whole(folders: Iterable[str | Path], label: str, key: str, divided: bool) -> Iterator[Arrays]:
    """What all shards kept of a stage. Raises ResultError where one is missing, unfinished or of another run."""
    stem = label.removesuffix(".npz")
    files = sorted({file.resolve() for folder in folders for file in Path(folder).glob(f"{stem}.*-of-*.npz")})
    found = {tuple(map(int, re.findall("[0-9]+", file.name.removeprefix(stem)))): file for file in files}
    of = {n for _, n in found}
    missing = sorted({(i, n) for n in of for i in range(1, n + 1)} - set(found))
    if len(of) != 1 or missing or len(files) > len(found):
        raise ResultError(
            f"the shards of {stem} are not whole", got=", ".join(file.name for file in files) or "none",
            expected="every shard of one division, once",
            fix=f"run shard {missing[0][0]}/{missing[0][1]}, too" if missing else "name the folder of every shard",
        )  # fmt: skip
    total = json.loads(key)["batches"] * (_parts(json.loads(key)["batches"], max(of)) if divided else 1)
    for (part, n), file in sorted(found.items()):
        state = checkpoint.read(file, key)
        if int(state[_NEXT]) < total * part // n:
            raise ResultError(
                f"{file} is of a shard that is not done", got=f"{int(state[_NEXT])} of {total * part // n} batches",
                fix="run the same command again: it goes on from there",
            )  # fmt: skip
        yield state
