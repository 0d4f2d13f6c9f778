"""Which token ids does a method see, and what were they read from?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from unwrite.errors import TokensError, plain
from unwrite.prompts.dataset import Keeper, Reading, Source, fill, identity, source_of

_LONGEST_DEFAULT = 1024
_FEWEST_TO_HALVE = 4


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as token ids, aligned left: row p holds `lengths[p]` ids, then padding that no method counts.

    A causal model never lets a position see what comes after it, so left-aligned rows need no attention mask.
    `cluster[p]` says which prompts belong together (windows of one document) and are not independent evidence.
    """

    ids: Int[np.ndarray, "prompt position"]
    lengths: Int[np.ndarray, " prompt"]
    cluster: Int[np.ndarray, " prompt"]
    source: str = "token ids"
    digest: str = ""
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Number of positions of the longest prompt."""
        return self.ids.shape[1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the ids, lengths and clusters: what a method's numbers depend on."""
        sha = hashlib.sha256(str(self.ids.shape).encode())
        for part in (self.ids, self.lengths, self.cluster):
            sha.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return sha.hexdigest()

    def named(self, source: str) -> Tokens:
        """The same tokens, called `source` in results."""
        return replace(self, source=_name(source))

    def about(self) -> dict[str, Any]:
        """What a result says about the prompts it was made from."""
        return {
            "source": self.source, "digest": self.digest, "hash": self.hash, "prompts": len(self),
            "length": self.length, "tokens": int(self.lengths.sum()), "notes": list(self.notes),
        }  # fmt: skip

    def take(self, prompts: Sequence[int] | np.ndarray, name: str | None = None) -> Tokens:
        """Some of the prompts, in the order given, called `name` in results."""
        kept = np.asarray(prompts, dtype=np.int64)
        width = int(self.lengths[kept].max())
        part = replace(self, ids=self.ids[kept, :width], lengths=self.lengths[kept], cluster=self.cluster[kept])
        return part if name is None else part.named(name)

    def halves(self) -> tuple[Tokens, Tokens]:
        """The first half of the independent prompts, to choose by, and the second, to judge by.

        Raises TokensError where a half would have fewer than two clusters, and so no interval.
        """
        clusters = list(dict.fromkeys(self.cluster.tolist()))
        if len(clusters) < _FEWEST_TO_HALVE:
            raise TokensError(
                f"{self.source} cannot be split into prompts to choose by and prompts to judge by",
                got=f"{len(clusters)} independent prompts", expected=f"at least {_FEWEST_TO_HALVE}",
                fix="give more text, or shorter prompts",
            )  # fmt: skip
        first = np.isin(self.cluster, clusters[: len(clusters) // 2])
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))

    def check(self, vocabulary: int, context: int | None) -> None:
        """Raise TokensError unless a model with this many embedding rows and positions can read the ids.

        Prompts of one cluster must be neighbours: sums over a cluster are closed when the next one begins.
        """
        borders = self.cluster[np.flatnonzero(np.diff(self.cluster, prepend=self.cluster[0] - 1))]
        if len(np.unique(borders)) < len(borders):
            raise TokensError(
                f"prompts of one cluster of {self.source} are not neighbours", fix="sort the prompts by cluster"
            )
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= vocabulary:
            raise TokensError(
                f"token ids of {self.source} lie outside the model's vocabulary",
                got=f"ids {low} to {high}", expected=f"0 to {vocabulary - 1}",
                fix="tokenise with this model's own tokenizer",
            )  # fmt: skip
        if context is not None and self.length > context:
            raise TokensError(
                f"prompts of {self.source} are longer than the model's context",
                got=f"{self.length} tokens", expected=f"at most {context}", fix=f"pass length={context} or less",
            )  # fmt: skip


