"""Does a method see, of whatever a person hands over, the ids that the tokenizer itself would give?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import methods
import tiny
import unwrite as uw
from unwrite.cli import app
from unwrite.errors import TokensError
from unwrite.model.load import BUNDLED, view
from unwrite.model.view import Model
from unwrite.prompts.answers import token_after
from unwrite.prompts.given import given
from unwrite.prompts.given_pairs import pairs_of
from unwrite.prompts.texts import text
from unwrite.prompts.tokens import spelled

PIECES = ["▁The", "▁girl", "▁boy", "▁play", "s", "ed", "▁s", "▁ed", "ing", "▁was", "▁", "▁▁", ",", ".", "r"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "user", "content": "The girl was"}]


@cache
def pieces(prepend: str = "always", bos: bool = True) -> PreTrainedTokenizerFast:
    """Whole pieces as SentencePiece writes them; a space before a text "always", "first" or "never"."""
    letters = "abcdefghiklmnoptuvwyT[]"
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((piece, -1.0) for piece in PIECES)]
    made = Tokenizer(models.Unigram([*vocabulary, *((letter, -9.0) for letter in letters)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    made.decoder = decoders.Metaspace("▁", prepend_scheme=prepend)
    single = "<s> $A </s>" if bos else "$A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, model_max_length=32, **named)


@cache
def bytewise() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with BOS before a text."""
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED, pad_token="<|bos|>")


@cache
def model() -> Model:
    return view(tiny.model("llama", 0, torch.float64, vocab_size=64, **methods.shape("")), pieces())


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "always": pieces, "first": lambda: pieces("first"), "never": lambda: pieces("never"),
    "no BOS": lambda: pieces(bos=False), "bytes": bytewise,
}  # fmt: skip
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def own(tokenizer: Any, string: str) -> list[int]:
    """What the tokenizer's own call gives, without what ends a text."""
    ids = tokenizer(string)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def id_of(piece: str) -> int:
    return pieces().convert_tokens_to_ids(piece)


# --- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("tokens")
@every_tokenizer
@drawn_from(string=st.text("The girlboy plsedwn,.", min_size=1, max_size=20).filter(str.strip))
def test_a_string_is_what_the_tokenizer_makes_of_it(name: str, string: str) -> None:
    tokenizer = TOKENIZERS[name]()
    found = given(string, tokenizer, files=False)
    assert found.ids[0].tolist() == own(tokenizer, string)
    windows = text([string], tokenizer, length=found.length)
    assert windows.ids.tolist() == found.ids.tolist()


