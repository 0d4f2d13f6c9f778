"""Does a command do what it says, and does every bad input end in one clear line, exit code 1 and nothing written?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from transformers import T5Config

import tiny
import unwrite as uw
from unwrite import cli
from unwrite.model.planted import planted

TEXT = "A man may write at any time, if he will set himself doggedly to it. " * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model on disk and a text beside it."""
    place = tmp_path_factory.mktemp("cli")
    model = planted("llama")
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `unwrite …`."""
    monkeypatch.setattr(sys, "argv", ["unwrite", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_scan_show_and_picture(folder, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "run"
    scan = ("scan", folder / "model", "--text", folder / "text.txt", "-n", 4, "--length", 64, "--out", out)
    assert run(monkeypatch, *scan) == 0
    first = capsys.readouterr().out
    assert "L0H0" in first
    assert "writes against it" in first
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "result.nc", "table.csv"]
    assert run(monkeypatch, "show", out) == 0
    shown = capsys.readouterr().out
    assert shown.strip() in first
    assert run(monkeypatch, "show", out, "-o", tmp_path / "levels.svg") == 0
    assert (tmp_path / "levels.svg").read_text().startswith("<svg")


def test_it_says_which_version_it_is(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"unwrite {metadata.version('unwrite')}\n"


def test_audit_ends_in_a_verdict(folder, monkeypatch, capsys, tmp_path) -> None:
    arguments = ("audit", folder / "model", "--text", folder / "text.txt", "-n", 4, "--length", 64, "-q")
    assert run(monkeypatch, *arguments, "--out", tmp_path / "run") == 0
    assert "The lowest beside ordinary writes is L0H" in " ".join(capsys.readouterr().out.split())


def test_audit_without_arguments_reads_the_bundled_model(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "audit", "-n", 4, "--length", 32, "--dtype", "float64", "--convention", "raw") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "unwrite's own model · gpt2" in shown
    assert "Python's documentation topics and asyncio: 2 × 32 tokens" in shown
    assert "float64 on cpu · convention raw" in shown


def test_two_texts_are_compared(folder, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "digits.txt").write_text("0123456789 " * 300)
    texts = ("--text", f"prose={folder / 'text.txt'}", "--text", f"digits={tmp_path / 'digits.txt'}")
    assert run(monkeypatch, "scan", folder / "model", *texts, "-n", 3, "--length", 64) == 0
    shown = capsys.readouterr().out
    assert "prose: 3 × 64 tokens" in shown
    assert "digits: 3 × 64 tokens" in shown


def test_writers_can_be_named(folder, monkeypatch, capsys) -> None:
    arguments = ("scan", folder / "model", "--text", folder / "text.txt", "-n", 2, "--length", 64)
    assert run(monkeypatch, *arguments, "--writers", "L0H1,MLP1") == 0
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"L0H0", "L0H1", "MLP1"} & first_words == {"L0H1", "MLP1"}


def test_doctor_names_every_identity(folder, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "doctor", folder / "model", "-n", 10) == 0
    shown = capsys.readouterr().out
    assert all(f"✓ identity {name}" in shown for name in ("heads", "stream", "locations", "logits", "values"))


def broken(folder: Path, place: Path, kind: str) -> Path:
    """A model folder with one thing wrong."""
    model = place / "broken"
    model.mkdir()
    good = folder / "model"
    config = json.loads((good / "config.json").read_text())
    if kind == "unknown":
        config["model_type"] = "never_heard_of"
    if kind == "encoder":
        config = T5Config(num_layers=1, d_model=8).to_dict() | {"model_type": "t5"}
    if kind == "remote":
        config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (model / "code.py").write_text("open('ran', 'w')")
    (model / "config.json").write_text(json.dumps(config))
    if kind == "pickled":
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    elif kind != "empty":
        (model / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    return model


@pytest.mark.promise("no-code")
@pytest.mark.promise("architecture")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unknown", "never_heard_of"),
        ("encoder", "encoder–decoder"),
        ("remote", "trust_remote_code"),
        ("empty", "no weights"),
        ("pickled", "pickled"),
    ],
)
def test_a_model_that_cannot_be_read(kind, said, folder, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    model = broken(folder, tmp_path, kind)
    arguments = ("audit", model, "--text", folder / "text.txt", "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 1
    refused(capsys, said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--length", "999"), "context"),
        (("--writers", "L9H9"), "L9H9"),
        (("--writers", "nonsense"), "nonsense"),
        (("--text", "missing.txt"), "missing.txt"),
        (("--text", "empty.txt"), "empty"),
        (("--text", "short.txt"), "shorter than one window"),
        (("--dtype", "int3"), "int3"),
        (("--convention", "mine"), "mine"),
        (("--skip", "64"), "skip"),
    ],
)
def test_a_bad_argument(arguments, said, folder, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("short")
    text = () if "--text" in arguments else ("--text", folder / "text.txt")
    length = () if "--length" in arguments else ("--length", 64)
    command = ("scan", folder / "model", *text, *length, "-n", 2, "--out", tmp_path / "out", *arguments)
    assert run(monkeypatch, *command) == 1
    refused(capsys, said)
    assert not (tmp_path / "out").exists()


def refused(capsys: pytest.CaptureFixture[str], said: str) -> None:
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written(folder, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = (
        "scan",
        folder / "model",
        "--text",
        folder / "text.txt",
        "--length",
        64,
        "--out",
        tmp_path / "file" / "out",
    )
    assert run(monkeypatch, *command) == 1
    refused(capsys, "cannot write")


def test_a_result_that_is_none(monkeypatch, capsys, tmp_path) -> None:
    assert run(monkeypatch, "show", tmp_path) == 1
    refused(capsys, "no result")


def test_usage_errors_exit_with_2(folder, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "audit", folder / "model") == 2
    assert run(monkeypatch, "audit", "--text", folder / "text.txt") == 2
    assert run(monkeypatch, "no-such-command") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_with_130(folder, monkeypatch, capsys) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unwrite.methods.scan.stream", interrupt)
    assert run(monkeypatch, "scan", folder / "model", "--text", folder / "text.txt", "--length", 64) == 130


def test_debug_shows_the_traceback(monkeypatch, capsys, tmp_path) -> None:
    assert run(monkeypatch, "--debug", "show", tmp_path) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.promise("hostile")
def test_hostile_names_reach_no_terminal(folder, monkeypatch, capsys, tmp_path) -> None:
    hostile = tmp_path / "a\x1b[2J\u202eb.txt"
    hostile.write_text(TEXT)
    assert run(monkeypatch, "scan", folder / "model", "--text", hostile, "-n", 2, "--length", 64) == 0
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err
    assert "\u202e" not in shown.out + shown.err
    assert "\\x1b[2J" in shown.out


def test_the_module_runs_as_a_program() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "unwrite", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert all(command in shown.stdout for command in ("audit", "scan", "show", "doctor"))


def test_tiny_models_have_no_tokenizer_and_say_so(monkeypatch, capsys, tmp_path, folder) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    assert run(monkeypatch, "scan", tmp_path / "model", "--text", folder / "text.txt") == 1
    refused(capsys, "tokenizer")


def test_the_public_names_are_there() -> None:
    for name in dir(uw):
        assert getattr(uw, name) is not None
    with pytest.raises(AttributeError, match="audit"):
        _ = uw.no_such_name


def test_verify_says_what_survives(folder, monkeypatch, capsys, tmp_path) -> None:
    command = ("verify", folder / "model", "L0H0", "--text", folder / "text.txt", "-n", 3, "--length", 64)
    assert run(monkeypatch, *command, "--out", tmp_path / "run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 documents): undecided. Of the write 0.10" in shown
    assert "L1H0 -0.90 +0.00 -0.90" in shown
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["result.nc", "table.csv"]
    assert run(monkeypatch, "show", tmp_path / "run", "-o", tmp_path / "survival.svg") == 0
    assert "L0H0: undecided" in (tmp_path / "survival.svg").read_text()
    erased = ("--figure", "heatmap", "--of", "erased", "-o", tmp_path / "erased.svg")
    assert run(monkeypatch, "show", tmp_path / "run", *erased) == 0
    assert "erased: verify of" in (tmp_path / "erased.svg").read_text()
    drawn = ("--figure", "fig2", "--writer", "L0H0", "-o", tmp_path / "x.html")
    assert run(monkeypatch, "show", tmp_path / "run", *drawn) == 0
    page = (tmp_path / "x.html").read_text()
    assert "What nodes write along L0H0" in page
    assert not re.search(r"<script[^>]+src=|<link", page)
    for wrong, says in (
        (("--figure", "fig9", "-o", tmp_path / "x.png"), "no such figure"),
        (("--of", "erazed", "--figure", "bars", "-o", tmp_path / "x.png"), "no such variable"),
        (("-o", tmp_path / "x.gif"), "unknown kind of picture"),
        (("--writer", "L1H1", "-o", tmp_path / "x.png"), "nothing of L1H1"),
        (("--figure", "levels", "--writer", "L0H0", "-o", tmp_path / "x.png"), "map of levels is of all writers"),
    ):
        assert run(monkeypatch, "show", tmp_path / "run", *wrong) == 1
        assert says in capsys.readouterr().err
    assert run(monkeypatch, "show", tmp_path / "run", "--figure", "fig2") == 2
    assert {file.name for file in tmp_path.iterdir()} >= {"run", "survival.svg", "x.html"}
    assert not list(tmp_path.glob("x.[pg]*"))


def test_self_repair_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    """Asked about the ends of windows of text; what it keeps is a result with a scatter."""
    command = ("self-repair", folder / "model", "--text", folder / "text.txt", "-n", 4, "--length", 12, "--top", 0.5)
    assert run(monkeypatch, *command, "--out", tmp_path / "run") == 0
    assert "of direct is not missed" in " ".join(capsys.readouterr().out.split())
    assert uw.read(tmp_path / "run").data.attrs["n_prompts"] == 4
    assert run(monkeypatch, "show", tmp_path / "run", "--writer", "L0H0", "-o", tmp_path / "scatter.svg") == 0
    assert "each point a prompt" in (tmp_path / "scatter.svg").read_text()


def test_an_eraser_that_cannot_read_is_refused(folder, monkeypatch, capsys, tmp_path) -> None:
    command = ("verify", folder / "model", "L1H0", "--text", folder / "text.txt", "--length", 64)
    assert run(monkeypatch, *command, "--erasers", "L0H1", "--out", tmp_path / "run") == 1
    refused(capsys, "cannot read L1H0")
    assert not (tmp_path / "run").exists()


def test_channels_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    model, sides = folder / "model", ("--readers", "L1H0", "--sides", "qk", "--offset", 2)
    assert run(monkeypatch, "channels", model, *sides, "--out", tmp_path / "channels") == 0
    assert "→ L1H0." in capsys.readouterr().out
    assert uw.read(tmp_path / "channels").data.attrs["offset"] == 2
    assert run(monkeypatch, "channels", model, "--readers", "MLP0") == 1
    refused(capsys, "heads of attention")


def test_a_state_in_words_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    model, ask = folder / "model", ("--prompt", "A man may")
    into = ("--into", "A x in", "--tokens", 2)
    assert run(monkeypatch, "decode", model, *ask, "--at", "man", *into, "--out", tmp_path / "decode") == 0
    assert "what is said of it" in capsys.readouterr().out
    assert run(monkeypatch, "decode", model, *ask, "--at", "woman", *into) == 1
    refused(capsys, "stands in prompt 0 0 times")
    assert run(monkeypatch, "decode", model, *into) == 2


def test_the_workbench_from_a_shell(folder, monkeypatch, capsys, tmp_path) -> None:
    model, ask = folder / "model", ("--prompt", "A man may")
    assert run(monkeypatch, "lens", model, *ask, "--out", tmp_path / "lens") == 0
    assert "resid_post" in (shown := capsys.readouterr().out)
    assert run(monkeypatch, "show", tmp_path / "lens") == 0
    assert capsys.readouterr().out.strip() in shown
    assert run(monkeypatch, "attention", model, *ask, "--heads", "L0H*", "--weigh", "value") == 0
    assert "L0H1" in capsys.readouterr().out
    (tmp_path / "pairs.csv").write_text("base,source,answer,against\nA man,A can,x,y\nA pen,A ten,x,y\n")
    pairs = ("--pairs", tmp_path / "pairs.csv")
    assert run(monkeypatch, "paths", model, *pairs, "--senders", "L0H*", "--receivers", "L1.q,logits") == 0
    assert "does most" in capsys.readouterr().out
    every = ("--senders", "all", "--receivers", "all")
    assert run(monkeypatch, "paths", model, *pairs, *every, "--method", "eap-ig", "--steps", 2) == 0
    assert "eap-ig, a guess of the direct edge" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, "paths", model, *pairs, "--method", "eap", "--mlps", "recompute") == 1
    refused(capsys, "past all MLPs")
    assert run(monkeypatch, "bound", model, *pairs, "--verified", 1, "-q") == 0
    (tmp_path / "ends.csv").write_text("base,source,answer,against\nA man,A mad,x,y\nA pen,A peg,x,y\n")
    pairs = ("--pairs", tmp_path / "ends.csv")
    made = (*pairs, "--order", "relp,direct", "--nodes", "heads", "--sizes", "2,4", "--draws", 1, "--no-gates")
    for name in "ab":
        assert run(monkeypatch, "circuit", model, *made, "--out", tmp_path / name) == 0
    assert "what is kept of the metric" in capsys.readouterr().out
    assert run(monkeypatch, "show", tmp_path / "a", "-o", tmp_path / "curve.svg") == 0
    assert run(monkeypatch, "circuit", model, *pairs, "--order", "=L0H1,L9H0") == 1
    refused(capsys, "L9H0")
    assert run(monkeypatch, "circuit", model, *pairs, "--sizes", "some") == 2
    assert run(monkeypatch, "effects", model, *pairs, "--methods", "relp", "--out", tmp_path / "effects") == 0
    capsys.readouterr()
    assert run(monkeypatch, "overlap", tmp_path / "effects", tmp_path / "effects", "--top", "0.1,0.2") == 0
    assert "Jaccard 1.00" in capsys.readouterr().out
    assert run(monkeypatch, "overlap", tmp_path / "effects", tmp_path / "a") == 1
    refused(capsys, "no number that says how much a node helps")
    assert run(monkeypatch, "diff", model, model, *pairs, "--out", tmp_path / "diff") == 0
    assert "L0H0" in capsys.readouterr().out
    assert run(monkeypatch, "diff", tmp_path / "lens", tmp_path / "lens") == 0
    assert run(monkeypatch, "diff", tmp_path / "lens", tmp_path / "diff") == 1
    refused(capsys, "two methods")


def test_a_circuit_of_a_task_from_a_shell(monkeypatch, capsys, tmp_path) -> None:
    """Of the bundled model; its pairs judge, others rank."""
    task = ("--task", "ioi", "-n", 2, "--rank", 2, "--nodes", "heads", "--sizes", 4, "--draws", 1, "--no-gates")
    assert run(monkeypatch, "circuit", "default", *task, "--out", tmp_path / "ioi") == 0
    assert "what is kept of the metric" in capsys.readouterr().out
    judged = uw.read(tmp_path / "ioi")
    assert judged["faithfulness"].sel(order="relp", size=[0, 32]).values == pytest.approx(np.array([[0, 1]] * 2))


def test_a_circuit_of_edges_from_a_shell(monkeypatch, capsys, tmp_path) -> None:
    """Orders of all edges make one of edges; beside one of nodes, or with nodes named, one of nodes."""
    task = ("--task", "ioi", "-n", 2, "--rank", 2, "--sizes", 8, "--draws", 1, "--by", "absolute")
    assert run(monkeypatch, "circuit", "default", *task, "--order", "eap,eap-ig", "--out", tmp_path / "edges") == 0
    assert "edges enough" in capsys.readouterr().out
    found = uw.read(tmp_path / "edges")
    assert [*found["order"].values] == ["eap", "eap-ig"]
    assert found["rank"].dims[-2:] == ("sender", "receiver")
    assert found["faithfulness"].isel(size=[0, -1]).values == pytest.approx(np.array([[[0, 1]]] * 2))
    for name, asked in {"mixed": ("--order", "relp,eap"), "named": ("--order", "eap", "--nodes", "heads")}.items():
        assert run(monkeypatch, "circuit", "default", *task, *asked, "--no-gates", "--out", tmp_path / name) == 0
        assert uw.read(tmp_path / name)["rank"].dims[-1] == "node"
    capsys.readouterr()
    for wrong in (("--order", "relp", "--nodes", "edges"), ("--order", "eap", "--given", "MLP0")):
        assert run(monkeypatch, "circuit", "default", *task, *wrong) == 1
    refused(capsys, "kept by their order")


def test_a_result_opens_in_the_browser(folder, monkeypatch, tmp_path) -> None:
    seen: list[str] = []
    monkeypatch.setattr("typer.launch", lambda address: seen.append(address) or 0)
    scan = ("scan", folder / "model", "--text", folder / "text.txt", "-n", 2, "--length", 32, "-q", "--out", tmp_path)
    assert run(monkeypatch, *scan) == 0
    assert run(monkeypatch, "show", tmp_path, "--open") == 0
    assert run(monkeypatch, "show", tmp_path, "--open", "--figure", "levels", "-o", tmp_path / "levels.svg") == 0
    assert [Path(address).name for address in seen] == ["report.html", "levels.svg"]
    assert all(Path(address).exists() for address in seen)
