"""How does text that a stranger wrote get into HTML? Only through these templates, which escape all of it."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from unwrite.errors import plain


def render(name: str, **values: Any) -> Markup:
    """A template of the package, filled in; every text is escaped and printable, and a value that lacks is an error."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable, loader=jinja2.FunctionLoader(own)
    )
    return Markup(environment.get_template(name).render(values))  # noqa: S704 - escaped just now


def own(name: str) -> Markup:
    """A file of the package, which may hold markup, style or script."""
    return Markup(resources.files("unwrite.report").joinpath(name).read_text("utf-8"))  # noqa: S704 - the package's own


def _printable(value: object) -> object:
    """Whatever a template prints, without control characters and the like; markup is the package's own."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
