"""How many writers does a model erase, who does it, when, and which attributions can be believed of it?

    python examples/survey/survey.py MODEL --work FOLDER         any model of the hub, or a folder, by one command
    python examples/survey/survey.py MODEL --name NAME --text A --text B --work FOLDER
    python examples/survey/survey.py --small --shared ../shared --runs RUNS --work FOLDER
    python examples/survey/survey.py --real REAL --shared ../shared --work FOLDER

A text is a folder (each file a document), a file (cut into stretches), or "python", the documentation that every Python
carries, which is read twice where nothing else is named; a text that is named again gives other documents. Of each
document one window is read. `--small` are the small models at hand, with those that examples/pretrain/sweep.py trained
into RUNS and their checkpoints; `--real` larger ones, each a folder in REAL. What was found is kept as
`results/NAME.json` beside this file, from which `table.py` makes docs/survey.md; what is kept is not measured again,
and a run that was stopped goes on from FOLDER. Before anything long is run, it says what it will take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import unwrite as uw
from unwrite.files import write
from unwrite.methods.survival import fitted
from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.prompts.dataset import identity
from unwrite.prompts.tokens import Tokens
from unwrite.stats.trust import trust
from unwrite.studies.foreseen import stages

RESULTS = Path(__file__).parent / "results"
# Of each text so many documents, of each of them one window of so many tokens; and so many decoys of each writer. With
# d decoys, k writers that stand out alike reach a q of 1 / (d · k), and a verdict asks for a tenth: with 12 one can do
# so alone. Of larger models, of which every document takes minutes, six and four.
DOCUMENTS, DECOYS, LENGTH = 12, 12, 40
FEWER = (6, 4)
# Characters that surely hold a window; a file is cut into so many stretches, each of which stands for a document.
WINDOW, STRETCHES = 20 * LENGTH, 2 * DOCUMENTS
# Attribution is asked about at the end of the first tokens of every window, so many.
SHORT = 16
# Of so many writers that are lost most surely it is asked who reads them, on a text that did not choose them.
CLOSELY = 3
LOST = ("erased", "filled in", "reduced")
# What a node does to a write is kept from this share of it on.
ACTS = 0.05
READINGS = ("direct", "net", "relp", "gradient")
PYTHON = "python"
_BOOKS, _STORIES, _QUESTIONS = "corpus/books", "corpus/tinystories.txt", "corpus/arthur.txt"


@dataclass(frozen=True)
class Asked:
    """A model, what it is called here, and of which texts it reads so many documents each; `closely`: also its readers
    and its attribution."""

    name: str
    model: str
    texts: tuple[str, ...]
    documents: int = DOCUMENTS
    decoys: int = DECOYS
    closely: bool = True


def listed(given: argparse.Namespace) -> list[Asked]:
    """The models that the command line means."""
    if given.model:
        name, named = given.name or Path(given.model).name, tuple(given.text or (PYTHON, PYTHON))
        return [Asked(name, given.model, named, given.documents, given.decoys)]

    def texts(*names: str) -> tuple[str, ...]:
        return tuple(name if name == PYTHON else str(given.shared / name) for name in names)

    english = texts(_BOOKS, PYTHON, _BOOKS)
    if given.real:
        folders = sorted(folder for folder in given.real.iterdir() if folder.is_dir())
        return [Asked(folder.name, str(folder), english[:2], *FEWER) for folder in folders]
    models = given.shared / "models"
    found = [
        Asked("bundled", "default", english),
        Asked("stories260K", str(models / "stories260K"), texts(_STORIES, _BOOKS, _STORIES)),
        Asked("arthur", str(models / "arthur-r24-ep200"), texts(_QUESTIONS, PYTHON, _QUESTIONS)),
    ]
    for run in sorted(given.runs.glob("w*-s*")) if given.runs else []:
        if (run / "model").is_dir():
            found += [Asked(run.name, str(run / "model"), english)]
            steps = sorted((run / "steps").iterdir(), key=lambda step: int(step.name))
            found += [Asked(f"{run.name}-{step.name}", str(step), english[:2], closely=False) for step in steps]
    return found


def texts(named: Sequence[str], tokenizer: Any, n: int) -> list[Tokens]:
    """A window in the middle of each of some documents of every text; of a text that is named again, of the next."""
    found, times = [], Counter[str]()
    for source in named:
        every, first = documents(source), times[source] * n
        if len(taken := every[first : first + n]) < n:
            raise SystemExit(f"{source} has {len(every)} documents of {2 * WINDOW} characters: {n} are read each time")
        times[source] += 1
        name = Path(source).stem + (f", other {n}" if times[source] > 1 else "")
        found.append(uw.text(taken, tokenizer, n=n, length=LENGTH).named(name))
    return found


def documents(source: str) -> list[str]:
    """Of every document that is long enough what comes after the first line break behind its middle."""
    if source == PYTHON:
        from pydoc_data.topics import topics

        whole = [topics[name] for name in sorted(topics)]
    elif Path(source).is_dir():
        whole = [file.read_text("utf-8") for file in sorted(Path(source).glob("*.txt"))]
    else:
        text = Path(source).read_text("utf-8")
        cuts = [round(i * len(text) / STRETCHES) for i in range(STRETCHES + 1)]
        whole = [text[start:end] for start, end in pairwise(cuts)]
    long = [text for text in whole if len(text) >= 2 * WINDOW]
    return [text[text.find("\n", len(text) // 2) + 1 :][:WINDOW] for text in long]


def foreseen(lm: Any, read: Sequence[Tokens], asked: Asked) -> float:
    """Seconds that a survey of these texts takes, told by a trial on one of them."""
    n, taken = len(read[0]), stages(lm, LENGTH, 1)
    removed = fitted(lm, read[0], decoys=asked.decoys).seconds
    more = len(read) * n * taken["dla short"].each + CLOSELY * taken["steps"].seconds(n)
    return len(read) * (taken["scan"].seconds(n) + removed) + asked.closely * more


def surveyed(lm: Any, asked: Asked, read: Sequence[Tokens], work: Path) -> dict[str, Any]:
    """Everything that is kept of one model."""
    start = time.process_time()
    found, rows, believed = [], [], []
    for i, tokens in enumerate(read):
        left = uw.survival(lm, tokens, decoys=asked.decoys, checkpoint=work / f"survival{i}")
        writers = [str(name) for name in left["writer"].values]
        scanned = uw.scan(lm, tokens, writers, checkpoint=work / f"scan{i}")
        found.append(left)
        rows.append(list(described(left.data, scanned.data)))
        believed.append(trusted(lm, tokens, work / f"dla{i}") if asked.closely else [])
        print(f"{asked.name}, {tokens.source}: {dict(Counter(row['verdict'] for row in rows[-1]))}", flush=True)
    chosen = lost(rows) if asked.closely else {}
    record = found[0].provenance
    return {
        "name": asked.name,
        "model": {key: record["model"][key] for key in ("family", "layers", "heads", "d_model", "weights")},
        "tokenizer": identity(lm.tokenizer), "certificate": lm.certificate.explain(), "versions": record["versions"],
        "length": LENGTH, "decoys": asked.decoys,
        "texts": [about(lm, tokens, one.data) for tokens, one in zip(read, found, strict=True)],
        "writers": rows, "trust": believed,
        "closely": {w: steps(uw.readers(lm, read[i], w, checkpoint=work / w).data, i) for w, i in chosen.items()},
        "seconds": round(time.process_time() - start),
    }  # fmt: skip


def about(lm: Any, tokens: Tokens, data: xr.Dataset) -> dict[str, Any]:
    """Which text it was, how much of it, and how well the model predicts it (nats per token)."""
    ids = torch.from_numpy(tokens.ids).to(lm.device)
    with torch.no_grad():
        logits = lm.hf(input_ids=ids).logits[:, :-1].float()
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    counts = {name: int(data.attrs[name]) for name in ("documents", "rows", "sinks")}
    return {"text": tokens.source, "digest": tokens.digest, "hash": tokens.hash, **counts, "loss": loss}


def described(data: xr.Dataset, scanned: xr.Dataset) -> Iterator[dict[str, Any]]:
    """Of every writer what survives, beside what is ordinary, who acts on it, and how much of it is of its position."""
    names = ("end", "end_low", "end_high", "gap", "gap_low", "gap_high", "q", "q_above", "verdict")
    for i, writer in enumerate(map(str, data["writer"].values)):
        one = data.isel(writer=i)
        yield {
            "writer": writer, **{name: one[name].item() for name in names},
            "ordinary": one["ordinary"].sel(control="typical").values.tolist(),
            "position": float(scanned["share_position"].sel(writer=writer, node=writer)),
            "heads": _summed(one["acts"], PROJECTED), "mlps": _summed(one["acts"], MLPS), "acts": acting(one),
        }  # fmt: skip


def _summed(acts: xr.DataArray, kinds: Sequence[str]) -> float:
    """What all nodes of some kinds do to a write, as a share of it; over all nodes it is survival − 1."""
    kept = [parse_node(str(node)).kind in kinds for node in acts["node"].values]
    return float(np.nansum(acts.values[kept]))


def acting(one: xr.Dataset) -> dict[str, list[float]]:
    """What each node does to a write, with its interval, the strongest first."""
    strong = [i for i in np.argsort(-np.abs(one["acts"].values)) if abs(one["acts"].values[i]) >= ACTS]
    return {str(one["node"].values[i]): [float(one[f"acts{end}"][i]) for end in ("", "_low", "_high")] for i in strong}


def lost(rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """The writers that are surely below ordinary writes on most texts, the farthest below first; and of each the first
    text that did not choose it, or the last of all."""
    said: dict[str, list[int]] = {}
    gap: dict[str, float] = {}
    for i, part in enumerate(rows):
        for row in part:
            if row["verdict"] in LOST:
                said.setdefault(row["writer"], []).append(i)
                gap[row["writer"]] = min(row["gap"], gap.get(row["writer"], 0.0))
    ranked = sorted(said, key=lambda writer: (-len(said[writer]), gap[writer]))[:CLOSELY]
    return {w: next((i for i in range(len(rows)) if i not in said[w]), len(rows) - 1) for w in ranked}


def steps(data: xr.Dataset, text: int) -> dict[str, Any]:
    """Who surely reads a write, and how much of its erasure is done there; who erases it; is its space used again?"""
    names = ("wrote", "typical_wrote", "read_q", "left", "gone")
    frame = data[["reads", *names]].to_dataframe().reset_index()
    read = frame[frame["reads"].astype(bool)].sort_values("wrote", ascending=False)
    lines = read[["node", "way", *names]].values.tolist()
    words = ("verdict", "read", "erased", "reused", "erasers")
    counts = {"text": text, "asked": int(data.attrs["asked"]), "end": float(data["end"])}
    return {**{word: str(data.attrs[word]) for word in words}, **counts, "readers": lines}


def trusted(lm: Any, tokens: Tokens, work: Path) -> list[dict[str, Any]]:
    """How each reading of a logit difference predicts what happens when a write is replaced by its mean, by depth."""
    short = Tokens(tokens.ids[:, :SHORT], np.full(len(tokens), SHORT), tokens.cluster, tokens.source, tokens.digest)
    data = uw.dla(lm, short, at="position", replace="mean", texts=tokens, checkpoint=work).data
    groups: dict[tuple[str, str], list[int]] = {}
    for i, node in enumerate(lm.parts):
        kind = "heads" if node.kind in PROJECTED else "MLPs" if node.kind in MLPS else ""
        if kind:
            groups.setdefault((kind, depth(node.layer, len(lm.layers))), []).append(i)
    found = []
    for (kind, place), nodes in groups.items():
        for reading in READINGS:
            one = trust(data[reading].values[:, nodes], data["total"].values[:, nodes], tokens.cluster, "pooled")
            numbers = {"r": one.correlation, "low": one.low, "high": one.high, "n": one.n}
            found.append({"kind": kind, "depth": place, "reading": reading, **numbers})
    return found


def depth(layer: int, layers: int) -> str:
    """Which third of the layers; the last layer, whose nodes no later one reads, is by itself."""
    if layer == layers - 1:
        return "last layer"
    return ("first third", "second third", "last third")[3 * layer // layers]


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Three digits behind the point, nothing for what is no number: what another machine finds, too."""
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 3), parse_constant=lambda _: None)


