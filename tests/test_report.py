"""Does the page say what the result says, without scripts, network, torch or anything a stranger wrote as markup?"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import unwrite as uw
from unwrite.report import figures, page, templates, terminal
from unwrite.report.scanned import disagreements, rows, texts
from unwrite.report.verdict import of_scan
from unwrite.result import Result
from unwrite.studies.audit import demonstration

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e=HYPERLINK("http://x")\ud800\'"'


# Tags of the package's own templates, and of pictures.
SVG = {"svg", "g", "path", "line", "rect", "text", "tspan", "title", "defs", "clippath", "lineargradient", "stop"}
OWN = SVG | {tag for name in ("page", "macros") for tag in re.findall(r"<(\w+)", templates.own(f"{name}.html.j2"))}


class Page(HTMLParser):
    """Tags, attributes and text of a document."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def carried(source: str) -> dict[str, Any]:
    """What a page gives its script."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def result() -> uw.Result:
    lm = uw.load("default")
    tokens = demonstration(lm, n=4, length=64)
    return uw.scan(lm, tokens)


@pytest.fixture(scope="module")
def drawn(result) -> Page:
    return Page(page.page(result))


@pytest.fixture(scope="module")
def hostile() -> uw.Result:
    """A result whose text carries a hostile name."""
    lm = uw.load("default")
    tokens = demonstration(lm, n=2, length=64)
    return uw.scan(lm, {HOSTILE: tokens, "plain": tokens})


def test_the_page_has_the_numbers_of_every_material_writer(result, drawn) -> None:
    shown = drawn.text
    for row in rows(result.data)[0]:
        assert row.writer in shown
        assert row.says in shown
        assert f"{row.end:.2f}" in shown


@pytest.mark.promise("offline")
def test_the_page_runs_and_fetches_nothing(drawn) -> None:
    assert set(drawn.tags) <= OWN
    assert not {"iframe", "link", "img", "object", "embed"} & set(drawn.tags)
    assert drawn.tags.count("script") == 2  # one of them data
    assert not [name for name, _ in drawn.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(place.startswith("#") for name, place in drawn.attributes if name == "href")  # nothing lies beside it


@pytest.mark.promise("hostile")
def test_hostile_names_become_no_markup_survive_saving_and_reach_no_terminal(hostile, tmp_path) -> None:
    assert page.save_all(hostile, tmp_path) == ("result.nc", "table.csv", "report.html")
    source = (tmp_path / "report.html").read_text("utf-8")
    parsed = Page(source)
    assert set(parsed.tags) <= OWN
    assert parsed.tags.count("script") == 2
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not {"\x1b", "\u202e"} & set(source)
    links = {str(value) for name, value in parsed.attributes if name == "href"}
    assert {link for link in links if not link.startswith("#")} == {"result.nc", "table.csv"}
    again = uw.read(tmp_path)
    screen = terminal.console()
    with screen.capture() as shown:
        terminal.show(again, screen)
    assert "\x1b[2J" not in shown.get()
    assert "\u202e" not in shown.get()
    assert ",=HYPERLINK" not in (tmp_path / "table.csv").read_text("utf-8")


def test_rows_are_sorted_by_energy_moved_and_fold_the_immaterial(result) -> None:
    shown, folded = rows(result.data)
    moved = [row.moved for row in shown]
    assert moved == sorted(moved, reverse=True)
    assert {row.writer for row in shown} | set(folded) == set(map(str, result["writer"].values))
    small = result["relative_norm"].sel(quantile=0.5)
    assert set(folded) == {str(w) for w in result["writer"].values if not float(small.sel(writer=w)) >= 0.05}


def test_the_verdict_counts_what_the_rows_say(result) -> None:
    said, shown = of_scan(result), rows(result.data)[0]
    for kind in ("rises", "falls", "reverses"):
        assert f"{kind} along {sum(row.says.startswith(kind) for row in shown)}" in said
    assert "only an executed run" in said


def test_texts_that_agree_are_not_reported_as_disagreeing(hostile) -> None:
    assert disagreements(hostile) == []


def test_a_reading_that_differs_in_kind_is_a_disagreement(hostile) -> None:
    reading = hostile.data["in_words"].values.copy()
    reading[0, 1], reading[1, 1] = "rises 0.1 → 2.0", "falls 1.0 → 0.1"
    changed = Result(hostile.data.assign(in_words=(hostile.data["in_words"].dims, reading)))
    assert len(disagreements(changed)) == 1
    assert "falls 1.0 → 0.1 on plain" in disagreements(changed)[0]


def test_the_figure_has_a_cell_for_every_material_writer_and_location(result) -> None:
    spec = figures.draw(result).to_dict()
    data = max(spec["datasets"].values(), key=len)
    material = rows(result.data)[0][:40]
    assert len(data) == len(material) * result.data.sizes["location"]
    level = result["level"].sel(quantile=0.5)
    for cell in data:
        assert cell["level"] == pytest.approx(float(level.sel(writer=cell["writer"], location=cell["location"])))


def test_a_result_with_undefined_levels_still_shows(result) -> None:
    holes = result.data.copy(deep=True)
    holes["level"][1] = np.nan
    assert "nan" in Page(page.page(Result(holes))).text


def test_texts_of_a_single_scan_have_no_name(result) -> None:
    assert [(name, read["prompts"]) for name, _, read in texts(result)] == [("", 4)]
