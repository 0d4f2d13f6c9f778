"""What does a scan, or an audit, amount to in one paragraph?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unwrite.report.audited import removed
from unwrite.report.believed import belief
from unwrite.report.scanned import Row, rows, texts
from unwrite.report.survived import told
from unwrite.result import Result

# What is claimed, and what that rests on.
Claimed = tuple[str, str]
_NAMED = 3
# The identities that say whether nodes add up to the model.
ADDED = ("heads", "stream", "locations", "logits", "values")


def of_scan(result: Result) -> str:
    """How levels change in words, text by text, with what that does not say."""
    return _joined(claims_of_scan(result))


def of_audit(result: Result) -> str:
    """What survives, and which attributions can be believed."""
    return _joined(claims_of_audit(result))


def _joined(claims: list[Claimed]) -> str:
    return " ".join(part for claim in claims for part in claim if part)


def claims_of_scan(result: Result) -> list[Claimed]:
    """The same, claim by claim."""
    caveat = (
        "These are levels: all that lies along a write, whoever wrote it. Whether a write was erased, and by whom, "
        "only an executed run without it can say (unwrite verify)."
    )
    return [(levels(result), ""), (caveat, _exact(result))]


def claims_of_audit(result: Result) -> list[Claimed]:
    """The same, claim by claim."""
    found, rest, sound = told(removed(result))
    believed = belief(result.data)
    return [(found, ""), (rest, sound), (f"{believed[0].upper()}{believed[1:]}.", _exact(result))]


def _exact(result: Result) -> str:
    known = result.provenance["model"]["certificate"]
    return f"The decomposition is exact to {max(known[name] for name in ADDED if name in known):.0e}."


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
