"""What becomes of a model of every type of transformers? Each is opened or refused, and docs/models.md says so.

`python tests/survey.py` opens a tiny model of every type (`every.py`), or of the types that are named, and writes what
was found as one line of JSON each to docs/models.jsonl, and the page made from these. With `--methods` it also asks
of every opened model what APPLIED names.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import every
from methods import METHODS, few_draws
from unwrite.errors import UnwriteError
from unwrite.model.certificate import IDENTITIES
from unwrite.model.families import BY_HAND, FOUND
from unwrite.model.load import view
from unwrite.model.view import Model

ROOT = Path(__file__).resolve().parents[1]
PAGE, LINES = ROOT / "docs/models.md", ROOT / "docs/models.jsonl"
COMMAND = "python tests/survey.py --methods"
APPLIED = ("scan", "verify", "survival", "dla", "effects")

# At least so many types open. Only ever raised: a test fails when fewer do.
OPENED = {"text": 132, "images": 70}

REFUSED, NOT_MADE, BUG = "refused", "not made", "inner error"
STATUSES = (BY_HAND, FOUND, REFUSED, NOT_MADE, BUG)
TYPES = {"text": every.TEXT, "images": every.IMAGES}

Record = dict[str, Any]


def record(kind: str, mapping: str, methods: Sequence[str] = ()) -> Record:
    """What becomes of one type: its status, with the reason or with the certificate's errors; which methods ran."""
    found: Record = {"mapping": mapping, "type": kind}
    try:
        hf = every.model(kind, mapping)
    except Exception as error:  # noqa: BLE001 - transformers' own, and it says nothing about the model
        return {**found, "status": NOT_MADE, "why": _words(error)}
    found |= {"class": type(hf).__name__, "alone": runs_alone(hf)}
    try:
        lm = view(hf)
    except Exception as error:  # noqa: BLE001 - whatever comes out is what a user would see
        bug = not isinstance(error, UnwriteError) or (found["alone"] and not made(error))
        return {**found, "status": BUG if bug else REFUSED, "why": _words(error)}
    errors = {name: float(f"{error:.0e}") for name, error in lm.certificate.items()}
    return {**found, "status": lm.about["row"], "errors": errors, **_asked(lm, methods)}


def runs_alone(hf: Any) -> bool:
    """Whether the model gives logits of token ids and of nothing else; if not, no error of it is one of ours."""
    ids = every.some_ids()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    try:
        with torch.no_grad():
            return all(
                bool(hf(input_ids=ids, use_cache=False, **more).logits.isfinite().all())
                for more in ({}, {"attention_mask": mask})
            )
    except Exception:  # noqa: BLE001 - the forward pass is the model's own
        return False


def made(error: BaseException) -> bool:
    """Whether a refusal was thought of: it was raised for a reason, and no stranger's error was caught on the way."""
    cause = error.__cause__
    return isinstance(error, UnwriteError) and (cause is None or made(cause))