@pytest.mark.promise("tokens")
@every_tokenizer
def test_a_text_that_begins_with_bos_gets_no_second_one(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    bare = tokenizer("The girl was", add_special_tokens=False)["input_ids"]
    begun = f"{tokenizer.bos_token}The girl was"
    ids = given(begun, tokenizer).ids[0].tolist()
    assert ids == tokenizer(begun, add_special_tokens=False)["input_ids"]
    assert given(begun, tokenizer, bos=True).ids[0].tolist() == ids
    cut = text(begun + " played" * 30, tokenizer, length=8).ids
    first = [tokenizer.bos_token_id] if own(tokenizer, "The")[0] == tokenizer.bos_token_id else []
    assert len(cut) > 2
    assert all((row == tokenizer.bos_token_id).sum() == len(first) for row in cut[1:])
    assert (cut[0] == tokenizer.bos_token_id).sum() == 1
    assert given("The girl was", tokenizer, bos=False).ids[0].tolist() == bare
    assert given("The girl was", tokenizer, bos=True).ids[0].tolist() == [tokenizer.bos_token_id, *bare]
    assert given("The girl was", tokenizer, bos=5).ids[0].tolist() == [5, *bare]


@pytest.mark.parametrize("bos", ["<s>", -1, 1.0])
def test_bos_is_a_truth_or_an_id(bos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(TokensError, match=r"bos is what begins a text. Got: .*Expected: True, False, or the id"):
        given("The", pieces(), bos=bos)


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("source", [[[1, 4]], {"input_ids": [[1, 4]]}, given("The girl", pieces())], ids=repr)
def test_bos_of_token_ids_is_an_error(source: Any) -> None:
    with pytest.raises(TokensError, match=r"bos is for text, and these are token ids. Got: bos=False"):
        uw.scan(model(), source, bos=False)


def test_every_method_and_command_can_be_told_what_begins_a_text() -> None:
    assert {"scan", "dla", "effects", "audit"} <= set(methods.resumable())
    # What a graph asks is a chat, which begins as the model's template says.
    for name in {*methods.resumable(), "text", "pairs"} - {"graph"}:
        assert "bos" in inspect.signature(getattr(uw, name)).parameters, name
    for command in ("audit", "scan", "verify", "dla", "effects", "reproduce"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert "--no-bos" in shown, command


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("answered", [False, True])
def test_messages_are_what_the_template_makes_of_them(answered: bool) -> None:
    tokenizer = pieces()
    talk = [*TALK, {"role": "assistant", "content": "The boy"}] if answered else TALK
    asked = {"add_generation_prompt": not answered, "continue_final_message": answered}
    want = tokenizer.apply_chat_template(talk, return_dict=False, **asked)
    assert want[:2].count(tokenizer.bos_token_id) == 1
    for bos in (None, True):
        assert given(talk, tokenizer, bos=bos).ids.tolist() == [want]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, **asked)
    assert given(rendered, tokenizer).ids.tolist() == [want]
    both = given([talk, TALK], tokenizer)
    assert both.ids[0, : both.lengths[0]].tolist() == want
    assert given(TALK[0], tokenizer).hash == given(TALK, tokenizer).hash


def test_a_chat_without_a_template_or_that_it_refuses_is_an_error() -> None:
    with pytest.raises(TokensError, match=r"no chat template.*Next: write the prompt as text"):
        given(TALK, bytewise())
    strict = PreTrainedTokenizerFast(
        tokenizer_object=pieces().backend_tokenizer, chat_template="{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(TokensError, match=r"refuses these messages. Got: .*roles must alternate"):
        given(TALK, strict)


# --- what a tokenizer returned ----------------------------------------------------------------------------------------

STRINGS = ["The girl was", "The boy played, The girl", "The boy", "The girl, The boy"]


def _padded(side: str, kind: str | None) -> Any:
    tokenizer = pieces()
    tokenizer.padding_side = side
    return tokenizer(STRINGS, padding=True, return_tensors=kind, add_special_tokens=False)


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_what_a_tokenizer_returned_is_ids_and_their_mask(side: str, kind: str | None) -> None:
    encoding, want = _padded(side, kind), given(STRINGS, pieces(), bos=False).hash
    assert given(encoding, pieces()).hash == given(dict(encoding), pieces()).hash == want
    assert given(encoding["input_ids"], pieces(), encoding["attention_mask"]).hash == want
    with pytest.raises(TokensError, match=r"with padding, which no mask says.*Next: pass what the tokenizer returned"):
        given(encoding["input_ids"], pieces())


def test_rows_of_unequal_length_are_prompts() -> None:
    tokenizer, want = pieces(), given(STRINGS, pieces(), bos=False).hash
    encoding = tokenizer(STRINGS, add_special_tokens=False)
    each = [tokenizer(string, add_special_tokens=False) for string in STRINGS]
    for source in (encoding, encoding["input_ids"], each, [torch.tensor(one["input_ids"]) for one in each]):
        assert given(source, tokenizer).hash == want
    assert given(each[0]["input_ids"], tokenizer).ids.tolist() == [each[0]["input_ids"]]


@pytest.mark.parametrize(
    "source",
    [tuple(STRINGS), np.array(STRINGS), np.array(STRINGS, dtype=object), iter(STRINGS)],
    ids=["tuple", "array", "objects", "iterator"],
)
def test_strings_come_in_many_lists(source: Any) -> None:
    assert given(source, pieces()).hash == given(list(STRINGS), pieces()).hash


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"attention_mask": [[1]]}, "one text at a time"),
        ({"a": "The girl", "b": "The boy"}, "one text at a time"),
        ({"input_ids": [[1, 4]], "position_ids": [[0, 1]]}, "more than ids and their mask. Got: position_ids"),
        (["The girl", 3], "not prompts. Got: 3"),
        ([], "is empty"),
        (None, "matrix of integers"),
        (3.5, "matrix of integers"),
        ([[4, 5], ["The"]], "matrix of integers"),
        ([[4, 5], []], "matrix of integers"),
        ([TALK, "The girl"], "not prompts. Got: list of 1"),
        ("", "is empty"),
        (["The girl", ""], "prompt 1 has no token"),
    ],
    ids=repr,
)
def test_what_is_no_text_is_refused_in_words(source: Any, said: str) -> None:
    with pytest.raises(TokensError, match=said):
        uw.verify(model(), source, "L0H0")


