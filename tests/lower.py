"""Which are the oldest versions that pyproject.toml allows? As constraints of pip, with tools of tests as pinned."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What runs the tests, and is no dependency of the package.
TOOLS = ("pytest", "hypothesis", "beartype")


def lower() -> Iterator[str]:
    """`name==version` of every dependency at its bound, those of the extras too, then of the tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = (part for parts in project["optional-dependencies"].values() for part in parts)
    for wanted in (*project["dependencies"], *extras):
        name, version = re.match(r"([\w-]+)>=([\d.]+)", wanted).groups()  # pyright: ignore[reportOptionalMemberAccess]
        yield f"{name}=={version}"
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    yield from (line for line in pinned if line.partition("==")[0] in TOOLS)


if __name__ == "__main__":
    sys.stdout.write("\n".join(lower()) + "\n")
