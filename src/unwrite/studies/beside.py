"""What do attribution and erasure say of a circuit's nodes, and which would direct attribution have chosen instead?

Beside each node its direct, net and further readings, the executed truth, and what survives of its write. An opponent
is a node whose executed effect is below 0: the answer is better off without it. A size alone does not say what a head
is for: its part is what it attends to and which way it writes about that. (facts: systems on real models, §2.1, §4)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from unwrite.circuits import Circuit, attended, in_words, most
from unwrite.errors import ResultError, shown
from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.orders import READINGS
from unwrite.prompts.pairs import Pairs
from unwrite.result import Result, build, quantity, require_result
from unwrite.stats.jackknife import ratio
from unwrite.studies.categories import RULES, by_answer, category, interval

HELPS, OPPONENT, UNDECIDED = "helps", "opponent", "undecided"
_WORDS = f"{HELPS}: the 95 % interval of {{}} lies above 0; {OPPONENT}: below 0; {UNDECIDED}: anything else"
# A head attends to a role with so much of its weight, and writes about it by so much of the logit difference, at least.
LOOKS, WRITES = 0.25, 0.01
# By whether what is attended to is the answer or the alternative, and by the sign of what is written, as direct says.
PARTS = {
    ("answer", 1): "mover",
    ("answer", -1): "negative mover",
    ("against", 1): "suppressor",
    ("against", -1): "mover of the alternative",
}
LOOKED = {"pattern": "attends to", "value": "brings something from (its share of ‖A v W_O‖)"}
_PARTS = (
    "what a head attends to from the read row (a role whose token is the answer, or the alternative; at least "
    f"{LOOKS:g}) and which way it writes about it (the 95 % interval of direct on one side of 0, its mean at least "
    f"{WRITES:g} of the logit difference): " + "; ".join(
        f"{word}: {to}, {'for' if sign > 0 else 'against'} the answer" for (to, sign), word in PARTS.items()
    )
)  # fmt: skip


def beside(
    circuit: Circuit,
    dla: Result,
    survival: Result | None = None,
    *,
    effects: Result | None = None,
    attention: Result | None = None,
    pairs: Pairs | None = None,
) -> Result:
    """The nodes of a circuit, and as many that `direct` alone would have chosen, with what was executed of each.

    Arguments: `circuit`; `dla` what `uw.dla` found in the same model, whose prompts count as independent; `survival`
    what `uw.survival` found, of all or of some of the nodes; `effects` what `uw.effects(…, method="exact")` found with
    the circuit's own kind of replacement, which then has the word; `attention` of the base prompts of `pairs`, whose
    roles and answers say what a head attends to, or, where it is weighed by value, brings something from; the dla is of
    these prompts too.
    Returns a Result by node, the circuit's own first: `chosen_by` ("both", "circuit", "direct alone"), `score`, the
    readings as means over prompts, `total` (executed) with `total_low` and `total_high` (95 %, jackknife over prompts,
    NaN for fewer than three), `executed` (what is lost by the replacement of `effects`) with its interval, `word`
    (helps, opponent, undecided: of `executed`, or else of `total`), `looks` ("S2 .78"), `part` (mover, negative mover,
    suppressor, mover of the alternative; "" of others), and `survival` at the end of the stream with `survival_low`,
    `survival_high` and `verdict` ("" where nobody asked). Of a dla against the mean of several also the interval of
    `direct` and, with `pairs`, `by_answer[node, answer]` and `category` ("correct answer", "some answers (B)",
    "constant", "against", "amplifies", "through others", ""), whose rules are its equation.
    Raises ResultError for results of another model or of other prompts, for effects that were not executed, and where
    neither those nor totals are there.

    Example: `uw.beside(circuit, uw.dla(lm, prompts, " Mary", " John"), uw.survival(lm, tokens)).table()`
    """
    _require(circuit, {"dla": dla, "survival": survival, "effects": effects, "attention": attention}, pairs)
    nodes = [str(name) for name in dla.data["node"].values]
    own = [name for name in circuit.ranked if name in nodes]
    if not own:
        raise ResultError("the dla has none of the circuit's nodes", got=", ".join(circuit.ranked[:4]) or "none")
    direct = _means(dla, "direct")
    able = [name for name in nodes if parse_node(name).kind in (*PROJECTED, *MLPS)]
    by_direct = sorted(able, key=lambda name: -abs(direct[nodes.index(name)]))[: len(own)]
    rows = [*own, *(name for name in by_direct if name not in own)]
    variables = _readings(dla, rows)
    if "option" in dla.data.dims:
        variables |= _direct_ends(dla, rows)
    variables |= {} if effects is None else _executed(effects, rows)
    variables["word"] = _word(variables, "total" if effects is None else "executed")
    variables |= _chosen(circuit, rows, by_direct)
    if attention is not None and pairs is not None:
        variables |= _parts(attention, pairs, dla, rows)
        variables |= _categories(dla, rows, variables)
    variables |= {} if survival is None else _survived(survival, rows)
    data = xr.Dataset(variables, {"node": rows}).assign_attrs(row_axes="node", of=f"{dla.data.sizes['prompt']} prompts")
    settings = {"replace": dla.provenance["settings"]["replace"], "circuit": [*circuit.nodes]}
    return build("beside", data, settings, dla.provenance["model"], dla.provenance["tokens"])


def _require(circuit: Circuit, given: dict[str, Result | None], pairs: Any) -> None:
    """Results of these methods, of one model, and with what goes with them."""
    if not isinstance(circuit, Circuit):
        raise ResultError("this is no circuit", got=shown(circuit), expected="a uw.Circuit")
    _require_results(circuit, given)
    dla, effects = given["dla"], given["effects"]
    if dla is not None and "total" not in dla.data and effects is None:
        raise ResultError("this dla has no executed totals", fix="ask for uw.dla(…, total=True), or pass effects")
    if pairs is not None and not isinstance(pairs, Pairs):
        raise ResultError("roles and answers are those of pairs", got=shown(pairs), expected="a uw.Pairs")
    if (pairs is None) != (given["attention"] is None):
        raise ResultError("attention and pairs say a part together", got="one of them", fix="pass both, or neither")
    if effects is not None and (effects.provenance["settings"]["method"] != "exact" or "mean" not in effects.data):
        raise ResultError("these effects were not executed, or are of several places", fix='method="exact", at="all"')


def _require_results(circuit: Circuit, given: dict[str, Result | None]) -> None:
    for name, one in given.items():
        if one is None and name != "dla":
            continue
        require_result(name, one, name)
        assert one is not None  # noqa: S101 (as it was required)
        if circuit.weights not in ("", one.provenance["model"]["weights"]):
            raise ResultError(f"the {name} is of another model than the circuit", fix="ask the circuit's model")


def _at(result: Result, rows: list[str]) -> list[int]:
    return [[str(name) for name in result.data["node"].values].index(name) for name in rows]


def _means(dla: Result, name: str) -> np.ndarray:
    return dla.data[name].transpose("prompt", "node").mean("prompt").values


def _readings(dla: Result, rows: list[str]) -> dict[str, Any]:
    """Means over prompts, that of the executed total with its interval."""
    at = _at(dla, rows)
    made: dict[str, Any] = {
        name: quantity(("node",), _means(dla, name)[at], "logit", f"mean over prompts of {dla.data[name].equation}")
        for name in READINGS if name in dla.data and name != "total"
    }  # fmt: skip
    if "total" not in dla.data:
        return made
    total = dla.data["total"].transpose("prompt", "node").values[:, at]
    mean, low, high = ratio(total, np.ones(len(total)), np.arange(len(total)))
    made["total"] = quantity(("node",), mean, "logit", f"mean over prompts of {dla.data['total'].equation}")
    return made | _ends("total", low, high, "its 95 % interval, jackknife over prompts")


def _ends(name: str, low: np.ndarray, high: np.ndarray, says: str) -> dict[str, Any]:
    return {f"{name}_{end}": quantity(("node",), part, "logit", says) for end, part in (("low", low), ("high", high))}


def _direct_ends(dla: Result, rows: list[str]) -> dict[str, Any]:
    _, low, high = interval(dla.data["direct"].transpose("prompt", "node").values[:, _at(dla, rows)])
    return _ends("direct", low, high, "its 95 % interval, jackknife over prompts")


def _executed(effects: Result, rows: list[str]) -> dict[str, Any]:
    """What is lost by a replacement: effects turned round; NaN of nodes that were not asked about."""
    mean, low, high = (-effects.data[name].reindex(node=rows).values for name in ("mean", "mean_low", "mean_high"))
    source = effects.provenance["settings"]["source"]
    says = f"what the metric loses, as a mean over pairs, when the node is set to its value of {source}"
    ends = "its 95 % interval, jackknife over templates or pairs"
    return {"executed": quantity(("node",), mean, "logit", says)} | _ends("executed", high, low, ends)


def _word(variables: dict[str, Any], of: str) -> xr.Variable:
    low, high = (variables[f"{of}_{end}"].values for end in ("low", "high"))
    word = np.where(low > 0, HELPS, np.where(high < 0, OPPONENT, UNDECIDED)).astype(object)
    return quantity(("node",), word, "1", _WORDS.format(of))


def _chosen(circuit: Circuit, rows: list[str], by_direct: list[str]) -> dict[str, Any]:
    """By whom, and what the circuit's own order says of it."""
    inside = {name: "both" if name in by_direct else "circuit" for name in circuit.ranked}
    by = np.array([inside.get(name, "direct alone") for name in rows], dtype=object)
    score = dict(zip(circuit.nodes, circuit.scores, strict=True))
    scores = np.array([score.get(name, np.nan) for name in rows])
    says = "how much the node helps, as the circuit has it"
    return {"chosen_by": ("node", by), "score": quantity(("node",), scores, "of the order", says)}


