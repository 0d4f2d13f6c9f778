"""Which tests run where? Markers, the optional neighbour folder, one thread, no network."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

# Set before torch is loaded: xdist runs one worker for each core, and one thread gives the same sums everywhere.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# A slow machine must not fail a property; in CI the same examples are drawn every time.
hypothesis.settings.register_profile("unwrite", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("unwrite")

_jaxtyped = jaxtyping.jaxtyped
# As Python itself says that a type is wrong.
_WRONG_TYPE = BeartypeConf(violation_type=TypeError)


def _checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Checks types at every call, and names of axes at the first of each kind: what takes long there is their checks.

    Not of functions that are made anew whenever another one is called: their checks would be compiled each time.
    """
    check = _jaxtyped(typechecker=typechecker)

    def checked(made: Any) -> Any:
        if "<locals>" in getattr(made, "__qualname__", ""):
            return made
        if isinstance(made, type):
            if dataclasses.is_dataclass(made):
                made.__init__ = checked(made.__init__)
            return made
        return _at_first(made, check) if _names_axes(made) else _always(made, beartype(conf=_WRONG_TYPE)(made))

    return checked


def _always(plain: Callable[..., Any], typed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def called(*args: Any, **named: Any) -> Any:
        return (plain if jaxtyping.config.jaxtyping_disable else typed)(*args, **named)

    return called


def _at_first(plain: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, with a check that is compiled when it is first called, and passed once for each kind of call."""
    compiled, passed = functools.cache(lambda: check(plain)), set[Any]()

    @functools.wraps(plain)
    def called(*args: Any, **named: Any) -> Any:
        kind = (*map(_kind, args), *named, *map(_kind, named.values()))
        if jaxtyping.config.jaxtyping_disable or kind in passed:
            return plain(*args, **named)
        found = compiled()(*args, **named)
        passed.add(kind)
        return found

    return called


def _kind(value: Any) -> Any:
    """What a check sees of an argument: its type, of an array shape and dtype, of a container some of what is in it."""
    kind = type(value)
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        return kind, value.shape, value.dtype
    if kind in (tuple, list, dict):
        return kind, len(value), *map(_kind, itertools.islice(value.items() if kind is dict else value, 4))
    return value if kind is str else kind


def _names_axes(function: Callable[..., Any]) -> bool:
    """Whether an annotation is, or may be, an alias of something like Float[Tensor, "prompt position"]."""
    hints, known = " ".join(map(str, function.__annotations__.values())), vars(builtins) | function.__globals__
    aliases = [known.get(word, "jaxtyping.") for word in re.findall(r"(?<![\w.])[A-Za-z_]\w*", hints)]
    return '"' in hints or any("jaxtyping." in repr(alias) for alias in aliases)


jaxtyping.jaxtyped = _checked  # what --jaxtyping-packages puts on everything that is imported from here on

# Where `shared/tools/real_models.py DIR --hf` put models that are too large to lie beside the project.
REAL = os.environ.get("UNWRITE_REAL")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in ("shared", "real"):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(fixture)
        for marker in ("slow", "gpu", "shared", "real"):
            if item.get_closest_marker(marker) and (reason := _missing(marker, config)):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing(marker: str, config: pytest.Config) -> str | None:
    """Why tests with this marker cannot run here; None where they can."""
    if marker == "slow":
        return None if config.getoption("--slow") else "slow: runs with --slow"
    if marker == "shared":
        return None if SHARED.is_dir() else "shared: there is no folder ../shared beside the project"
    if marker == "real":
        there = REAL is not None and Path(REAL).is_dir()
        return None if there else "real: the environment variable UNWRITE_REAL names no folder of models"
    import torch

    return None if torch.cuda.is_available() else "gpu: torch sees no CUDA device"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The neighbour folder with real models and corpora; a test that asks for it is marked `shared`."""
    return SHARED


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of models that are too large to lie beside the project; a test that asks for it is marked `real`."""
    return Path(str(REAL))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Numbers that a test gave to `record_property("measured", …)`: workers have no screen of their own."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(value)
