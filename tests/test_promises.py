"""Is every promise held by a test and kept by a file, every mark a promise, and the page what they say?"""

from __future__ import annotations

from pathlib import Path

import pytest

import promises
from promises import PAGE, PROMISES, ROOT, Promise

# A project in which one promise is held by two tests.
MADE = {"kept": Promise("It is kept", "By `run/loop.py`.")}
TESTS = """
import pytest

@pytest.mark.promise("kept")
@pytest.mark.parametrize("n", [1, 2])
def test_one(n): ...

def helper(): ...
def test_of_nothing_promised(): ...

@pytest.mark.slow
@pytest.mark.promise("kept")
async def test_two(): ...
"""
WHOLE = """# Promises
…
## It is kept

By `run/loop.py`. Mark: `kept`.

- `tests/test_it.py::test_one`
- `tests/test_it.py::test_two`
"""


def project(root: Path, tests: str = TESTS) -> Path:
    """A folder with one file of the package, one of tests, and the page that they make."""
    files = {"src/unwrite/run/loop.py": "", "tests/test_it.py": tests, "tests/other.py": "", PAGE: ""}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / PAGE).write_text(promises.page(MADE, root), encoding="utf-8")
    return root


def test_every_promise_is_held_and_every_mark_is_a_promise() -> None:
    found = list(promises.problems(PROMISES, ROOT))
    assert not found, "\n".join(found)


def test_the_page_is_what_is_promised() -> None:
    found = list(promises.stale(PROMISES, ROOT))
    assert not found, "\n".join(found)


def test_a_promise_its_mechanism_and_its_tests_are_on_the_page(tmp_path: Path) -> None:
    made = promises.page(MADE, project(tmp_path))
    assert made == WHOLE.replace("…\n", made.partition("\n")[2].partition("## ")[0])
    assert [*promises.problems(MADE, tmp_path), *promises.stale(MADE, tmp_path)] == []


@pytest.mark.parametrize("marks", ['pytest.mark.promise("kept")', '[pytest.mark.slow, pytest.mark.promise("kept")]'])
def test_a_mark_of_a_module_is_one_of_each_of_its_tests(marks: str, tmp_path: Path) -> None:
    root = project(tmp_path, f"pytestmark = {marks}\ndef test_a(): ...\ndef helper(): ...\ndef test_b(): ...")
    assert [mark.test for mark in promises.marks(root)] == ["tests/test_it.py::test_a", "tests/test_it.py::test_b"]
    assert list(promises.problems(MADE, root)) == []


def test_of_the_project_every_mark_that_pytest_sees_is_read(request: pytest.FixtureRequest) -> None:
    """Whatever was collected now: all of it, or this file."""
    seen = {
        (mark.args[0], item.nodeid.partition("[")[0])
        for item in request.session.items
        for mark in item.iter_markers("promise")
    }
    assert seen <= set(promises.marks(ROOT))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"new": Promise("It is new", "By `run/loop.py`.")}, 'no test holds the promise "new"'),
        ({"kept": Promise("It is kept", "By everyone.")}, 'the promise "kept" does not say which file keeps it'),
        ({"kept": Promise("It is kept", "By `run/loop.py` and `gone.py`.")}, '"kept" is kept by gone.py, which is not'),
    ],
    ids=["no test", "no file", "a file that is not there"],
)
def test_a_promise_that_nothing_keeps_is_noticed(made: dict[str, Promise], says: str, tmp_path: Path) -> None:
    (found,) = promises.problems(MADE | made, project(tmp_path))
    assert says in found


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ('@pytest.mark.promise("kpet")\ndef test_x(): ...', 'tests/test_it.py::test_x: "kpet" was never promised'),
        ('@pytest.mark.promise("kept")\ndef helper(): ...', "tests/test_it.py:14: this mark is not"),
        ('@pytest.mark.promise("kept")\nclass TestIt: ...', "tests/test_it.py:14: this mark is not"),
        ("@pytest.mark.promise\ndef test_x(): ...", "tests/test_it.py:14: this mark is not"),
        ("@pytest.mark.promise(NAME)\ndef test_x(): ...", "tests/test_it.py:14: this mark is not"),
        ('@pytest.mark.promise("kept", "new")\ndef test_x(): ...', "tests/test_it.py:14: this mark is not"),
        ('kept = pytest.mark.promise("kept")', "tests/test_it.py:14: this mark is not"),
        ('case = pytest.param(1, marks=pytest.mark.promise("kept"))', "tests/test_it.py:14: this mark is not"),
    ],
)
def test_a_mark_that_holds_nothing_is_noticed(tests: str, says: str, tmp_path: Path) -> None:
    (found,) = promises.problems(MADE, project(tmp_path, TESTS + tests))
    assert found.startswith(says)


@pytest.mark.parametrize("text", [None, "", WHOLE])
def test_another_page_is_noticed_and_the_command_named(text: str | None, tmp_path: Path) -> None:
    file = project(tmp_path) / PAGE
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="utf-8")
    (found,) = promises.stale(MADE, tmp_path)
    assert found.endswith("run `python tests/promises.py`")


def test_the_command_writes_the_page_and_nothing_where_a_test_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project(tmp_path) / PAGE
    made = file.read_text("utf-8")
    monkeypatch.setattr(promises, "ROOT", tmp_path)
    monkeypatch.setattr(promises, "PROMISES", MADE)
    file.unlink()
    promises.main()
    assert file.read_text("utf-8") == made
    monkeypatch.setattr(promises, "PROMISES", {**MADE, "new": Promise("It is new", "By `run/loop.py`.")})
    with pytest.raises(SystemExit, match='no test holds the promise "new"'):
        promises.main()
    assert file.read_text("utf-8") == made
