"""What can go wrong, in words a user can act on: what happened, what was got, what was expected, what to do next."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


class UnwriteError(Exception):
    """Base of every error that a user can cause.

    Arguments: `what` happened (a sentence without full stop), and where they help, what was `got`, what was
    `expected` and how to `fix` it. The message is plain text on one line, safe to print in a terminal.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"Got: {got}")
        if expected is not None:
            parts.append(f"Expected: {expected}")
        if fix is not None:
            parts.append(f"Next: {fix}")
        super().__init__(". ".join(plain(part).rstrip(".") for part in parts) + ".")


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
    got = repr(value) if isinstance(value, str) else type(value).__name__
    names = (" or " if len(known) == 2 else ", ").join(map(repr, known))
    raise NumericError(f"{setting} is unknown", got=got, expected=f"{names}, or {also}" if also else names)


def plain(text: object) -> str:
    """`text` as one printable line: control, format and surrogate characters become their escapes.

    Names of files, models and tokens are written by strangers; a terminal obeys ESC and right-to-left overrides.
    """
    text = str(text)
    return text if text.isprintable() else "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
