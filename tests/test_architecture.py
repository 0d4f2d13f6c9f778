"""Do the walls of the house stand? Who imports whom, what is never called, and how long things may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

# A unit is a file or folder directly in the package, or a room of run/. Each unit, and the units it sees beside itself.
BASE = {"nodes", "errors", "files", "axes", "result"}
# Values made of results, which runs of sets, methods and reports see.
SETS = {"orders", "circuits"}
PROMPTS = {*BASE, "prompts"}
MODEL = {*PROMPTS, "stats", "model"}
ROOMS = {
    "run/loop": MODEL,
    "run/edit": MODEL,
    "run/source": {*MODEL, "run/loop", "run/edit"},
    "run/replay": {*MODEL, "run/edit"},
    "run/answer": {*MODEL, "run/loop", "run/edit"},
    "run/backward": {*MODEL, "run/loop", "run/edit", "run/source", "run/replay", "run/answer"},
    "run/account": {*MODEL, "run/loop", "run/edit", "run/source", "run/replay", "run/answer", "run/backward"},
}
# Two rooms that see all these and not each other: what is summed up over text, and what patched runs of pairs say.
LAST = ("run/tally", "run/pairs")
RUN = {*MODEL, *SETS, *ROOMS, *LAST}
STUDIES = {*RUN, "methods", "tasks", "report"}
ALL = {*STUDIES, "studies", "diffusion", "cli", "__init__", "__main__"}
SEES = {
    **dict.fromkeys(BASE, BASE),
    **{name: {*BASE, *SETS} for name in SETS},
    "prompts": BASE,
    "tasks": PROMPTS,
    "stats": {"errors"},
    "model": PROMPTS,
    **ROOMS,
    **{room: {*MODEL, *SETS, *ROOMS} for room in LAST},
    "run": set(),
    "methods": RUN,
    "studies": STUDIES,
    "report": {*BASE, *SETS},
    "diffusion": {*MODEL, "run/loop"},
    "cli": ALL,
    "__init__": ALL,
    "__main__": {"cli"},
}
BACK_EDGES = {("result", f"Result.{name}") for name in ("figure", "__repr__", "_repr_html_")}  # to the report
NO_TORCH = {*BASE, *SETS, "report"}

CODE_FROM_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EMPTY_NAMES = {"util", "utils", "misc", "common", "helper", "helpers"}
MAX_FUNCTION, MAX_FILE = 55, 380


class Import(NamedTuple):
    """`module` (dotted) is imported by `file` in `line`, inside the function `where` ("" for the top of the file)."""

    file: Path
    line: int
    where: str
    module: str


def files(src: Path) -> list[Path]:
    return sorted((src / "unwrite").rglob("*.py"))


def unit(file: Path, src: Path) -> str:
    first, *rest = file.relative_to(src / "unwrite").parts
    return f"run/{rest[0]}" if first == "run" and len(rest) > 1 else first.removesuffix(".py")


def imports(file: Path, src: Path) -> Iterator[Import]:
    """Every import, wherever in the file it stands."""
    yield from _imports(parsed(file.read_text()), file, src, "")


def _imports(node: ast.AST, file: Path, src: Path, where: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            modules = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            origin = _origin(child, file, src)
            modules = [f"{origin}.{alias.name}" if origin else alias.name for alias in child.names]
        else:
            modules = []
        yield from (Import(file, child.lineno, where, module) for module in modules)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _imports(child, file, src, f"{where}.{child.name}".lstrip(".") if inner else where)


def _origin(node: ast.ImportFrom, file: Path, src: Path) -> str:
    """The module named after `from`, with leading dots resolved."""
    above = file.relative_to(src).parts[: -node.level] if node.level else ()
    return ".".join([*above, *([node.module] if node.module else [])])


def target_of(module: str, src: Path) -> str | None:
    """The unit that `module` lies in; `__init__` for a public name of the package, None outside the package."""
    top, *rest = module.split(".")
    if top != "unwrite":
        return None
    if rest[:1] == ["run"]:
        return "/".join(rest[:2])
    known = rest and (rest[0] in SEES or any((src / "unwrite").glob(f"{rest[0]}*")))
    return rest[0] if known else "__init__"


def upward(src: Path) -> Iterator[str]:
    """Imports against the direction of the house."""
    for file in files(src):
        own = unit(file, src)
        if own not in SEES:
            yield f"{_place(file, src)}: {own} has no place in the house; give it one in SEES"
            continue
        for found in imports(file, src):
            target = target_of(found.module, src)
            back = (own, found.where) in BACK_EDGES and f"{found.module}.".startswith("unwrite.report.")
            if target is not None and target not in {own, *SEES[own]} and not back:
                yield f"{_place(file, src, found.line)}: {own} imports {target}"


def sideways(src: Path) -> Iterator[str]:
    """A method that imports a method."""
    for file in files(src):
        for found in imports(file, src):
            if unit(file, src) == "methods" and target_of(found.module, src) == "methods":
                yield f"{_place(file, src, found.line)}: a method imports a method"


def hooking(src: Path) -> Iterator[str]:
    """Hooks that are put on modules anywhere but in model/hooks.py."""
    for file in files(src):
        text = file.read_text()
        if "register_forward" in text and file.relative_to(src).as_posix() != "unwrite/model/hooks.py":
            line = text[: text.index("register_forward")].count("\n") + 1
            yield f"{_place(file, src, line)}: a hook is put on a module outside of model/hooks.py"


def foreign(src: Path) -> Iterator[str]:
    """transformers outside of model/, diffusers and peft outside of diffusion/, torch where only numbers are known."""
    for file in files(src):
        for found in imports(file, src):
            own, top = unit(file, src), found.module.partition(".")[0]
            if top == "transformers" and own != "model":
                yield f"{_place(file, src, found.line)}: {own} imports transformers"
            if top in ("diffusers", "peft") and own != "diffusion":
                yield f"{_place(file, src, found.line)}: {own} imports {top}"
            if top == "torch" and own in NO_TORCH:
                yield f"{_place(file, src, found.line)}: {own} imports torch"


def cyclic(src: Path) -> Iterator[str]:
    """Files that import each other while they load."""
    modules = {_module(file, src): file for file in files(src)}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        loaded = [found.module for found in imports(file, src) if not found.where]
        owners = {module if module in modules else module.rpartition(".")[0] for module in loaded}
        graph[name] = (owners & modules.keys()) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " → ".join(error.args[1])


def _module(file: Path, src: Path) -> str:
    return ".".join(file.relative_to(src).with_suffix("").parts).removesuffix(".__init__")


def unsafe(src: Path) -> Iterator[str]:
    """Whatever lets data run as code."""
    for file in files(src):
        for found in imports(file, src):
            if found.module.partition(".")[0] in CODE_FROM_DATA:
                yield f"{_place(file, src, found.line)}: {found.module}"
        for node in ast.walk(parsed(file.read_text())):
            if isinstance(node, ast.Call) and (name := _unsafe_call(node)):
                yield f"{_place(file, src, node.lineno)}: {name}"


def _unsafe_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    settings = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
        return name
    if name == "yaml.load" or name.startswith("yaml.unsafe_load"):
        return name
    if name == "torch.load" and settings.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if settings.get("allow_pickle", "False") != "False":
        return f"{name} with allow_pickle"
    return None


@cache
def parsed(text: str) -> ast.Module:
    """A file's tree, made once for all rules."""
    return ast.parse(text)


