"""What is promised to users, how is it kept, and which tests would fail if it were not?

`python tests/promises.py` writes docs/promises.md out of PROMISES and of the marks on tests,
`@pytest.mark.promise("untouched")`. It reads the tests and runs nothing, so it needs nothing but Python.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python tests/promises.py"
PAGE = "docs/promises.md"
# Of the package: where files that keep promises lie, and how a promise names one.
SOURCE = "src/unwrite"
_FILE = re.compile(r"`([\w/.]+\.\w+)`")


class Promise(NamedTuple):
    """What is promised, in one sentence without a full stop, and how it is kept, naming files as `result.py`."""

    words: str
    kept: str


PROMISES: dict[str, Promise] = {
    # What the numbers mean
    "exact": Promise(
        "A model is decomposed exactly, or refused",
        "At load `model/certificate.py` measures the identities of `model/identities.py` on random prompts, and "
        "names the one that fails; the worst errors are in every result.",
    ),
    "planted": Promise(
        "A scan finds the opponents that were planted in a model, and names nobody else",
        "`methods/scan.py` names a node only if it could have read the write and its share is below −0.02 at a false "
        "discovery rate of 5 %; `model/planted.py` makes models in which the answer is known.",
    ),
    "causal": Promise(
        "A node that erases a write because it reads it is told apart from one that would write the same anyway",
        "`methods/verify.py` compares executed runs with and without the write, from `run/tally/without.py`.",
    ),
    "erased": Promise(
        "Nothing is called erased unless executed runs keep less of it than of randomly turned writes",
        "A scan has no such word; `methods/verify.py` says it only where the interval of the difference from "
        "`run/source/rotations.py` excludes 0, and `studies/audit.py` judges on prompts that did not choose a writer.",
    ),
    "executed": Promise(
        "Shortcuts and algebra give what really executing the intervention gives",
        "Values carried by hand (`model/values.py`), continued runs (`run/replay/edited.py`) and sweeps that run "
        "nothing twice (`run/replay/sweep.py`, `run/replay/paths.py`, `run/replay/edge_circuits.py`, "
        "`run/replay/walk.py`) are compared with plain hooks and traces, one by one.",
    ),
    "estimates": Promise(
        "An estimate stands beside the executed truth, and says how well it predicts it in this very model",
        "`stats/trust.py`, `methods/agree.py` and `methods/bound.py` measure it with intervals; "
        "`studies/compare.py` puts estimators side by side.",
    ),
    "account": Promise(
        "Between what an attribution says and what really happens, nothing is left unexplained",
        "`run/account/totals.py` splits the executed total into direct, erased, filled in and norm, which add up to "
        "rounding.",
    ),
    "statistics": Promise(
        "Quantiles, shares and standard errors are those of numpy and of a bootstrap, within stated bounds",
        "`stats/mergeable.py` counts on a fixed grid of integers and adds pairwise in the order of prompts.",
    ),
    "others": Promise(
        "Other software sees the same writes, states and patches in the same model",
        "`model/capture.py` takes them from the user's own model; TransformerLens, and activations that other programs "
        "saved, are the judges.",
    ),
    "paper": Promise(
        "Every number that the paper prints is asked for again, by its own definition, with ours beside it",
        "`studies/reproduce.py` holds the paper's claims. The tests use a random model of gelu-4l's shape: they judge "
        "the arithmetic, not how near the trained weights come to the paper.",
    ),
    # Your model, your runs
    "untouched": Promise(
        "Your model is bit for bit what it was, whatever is asked of it and however that ends",
        "Whatever is hung into a model is taken out again when a `with` ends: in `model/capture.py`, "
        "`model/attention.py`, `run/edit/trace.py`, `run/backward/rules.py` and `run/edit/slots.py`. Weights are "
        "changed in `run/edit/weights.py` alone (uw.rewritten), which puts their own numbers back. A pipeline is "
        "called inside `as_left` of `diffusion/view.py`, which puts back its scheduler and the state of chance, too.",
    ),
    "batches": Promise(
        "Batch size, padding and the order of prompts change no count, and sums by rounding at most",
        "`run/loop/stream.py` gives every batch one shape; `stats/mergeable.py` counts integers and adds up in one "
        "fixed order.",
    ),
    "memory": Promise(
        "Running out of memory costs time, not results",
        "`run/loop/stream.py` gives back what nobody uses and repeats what did not fit, to the same bits. Where that "
        "does not help it is halved: to the bit as if halves had been asked for, to rounding as the whole. Nothing "
        "that was half done is counted; a prompt that alone is too large is named.",
    ),
    "resumed": Promise(
        "A run that was killed goes on where it was, to the same bits",
        "`run/loop/checkpoint.py` keeps whole batches and what they depend on, and replaces its file in one step.",
    ),
    "shards": Promise(
        "One process, several ranks and shards in any order give the same bits, and parts that do not fit are refused",
        "Batches are fixed by the prompts' places; `stats/mergeable.py` adds integers, and floats along a fixed tree; "
        "`run/loop/job.py` says which batches are whose. As with all bits: as many threads, on the same kind of "
        "machine.",
    ),
    "finished": Promise(
        "A folder with the result of the same run is printed, and one with another run's is never overwritten",
        "`run/loop/job.py` signs a result with all that it depends on, and compares before anything is computed.",
    ),
    "damaged": Promise(
        "A checkpoint that is damaged, in use or of another run is noticed, and never becomes a number",
        "`run/loop/checkpoint.py` begins its file with the SHA-256 of the rest, keeps the one before it, and locks "
        "them.",
    ),
    "faults": Promise(
        "Every method stands every fault: killed where it writes, short of memory, a value that is no number, a full "
        "or read-only disk, damaged files",
        "The tests in `tests/faults` go through one list of methods, in which every public name that takes a "
        "checkpoint must stand; `run/loop/job.py`, `run/loop/checkpoint.py` and `run/loop/stream.py` keep it for all "
        "of them.",
    ),
    "interrupted": Promise(
        "Ctrl-C keeps what is finished, and says what is missing",
        "`studies/keep.py` holds the parts of a long run and saves each of them whole.",
    ),
    # What goes in
    "finite": Promise(
        "NaN and infinity never enter a number silently",
        "`run/loop/stream.py`, `run/answer/metrics.py`, `run/tally/without.py`, `run/source/writes.py` and the "
        "methods look at what a model gave before it is counted, and say at which node, prompt or pair it was; "
        "`model/certificate.py` refuses such weights.",
    ),
    "tokens": Promise(
        "Tokens, prompts and answers that do not fit the model or the question are refused",
        "`prompts/given.py` is the one door for text, chats, files and ids; `prompts/encode.py` begins a text as its "
        "tokenizer does; `prompts/tokens.py` and `prompts/pairs.py` check ids, lengths and positions, and "
        "`prompts/answers.py` that an answer is the one token which continues its prompt.",
    ),
    "architecture": Promise(
        "A model that is not supported gets a clear no, with the reason",
        "`model/load.py` looks the architecture up in `model/families.py`, which also lists what is refused and why.",
    ),
    "no-code": Promise(
        "Nothing that is read can run code: no pickle, no remote code",
        "`model/load.py` takes safetensors only and refuses a model's own code unless told otherwise; "
        "`model/legacy.py` opens old checkpoints with `weights_only=True`; the package imports no pickle.",
    ),
    "errors": Promise(
        "What cannot be honoured is an error in one line: what was got, what was expected, what to do next",
        "All errors are made by `errors.py`; `cli/voice.py` prints them without a traceback.",
    ),
    # What comes out
    "read-back": Promise(
        "A result that is read from a file is the one that was saved",
        "`result.py` writes netCDF with names, units, equations and provenance.",
    ),
    "whole": Promise(
        "A file of results is whole or not there, and a damaged one is an error",
        "`result.py` writes beside the place and renames; the file ends with the SHA-256 of all before it, and nothing "
        "is read that does not fit, is not its own, or is newer than itself.",
    ),
    "inside": Promise(
        "Names that strangers wrote put nothing outside the folder that was named",
        "`run/loop/job.py` and `studies/keep.py` make names of files out of letters and digits, and `files.py` refuses "
        "what no file can be called.",
    ),
    "provenance": Promise(
        "A result says which weights, tokens, settings and versions it was made from",
        "`result.py` keeps them; `model/load.py` hashes weights and `prompts/tokens.py` hashes tokens, so a change "
        "shows.",
    ),
    "hostile": Promise(
        "Text of strangers never becomes markup, script, a terminal's command or a spreadsheet's formula",
        "`errors.py` makes it plain, `report/templates.py` escapes it, the page's policy takes no text for markup, and "
        "`result.py` disarms the cells of tables.",
    ),
    "offline": Promise(
        "The page works alone: without network, and without its script",
        "`report/page.py` puts everything into one file, whose content policy names its only script and style.",
    ),
    "no-torch": Promise(
        "A saved result can be read and drawn where torch is not installed",
        "Neither `result.py` nor anything that `report/page.py` needs imports torch or transformers.",
    ),
    "light": Promise(
        "`import unwrite` and `unwrite --help` load no torch",
        "`__init__.py` fetches a public name when it is first used, and `cli/__init__.py` a method when it is called.",
    ),
}


class Mark(NamedTuple):
    """The name of a promise, and the test that holds it, as pytest calls it."""

    name: str
    test: str


def marks(root: Path) -> list[Mark]:
    """All marks on tests, by file and line; one in a module's `pytestmark` is on each of its tests."""
    return [mark for file, tree in _parsed(root) for mark in _marks(file, tree)]


