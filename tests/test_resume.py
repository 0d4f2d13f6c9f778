"""Does a run that was killed go on to the same bits, and does a damaged, foreign or busy file give no number?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from unwrite.errors import ResultError
from unwrite.model.capture import run
from unwrite.model.load import view
from unwrite.run.loop import stream
from unwrite.run.loop.job import Stage
from unwrite.run.loop.stream import Progress
from unwrite.run.tally import gram

IDS = torch.randint(3, 50, (40, 9), generator=torch.Generator().manual_seed(0))
FIRST = "00-scan.npz"
# Children are forked, since loading torch anew takes longer than what they do.
KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
{setup}
for kills in range(50):
    if not (child := os.fork()):
{work}
        os._exit(0)
    # At first soon, so that several starts are needed; then it may come to its end, on a slow machine as on a fast one.
    time.sleep({soon} * 1.4**kills * random.Random(kills).uniform(0.5, 1.0))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
print(kills)
"""


def kills(setup: str, work: str, soon: float) -> int:
    """How often a process had to be killed that does `work` after `setup`: at first `soon` seconds on, then later."""
    tests = str(Path(__file__).parent)
    script = KILLED.format(tests=tests, setup=setup, work=indent(work, 8 * " "), soon=soon)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def lm() -> Any:
    return view(tiny.model("gpt2", 0))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file after every batch."""
    monkeypatch.setattr(Stage, "due", property(lambda self: True))


def same(one: uw.Result, other: uw.Result) -> bool:
    """Are all variables equal, bit for bit?"""
    assert set(one.data) == set(other.data)
    pairs = ((one[name].values, other[name].values) for name in map(str, one.data))
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def stopped(lm: Any, place: Path, after: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """A scan that an interrupt ends in the middle of batch `after`."""
    real, count = gram.GramTally.step, [0]

    def step(self: Any, batch: Any) -> None:
        count[0] += 1
        if count[0] > after:
            self.positions.add(run(self.lm, batch.ids, self.folded), batch.beyond(1))  # half of its work
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(gram.GramTally, "step", step)
        with pytest.raises(KeyboardInterrupt):
            uw.scan(lm, IDS, checkpoint=place, **settings)


@pytest.mark.promise("resumed")
def test_killed_anywhere_and_started_again_it_ends_in_the_same_bits(lm, tmp_path) -> None:
    place, out = tmp_path / "run", tmp_path / "result.nc"
    setup = """