def oversized(src: Path) -> Iterator[str]:
    """Long functions, long files, and names that say nothing."""
    for file in files(src):
        text = file.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE:
            yield f"{_place(file, src)}: {lines} lines, at most {MAX_FILE}"
        if EMPTY_NAMES & {part.removesuffix(".py") for part in file.relative_to(src).parts}:
            yield f"{_place(file, src)}: the name says nothing"
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                    yield f"{_place(file, src, node.lineno)}: {node.name} has {lines} lines, at most {MAX_FUNCTION}"


def ambiguous(src: Path) -> Iterator[str]:
    """A public class, or type, whose name another module has for something else."""
    found: dict[str, str] = {}
    for file in files(src):
        for node in parsed(file.read_text()).body:
            name = node.name if isinstance(node, ast.ClassDef) else _alias(node)
            if name and not name.startswith("_"):
                if name in found:
                    yield f"{_place(file, src, node.lineno)}: {name} is something else in {found[name]}"
                found[name] = _place(file, src, node.lineno)


def _alias(node: ast.stmt) -> str:
    """The name of a type that is made of others: Values = Mapping[…]."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp)):
        return ""
    name = ast.unparse(node.targets[0])
    return name if name.isidentifier() and name[0].isupper() and not name.isupper() else ""


def _place(file: Path, src: Path, line: int = 1) -> str:
    return f"{file.relative_to(src).as_posix()}:{line}"


Rule = Callable[[Path], Iterator[str]]
RULES: tuple[Rule, ...] = (upward, sideways, hooking, foreign, cyclic, unsafe, oversized, ambiguous)


@pytest.mark.promise("no-code")
@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule: Rule) -> None:
    assert files(SRC)
    found = list(rule(SRC))
    assert not found, "\n".join(found)


BAD: list[tuple[Rule, str, str]] = [
    (upward, "nodes.py", "from unwrite.model import view"),
    (upward, "nodes.py", "from unwrite import load"),
    (upward, "nodes.py", "def f():\n    import unwrite.cli"),
    (upward, "model/view.py", "from ..run.edit import trace"),
    (upward, "run/edit/sites.py", "from unwrite.run import replay"),
    (upward, "run/replay/walk.py", "from unwrite.run.loop.stream import parts"),
    (upward, "run/stray.py", "from unwrite.errors import NodeError"),
    (upward, "stats/ranks.py", "from unwrite.model.view import Model"),
    (upward, "run/edit/trace.py", "from unwrite.methods.scan import scan"),
    (upward, "tasks/ioi.py", "from unwrite.model import view"),
    (upward, "report/page.py", "from unwrite import prompts"),
    (upward, "result.py", "from unwrite.report import figures"),
    (upward, "result.py", "class Result:\n    def save(self):\n        from unwrite.report import figures"),
    (upward, "audit.py", "import unwrite.cli"),
    (upward, "stray.py", ""),
    (sideways, "methods/dla.py", "from unwrite.methods import scan"),
    (sideways, "methods/dla.py", "def f():\n    from .scan import scan"),
    (hooking, "run/edit/trace.py", "layer.block.register_forward_hook(print)"),
    (foreign, "run/edit/trace.py", "from transformers import AutoModel"),
    (foreign, "report/page.py", "import numpy, torch.nn as nn"),
    (foreign, "methods/dla.py", "from diffusers import DiffusionPipeline"),
    (foreign, "model/load.py", "import peft"),
    (upward, "diffusion/view.py", "from unwrite.methods.scan import scan"),
    (cyclic, "nodes.py", "import unwrite.errors"),
    (unsafe, "model/load.py", "from pickle import loads"),
    (unsafe, "model/load.py", "x = eval('1')"),
    (unsafe, "model/load.py", "torch.load(path)"),
    (unsafe, "model/load.py", "torch.load(path, weights_only=False)"),
    (unsafe, "model/load.py", "np.load(path, allow_pickle=True)"),
    (unsafe, "model/load.py", "yaml.load(text)"),
    (oversized, "model/utils.py", ""),
    (ambiguous, "model/view.py", "class Model:\n    pass\nModel = dict[str, int]"),
    (oversized, "model/view.py", "\n" * (MAX_FILE + 1)),
    (oversized, "model/view.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
]

GOOD: list[tuple[str, str]] = [
    ("result.py", "class Result:\n    def figure(self):\n        from unwrite.report import figures"),
    ("methods/scan.py", "import torch\nfrom unwrite import nodes\nfrom unwrite.run.edit.trace import trace"),
    ("report/page.py", "from unwrite.result import Result\nfrom unwrite.report import figures"),
    ("model/hooks.py", "module.register_forward_hook(print)"),
    ("model/load.py", "import transformers\nmodel.eval()\ntorch.load(path, weights_only=True)"),
    ("cli/__init__.py", "import unwrite\nfrom unwrite import audit"),
    ("diffusion/view.py", "from unwrite.model.hooks import after\ndef f():\n    import diffusers, peft"),
    ("model/view.py", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1)),
]


def _house(src: Path, name: str, text: str) -> Path:
    """A package with a file that imports `nodes`, and the file under test."""
    for path, content in (("errors.py", "import unwrite.nodes"), (name, text)):
        file = src / "unwrite" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return src


@pytest.mark.promise("no-code")
@pytest.mark.parametrize(("rule", "name", "text"), BAD)
def test_a_rule_catches(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    found = list(rule(_house(tmp_path, name, text)))
    assert len(found) == 1
    assert name in found[0] or rule is cyclic


@pytest.mark.parametrize(("name", "text"), GOOD)
def test_no_rule_minds(name: str, text: str, tmp_path: Path) -> None:
    src = _house(tmp_path, name, text)
    assert [found for rule in RULES for found in rule(src)] == []


def _python(code: str) -> str:
    """What a fresh interpreter prints; its failure is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_BLOCK = "import sys; sys.modules.update(torch=None, transformers=None); "
