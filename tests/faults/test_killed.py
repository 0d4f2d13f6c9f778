"""Does a run that was killed at any point at which it writes go on to the same bits, and leave nothing behind?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import disk
import pytest
from asked import ask, differing, every_method, found, keeping_methods, written

import unwrite as uw
from methods import COMBINED
from unwrite.report import page
from unwrite.studies.keep import keep

# Really killed: children are forked from a process without threads, each ends itself at another call.
SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import disk, unwrite as uw
from asked import ask, differing, found
from pathlib import Path
whole, root = found("scan"), Path({root!r})
for point in range(1, 1000):
    place = root / str(point)
    if not (child := os.fork()):
        with disk.calling(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == point else None):
            ask("scan", checkpoint=uw.Job(place, every=0.0))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    assert not differing(ask("scan", checkpoint=place), whole), point
    assert disk.state(place) == {{}}, point
print(point - 1)
"""


@pytest.fixture
def every(pytestconfig: pytest.Config) -> bool:
    """All points are tried with --slow, else as many as there is time for."""
    return pytestconfig.getoption("--slow")


def _spread(states: list[disk.State], method: str) -> list[disk.State]:
    """Some of them, the last included; the first is an empty folder."""
    most = 2 if method in COMBINED else 3
    return [states[round(i * (len(states) - 1) / most)] for i in range(1, most + 1)]


@pytest.mark.promise("faults")
@pytest.mark.promise("resumed")
@every_method
def test_killed_at_any_write_point_and_asked_again(method: str, every: bool, tmp_path: Path) -> None:
    states = [*written(method)]
    # At least one file that is not yet in place, one that is, and one with another beside it.
    assert {len(files) for files in states} >= {0, 1, 2}
    for number, files in enumerate(states if every else _spread(states, method)):
        place = disk.put(tmp_path / str(number), files)
        assert not differing(ask(method, checkpoint=place), found(method)), sorted(files)
        assert disk.state(place) == {}, sorted(files)


def _kept(method: str, place: Path) -> uw.Result:
    """As a command runs it: results and what it can go on from in one folder."""
    done = keep(lambda parts, job: ask(method, checkpoint=job, listener=parts), place)
    assert done is not None
    return done[0]


@pytest.mark.promise("faults")
@pytest.mark.promise("resumed")
@keeping_methods
def test_killed_while_results_are_saved_and_asked_again(
    method: str, every: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A page takes long, and what matters is when it is written.
    monkeypatch.setattr("unwrite.report.page.page", lambda *_: "a page")
    with disk.watched(tmp_path / "whole") as states:
        result = _kept(method, tmp_path / "whole")
    names, table = sorted(page.files(result)), (tmp_path / "whole" / "table.csv").read_bytes()
    saving = [files for files in states if any("result.nc" in name for name in files)]
    assert len(saving) > 2 * len(names)
    for number, files in enumerate(saving if every else saving[1 :: len(saving) // 3]):
        place = disk.put(tmp_path / str(number), files)
        assert not differing(_kept(method, place), found(method)), sorted(files)
        assert not differing(uw.read(place), found(method)), sorted(files)
        assert sorted(disk.state(place)) == names, sorted(files)
        assert (place / "table.csv").read_bytes() == table


@pytest.mark.promise("resumed")
def test_a_process_that_is_really_killed_at_any_write_point(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent)], root=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4 * 4
