"""Which token ids does a method see, and what were they read from?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from unwrite.errors import TokensError, counted, plain, shown, whole

_FEWEST_TO_HALVE = 4
# Beyond every vocabulary: ids from here on stand for vectors.
BEYOND = 2**62


@dataclass(frozen=True, eq=False)
class Images:
    """What a model puts where prompts hold no text, such as an image: each vector under an id of its own.

    `ids` are in rising order, `vectors` [vector, d_model] the model's, `written` the tokens that hold their place in
    the text.
    """

    ids: Int[np.ndarray, " vector"]
    vectors: Any
    written: Int[np.ndarray, " vector"]

    def find(self, ids: Int[np.ndarray, "..."]) -> tuple[Int[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
        """The number of each id's vector, and whether it has one."""
        at = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return at, self.ids[at] == ids


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as token ids, aligned left: row p holds `lengths[p]` ids, then padding that no method counts.

    A causal model never lets a position see what comes after it, so left-aligned rows need no attention mask.
    `cluster[p]` says which prompts belong together (windows of one document) and are not independent evidence.
    `images`: what stands where they hold images, as `uw.images` finds it.
    """

    ids: Int[np.ndarray, "prompt position"]
    lengths: Int[np.ndarray, " prompt"]
    cluster: Int[np.ndarray, " prompt"]
    source: str = "token ids"
    digest: str = ""
    notes: tuple[str, ...] = field(default=())
    images: Images | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, Images | None):
            raise TokensError("these are no images", got=shown(self.images), expected="what uw.images finds, or none")
        if not isinstance(self.source, str) or not isinstance(self.digest, str) or not isinstance(self.notes, tuple):
            got = ", ".join(shown(part) for part in (self.source, self.digest, self.notes))
            raise TokensError("source, digest and notes of tokens are words", got=got, expected="text, text, a tuple")
        for name, axes in (("ids", 2), ("lengths", 1), ("cluster", 1)):
            part = getattr(self, name)
            fits = isinstance(part, np.ndarray) and part.dtype.kind in "iu" and part.ndim == axes
            if not fits or not part.size or len(part) != len(self.ids):
                raise TokensError(
                    f"tokens need an array of {name}", got=shown(part),
                    expected="integers [prompt, position]" if axes == 2 else "one integer for each prompt",
                    fix="a method reads ids, with their mask, by itself",
                )  # fmt: skip
        if self.lengths.min() < 1 or self.lengths.max() > self.length:
            got = f"{self.lengths.min()} to {self.lengths.max()}"
            raise TokensError("lengths of prompts do not fit their ids", got=got, expected=f"1 to {self.length}")

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

    @cached_property
    def written(self) -> Int[np.ndarray, "prompt position"]:
        """The ids as the text has them, with the tokens that hold the place of images."""
        if self.images is None:
            return self.ids
        at, is_seen = self.images.find(self.ids)
        return np.where(is_seen, self.images.written[at], self.ids)

    def named(self, source: str) -> Tokens:
        """The same tokens, called `source` in results."""
        if not isinstance(source, str):
            raise TokensError("tokens are called by a name", got=shown(source), expected="text")
        return replace(self, source=name_of(source))

    def about(self) -> dict[str, Any]:
        """What a result says about the prompts it was made from."""
        return {
            "source": self.source, "digest": self.digest, "hash": self.hash, "prompts": len(self),
            "length": self.length, "tokens": int(self.lengths.sum()), "notes": list(self.notes),
        }  # fmt: skip

    def take(self, prompts: Sequence[int] | np.ndarray, name: str | None = None) -> Tokens:
        """Some of the prompts, in the order given, called `name` in results."""
        kept = array_of(prompts)
        if kept is None or kept.ndim != 1 or not kept.size or kept.dtype.kind not in "iu":
            raise TokensError("prompts are taken by their numbers", got=shown(prompts), expected="a list of integers")
        if kept.min() < -len(self) or kept.max() >= len(self):
            got = f"{kept.min()} to {kept.max()}"
            raise TokensError("there are no such prompts", got=got, expected=f"0 to {len(self) - 1}")
        width = int(self.lengths[kept].max())
        part = replace(self, ids=self.ids[kept, :width], lengths=self.lengths[kept], cluster=self.cluster[kept])
        return part if name is None else part.named(name)

    def spread(self, n: int) -> Tokens:
        """At most `n` prompts of as many documents as there are, in their order: of each one, then another."""
        seen: Counter[int] = Counter()
        turn = []
        for cluster in self.cluster.tolist():
            turn.append(seen[cluster])
            seen[cluster] += 1
        return self.take(np.sort(np.argsort(turn, kind="stable")[: whole("n is a number of prompts", n, 1)]))

    def halves(self) -> tuple[Tokens, Tokens]:
        """The first half of the independent prompts, to choose by, and the second, to judge by.

        Raises TokensError where a half would have fewer than two clusters, and so no interval.
        """
        clusters = list(dict.fromkeys(self.cluster.tolist()))
        if len(clusters) < _FEWEST_TO_HALVE:
            raise TokensError(
                f"{self.source} cannot be split into prompts to choose by and prompts to judge by",
                got=counted(len(clusters), "independent prompt"), expected=f"at least {_FEWEST_TO_HALVE}",
                fix="give more text, or shorter prompts",
            )  # fmt: skip
        first = np.isin(self.cluster, clusters[: len(clusters) // 2])
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))

    def check(self, vocabulary: int, context: int | None) -> None:
        """Raise TokensError unless a model with this many embedding rows and positions can read the ids.

        Prompts of one cluster must be neighbours: sums over a cluster are closed when the next one begins.
        """
        whole("vocabulary is a number of tokens", vocabulary, 1)
        if context is not None:
            whole("context is a number of tokens", context, 1)
        borders = self.cluster[np.flatnonzero(np.diff(self.cluster, prepend=self.cluster[0] - 1))]
        if len(np.unique(borders)) < len(borders):
            raise TokensError(
                f"prompts of one cluster of {self.source} are not neighbours", fix="sort the prompts by cluster"
            )
        is_seen = False if self.images is None else self.images.find(self.ids)[1]
        wrong = np.argwhere(((self.ids < 0) | (self.ids >= vocabulary)) & ~np.asarray(is_seen))
        if len(wrong):
            prompt, place = wrong[0].tolist()
            raise TokensError(
                f"token ids of {self.source} lie outside the model's vocabulary",
                got=f"id {self.ids[prompt, place]} at prompt {prompt}, position {place}",
                expected=f"0 to {vocabulary - 1}", fix="tokenise with this model's own tokenizer",
            )  # fmt: skip
        if context is not None and self.length > context:
            raise TokensError(
                f"prompts of {self.source} are longer than the model's context",
                got=counted(self.length, "token"), expected=f"at most {context}",
                fix=f"pass length={context} or less to uw.text, which cuts a text into windows",
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
    at = np.minimum(start[:, None] + position[: lengths.max()], (start + lengths - 1)[:, None])
    return Tokens(np.take_along_axis(ids, at, axis=1), lengths, np.arange(len(ids)))


def from_rows(rows: Sequence[Sequence[int] | np.ndarray], source: str = "token ids", digest: str = "") -> Tokens:
    """`Tokens` from ids of unequal number, each row a prompt by itself. Raises TokensError for one without any."""
    lengths = np.array([len(row) for row in rows])
    if not lengths.all():
        raise TokensError(f"prompt {int(lengths.argmin())} has no token", expected="one token or more")
    # Padding repeats a real id, so that it is inside every vocabulary; so it does above.
    ids = np.array([[*row, *[row[-1]] * (lengths.max() - len(row))] for row in rows], dtype=np.int64)
    return Tokens(ids, lengths, np.arange(len(rows)), source, digest)


def _matrix(values: Any, name: str, kinds: str) -> np.ndarray:
    array = array_of(values)
    if array is None or array.ndim != 2 or 0 in array.shape or array.dtype.kind not in kinds:
        what = f"{name} must be a matrix of integers"
        raise TokensError(what, got=shown(values if array is None else array), expected="[prompt, position]")
    return array.astype(np.int64)


def array_of(values: Any) -> np.ndarray | None:
    """As an array; None for what is none, also for truths among numbers, which would count as 1 and 0."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except Exception:  # noqa: BLE001 - rows of unequal length, bfloat16, the meta device, or a stranger's object
        return None
    if isinstance(values, (list, tuple)) and array.dtype.kind in "iu":
        flat = [part for row in values for part in (row if isinstance(row, (list, tuple)) else [row])]
        return None if any(isinstance(part, (bool, np.bool_)) for part in flat) else array
    return array