_HEAVY = "; import sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"


@pytest.mark.promise("no-torch")
def test_what_reads_results_needs_no_torch() -> None:
    right = [_module(file, SRC) for file in files(SRC) if unit(file, SRC) in NO_TORCH]
    assert "unwrite.result" in right
    _python(_BLOCK + "; ".join(f"import {module}" for module in right))


def test_torch_is_really_blocked() -> None:
    with pytest.raises(AssertionError, match="import of torch halted"):
        _python(_BLOCK + "import torch")


@pytest.mark.promise("light")
def test_importing_unwrite_does_not_load_torch() -> None:
    assert _python("import unwrite" + _HEAVY).strip() == "[]"


@pytest.mark.promise("light")
def test_help_does_not_load_torch() -> None:
    run = "import sys, contextlib, io; from unwrite.cli import main; sys.argv = ['unwrite', '--help']\n"
    run += "with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit): main()\n"
    assert _python(run + "assert 'audit' in shown.getvalue()" + _HEAVY).strip() == "[]"


def test_a_public_name_is_not_hidden_by_a_file_of_that_name() -> None:
    """`import unwrite.audit` must not turn the function `uw.audit` into a module."""
    every = "; ".join(f"import {_module(file, SRC)}" for file in files(SRC) if file.stem != "__main__")
    modules = "[name for name in dir(unwrite) if type(getattr(unwrite, name)) is type(unwrite)]"
    assert _python(f"{every}; print({modules})").strip() == "['diffusion', 'errors', 'tasks']"