def test_a_mask_beside_text_or_a_second_one_is_an_error() -> None:
    with pytest.raises(TokensError, match=r"this is text\. Next: leave mask out"):
        given("The girl", pieces(), mask=[[1, 1]])
    with pytest.raises(TokensError, match="two masks"):
        given({"input_ids": [[1, 4]], "attention_mask": [[1, 1]]}, None, mask=[[1, 1]])


def test_text_without_a_tokenizer_says_how_to_give_one() -> None:
    for source in ("The girl", TALK, Path(__file__)):
        with pytest.raises(TokensError, match=r"came without one. Next: pass token ids, or .*tokenizer="):
            given(source, None)


def test_a_file_is_read_in_windows_and_a_prompt_of_that_name_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "The girl"
    file.write_text("The girl played, The boy was. " * 20)
    want = text(file, pieces(), length=16)
    for source in (file, str(file)):
        assert given(source, pieces(), length=16).hash == want.hash
    assert given(str(file), pieces(), files=False).length != 16


# --- every method -----------------------------------------------------------------------------------------------------

PAIR = {"base": "The girl was", "source": "The boy was", "answer": "ed", "against": " ed"}


def effects(method: str = "exact", **how: Any) -> Callable[[Model, Any], uw.Result]:
    return lambda lm, source: uw.effects(lm, (source, source, " s", "ed"), method=method, steps=2, **how)


def changed(source: Any) -> Any:
    """Prompts of the same lengths with one other token."""
    tokens = given(source, pieces())
    return replace(tokens, ids=np.where(np.arange(tokens.length) == 1, id_of("r"), tokens.ids))


def bounded(lm: Model, source: Any) -> uw.Result:
    pairs = (source, changed(source), " s", "ed")
    return uw.bound(lm, pairs, uw.effects(lm, pairs, method="atp"), subsets=12, p=0.5)


# Whose numbers are of each prompt; and of a whole text.
OF_EACH: dict[str, Callable[[Model, Any], uw.Result]] = {
    "dla": lambda lm, source: uw.dla(lm, source, " s", "ed"),
    "effects": effects(source="zero"),
    "effects all": effects(at="all", source="zero"),
    **{f"effects {method}": effects(method, source="zero") for method in ("atp", "relp", "atp*", "direct", "net")},
    "paths": lambda lm, source: uw.paths(
        lm, (source, source, " s", "ed"), "heads", ["L1H0.v", "logits"], source="zero"
    ),
}
SUMMED: dict[str, Callable[..., uw.Result]] = {
    "scan": uw.scan,
    "verify": lambda lm, source, **how: uw.verify(lm, source, "L0H0", **how),
    "survival": lambda lm, source, **how: uw.survival(lm, source, ["L0H1", "MLP0"], decoys=2, **how),
}
OF_ALL: dict[str, Callable[[Model, Any], uw.Result]] = {
    **SUMMED,
    "verify erasers": lambda lm, source: uw.verify(lm, source, "L0H0", ["L1H0"]),
    "dla texts": lambda lm, source: uw.dla(lm, [[5, 6]], texts=source),
    "dla mean": lambda lm, source: uw.dla(lm, source, " s", "ed", replace="mean"),
    "corpus_dla": lambda lm, source: uw.corpus_dla(lm, source, "L0H0", ["L1H0"]),
    "adversarial": lambda lm, source: uw.adversarial(lm, source, "L0H0"),
    "effects ig": lambda lm, source: uw.effects(lm, (source, changed(source), " s", "ed"), method="ig", steps=2),
    "paths mean": lambda lm, source: uw.paths(lm, {"base": source, "source": source, "answer": " s"}, source="mean"),
    "bound": bounded,
    "circuit": lambda lm, source: uw.circuit(lm, (source, changed(source), " s", "ed"), ["L0H0"], draws=1, gates=False),
    "subspace": lambda lm, source: uw.subspace(
        lm, (source, changed(source), " s", "ed"), "resid_post0", method="gradient", held="pair", draws=1
    ),
    "mask": lambda lm, source: uw.mask(
        lm, (source, changed(source), " s", "ed"), ("L0H0",), "last", held="pair", steps=1, seeds=1, draws=1
    ),
    "compare": lambda lm, source: uw.compare(
        lm, (source, changed(source), " s", "ed"), ("L0H0",), methods=("atp", "exact")
    ),
}
LOOKED: dict[str, Callable[[Model, Any], uw.Result]] = {
    "lens": uw.lens,
    "attention": uw.attention,
    "decode": lambda lm, source: uw.decode(lm, source, into=[5, 9, 7], placeholder=9, tokens=2),
    "solves": lambda lm, source: uw.solves(lm, (source, changed(source), " s", "ed")),
}
ASK = {**OF_EACH, **OF_ALL, **LOOKED}


