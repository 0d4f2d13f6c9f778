"""Which ids does a tokenizer give a prompt or a chat, and what begins it?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from unwrite.errors import TokensError, shown
from unwrite.prompts.tokens import Tokens, bare, from_rows, require_unicode

Message = Mapping[str, Any]
# What else than being called is asked of a tokenizer.
_MOST_IDS = 2**31
_ABLE = ("decode", "convert_ids_to_tokens", "convert_tokens_to_ids")


def is_tokenizer(tokenizer: Any) -> bool:
    """Can this read text as a tokenizer of transformers does?"""
    return callable(tokenizer) and all(hasattr(type(tokenizer), name) for name in _ABLE)


def need(tokenizer: Any, what: str, instead: str = "pass token ids") -> None:
    """Raise TokensError where there is no tokenizer, or what is none."""
    if tokenizer is None:
        raise TokensError(
            f"{what} needs a tokenizer, and this model came without one",
            fix=f"{instead}, or load the model with uw.load(…, tokenizer=…)",
        )
    if not is_tokenizer(tokenizer):
        raise TokensError(
            f"{what} needs a tokenizer", got=shown(tokenizer), expected="one of transformers", fix="pass lm.tokenizer"
        )


def begins(tokenizer: Any, bos: int | bool | None, sample: str) -> list[int]:
    """The ids that are put before a text such as `sample`: the tokenizer's own, unless `bos` says otherwise.

    Raises TokensError for True where there is no BOS, and for anything but True, False, None or an id.
    """
    if bos is False:
        return []
    if bos is None or bos is True:
        own = _put_before(tokenizer, sample)
        if own or bos is None:
            return own
        if tokenizer.bos_token_id is None:
            raise TokensError("the tokenizer has no token that begins a text", fix="pass its id as bos, or bos=False")
        return [tokenizer.bos_token_id]
    if not isinstance(bos, Integral) or not 0 <= bos < _MOST_IDS:
        raise TokensError("bos is what begins a text", got=shown(bos), expected="True, False, or the id of a token")
    return [int(bos)]


def _put_before(tokenizer: Any, sample: str) -> list[int]:
    """What the tokenizer's own post-processing puts before a text; what it puts behind one ends it, and is left out."""
    whole, own = list(tokenizer(sample, verbose=False)["input_ids"]), bare(sample, tokenizer)
    for at in range(len(whole) - len(own) + 1 if own else 0):
        if whole[at : at + len(own)] == own:
            return whole[:at]
    return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []


def says(ids: list[int], prefix: list[int], tokenizer: Any) -> bool:
    """Does a text itself begin with the special tokens that would be put before it?"""
    return bool(prefix) and ids[: len(prefix)] == prefix and set(prefix) <= set(tokenizer.all_special_ids)


def _begun(ids: list[int], prefix: list[int], tokenizer: Any) -> list[int]:
    return ids if says(ids, prefix, tokenizer) else prefix + ids


def prompts(strings: Sequence[Any], tokenizer: Any, bos: int | bool | None = None) -> Tokens:
    """Each string as one whole prompt, of its own length; `bos` as in `uw.text`.

    Raises TokensError for anything but strings, or an empty one.
    """
    need(tokenizer, "a prompt")
    if wrong := [part for part in strings if not isinstance(part, str)]:
        raise TokensError("not prompts", got=shown(wrong[0]), expected="a string or a list of strings")
    not_empty("the prompt", strings)
    name = "1 prompt" if len(strings) == 1 else f"{len(strings)} prompts"
    digest = digest_of(name, strings)
    own = [bare(part, tokenizer) for part in strings]
    if not all(own):
        raise TokensError(f"prompt {own.index([])} has no token", got=shown(strings[own.index([])]))
    rows = [_begun(ids, begins(tokenizer, bos, part), tokenizer) for ids, part in zip(own, strings, strict=True)]
    return from_rows(rows, name, digest)


def is_chat(source: Any) -> bool:
    """Is this a list of messages?"""
    listed = isinstance(source, (list, tuple)) and len(source) > 0
    return listed and all(isinstance(part, Mapping) and "role" in part for part in source)


def chats(source: Sequence[Sequence[Message]], tokenizer: Any, bos: int | bool | None = None) -> Tokens:
    """Each list of messages as one prompt, by the model's own chat template, which also says what begins it.

    The assistant is about to answer; where the last message is the assistant's, it goes on.
    Raises TokensError for a tokenizer without a template, or where the template refuses the messages.
    """
    need(tokenizer, "a chat")
    if not getattr(tokenizer, "chat_template", None):
        raise TokensError(
            "this tokenizer has no chat template", got="messages", expected="a string, as the model was trained on it",
            fix="write the prompt as text, or set tokenizer.chat_template",
        )  # fmt: skip
    rows = [_templated(messages, tokenizer) for messages in source]
    if bos is not None and bos is not False:
        rows = [_begun(row, begins(tokenizer, bos, "a"), tokenizer) for row in rows]
    return from_rows(rows, "1 chat" if len(rows) == 1 else f"{len(rows)} chats")


def _templated(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    goes_on = messages[-1]["role"] == "assistant"
    try:
        told = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=False,
            add_generation_prompt=not goes_on, continue_final_message=goes_on,
        )  # fmt: skip
    except Exception as error:  # a template is a program of the model's makers, and may raise anything
        raise TokensError(
            "the chat template refuses these messages", got=error,
            expected="messages with role and content, as the model's card shows them",
        ) from error  # fmt: skip
    return list(told)


def digest_of(name: str, documents: Sequence[str]) -> str:
    """A hash of documents. Raises TokensError for half a character."""
    return hashlib.sha256(require_unicode(name, "\0".join(documents))).hexdigest()


def not_empty(name: str, documents: Sequence[str]) -> list[str]:
    """The documents. Raises TokensError where there is nothing in any of them."""
    if not any(document.strip() for document in documents):
        raise TokensError(f"{name} is empty", expected="some text")
    return list(documents)
