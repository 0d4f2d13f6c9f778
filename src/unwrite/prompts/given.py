"""What did a person hand over, and which tokens is it? The one door through which methods take text and ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unwrite.errors import TokensError, said, several, shown
from unwrite.prompts.dataset import source_of
from unwrite.prompts.encode import chats, is_chat, need, prompts
from unwrite.prompts.texts import names_a_file, windows
from unwrite.prompts.tokens import Tokens, array_of, from_ids, from_rows

_IDS, _MASK = "input_ids", "attention_mask"
# What else a tokenizer may return beside ids, and no decoder is changed by.
_ASIDE = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "labels", "overflow_to_sample_mapping"}


def given(
    source: Any, tokenizer: Any, mask: Any = None, bos: int | bool | None = None, length: int | None = None,
    files: bool = True,
) -> Tokens:  # fmt: skip
    """Whatever a method was given, as Tokens.

    Arguments: `source` Tokens; a string or a list of strings, each one whole prompt; a list of messages
    (`[{"role": …, "content": …}]`) or a list of such chats, by the tokenizer's chat template; a Path (or with `files` a
    string that names one) or a data set, as windows of at most `length` tokens as `uw.text` cuts them; what a tokenizer
    returns (input_ids, with attention_mask or without); ids [prompt, position] with `mask`, one row of them, or rows of
    unequal length. Padding may be on either side. `bos`, for text, as in `uw.text`.
    Raises TokensError for anything else, for several texts by their names, and for ids that end in padding unmasked.
    """
    if isinstance(source, Tokens):
        if mask is not None:
            raise TokensError("these tokens know their padding already", fix="leave mask out")
        _no_bos(bos)
        return source
    source = _listed(source)
    read = _read(source, tokenizer, bos, length, files)
    if read is None:
        _no_bos(bos)
        return _numbers(*_unpacked(source, mask), tokenizer)
    if mask is not None:
        raise TokensError("a mask is for token ids, and this is text", fix="leave mask out")
    return read


def by_name(source: Any) -> Mapping[Any, Any]:
    """Several texts by their names; one alone is called "". Raises TokensError for no text at all."""
    if not isinstance(source, Mapping) or _is_encoding(source) or "role" in source:
        return {"": source}
    if not source:
        raise TokensError("no text was given", expected="at least one")
    return source


def holds_images(source: Any) -> bool:
    """Is this what a processor returned that read more than text? Pixels are no integers, as all about ids is."""
    return _is_encoding(source) and any("float" in said(getattr(part, "dtype", "")) for part in source.values())


def _is_encoding(source: Any) -> bool:
    return isinstance(source, Mapping) and (_IDS in source or _MASK in source)


def _listed(source: Any) -> Any:
    """Arrays of strings, what yields them, and a message alone, as lists."""
    if getattr(getattr(source, "dtype", None), "kind", "") in ("U", "O", "T"):
        return source.tolist()
    if isinstance(source, Iterator):
        return several("these are no prompts", source, "text or token ids", TokensError)
    return [source] if isinstance(source, Mapping) and "role" in source else source


def _read(source: Any, tokenizer: Any, bos: Any, length: int | None, files: bool) -> Tokens | None:
    """Text as tokens; None for what is no text."""
    if isinstance(source, str) and not files:
        return prompts([source], tokenizer, bos)
    if isinstance(source, Path) or source_of(source) is not None or (isinstance(source, str) and names_a_file(source)):
        need(tokenizer, "text")
        longest = min(part for part in (length, tokenizer.model_max_length, 1024) if part is not None)
        return windows(source, tokenizer, length=longest, bos=bos)
    if isinstance(source, str):
        return prompts([source], tokenizer, bos)
    if isinstance(source, (list, tuple)):
        if not source or any(isinstance(part, str) for part in source):
            return prompts(source, tokenizer, bos)
        if is_chat(source):
            return chats([source], tokenizer, bos)
        if all(is_chat(part) for part in source):
            return chats(source, tokenizer, bos)
    return None


def _no_bos(bos: Any) -> None:
    if bos is not None:
        raise TokensError("bos is for text, and these are token ids", got=f"bos={shown(bos)}", fix="leave bos out")


def _unpacked(source: Any, mask: Any) -> tuple[Any, Any]:
    """Ids and mask of what a tokenizer returned, in one piece or prompt by prompt; anything else as it is."""
    if isinstance(source, (list, tuple)) and source and all(_is_encoding(part) for part in source):
        parts = [_unpacked(part, None) for part in source]
        masks = [part[1] for part in parts]
        whole = None if all(one is None for one in masks) else masks
        return [part[0] for part in parts], whole if mask is None else mask
    if not isinstance(source, Mapping):
        return source, mask
    names = [said(name) for name in source]
    if not _is_encoding(source) or _IDS not in source:
        raise TokensError("one text at a time is read here", got=", ".join(names)[:80], expected="a text or token ids")
    if unknown := [name for name in names if name not in {_IDS, _MASK, *_ASIDE}]:
        raise TokensError(
            "this encoding holds more than ids and their mask", got=", ".join(unknown)[:80],
            expected=f"{_IDS} and {_MASK}", fix="leave the rest out, or give all of it to uw.images(lm, …)",
        )  # fmt: skip
    if mask is not None and _MASK in source:
        raise TokensError("two masks were given", got=f"mask= and {_MASK}", fix="leave mask out")
    return source[_IDS], source.get(_MASK, mask)


def _numbers(ids: Any, mask: Any, tokenizer: Any) -> Tokens:
    """Token ids as Tokens: a matrix, one row, or rows of unequal length."""
    ids, mask = (_rows(part) for part in (ids, mask))
    unequal = isinstance(ids, list) and len({len(row) for row in ids if isinstance(row, (list, tuple))}) > 1
    if not unequal:
        tokens = from_ids(ids, mask)
    else:
        masks = [None] * len(ids) if mask is None else list(mask)
        if len(masks) != len(ids):
            raise TokensError("the mask has another shape than the token ids", got=len(masks), expected=len(ids))
        rows = [from_ids([row], None if one is None else [one]) for row, one in zip(ids, masks, strict=True)]
        tokens = from_rows([part.ids[0] for part in rows])
    if mask is None:
        _require_no_padding(tokens, tokenizer)
    return tokens


def _rows(part: Any) -> Any:
    """One row alone is a list of one row; rows that are arrays become lists."""
    if getattr(part, "ndim", 2) == 1 and (array := array_of(part)) is not None and len(array):
        return array[None]
    if not isinstance(part, (list, tuple)) or not part:
        return part
    part = [row.tolist() if hasattr(row, "tolist") else row for row in part]
    return [part] if all(isinstance(number, int) for number in part) else part


def _require_no_padding(tokens: Tokens, tokenizer: Any) -> None:
    """Raise TokensError where a prompt begins or ends with the token that fills up, and nothing says that it does not.

    Where that is also BOS or EOS, as with GPT-2, one is what begins or ends a text, and two are padding.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    shared = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    run = 2 if shared else 1
    for prompt, (row, length) in enumerate(zip(tokens.ids, tokens.lengths, strict=True)):
        ids = row[:length]
        if length > run and any((end == pad).all() for end in (ids[:run], ids[-run:])):
            raise TokensError(
                f"prompt {prompt} begins or ends with padding, which no mask says", got=f"the padding token {pad}",
                fix="pass what the tokenizer returned whole, or its attention_mask as mask",
            )  # fmt: skip