def test_every_method_that_reads_text_is_asked_with_padding() -> None:
    # What is made of the others need not be.
    assert {name.split()[0] for name in ASK} >= {name.split()[0] for name in methods.METHODS} - {*methods.COMBINED}


def filled(tokens: Any, other: int = 9) -> Any:
    """The same prompts with other ids behind their ends."""
    behind = np.arange(tokens.length) >= tokens.lengths[:, None]
    return replace(tokens, ids=np.where(behind, other, tokens.ids))


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("name", ASK)
def test_padding_on_either_side_and_strings_are_the_same_to_every_method(name: str) -> None:
    lm, strings = model(), given(STRINGS, pieces(), bos=False)
    with methods.few_draws():
        want, right = (ASK[name](lm, _padded(side, "pt")) for side in ("left", "right"))
        behind = ASK[name](lm, filled(strings))
    assert given(_padded("left", "pt"), pieces()).hash == strings.hash
    read, told = ([part["hash"] for part in one.provenance["tokens"].values()] for one in (right, want))
    assert read == told
    for variable in want.data:
        np.testing.assert_array_equal(right[variable].values, want[variable].values)
    for variable, part in want.data.items():
        if part.dtype.kind == "f":
            np.testing.assert_allclose(
                behind[variable].values, part.values, rtol=1e-7, atol=1e-9, err_msg=str(variable)
            )


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("name", OF_EACH)
def test_a_prompt_among_others_is_a_prompt_alone_to_every_method(name: str) -> None:
    lm = model()
    found = OF_EACH[name](lm, _padded("left", "pt"))
    for i, string in enumerate(STRINGS):
        alone = OF_EACH[name](lm, given(string, pieces(), bos=False))
        for variable in {"direct", "total", "effect", "signed", "base", "logit_diff"} & {*found.data}:
            got, want = found[variable].isel({found[variable].dims[0]: i}), alone[variable][0]
            part = {axis: slice(size) for axis, size in want.sizes.items()}
            np.testing.assert_allclose(got.isel(part), want, atol=1e-9, err_msg=str(variable))


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("name", SUMMED)
def test_sums_over_prompts_are_those_of_prompts_alone(name: str) -> None:
    """A batch of one prompt has its length; in a batch of all and in a wider one the others are padded."""
    lm, tokens = model(), given(STRINGS, pieces(), bos=False)
    wide = filled(replace(tokens, ids=np.pad(tokens.ids, ((0, 0), (0, 4)))))
    with methods.few_draws():
        alone = SUMMED[name](lm, tokens, batch=1).data
        among = [SUMMED[name](lm, source, batch=len(tokens)).data for source in (tokens, wide)]
    for other in among:
        for variable, part in alone.items():
            if part.dtype.kind == "f" and part.sizes == other[variable].sizes:
                np.testing.assert_allclose(other[variable], part, rtol=1e-6, atol=1e-8, err_msg=str(variable))
    assert {variable for variable in alone if alone[variable].sizes == among[0][variable].sizes} == {*alone}