import torch, unwrite as uw
from test_resume import IDS, tiny, view
torch.set_num_threads(1)
lm = view(tiny.model("gpt2", 0))
"""
    # One prompt a batch, and a file after each: so a kill falls into every part of the work.
    work = f"uw.scan(lm, IDS, batch=1, checkpoint=uw.Job({str(place)!r}, every=0.0)).save({str(out)!r})"
    assert kills(setup, work, 0.02) >= 2
    assert same(uw.read(out), uw.scan(lm, IDS, batch=1))
    assert list(place.iterdir()) == []


def test_a_step_that_takes_long_is_told_of_between_whiles(lm, monkeypatch) -> None:
    monkeypatch.setattr(stream, "_BETWEEN", 0.0)
    heard: list[Progress] = []
    pairs = uw.pairs(IDS[:3, :4], IDS[3:6, :4], 5, 9)
    uw.effects(lm, pairs, "heads", batch=2, listener=heard.append)
    steps = [(step.done, step.begun, step.doing, step.tokens) for step in heard]
    assert (0, 1.0, "2/4 positions", 4) in steps
    assert (2, 0.5, "2/4 positions", 10) in steps
    assert [step for step in steps if not step[2]] == [(0, 0.0, "", 0), (2, 0.0, "", 8), (3, 0.0, "", 12)]


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_interrupt_in_the_middle_of_a_batch_counts_nothing_twice(family, tmp_path, monkeypatch) -> None:
    lm = view(tiny.model(family, 1))
    settings: dict[str, Any] = {"batch": 3, "writers": [lm.nodes[1], lm.nodes[-1]], "skip": 2}
    stopped(lm, tmp_path, 5, monkeypatch, **settings)
    assert (tmp_path / FIRST).exists()
    heard: list[int] = []
    again = uw.scan(lm, IDS, checkpoint=tmp_path, listener=lambda step: heard.append(step.done), **settings)
    assert heard == [18, 21, 24, 27, 30, 33, 36, 39, 40]
    assert same(again, uw.scan(lm, IDS, **settings))


@pytest.mark.promise("resumed")
def test_several_texts_go_on_in_the_middle_of_the_second(lm, tmp_path, monkeypatch) -> None:
    texts = {"a": uw.Tokens(IDS[:12].numpy(), np.full(12, 9), np.arange(12)), "b": uw.Tokens(
        IDS[12:].numpy(), np.full(28, 9), np.arange(28))}  # fmt: skip
    real, count = gram.GramTally.step, [0]

    def step(self: Any, batch: Any) -> None:
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(gram.GramTally, "step", step)
        with pytest.raises(KeyboardInterrupt):
            uw.scan(lm, texts, batch=4, checkpoint=tmp_path)
    monkeypatch.setattr(gram.GramTally, "step", lambda self, batch: (count.append(0), real(self, batch))[1])
    again = uw.scan(lm, texts, batch=4, checkpoint=tmp_path)
    assert len(count) - 1 == 3 + 7 - 5  # batches of both, without those that were done
    monkeypatch.undo()
    assert same(again, uw.scan(lm, texts, batch=4))


@pytest.mark.promise("damaged")
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-40], lambda b: b"", lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]],
    ids=["shorter", "empty", "one bit"],
)
def test_a_damaged_newest_file_is_noticed_and_the_one_before_is_used(lm, tmp_path, monkeypatch, damage) -> None:
    stopped(lm, tmp_path, 5, monkeypatch, batch=4)
    newest, before = tmp_path / FIRST, tmp_path / f"{FIRST}.before"
    newest.write_bytes(damage(newest.read_bytes()))
    assert same(uw.scan(lm, IDS, batch=4, checkpoint=tmp_path), uw.scan(lm, IDS, batch=4))
    stopped(lm, tmp_path, 5, monkeypatch, batch=4)
    for file in (newest, before):
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ResultError, match="no readable checkpoint"):
        uw.scan(lm, IDS, batch=4, checkpoint=tmp_path)


@pytest.mark.promise("damaged")
@pytest.mark.parametrize(
    "other", [{"batch": 3}, {"skip": 2}, {"floor": 0.1}, {"writers": ["L0H0"]}, {"tokens": IDS[:39]}, {"model": 2}]
)
def test_another_run_is_refused(lm, tmp_path, monkeypatch, other) -> None:
    stopped(lm, tmp_path, 5, monkeypatch, batch=4)
    asked = {"batch": 4, **other}
    model = view(tiny.model("gpt2", asked.pop("model"))) if "model" in asked else lm
    with pytest.raises(ResultError, match="checkpoint of another run"):
        uw.scan(model, asked.pop("tokens", IDS), checkpoint=tmp_path, **asked)


@pytest.mark.promise("damaged")
def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(lm, tmp_path) -> None:
    code = f"from unwrite.run.loop.job import Job\nwith Job({str(tmp_path)!r}):\n"
    code += "    print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ResultError, match="another process works with"):
        uw.scan(lm, IDS, checkpoint=tmp_path)
    process.kill()
    process.communicate()
    assert uw.scan(lm, IDS, checkpoint=tmp_path).method == "scan"


def test_a_place_that_cannot_be_written_is_said(lm, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        uw.scan(lm, IDS, checkpoint=tmp_path / "file")


def test_methods_in_one_job_are_parts_of_one_run_and_each_knows_its_own_settings(lm, tmp_path) -> None:
    def both(skip: int, stop: bool = False) -> tuple[uw.Result, uw.Result]:
        with uw.Job(tmp_path) as job:
            found = uw.scan(lm, IDS, checkpoint=job), uw.verify(lm, IDS, "L0H0", skip=skip, checkpoint=job)
            if stop:
                raise KeyboardInterrupt
            return found
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        both(1, stop=True)
    with pytest.raises(ResultError, match=r"checkpoint of another run\. Got: another settings skip"):
        both(2)
    scanned, verified = both(1)
    assert same(scanned, uw.scan(lm, IDS))
    assert same(verified, uw.verify(lm, IDS, "L0H0"))
    # Whichever is saved is found again as what it is.
    verified.save(tmp_path)
    assert same(uw.verify(lm, IDS, "L0H0", checkpoint=tmp_path), verified)
    with pytest.raises(ResultError, match="holds the result of another run"):
        uw.scan(lm, IDS, checkpoint=tmp_path)
