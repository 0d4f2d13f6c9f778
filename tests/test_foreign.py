"""Does everything public refuse what it cannot use, in words, whatever comes in the place of each argument?"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from types import FunctionType
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import foreign
import unwrite as uw
from executed import weights
from methods import IDS, chatting, few_draws, shape
from seeing import around, inputs
from test_several import saved
from unwrite.errors import UnwriteError, plain


@cache
def lm(method: str = "") -> Any:
    """Small, with a tokenizer that knows bytes."""
    settings = {**shape(method), "vocab_size": 256, "tie_word_embeddings": False}
    return uw.load(weights("gpt2", 4, **settings), uw.planted().tokenizer)


@cache
def seeing() -> Any:
    return uw.load(around("llama")[0])


@cache
def pairs() -> uw.Pairs:
    return uw.pairs(IDS[:2], IDS[2:], 5, 9)


@cache
def found(name: str) -> uw.Result:
    """A result, to be handed to what takes one."""
    return uw.scan(lm(), IDS) if name == "scan" else uw.effects(lm(), pairs(), ["L0H0", "L1H1"], "all", name)


def windows() -> uw.Tokens:
    return uw.text("nonsense " * 20, lm().tokenizer, length=8)


@cache
def autoencoder() -> Path:
    saved(folder := Path(mkdtemp()) / "sae", "standard", 4, 4)
    return folder


def painted() -> Any:
    """A pipeline that makes images, where diffusers is installed."""
    return None if find_spec("diffusers") is None else importlib.import_module("painting").pipeline("sd3")


def traced(lm: Any, *sites: object, edits: Any = (), every_pass: Any = False) -> Any:
    """A trace is a `with`."""
    with uw.trace(lm, *sites, edits=edits, every_pass=every_pass) as trace, torch.no_grad():
        lm.hf(IDS)
    return trace


def changed(lm: Any, changes: Any) -> None:
    """Weights that are others in a `with`."""
    with uw.rewritten(lm, changes):
        pass


@dataclass(frozen=True)
class Call:
    """One public thing with arguments on which it works; of what it `takes` beside these, names in `foreign`."""

    of: Callable[..., Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=dict)
    # What takes long is not asked for what it can do.
    long: bool = False

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        found = inspect.signature(self.of).parameters
        return {name: one for name, one in found.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}

    def __call__(self, **other: Any) -> Any:
        given = {**self.given, **other}
        several = [name for name, one in self.parameters.items() if one.kind is one.VAR_POSITIONAL]
        first = list(self.parameters)[: list(self.parameters).index(several[0])] if several else []
        places = [given.pop(name) for name in (*first, *several) if name in given]
        return self.of(*places, **given)

    def legal(self, parameter: str) -> set[str]:
        """Names of what need not be refused there."""
        return set(self.takes.get(parameter, TAKES.get(parameter, "")).split())


_PLACES, _COUNTS = "blank nonsense three str_subclass file no_such_path folder", "3 np.int64"
_NUMBERS = "3 0 -1 2**70 0.5 3.0 np.int64 np.float32"
_NONE_OF_ANY = "[] () set() empty_array"
_ROLES = "None {} mapping_proxy Dataset BatchEncoding_of_nothing"
_VALUES = f"{_NUMBERS} float_tensor nan_tensor tensor_with_a_gradient tensor_without_axes"
_CALLED = "lambda class module raising HF_model tokenizer"
_IDS = "BatchEncoding Tokens"
_STRINGS = "nothing blank nonsense a_NUL three half_a_character str_subclass long_string a_long_name"
# A number is a token's id, a string of one byte is a token of the bytes that the model reads.
_TOKENS = "3 0 np.int64 blank three tensor_without_axes"
# What is read of one token or a row of them, too.
_READ = "three DataFrame"
# What a parameter of this name takes of all the foreign things, wherever it is.
TAKES = {
    "lm": "Model", "tokens": f"{_IDS} a_NUL nonsense str_subclass", "prompts": f"{_IDS} a_NUL nonsense str_subclass",
    "texts": f"None {_IDS} nonsense str_subclass",
    "held_out": f"None {_IDS} a_NUL nonsense str_subclass", "pairs": "Pairs", "writers": "None", "erasers": "None",
    "mask": "None", "bos": "None 3 0 np.int64 False", "batch": f"None {_COUNTS}", "skip": f"0 {_COUNTS}", "floor": "0",
    "checkpoint": f"None Job {_PLACES}", "listener": "None lambda", "answer": _TOKENS, "against": f"None {_TOKENS}",
    "position": f"-1 0 {_COUNTS} range tensor_without_axes", "tokenizer": "None tokenizer", "n": f"0 {_COUNTS}",
    "length": f"None {_COUNTS}", "k": _COUNTS, "steps": _COUNTS, "seed": f"0 {_COUNTS}", "most": _COUNTS,
    "verified": f"0 {_COUNTS}", "subsets": "", "p": "0.5 np.float32", "alpha": "0.5 np.float32",
    "method": "Rules", "source": "Model", "guess": "Result_of_effects", "edits": "[] () set() empty_array Edit",
    "path": _PLACES, "name": "None", "writer": "None", "context": "None", "vocabulary": "",
    "value": f"{_VALUES} {_CALLED}", "factor": _NUMBERS, "basis": "float_tensor", "out": f"None {_PLACES}",
    "dtype": "None dtype", "every_pass": "True False",
    "total": "True False", "roles": _ROLES, "source_roles": _ROLES, "template": "None", "choices": "None",
}  # fmt: skip
# What listens is asked nothing but to listen: what it raises itself is its own, and ends the run.
HEARD = {"class", "module", "raising", "HF_model", "tokenizer"}


@cache
def calls() -> dict[str, Call]:
    text, asked, tokenizer = {"lm": lm(), "tokens": IDS}, {"lm": lm(), "pairs": pairs()}, lm().tokenizer
    ends = {"base": IDS[:2], "source": IDS[2:], "answer": 5, "against": 9, "tokenizer": tokenizer}
    tokens, held = windows(), {name: getattr(pairs(), name) for name in ("base", "source", "answer", "against", "row")}
    ids = {"ids": np.ones((2, 3), int), "lengths": np.full(2, 3), "cluster": np.arange(2)}
    loaded = dict.fromkeys(("revision", "device", "device_map"), "None") | {"source": "HF_model"}
    edit = {"source": f"None {_VALUES} {_CALLED}", "gain": _VALUES, "alpha": _NUMBERS, "beta": _NUMBERS}
    rows = {"at": "None 3 0 -1 2**70 10**5000 np.int64 range slice bool_tensor", "basis": "None float_tensor"}
    # What gathers is a peer, and a tensor does; a job of no shards has none.
    job = {"folder": f"None {_PLACES}", "every": f"{_NUMBERS} 10**5000 inf", "of": "[] () {} set() empty_array"}
    peers = "None float_tensor nan_tensor meta_tensor complex_tensor bool_tensor tensor_with_a_gradient sparse_tensor"
    named = {"source": _STRINGS, "digest": _STRINGS, "notes": "()", "images": "None"}
    return {
        "load": Call(uw.load, {"source": lm().hf}, {**loaded, "trust_remote_code": "True False", "dtype": "None"}),
        "planted": Call(uw.planted, {}, {"dtype": "dtype", "massive": "0 0.5 np.float32", "also": _NONE_OF_ANY}),
        "text": Call(
            uw.text, {"source": "nonsense " * 20, "tokenizer": tokenizer, "length": 8},
            {"source": "nonsense str_subclass long_string a_long_name", "tokenizer": "tokenizer",
             "checkpoint": "None Job lying"},
        ),
        "images": Call(uw.images, {"lm": seeing(), "inputs": inputs("llama")}),
        "pairs": Call(uw.pairs, ends, {"source": "", "bos": "None"}),
        "read": Call(uw.read, {"path": "saved"}, {"path": ""}),
        "scan": Call(uw.scan, {**text, "writers": ["L0H0"]}, {"tokens": f"{TAKES['tokens']} Dataset"}),
        "verify": Call(uw.verify, {**text, "writer": "L0H0", "erasers": ["L1H0"]}, {"writer": ""}, long=True),
        "survival": Call(
            uw.survival, {**text, "writers": ["L0H0"], "decoys": 1, "budget": None},
            {"decoys": f"None {_COUNTS}", "budget": "None 3 2**70 0.5 3.0 np.int64 np.float32 three"}, long=True
        ),
        "dla": Call(uw.dla, {"lm": lm(), "prompts": IDS[:2], "answer": 5, "against": 9, "texts": IDS[2:]}, long=True),
        "adversarial": Call(uw.adversarial, {**text, "writer": "L0H0"}, {"writer": ""}, long=True),
        "corpus_dla": Call(
            uw.corpus_dla, {**text, "writer": "L0H0", "erasers": ["L1H0"]}, {"writer": "", "erasers": ""}
        ),
        "lens": Call(
            uw.lens, {"lm": lm(), "prompts": IDS[:2]},
            {"prompts": f"{TAKES['prompts']} {_READ}", "answer": f"None {_TOKENS}", "top": _COUNTS}, long=True,
        ),
        "decode": Call(
            uw.decode,
            {"lm": lm(), "prompts": IDS[:2], "at": 2, "into": IDS[:1], "placeholder": int(IDS[0, 3]), "tokens": 1},
            {"prompts": f"{TAKES['prompts']} {_READ} Pairs", "into": f"{TAKES['prompts']} three", "place": "",
             "placeholder": "", "at": f"0 -1 {_COUNTS} range tensor_without_axes", "locations": "None",
             "tokens": _COUNTS, "answer": f"None {_TOKENS} nonsense a_NUL a_long_name long_string str_subclass",
             "rescale": "True False",
             "source": "None Model", "fit": "None"}, long=True,
        ),
        "attention": Call(
            uw.attention, {"lm": lm(), "prompts": IDS[:2], "heads": ["L0H0"]},
            {"prompts": f"{TAKES['prompts']} {_READ}", "heads": "None"}, long=True,
        ),
        "activations": Call(
            uw.activations, {"lm": lm(), "tokens": IDS[:2], "sites": ["L0H0"]},
            {"tokens": f"{TAKES['prompts']} {_READ}", "out": f"None Job lying {_PLACES}"}, long=True,
        ),
        "channels": Call(
            uw.channels, {"lm": lm(), "writers": ["L0H0"], "readers": ["L1H0"], "sides": "v"},
            {"writers": "", "offset": f"0 {_COUNTS}", "executed": "None"},
        ),
        "effects": Call(uw.effects, {**asked, "nodes": ["L0H0"], "at": "all"}),
        "solves": Call(uw.solves, asked),
        "mask": Call(
            uw.mask, {**asked, "nodes": ["L0H0"], "at": "last", "held": "pair", "steps": 1, "draws": 1, "seeds": 1},
            {"keep": "None Pairs", "penalty": "3 2**70 0.5 3.0 np.int64 np.float32", "held": "Pairs", "seeds": _COUNTS,
             "draws": _COUNTS, "lr": "0.5 np.float32"}, long=True,
        ),
        "subspace": Call(
            uw.subspace, {**asked, "site": "resid_post0", "held": "pair", "steps": 1, "draws": 1, "seeds": 1},
            {"held": "Pairs", "classes": "None generator range", "readers": "None", "method": "",
             "lr": "0.5 np.float32", "site": "", "restrict": "True False", "controls": _NONE_OF_ANY,
             **dict.fromkeys(("k", "seeds", "draws"), _COUNTS)}, long=True,
        ),
        "circuit": Call(
            uw.circuit, {**asked, "order": ["L0H0"], "draws": 1},
            {"order": "Result_of_effects", "sizes": "None range", "given": _NONE_OF_ANY,
             "replace": "Model", "roles": "None",
             "draws": f"0 {_COUNTS}", "nodes": "None", "enough": "0.5 np.float32", "choose": "None",
             "gates": "None True False"}, long=True,
        ),
        "Circuit": Call(
            uw.Circuit, {"nodes": ("L0H0",)},
            {**dict.fromkeys(("nodes", "roles", "looks"), _NONE_OF_ANY), "scores": f"{_NONE_OF_ANY} [nan]",
             "of": f"0 {_COUNTS}", **dict.fromkeys(("model", "weights"), _STRINGS)},
        ),
        "Circuit.looking": Call(
            uw.Circuit(("L0H0",)).looking,
            {"attention": uw.attention(lm(), IDS[:1], heads=["L0H0"]), "roles": {"end": [-1]}}, {"roles": ""},
        ),
        "Circuit.save": Call(uw.Circuit(("L0H0",)).save, {"path": "saved"}),
        "overlap": Call(
            uw.overlap, {"a": found("atp"), "b": found("exact"), "top": 0.5},
            {**dict.fromkeys("ab", "Result_of_effects"), "top": "0.5 np.float32", "seed": f"0 2**70 {_COUNTS}"},
        ),
        "beside": Call(
            uw.beside, {"circuit": uw.Circuit(("L0H0",)), "dla": uw.dla(lm(), IDS[:2], 5, 9)},
            {"survival": "None", "effects": "None", "attention": "None", "pairs": "None"},
        ),
        "self_repair": Call(
            uw.self_repair, {"found": uw.dla(lm(), IDS, 5, 9, at="position"), "top": 0.5},
            {"found": "Result_of_effects", "top": "0.5 np.float32"},
        ),
        "paths": Call(uw.paths, {**asked, "senders": ["L0H0"]}, {"mlps": "None"}),
        "bound": Call(
            uw.bound, {**asked, "guess": found("atp"), "verified": 0, "subsets": 8, "p": 0.5},
            {"metric": "None", "source": "None"}, long=True,
        ),
        "compare": Call(uw.compare, {**asked, "nodes": ["L0H0"], "methods": ("atp", "exact")}, long=True),
        "agree": Call(uw.agree, {"guess": found("atp"), "exact": found("exact")}),
        "diff": Call(
            uw.diff, {"a": found("atp"), "b": found("exact")},
            {**dict.fromkeys("ab", "Result_of_effects"), **dict.fromkeys(("tokens", "pairs", "bos", "batch"), "None")},
        ),
        "readers": Call(
            uw.readers, {"lm": lm(), "prompts": IDS[:2], "writer": "L0H0"},
            {"prompts": f"{TAKES['prompts']} {_READ} Pairs", "metric": "None"}, long=True,
        ),
        "graph": Call(
            uw.graph, {"lm": chatting(lm("graph")), "claims": "Ships float.", "locations": "resid_post0", "tokens": 1},
            {"claims": f"{_STRINGS} a_NUL", "labels": "None", "locations": "None", "place": "", "rescale": "True False",
             "tokens": _COUNTS, "tagger": "None"}, long=True,
        ),
        "localise": Call(
            uw.localise,
            {"pipe": painted(), "prompts": ['a "stop"'], "targets": ['a "taxi"'], "layers": [0],
             "call": {"num_inference_steps": 1, "height": 16, "width": 16}},
            {"prompts": "nonsense three str_subclass a_NUL long_string a_long_name",
             "targets": "nonsense three str_subclass a_NUL long_string a_long_name", "layers": "None 0 range",
             "start": "0", "read": f"None {_CALLED}", "score": "None {} mapping_proxy BatchEncoding_of_nothing",
             "put": "None", "call": "None {} mapping_proxy", "seed": f"0 {_COUNTS}", "pictures": f"0 {_COUNTS}"},
            long=True,
        ),
        "audit": Call(uw.audit, {**text, "most": 1}, {"prompts": f"None {TAKES['prompts']}"}, long=True),
        "reproduce": Call(
            uw.reproduce, {"weights": lm("reproduce"), "tokens": IDS},
            {"name": "", "weights": "None Model HF_model", "tokens": f"None {_STRINGS} {TAKES['tokens']} {_PLACES}"},
            long=True,
        ),
        "doctor": Call(uw.doctor, {"lm": lm(), "n": 2, "length": 4}, {"n": _COUNTS, "writers": "None 3 np.int64"}),
        "trace": Call(traced, {"lm": lm(), "sites": "L0H0"}),
        "rewritten": Call(changed, {"lm": lm(), "changes": uw.Edit.scale("L0H0.z", 0.0)}),
        "sae": Call(uw.sae, {"path": autoencoder()}, {"path": ""}),
        "trace[]": Call(traced(lm(), "L0H0").__getitem__, {"name": "L0H0"}, {"name": ""}),
        "Edit": Call(uw.Edit, {"site": "L0H0", "source": 0.0}, edit | rows),
        "Edit.set": Call(uw.Edit.set, {"site": "L0H0", "value": 0.0}),
        "Edit.mean": Call(uw.Edit.mean, {"site": "L0H0"}, {"values": "None"}),
        "Edit.add": Call(uw.Edit.add, {"site": "L0H0", "value": 0.0}),
        "Edit.scale": Call(uw.Edit.scale, {"site": "L0H0", "factor": 0.0}),
        "Edit.project_out": Call(uw.Edit.project_out, {"site": "L0H0", "basis": torch.ones(16)}),
        "Edit.channel": Call(
            uw.Edit.channel, {"found": uw.channels(lm(), "L0H0", "L1H0", "v"), "writer": "L0H0", "channels": 0},
            {"writer": "", "channels": f"0 {_COUNTS} range"},
        ),
        "Job": Call(uw.Job, {}, {**job, "peers": f"{peers} tensor_without_axes lying Job"}),
        "Rules": Call(uw.Rules),
        "Result": Call(uw.Result, {"data": found("scan").data}),
        "Result[]": Call(found("scan").__getitem__, {"name": "share"}, {"name": ""}),
        "Result.figure": Call(found("scan").figure, {}, {"of": "None"}),
        "Result.grid": Call(found("scan").grid, {"name": "moved"}, {"name": ""}),
        "Result.save": Call(found("scan").save, {"path": "saved"}),
        "Result.save_table": Call(found("scan").save_table, {"path": "table.csv"}),
        "Tokens": Call(uw.Tokens, ids, named),
        "Tokens.named": Call(tokens.named, {"source": "mine"}, {"source": _STRINGS}),
        "Tokens.take": Call(tokens.take, {"prompts": [0]}, {"prompts": "range", "name": f"None {_STRINGS}"}),
        "Tokens.spread": Call(tokens.spread, {"n": 2}, {"n": _COUNTS}),
        "Tokens.check": Call(tokens.check, {"vocabulary": 256, "context": None}),
        "Pairs": Call(uw.Pairs, held, {"answer": "", "against": "None", "source": ""}),
        "Pairs.check": Call(pairs().check, {"vocabulary": 256, "context": None}),
        "Pairs.rows": Call(pairs().rows, {"at": "end"}),
        "Pairs.take": Call(pairs().take, {"pairs": [0]}, {"pairs": "range"}),
        "Pairs.split": Call(
            pairs().split, {"by": "pair"}, {"share": "0.5 np.float32"},
        ),
        "Pairs.words": Call(pairs().words, {"tokenizer": tokenizer}),
        "Pairs.each": Call(pairs().each, {"tokenizer": tokenizer}),
    }  # fmt: skip


NAMES = (
    "load", "planted", "text", "images", "pairs", "read", "scan", "verify", "survival", "dla", "adversarial",
    "corpus_dla", "lens", "decode", "attention", "activations", "channels", "effects", "solves", "mask", "subspace",
    "circuit", "Circuit",
    "Circuit.looking", "Circuit.save", "overlap", "beside", "self_repair", "paths", "bound", "compare",
    "agree", "diff", "readers", "graph", "localise", "audit", "reproduce", "doctor", "trace", "rewritten", "sae",
    "trace[]", "Edit",
    "Edit.set", "Edit.mean", "Edit.add", "Edit.scale", "Edit.project_out", "Edit.channel", "Job", "Rules", "Result",
    "Result[]", "Result.figure", "Result.grid",
    "Result.save", "Result.save_table", "Tokens", "Tokens.named", "Tokens.take", "Tokens.spread", "Tokens.check",
    "Pairs", "Pairs.check", "Pairs.rows", "Pairs.take", "Pairs.split", "Pairs.words", "Pairs.each",
)  # fmt: skip
# What the methods of the library ask of a job; people hand it over.
NOT_ASKED = {
    f"Job.{name}"
    for name in (
        *("asked", "begin", "gather", "goes_on", "heard", "mark"),
        *("signed", "stage", "tick", "together", "unbroken"),
    )
}


def table(folder: Path) -> dict[str, Callable[[], Any]]:
    """All foreign things, with those of this library and of transformers, each in a place where it does not belong."""
    ours: dict[str, Callable[[], Any]] = {
        "HF_model": lambda: lm().hf,
        "Model": lm,
        "tokenizer": lambda: lm().tokenizer,
        "Tokens": windows,
        "Pairs": pairs,
        "Result": lambda: found("scan"),
        "Result_of_effects": lambda: found("relp"),
        "Job": uw.Job,
        "folder": lambda: folder,
        "file": lambda: folder / "odd.bin",
    }
    return {**foreign.THINGS, **ours}


# What no message quotes: a traceback, another library's class of errors, where in memory something is, an array.
QUOTED = re.compile(
    r"Traceback|\b[A-Z]\w*(?:Error|Exception|Violation|Warning)\b|\b0x[0-9a-f]{4,}|\b(?:tensor|array)\(|"
    r"<\w[\w.]* object|<(?:class|function|generator|bound method) "
)


def wrong(message: str) -> str | None:
    """What is wrong with what an error says."""
    if not any(part in message for part in (" Got: ", " Expected: ", " Next: ")):
        return "says only what happened"
    if plain(message) != message or len(message) > 1200:
        return "no short plain line"
    quoted = QUOTED.search(message)
    return f"quotes {quoted[0]!r}" if quoted else None


def fresh(folder: Path) -> Path:
    """An empty folder, but for a file that is no text."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "odd.bin").write_bytes(b"\xff\xfe\x00")
    return folder