@pytest.mark.promise("tokens")
def test_a_difference_of_logits_is_that_of_the_prompt_alone() -> None:
    lm = model()
    found = uw.dla(lm, _padded("left", "pt"), " s", "ed")["logit_diff"]
    for i, string in enumerate(STRINGS):
        ids = pieces()(string, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = lm.hf(ids).logits[0, -1]
        assert float(found[i]) == pytest.approx(float(logits[id_of("▁s")] - logits[id_of("ed")]), abs=1e-9)


def test_pairs_come_as_people_have_them(tmp_path: Path) -> None:
    want = uw.pairs(**PAIR, tokenizer=pieces())
    (tmp_path / "pairs.csv").write_text("base,source,answer,against\nThe girl was,The boy was,ed, ed\n")
    for source in (want, PAIR, tuple(PAIR.values()), [PAIR], tmp_path / "pairs.csv", str(tmp_path / "pairs.csv")):
        assert pairs_of(source, pieces()).about()["hash"] == want.about()["hash"]
    bare = pairs_of(PAIR, pieces(), bos=False)
    assert bare.base.length == want.base.length - 1
    for wrong in ({"base": "The"}, {**PAIR, "other": 1}, 3, (1, 2), []):
        with pytest.raises(TokensError, match=r"is not a pair|no pairs of prompts"):
            uw.effects(model(), wrong)
    with pytest.raises(TokensError, match="bos is for text"):
        uw.paths(model(), want, bos=True)


# --- answers ----------------------------------------------------------------------------------------------------------

IS = {
    ("The girl play", "s"): "s", ("The girl play", " s"): "▁s", ("The girl play", "▁s"): "▁s",
    ("The girl play", "ed"): "ed", ("The girl", " was"): "▁was", ("The girl", ","): ",", ("The girl", "</s>"): "</s>",
    ("The girl ", "▁was"): "▁was",
}  # fmt: skip


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("prepend", ["always", "first", "never"])
@pytest.mark.parametrize("asked", IS, ids=repr)
def test_an_answer_is_the_token_that_continues_its_prompt(asked: tuple[str, str], prepend: str) -> None:
    prompt, answer = asked
    tokenizer = pieces(prepend)
    before = given(prompt, tokenizer).ids[0].tolist()
    assert token_after(answer, before, tokenizer, 64) == id_of(IS[asked])


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    ("prompt", "answer", "said"),
    [
        ("The girl", "was", "Next: ask about ' was'"),
        ("The girl", " wasing", r"Got: '.*was' \(\d+\), 'ing' \(\d+\).*Next: ask about ' was'"),
        ("The girl ", "was", "end the prompt before its last space.*ask about ' was'"),
        ("The girl", "", "Got: none"),
    ],
)
def test_an_answer_that_is_not_one_token_is_refused_with_what_would_be(prompt: str, answer: str, said: str) -> None:
    with pytest.raises(TokensError, match=rf"{answer!r} is not one token.*{said}"):
        uw.dla(model(), prompt, answer)


def test_after_ids_that_are_no_text_an_answer_means_what_only_it_can() -> None:
    tokenizer, before = pieces(), [id_of("g"), id_of("▁"), id_of("▁"), id_of("▁")]  # never tokenised so
    with pytest.raises(TokensError, match=rf"'s' can be two tokens.*'▁s'.*or pass the id {id_of('s')}"):
        token_after("s", before, tokenizer, 64)
    for answer, piece in ((" was", "▁was"), ("was", "▁was"), ("▁s", "▁s"), ("ing", "ing")):
        assert token_after(answer, before, tokenizer, 64) == id_of(piece)
    with pytest.raises(TokensError, match=r"' ing' is not one token\. Got: .* Next: ask about 'ing'"):
        token_after(" ing", before, pieces("never"), 64)


@pytest.mark.promise("tokens")
@every_tokenizer
def test_no_two_tokens_have_one_name_and_a_name_is_its_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    names = [spelled([i], tokenizer) for i in range(len(tokenizer))]
    assert len(set(names)) == len(names)


@pytest.mark.shared
def test_the_token_after_a_prompt_of_a_real_model(shared: Path) -> None:
    lm = uw.load(shared / "models" / "stories260K")
    tokenizer, prompt = lm.tokenizer, "The girl play"
    start, *ends = (
        tokenizer(f"{prompt}{end}", add_special_tokens=False)["input_ids"] for end in ("", "s", "ed", " was")
    )
    assert all(ids[:-1] == start for ids in (ends[0], ends[2]))
    found = uw.dla(lm, prompt, "s", " was")
    with pytest.raises(TokensError, match=r"'was' is not one token\. Got: .* Next: ask about ' was'"):
        uw.dla(lm, "The girl", "was")
    assert [int(found[name][0]) for name in ("answer_id", "against_id")] == [ends[0][-1], ends[2][-1]]
    with torch.no_grad():
        logits = lm.hf(torch.tensor([[tokenizer.bos_token_id, *start]])).logits[0, -1]
    assert float(found["logit_diff"][0]) == pytest.approx(float(logits[ends[0][-1]] - logits[ends[2][-1]]), abs=1e-4)
