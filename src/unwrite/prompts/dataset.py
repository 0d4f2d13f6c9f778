"""How is a data set read that is never held whole, and where does reading go on after it was stopped?

A position is what the library `datasets` calls a state. All that was read is remembered as one hash, made anew with
every document: so a position that leads elsewhere, since the data set has changed or is shuffled, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from unwrite.errors import TokensError, plain
from unwrite.prompts.tokens import require_unicode

PREFIX = "hub:"
_SPELLED = f"{PREFIX}owner/name[@revision][:configuration[:split[:column]]]"
_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^\s:@]+))?")
_SPLIT, _COLUMN = "train", "text"
_STRINGS = ("string", "large_string", "string_view")
_LISTED, _WIDE = 20, 60
_START = ""
# Seconds that the hub may take to say which commit a revision is.
_PATIENCE = 100.0


@dataclass(frozen=True)
class Named:
    """A data set of the hub."""

    spelled: str
    name: str
    revision: str | None
    config: str | None
    split: str
    column: str

    # A commit of the hub stays what it is.
    fixed = True

    def commit(self) -> str:
        """What the revision means today: a run that is continued reads what it began with."""
        from huggingface_hub import dataset_info

        self._library()  # what must be installed should be said before what cannot be reached
        with _explained(self.spelled):
            return str(dataset_info(self.name, revision=self.revision, timeout=_PATIENCE).sha)

    def open(self, commit: str) -> Any:
        """The data set as a stream. Raises TokensError where the library is missing, or there is none by that name."""
        if Path(self.name).exists():  # which the library would read instead
            raise TokensError(
                f"a folder here is called {self.name}, like the data set", fix="run this from another folder"
            )
        with _explained(self.spelled):
            return self._library().load_dataset(
                self.name, self.config, split=self.split, streaming=True, revision=commit
            )

    def _library(self) -> Any:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TokensError(
                f"{self.spelled[:_WIDE]} is read by the library `datasets`, which is not installed",
                fix="pip install 'unwrite[datasets]'",
            ) from None
        return datasets


@dataclass(frozen=True)
class Given:
    """A data set of the library `datasets` that is open already; it is not changed by being read."""

    data: Any

    column = ""
    fixed = False

    @property
    def spelled(self) -> str:
        """What it calls itself."""
        info = getattr(self.data, "info", None)
        parts = [getattr(info, name, None) for name in ("dataset_name", "config_name")] + [self.data.split]
        return ":".join(str(part) for part in parts if part) or "data set"

    def commit(self) -> str:
        """Nothing is known of where it came from."""
        return ""

    def open(self, _: str) -> Any:
        """The same data set as a stream of its own."""
        if hasattr(self.data, "to_iterable_dataset"):
            return self.data.to_iterable_dataset()
        # copy.copy would give it the same attributes, and where reading is would be one of them.
        twin = object.__new__(type(self.data))
        twin.__dict__.update(vars(self.data))
        return twin


Source = Named | Given


def source_of(source: Any) -> Source | None:
    """The data set that `source` is or names; None for any other text. Raises TokensError for a name that is wrong."""
    if isinstance(source, str):
        return _parsed(source) if source.startswith(PREFIX) and not any(map(str.isspace, source[4:5])) else None
    stream = all(hasattr(type(source), name) for name in ("load_state_dict", "column_names"))
    return Given(source) if stream or hasattr(type(source), "to_iterable_dataset") else None


def _parsed(spelled: str) -> Named:
    name, config, split, column = [*spelled.removeprefix(PREFIX).split(":", 3), "", "", ""][:4]
    found = _NAME.fullmatch(name)
    if found is None:
        raise TokensError(
            "no name of a data set", got=spelled[:_WIDE], expected=_SPELLED,
            fix="a text that begins so is passed in a list",
        )  # fmt: skip
    return Named(spelled, found["name"], found["revision"], config or None, split or _SPLIT, column)


class _explained:
    """Whatever the hub or the library raises becomes a TokensError that says of which data set."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            raise TokensError(
                f"cannot read {self.name[:_WIDE]}", got=error,
                fix="check its name and the network; with --out, or a checkpoint, the same call goes on where it was",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class At:
    """Where reading is: so many documents `read`, of which some were too `short`, so many `windows` of them.

    `digest` is of all documents, `before` of all but the last one, which lies at `position`; None where that is not
    known. `column` is the one that is read, of the data set as of `commit`. `over`: there is nothing left to read.
    """

    commit: str = ""
    column: str = ""
    read: int = 0
    short: int = 0
    windows: int = 0
    before: str = _START
    digest: str = _START
    position: dict[str, Any] | None = None
    over: bool = False


