"""What can go wrong, in words a user can act on: what happened, what was got, what was expected, what to do next."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence, Set
from numbers import Integral, Real
from typing import Any, cast

# A part of a message has at most so many characters, and of something listed so many are shown.
_LONG, _WIDE, _LISTED = 600, 80, 8
# No count of anything is larger.
_MOST = 2**31 - 1


class UnwriteError(Exception):
    """Base of every error that a user can cause.

    Arguments: `what` happened (a sentence without full stop), and where they help, what was `got` (text, another error,
    or the very thing, which is `shown`), what was `expected` and how to `fix` it. The message is plain text on one
    line, safe to print in a terminal.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"Got: {got if isinstance(got, str) else shown(got)}")
        if expected is not None:
            parts.append(f"Expected: {expected}")
        if fix is not None:
            parts.append(f"Next: {fix}")
        super().__init__(". ".join(_short(plain(part), _LONG).rstrip(".") for part in parts) + ".")


class ModelError(UnwriteError):
    """A model that cannot be loaded, is not supported, or whose decomposition is not exact."""


class PrecisionError(ModelError):
    """A model whose dtype cannot hold what it computes."""


class NodeError(UnwriteError):
    """A node, location or site that cannot be parsed or that this model does not have."""


class TokensError(UnwriteError):
    """Text or token ids that cannot be used with this model."""


class NumericError(UnwriteError):
    """A number that is not finite, or that cannot be computed from what was given."""


class ResultError(UnwriteError):
    """A result that cannot be written, read or combined."""


class Stopped(KeyboardInterrupt):
    """An interrupt of a run that can say what stays of it: the files `kept` in `place`, and the stages `missing`.

    The message is plain text on one line.
    """

    def __init__(self, stage: str, place: object = None, kept: tuple[str, ...] = (), missing: tuple[str, ...] = ()):
        self.place, self.kept, self.missing = place, kept, missing
        if kept:
            words = f"Kept in {place}: {', '.join(kept)}"
        elif missing:
            words = "Nothing is kept of what was finished, since no folder was named"
        else:
            words = "Nothing was finished, nothing is kept"
        if any(name.endswith(".npz") for name in kept):
            words += ", from which the same command goes on"
        lacking = f". Missing: {', '.join(missing)}" if missing else ""
        super().__init__(plain(f"stopped at {stage}. {words}{lacking}."))


def one_of(setting: str, value: object, known: Sequence[str], also: str = "") -> None:
    """Raise NumericError unless `value` is a name that is `known`; `also` is what else the caller would have taken."""
    if isinstance(value, str) and value in known:
        return
    names = (" or " if len(known) == 2 else ", ").join(map(repr, known))
    raise NumericError(f"{setting} is unknown", got=shown(value), expected=f"{names}, or {also}" if also else names)


def whole(what: str, value: object, least: int, most: int = _MOST) -> int:
    """A whole number from `least` to `most`. Raises NumericError, which says `what` it is, for anything else."""
    found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if found is not None and least <= found <= most:
        return found
    large = most < _MOST or (found is not None and found > most)
    span = f"an integer from {least} to {most}" if large else f"an integer, at least {least}"
    raise NumericError(what, got=shown(value), expected="a positive integer" if not large and least == 1 else span)


def number(what: str, value: object, expected: str, fits: Callable[[Any], bool]) -> None:
    """Raise NumericError, which says `what` it is, unless `value` is a real number that `fits`; NaN never does."""
    if not isinstance(value, Real) or isinstance(value, bool) or value != value or not fits(value):
        raise NumericError(what, got=shown(value), expected=expected)


def finite(what: str, value: object) -> None:
    """Raise NumericError, which says `what` it is, unless `value` is a number that is not infinite."""
    number(what, value, "a finite number", lambda value: abs(value) <= sys.float_info.max)


def seconds(what: str, value: object) -> float:
    """Seconds, as a number or as a person writes them: "90s", "5m", "2h". Raises NumericError for anything else."""
    expected = "a time above 0, in seconds or as 90s, 5m or 2h"
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh]?)\s*", value) if isinstance(value, str) else None
    if found is not None:
        value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
    number(what, value, expected, lambda value: 0 < value <= sys.float_info.max)
    return float(cast("float", value))


def function(setting: str, value: object) -> None:
    """Raise NumericError unless `value` can be called, or is None."""
    if value is not None and not callable(value):
        raise NumericError(f"{setting} is a function", got=shown(value), expected="what can be called, or None")


def require(fits: bool, error: type[UnwriteError], what: str, got: object, expected: str) -> None:
    """Raise `error`, which says `what` it is, unless it fits."""
    if not fits:
        raise error(what, got=shown(got), expected=expected)


def several(what: str, values: Any, expected: str, error: type[UnwriteError]) -> list[Any]:
    """Everything in a list, or what is like one. Raises `error`, which says `what` they are, for anything else."""
    listed = isinstance(values, (Sequence, Set, Iterator)) or getattr(values, "ndim", None) == 1
    if not listed or isinstance(values, (str, bytes)):
        raise error(what, got=shown(values), expected=expected)
    try:
        return list(values)
    except Exception as wrong:  # noqa: BLE001 - whatever a stranger's own list raises means the same
        raise error(what, got=wrong, expected=expected) from None


def counted(number: int, thing: str) -> str:
    """So many of a thing: "1 token", "2 tokens"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def shown(value: object) -> str:
    """`value` in a few words: a number or name as one would type it, an error by its own words, else kind and shape."""
    if isinstance(value, str):
        return _short(str.__repr__(value), _WIDE)
    if isinstance(value, bytes):
        return _short(bytes.__repr__(value), _WIDE)
    if isinstance(value, BaseException):
        return _words(value)
    if value is None or isinstance(value, (bool, int, float, complex)) or value is ...:
        return _number(value)
    if isinstance(value, (list, tuple)) and 0 < len(value) <= _LISTED and all(map(_simple, value)):
        inside = ", ".join(map(shown, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    kind = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{kind} of {len(value)}" if value else f"empty {kind}"
    shape, dtype = (getattr(value, name, None) for name in ("shape", "dtype"))
    if isinstance(shape, tuple) and dtype is not None:
        return str(value) if not shape and kind in str(dtype) else f"{kind} of {dtype} {list(shape)}"
    return plain(value) if isinstance(value, slice) or _is_path(value) else kind


def _simple(value: object) -> bool:
    return value is None or isinstance(value, (str, bool, int, float)) or _is_path(value)


def _is_path(value: object) -> bool:
    return hasattr(type(value), "__fspath__") and hasattr(type(value), "joinpath")


def _number(value: object) -> str:
    try:
        return _short(repr(value), _WIDE)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        return "an integer of thousands of digits"


def _words(error: BaseException) -> str:
    """What an error says: its first line, without where in memory something was."""
    words = getattr(error, "strerror", None) or said(error)
    lines = [line.strip() for line in str(words).splitlines() if line.strip()]
    return re.sub(r"\s*(?:at )?\b0x[0-9a-fA-F]{4,}", "", lines[0]) if lines else "an error that does not say why"


def said(value: object) -> str:
    """What `value` calls itself; "" where it cannot say."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a stranger's object may raise anything
        return ""


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plain(text: object) -> str:
    """`text` as one printable line: control, format and surrogate characters become their escapes.

    Names of files, models and tokens are written by strangers; a terminal obeys ESC and right-to-left overrides.
    """
    text = said(text)
    return text if text.isprintable() else "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
