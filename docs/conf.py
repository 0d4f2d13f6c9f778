"""How do the pages in this folder become a site? Sphinx, furo and MyST; the tutorials are run at every build."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from importlib import metadata

from jupyter_client.manager import KernelManager
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

import unwrite

# For the kernels that run the tutorials: no network, no bars, no advice about bars, nothing in plain text on a port.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
KernelManager.transport_encryption.default_value = "auto"
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "unwrite"
author = "the unwrite authors"
project_copyright = author
release = version = metadata.version("unwrite")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "unwrite"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False

nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_show_tb = True  # a cell that fails breaks the build, which is run with -W, and says why
nb_output_stderr = "remove-warn"  # what a cell says on stderr breaks the build

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
default_role = "literal"
highlight_language = "text"
smartquotes = False  # "paper" is what is typed
# Python and other libraries: their inventories would have to be downloaded.
_ELSEWHERE = (
    "collections",
    "pathlib",
    "typing",
    "jaxtyping",
    "torch",
    "Tensor",
    "numpy",
    "ndarray",
    "pandas",
    "xarray",
    "alt",
)
nitpick_ignore_regex = [("py:.*", rf"({'|'.join(_ELSEWHERE)})(\..*)?")]
# What `Tokens` hold and only `uw.images` makes.
nitpick_ignore = [("py:class", "unwrite.prompts.tokens.Images")]

_FIELD = re.compile(r"(Arguments|Returns|Yields|Raises|Example)(: | )(?=\S)")


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn a docstring's own prose ("Arguments: …", "Raises …") into fields, in place."""
    lines[:] = list(_fields([_escaped(line) for line in lines]))


def _fields(lines: list[str]) -> Iterator[str]:
    inside = False
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if match := _FIELD.match(line):
            if not inside:
                yield ""
            inside = True
            yield f":{match[1]}: {line[match.end() :]}"
        elif not line:
            inside = False
            yield line
        else:
            yield f"   {line}" if inside else line
        if line.endswith(":") and not after:  # what follows is a table set in columns
            yield from ("", "::")


def _escaped(line: str) -> str:
    """Outside of backticks, what would be markup is text."""
    parts = line.split("`")
    return "`".join(re.sub(r"([*|])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of a public name that no page documents."""
    documented = {name for name, *_ in env.domains.python_domain.get_objects()}
    for name in dir(unwrite):
        if f"unwrite.{name}" not in documented:
            getLogger(__name__).warning("no page documents unwrite.%s", name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("env-check-consistency", _complete)