@dataclass(frozen=True)
class Document:
    """A text, the column that it stood in, and where it lies."""

    text: str
    column: str
    position: dict[str, Any] | None


class Reading:
    """The first `n` windows of a data set, as rows of ids, and where the next one comes from.

    `cut` makes windows of a document.
    """

    def __init__(self, source: Source, cut: Callable[[str], list[list[int]]], n: int):
        self.source, self.at = source, At()
        self.rows: list[np.ndarray] = []
        self.owner: list[int] = []
        self._cut, self._n = cut, n

    def step(self, document: Document | None) -> None:
        """Count a document, or the end; until the last line is done nothing has happened."""
        if document is None:
            self.at = replace(self.at, over=True)
            return
        at = self.at
        digest = _added(at.digest, document.text, self.source.spelled)
        cut = self._cut(document.text)
        taken = cut[: self._n - at.windows]
        self.rows += [np.array(window, dtype=np.int32) for window in taken]
        self.owner += [at.read] * len(taken)
        windows = at.windows + len(taken)
        self.at = At(
            at.commit, document.column, at.read + 1, at.short + (not cut), windows, at.digest, digest,
            document.position, windows == self._n,
        )  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """The windows so far, and where reading is."""
        try:
            at = json.dumps(asdict(self.at))
        except TypeError:  # a position that cannot be written: what was read is read again
            at = json.dumps(asdict(replace(self.at, position=None)))
        rows = self.rows[: self.at.windows]
        ids = np.stack(rows) if rows else np.zeros((0, 0), np.int32)
        return {"ids": ids, "owner": np.array(self.owner[: self.at.windows], dtype=np.int64), "at": np.array(at)}

    def take(self, state: Mapping[str, np.ndarray]) -> None:
        """Be where another reading of the same data set was."""
        self.at = At(**json.loads(str(state["at"])))
        self.rows, self.owner = list(state["ids"]), state["owner"].tolist()

    def rest(self) -> Iterator[Document]:
        """The documents that come next.

        Raises TokensError where what was read cannot be found again, and as `Named.open` does.
        """
        if not self.at.commit:
            self.at = replace(self.at, commit=self.source.commit())
        at = self.at
        found = None if at.position is None else self._after(at, 1, at.before)
        # Where that does not lead to the same document, all that was read is read again.
        found = found or self._after(replace(at, position=None), at.read, _START)
        if found is None:
            raise TokensError(
                f"{self.source.spelled[:_WIDE]} is not what was read of it before",
                expected="the same documents in the same order", fix="choose another folder, or remove this one",
            )  # fmt: skip
        return found

    def _after(self, at: At, again: int, digest: str) -> Iterator[Document] | None:
        """The documents that come after so many that are read again; None where those are others."""
        documents = _documents(self.source, at)
        for document in islice(documents, again):
            digest = _added(digest, document.text, self.source.spelled)
        return documents if digest == self.at.digest else None


@runtime_checkable
class Kept(Protocol):
    """What `unwrite.run.loop.job` keeps of one pass."""

    def resume(self, lasting: Any) -> object: ...
    def tick(self, lasting: Any, now: bool = False) -> None: ...
    def done(self, lasting: Any, batch: int, now: bool) -> None: ...