def from_ids(ids: Any, mask: Any = None) -> Tokens:
    """`Tokens` from an integer array or LongTensor [prompt, position]; `mask` is 0 at padding on either side.

    Raises TokensError for anything that is not a non-empty matrix of integers, or a mask that leaves a prompt empty or
    has a hole in it.
    """
    ids = _matrix(ids, "token ids", "iu")
    kept = np.ones_like(ids, dtype=bool) if mask is None else _matrix(mask, "the mask", "iub").astype(bool)
    if kept.shape != ids.shape:
        raise TokensError("the mask has another shape than the token ids", got=kept.shape, expected=ids.shape)
    lengths = kept.sum(axis=1)
    start = kept.argmax(axis=1)
    if not lengths.all():
        raise TokensError(f"the mask leaves nothing of prompt {int(lengths.argmin())}", expected="one token or more")
    position = np.arange(ids.shape[1])
    if not (kept == ((position >= start[:, None]) & (position < (start + lengths)[:, None]))).all():
        raise TokensError("the mask has a hole", expected="each prompt's tokens to be neighbours")
    # Padding repeats a real id, so that it is inside every vocabulary.
    source = np.minimum(start[:, None] + position[: lengths.max()], (start + lengths - 1)[:, None])
    return Tokens(np.take_along_axis(ids, source, axis=1), lengths, np.arange(len(ids)))