def faults(name: str, call: Call, folder: Path) -> Iterator[str]:
    """What does not end as it should, of every argument and everything foreign."""
    for parameter in call.parameters:
        legal = call.legal(parameter)
        for kind, make in table(folder).items():
            if call.long and kind in legal:
                continue
            said = fault(call, parameter, make(), kind in legal)
            if said and not (parameter == "listener" and kind in HEARD):
                yield f"{name}({parameter}={kind}): {said}"
            if {file.name for file in folder.iterdir()} != {"odd.bin"}:
                if said is None and kind not in legal:
                    yield f"{name}({parameter}={kind}): refused, and left {[*map(str, folder.iterdir())]}"
                fresh(folder)


def fault(call: Call, parameter: str, value: Any, legal: bool) -> str | None:
    try:
        call(**{parameter: value})
    except UnwriteError as error:
        bad = wrong(str(error))
        return None if bad is None else f"{bad}: {error}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if legal else "was taken"


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with few_draws():
        yield


@pytest.mark.promise("errors")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of what strange things do when they are looked at
def test_what_is_foreign_is_refused_in_words(name: str, tmp_path: Path) -> None:
    if name == "localise":
        pytest.importorskip("diffusers", reason="needs unwrite[diffusion]")
    folder = fresh(tmp_path / "here")
    with chdir(folder):
        if name == "read":
            found("scan").save("saved")
        if not calls()[name].long:
            calls()[name]()
        fresh(folder)
        assert not [*faults(name, calls()[name], folder)]


def test_everything_public_is_asked() -> None:
    assert tuple(calls()) == NAMES
    for name in dir(uw):
        public = getattr(uw, name)
        if inspect.ismodule(public):
            continue
        assert name in NAMES, f"{name} is public: give it a line in calls()"
        own = vars(public) if inspect.isclass(public) else {}
        for member, method in own.items():
            asks = isinstance(method, (classmethod, FunctionType)) and not member.startswith("_")
            if asks and list(inspect.signature(getattr(public, member)).parameters) != ["self"]:
                assert f"{name}.{member}" in {*NAMES, *NOT_ASKED}, f"{name}.{member} is public"


def test_what_takes_long_works_on_what_it_was_given() -> None:
    """The others are called by the test above."""
    for name, call in calls().items():
        if call.long and name not in ("audit", "reproduce", *["localise"][: painted() is None]):
            call()