def _asked(lm: Model, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    return {"methods": {name: _answer(lm, name) for name in methods}} if methods else {}


def _answer(lm: Model, method: str) -> str:
    """ "yes", or why a method does not apply."""
    try:
        with few_draws():
            METHODS[method](lm)
    except UnwriteError as error:
        return _words(error)
    except Exception as error:  # noqa: BLE001 - said on the page
        return f"{BUG}: {_words(error)}"
    return "yes"


def _words(error: BaseException) -> str:
    """What happened and what was got; neither what was expected nor what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = re.split(r"\. (?:Expected|Next): ", said)[0].rstrip(".")
    said = re.sub(r"^.*?(?:none can be found|cannot be decomposed exactly): ", "", said)
    return said if len(said) < 200 else f"{said[:200]}…"


def kept() -> tuple[dict[str, str], list[Record]]:
    """The versions that a survey was made with, and what it found."""
    versions, *records = map(json.loads, LINES.read_text("utf-8").splitlines())
    return versions, records


def counted(records: Iterable[Record], mapping: str) -> Counter[str]:
    """How many types of a mapping have each status."""
    return Counter(one["status"] for one in records if one["mapping"] == mapping)


def opened(records: Iterable[Record], mapping: str) -> int:
    """How many types of a mapping open."""
    counts = counted(records, mapping)
    return counts[BY_HAND] + counts[FOUND]


_TITLES = {"text": "Causal language models", "images": "Models of images and text"}
_HEAD = """# Model types

Which models open? One tiny random model of every type of transformers {transformers} (torch {torch}, float32, a width
of about 32, all parameters drawn), handed to unwrite. **By hand**: its parts are named by a row of `model/families.py`.
**Found**: by a row that was found from one forward pass. Either way the certificate has measured that the parts add up,
and the columns give its largest errors, of values those of attention and of mixers. A column is empty where an identity
says nothing of the model: opened attention of one without attention, values where a mixer shows none, a
run that goes on over keys and values where a mixer keeps something else. **Refused**: with the reason. **Not made**: no
tiny model of it was made here, which says nothing about it.

| | types | by hand | found | refused | not made |
|---|---|---|---|---|---|
{counts}

Not among them are {others} entries of transformers' causal models that are encoders, or decoders of encoders' states.
Models of images and text were given text alone. A mark ✓ says that a method ran, not that its numbers were compared.
This page is made by `{command}`.
"""


def page(versions: Mapping[str, str], records: Sequence[Record]) -> str:
    """docs/models.md."""
    counts = "\n".join(_count(records, mapping) for mapping in TYPES)
    others = len(every.auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - len(every.TEXT)
    parts = [_HEAD.format(counts=counts, others=others, command=COMMAND, **versions)]
    for mapping, title in _TITLES.items():
        own = [one for one in records if one["mapping"] == mapping]
        parts += [f"## {title}\n", *_opened(own), *_refused(own)]
    return "\n".join(parts)


def _count(records: Iterable[Record], mapping: str) -> str:
    counts = counted(records, mapping)
    refused = counts[REFUSED] + counts[BUG]
    cells = (counts.total(), counts[BY_HAND], counts[FOUND], refused, counts[NOT_MADE])
    return f"| {_TITLES[mapping]} | {' | '.join(map(str, cells))} |"


def _opened(records: Iterable[Record]) -> Iterator[str]:
    yield _row("model type", "row", *IDENTITIES, *APPLIED)
    yield _row(*["---"] * (2 + len(IDENTITIES) + len(APPLIED)))
    for one in records:
        if one["status"] in (BY_HAND, FOUND):
            asked = [one.get("methods", {}).get(name, "") for name in APPLIED]
            marks = ["✓" if answer == "yes" else _plain(answer) for answer in asked]
            errors = [_size(one["errors"].get(name)) for name in IDENTITIES]
            yield _row(f"`{one['type']}`", one["status"], *errors, *marks)
    yield ""


def _refused(records: Iterable[Record]) -> Iterator[str]:
    yield _row("model type", "", "because")
    yield _row("---", "---", "---")
    for one in records:
        if one["status"] not in (BY_HAND, FOUND):
            yield _row(f"`{one['type']}`", one["status"], _plain(one["why"]))
    yield ""


def _size(error: float | None) -> str:
    """One digit, and nothing for an identity of a part that a model lacks."""
    return "" if error is None else f"{error:.0e}".replace("e-0", "e-") if error else "0"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(words: str) -> str:
    """Outside of a page's own marks, what would be markup is text."""
    return re.sub(r"([|<>*`_\[\]])", r"\\\1", words)


def write(records: Iterable[Record]) -> None:
    """Write both files."""
    versions = {module.__name__: module.__version__.partition("+")[0] for module in (transformers, torch)}
    ordered = sorted(records, key=lambda one: (list(TYPES).index(one["mapping"]), one["type"]))
    lines = [json.dumps(line, ensure_ascii=False) for line in (versions, *ordered)]
    LINES.write_text("\n".join(lines) + "\n", encoding="utf-8")
    PAGE.write_text(page(versions, ordered), encoding="utf-8")


def main(*asked: str) -> None:
    """Survey the types that are named, or all; the others stay as they were."""
    methods = APPLIED if "--methods" in asked else ()
    named = {word for word in asked if word != "--methods"}
    transformers.logging.set_verbosity_error()
    known = {(one["mapping"], one["type"]): one for one in (kept()[1] if LINES.is_file() else ())}
    for mapping, types in TYPES.items():
        for kind in types:
            if not named or kind in named:
                found = record(kind, mapping, methods)
                known[mapping, kind] = {**_still(known.get((mapping, kind)), found), **found}
                sys.stdout.write(f"{mapping:7}{kind:26}{found['status']:12}{found.get('why', '')}\n")
    write(known.values())


def _still(before: Record | None, now: Record) -> Record:
    """The methods that ran before, if it opens as it did."""
    same = before is not None and "methods" in before and before["status"] == now["status"]
    return {"methods": before["methods"]} if same else {}


if __name__ == "__main__":
    main(*sys.argv[1:])