def read_rows(position: Any, tokens: Tokens, name: str = "position") -> Int[np.ndarray, " prompt"]:
    """The row of every prompt that `position` names: one number or one each, from the end where it is negative.

    Raises TokensError for anything else, and for a row outside its prompt.
    """
    wanted = array_of(position)
    if wanted is None or wanted.dtype.kind not in "iu" or wanted.shape not in ((), (len(tokens),)):
        raise TokensError(f"{name} is a row of each prompt", got=shown(position), expected="an integer, or one each")
    row = np.where(wanted < 0, tokens.lengths + wanted, wanted)
    outside = np.flatnonzero((row < 0) | (row >= tokens.lengths))
    if len(outside):
        raise TokensError(
            f"prompt {outside[0]} has no such {name}", got=int(np.broadcast_to(wanted, row.shape)[outside[0]]),
            expected=f"−{tokens.lengths[outside[0]]} to {tokens.lengths[outside[0]] - 1}",
        )  # fmt: skip
    return row


def spelled(ids: Iterable[int | np.integer], tokenizer: Any) -> str:
    """What token ids say, as one printable line.

    A single token is named as the vocabulary spells it ("▁s") where its text alone would be read as another, or none.
    """
    numbers = [int(i) for i in ids]
    if tokenizer is None:
        return " ".join(map(str, numbers))
    text = tokenizer.decode(numbers)
    if not text or (len(numbers) == 1 and not _means(text, numbers[0], tokenizer)):
        text = " ".join(map(str, tokenizer.convert_ids_to_tokens(numbers)))
    return plain(text)


