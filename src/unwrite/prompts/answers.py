"""Which token does an answer mean after this prompt? The one that continues it, found by tokenising both together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from unwrite.errors import TokensError, counted, shown
from unwrite.prompts.encode import need
from unwrite.prompts.tokens import Tokens, array_of, bare, spelled, spells

# How an answer is tokenised depends on what is near it: so many ids before it are read again as text, and of these the
# last few must be what they were.
_NEAR, _SAME = 64, 3
_LISTED = 12
# What a SentencePiece vocabulary writes for a space.
_SPACE = "▁"


def answers(
    token: Any, tokens: Tokens, row: np.ndarray, name: str, tokenizer: Any, vocabulary: int
) -> Int[np.ndarray, " prompt"] | None:
    """The id of one token after the row that is read of each prompt, given once or for every prompt; None without any.

    Raises TokensError as `token_after` does, and for another number of tokens.
    """
    if token is None:
        return None
    if hasattr(token, "tolist") and (array := array_of(token)) is not None:
        token = array.tolist()
    each: list[Any] = list(token) if isinstance(token, (list, tuple)) else [token] * len(tokens)
    if len(each) != len(tokens):
        expected = f"1 or {len(tokens)}"
        raise TokensError(f"{name} is one token for each prompt", got=counted(len(each), "token"), expected=expected)
    before = [ids[: end + 1].tolist() for ids, end in zip(tokens.written, row, strict=True)]
    found = [token_after(part, ids, tokenizer, vocabulary) for part, ids in zip(each, before, strict=True)]
    return np.array(found, dtype=np.int64)


def compared(
    answer: Any, against: Any, tokens: Tokens, row: np.ndarray, tokenizer: Any, vocabulary: int
) -> tuple[Int[np.ndarray, " prompt"] | None, Int[np.ndarray, " prompt"] | Int[np.ndarray, "prompt option"] | None]:
    """The ids of an answer and of what it is compared to: one token for each prompt, or the mean of several.

    Raises TokensError as `answers` does, and where there is nothing to compare.
    """
    chosen = answers(answer, tokens, row, "answer", tokenizer, vocabulary)
    other = (several if _are_several(against) else answers)(against, tokens, row, "against", tokenizer, vocabulary)
    if other is None:
        return chosen, None
    if chosen is None:
        raise TokensError("against needs an answer to be compared with", fix="pass answer, or leave both out")
    same = (chosen[:, None] == other.reshape(len(other), -1)).all(1)
    if same.any():
        raise TokensError("answer and against are the same token", got=int(chosen[same][0]))
    return chosen, other


def asked_for(ids: int | list[int], tokenizer: Any) -> str:
    """A token in words, or the several whose mean is meant."""
    if isinstance(ids, int):
        return spelled([ids], tokenizer)
    return f"mean of {', '.join(spelled([i], tokenizer) for i in ids)}"


def several(
    tokens_of: Any, tokens: Tokens, row: np.ndarray, name: str, tokenizer: Any, vocabulary: int
) -> Int[np.ndarray, "prompt option"]:
    """The ids of as many tokens for every prompt: one list for all of them, or a list, or a row, for each.

    Raises TokensError as `answers` does, and for lists of other lengths.
    """
    options = _options(tokens_of, len(tokens), name)
    ids: list[Any] = [answers(part, tokens, row, name, tokenizer, vocabulary) for part in options]
    return np.stack(ids, 1)


def _are_several(token: Any) -> bool:
    """Is this a list of tokens for every prompt, and not one token for each?"""
    array = array_of(token) if hasattr(token, "tolist") else None
    if array is not None:
        return array.ndim == 2
    return isinstance(token, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in token)


def _options(given: Any, n: int, name: str) -> list[list[Any]]:
    """Tokens one by one, each for all prompts."""
    if not isinstance(given, (list, tuple)):
        array = array_of(given)
        given = None if array is None or array.dtype.kind not in "iu" else array.tolist()
    if isinstance(given, (list, tuple)) and not any(isinstance(part, (list, tuple)) for part in given):
        given = [given] * n
    fits = isinstance(given, (list, tuple)) and len(given) == n
    sizes = {len(part) if isinstance(part, (list, tuple)) else 0 for part in given} if fits else set()
    if len(sizes) != 1 or min(sizes) < 2:
        expected = "as many for every prompt, two or more"
        raise TokensError(f"{name} is out of lists of tokens", got=shown(given), expected=expected)
    return [list(option) for option in zip(*given, strict=True)]


def token_after(token: Any, before: Sequence[int], tokenizer: Any, vocabulary: int) -> int:
    """The id of `token` after the ids `before`: an id itself, a text, or a token as the vocabulary spells it ("▁the").

    Raises TokensError, proposing what can be asked, for a text that continues the prompt by another number of tokens
    than one or joins its last token, one that can mean two tokens, and for an id outside the vocabulary.
    """
    if isinstance(token, str):
        need(tokenizer, "a token's text", "pass its id")
        context = _text_of(before, tokenizer)
        return _alone(token, tokenizer) if context is None else _continuing(token, context, tokenizer)
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
        raise TokensError("not a token", got=shown(token), expected=f"a string of one token, or 0 to {vocabulary - 1}")
    return int(token)


def firsts(answer: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The first tokens of a text, as a word after a space and without one; of an id this token. −1 for no other.

    Raises TokensError for what is neither.
    """
    if not isinstance(answer, str):
        return [token_after(answer, [], tokenizer, vocabulary), -1]
    need(tokenizer, "an answer's text", "pass its id")
    if not answer.strip():
        raise TokensError("an answer is a text", got=shown(answer), expected="a word or more, or the id of a token")
    found = list(dict.fromkeys(bare(way, tokenizer)[0] for way in (f" {answer.strip()}", answer.strip())))
    return [*found, -1][:2]