# What CONTRIBUTING says that a change touches.

ROOT = SRC.parent


def touched(change: str) -> tuple[set[str], set[str]]:
    """The files that a new one is a row in, and those in which it may have more to say."""
    rows = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    _, _, always, more, _ = next(row for row in rows if row.startswith(f"| {change} |")).split("|")
    return tuple(set(re.findall(r"`([\w./]+\.\w+)`", part)) for part in (always, more))  # pyright: ignore


def naming(name: str) -> set[str]:
    """The files in which something is called by its name: as a text of its own, or where it is imported."""
    found = set()
    for file in [*files(SRC), ROOT / "tests/methods.py", ROOT / "tests/tiny.py"]:
        inside = file.is_relative_to(SRC)
        for node in ast.walk(parsed(file.read_text())):
            if (isinstance(node, ast.Constant) and node.value == name) or (
                isinstance(node, ast.alias) and node.name == name
            ):
                found.add(file.relative_to(SRC / "unwrite" if inside else ROOT).as_posix())
    return found


@pytest.mark.parametrize("family", ["stablelm", "qwen3_moe", "gemma3_text"])
def test_a_family_touches_what_contributing_says(family: str) -> None:
    assert naming(family) == touched("family")[0]


@pytest.mark.parametrize("kind", ["neuron", "v_input", "act"])
def test_a_node_kind_touches_what_contributing_says(kind: str) -> None:
    assert naming(kind) == touched("node kind")[0]


@pytest.mark.parametrize(
    ("method", "file"), [("paths", "paths"), ("corpus_dla", "corpus"), ("adversarial", "adversarial")]
)
def test_a_method_touches_what_contributing_says(method: str, file: str) -> None:
    always, more = ({name.replace("NAME", file) for name in part} for part in touched("method"))
    # Studies and commands are not of the method: they use it.
    found = {name for name in naming(method) if not name.startswith(("studies/", "cli/"))}
    assert always - {"docs/api.md"} <= found <= always | more
    assert f"unwrite.{method}\n" in (ROOT / "docs/api.md").read_text(encoding="utf-8")


def test_rooms_and_functions_are_small() -> None:
    lines: dict[str, int] = {}
    lengths: list[int] = []
    for file in files(SRC):
        room, text = unit(file, SRC), file.read_text()
        lines[room] = lines.get(room, 0) + len(text.splitlines())
        functions = [part for part in ast.walk(parsed(text)) if isinstance(part, ast.FunctionDef)]
        lengths += [(part.end_lineno or part.lineno) - part.lineno + 1 for part in functions]
    assert max(count for room, count in lines.items() if room.startswith("run/")) <= 2200
    assert sorted(lengths)[int(0.9 * len(lengths))] <= 20
