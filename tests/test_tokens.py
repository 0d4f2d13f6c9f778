"""Does a method see exactly the tokens that were meant, and is everything else an error?"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unwrite.errors import NumericError, TokensError, UnwriteError
from unwrite.model.load import load
from unwrite.prompts import texts
from unwrite.prompts.texts import text, windows
from unwrite.prompts.tokens import Tokens, bare, from_ids

LETTERS = string.ascii_lowercase + " "
BOS, EOS = 1, 2
IDS = {letter: 3 + i for i, letter in enumerate(LETTERS)}
TEXTS = st.text(LETTERS, min_size=1, max_size=60).filter(str.strip)


def build(limit: int | None = 16, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each letter; it puts BOS before a text, where it has one, and EOS after it."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": BOS, "</s>": EOS, **IDS}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    special = {"unk_token": "?", "eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    limited = {} if limit is None else {"model_max_length": limit}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **limited)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build()


@pytest.fixture(scope="session")
def without_bos() -> PreTrainedTokenizerFast:
    return build(bos=False)


def spelled(document: str) -> list[int]:
    return [IDS[letter] for letter in document]


# --- text -------------------------------------------------------------------------------------------------------------


@given(document=TEXTS, n=st.integers(1, 8), length=st.integers(2, 12), bos=st.sampled_from([None, False, True, 7]))
def test_windows_are_consecutive(tokenizer, document: str, n: int, length: int, bos: int | bool | None) -> None:
    first = [] if bos is False else [7] if bos == 7 else [BOS]
    step = length - len(first)
    expected = [first + spelled(document[at : at + step]) for at in range(0, len(document), step)]
    expected = [row for row in expected if len(row) == length][:n]
    if not expected:
        with pytest.raises(TokensError, match=f"shorter than one window of {length} tokens"):
            text(document, tokenizer, n=n, length=length, bos=bos)
        return
    tokens = text(document, tokenizer, n=n, length=length, bos=bos)
    assert tokens.ids.tolist() == expected
    assert tokens.lengths.tolist() == [length] * len(expected)
    assert tokens.cluster.tolist() == list(range(len(expected)))


@pytest.mark.parametrize(("limit", "length"), [(16, 16), (1024, 1024), (5000, 1024), (None, 1024)])
def test_the_default_length_is_the_context_up_to_1024(limit: int | None, length: int) -> None:
    assert text("abc" * 2000, build(limit)).length == length


def test_a_tokenizer_without_bos_begins_no_window_with_one(without_bos) -> None:
    assert text("abcdef", without_bos, length=3).ids.tolist() == [spelled("abc"), spelled("def")]


def test_insisting_on_a_bos_that_there_is_not_is_an_error(without_bos) -> None:
    with pytest.raises(TokensError, match="no token that begins a text"):
        text("abcdef", without_bos, length=3, bos=True)


def test_bos_may_be_id_zero(tokenizer) -> None:
    assert text("abcdef", tokenizer, length=4, bos=0).ids[:, 0].tolist() == [0, 0]


def test_no_more_than_n_windows_are_taken_and_the_rest_is_noted(tokenizer) -> None:
    tokens = text("abc" * 10, tokenizer, n=4, length=4)
    assert len(tokens) == 4
    assert "1 of 1 document went on for further windows" in " ".join(tokens.notes)


def test_of_a_long_text_only_its_beginning_is_read_and_the_windows_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "".join(f"Once upon a time there was a dog, number {i}.\n" for i in range(4000))
    tokenizer, read = load("default").tokenizer, []
    monkeypatch.setattr(texts, "bare", lambda part, tokenizer: read.append(part) or bare(part, tokenizer))
    some = text(words, tokenizer, n=3, length=40, bos=False)
    assert some.ids.ravel().tolist() == bare(words, tokenizer)[:120]
    assert sum(map(len, read)) < len(words) / 10


@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(any), n=st.integers(1, 30))
def test_n_windows_are_spread_evenly_over_the_documents(tokenizer, sizes: list[int], n: int) -> None:
    documents = ["".join(LETTERS[i] * 3 for i in range(size)) + LETTERS[25] for size in sizes]
    tokens = text(documents, tokenizer, n=n, length=4)
    taken = np.bincount(tokens.cluster, minlength=len(sizes))
    assert taken.sum() == min(n, sum(sizes))
    assert (taken <= sizes).all()
    # A document gives less than another only if it has no more to give; what does not divide makes a difference of 1.
    assert all(mine >= taken.max() - 1 for mine, have in zip(taken, sizes, strict=True) if mine < have)
    for owner in np.unique(tokens.cluster):
        letters = tokens.ids[tokens.cluster == owner][:, 1:]
        assert letters.tolist() == [[IDS[LETTERS[i]]] * 3 for i in range(taken[owner])]


@pytest.mark.parametrize(
    ("sizes", "n", "taken"),
    [([9, 9, 1, 1, 9], 12, [4, 3, 1, 1, 3]), ([5, 5, 5], 3, [1, 1, 1]), ([1, 8], 6, [1, 5]), ([4, 4, 4], 2, [1, 1, 0])],
)
def test_spreading_worked_by_hand(tokenizer, sizes: list[int], n: int, taken: list[int]) -> None:
    tokens = text(["abc" * size for size in sizes], tokenizer, n=n, length=4)
    assert np.bincount(tokens.cluster, minlength=len(sizes)).tolist() == taken


def test_windows_of_several_documents_share_their_documents_cluster(tokenizer) -> None:
    tokens = text(["abcdef", "x", "ghijkl"], tokenizer, length=4)
    assert tokens.cluster.tolist() == [0, 0, 2, 2]


def test_windows_of_a_single_document_are_each_their_own(tokenizer) -> None:
    assert text(["abcdef"], tokenizer, length=4).cluster.tolist() == [0, 1]


def test_no_window_crosses_from_one_document_into_the_next(tokenizer) -> None:
    tokens = text(["abcde", "fghij"], tokenizer, length=4)
    assert tokens.ids[:, 1:].tolist() == [spelled("abc"), spelled("fgh")]


@pytest.mark.parametrize("source", ["", "  \n ", [], ["", " "], {"a": ""}, {}], ids=repr)
def test_an_empty_text_is_an_error_wherever_one_stands(tokenizer, source: object, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stray.txt").write_text("abc" * 30)  # the empty name must not mean "this folder"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokensError):
        text(source, tokenizer)


@pytest.mark.parametrize("length", [0, -4, 1])
def test_a_length_without_room_for_text_is_an_error(tokenizer, length: int) -> None:
    with pytest.raises(UnwriteError, match=f"Got: (length=)?{length}. Expected: "):
        text("abcdef", tokenizer, length=length)


@pytest.mark.parametrize("n", [0, -1])
def test_asking_for_no_windows_is_an_error(tokenizer, n: int) -> None:
    with pytest.raises(NumericError, match=f"n is a number of windows. Got: {n}. Expected: a positive integer"):
        text("abcdef", tokenizer, n=n, length=4)


@pytest.mark.parametrize("source", [3, None, b"abcdef", [1, 2], ["abc", 3], {"a": {"b": "abcdef"}}], ids=repr)
def test_what_is_no_text_is_an_error(tokenizer, source: object) -> None:
    with pytest.raises(TokensError, match="not a text"):
        text(source, tokenizer, length=3)


def test_half_a_character_is_an_error(tokenizer) -> None:
    with pytest.raises(TokensError, match="not Unicode text"):
        text("abc\ud800def", tokenizer, length=3)


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(TokensError, match="needs a tokenizer"):
        text("abcdef", None)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spell", [Path, str])
def test_a_file_reads_as_its_text(tokenizer, tmp_path: Path, spell: Callable) -> None:
    file = tmp_path / "book.txt"
    file.write_text("abcdefghi", encoding="utf-8")
    read, said = text(spell(file), tokenizer, length=4), text("abcdefghi", tokenizer, length=4)
    assert read.source == "book.txt"
    assert (read.hash, read.digest) == (said.hash, said.digest)


def test_a_folder_reads_as_its_text_files_in_order(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / ".git").mkdir()
    written = {"b.txt": "bbb", "a.txt": "aaaaaa", "inner/c.py": "ccc", "d.MD": "ddd", "README": "eee"}
    for name, content in {**written, "f.png": "fff", ".git/g.txt": "ggg", "h.csv": "hhh"}.items():
        (tmp_path / name).write_text(content)
    tokens = text(tmp_path, tokenizer, length=4)
    assert tokens.ids[:, 1].tolist() == spelled("eaabdc")
    assert tokens.cluster.tolist() == [0, 1, 1, 2, 3, 4]
    read, left = tokens.notes[1:]
    assert all(name in read for name in ("5 files", "2 .txt", "1 .py", *written))
    assert left == "2 files were not read (1 .png, 1 .csv)"


def test_the_folder_one_stands_in_is_called_by_its_name(tokenizer, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    monkeypatch.chdir(tmp_path)
    assert text(".", tokenizer, length=4).source == tmp_path.name


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert text(tmp_path / "a.txt", tokenizer, length=3, bos=False).ids.tolist() == [spelled("abc")]


@pytest.mark.parametrize("spell", [Path, str])
def test_a_missing_file_is_an_error_that_names_it(tokenizer, tmp_path: Path, spell: Callable) -> None:
    with pytest.raises(TokensError, match=r"cannot read .*absent\.txt"):
        text(spell(tmp_path / "absent.txt"), tokenizer, length=4)


@pytest.mark.parametrize("content", [b"abc\xff\xfedef", "abcdef".encode("utf-16"), b"caf\xe9"])
def test_a_file_that_is_not_utf8_is_an_error_that_names_it(tokenizer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latin.txt").write_bytes(content)
    with pytest.raises(TokensError, match=r"latin\.txt as UTF-8"):
        text(tmp_path / "latin.txt", tokenizer, length=3)


def test_an_empty_file_is_an_error_that_names_it(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(TokensError, match=r"blank\.txt is empty"):
        text(tmp_path / "blank.txt", tokenizer, length=3)


def test_a_folder_without_text_is_an_error(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("abcdef")
    with pytest.raises(TokensError, match=r"is empty. Got: 1 \.png. Expected: some text or code"):
        text(tmp_path, tokenizer, length=3)


@pytest.mark.parametrize("said", ["abc " * 2000, "abc\0def", "a" * 300], ids=["long", "NUL", "long word"])
def test_a_text_that_cannot_name_a_file_is_a_text(tokenizer, said: str) -> None:
    assert text(said, tokenizer, length=4).source == "text"


# --- names and hashes -------------------------------------------------------------------------------------------------


def test_a_mapping_gives_tokens_by_name(tokenizer) -> None:
    tokens = text({"one": "abcdef", 2: ["ghi", "jkl"]}, tokenizer, n=1, length=4)
    assert {name: part.ids[:, 1:].tolist() for name, part in tokens.items()} == {
        "one": [spelled("abc")],
        "2": [spelled("ghi")],
    }


def test_a_hostile_name_becomes_plain(tokenizer) -> None:
    names = list(text({"\x1b[2J\u202e\ud800\n": "abcdef"}, tokenizer, length=4))
    assert names == ["\\x1b[2J\\u202e\\ud800\\n"]


@pytest.mark.parametrize("names", [("1", 1), ("x" * 80 + "a", "x" * 80 + "b"), ("\n", "\\n")])
def test_no_text_takes_the_place_of_another(tokenizer, names: tuple) -> None:
    with pytest.raises(TokensError, match="names that differ"):
        text(dict.fromkeys(names, "abcdef"), tokenizer, length=4)


def test_windows_can_be_cut_of_one_source_alone(tokenizer) -> None:
    assert windows("abcdef", tokenizer, length=4).hash == text("abcdef", tokenizer, length=4).hash
    with pytest.raises(TokensError, match="not a text"):
        windows({"a": "abcdef"}, tokenizer, length=4)


def test_the_digest_tells_texts_apart_whatever_is_cut_from_them(tokenizer) -> None:
    digests = {text(source, tokenizer, n=1, length=4).digest for source in ("abcd", "abce", ["abcd", "e"], ["abcde"])}
    assert len(digests) == 4


def example() -> Tokens:
    return Tokens(np.array([[3, 4, 5], [6, 7, 7]]), np.array([3, 2]), np.array([0, 0]))


@pytest.mark.promise("provenance")
@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.array([[3, 4, 5], [6, 8, 7]])},
        {"ids": np.array([[6, 7, 7], [3, 4, 5]])},
        {"ids": np.array([[3, 4, 5, 5], [6, 7, 7, 7]])},
        {"lengths": np.array([3, 3])},
        {"lengths": np.array([2, 3])},
        {"cluster": np.array([0, 1])},
    ],
    ids=["an id", "order", "shape", "a length", "lengths", "a cluster"],
)
def test_the_hash_changes_with_what_numbers_depend_on(change: dict) -> None:
    assert replace(example(), **change).hash != example().hash


@pytest.mark.promise("provenance")
@pytest.mark.parametrize("change", [{"source": "other"}, {"digest": "ab"}, {"notes": ("note",)}], ids=str)
def test_the_hash_does_not_change_with_names(change: dict) -> None:
    assert replace(example(), **change).hash == example().hash


def test_the_hash_does_not_change_with_the_width_of_an_integer() -> None:
    tokens = example()
    narrow = {name: getattr(tokens, name).astype(np.int32) for name in ("ids", "lengths", "cluster")}
    assert replace(tokens, **narrow).hash == tokens.hash


def test_named_tokens_are_the_same_tokens() -> None:
    named = example().named("my \x1b text")
    assert named.source == "my \\x1b text"
    assert named.hash == example().hash


# --- from_ids ---------------------------------------------------------------------------------------------------------


@st.composite
def ragged(draw: st.DrawFn) -> list[list[int]]:
    return draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=5))


def padded(rows: list[list[int]], left: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of this width, every row with at most `left` of its padding before it; padding is the id 100."""
    ids, mask = np.full((len(rows), width), 100), np.zeros((len(rows), width), dtype=int)
    for p, row in enumerate(rows):
        start = min(left, width - len(row))
        ids[p, start : start + len(row)], mask[p, start : start + len(row)] = row, 1
    return ids, mask


