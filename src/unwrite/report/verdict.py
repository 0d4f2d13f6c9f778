"""What does a scan amount to, in one paragraph?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unwrite.report.audited import removed
from unwrite.report.believed import belief
from unwrite.report.scanned import Row, rows, texts
from unwrite.report.survived import told
from unwrite.result import Result

_NAMED = 3
# The identities that say whether nodes add up to the model.
ADDED = ("heads", "stream", "locations", "logits", "values")


def verdict(result: Result) -> str:
    """The finding in words, text by text, with what it does not say."""
    return " ".join(part for claim in claims(result) for part in claim if part)


def claims(result: Result) -> list[tuple[str, str]]:
    """The same, claim by claim, each with what it rests on."""
    model = result.provenance["model"]
    worst = max(model["certificate"][name] for name in ADDED if name in model["certificate"])
    exact = f"The decomposition is exact to {worst:.0e}."
    if result.method == "audit":
        found, rest, sound = told(removed(result))
        believed = belief(result.data)
        return [(found, ""), (rest, sound), (f"{believed[0].upper()}{believed[1:]}.", exact)]
    caveat = (
        "These are levels: all that lies along a write, whoever wrote it. Whether a write was erased, and by whom, "
        "only an executed run without it can say (unwrite verify)."
    )
    return [(levels(result), ""), (caveat, exact)]


def levels(result: Result) -> str:
    """How the levels of all writes change, text by text, without the caveats."""
    model = result.provenance["model"]["name"]
    return " ".join(_of_text(model, name, *rows(data), read=read) for name, data, read in texts(result))


def _of_text(model: str, name: str, shown: Sequence[Row], folded: Sequence[str], read: Mapping[str, Any]) -> str:
    source = name or read["source"]
    kinds = {kind: [row for row in shown if row.says.startswith(kind)] for kind in ("rises", "falls", "reverses")}
    counts = ", ".join(f"{kind} along {len(found)}" for kind, found in kinds.items())
    opposed = [row for row in shown if row.opponents]
    sentence = (
        f"{model} on {source} ({read['prompts']} × {read['length']} tokens): {len(shown)} of "
        f"{len(shown) + len(folded)} nodes write materially. The level {counts} of them"
    )
    losing = kinds["reverses"] + kinds["falls"]
    if losing:
        sentence += f" (most energy: {'; '.join(f'{row.writer} {row.says}' for row in losing[:_NAMED])})"
    sentence += f"; nodes write against {len(opposed)}"
    if opposed:
        # Most energy moved: a write that is tiny beside the stream has large shares, and says little.
        most = max(opposed, key=lambda row: row.moved)
        sentence += f", with most energy {most.opponents[0]} along {most.writer}"
    return sentence + "."
