"""Does a person, and another program, see how far a run is, and does an interrupt keep what is finished?"""

from __future__ import annotations

import importlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import tiny
import unwrite as uw
from unwrite import cli
from unwrite.cli import options, shards
from unwrite.errors import Stopped
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens
from unwrite.report import audited, events, live, page
from unwrite.result import Result
from unwrite.run.loop.job import Job
from unwrite.run.loop.stream import Progress
from unwrite.studies.keep import keep

HOSTILE = "a\x1b[2J\u202e\n\x7f[red]:smile:"
PROMPT = "w3 w4 w5"
COMMAND = importlib.import_module("unwrite.cli.audit")
AUDIT = importlib.import_module("unwrite.studies.audit")


@pytest.fixture(scope="module")
def lm() -> Model:
    hf = tiny.model("llama", 0)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(hf.config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return view(hf, PreTrainedTokenizerFast(tokenizer_object=words), name="a model")


@pytest.fixture(scope="module")
def tokens(lm: Model) -> Tokens:
    ids = np.random.default_rng(0).integers(3, lm.vocabulary, (8, 9))
    return Tokens(ids, np.full(8, 9), np.arange(8)).named("a text")


@pytest.fixture(scope="module")
def told(lm: Model, tokens: Tokens) -> tuple[list[Progress], Result]:
    """All that an audit tells its listener, and its result."""
    heard: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        # Half of the prompts are verified, and two runs of them held at once: so every stage takes several batches.
        patch.setattr("unwrite.run.loop.stream._BATCH_TOKENS", tokens.ids.size // 2)
        return heard, uw.audit(lm, tokens, PROMPT, listener=heard.append)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are drawn elsewhere, and take longer than all the rest."""
    monkeypatch.setattr(page, "page", lambda result, *_: f"the page of a {result.method}")


@pytest.fixture
def run(lm: Model, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of `unwrite …` with a tiny model and its text, whatever the command line names."""
    for module in (options, shards):
        monkeypatch.setattr(module, "load_model", lambda *_: lm)
    for module in (COMMAND, shards):
        monkeypatch.setattr(module, "read_texts", lambda *_: tokens)
    monkeypatch.setattr(cli, "read_text", lambda *_: tokens)

    def code(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["unwrite", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return code


@pytest.fixture
def again(told, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Audits find what `told` found, at once; call it to press Ctrl-C before the `after`-th step of a stage."""
    parts: list[tuple[list[Progress], Result]] = []
    steps: list[Progress] = []
    for step in told[0]:
        steps.append(step)
        if step.result is not None:
            parts.append((steps[:-1], step.result))
            steps = []
    pressed: list[tuple[str, int]] = []
    # A process that was started in the background may have inherited that it ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def find(name: str, *_: Any, listener: Any, **__: Any) -> Result:
        steps, result = parts.pop(0)
        assert result.method == name
        for step in steps:
            pressed[:] = [(stage, left - step.stage.startswith(stage)) for stage, left in pressed]
            if any(left == 0 for _, left in pressed):
                signal.raise_signal(signal.SIGINT)
            listener(step)
        return result

    for name in ("scan", "survival", "verify", "adversarial", "dla", "corpus_dla"):
        monkeypatch.setattr(AUDIT, name, partial(find, name))
    return lambda stage, after: pressed.append((stage, after))


def same(saved: Result, found: Result) -> bool:
    """Is a saved result the one that was found? It also says of which run it is."""
    own = {name: part for name, part in saved.data.attrs.items() if name in found.data.attrs}
    bare = [one.data.drop_attrs(deep=False) for one in (saved, found)]
    return bare[0].identical(bare[1]) and own == found.data.attrs


def parsed(text: str) -> list[dict[str, Any]]:
    """Events, one a line, in printable ASCII and strict JSON."""
    assert re.fullmatch(r"[\x20-\x7e\n]*", text)
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


# Events


def test_events_agree_with_what_is_saved(run, again, capsys, tmp_path, tokens) -> None:
    assert run("audit", "model", "--text", "text", "--prompt", PROMPT, "--json", "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    planned, first, *middle, last = parsed(shown.out)
    saved = uw.read(tmp_path / "run")
    assert (planned["event"], planned["total"]) == ("plan", pytest.approx(sum(planned["seconds"].values())))
    assert first["event"] == "start"
    assert first["model"] == saved.provenance["model"]
    assert first["tokens"][""]["hash"] == tokens.hash
    assert "exact to rounding" in first["certificate"]
    assert (last["event"], last["method"]) == ("result", "audit")
    assert last["verdict"] == saved.data.attrs["verdict"]
    assert sorted(last["files"]) == sorted(file.name for file in (tmp_path / "run").iterdir())
    assert last["out"] == str(tmp_path / "run")
    verified = [event for event in middle if event.get("method") == "verify"]
    for event, data in zip(verified, audited.verified(saved), strict=True):
        end = data.isel(location=-1)
        assert [event[name] for name in ("writer", "verdict")] == [data.attrs[name] for name in ("writer", "verdict")]
        assert event["erasers"] == data.attrs["erasers"].split()
        assert [event[name] for name in ("survival", "survival_se", "gap")] == pytest.approx(
            [float(end[name]) for name in ("survival", "survival_se", "gap")]
        )
        assert event["generic"]["mean"] == pytest.approx(float(end["generic"].sel(bound="mean")))
        assert event["erased"] == pytest.approx(float(data["erased"].sum()))


def test_every_stage_is_heard_to_its_end(told, capsys) -> None:
    heard, found = told
    for step in heard:
        events.hear(step)
    stages = parsed(capsys.readouterr().out)
    done = [event["stage"] for event in stages if event["event"] == "done"]
    assert done == list(dict.fromkeys(step.stage for step in heard))
    assert {event["event"] for event in stages} == {"progress", "done", "part"}
    parts = [event["method"] for event in stages if event["event"] == "part"]
    assert parts == ["scan", "survival", *["verify"] * found.data.sizes["verified"], "adversarial", "dla", "corpus_dla"]
    assert all(event["done"] < event["total"] for event in stages if event["event"] == "progress")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("scan", "m", "--text", "t"), "These are levels"),
        (("verify", "m", "L0H0", "--text", "t"), "survives to the end"),
        (("dla", "m", "--prompt", PROMPT), "indicative only"),
        (("dla", "m", "--prompt", PROMPT, "--no-total"), "Nothing was executed"),
    ],
    ids=["scan", "verify", "dla", "dla readings"],
)
def test_other_methods_have_events_too(command, word, run, capsys, tmp_path) -> None:
    assert run(*command, "--json", "--out", tmp_path) == 0
    first, *middle, last = parsed(capsys.readouterr().out)
    assert [event["event"] for event in (first, last)] == ["start", "result"]
    assert middle[-1]["event"] == "done"
    assert word in last["words"]
    assert all((tmp_path / file).is_file() for file in last["files"])


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("arguments", "code", "kind", "said"),
    [
        (("scan", "m"), 2, "usage", "--text"),
        (("scan", "m", "--text", "t", "-n", "no"), 2, "usage", "-n"),
        (("verify", "m", "L9H9", "--text", "t"), 1, "NodeError", "L9H9"),
        (("verify", "m", "x\x1b[2J\u202e", "--text", "t"), 1, "NodeError", "\\x1b[2J"),
    ],
)
def test_an_error_is_an_event_with_its_exit_code(arguments, code, kind, said, run, capsys) -> None:
    assert run(*arguments, "--json") == code
    *_, last = parsed(capsys.readouterr().out)
    assert (last["event"], last["kind"], last["code"]) == ("error", kind, code)
    assert said in last["message"]


def test_a_bug_is_an_event_and_no_secret(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr("unwrite.methods.scan.stream", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["unwrite", "scan", "m", "--text", "t", "--json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert parsed(capsys.readouterr().out)[-1]["kind"] == "ZeroDivisionError"


def test_what_json_does_not_have_is_null_and_what_is_hostile_is_escaped(capsys) -> None:
    numbers = [float("nan"), float("inf"), np.float32("nan"), np.int64(3), np.float64(0.5)]
    events.say("x", numbers=numbers, deep={HOSTILE: (HOSTILE, "\udc80")})
    (event,) = parsed(capsys.readouterr().out)
    assert event == {"event": "x", "numbers": [None, None, None, 3, 0.5], "deep": {HOSTILE: [HOSTILE, "\udc80"]}}


# What a person sees


def watched(steps: list[Progress], width: int = 100, fails: bool = False) -> str:
    """What a terminal is sent while a run tells these steps."""
    screen = Console(force_terminal=True, file=io.StringIO(), width=width, height=30, markup=False, emoji=False)
    try:
        with live.listening(screen, lambda: 3 * 2**30, " · a hint") as hear:
            for step in steps:
                hear(step)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return screen.file.getvalue()


def read_off(sent: str) -> str:
    """What is sent, without the codes that move the cursor and colour the text."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", sent.replace("\x1b[2K", "\n")).replace("\r", "")


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_stages_memory_and_a_growing_table(width, told) -> None:
    heard, found = told
    shown = read_off(watched(heard, width))
    writers = [str(writer) for writer in found["verified"].values]
    for stage in ("scan", "survival of", *(f"verify {writer}" for writer in writers), "search", "dla", "corpus"):
        assert re.search(rf"^{stage}.*█ +\d+/\d+ prompts .* tok/s +in [\d.]+ s$", shown, re.MULTILINE), stage
    assert "a model on " in shown
    assert re.search(r"at most [\d.]+ GiB of memory, 3.00 GiB on the device · a hint", shown)
    rows = [audited.row(data) for data in audited.verified(found)]
    growing = [shown.count(f"\n{row[0]} ") for row in rows]
    assert growing == sorted(growing, reverse=True)
    assert growing[-1] > 0
    for row in rows:
        assert all(cell in shown for cell in row[:6])
    assert max(map(len, shown.splitlines())) <= width


def test_a_second_pass_counts_with_the_first(told) -> None:
    lines = [line for line in read_off(watched(told[0])).splitlines() if line.startswith("verify")]
    assert not any("hidden" in line or "beside" in line for line in lines)
    passes = (("v", 40, 2.0), ("v, hidden", 20, 1.0), ("v, hidden", 40, 2.0), ("v, beside others", 40, 4.0))
    steps = [Progress(name, tokens // 10, 4, tokens, seconds) for name, tokens, seconds in passes]
    last = read_off(watched(steps)).strip().splitlines()
    assert any(line.startswith("v ") and "15 tok/s  in 8.0 s" in line for line in last)


def test_a_stage_that_runs_says_how_long_it_will(monkeypatch) -> None:
    shown = read_off(watched([Progress("scan", 30, 120, 3000, 60.0)], fails=False))
    assert re.search(r"scan +█+·+ +30/120 prompts +50 tok/s +left 3 min", shown)


def test_a_batch_that_takes_long_says_how_far_it_is() -> None:
    parts = ((0.5, "75/301 nodes", 30.0), (1.5, "226/301 nodes", 90.0))
    steps = [Progress("dla", 0, 2, 30, after, begun=begun, doing=doing) for begun, doing, after in parts]
    assert [step.left for step in steps] == [90.0, 30.0]
    assert Progress("dla", 0, 2, 30, 9.0).left == float("inf")
    assert re.search(r"dla +█+·+ +75/301 nodes +1 tok/s +left 90.0 s", read_off(watched(steps[:1])))
    # All of it is one stage, of which one line stays.
    shown = read_off(watched([*steps, Progress("dla", 2, 2, 60, 120.0)]))
    assert re.search(r"dla +█+ +2/2 prompts +0 tok/s +in 2 min", shown)
    assert "226/301 nodes" not in shown
    screen = Console(file=io.StringIO(), width=160)
    with live.listening(screen, lambda: 0) as hear:
        for step in [steps[0], steps[0], steps[1]]:
            hear(step)
    assert len(screen.file.getvalue().splitlines()) == 2


def test_the_table_stays_after_an_interrupt_and_goes_after_the_end(told) -> None:
    heard, found = told
    part = heard[: next(i for i, step in enumerate(heard) if step.result and step.result.method == "verify") + 1]
    writer = str(found["verified"].values[0])
    stays, goes = (watched(part, fails=fails) for fails in (True, False))
    last_frame = re.split(r"\x1b\[2K", stays)[-1]
    assert writer in last_frame
    assert "GiB" not in last_frame
    assert writer not in re.split(r"\x1b\[2K", goes)[-1]
    # The cursor is there again.
    assert all(sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l") for sent in (stays, goes))


def test_elsewhere_there_are_plain_lines(told) -> None:
    heard, found = told
    many = [Progress("long", done, 1000, done, 1.0 * done) for done in range(1, 1001)]
    screen = Console(file=io.StringIO(), width=160)
    with live.listening(screen, lambda: 0) as hear:
        for step in [*heard, *many]:
            hear(step)
    shown = screen.file.getvalue()
    assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f]*", shown)
    assert sum(line.startswith("long") for line in shown.splitlines()) == 11
    for data in audited.verified(found):
        assert f"{data.attrs['writer']}: {data.attrs['verdict']}; survival " in shown


def test_a_forced_colour_moves_no_cursor_in_a_pipe(run, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("scan", "m", "--text", "t") == 0
    assert not re.search(r"\x1b\[[0-9;?]*[A-HJKSTfhl]", capsys.readouterr().err)


def test_quiet_says_the_verdict_and_nothing_else(run, capsys, tmp_path) -> None:
    assert run("scan", "m", "--text", "t", "-q", "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "".join(shown.out.split()).startswith("amodelon")
    assert str(tmp_path) not in shown.out


@pytest.mark.promise("hostile")
def test_nothing_hostile_reaches_a_terminal(told) -> None:
    heard, _ = told
    scanned = next(step for step in heard if step.result is not None)
    data = scanned.result.data
    record = json.loads(data.attrs["provenance"])
    record["model"]["name"] = HOSTILE
    part = replace(scanned, stage=HOSTILE, result=Result(data.assign_attrs(provenance=json.dumps(record))))
    sent = watched([Progress(f"scan {HOSTILE}", 1, 2, 3, 4.0), replace(scanned, stage=HOSTILE, result=None), part])
    for raw in ("\x1b[2J", "\u202e", "\x7f", "\n[red]"):
        assert raw not in sent
    assert "a\\x1b[2J\\u202e\\n\\x7f[red]:smile:" in read_off(sent)


# Interrupts


def test_an_interrupted_scan_leaves_no_folder(run, again, capsys, tmp_path) -> None:
    again("scan", 1)
    assert run("audit", "m", "--text", "t", "--out", tmp_path / "run") == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "stopped at the start. Nothing was finished, nothing is kept."
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.promise("interrupted")
@pytest.mark.parametrize(("stage", "after"), [("verify", 1), ("verify", 10), ("dla", 1)])
def test_an_interrupt_keeps_what_is_finished(stage, after, run, again, told, capsys, tmp_path) -> None:
    again(stage, after)
    assert run("audit", "m", "--text", "t", "--out", tmp_path / "run") == 130
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    files = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert {"report.html", "result.nc", "table.csv"} <= set(files)
    assert all(name in line for name in files)
    assert line.endswith("dla, corpus.")
    assert shown.out == ""
    assert "Traceback" not in shown.err
    kept = uw.read(tmp_path / "run")
    assert kept.method == "scan"
    assert same(kept, next(step.result for step in told[0] if step.result is not None))
    beside = [name for name in files if name.startswith("verify")]
    assert bool(beside) == (after > 1 or stage == "dla")
    for name in beside:
        assert name == f"verify_{uw.read(tmp_path / 'run' / name).data.attrs['writer']}.nc"


def test_an_interrupt_is_an_event_that_names_the_files(run, again, capsys, tmp_path) -> None:
    again("verify", 1)
    assert run("audit", "m", "--text", "t", "--json", "--out", tmp_path) == 130
    *_, last = parsed(capsys.readouterr().out)
    assert (last["event"], last["kind"], last["code"]) == ("error", "stopped", 130)
    assert sorted(last["kept"]) == sorted(file.name for file in tmp_path.iterdir())
    assert last["missing"] == ["verify", "search", "dla", "corpus"]


def test_without_a_folder_an_interrupt_says_that_nothing_is_kept(run, again, capsys) -> None:
    again("verify", 1)
    assert run("audit", "m", "--text", "t") == 130
    assert "Nothing is kept of what was finished" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.promise("interrupted")
def test_in_python_the_interrupt_comes_out_after_the_scan_is_saved(again, tmp_path, lm, tokens) -> None:
    again("verify", 1)
    with pytest.raises(KeyboardInterrupt, match=r"Kept in .*result\.nc"):
        uw.audit(lm, tokens, out=tmp_path / "run")
    assert uw.read(tmp_path / "run").method == "scan"


def test_files_of_others_stay_where_nothing_is_kept(again, tmp_path, lm, tokens) -> None:
    again("scan", 1)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(Stopped):
        uw.audit(lm, tokens, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.promise("interrupted")
def test_an_interrupt_while_saving_saves_the_whole(monkeypatch, tmp_path, told) -> None:
    _, found = told
    real, pressed = page.save_all, []

    def slow(result: Result, folder: Path) -> tuple[str, ...]:
        pressed.append(result)
        if len(pressed) == 1:
            raise KeyboardInterrupt
        return real(result, folder)

    monkeypatch.setattr(page, "save_all", slow)
    with pytest.raises(Stopped) as stopped:
        keep(lambda parts, job: found, tmp_path / "run")
    assert same(uw.read(tmp_path / "run"), found)
    assert stopped.value.missing == ()


def test_a_second_interrupt_gives_up_what_is_not_saved_yet(monkeypatch, tmp_path, told) -> None:
    parts = [step.result for step in told[0] if step.result is not None]

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    def stopped_at_dla(hear: Callable[[Progress], None], _: Job) -> Result:
        for part in parts[:2]:
            hear(Progress("dla", 1, 2, 3, 4.0, part))
        hear(Progress("dla", 1, 2, 3, 4.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "save_all", pressed)
    with pytest.raises(Stopped) as stopped:
        keep(stopped_at_dla, tmp_path / "run")
    assert list(stopped.value.kept) == [file.name for file in (tmp_path / "run").iterdir()]
    assert uw.read(tmp_path / "run" / stopped.value.kept[0])["survival"].identical(parts[1]["survival"])
    assert stopped.value.missing == ("dla", "corpus")


def test_an_interrupt_before_a_method_runs_ends_in_one_line(run, monkeypatch, capsys) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load_model", pressed)
    assert run("audit", "m", "--text", "t") == 130
    assert capsys.readouterr().err == "stopped.\n"
