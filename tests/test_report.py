"""Does the page say what the result says, without scripts, network, torch or anything a stranger wrote as markup?"""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

import unwrite as uw
from unwrite.combined.audit import demonstration
from unwrite.report import figures, page, terminal
from unwrite.report.rows import disagreements, rows, texts
from unwrite.report.verdict import verdict
from unwrite.result import Result

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e=HYPERLINK("http://x")\ud800\'"'


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


@pytest.fixture(scope="module")
def result() -> uw.Result:
    lm = uw.load("default")
    tokens = demonstration(lm, n=4, length=64)
    return uw.scan(lm, tokens)


@pytest.fixture(scope="module")
def hostile() -> uw.Result:
    """A result whose text carries a hostile name."""
    lm = uw.load("default")
    tokens = demonstration(lm, n=2, length=64)
    both = uw.scan(lm, {HOSTILE: tokens, "plain": tokens})
    return Result(both.data)


def test_the_page_has_the_numbers_of_every_material_writer(result) -> None:
    shown = Page(page.page(result)).text
    for row in rows(result.data)[0]:
        assert row.writer in shown
        assert row.reading in shown
        assert f"{row.end:.2f}" in shown


def test_the_page_runs_and_fetches_nothing(result) -> None:
    parsed = Page(page.page(result))
    assert not {"iframe", "link", "img", "object", "embed"} & set(parsed.tags)
    assert parsed.tags.count("script") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    places = [value or "" for name, value in parsed.attributes if name == "href"]
    assert [place for place in places if not place.startswith(("#", "data:"))] in ([], ["result.nc"])


def test_hostile_names_become_no_markup(hostile, result) -> None:
    source = page.page(hostile)
    parsed = Page(source)
    assert set(parsed.tags) <= set(Page(page.page(result)).tags) | {"ul", "li"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "\x1b" not in source
    assert "\u202e" not in source
    source.encode("utf-8")


def test_hostile_names_survive_saving_and_reach_no_terminal(hostile, tmp_path) -> None:
    page.save_all(hostile, tmp_path)
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
    said, shown = verdict(result), rows(result.data)[0]
    for kind in ("rises", "falls", "reverses"):
        assert f"{kind} along {sum(row.reading.startswith(kind) for row in shown)}" in said
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