def keep(asked: Asked, work: Path) -> None:
    """Survey one model, say before what it takes, and keep what was found."""
    lm = uw.load(asked.model, dtype="float32")
    read = texts(asked.texts, lm.tokenizer, asked.documents)
    print(f"{asked.name}: {lm.certificate.explain()}; about {foreseen(lm, read, asked):.0f} s", flush=True)
    found = rounded(surveyed(lm, asked, read, work / asked.name))
    text = json.dumps(found, separators=(",", ":")) + "\n"
    write(RESULTS / f"{asked.name}.json", lambda place: place.write_text(text, "utf-8"))
    print(f"{asked.name}: {found['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a hub name")
    parser.add_argument("--name", help="what the model is called here, by default the last part of its name")
    parser.add_argument("--text", action="append", help="a folder, a file, or python; two or more times")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="so many of each text")
    parser.add_argument("--decoys", type=int, default=DECOYS, help="of each writer")
    parser.add_argument("--small", action="store_true", help="all small models at hand")
    parser.add_argument("--real", type=Path, help="folder of larger models")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models/ and corpus/")
    parser.add_argument("--runs", type=Path, help="folder of what examples/pretrain/sweep.py trained")
    parser.add_argument("--work", type=Path, required=True, help="folder in which a run that was stopped goes on")
    given = parser.parse_args()
    if sum(map(bool, (given.model, given.small, given.real))) != 1:
        parser.error("name a model, or --small, or --real")
    asked = listed(given)
    missing = [one for one in asked if not (RESULTS / f"{one.name}.json").exists()]
    print(f"{len(asked) - len(missing)} of {len(asked)} models are kept already", flush=True)
    for one in missing:
        keep(one, given.work)


if __name__ == "__main__":
    sys.exit(main())