def _parts(attention: Result, pairs: Pairs, dla: Result, rows: list[str]) -> dict[str, Any]:
    """What each head attends to, and its part where that is the answer or the alternative."""
    if {pairs.base.hash} != {one.provenance["tokens"][""]["hash"] for one in (dla, attention)}:
        raise ResultError("dla, attention and pairs are of other prompts", fix="ask of pairs.base")
    found, prompt = attended(attention, pairs.roles), np.arange(len(pairs))
    tokens = {role: pairs.base.ids[prompt, row] for role, row in pairs.roles.items()}
    direct = dla.data["direct"].transpose("prompt", "node").values[:, _at(dla, rows)]
    mean, low, high = ratio(direct, np.ones(len(direct)), prompt)
    size = WRITES * abs(float(dla.data["logit_diff"].mean()))
    sign = np.where(np.abs(mean) < size, 0, np.where(low > 0, 1, np.where(high < 0, -1, 0)))
    looks, part = [""] * len(rows), [""] * len(rows)
    for i, name in enumerate(rows):
        if name in found:
            role, weight = most(found[name])
            looks[i] = in_words(role, weight)
            part[i] = PARTS.get((_token(tokens[role], pairs), int(sign[i])), "") if weight >= LOOKS else ""
    by = LOOKED[str(attention.provenance["settings"]["weigh"])]
    says = {"looks": f"the role that a head {by} most from the read row, and its mean weight", "part": _PARTS}
    return {key: quantity(("node",), np.array(one, dtype=object), "1", says[key])
            for key, one in (("looks", looks), ("part", part))}  # fmt: skip