@runtime_checkable
class Keeper(Protocol):
    """An open `uw.Job`."""

    def stage(self, name: str, total: int, more: object = None) -> Kept: ...


def fill(reading: Reading, job: Keeper | None, asked: Mapping[str, object]) -> None:
    """Read until the windows are full or the data set ends, from where `job` was; `asked` says what windows depend on.

    However it ends, the job keeps what is done. Raises TokensError as `Reading.rest` does, and for what is no text.
    """
    kept = None if job is None else job.stage(f"reading {reading.source.spelled}", 1, dict(asked))
    if kept is not None:
        kept.resume(reading)
    if reading.at.over and reading.source.fixed:
        return
    documents = reading.rest()
    try:
        while not reading.at.over:
            reading.step(next(documents, None))
            if kept is not None:
                kept.tick(reading)
    except BaseException:
        if kept is not None:
            kept.tick(reading, now=True)
        raise
    if kept is not None:
        kept.done(reading, 0, now=True)


def identity(tokenizer: Any) -> str:
    """What decides how text becomes ids."""
    if hasattr(tokenizer, "backend_tokenizer"):
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        # A call may set these two, and each call here sets them to the same.
        told = {name: part for name, part in told.items() if name not in ("truncation", "padding")}
    else:
        told = [sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, told], sort_keys=True).encode()).hexdigest()


def _documents(source: Source, at: At) -> Iterator[Document]:
    data = source.open(at.commit)
    if at.position is not None:
        data.load_state_dict(at.position)
    column = at.column or source.column
    if data.features is not None:
        column = _column({name: _is_text(kind) for name, kind in data.features.items()}, column, source.spelled)
    rows, position, more, buffered = iter(data), None, True, _buffered(data)
    while more:
        with _explained(source.spelled):
            row = next(rows, None)
        more = row is not None
        if row is not None:
            if not isinstance(row, Mapping):
                raise TokensError(
                    f"{source.spelled[:_WIDE]} has no rows with columns",
                    got=type(row).__name__,
                    fix="with_format(None)",
                )
            column = _column({name: isinstance(value, str) for name, value in row.items()}, column, source.spelled)
            yield Document(_text(row[column], source.spelled), column, position)
            position = None if buffered else data.state_dict()


def _column(columns: Mapping[str, bool], wanted: str, name: str) -> str:
    """The column that is read, of those there are and whether they hold text."""
    strings = [column for column, is_text in columns.items() if is_text]
    chosen = wanted or (_COLUMN if _COLUMN in columns else strings[0] if len(strings) == 1 else "")
    if chosen not in columns:
        listed = ", ".join(repr(column[:_WIDE]) for column in list(columns)[:_LISTED])
        more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
        raise TokensError(
            f"which column of {name[:_WIDE]} is the text", got=f"{listed or 'none'}{more}",
            expected=f"{wanted[:_WIDE]!r}" if wanted else "'text', or a single column of strings",
            fix=f"name it: {_SPELLED}, or select_columns",
        )  # fmt: skip
    return chosen


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in _STRINGS


def _text(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise TokensError(f"a document of {name[:_WIDE]} is not text", got=type(value).__name__, expected="a string")
    return value or ""


def _buffered(part: Any) -> bool:
    """Is a part of it shuffled in a buffer? What was in there is lost when the library goes on from a state."""
    inner = [getattr(part, name, None) for name in ("_ex_iterable", "ex_iterable")]
    inner += getattr(part, "ex_iterables", None) or []
    return "BufferShuffled" in type(part).__name__ or any(_buffered(each) for each in inner if each is not None)


def _added(digest: str, text: str, name: str) -> str:
    return hashlib.sha256(f"{digest}\0".encode() + require_unicode(plain(name)[:_WIDE], text)).hexdigest()