def _matrix(values: Any, name: str, kinds: str) -> np.ndarray:
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of unequal length, bfloat16, a tensor with a gradient
        raise TokensError(f"{name} must be a matrix of integers", got=error, expected="[prompt, position]") from None
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in kinds:
        raise TokensError(
            f"{name} must be a matrix of integers", got=f"{array.dtype} {array.shape}", expected="[prompt, position]"
        )
    return array.astype(np.int64)


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
    *.txt), a list of strings (each a document of its own), a data set, or a mapping from names to any of these;
    `tokenizer` as transformers has it; at most `n` windows (spread evenly over the documents, consecutive in each);
    `length` in tokens, by default min(1024, the tokenizer's model_max_length); `bos` the id that begins every window:
    by default the tokenizer's if it has one (an error for True if not), none for False.
    Returns Tokens, or a dict of Tokens for a mapping. A rest that does not fill a window is left out and noted.
    Windows of one document share a cluster where there are several documents; else each window is its own.
    Raises TokensError for an empty text, a text shorter than one window, or a file that is not UTF-8.

    A data set is one of the library `datasets` (Dataset or IterableDataset), or `hub:owner/name`, which may go on
    `@revision:configuration:split:column`: what is left out or empty is the main revision, the only configuration, the
    split train, and the column text or the only one of strings. It is read document by document and never held, and
    only until `n` windows are full: they are the first ones, not spread over all documents. `checkpoint`, an open
    `uw.Job`, keeps how far it is read. Raises TokensError also where it cannot be read, or has no such column.

    Example: `uw.text("book.txt", lm.tokenizer, n=100, length=256)`
    """
    if tokenizer is None:
        raise TokensError("text needs a tokenizer, and this model came without one", fix="pass tokenizer=… to uw.load")
    if isinstance(source, Mapping):
        if not source or len({_name(name) for name in source}) < len(source):
            raise TokensError("texts need names that differ", got=f"{len(source)} texts", expected="one name for each")
        return {_name(name): windows(part, tokenizer, n, length, bos, checkpoint) for name, part in source.items()}
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
    prefix = _prefix(tokenizer, bos)
    length = min(_LONGEST_DEFAULT, tokenizer.model_max_length) if length is None else length
    if n < 1 or length <= len(prefix):
        raise TokensError("no window can be cut", got=f"n={n}, length={length}", expected="both large enough for text")
    if (data := source_of(source)) is not None:
        return _streamed(data, tokenizer, n, length, prefix, checkpoint)
    name, documents = _documents(source)
    digest = _digest(name, documents)
    step = length - len(prefix)
    cut = [_cut(document, tokenizer, step) for document in documents]
    taken = _spread([len(windows) for windows in cut], n)
    if not sum(taken):
        longest = max(map(len, documents))
        raise TokensError(
            f"{name} is shorter than one window of {length} tokens",
            got=f"{len(documents)} document(s), the longest of {longest} characters", fix="pass a smaller length",
        )  # fmt: skip
    rows = [prefix + window for windows, k in zip(cut, taken, strict=True) for window in windows[:k]]
    owner = np.repeat(np.arange(len(cut)), taken)
    ids = np.array(rows, dtype=np.int64)
    notes = (f"{sum(map(len, cut)) - len(rows)} further windows of {length} tokens were not used",)
    cluster = owner if len(documents) > 1 else np.arange(len(rows))
    return Tokens(ids, np.full(len(rows), length), cluster, name, digest, notes)


def _streamed(
    source: Source, tokenizer: Any, n: int, length: int, prefix: list[int], checkpoint: Keeper | None
) -> Tokens:
    step, name = length - len(prefix), _name(source.spelled)
    reading = Reading(source, lambda document: _cut(document, tokenizer, step), prefix, n)
    asked = {"source": source.spelled, "tokenizer": identity(tokenizer), "length": length, "n": n, "bos": prefix}
    fill(reading, checkpoint, asked)
    at = reading.at
    if not at.windows:
        raise TokensError(
            f"{name} has no document as long as one window of {length} tokens" if at.read else f"{name} is empty",
            got=f"{at.read} document(s)", fix="pass a smaller length" if at.read else "choose another data set",
        )  # fmt: skip
    # As above: of one document alone, each window is its own.
    cluster = np.array(reading.owner) if at.read > 1 else np.arange(at.windows)
    read = f"{at.read} document(s) read in order, {at.short} of them shorter than a window of {length} tokens"
    notes = (read, f"column {plain(at.column)[:80]}", *([f"revision {at.commit}"] if at.commit else []))
    return Tokens(np.stack(reading.rows, dtype=np.int64), np.full(at.windows, length), cluster, name, at.digest, notes)


def prompts(source: Any, tokenizer: Any, bos: int | bool | None = None) -> Tokens:
    """Each string as one whole prompt, of its own length; `bos` as in `text`.

    Raises TokensError for anything but a string or a list of strings, or an empty one.
    """
    if tokenizer is None:
        raise TokensError("a prompt needs a tokenizer, and this model came without one", fix="pass token ids")
    strings = [source] if isinstance(source, str) else source
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise TokensError("not prompts", got=type(source).__name__, expected="a string or a list of strings")
    _not_empty("the prompt", list(strings))
    prefix = _prefix(tokenizer, bos)
    rows = [prefix + tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"] for string in strings]
    lengths = np.array([len(row) for row in rows])
    if not lengths.all():
        raise TokensError(f"prompt {int(lengths.argmin())} has no token", got=repr(strings[int(lengths.argmin())]))
    # Padding repeats a real id, so that it is inside every vocabulary.
    ids = np.array([row + [row[-1]] * (lengths.max() - len(row)) for row in rows], dtype=np.int64)
    name = "1 prompt" if len(rows) == 1 else f"{len(rows)} prompts"
    return Tokens(ids, lengths, np.arange(len(rows)), name, _digest(name, list(strings)))


def single_token(token: int | str, tokenizer: Any, vocabulary: int) -> int:
    """The id of `token`: an id, a string that is exactly one token, or a token as the vocabulary spells it ("▁the").

    Raises TokensError for a string of several tokens, saying which, and for an id outside the vocabulary.
    """
    if isinstance(token, str):
        if tokenizer is None:
            raise TokensError("a token's text needs a tokenizer, and this model came without one", fix="pass its id")
        ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 and token in tokenizer.get_vocab():
            return tokenizer.get_vocab()[token]
        if len(ids) != 1:
            pieces = ", ".join(f"{spelled([i], tokenizer)!r} ({i})" for i in ids) or "none"
            raise TokensError(f"{token!r} is not one token", got=pieces, fix="name one token, or pass its id")
        return ids[0]
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
        raise TokensError("not a token", got=repr(token), expected=f"a string of one token, or 0 to {vocabulary - 1}")
    return int(token)


def single_tokens(token: Any, n: int, name: str, tokenizer: Any, vocabulary: int) -> Int[np.ndarray, " prompt"] | None:
    """The id of one token for each of `n` prompts, given once or n times; None where none is asked for.

    Raises TokensError as `single_token` does, and for another number of tokens.
    """
    if token is None:
        return None
    token = token.tolist() if hasattr(token, "tolist") else token
    each: list[Any] = list(token) if isinstance(token, (list, tuple)) else [token] * n
    if len(each) != n:
        raise TokensError(f"{name} is one token for each prompt", got=f"{len(each)} tokens", expected=f"1 or {n}")
    return np.array([single_token(part, tokenizer, vocabulary) for part in each])


def read_rows(position: Any, tokens: Tokens) -> Int[np.ndarray, " prompt"]:
    """The row of every prompt that `position` names: one number or one each, from the end where it is negative.

    Raises TokensError for anything else, and for a row outside its prompt.
    """
    try:
        wanted = np.asarray(position.cpu() if hasattr(position, "cpu") else position)
    except ValueError:  # rows of unequal length
        wanted = np.asarray(None)
    if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (len(tokens),)):
        raise TokensError("position is a row of each prompt", got=plain(position), expected="an integer, or one each")
    row = np.where(wanted < 0, tokens.lengths + wanted, wanted)
    outside = np.flatnonzero((row < 0) | (row >= tokens.lengths))
    if len(outside):
        raise TokensError(
            f"prompt {outside[0]} has no such position", got=int(np.broadcast_to(wanted, row.shape)[outside[0]]),
            expected=f"−{tokens.lengths[outside[0]]} to {tokens.lengths[outside[0]] - 1}",
        )  # fmt: skip
    return row


def spelled(ids: Iterable[int | np.integer], tokenizer: Any) -> str:
    """What token ids say, as one printable line; a token that alone is no text is named as the vocabulary does."""
    numbers = [int(i) for i in ids]
    if tokenizer is None:
        return " ".join(map(str, numbers))
    text = tokenizer.decode(numbers)
    if not text or (len(numbers) == 1 and "\N{REPLACEMENT CHARACTER}" in text):  # a byte, a piece of a character
        text = " ".join(map(str, tokenizer.convert_ids_to_tokens(numbers)))
    return plain(text)


def _prefix(tokenizer: Any, bos: int | bool | None) -> list[int]:
    if bos is True and tokenizer.bos_token_id is None:
        raise TokensError("the tokenizer has no token that begins a text", fix="pass its id as bos, or bos=False")
    first = tokenizer.bos_token_id if bos is None or bos is True else None if bos is False else int(bos)
    return [] if first is None else [first]


def _digest(name: str, documents: list[str]) -> str:
    try:
        return hashlib.sha256("\0".join(documents).encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise TokensError(f"{name} is not Unicode text", got=error.reason, expected="no lone surrogates") from None


def _cut(document: str, tokenizer: Any, step: int) -> list[list[int]]:
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]


def _spread(available: Sequence[int], n: int) -> list[int]:
    """How many windows to take of each document: as even as the documents allow, `n` in all."""
    taken, left = [0] * len(available), min(n, sum(available))
    # The shortest first: what it cannot give is shared by those that come after it.
    for rank, i in enumerate(sorted(range(len(available)), key=lambda i: (available[i], -i))):
        taken[i] = min(available[i], left // (len(available) - rank))
        left -= taken[i]
    return taken


def _documents(source: Any) -> tuple[str, list[str]]:
    if isinstance(source, str) and not _names_a_file(source):
        return "text", _not_empty("the text", [source])
    if isinstance(source, (str, Path)):
        path = Path(source)
        files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
        return _name(path.absolute().name), _not_empty(str(path), [read_text(file) for file in files])
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        documents = list(source)
        if all(isinstance(document, str) for document in documents):
            return f"{len(documents)} texts", _not_empty("the list of texts", documents)
    raise TokensError(
        "not a text", got=type(source).__name__, expected="a string, file, folder, list of strings, data set, dict"
    )


def _names_a_file(name: str) -> bool:
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


def _not_empty(name: str, documents: list[str]) -> list[str]:
    if not any(document.strip() for document in documents):
        raise TokensError(f"{name} is empty", expected="some text")
    return documents


def _name(name: object) -> str:
    return plain(name)[:80]
