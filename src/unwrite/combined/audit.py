"""Does this model manage its memory, and what follows? scan, and a verdict in words: where methods are combined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unwrite import result as results
from unwrite.methods.scan import scan
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.report import page
from unwrite.report.verdict import verdict
from unwrite.result import Result
from unwrite.run.stream import Listener
from unwrite.tokens import Tokens, windows


def audit(lm: Model, tokens: Any, out: str | Path | None = None, listener: Listener | None = None) -> Result:
    """Scan, and say in one paragraph what was found.

    Arguments: `tokens` as `uw.scan` takes them; `out` a folder that gets `result.nc`, `table.csv` and `report.html`.
    Returns the scan's Result; the paragraph is its attribute `verdict`.
    Raises what `uw.scan` raises, and ResultError where `out` cannot be written (found before the scan runs).

    Example: `uw.audit(uw.load("gpt2"), uw.text("book.txt", lm.tokenizer), out="audit")`
    """
    if out is None:
        return _judged(scan(lm, tokens, listener=listener))
    with results.folder(out) as place:
        found = _judged(scan(lm, tokens, listener=listener))
        page.save_all(found, place)
    return found


def _judged(found: Result) -> Result:
    return Result(found.data.assign_attrs(verdict=verdict(found)))


def demonstration(n: int = 300, length: int | None = None) -> tuple[Model, Tokens]:
    """A planted model and Python's own documentation topics: an audit that needs no file."""
    from pydoc_data.topics import topics

    model = planted("gpt2")
    lm = view(model.hf, model.tokenizer, name="planted gpt2")
    documents = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = windows(documents, model.tokenizer, n=n, length=length or 256)
    return lm, tokens.named("Python's documentation topics")