def words_of(ids: Int[np.ndarray, "..."], tokenizer: Any) -> np.ndarray:
    """What every id says by itself, as `spelled`; "" for one below 0, which is none."""
    known = {int(i): spelled([i], tokenizer) if i >= 0 else "" for i in np.unique(ids)}
    return np.array([known[i] for i in ids.ravel().tolist()], dtype=object).reshape(ids.shape)


def _means(text: str, token: int, tokenizer: Any) -> bool:
    """Is a text this token and no other, read as text and as the vocabulary's own spelling? So no two share a name."""
    return bare(text, tokenizer) == [token] and spells(text, tokenizer) in (None, token)


def bare(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text, with nothing put around it."""
    require_unicode("the text", text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def require_unicode(name: str, text: str) -> bytes:
    """The text in UTF-8. Raises TokensError for half a character."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokensError(f"{name} is not Unicode text", got=error.reason, expected="no lone surrogates") from None


def spells(token: str, tokenizer: Any) -> int | None:
    """The id of a token as the vocabulary spells it; None where it has none such."""
    found = tokenizer.convert_tokens_to_ids(token)
    unknown = found == tokenizer.unk_token_id and token != tokenizer.unk_token
    return None if found is None or unknown else int(found)


def name_of(source: object) -> str:
    """What a text is called in results."""
    return plain(source)[:80]