@given(ragged(), st.integers(0, 3), st.integers(0, 9))
def test_padding_on_either_side_gives_the_same_aligned_rows(rows: list, extra: int, left: int) -> None:
    width = max(map(len, rows)) + extra
    right, other = (from_ids(*padded(rows, side, width)) for side in (0, left))
    assert right.hash == other.hash
    assert other.lengths.tolist() == [len(row) for row in rows]
    assert other.length == max(map(len, rows))
    assert [ids[:length].tolist() for ids, length in zip(other.ids, other.lengths, strict=True)] == rows
    assert other.cluster.tolist() == list(range(len(rows)))


@given(ragged(), st.integers(0, 9))
def test_padding_becomes_an_id_that_the_model_can_read(rows: list, left: int) -> None:
    tokens = from_ids(*padded(rows, left, 8))
    assert all(set(ids) == set(row) for ids, row in zip(tokens.ids.tolist(), rows, strict=True))


def test_without_a_mask_every_id_counts() -> None:
    tokens = from_ids([[1, 2, 3], [4, 5, 6]])
    assert tokens.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tokens.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_tensors_are_read_as_arrays_are(kind: torch.dtype) -> None:
    ids, mask = torch.tensor([[9, 1, 2], [9, 9, 3]]).to(kind), torch.tensor([[0, 1, 1], [0, 0, 1]])
    truth = from_ids(ids.numpy(), mask.numpy()).hash
    assert from_ids(ids, mask).hash == from_ids(ids, mask.bool()).hash == truth


