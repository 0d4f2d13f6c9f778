"""Is a data set read as it stands, only as far as needed, never held, and continued to the same bits?"""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import unwrite as uw
from test_cli import run
from test_resume import kills
from test_tokens import BOS, IDS, build
from unwrite.errors import ResultError, TokensError
from unwrite.model.planted import planted
from unwrite.prompts import dataset as reading
from unwrite.prompts.dataset import Named, Reading, source_of
from unwrite.prompts.tokens import Tokens
from unwrite.run.tally import gram

datasets = pytest.importorskip("datasets", reason="wants the library datasets, an optional extra")

DRAW = random.Random(0)
DOCUMENTS = ["".join(DRAW.choices("abcdef ", k=DRAW.choice([0, 3, 11, 12, 30, 47]))) for _ in range(60)]
LENGTH = 12  # one of them is BOS


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build()


def slow_cut(documents: list[str], n: int) -> tuple[list[list[int]], list[int], int]:
    """The first n windows of all documents, the documents that they are of, and how many must be read for them."""
    rows, owner, read = [], [], 0
    for i, document in enumerate(documents):
        if len(rows) == n:
            break
        read += 1
        ids = [IDS[letter] for letter in document]
        while len(ids) >= LENGTH - 1 and len(rows) < n:
            rows.append([BOS, *ids[: LENGTH - 1]])
            owner.append(i)
            ids = ids[LENGTH - 1 :]
    return rows, owner, read


def listed(documents: list[str]) -> Any:
    """A data set in memory."""
    return datasets.Dataset.from_dict({"text": documents})


def generated(documents: list[Any], pulled: list[int] | None = None, column: str = "text") -> Any:
    """A stream of which nothing is known, and that says how far it was pulled."""

    def make() -> Iterator[dict[str, Any]]:
        for i, document in enumerate(documents):
            if pulled is not None:
                pulled.append(i)
            yield {column: document}

    return datasets.IterableDataset.from_generator(make)


def parquet(folder: Path) -> Any:
    """A stream of two files."""
    if not (folder / "0.parquet").exists():
        for i in range(2):
            part = datasets.Dataset.from_dict({"text": DOCUMENTS[30 * i : 30 * i + 30], "number": range(30)})
            part.to_parquet(folder / f"{i}.parquet")
    files = [str(folder / f"{i}.parquet") for i in range(2)]
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder))


def lines(folder: Path) -> Any:
    """A stream of the lines of a file."""
    (folder / "lines.txt").write_text("\n".join(DOCUMENTS))
    files = str(folder / "lines.txt")
    return datasets.load_dataset("text", data_files=files, split="train", streaming=True, cache_dir=str(folder))


SOURCES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda _: listed(DOCUMENTS),
    "stream": lambda _: listed(DOCUMENTS).to_iterable_dataset(num_shards=2),
    "generated": lambda _: generated(DOCUMENTS),
    "parquet": parquet,
    "lines": lines,
    "mapped": lambda _: listed([text + "!" for text in DOCUMENTS]).to_iterable_dataset(3).map(
        lambda row: {"text": row["text"][:-1]}
    ),
    "shuffled": lambda _: listed(list(reversed(DOCUMENTS))).to_iterable_dataset().shuffle(seed=1, buffer_size=7),
}  # fmt: skip


@pytest.fixture(params=list(SOURCES))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Any], list[str]]:
    """How a data set is opened, each time anew, and its documents."""
    made = SOURCES[request.param]
    return lambda: made(tmp_path), [row["text"] for row in made(tmp_path)]


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """From here on reading ends in the middle of a document, when so many were counted."""
    real = Reading.step

    def step(self: Reading, document: Any) -> None:
        if self.at.read == after:
            self.rows.append(np.zeros(LENGTH, np.int32))  # half of its work
            raise error
        real(self, document)

    monkeypatch.setattr(Reading, "step", step)


def read(place: Path, source: Any, tokenizer: Any, n: int = 40, **settings: Any) -> Any:
    """The tokens, with what is kept in a folder until they are there."""
    with uw.Job(place) as job:
        return uw.text(source, tokenizer, **{"n": n, "length": LENGTH, **settings}, checkpoint=job)


