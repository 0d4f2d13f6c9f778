"""Does this model manage its memory, and which attributions can be believed? scan → survival → verify → dla.

What is material is said by a scan of one half of the prompts; what survives of every such write, and all that follows,
by runs on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from unwrite import result as results
from unwrite.axes import bare
from unwrite.errors import ModelError, function, whole
from unwrite.methods.adversarial import adversarial
from unwrite.methods.attention import at_largest
from unwrite.methods.corpus import corpus_dla
from unwrite.methods.dla import dla
from unwrite.methods.scan import scan
from unwrite.methods.survival import CONTROLLED, stand_ins, survival
from unwrite.methods.verify import verify
from unwrite.model.view import Model
from unwrite.nodes import parse_node
from unwrite.prompts.given import by_name
from unwrite.prompts.texts import windows
from unwrite.prompts.tokens import Tokens
from unwrite.report import audited
from unwrite.report.steps import told as told_steps
from unwrite.report.verdict import of_audit
from unwrite.result import Result
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit
from unwrite.studies.keep import Parts, keep
from unwrite.studies.readers import steps

# Writes are taken out of so many prompts, of as many documents as there are: how far a survival varies over documents
# is soon known, and every prompt costs a run of each.
REMOVED_FROM = 6
# So many writers are looked at closely, one of each layer and group of heads that share keys and values.
MOST = 3
# What attribution is asked about: so many prompts, some of them found ones; the others are the beginnings of windows,
# so many tokens each, since every node's write is replaced in every prompt. Beside means over so many texts.
ASKED, FOUND, SHORT = 12, 2, 12
TEXTS = 100
# Windows of text are this long where nobody says otherwise.
LENGTH = 48


def audit(
    lm: Model,
    tokens: Any,
    prompts: Any = None,
    out: str | Path | None = None,
    *,
    most: int = MOST,
    bos: int | bool | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """Who writes, what survives of every write and who acts on it, and which attributions can be believed.

    Arguments: `tokens` as `uw.scan` takes them: the first half of the prompts says what is material (of several texts,
    all are scanned and the first one's other half judges); `prompts` as `uw.dla` takes them, asked about the model's
    own top two logits, by default prompts found by `uw.adversarial` and windows of the text; `out` a folder that gets
    `result.nc`, `table.csv` and `report.html`, and where what is done is kept, so that the same call goes on from there
    (`checkpoint`, as in `uw.scan`, keeps it elsewhere); `most` writers to verify, one of each layer and group of heads;
    `bos` as in `uw.scan`; `listener` is told how far it is, and of every finished part its Result. The embedding is
    never taken out: without it the stream is empty.
    Returns the scan's Result with `uw.survival`'s variables of every material writer on the axis `removed`
    (`removed_…`), for each of the `verified` writers what `uw.verify` returns (`verdict`, `survival`, `erased`, …; what
    has a scan's name is called `verified_…`), `verified_because` and, of `uw.readers`, `verified_story`; `uw.dla`'s
    variables by `prompt`, `uw.adversarial`'s by `hit` (`found_…`), `uw.corpus_dla`'s by `path`; the paragraph is its
    attribute `verdict`.
    Raises what these raise; TokensError for fewer than four independent prompts; ResultError where `out` cannot be
    written (found before anything runs); Stopped, a KeyboardInterrupt, after it saved in `out` what an interrupt found
    finished: the scan as the folder's result, other parts beside it.

    Example: `uw.audit(uw.load("gpt2"), uw.text("book.txt", lm.tokenizer), out="audit")`
    """
    whole("most is a number of writers", most, 1)
    function("listener", listener)
    parts = listener if isinstance(listener, Parts) else Parts(listener)
    if out is not None:

        def run(parts: Parts, job: Job) -> Result:
            return audit(lm, tokens, prompts, most=most, bos=bos, checkpoint=job, listener=parts)

        kept = keep(run, out, parts)
        assert kept is not None  # noqa: S101 (an audit has no parts)
        return kept[0]
    ready = Tokens if prompts is not None else ()  # where only the prompts are text, bos is theirs
    texts = {
        str(name): admit(lm, part, None, 1, None if isinstance(part, ready) else bos)
        for name, part in by_name(tokens).items()
    }
    lm.require("logits")
    own = None if isinstance(prompts, Tokens) else bos
    given = None if prompts is None else admit(lm, prompts, None, 0, own, files=False)
    read = {f"text {name}": part.hash for name, part in texts.items()}
    with opened(checkpoint, listener) as job:
        if done := job.begin("audit", lm, read | ({} if given is None else {"prompts": given.hash}), {"most": most}):
            return done
        return job.signed(_audit(lm, texts, given, most, parts, job))


def _audit(lm: Model, texts: dict[str, Tokens], prompts: Tokens | None, most: int, parts: Parts, job: Job) -> Result:
    halves = {name: part.halves() for name, part in texts.items()}
    choose_by = {name: first for name, (first, _) in halves.items()}
    judge_by = next(second for _, second in halves.values())
    scanned = parts.finish(
        scan(lm, choose_by if list(texts) != [""] else choose_by[""], checkpoint=job, listener=parts)
    )
    removed = _removed(lm, scanned, judge_by, parts, job)
    chosen = _chosen(lm, removed.data, most)
    proofs = {writer: parts.finish(verify(lm, judge_by, writer, checkpoint=job, listener=parts)) for writer in chosen}
    stories = {writer: _story(lm, removed.data, judge_by, writer, parts, job) for writer in chosen}
    worst = min(proofs, key=lambda writer: _gap(proofs[writer]))
    held_out = choose_by[next(iter(choose_by))]
    search = parts.finish(adversarial(lm, judge_by, worst, held_out, checkpoint=job, listener=parts))
    asked, kinds = _asked(prompts, search, judge_by)
    others = _texts(asked, judge_by)
    believed = parts.finish(dla(lm, asked, at="position", texts=others, checkpoint=job, listener=parts))
    left = _beside(removed.data)
    merged = _merged(scanned, proofs, search, believed, kinds).merge(left)
    if all(lm.applies(one) and lm.proved(one) for one in ("opened", "values")):
        merged = merged.assign(at_largest(lm, held_out, _first(scanned)))
    merged = merged.assign(
        verified_because=("verified", np.array([*chosen.values()], dtype=object)),
        verified_story=("verified", np.array([*stories.values()], dtype=object)),
    )
    if erasers := proofs[worst].data.attrs["erasers"].split():
        corpus = parts.finish(corpus_dla(lm, judge_by, worst, erasers, checkpoint=job, listener=parts))
        merged = merged.merge(_renamed(corpus.data, "corpus"))
    merged = merged.assign_attrs(
        {**left.attrs, **scanned.data.attrs}, method="audit", searched=worst, judged=judge_by.source
    )
    return _judged(Result(merged), scanned, judge_by, asked)


def _first(scanned: Result) -> xr.Dataset:
    """Of several texts the first."""
    return scanned.data.isel(text=0) if "text" in scanned.data.dims else scanned.data


def _removed(lm: Model, scanned: Result, tokens: Tokens, parts: Parts, job: Job) -> Result:
    """What survives of every write that a scan found material and that some later node could read."""
    first = _first(scanned)
    able = _answered(lm, first["writer"].values)
    if not able.any():
        raise ModelError(
            f"no node of {scanned.provenance['model']['name']} could read what another wrote",
            expected="a model of two layers or more",
        )
    material = able & first["material"].values
    # Where nothing is material, anything that writes has to do.
    writes = material if material.any() else able & (first["n_positions"].values > 0)
    writers = [str(writer) for writer in first["writer"].values[writes]]
    few = tokens.spread(REMOVED_FROM)
    return parts.finish(survival(lm, few, writers, **controls_of(len(writers)), checkpoint=job, listener=parts))


def _story(lm: Model, removed: xr.Dataset, tokens: Tokens, writer: str, parts: Parts, job: Job) -> str:
    """Who reads a write, who erases it and who uses its space, in the prompts in which all were taken out."""
    own = removed.sel(writer=writer, drop=True)
    each: dict[str, Any] = {"checkpoint": job, "listener": parts}
    return told_steps(steps(lm, tokens.spread(REMOVED_FROM), parse_node(writer), own, **each))


def controls_of(writers: int) -> dict[str, Any]:
    """What stands in for each of so many writes: ordinary ones alone, against which a verdict is measured, and of many
    writers, whose stand-ins are judged together, one fewer than `uw.survival` would take."""
    controls = CONTROLLED[:1]
    return {"controls": controls, "decoys": stand_ins(writers, controls, fewest=3)[controls[0]]}


def _chosen(lm: Model, removed: xr.Dataset, most: int) -> dict[str, str]:
    """The writers to look at closely, and why: what is lost out of the ordinary, then what ends lowest beside it."""
    verdict, gap = removed["verdict"].values, removed["gap"].fillna(0).values
    lost = np.isin(verdict, ("erased", "filled in", "reduced"))
    chosen: dict[str, str] = {}
    groups = set()
    for i in sorted(range(len(gap)), key=lambda i: (not lost[i], gap[i])):
        node = parse_node(str(removed["writer"].values[i]))
        # Heads that share keys and values tend to tell the same story.
        layer = lm.layers[node.layer]
        group = (node.layer, node.kind, node.head * layer.kv_heads // layer.heads if node.kind == "head" else node.head)
        if group not in groups and len(chosen) < most:
            groups.add(group)
            what = str(verdict[i]) if lost[i] else "among the lowest beside ordinary writes"
            chosen[str(node)] = f"{what} (gap {gap[i]:+.2f}), the first of its layer and group"
    return chosen


def _answered(lm: Model, writers: np.ndarray) -> np.ndarray:
    """Which writes can be taken out: not the embedding's, and only those that some later node could read."""
    nodes = [parse_node(writer) for writer in writers]
    return np.array([w.kind not in ("embed", "bias") and any(lm.can_read(e, w) for e in lm.parts) for w in nodes])


def _gap(proof: Result) -> float:
    """How far below generic the write's survival ends."""
    return float(proof["gap"].isel(location=-1))


def _asked(prompts: Tokens | None, search: Result, tokens: Tokens) -> tuple[Tokens, list[str]]:
    """The prompts that attribution is asked about, and where each comes from."""
    if prompts is not None:
        return prompts, ["given"] * len(prompts)
    found = [tuple(search.data[name].values.tolist()[:FOUND]) for name in ("prompt", "row")]
    hits = list(zip(*found, strict=True))
    others = [i for i in range(len(tokens)) if i not in found[0]][: ASKED - len(hits)]
    part = tokens.take([*found[0], *others])
    lengths = np.array([*(row + 1 for row in found[1]), *np.minimum(tokens.lengths[others], SHORT)])
    shortened = Tokens(part.ids, lengths, np.arange(len(lengths)), "found prompts and beginnings of the text's windows")
    return shortened, ["found"] * len(hits) + ["window"] * len(others)


def _texts(asked: Tokens, tokens: Tokens) -> Tokens | None:
    """Texts that reach as far as the longest prompt; without any, the prompts are compared with each other."""
    long = np.flatnonzero(tokens.lengths >= asked.lengths.max())[:TEXTS]
    return tokens.take(long) if len(long) > 1 else None


def _merged(
    scanned: Result, proofs: Mapping[str, Result], search: Result, believed: Result, kinds: list[str]
) -> xr.Dataset:
    """One dataset: what two methods call alike keeps the scan's name, and gets a prefix from the others."""
    names = xr.Variable("verified", list(proofs))
    verified = xr.concat([_plain(proof.data) for proof in proofs.values()], names)
    data = bare(scanned.data).merge(_renamed(verified, "verified", scanned.data))
    data = data.merge(bare(believed.data).assign(prompt_kind=("prompt", np.array(kinds, dtype=object))))
    return data.merge(_renamed(search.data.drop_vars("ids"), "found"))


def _plain(proof: xr.Dataset) -> xr.Dataset:
    """A verification whose words are variables, so that it can stand beside others."""
    words = {name: ((), np.array(str(proof.attrs[name]), dtype=object)) for name in audited.WORDS}
    return proof.assign(words).drop_attrs(deep=False)


def _beside(removed: xr.Dataset) -> xr.Dataset:
    """What survives of every write, on axes of its own beside those of a scan and of verifications."""
    told = {f"removed_{name}": removed.attrs[name] for name in audited.TOLD}
    data = _renamed(removed, "removed").rename(writer="removed", bound="removed_bound", control="removed_control")
    return data.assign_attrs(told)


def _renamed(data: xr.Dataset, prefix: str, beside: xr.Dataset | None = None) -> xr.Dataset:
    """With a prefix before every variable, or before those only that `beside` has too; without what names alone say."""
    data = bare(data)
    taken = set(data.data_vars) if beside is None else set(data.data_vars) & set(beside.data_vars)
    axes = {"text"} & set(data.dims)
    return data.rename({name: f"{prefix}_{name}" for name in (*taken, *axes)}).drop_attrs(deep=False)


def _judged(merged: Result, scanned: Result, judged: Tokens, asked: Tokens) -> Result:
    record = scanned.provenance
    settings = record["settings"] | {"judged": judged.about(), "asked": asked.about()}
    found = results.build("audit", merged.data, settings, record["model"], record["tokens"])
    return Result(found.data.assign_attrs(verdict=of_audit(found)))


def demonstration(lm: Model, n: int = 300, length: int | None = None, bos: int | bool | None = None) -> Tokens:
    """Text that every Python carries and the bundled model never saw, for `lm`: an audit that needs no file.

    The documentation topics and the modules of asyncio in turn, each a document of its own.
    """
    from pydoc_data.topics import topics

    modules = [file for file in resources.files("asyncio").iterdir() if file.name.endswith(".py")]
    code = [file.read_text("utf-8") for file in sorted(modules, key=lambda file: file.name)]
    documents = [text for pair in zip_longest([topics[name] for name in sorted(topics)], code) for text in pair if text]
    tokens = windows(documents, lm.tokenizer, n=n, length=length or LENGTH, bos=bos)
    return tokens.named("Python's documentation topics and asyncio")
