"""Do one process, several ranks and shards in any order give the same bits, and are parts that do not fit refused?"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
import unwrite as uw
from methods import few_draws
from test_cli import folder as folder
from test_cli import run
from test_resume import same
from unwrite.errors import ModelError, ResultError
from unwrite.model.load import view
from unwrite.run.tally import survives, without

IDS = torch.randint(3, 50, (29, 9), generator=torch.Generator().manual_seed(1))
# What torchrun sets. Children are forked, since loading torch anew takes longer than the scan.
RANKS = """
import os, socket, sys
import torch, unwrite.cli, unwrite.methods.scan, unwrite.run.loop.peers, unwrite.studies.keep
torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for rank in range({size}):
    if not (child := os.fork()):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE="{size}", LOCAL_RANK=str(rank), MASTER_PORT=str(port))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = ["unwrite", *{arguments!r}]
        unwrite.cli.main()
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture(scope="module")
def lm() -> Any:
    return view(tiny.model("llama", 0))


@pytest.fixture(scope="module")
def whole(lm) -> uw.Result:
    return uw.scan(lm, tokens(), batch=2)


def tokens() -> uw.Tokens:
    # Documents of several prompts lie across the borders of batches and of shards.
    return uw.Tokens(IDS.numpy(), np.full(29, 9), np.arange(29) // 3)


def shard(lm: Any, place: Path, part: int, of: int, **other: Any) -> None:
    with uw.Job(place, shard=(part, of)) as job:
        uw.scan(lm, other.pop("tokens", tokens()), **{"batch": 2, **other}, checkpoint=job)
        pytest.fail("a shard has no result")


def together(lm: Any, *places: Path, **other: Any) -> uw.Result:
    with uw.Job(of=places) as job:
        return uw.scan(lm, tokens(), **{"batch": 2, **other}, checkpoint=job)
    raise AssertionError


@pytest.mark.promise("shards")
@given(st.integers(2, 20), st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_in_any_order_have_the_bits_of_one_process(lm, whole, tmp_path_factory, of, data) -> None:
    places = [tmp_path_factory.mktemp("shard") for _ in range(data.draw(st.integers(1, of)))]
    for part in data.draw(st.permutations(range(1, of + 1))):
        shard(lm, places[part % len(places)], part, of)
    assert same(together(lm, *data.draw(st.permutations(places))), whole)


@pytest.mark.promise("shards")
def test_ranks_have_the_bits_of_one_process_and_leave_one_result(folder, tmp_path) -> None:
    asked = ["scan", str(folder / "model"), "--text", str(folder / "text.txt"), "-n", "80", "--length", "64"]
    out = tmp_path / "ranks"
    script = RANKS.format(size=3, arguments=[*asked, "--out", str(out), "--checkpoint-every", "0"])
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writes against it") == 1
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "result.nc", "table.csv"]
    lm = uw.load(folder / "model")
    torch.set_num_threads(1)
    assert same(uw.read(out), uw.scan(lm, uw.text(folder / "text.txt", lm.tokenizer, 80, 64)))


@pytest.mark.promise("shards")
def test_shards_of_survival_have_the_bits_of_one_process(lm, tmp_path) -> None:
    # Which writers are material is found by every shard in all prompts, what survives of them in its own.
    asked: dict[str, Any] = {"controls": ["typical", "signs"], "decoys": 2}
    some = uw.Tokens(IDS[:5].numpy(), np.full(5, 9), np.arange(5))
    for part in (3, 1, 2):
        with uw.Job(tmp_path / str(part), shard=(part, 3)) as job:
            uw.survival(lm, some, **asked, checkpoint=job)
            pytest.fail("a shard has no result")
    with uw.Job(of=[tmp_path / "1", tmp_path / "2"]) as job, pytest.raises(ResultError, match="run shard 3/3, too"):
        uw.survival(lm, some, **asked, checkpoint=job)
    places = [tmp_path / str(part) for part in (2, 3, 1)]
    assert same(uw.survival(lm, some, **asked, checkpoint=uw.Job(of=places)), uw.survival(lm, some, **asked))


@pytest.mark.promise("shards")
@pytest.mark.parametrize(("prompts", "of"), [(1, 2), (2, 3), (3, 5)])
def test_shards_divide_the_writers_where_prompts_do_not_go_up(lm, tmp_path, monkeypatch, prompts, of) -> None:
    # Few runs at a time, so that there is something to divide; of one prompt every shard has some of the writers.
    monkeypatch.setattr(survives, "at_once", lambda *_: 3)
    chunks, go = [], survives._Chunk.go
    monkeypatch.setattr(survives._Chunk, "go", lambda self: (chunks.append(self.nodes), go(self)))
    asked: dict[str, Any] = {"writers": ["L0H0", "L0H1", "MLP0", "L1H1"], "decoys": 2}
    some = uw.Tokens(IDS[:prompts].numpy(), np.full(prompts, 9), np.arange(prompts))
    whole = uw.survival(lm, some, **asked)
    every = len(chunks)
    for part in range(1, of + 1):
        chunks.clear()
        with uw.Job(tmp_path / str(part), every=0.0, shard=(part, of)) as job:
            uw.survival(lm, some, **asked, checkpoint=job)
        assert abs(len(chunks) - every / of) <= prompts
    places = [tmp_path / str(part) for part in range(of, 0, -1)]
    assert same(uw.survival(lm, some, **asked, checkpoint=uw.Job(of=places)), whole)


def test_a_shard_of_writers_that_was_stopped_goes_on(lm, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(survives, "at_once", lambda *_: 3)
    asked: dict[str, Any] = {"writers": ["L0H0", "L0H1", "MLP0", "L1H1"], "decoys": 2}
    one = uw.Tokens(IDS[:1].numpy(), np.full(1, 9), np.arange(1))
    whole, go, count = uw.survival(lm, one, **asked), survives._Chunk.go, [0]
    every = -(-4 * (1 + 2 + 1) // 3)

    def stopped(self: Any) -> None:
        count[0] += 1
        if count[0] in (2, 5):
            raise KeyboardInterrupt
        go(self)

    monkeypatch.setattr(survives._Chunk, "go", stopped)
    for part in (1, 1, 2, 2):
        with suppress(KeyboardInterrupt), uw.Job(tmp_path / str(part), every=0.0, shard=(part, 2)) as job:
            uw.survival(lm, one, **asked, checkpoint=job)
    # Each part was stopped once, and what it had done was not done again.
    assert count[0] == 2 + every
    assert same(uw.survival(lm, one, **asked, checkpoint=uw.Job(of=[tmp_path / "1", tmp_path / "2"])), whole)


def test_a_shard_that_was_stopped_goes_on(lm, whole, tmp_path, monkeypatch) -> None:
    from unwrite.run.tally import gram

    real, count = gram.GramTally.step, [0]

    def step(self: Any, batch: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(gram.GramTally, "step", step)
        with pytest.raises(KeyboardInterrupt), uw.Job(tmp_path, every=0.0, shard=(1, 2)) as job:
            uw.scan(lm, tokens(), batch=2, checkpoint=job)
    shard(lm, tmp_path, 2, 2)
    with pytest.raises(ResultError, match=r"is of a shard that is not done. Got: 3 of 7 batches"):
        together(lm, tmp_path)
    shard(lm, tmp_path, 1, 2)
    assert same(together(lm, tmp_path), whole)


@pytest.mark.promise("shards")
def test_parts_that_do_not_fit_are_refused(lm, tmp_path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    shard(lm, one, 1, 2)
    with pytest.raises(ResultError, match=r"not whole.* Next: run shard 2/2, too"):
        together(lm, one)
    shard(lm, two, 2, 2)
    for changed in ({"batch": 3}, {"skip": 2}, {"writers": ["L0H1"]}):
        with pytest.raises(ResultError, match=r"checkpoint of another run\. Got: another"):
            together(lm, one, two, **changed)
    with pytest.raises(ResultError, match=r"checkpoint of another run\. Got: another model weights"):
        together(view(tiny.model("llama", 1)), one, two)
    shard(lm, other, 2, 3)
    with pytest.raises(ResultError, match="not whole"):
        together(lm, one, two, other)
    shard(lm, other, 2, 2)
    with pytest.raises(ResultError, match="not whole"):
        together(lm, one, two, other)


def test_what_cannot_be_done_in_parts_says_so(lm, tmp_path) -> None:
    with pytest.raises(ResultError, match="a shard has no result to return"):
        uw.scan(lm, IDS, checkpoint=uw.Job(tmp_path, shard=(1, 2)))
    with pytest.raises(ModelError, match="verify cannot be done in parts"), uw.Job(tmp_path, shard=(1, 2)) as job:
        uw.verify(lm, IDS, "L0H0", checkpoint=job)
    for part in ((0, 2), (3, 2), (1, 0), (1.0, 2)):
        with pytest.raises((ResultError, TypeError), match=r"a shard is a part of a run|"):
            uw.Job(tmp_path, shard=part)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("shards")
def test_shards_and_merge_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    asked = ("scan", folder / "model", "--text", folder / "text.txt", "-n", 40, "--length", 64)
    places = [tmp_path / f"run{i}" for i in (1, 2, 3)]
    for i, place in enumerate(places):
        assert run(monkeypatch, *asked, "--shard", f"{i + 1}/3", "--out", place) == 0
        assert f"shard {i + 1}/3 is done and kept in" in capsys.readouterr().out
    assert run(monkeypatch, "merge", *places[:2], "--out", tmp_path / "merged") == 1
    assert "run shard 3/3, too" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run(monkeypatch, "merge", *places, "--out", tmp_path / "merged") == 0
    assert run(monkeypatch, *asked, "--out", tmp_path / "whole") == 0
    assert same(uw.read(tmp_path / "merged"), uw.read(tmp_path / "whole"))
    capsys.readouterr()
    # The same shard with other settings does not mix with what is there.
    assert run(monkeypatch, *asked, "--skip", 2, "--shard", "1/3", "--out", places[0]) == 1
    assert "checkpoint of another run. Got: another settings skip" in capsys.readouterr().err
    asked_of = json.loads((places[1] / "shard.json").read_text())
    for bad in ({**asked_of, "skip": 2}, {**asked_of, "n": "many"}, {"model": 3}, [1]):
        (places[1] / "shard.json").write_text(json.dumps(bad))
        assert run(monkeypatch, "merge", *places) == 1
        assert "shard" in capsys.readouterr().err


@pytest.mark.promise("shards")
def test_survival_in_shards_and_ranks_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    asked = ("survival", folder / "model", "--text", folder / "text.txt", "-n", 3, "--length", 16, "--decoys", 1)
    assert run(monkeypatch, *asked, "--out", tmp_path / "whole") == 0
    assert "plan: 3 prompts of 16 tokens; survival of" in capsys.readouterr().err
    whole = uw.read(tmp_path / "whole")
    assert run(monkeypatch, *asked, "--budget", "2h", "--out", tmp_path / "allowed") == 0
    assert "(--budget 2.0 h; -n and --length say otherwise)" in " ".join(capsys.readouterr().err.split())
    assert same(uw.read(tmp_path / "allowed"), whole)
    assert run(monkeypatch, *asked, "--budget", "0.000001") == 1
    assert "the budget is too small for one prompt. Got: 0 s. Expected: about" in capsys.readouterr().err
    assert run(monkeypatch, *asked, "--budget", "2h", "--shard", "1/2", "--out", tmp_path / "part") == 2
    places = [tmp_path / f"run{i}" for i in (1, 2)]
    for i, place in enumerate(places):
        assert run(monkeypatch, *asked, "--shard", f"{i + 1}/2", "--out", place) == 0
    assert run(monkeypatch, "merge", *places, "--out", tmp_path / "merged") == 0
    assert same(uw.read(tmp_path / "merged"), whole)
    out = tmp_path / "ranks"
    script = RANKS.format(size=2, arguments=[*map(str, asked), "--out", str(out), "--checkpoint-every", "0"])
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(uw.read(out), whole)
    capsys.readouterr()
    (places[1] / "shard.json").write_text((places[1] / "shard.json").read_text().replace("survival", "verify"))
    assert run(monkeypatch, "merge", *places) == 1
    assert "shard" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [("--shard", "1/3"), ("--shard", "x", "--out", "run"), ("--shard", "1", "--out", "run")], ids=str
)
def test_a_shard_that_is_none_is_a_usage_error(folder, monkeypatch, tmp_path, bad) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "scan", folder / "model", "--text", folder / "text.txt", *bad) == 2
    assert list(tmp_path.iterdir()) == []


def test_other_commands_do_not_run_in_several_processes(folder, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ("verify", folder / "model", "L0H0", "--text", folder / "text.txt", "-n", 4, "--length", 64)
    assert run(monkeypatch, *asked) == 2
    assert "only scan and survival run in several processes" in capsys.readouterr().err


@pytest.mark.promise("finished")
@pytest.mark.parametrize("command", [("scan",), ("verify", "L0H0")], ids=lambda c: c[0])
def test_a_finished_folder_is_printed_and_another_run_refused(folder, monkeypatch, capsys, tmp_path, command) -> None:
    name, *writer = command
    asked = (name, folder / "model", *writer, "--text", folder / "text.txt", "-n", 8, "--length", 64)
    out = ("--out", tmp_path / "run")
    assert run(monkeypatch, *asked, *out) == 0
    first = capsys.readouterr().out
    kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").iterdir()}

    def never(*_: Any) -> None:
        pytest.fail("nothing is computed anew")

    with monkeypatch.context() as patch:
        patch.setattr("unwrite.methods.scan.stream", never)
        patch.setattr("unwrite.methods.verify.stream", never)
        assert run(monkeypatch, *asked, *out) == 0
    assert capsys.readouterr().out == first
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").iterdir()} == kept
    for changed in (("-n", 7), ("--dtype", "float64"), ("--convention", "raw")):
        assert run(monkeypatch, *asked, *changed, *out) == 1
        assert "holds the result of another run. Got: another" in capsys.readouterr().err
    # A page that was lost is made again from what is there.
    (tmp_path / "run" / "table.csv").unlink()
    assert run(monkeypatch, *asked, *out) == 0
    assert (tmp_path / "run" / "table.csv").exists()


def test_a_folder_with_a_result_that_names_no_run_is_refused(lm, tmp_path) -> None:
    uw.scan(lm, IDS).save(tmp_path)
    with pytest.raises(ResultError, match=r"holds the result of another run\. Got: a scan"):
        uw.scan(lm, IDS, checkpoint=tmp_path)


@pytest.fixture
def _heard() -> Iterator[None]:
    """Interrupts are heard, also where the tests run in a background that ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.promise("interrupted")
@pytest.mark.usefixtures("_heard")
def test_ctrl_c_waits_for_the_batch_and_keeps_it_and_a_second_one_does_not_wait(lm, tmp_path, monkeypatch) -> None:
    from unwrite.run.tally import gram

    real, steps, finished = gram.GramTally.step, [0], [0]

    def step(self: Any, batch: Any) -> None:
        steps[0] += 1
        for _ in range(max(0, steps[0] - 3)):  # once in the fourth, twice in the fifth
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
        real(self, batch)
        finished[0] += 1

    monkeypatch.setattr(gram.GramTally, "step", step)
    before, said = signal.getsignal(signal.SIGINT), list[int]()
    with pytest.raises(KeyboardInterrupt):
        uw.scan(
            lm, tokens(), batch=2, checkpoint=tmp_path,
            listener=lambda step: said.extend([finished[0]] * step.stopping),
        )  # fmt: skip
    assert (steps, finished) == ([4], [4])
    assert said == [3]  # at once, before the batch is done
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        uw.scan(lm, tokens(), batch=2, checkpoint=tmp_path)
    assert (steps, finished) == ([5], [4])
    monkeypatch.undo()
    heard: list[Any] = []
    assert same(
        uw.scan(lm, tokens(), batch=2, checkpoint=tmp_path, listener=heard.append), uw.scan(lm, tokens(), batch=2)
    )
    assert (heard[0].before, heard[0].done) == (8, 10)


@pytest.mark.promise("interrupted")
@pytest.mark.usefixtures("_heard")
def test_verify_is_stopped_between_two_runs_of_a_batch(lm, tmp_path, monkeypatch) -> None:
    real, runs = without.added, [0]

    def added(*given: Any) -> Any:
        runs[0] += 1
        if runs[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
        return real(*given)

    with few_draws():
        whole = uw.verify(lm, IDS[:4], "L0H0")
        monkeypatch.setattr(without, "added", added)
        with pytest.raises(KeyboardInterrupt):
            uw.verify(lm, IDS[:4], "L0H0", checkpoint=tmp_path)
        assert runs == [3]
        assert same(uw.verify(lm, IDS[:4], "L0H0", checkpoint=tmp_path), whole)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_the_signal_usr1_says_how_far_a_run_is(folder, monkeypatch, capsys, tmp_path) -> None:
    from unwrite.run.tally import gram

    real, asked = gram.GramTally.step, []

    def step(self: Any, batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        asked.append(capsys.readouterr().err)
        real(self, batch)

    monkeypatch.setattr(gram.GramTally, "step", step)
    before = signal.getsignal(signal.SIGUSR1)
    arguments = ("scan", folder / "model", "--text", folder / "text.txt", "-n", 80, "--length", 64, "-q")
    assert run(monkeypatch, *arguments) == 0
    assert signal.getsignal(signal.SIGUSR1) is before
    assert asked[0].strip() == "nothing is done yet"
    assert "4/80 prompts" in asked[1]


def test_times_and_hosts_are_attributes_over_all_starts(lm, whole, tmp_path, monkeypatch) -> None:
    assert not {"seconds", "starts", "hosts"} & set(whole.data.attrs)
    first = uw.scan(lm, IDS, checkpoint=tmp_path / "first")
    assert first.data.attrs["starts"] == 1
    assert 0 < first.data.attrs["seconds"] < 600
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    shard(lm, tmp_path, 1, 2)
    monkeypatch.setattr(platform, "node", lambda: "here")
    shard(lm, tmp_path, 2, 2)
    both = uw.scan(lm, tokens(), batch=2, checkpoint=uw.Job(tmp_path / "out", of=[tmp_path]))
    assert [host.split()[0] for host in both.data.attrs["hosts"].split("; ")] == ["elsewhere", "here"]
    same(both, whole)