def _parsed(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted((root / "tests").rglob("test_*.py")):
        yield file.relative_to(root).as_posix(), ast.parse(file.read_text("utf-8"))


def _marks(file: str, tree: ast.Module) -> Iterator[Mark]:
    for test in filter(_is_test, tree.body):
        for mark in (*_of_module(tree), *test.decorator_list):
            if (name := _named(mark)) is not None:
                yield Mark(name, f"{file}::{test.name}")


def _is_test(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")


def _of_module(tree: ast.Module) -> Iterator[ast.expr]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield from node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]


def _named(mark: ast.expr) -> str | None:
    """The promise that `pytest.mark.promise("…")` names; None of anything else."""
    match mark:
        case ast.Call(func=func, args=[ast.Constant(value=str(name))], keywords=[]) if _is_mark(func):
            return name
    return None


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.promise"


def problems(promises: Mapping[str, Promise], root: Path) -> Iterator[str]:
    """What is wrong, each with what to do about it: promises without a test or a file, and marks that hold nothing."""
    found = marks(root)
    held = {mark.name for mark in found}
    for name, promise in promises.items():
        if name not in held:
            yield f'no test holds the promise "{name}": mark one with @pytest.mark.promise("{name}")'
        files = _FILE.findall(promise.kept)
        if not files:
            yield f'the promise "{name}" does not say which file keeps it, as `run/edit/trace.py` in {SOURCE}'
        yield from (
            f'the promise "{name}" is kept by {file}, which is not in {SOURCE}'
            for file in files
            if not (root / SOURCE / file).is_file()
        )
    for mark in found:
        if mark.name not in promises:
            yield f'{mark.test}: "{mark.name}" was never promised; promises are in tests/promises.py'
    yield from _unread(root)


def _unread(root: Path) -> Iterator[str]:
    """Marks that pytest may see but that the page would leave out."""
    for file, tree in _parsed(root):
        places = [*_of_module(tree), *(mark for test in filter(_is_test, tree.body) for mark in test.decorator_list)]
        read = {mark.func for mark in places if isinstance(mark, ast.Call) and _named(mark) is not None}
        for node in ast.walk(tree):
            if _is_mark(node) and node not in read:
                yield f"{file}:{node.lineno}: this mark is not a decorator of a test function that names one promise"


_HEAD = f"""# Promises

What users can rely on, how it is kept, and the tests that fail when it is not; a few of them run only where there are
real models, a browser or another library to compare with. Files are in `{SOURCE}`. This page is made from marks on the
tests by `{COMMAND}`; a promise without a test fails the build.
"""


def page(promises: Mapping[str, Promise], root: Path) -> str:
    """The page: each promise, its mechanism, its tests."""
    found = marks(root)
    parts = [_HEAD]
    for name, promise in promises.items():
        tests = "\n".join(f"- `{mark.test}`" for mark in found if mark.name == name)
        parts.append(f"## {promise.words}\n\n{promise.kept} Mark: `{name}`.\n\n{tests}\n")
    return "\n".join(parts)


def stale(promises: Mapping[str, Promise], root: Path) -> Iterator[str]:
    """Is the page another one than is made now?"""
    file = root / PAGE
    if not file.is_file() or file.read_text("utf-8") != page(promises, root):
        yield f"{PAGE} is not what the promises and the marks on tests say: run `{COMMAND}`"


def main() -> None:
    """Write the page, unless something is wrong."""
    if wrong := list(problems(PROMISES, ROOT)):
        sys.exit("\n".join(wrong))
    (ROOT / PAGE).write_text(page(PROMISES, ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