def stopped(place: Path, source: Any, tokenizer: Any, after: int, monkeypatch: pytest.MonkeyPatch, n: int = 40) -> None:
    """Reading that ends in the middle of a document, when `after` were counted, or after all."""

    def attempt() -> None:
        with uw.Job(place) as job:
            uw.text(source, tokenizer, n=n, length=LENGTH, checkpoint=job)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupted(patch, after)
        with pytest.raises(KeyboardInterrupt):
            attempt()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The documents that are pulled from here on."""
    pulled, real = [], reading._documents

    def documents(*arguments: Any) -> Iterator[Any]:
        for document in real(*arguments):
            pulled.append(document)
            yield document

    monkeypatch.setattr(reading, "_documents", documents)
    return pulled


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_windows_are_those_of_a_slow_cut(opened, n, tokenizer) -> None:
    opens, documents = opened
    rows, owner, read = slow_cut(documents, n)
    tokens = uw.text(opens(), tokenizer, n=n, length=LENGTH)
    assert tokens.ids.tolist() == rows
    assert tokens.cluster.tolist() == (owner if read > 1 else list(range(len(rows))))
    assert f"{read} document{'s' * (read != 1)} read in order" in tokens.notes[0]


@given(documents=st.lists(st.text("abc", max_size=40), min_size=1, max_size=9), n=st.integers(1, 9))
def test_any_documents(documents: list[str], n: int) -> None:
    rows, _, read = slow_cut(documents, n)
    source = listed(documents)
    if not rows:
        with pytest.raises(TokensError, match="no document as long as one window"):
            uw.text(source, build(), n=n, length=LENGTH)
        return
    tokens = uw.text(source, build(), n=n, length=LENGTH)
    assert tokens.ids.tolist() == rows
    short = sum(len(text) < LENGTH - 1 for text in documents[:read])
    assert (
        tokens.notes[0]
        == f"{read} document{'s' * (read != 1)} read in order, {short} of them shorter than a window of 12 tokens"
    )


def test_only_what_is_needed_is_pulled_of_a_million(tokenizer) -> None:
    pulled: list[int] = []

    def make() -> Iterator[dict[str, str]]:
        for i in range(10**6):
            pulled.append(i)
            yield {"text": "abcabcabcabc"}

    assert len(uw.text(datasets.IterableDataset.from_generator(make), tokenizer, n=3, length=LENGTH)) == 3
    assert len(pulled) <= 4


def test_memory_does_not_grow_with_the_data_set(tokenizer) -> None:
    def peak(documents: int) -> int:
        def make() -> Iterator[dict[str, str]]:
            yield {"text": "a" * LENGTH}
            for i in range(documents):
                yield {"text": f"{i} " + "b" * (LENGTH - 10) + " " * 4000}

        def short(text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3] * (LENGTH if text.startswith("a") else 1)}

        source = datasets.IterableDataset.from_generator(make)
        held = Reading(reading.Given(source), lambda text: [short(text)["input_ids"]][: text.startswith("a")], 2)
        tracemalloc.start()
        reading.fill(held, None, {})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held.at.read == documents + 1
        return most

    peak(1)
    assert peak(4000) < peak(40) + 1_000_000  # of 16 MB that are read


def test_a_data_set_is_not_changed_by_being_read(opened, tokenizer, tmp_path, monkeypatch) -> None:
    opens, documents = opened
    data = opens()
    stopped(tmp_path / "run", data, tokenizer, 9, monkeypatch)
    read(tmp_path / "run", data, tokenizer)
    assert [row["text"] for row in data] == documents


def test_splits_are_texts_by_name(tokenizer) -> None:
    splits = datasets.DatasetDict({"train": listed(DOCUMENTS[:30]), "test": listed(DOCUMENTS[30:])})
    tokens = uw.text(splits, tokenizer, n=5, length=LENGTH)
    assert list(tokens) == ["train", "test"]
    assert tokens["test"].ids.tolist() == slow_cut(DOCUMENTS[30:], 5)[0]


@pytest.mark.parametrize(("documents", "words"), [([], "is empty"), (["", None, "abc"], "no document as long as one")])
def test_nothing_to_read_is_an_error(documents, words, tokenizer) -> None:
    with pytest.raises(TokensError, match=words):
        uw.text(generated(documents), tokenizer, length=LENGTH)


@pytest.mark.parametrize(("value", "words"), [(["abc"], "Got: list"), ("\ud800" * 20, "is not Unicode text")])
def test_what_is_no_text_is_an_error(value, words, tokenizer) -> None:
    with pytest.raises(TokensError, match=words):
        uw.text(generated(["abc" * 9, value]), tokenizer, length=LENGTH)


def test_rows_without_columns_are_an_error(tokenizer) -> None:
    with pytest.raises(TokensError, match=r"no rows with columns.*with_format"):
        uw.text(listed(DOCUMENTS).with_format("arrow"), tokenizer, length=LENGTH)


# --- columns and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("columns", "chosen"),
    [(["text", "other"], "text"), (["other"], "other"), (["a", "b"], None), ([], None)],
)
def test_the_column_is_text_or_the_only_one_of_strings(stream, columns, chosen, tokenizer) -> None:
    rows = {name: [name[0] * 40] for name in columns} | {"number": [7]}
    source = generated([]) if stream else datasets.Dataset.from_dict(rows)
    if stream:
        source = datasets.IterableDataset.from_generator(lambda: iter([{name: part[0] for name, part in rows.items()}]))
    if chosen is None:
        with pytest.raises(TokensError, match=r"which column .*'number'.*Expected: 'text', or a single column"):
            uw.text(source, tokenizer, length=LENGTH)
    else:
        tokens = uw.text(source, tokenizer, length=LENGTH)
        assert set(tokens.ids[:, 1:].ravel()) == {IDS[chosen[0]]}
        assert f"column {chosen}" in tokens.notes


def test_strangers_names_cannot_write_to_a_terminal(tokenizer) -> None:
    evil = "\x1b[2J\u202e" + "x" * 500
    source = datasets.Dataset.from_dict({evil: ["a"], "b": ["c"], **{f"c{i}": ["d"] for i in range(50)}})
    with pytest.raises(TokensError) as found:
        uw.text(source, tokenizer)
    assert str(found.value).isprintable()
    assert len(str(found.value)) < 1000
    one = uw.text(datasets.Dataset.from_dict({evil: ["a" * 99]}), tokenizer)
    assert all(note.isprintable() for note in one.notes)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("hub:a/b", ("a/b", None, None, "train", "")),
        ("hub:allenai/c4:en:validation", ("allenai/c4", None, "en", "validation", "")),
        ("hub:a/b.c-d_1@v2.0::test", ("a/b.c-d_1", "v2.0", None, "test", "")),
        ("hub:a/b:::my column: odd", ("a/b", None, None, "train", "my column: odd")),
    ],
)
def test_names_of_the_hub(spelled, expected) -> None:
    found = source_of(spelled)
    assert isinstance(found, Named)
    assert (found.name, found.revision, found.config, found.split, found.column) == expected


@pytest.mark.parametrize(
    "spelled", ["hub:", "hub:c4", "hub:../etc", "hub:a/../b", "hub:a/b/c", "hub:a b/c", "hub:/a/b"]
)
def test_names_that_are_none(spelled, tokenizer) -> None:
    with pytest.raises(TokensError, match=r"no name of a data set.*hub:owner/name"):
        uw.text(spelled, tokenizer)


def test_a_text_may_begin_like_a_name(tokenizer) -> None:
    assert len(uw.text("hub: a word and its meaning", tokenizer, length=LENGTH))
    assert len(uw.text(["hub:owner/name"], tokenizer, length=LENGTH))


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """A hub with one data set, which counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Callable[[], Any]):
        self.asked: list[Any] = []
        self.source, self.down = source, False
        monkeypatch.setattr(huggingface_hub, "dataset_info", self.info)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name: str, revision: str | None, timeout: float) -> Any:
        if self.down:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=f"sha-of-{revision or 'main'}-{len(self.asked)}")

    def load(self, name: str, config: str | None = None, **settings: Any) -> Any:
        if self.down:
            raise ConnectionError("no network")
        self.asked.append((name, config, settings))
        return self.source()