def _text_of(before: Sequence[int], tokenizer: Any) -> str | None:
    """The end of a prompt as text that is tokenised as it was; None where there is no such text."""
    special, first = set(tokenizer.all_special_ids), 0
    while first < len(before) and before[first] in special:
        first += 1
    near = list(before[first:][-_NEAR:])
    text = tokenizer.decode(near, skip_special_tokens=False, clean_up_tokenization_spaces=False) if near else ""
    return text if bare(text, tokenizer)[-_SAME:] == near[-_SAME:] else None


def _continuing(answer: str, context: str, tokenizer: Any) -> int:
    pieces = _after(context, answer, tokenizer)
    if pieces is not None and len(pieces) == 1:
        return pieces[0]
    if (named := _named(answer, context, tokenizer)) is not None:
        return named
    raise TokensError(
        f"{shown(answer)} is not one token", got=_shown(pieces, context, answer, tokenizer),
        expected="one token that continues the prompt", fix=_proposed(answer, context, tokenizer),
    )  # fmt: skip


def _proposed(answer: str, context: str, tokenizer: Any) -> str:
    """What can be asked instead."""
    if not answer.strip():
        return "pass the id of a token"
    spaced, plainly = f" {answer.lstrip(' ')}", answer.lstrip(" ")
    if context.endswith(" ") and answer == plainly and _is_one(context.rstrip(" "), spaced, tokenizer):
        return f"end the prompt before its last space, which is a part of the token, and ask about {spaced!r}"
    shorter = [answer[:end] for end in range(min(len(answer), _NEAR) - 1, 0, -1)]
    for way in (spaced, plainly, *shorter):
        if way != answer and _is_one(context, way, tokenizer):
            return f"ask about {way!r}"
    return "pass the id of a token"


def _is_one(context: str, answer: str, tokenizer: Any) -> bool:
    return len(_after(context, answer, tokenizer) or ()) == 1


def _after(context: str, answer: str, tokenizer: Any) -> list[int] | None:
    """The tokens that an answer puts after a text; None where it changes those of the text."""
    before, both = bare(context, tokenizer), bare(context + answer, tokenizer)
    return both[len(before) :] if both[: len(before)] == before else None


def _shown(pieces: list[int] | None, context: str, answer: str, tokenizer: Any) -> str:
    if pieces is not None:
        return _listed(pieces, tokenizer)
    spaced = _after(context, f" {answer}", tokenizer) or []
    if len(spaced) > 1:
        return _listed(spaced, tokenizer)
    both = bare(context + answer, tokenizer)
    return f"a text that ends in {_listed(both[-_SAME:], tokenizer)}, which cuts the prompt's end otherwise"


def _listed(ids: Sequence[int], tokenizer: Any) -> str:
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return (", ".join(f"{spelled([i], tokenizer)!r} ({i})" for i in ids[:_LISTED]) or "none") + more


def _named(answer: str, context: str, tokenizer: Any) -> int | None:
    """A token as only the vocabulary spells it, or as it spells what comes after a space."""
    found = spells(answer, tokenizer)
    if found is None or tokenizer.decode([found]) != answer:
        return found
    return found if _after(context, f" {answer}", tokenizer) == [found] else None


def _alone(answer: str, tokenizer: Any) -> int:
    """What an answer means where the prompt is no text that could be tokenised with it."""
    ids, named = bare(answer, tokenizer), spells(answer, tokenizer)
    if len(ids) == 1 and named in (None, ids[0]):
        return ids[0]
    if len(ids) == 1 and named is not None:
        raise TokensError(
            f"{shown(answer)} can be two tokens", got=f"{_listed(ids, tokenizer)}, and {_listed([named], tokenizer)}",
            fix=f"ask about {spelled(ids, tokenizer)!r} where a word begins, or pass the id {named}",
        )  # fmt: skip
    if named is None and answer.startswith(" "):  # as the vocabulary would spell it
        named = spells(_SPACE + answer[1:], tokenizer)
    if named is not None:
        return named
    stripped = answer.lstrip(" ")
    fix = f"ask about {stripped!r}" if len(bare(stripped, tokenizer)) == 1 else "name one token, or pass its id"
    raise TokensError(f"{shown(answer)} is not one token", got=_listed(ids, tokenizer), expected="one token", fix=fix)