def test_the_tokens_do_not_change_with_the_array_they_came_from() -> None:
    ids = np.array([[1, 2, 3]])
    tokens = from_ids(ids)
    ids[:] = 0
    assert tokens.ids.tolist() == [[1, 2, 3]]


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 0, 1]], "hole"),
        ([[1, 0, 0], [1, 0, 1]], "another shape"),
        ([[0, 0, 0]], "nothing of prompt 0"),
        ([[1.0, 1.0, 0.0]], "the mask must be a matrix of integers"),
        ([1, 1, 1], "the mask must be a matrix of integers"),
    ],
)
def test_a_mask_that_makes_no_sense_is_an_error(mask: list, said: str) -> None:
    with pytest.raises(TokensError, match=said):
        from_ids([[1, 2, 3]], mask)


def test_the_prompt_that_the_mask_leaves_empty_is_named() -> None:
    with pytest.raises(TokensError, match="prompt 1"):
        from_ids([[1, 2], [3, 4], [5, 6]], [[1, 1], [0, 0], [0, 1]])


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        [[[1]]],
        [],
        [[]],
        [[1.5]],
        [["a"]],
        [[1, 2], [3]],
        [[True]],
        None,
        "abc",
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(2, 2, requires_grad=True),
        torch.ones(0, 3, dtype=torch.long),
    ],
    ids=str,
)
def test_what_is_no_matrix_of_integers_is_an_error(ids: object) -> None:
    with pytest.raises(TokensError, match="token ids must be a matrix of integers"):
        from_ids(ids)


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "context"), [(8, 3), (100, None), (100, 1024)])
def test_a_model_that_can_read_the_ids_is_content(vocabulary: int, context: int | None) -> None:
    example().check(vocabulary, context)


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[3, 8]], "id 8 at prompt 0, position 1. Expected: 0 to 7"),
        ([[1, 2], [-1, 9]], "id -1 at prompt 1"),
    ],
)
def test_ids_outside_the_vocabulary_are_an_error(ids: list, said: str) -> None:
    with pytest.raises(TokensError, match=said):
        from_ids(ids).check(8, None)


def test_ids_under_padding_are_not_checked() -> None:
    from_ids([[3, 999], [-1, 4]], [[1, 0], [0, 1]]).check(8, 1)


@pytest.mark.promise("tokens")
def test_prompts_longer_than_the_context_are_an_error() -> None:
    with pytest.raises(TokensError, match=r"Got: 3 tokens. Expected: at most 2. Next: pass length=2 or less"):
        example().check(100, 2)