def _categories(dla: Result, rows: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """What nodes do by which answer is right; only of logits against the mean of several, and with enough prompts."""
    direct = dla.data["direct"].transpose("prompt", "node").values[:, _at(dla, rows)]
    each = by_answer(direct, dla.data["answer_id"].values) if "option" in dla.data.dims else None
    if each is None:
        return {}
    said = dict(zip(dla.data["answer_id"].values.tolist(), dla.data["answer"].values, strict=True))
    words, size = {one: str(said[one]).strip() for one in each}, WRITES * abs(float(dla.data["logit_diff"].mean()))
    of = "executed" if "executed" in found else "total"
    truth = np.stack([found[name].values for name in (of, f"{of}_low", f"{of}_high")])
    made = [
        category(
            interval(direct)[:, i], {words[one]: ends[:, i] for one, ends in each.items()}, truth[:, i], size,
            str(found["looks"].values[i]).startswith("end "),
        )
        for i in range(len(rows))
    ]  # fmt: skip
    says = "; ".join(f"{word}: {rule.format(writes=WRITES)}" for word, rule in RULES.items())
    means = np.stack([ends[0] for ends in each.values()], 1)
    return {
        "by_answer": quantity(("node", "answer"), means, "logit", "mean of direct over the prompts with this answer"),
        "answer": ("answer", np.array([*words.values()], dtype=object)),
        "category": quantity(("node",), np.array(made, dtype=object), "1", says),
    }


def _token(tokens: np.ndarray, pairs: Pairs) -> str:
    """Is the token of a role the answer, or the alternative, of every pair?"""
    asked = {"answer": pairs.answer, "against": pairs.against}
    return next((name for name, one in asked.items() if one is not None and (tokens == one).all()), "")


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
