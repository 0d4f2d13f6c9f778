"""What should make a reader careful about this result? Typed sentences, each with the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unwrite.report import audited, believed
from unwrite.report.scanned import at_the_start, disagreements, texts
from unwrite.report.verified import some
from unwrite.result import Result

# An identity is named above this part of the limit at which the model would be refused.
NEAR_LIMIT = 0.1
FEW_PROMPTS = 20
SINK = 10.0
LOW_TRUST = 0.5


@dataclass(frozen=True)
class Alert:
    """A kind (precision, sample, positions, text, attribution, writers) and a sentence."""

    kind: str
    words: str


def precision(result: Result) -> Iterator[Alert]:
    """Identities that do not hold, or hold with little room."""
    model = result.provenance["model"]
    for name, error in model.get("certificate", {}).items():
        limit = float(model.get("certificate_limits", {}).get(name, model["certificate_limit"]))
        if not error <= limit:
            yield Alert("precision", f"the identity “{name}” does not hold ({error:.0e}): what rests on it is refused")
        elif error > NEAR_LIMIT * limit:
            yield Alert("precision", f"the identity “{name}” holds to {error:.0e} only; at {limit:.0e} it is refused")


def sample(result: Result) -> Iterator[Alert]:
    """Few prompts, and positions that were left out or counted apart."""
    skip = result.provenance["settings"]["skip"]
    for name, data, _ in texts(result):
        where = f" of {name}" if name else ""
        n = int(data["n_clusters"])
        if n < FEW_PROMPTS:
            yield Alert("sample", f"only {n} independent prompts{where}: intervals are wide and themselves uncertain")
        below, beyond = (int(data[part].sum()) for part in ("n_below_floor", "n_beyond_grid"))
        if below:
            yield Alert("positions", f"{below:,} ratios{where} left out, where a write is next to nothing")
        if beyond:
            yield Alert("positions", f"{beyond:,} ratios{where} beyond ±100, counted at the border")
        times = at_the_start(data)
        if skip and (sinks := np.flatnonzero(times > SINK)).size:
            worst = sinks[times[sinks].argmax()]
            words = (
                f"{len(sinks)} nodes write more than {SINK:.0f} × their usual norm at the first {skip} of each prompt"
            )
            most = f"{data['writer'].values[worst]} {times[worst]:.0f} ×"
            yield Alert("positions", f"{words}{where} (most: {most}), an attention sink: counted apart")


def reading(result: Result) -> Iterator[Alert]:
    """What depends on the text."""
    return (Alert("text", f"the reading depends on the text. {line}") for line in disagreements(result))


def writers(result: Result) -> Iterator[Alert]:
    """What the writers of an audit may be mistaken for."""
    proofs = list(audited.verified(result))
    filled = [one.attrs["writer"] for one in proofs if one.attrs["verdict"] == "filled in"]
    if filled:
        yield Alert(
            "writers",
            f"{', '.join(filled)}: survival is low because later nodes would write more of the same if it were "
            "missing. That is a backup, not erasure",
        )
    if "text" in result.data.dims:
        return
    material = result.data["writer"].values[result.data["material"].values.astype(bool)]
    left = [str(writer) for writer in material if writer not in result.data["removed"].values]
    if left:
        words = f"{len(left)} of {len(material)} material writers were not taken out ({some(left)})"
        yield Alert("writers", f"{words}: what survives of them is not known")


def attribution(result: Result) -> Iterator[Alert]:
    """Groups of nodes whose direct attribution says little."""
    one = result.data.sel(form="pooled", replacement=believed.HEADLINE, reading="direct")
    for group in ("heads", "mlps"):
        value = float(one["trust"].sel(group=group))
        if value < LOW_TRUST:
            yield Alert(
                "attribution",
                f"direct attribution of {group} correlates {value:.2f} with what happens when the write is replaced: "
                "do not read it node by node",
            )
