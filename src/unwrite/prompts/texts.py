"""Which windows are cut of a text, a file, a folder or a data set?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unwrite.errors import TokensError, counted, plain, several, shown, whole
from unwrite.prompts.dataset import Keeper, Reading, Source, fill, identity, source_of
from unwrite.prompts.encode import begins, digest_of, need, not_empty, says
from unwrite.prompts.tokens import Tokens, bare, name_of

_LONGEST_DEFAULT = 1024
# Of a folder all these are read: what people write for people, and what they write for machines.
_PROSE = "txt text md markdown rst tex org adoc html htm"
_CODE = (
    "py pyi pyx ipy js mjs cjs jsx ts tsx java kt kts scala groovy clj c h cc cpp cxx hh hpp hxx cu cuh m mm cs fs vb "
    "go rs swift rb php pl pm lua r jl hs ml mli ex exs erl lisp el scm vim sql sh bash zsh fish ps1 bat css scss less "
    "vue svelte f f90 f95 pas ada d nim zig dart sol asm s v sv vhd cmake mk proto graphql tf toml ini cfg yaml yml"
)
_READ = {f".{suffix}" for suffix in f"{_PROSE} {_CODE}".split()}
_READ_WHOLE_NAME = {"readme", "license", "makefile", "dockerfile", "changelog", "notice", "authors", "contributing"}
_SKIPPED = {"__pycache__", "node_modules"}
_LISTED = 20
# Of a document so many characters are enough to see what the tokenizer puts before it.
_SAMPLE = 64
# Of a long document so many characters for each token that is needed are read at first; how the text goes on may change
# the last tokens before it, far fewer than these.
_PER_TOKEN, _UNSURE = 6, 64
_TEXTS = "a string, file, folder, list of strings, data set, or a dict of these"


def text(
    source: Any,
    tokenizer: Any,
    n: int = 300,
    length: int | None = None,
    bos: int | bool | None = None,
    checkpoint: Keeper | None = None,
) -> Tokens | dict[str, Tokens]:
    """Text as consecutive windows of token ids.

    Arguments: `source` a string of text, a Path (or a string that names an existing file or folder; of a folder every
    text and code file, which the notes name), a list of strings (each a document of its own), a data set, or a mapping
    from names to any of these; `tokenizer` as transformers has it; at most `n` windows (spread evenly over the
    documents, consecutive in each); `length` in tokens, by default min(1024, the tokenizer's model_max_length); `bos`
    what begins every window: by default what the tokenizer itself puts before a text, for True its BOS in any case (an
    error if it has none), for False nothing, or an id. It is never put before a text that begins with
    it; what a tokenizer puts behind a text, which ends it, is left out.
    Returns Tokens, or a dict of Tokens for a mapping. What fills no window is left out.
    Windows of one document share a cluster where there are several documents; else each window is its own.
    Raises TokensError for an empty text, a text shorter than one window, or a file that is not UTF-8.

    A data set is one of the library `datasets` (Dataset or IterableDataset), or `hub:owner/name`, which may go on
    `@revision:configuration:split:column`: what is left out or empty is the main revision, the only configuration, the
    split train, and the column text or the only one of strings. It is read document by document and never held, and
    only until `n` windows are full: they are the first ones, not spread over all documents. `checkpoint`, an open
    `uw.Job`, keeps how far it is read. Raises TokensError also where it cannot be read, or has no such column.

    Example: `uw.text("book.txt", lm.tokenizer, n=100, length=256)`
    """
    need(tokenizer, "text")
    if checkpoint is not None and not isinstance(checkpoint, Keeper):
        raise TokensError(
            "the checkpoint of a text is an open job", got=shown(checkpoint),
            fix="with uw.Job(…) as job: uw.text(…, checkpoint=job)",
        )  # fmt: skip
    if isinstance(source, Mapping):
        if "input_ids" in source:
            raise TokensError("these are token ids, and no text", got="input_ids", fix="give them to the method itself")
        if not source or len({name_of(name) for name in source}) < len(source):
            raise TokensError(
                "texts need names that differ", got=counted(len(source), "text"), expected="one name for each"
            )
        return {name_of(name): windows(part, tokenizer, n, length, bos, checkpoint) for name, part in source.items()}
    return windows(source, tokenizer, n, length, bos, checkpoint)


def windows(
    source: Any,
    tokenizer: Any,
    n: int = 300,
    length: int | None = None,
    bos: int | bool | None = None,
    checkpoint: Keeper | None = None,
) -> Tokens:
    """`text` for one source that is not a mapping."""
    length = min(_LONGEST_DEFAULT, tokenizer.model_max_length) if length is None else length
    for name, count in (("n", n), ("length", length)):
        whole(f"{name} is a number of {'windows' if name == 'n' else 'tokens'}", count, 1)
    if (data := source_of(source)) is not None:
        return _streamed(data, tokenizer, n, length, _begun(tokenizer, bos, "a", length), checkpoint)
    name, documents, files = _documents(source)
    sample = next(document for document in documents if document.strip())[:_SAMPLE]
    digest, prefix = digest_of(name, documents), _begun(tokenizer, bos, sample, length)
    cut = [_cut(document, tokenizer, n, length, prefix) for document in documents]
    # Of those that go on, which are not read to their end, the longest are those of most characters.
    size = [(len(part), len(document) * (len(part) > n)) for part, document in zip(cut, documents, strict=True)]
    taken = _spread(size, n)
    if not sum(taken):
        longest = max(map(len, documents))
        raise TokensError(
            f"{name}: shorter than one window of {length} tokens",
            got=f"{counted(len(documents), 'document')}, the longest of {counted(longest, 'character')}",
            fix="pass a smaller length, or give short texts to the method itself, each of them a prompt",
        )  # fmt: skip
    ids = np.array([window for windows, k in zip(cut, taken, strict=True) for window in windows[:k]], dtype=np.int64)
    goes_on = sum(len(windows) > k for windows, k in zip(cut, taken, strict=True))
    notes = (f"{goes_on} of {counted(len(cut), 'document')} went on for further windows, which were not used", *files)
    cluster = np.repeat(np.arange(len(cut)), taken) if len(documents) > 1 else np.arange(len(ids))
    return Tokens(ids, np.full(len(ids), length), cluster, name, digest, notes)


def _begun(tokenizer: Any, bos: int | bool | None, sample: str, length: int) -> list[int]:
    """What begins every window. Raises TokensError where that leaves no room for text."""
    prefix = begins(tokenizer, bos, sample)
    if length <= len(prefix):
        raise TokensError("no window can be cut", got=f"length={length}", expected=f"at least {len(prefix) + 1}")
    return prefix


def _streamed(
    source: Source, tokenizer: Any, n: int, length: int, prefix: list[int], checkpoint: Keeper | None
) -> Tokens:
    name = name_of(source.spelled)
    reading = Reading(source, lambda document: _cut(document, tokenizer, n, length, prefix), n)
    asked = {"source": source.spelled, "tokenizer": identity(tokenizer), "length": length, "n": n, "bos": prefix}
    fill(reading, checkpoint, asked)
    at = reading.at
    if not at.windows:
        raise TokensError(
            f"{name} has no document as long as one window of {length} tokens" if at.read else f"{name} is empty",
            got=counted(at.read, "document"), fix="pass a smaller length" if at.read else "choose another data set",
        )  # fmt: skip
    # As above: of one document alone, each window is its own.
    cluster = np.array(reading.owner) if at.read > 1 else np.arange(at.windows)
    read = f"{counted(at.read, 'document')} read in order, {at.short} of them shorter than a window of {length} tokens"
    notes = (read, f"column {plain(at.column)[:80]}", *([f"revision {at.commit}"] if at.commit else []))
    return Tokens(np.stack(reading.rows, dtype=np.int64), np.full(at.windows, length), cluster, name, at.digest, notes)


def _cut(document: str, tokenizer: Any, n: int, length: int, prefix: list[int]) -> list[list[int]]:
    """Consecutive windows of so many ids, each begun with `prefix`, which is not put where the text says it itself;
    one more than `n` where there are so many, which shows that it goes on."""
    ids, first = _beginning(document, tokenizer, (n + 1) * length), len(prefix)
    windows, at = [], 0
    while True:
        begun = says(ids[at : at + first], prefix, tokenizer)
        window = ids[at : at + length] if begun else prefix + ids[at : at + length - first]
        if len(window) < length or len(windows) > n:
            return windows
        windows.append(window)
        at += length if begun else length - first


def _beginning(document: str, tokenizer: Any, needed: int) -> list[int]:
    """As many ids of a document as are needed, or all: a book is not read for its first page."""
    read = _PER_TOKEN * (needed + _UNSURE)
    while read < len(document):
        if len(ids := bare(document[:read], tokenizer)) >= needed + _UNSURE:
            return ids[:needed]
        read *= 2
    return bare(document, tokenizer)


def _spread(size: Sequence[tuple[int, int]], n: int) -> list[int]:
    """How many windows to take of each document, of those that it has: as even as the documents allow, `n` in all."""
    taken, left = [0] * len(size), min(n, sum(available for available, _ in size))
    # The shortest first: what it cannot give is shared by those that come after it.
    for rank, i in enumerate(sorted(range(len(size)), key=lambda i: (size[i], -i))):
        taken[i] = min(size[i][0], left // (len(size) - rank))
        left -= taken[i]
    return taken


def _documents(source: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """What a text is called, its documents, and which files they are."""
    if isinstance(source, str) and not names_a_file(source):
        return "text", not_empty("the text", [source]), ()
    if isinstance(source, (str, Path)):
        path = Path(source)
        files, said = _of_folder(path) if path.is_dir() else ([path], ())
        return name_of(path.absolute().name), not_empty(str(path), [read_text(file) for file in files]), said
    documents = several("not a text", source, _TEXTS, TokensError)
    if all(isinstance(document, str) for document in documents):
        return f"{len(documents)} texts", not_empty("the list of texts", documents), ()
    raise TokensError(
        "not a text", got=shown(source), expected=_TEXTS,
        fix="chats and token ids are given to the method itself",
    )  # fmt: skip


def _of_folder(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Every text and code file of a folder, hidden ones left out, and a note of which they are."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file.relative_to(folder)))
    read = [file for file in files if file.suffix.lower() in _READ or file.name.lower() in _READ_WHOLE_NAME]
    if not read:
        kinds = ", ".join(_kinds(files)) or "no file"
        raise TokensError(f"{folder} is empty", got=kinds, expected="some text or code", fix="name the file itself")
    left = sorted(set(files) - set(read))
    names = [plain(file.relative_to(folder).as_posix())[:80] for file in read]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    said = f"{len(read)} files were read ({', '.join(_kinds(read))}): {', '.join(names[:_LISTED])}{more}"
    return read, (said, *([f"{len(left)} files were not read ({', '.join(_kinds(left))})"] if left else []))


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") or part in _SKIPPED for part in file.parts)


def _kinds(files: Sequence[Path]) -> list[str]:
    counted = Counter(file.suffix.lower() or file.name for file in files)
    return [f"{count} {plain(kind)[:20]}" for kind, count in counted.most_common(_LISTED)]


def names_a_file(name: str) -> bool:
    """Is this string a path, and no text?"""
    if name.endswith(".txt") and "\n" not in name:  # that there is none by this name should be said
        return True
    try:
        return 0 < len(name) < 4096 and Path(name).exists()
    except (OSError, ValueError):  # a long text, or one with NUL, is not a file name
        return False


def read_text(file: Path) -> str:
    """A file as text. Raises TokensError where it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, ValueError) as error:
        raise TokensError(f"cannot read {file} as UTF-8 text", got=error, fix="check the path") from None