def test_what_the_hub_is_asked(monkeypatch, tokenizer) -> None:
    hub = Hub(monkeypatch, lambda: listed(DOCUMENTS).to_iterable_dataset())
    tokens = uw.text("hub:o/n@v1:en:test:text", tokenizer, n=5, length=LENGTH)
    assert hub.asked == [("o/n", "en", {"split": "test", "streaming": True, "revision": "sha-of-v1-0"})]
    assert tokens.source == "hub:o/n@v1:en:test:text"
    assert tokens.notes[1:] == ("column text", "revision sha-of-v1-0")


def test_a_hub_that_cannot_be_reached(monkeypatch, tokenizer) -> None:
    Hub(monkeypatch, lambda: None).down = True
    with pytest.raises(TokensError, match=r"cannot read hub:o/n\. Got: no network.*check its name and"):
        uw.text("hub:o/n", tokenizer)


def test_the_real_library_without_a_network(tokenizer) -> None:
    with pytest.raises(TokensError, match=r"cannot read hub:o/n\. Got: .*offline"):
        uw.text("hub:o/n", tokenizer)


def test_without_the_extra(monkeypatch, tokenizer) -> None:
    Hub(monkeypatch, lambda: None).down = True
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TokensError, match=r"not installed\. Next: pip install 'unwrite\[datasets\]'"):
        uw.text("hub:o/n", tokenizer)


