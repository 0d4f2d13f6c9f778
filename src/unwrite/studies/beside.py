"""What do attribution and erasure say of a circuit's nodes, and which would direct attribution have chosen instead?

Beside each node its direct, net and further readings, the executed truth, and what survives of its write. An opponent
is a node whose executed total is below 0: the answer is better off without it. (facts: systems on real models, §4)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from unwrite.circuits import Circuit
from unwrite.errors import ResultError, shown
from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.orders import READINGS
from unwrite.result import Result, build, quantity, require_result
from unwrite.stats.jackknife import ratio

HELPS, OPPONENT, UNDECIDED = "helps", "opponent", "undecided"
_WORDS = f"{HELPS}: the 95 % interval of total lies above 0; {OPPONENT}: below 0; {UNDECIDED}: anything else"


def beside(circuit: Circuit, dla: Result, survival: Result | None = None) -> Result:
    """The nodes of a circuit, and as many that `direct` alone would have chosen, with what was executed of each.

    Arguments: `circuit`; `dla` what `uw.dla` found in the same model, whose prompts count as independent; `survival`
    what `uw.survival` found, of all or of some of the nodes.
    Returns a Result by node, the circuit's own first: `chosen_by` ("both", "circuit", "direct alone"), `score`, the
    readings as means over prompts, `total` (executed) with `total_low` and `total_high` (95 %, jackknife over prompts,
    NaN for fewer than three), `word` (helps, opponent, undecided), and `survival` at the end of the stream with
    `survival_low`, `survival_high` and `verdict` ("" where nobody asked).
    Raises ResultError for results of another model, and for a dla without executed totals.

    Example: `uw.beside(circuit, uw.dla(lm, prompts, " Mary", " John"), uw.survival(lm, tokens)).table()`
    """
    if not isinstance(circuit, Circuit):
        raise ResultError("this is no circuit", got=shown(circuit), expected="a uw.Circuit")
    require_result("dla", dla, "dla")
    if survival is not None:
        require_result("survival", survival, "survival")
    for one in (dla, survival):
        if one is not None and circuit.weights not in ("", one.provenance["model"]["weights"]):
            raise ResultError(f"the {one.method} is of another model than the circuit", fix="ask the circuit's model")
    if "total" not in dla.data:
        raise ResultError("this dla has no executed totals", fix="ask for uw.dla(…, total=True)")
    nodes = [str(name) for name in dla.data["node"].values]
    own = [name for name in circuit.ranked if name in nodes]
    if not own:
        raise ResultError("the dla has none of the circuit's nodes", got=", ".join(circuit.ranked[:4]) or "none")
    direct = _means(dla, "direct")
    able = [name for name in nodes if parse_node(name).kind in (*PROJECTED, *MLPS)]
    by_direct = sorted(able, key=lambda name: -abs(direct[nodes.index(name)]))[: len(own)]
    rows = [*own, *(name for name in by_direct if name not in own)]
    return _result(circuit, dla, survival, rows, by_direct)


def _means(dla: Result, name: str) -> np.ndarray:
    return dla.data[name].transpose("prompt", "node").mean("prompt").values


def _result(circuit: Circuit, dla: Result, survival: Result | None, rows: list[str], by_direct: list[str]) -> Result:
    at = [[str(name) for name in dla.data["node"].values].index(name) for name in rows]
    total = dla.data["total"].transpose("prompt", "node").values[:, at]
    mean, low, high = ratio(total, np.ones(len(total)), np.arange(len(total)))
    variables: dict[str, Any] = {
        name: quantity(("node",), _means(dla, name)[at], "logit", f"mean over prompts of {dla.data[name].equation}")
        for name in READINGS if name in dla.data and name != "total"
    }  # fmt: skip
    ends = "its 95 % interval, jackknife over prompts"
    variables["total"] = quantity(("node",), mean, "logit", f"mean over prompts of {dla.data['total'].equation}")
    variables |= {
        f"total_{end}": quantity(("node",), part, "logit", ends) for end, part in (("low", low), ("high", high))
    }
    word = np.where(low > 0, HELPS, np.where(high < 0, OPPONENT, UNDECIDED)).astype(object)
    variables["word"] = quantity(("node",), word, "1", _WORDS)
    inside = {name: "both" if name in by_direct else "circuit" for name in circuit.ranked}
    variables["chosen_by"] = ("node", np.array([inside.get(name, "direct alone") for name in rows], dtype=object))
    score = dict(zip(circuit.nodes, circuit.scores, strict=True))
    scores = np.array([score.get(name, np.nan) for name in rows])
    variables["score"] = quantity(("node",), scores, "of the order", "how much the node helps, as the circuit has it")
    variables |= {} if survival is None else _survived(survival, rows)
    data = xr.Dataset(variables, {"node": rows}).assign_attrs(row_axes="node", of=f"{len(total)} prompts")
    settings = {"replace": dla.provenance["settings"]["replace"], "circuit": [*circuit.nodes]}
    return build("beside", data, settings, dla.provenance["model"], dla.provenance["tokens"])


def _survived(survival: Result, rows: list[str]) -> dict[str, Any]:
    """What is left of each write at the end of the stream."""
    writers = [str(name) for name in survival.data["writer"].values]
    made: dict[str, Any] = {}
    for name, part in (("survival", "end"), ("survival_low", "end_low"), ("survival_high", "end_high")):
        values = survival.data[part].values
        found = np.array([values[writers.index(row)] if row in writers else np.nan for row in rows])
        made[name] = quantity(("node",), found, "1", survival.data[part].attrs["equation"])
    said = survival.data["verdict"].values
    verdict = [str(said[writers.index(row)]) if row in writers else "" for row in rows]
    return made | {"verdict": ("node", np.array(verdict, dtype=object))}