def test_a_folder_of_that_name_is_not_read_instead(monkeypatch, tokenizer, tmp_path) -> None:
    Hub(monkeypatch, lambda: listed(DOCUMENTS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n").mkdir(parents=True)
    with pytest.raises(TokensError, match="a folder here is called o/n"):
        uw.text("hub:o/n", tokenizer)


# --- reading goes on --------------------------------------------------------------------------------------------------


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("after", [0, 1, 2, 9, 29, 30, 31, 59, 60])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(opened, after, tokenizer, tmp_path, monkeypatch) -> None:
    opens, documents = opened
    whole = uw.text(opens(), tokenizer, n=1000, length=LENGTH)
    stopped(tmp_path / "run", opens(), tokenizer, after, monkeypatch, n=1000)
    assert len(list((tmp_path / "run").glob("00-reading-*.npz"))) == 1
    pulled = counted(monkeypatch)
    again = read(tmp_path / "run", opens(), tokenizer, n=1000)
    assert again.hash == whole.hash
    assert again.about() == whole.about()
    # One is read again to see that the place is right; all of a shuffled one, since it has no such place.
    shuffled = sorted(documents) == sorted(DOCUMENTS) and documents != DOCUMENTS
    done = min(after, len(documents))
    assert len(pulled) == len(documents) - (0 if shuffled else max(0, done - 1))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.promise("resumed")
def test_killed_anywhere_it_goes_on_to_the_same_bits(tokenizer, tmp_path) -> None:
    setup = f"""
import unwrite as uw
from pathlib import Path
from test_hub import DOCUMENTS, LENGTH, build, parquet
place = Path({str(tmp_path)!r})
tokenizer, data = build(), parquet(place)
"""
    work = """
with uw.Job(place / "run", every=0.0) as job:
    found = uw.text(data, tokenizer, n=1000, length=LENGTH, checkpoint=job).hash
(place / "hash").write_text(found)
"""
    assert kills(setup, work, 0.02) >= 2
    assert (tmp_path / "hash").read_text() == uw.text(parquet(tmp_path), tokenizer, n=1000, length=LENGTH).hash


@pytest.mark.promise("resumed")
def test_a_network_that_fails_in_the_middle(tokenizer, tmp_path) -> None:
    fails = [True]

    def make() -> Iterator[dict[str, str]]:
        for i, document in enumerate(DOCUMENTS):
            if i == 33 and fails.pop():
                raise ConnectionError("gone")
            yield {"text": document}

    data = datasets.IterableDataset.from_generator(make)
    with pytest.raises(TokensError, match=r"Got: gone.*goes on where it was"):
        read(tmp_path, data, tokenizer, n=1000)
    assert list(tmp_path.glob("*.npz"))
    fails.append(False)
    again = read(tmp_path, data, tokenizer, n=1000)
    assert again.hash == uw.text(listed(DOCUMENTS), tokenizer, n=1000, length=LENGTH).hash


def test_a_revision_that_moves_does_not(monkeypatch, tokenizer, tmp_path) -> None:
    hub = Hub(monkeypatch, lambda: listed(DOCUMENTS).to_iterable_dataset())
    stopped(tmp_path, "hub:o/n", tokenizer, 9, monkeypatch)
    read(tmp_path, "hub:o/n", tokenizer)
    assert [settings["revision"] for _, _, settings in hub.asked] == ["sha-of-main-0"] * 2


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("after", [9, 1000], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("other", [DOCUMENTS[::-1], DOCUMENTS[:5]], ids=["other", "shorter"])
def test_another_data_set_is_refused(after, other, tokenizer, tmp_path, monkeypatch) -> None:
    stopped(tmp_path, listed(DOCUMENTS), tokenizer, after, monkeypatch)
    with pytest.raises(TokensError, match="is not what was read of it before"):
        read(tmp_path, listed(other), tokenizer)


@pytest.mark.parametrize(
    "other",
    [{"n": 41}, {"length": 13}, {"bos": False}, {"tokenizer": build(bos=False)}],
    ids=["n", "length", "bos", "tokenizer"],
)
def test_another_question_is_refused(other, tokenizer, tmp_path, monkeypatch) -> None:
    stopped(tmp_path, listed(DOCUMENTS), tokenizer, 1000, monkeypatch)
    with pytest.raises(ResultError, match="checkpoint of another run"):
        read(tmp_path, listed(DOCUMENTS), **({"tokenizer": tokenizer} | other))


def test_a_job_must_be_open(tokenizer, tmp_path) -> None:
    with pytest.raises(ResultError, match="this job is not open"):
        uw.text(listed(DOCUMENTS), tokenizer, length=LENGTH, checkpoint=uw.Job(tmp_path))


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    made = planted("llama")
    made.hf.save_pretrained(place)
    made.tokenizer.save_pretrained(place)
    return place


PROSE = [f"Chapter {i}. A man may write at any time, if he will set himself doggedly to it. " * 3 for i in range(30)]
ASK = ("--text", "hub:o/n", "-n", 24, "--length", 32, "-q")


def tokens_of(folder: Path) -> dict[str, Any]:
    return next(iter(uw.read(folder).provenance["tokens"].values()))


@pytest.mark.promise("resumed")
def test_a_scan_goes_on_reading_and_then_needs_no_network(model, monkeypatch, capsys, tmp_path) -> None:
    hub = Hub(monkeypatch, lambda: listed(PROSE).to_iterable_dataset(num_shards=2))
    scan = ("scan", model, *ASK, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        assert run(monkeypatch, *scan) == 130
    said = capsys.readouterr().err
    assert "00-reading-hub-o-n.npz, from which the same command goes on" in said
    real = gram.GramTally.step
    with monkeypatch.context() as patch:
        patch.setattr(gram.GramTally, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(monkeypatch, *scan) == 130
    assert gram.GramTally.step is real
    assert len(hub.asked) == 2
    hub.down = True
    assert run(monkeypatch, *scan) == 0
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["report.html", "result.nc", "table.csv"]
    direct = uw.text(listed(PROSE), uw.load(model).tokenizer, n=24, length=32)
    assert tokens_of(tmp_path / "run")["hash"] == direct.hash


def test_shards_read_and_are_merged_without_a_network(model, monkeypatch, tmp_path) -> None:
    hub = Hub(monkeypatch, lambda: listed(PROSE).to_iterable_dataset())
    asked = ("--text", "hub:o/n", "-n", 150, "--length", 32, "-q")  # two batches
    for i in (1, 2):
        assert run(monkeypatch, "scan", model, *asked, "--out", tmp_path / "parts", "--shard", f"{i}/2") == 0
    hub.down = True
    assert run(monkeypatch, "merge", tmp_path / "parts", "--out", tmp_path / "run", "-q") == 0
    lm = uw.load(model)
    one = uw.scan(lm, uw.text(listed(PROSE), lm.tokenizer, n=150, length=32))
    assert np.array_equal(uw.read(tmp_path / "run")["share"].values, one["share"].values, equal_nan=True)


@pytest.mark.parametrize(
    "command",
    [("verify", "L0H0"), pytest.param(("audit",), marks=pytest.mark.slow), ("dla", "--prompt", "A man may write")],
    ids=["verify", "audit", "dla"],
)
def test_every_command_reads_the_hub(command, model, monkeypatch, tmp_path) -> None:
    hub = Hub(monkeypatch, lambda: listed(PROSE).to_iterable_dataset())
    name, *rest = command
    asked = [part for part in ASK if name != "dla" or part not in ("--length", 32)]
    assert run(monkeypatch, name, model, *rest, *asked, "--out", tmp_path / "run") == 0
    assert len(hub.asked) == 1
    assert not list((tmp_path / "run").glob("*.npz*"))


def test_a_command_without_a_network(model, monkeypatch, capsys, tmp_path) -> None:
    Hub(monkeypatch, lambda: None).down = True
    assert run(monkeypatch, "scan", model, *ASK, "--out", tmp_path / "run") == 1
    assert "error: cannot read hub:o/n. Got: no network" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_texts_of_the_hub_and_of_disk_are_compared(model, monkeypatch, tmp_path) -> None:
    Hub(monkeypatch, lambda: listed(PROSE))
    (tmp_path / "a.txt").write_text("".join(PROSE))
    asked = ("--text", "web=hub:o/n", "--text", f"disk={tmp_path / 'a.txt'}", "-n", 4, "--length", 32, "-q")
    assert run(monkeypatch, "scan", model, *asked, "--out", tmp_path / "run") == 0
    assert uw.read(tmp_path / "run").data["text"].values.tolist() == ["web", "disk"]


def test_tokens_are_those_of_every_other_method(tokenizer) -> None:
    tokens = uw.text(listed(DOCUMENTS), tokenizer, n=5, length=LENGTH)
    assert isinstance(tokens, Tokens)
    assert tokens.ids.dtype == np.int64
    tokens.check(40, LENGTH)
