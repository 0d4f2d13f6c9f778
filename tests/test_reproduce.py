"""Are the paper's numbers all asked for, and is each one of ours what slow arithmetic and another library say?"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import erf, log_softmax, softmax
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tiny
import unwrite as uw
from test_cli import run
from test_legacy import ORACLE, ROOT, state, written
from unwrite.errors import ModelError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.report import terminal

REPRODUCE = importlib.import_module("unwrite.studies.reproduce")
SHAPE = {"n_layers": 4, "d_model": 32, "d_mlp": 48, "d_head": 4, "n_heads": 8, "n_ctx": 64, "d_vocab": 320}
CONFIG = {**SHAPE, "act_fn": "gelu", "attn_only": False, "normalization": "LN"}
LENGTH, N = 48, 6

# By hand, from the paper: prompt, its two tokens, the head of Figure 4b.
PROMPTS = (
    ("It's in the cupboard, either on the top or on the", " bottom", " top", 3, 1),
    ("I went to university at Michigan", " State", " University", 2, 1),
    ("class MyClass:\n\tdef", " __", " get", 3, 5),
    ("The church I go to is the Seventh-day Adventist", " Church", " church", 2, 2),
)
ERASERS = (2, 3, 4, 5, 6, 7)
PLACES = ("resid_pre0", *(f"resid_{place}{layer}" for layer in range(4) for place in ("mid", "post")))
# Every number of the paper's text and of its published images: figure and value, as often as it is said.
SHEET = [
    *(("1", x) for x in (0.016, 0.963, 1.047, 1.013, 1.018, 0.105, 0.094, 0.05, 0.055)),
    *(("1", x) for x in (-0.29, 0.45)),
    *(("1 top", x) for x in (0.18, 1.88, 0.96, 0.06, 1.08, 0.39, -0.3, -0.57, -1.4, 1.4)),
    *(("2", x) for x in (0.042, -0.023, 0.085, -0.008, -0.144, -0.034, -0.118, -0.263, -0.176, -0.142, -0.029, 0.0)),
    *(("2", x) for x in (-0.28, 0.31, -0.31, 0.28)),
    *(("2", x) for x in (-0.903, -0.88)),
    *(("3a", x) for x in (0.88, 0.645, 0.574, 0.48, 0.85)),
    *(("3b", x) for x in (0, 0, -0.02, -0.01, 0, -0.035, -0.03, -0.01)),
    *(("4", x) for x in (1.07, 1.89, 3.02, 0.94)),
    *(("4a", x) for x in (0.60, 0.60, 0.84, 0.815, 0.95, 0.975, 0.247, 0.248)),
    *(("4b", x) for x in (1.14, 0.09, 0.84, 0.035, 2.3, 0.72, 0.525, 0.17)),
    *(("5", x) for x in (-0.159, -0.716)),
    *(("5 (script)", x) for x in (-0.723, 0.052)),
    *(("–", x) for x in (3.13, 2.25)),
]  # fmt: skip
# How often each is measured: centred and raw; of bands, also as drawn and as the captions say; with attention and not.
TIMES = {"1": 2, "1 top": 2, "2": 2, "5 (script)": 2}


def spelling() -> PreTrainedTokenizerFast:
    """One token for every word with the white space before it; those of the four prompts are known."""
    words = ["<|EOS|>", "<|BOS|>", "<|PAD|>", "<unk>"]
    pieces = Regex(r"\s*\S+")
    cut = pre_tokenizers.Split(pieces, "isolated")
    for prompt, first, second, *_ in PROMPTS:
        words += [word for word, _ in cut.pre_tokenize_str(prompt)] + [first, second]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = cut
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|BOS|>", eos_token="<|EOS|>", pad_token="<|PAD|>", unk_token="<unk>"
    )


def erasing(tensors: dict[str, torch.Tensor]) -> None:
    """L0H2 and L2H4 look everywhere alike, and what L2H4 finds of L0H2's write in its values it writes negatively."""
    for layer, head in ((0, 2), (2, 4)):
        tensors[f"blocks.{layer}.attn.W_Q"][head] = 0
        tensors[f"blocks.{layer}.attn.b_Q"][head] = 0
    written = tensors["blocks.0.attn.W_O"][2]
    tensors["blocks.2.attn.W_V"][4] = 4 * torch.linalg.pinv(written) / tensors["blocks.2.ln1.w"][:, None]
    tensors["blocks.2.attn.W_O"][4] = -written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the format and with the heads of gelu-4l, its tokenizer beside it."""
    place = written(tmp_path_factory.mktemp("weights") / "random-4l", erasing, **CONFIG)
    spelling().save_pretrained(place)
    return place


def rows() -> np.ndarray:
    """Prompts of random tokens, each begun as the model's were."""
    ids = np.random.default_rng(0).integers(3, SHAPE["d_vocab"], (N, LENGTH))
    ids[:, 0] = 1
    return ids


@pytest.fixture(scope="module")
def proof(folder: Path) -> uw.Result:
    return uw.verify(uw.load(folder), rows(), "L0H2", [f"L2H{head}" for head in ERASERS], skip=0)


@pytest.fixture(scope="module")
def result(folder: Path, proof: uw.Result) -> uw.Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REPRODUCE, "verify", partial(verified, proof))
        return uw.reproduce("gelu-4l", weights=folder, tokens=from_ids(rows()))


def verified(proof: uw.Result, lm: Model, tokens: Tokens, writer: str, erasers: Any, skip: int, **_: Any) -> uw.Result:
    """What it has said before, if it is asked the same."""
    if tokens.hash != proof.provenance["tokens"][""]["hash"]:
        return uw.verify(lm, tokens, writer, erasers, skip)
    settings = proof.provenance["settings"]
    assert (writer, [*erasers], skip) == (settings["writer"], settings["erasers"], settings["skip"])
    return proof


def claims(result: uw.Result) -> dict[tuple[str, str, str], float]:
    """What is measured by figure, quantity and setting; every one once."""
    words = (map(str, result[part].values) for part in ("figure", "quantity", "setting"))
    names = list(zip(*words, strict=True))
    assert len(set(names)) == len(names)
    return dict(zip(names, result["ours"].values.tolist(), strict=True))


@pytest.mark.promise("paper")
def test_there_is_a_claim_for_every_number_of_the_paper_and_no_other(result) -> None:
    said = sorted(zip(map(str, result["figure"].values), result["paper"].values.tolist(), strict=True))
    bands = {("1", -0.29), ("1", 0.45), ("2", -0.28), ("2", 0.31), ("2", -0.31), ("2", 0.28)}
    alone = {("2", -0.903), ("2", -0.88)}
    times = [
        (figure, x)
        for figure, x in SHEET
        for _ in range(1 if (figure, x) in alone else TIMES.get(figure, 1) * (2 if (figure, x) in bands else 1))
    ]
    assert said == sorted((figure, float(x)) for figure, x in times)
    assert np.isfinite(result["ours"]).all()
    np.testing.assert_array_equal(result["difference"], result["ours"] - result["paper"])


# The slow truth: what the model does to each prompt, and out of it every number.


def norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred and divided, and by what: [..., 1]."""
    x = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x / scale, scale


def centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(-1, keepdims=True)


class Seen:
    """One prompt of the model as its checkpoint defines it, with everything in between [position, ...]."""

    def __init__(self, weights: Mapping[str, np.ndarray], ids: np.ndarray, hide: np.ndarray | None = None):
        """With `hide`, that vector is not in what values of layer 2 read; the norm is the same."""
        self.w, self.ids = weights, ids
        self.normed, self.scale, self.pattern, self.heads, self.mlps, self.constant = ([] for _ in range(6))
        x = weights["embed.W_E"][ids] + weights["pos_embed.W_pos"][: len(ids)]
        self.states = {"resid_pre0": x}
        for layer in range(4):
            name = f"blocks.{layer}"
            normed, scale = norm(x)
            self.normed.append(normed)
            self.scale.append(scale)
            pattern, value = self._attention(name, normed, hide / scale if layer == 2 and hide is not None else 0)
            self.pattern.append(pattern)
            w_o = weights[f"{name}.attn.W_O"]
            self.heads.append(np.einsum("hqi,hik,hkd->hqd", pattern, value, w_o))
            self.constant.append(np.einsum("hk,hkd->hd", self._value_bias(name), w_o))
            x = x + self.heads[-1].sum(0) + self.constant[-1].sum(0) + weights[f"{name}.attn.b_O"]
            self.states[f"resid_mid{layer}"] = x
            inner = norm(x)[0] * weights[f"{name}.ln2.w"] + weights[f"{name}.ln2.b"]
            inner = inner @ weights[f"{name}.mlp.W_in"] + weights[f"{name}.mlp.b_in"]
            inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
            self.mlps.append(inner @ weights[f"{name}.mlp.W_out"] + weights[f"{name}.mlp.b_out"])
            x = x + self.mlps[-1]
            self.states[f"resid_post{layer}"] = x
        self.final_scale = norm(x)[1]
        self.logits = (norm(x)[0] * weights["ln_final.w"] + weights["ln_final.b"]) @ weights["unembed.W_U"]

    def _value_bias(self, name: str) -> np.ndarray:
        return self.w[f"{name}.attn.b_V"] + np.einsum("d,hdk->hk", self.w[f"{name}.ln1.b"], self.w[f"{name}.attn.W_V"])

    def _attention(self, name: str, normed: np.ndarray, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
        """Patterns [head, query, key] and values without constant [head, key, k]."""
        q, k = (self.look(name, part, normed) for part in "QK")
        scores = np.where(np.tri(len(normed), dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
        return softmax(scores, -1), self.values(name, normed - hidden)

    def look(self, name: str, part: str, normed: np.ndarray) -> np.ndarray:
        read = normed * self.w[f"{name}.ln1.w"] + self.w[f"{name}.ln1.b"]
        return (
            np.einsum("td,hdk->htk", read, self.w[f"{name}.attn.W_{part}"]) + self.w[f"{name}.attn.b_{part}"][:, None]
        )

    def values(self, name: str, normed: np.ndarray) -> np.ndarray:
        return np.einsum("td,hdk->htk", normed * self.w[f"{name}.ln1.w"], self.w[f"{name}.attn.W_V"])

    def head(self, layer: int, head: int, raw: bool = False) -> np.ndarray:
        """A head's write as TransformerLens has it: centred and without constant; or as it is."""
        found = self.heads[layer][head]
        return found + self.constant[layer][head] if raw else centred(found)

    @cached_property
    def write(self) -> np.ndarray:
        return self.head(0, 2)

    def carried(self, vector: np.ndarray, pattern: np.ndarray | None = None) -> np.ndarray:
        """Eq. 3 of the heads of layer 2 [head, position, d]: what they write because their values read `vector`."""
        pattern = self.pattern[2] if pattern is None else pattern
        value = self.values("blocks.2", centred(vector) / self.scale[2])
        return centred(np.einsum("hqi,hik,hkd->hqd", pattern, value, self.w["blocks.2.attn.W_O"]))

    def queried(self, layer: int, head: int, row: int, other: Seen) -> np.ndarray:
        """What a head writes at `row` if it reads another text there, and this prompt before it."""
        name, mixed = f"blocks.{layer}", self.normed[layer][: row + 1].copy()
        mixed[row] = other.normed[layer][row]
        pattern, value = self._attention(name, mixed, 0)
        return centred(pattern[head, row] @ value[head] @ self.w[f"{name}.attn.W_O"][head])

    def direct(self, vector: np.ndarray, unembed: np.ndarray) -> np.ndarray:
        """What rows of `vector` add to a logit whose column of the unembedding is given for each, norm held."""
        return (centred(vector) / self.final_scale[: len(vector)] * self.w["ln_final.w"] * unembed).sum(-1)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    tensors = state(CONFIG)
    erasing(tensors)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def seen(weights: dict[str, np.ndarray]) -> list[Seen]:
    return [Seen(weights, ids) for ids in rows()]


def ratio(vectors: Sequence[np.ndarray], writes: Sequence[np.ndarray]) -> np.ndarray:
    a, b = np.concatenate(vectors), np.concatenate(writes)
    return (a * b).sum(-1) / (b * b).sum(-1)


Expected = Iterator[tuple[tuple[str, str, str], float]]


def of_levels(
    seen: list[Seen], conventions: Sequence[str] = ("centred, heads without constant", "raw writes")
) -> Expected:
    for words in conventions:
        raw = words == "raw writes"
        shape = (lambda x: x) if raw else centred
        writes = {head: [one.head(0, head, raw) for one in seen] for head in range(8)}
        level = lambda place, head=2: ratio([shape(one.states[place]) for one in seen], writes[head])  # noqa: B023, E731
        for place in PLACES:
            yield ("1", f"PR({place}, L0H2)", words), np.median(level(place))
        for head in range(8):
            yield ("1 top", f"PR(resid_mid0, L0H{head})", words), np.median(level("resid_mid0", head))
        for head in (1, 6):
            yield ("1 top", f"PR(resid_post3, L0H{head})", words), np.median(level("resid_post3", head))
        pr = {f"MLP{i}": ratio([shape(one.mlps[i]) for one in seen], writes[2]) for i in (0, 2, 3)}
        for layer, heads in ((0, (0, 7)), (2, range(1, 8)), (3, (5,))):
            pr |= {f"L{layer}H{i}": ratio([one.head(layer, i, raw) for one in seen], writes[2]) for i in heads}
        for node in set(pr) - {"MLP3"}:
            yield ("2", f"PR({node}, L0H2)", words), np.median(pr[node])
        drawn = (("1", "resid_mid2", level("resid_mid2")), ("2", "MLP2", pr["MLP2"]), ("2", "MLP3", pr["MLP3"]))
        for band, ends in (("12.5–87.5 %", (0.125, 0.875)), ("25–75 %", (0.25, 0.75))):
            for figure, name, values in drawn:
                for side, end in zip(("lower", "upper"), ends, strict=True):
                    yield (
                        (figure, f"band of PR({name}, L0H2), {side} end", f"{words}, {band}"),
                        np.quantile(values, end),
                    )


def of_hiding(seen: list[Seen]) -> Expected:
    writes, pr = [one.write for one in seen], {}
    for head in ERASERS:
        pr[head] = ratio([one.head(2, head) for one in seen], writes)
    yield ("2", "Σ PR of the six erasers", "median of sums"), np.median(sum(pr.values()))
    yield ("2", "Σ PR of the six erasers", "sum of medians"), sum(map(np.median, pr.values()))
    gone = [Seen(one.w, one.ids, hide=one.write) for one in seen]
    patched = {p: np.median(ratio([centred(one.states[p]) for one in gone], writes)) for p in PLACES[5:]}
    for place, value in patched.items():
        yield ("3a", f"PR({place}, L0H2)", "patched"), value
    for head in range(8):
        yield ("3b", f"PR(L2H{head}, L0H2)", "patched"), np.median(ratio([one.head(2, head) for one in gone], writes))
    clean = {p: np.median(ratio([centred(one.states[p]) for one in seen], writes)) for p in PLACES[4:6]}
    share = (patched["resid_mid2"] - clean["resid_mid2"]) / (clean["resid_post1"] - clean["resid_mid2"])
    yield ("3a", "causal share of the erasure", "of medians"), share


def of_prompts(seen: list[Seen]) -> Expected:
    tokenizer, w = spelling(), seen[0].w
    known = tokenizer.get_vocab()
    for number, (text, first, second, layer, head) in enumerate(PROMPTS, 1):
        one = Seen(w, np.array([1, *tokenizer(text)["input_ids"]]))
        row, words = len(one.ids) - 1, f"prompt {number}: “…{text[-24:]}”"
        a, b = known[first], known[second]
        yield ("4", "logit difference", words), one.logits[row, a] - one.logits[row, b]
        u = w["unembed.W_U"][:, a] - w["unembed.W_U"][:, b]
        for figure, node in (("4a", (0, 2)), ("4b", (layer, head))):
            name = f"DLA of L{node[0]}H{node[1]}"
            yield (figure, f"{name}, clean", words), one.direct(one.head(*node), u)[row]
            others = [one.queried(*node, row, Seen(w, other.ids[: row + 1])) for other in seen]
            read = [other / one.final_scale[row] * w["ln_final.w"] @ u for other in others]
            yield (figure, f"{name}, patched, median", words), np.median(read)


def of_corpus(seen: list[Seen]) -> Expected:
    w_u = seen[0].w["unembed.W_U"].T
    top, script = [], []
    for one in seen:
        order = np.argsort(-one.logits, axis=1)
        itself = np.broadcast_to(np.eye(len(one.ids)), one.pattern[2].shape)
        parts = (
            one.write,
            sum(one.head(2, head) for head in ERASERS),
            one.carried(one.write)[list(ERASERS)].sum(0),
            one.carried(one.write, itself)[list(ERASERS)].sum(0),
        )
        top.append([one.direct(part, w_u[order[:, 0]] - w_u[order[:, 1]]) for part in parts])
        following = w_u[one.ids[1:]] - w_u.mean(0)
        script.append([one.direct(part[:-1], following)[32:] for part in parts])
    x, raw, values, _ = np.concatenate(top, 1)
    for y, words in ((raw, "all that erasers write"), (values, "eq. 3, with attention weights")):
        yield ("5", "r(DLA writer, DLA erasers)", f"top-2 difference, {words}"), np.corrcoef(x, y)[0, 1]
    x, _, values, same = np.concatenate(script, 1)
    for y, words in ((same, "without attention weights"), (values, "with attention weights")):
        line = stats.linregress(x, y)
        yield ("5 (script)", "slope", f"next token, {words}"), line.slope
        yield ("5 (script)", "intercept", f"next token, {words}"), line.intercept
    losses = [-log_softmax(one.logits[:-1], -1)[np.arange(LENGTH - 1), one.ids[1:]] for one in seen]
    yield ("–", "loss, mean", "first 5 prompts"), np.mean(losses[:5])
    yield ("–", "loss, median", "all prompts"), np.quantile(losses, 0.5, method="lower")


def compare(got: Mapping[tuple[str, str, str], float], want: Expected) -> set[tuple[str, str, str]]:
    """Medians come from a grid whose bins are at most 0.02 · max(1, |x|) wide; everything else is exact."""
    found = set()
    for name, value in want:
        found.add(name)
        wide = {"sum of medians": 6, "of medians": 40}.get(name[2], 1)
        tolerance = 0.0101 * wide if name[0][0] in "123" else 1e-7
        assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    return found


@pytest.mark.promise("paper")
@pytest.mark.parametrize("part", [of_levels, of_hiding, of_prompts, of_corpus])
def test_ours_is_what_the_definition_of_the_model_gives(part, result, seen) -> None:
    got = claims(result)
    of_these = {of_levels: "12", of_hiding: "23", of_prompts: "4", of_corpus: "5–"}[part]
    assert {name[0][0] for name in compare(got, part(seen))} == set(of_these)


@pytest.mark.promise("paper")
def test_no_claim_is_left_without_a_slow_truth(result, seen) -> None:
    every = [name for part in (of_levels, of_hiding, of_prompts, of_corpus) for name, _ in part(seen)]
    assert sorted(every) == sorted(claims(result))


class Lens(Seen):
    """The same of one prompt out of what TransformerLens shows, with its default processing."""

    def __init__(self, cache: Mapping[str, np.ndarray], prompt: int, length: int, ids: np.ndarray, prefix: str = ""):
        at = {name: cache[name][prompt, :length] for name in cache if cache[name].shape[:1] == (len(ids),)
              and "hook" in name and "pattern" not in name and cache[name].ndim > 2}  # fmt: skip
        self.ids = ids[prompt, :length]
        self.w = {**cache, "ln_final.w": 1.0}
        self.states = {"resid_pre0": at[f"{prefix}blocks.0.hook_resid_pre"]}
        for layer in range(4):
            for place in ("mid", "post"):
                self.states[f"resid_{place}{layer}"] = at[f"{prefix}blocks.{layer}.hook_resid_{place}"]
        result = [at[f"{prefix}blocks.{layer}.attn.hook_result"] for layer in range(4)]
        self.heads = [x.swapaxes(0, 1) for x in result]
        if prefix:
            return
        self.mlps = [at[f"blocks.{layer}.hook_mlp_out"] for layer in range(4)]
        self.scale = [at[f"blocks.{layer}.ln1.hook_scale"] for layer in range(4)]
        self.pattern = [cache[f"blocks.{layer}.attn.hook_pattern"][prompt, :, :length, :length] for layer in range(4)]
        self.final_scale, self.logits = at["ln_final.hook_scale"], cache["logits"][prompt, :length]

    def values(self, name: str, normed: np.ndarray) -> np.ndarray:
        return np.einsum("td,hdk->htk", normed, self.w[f"{name}.attn.W_V"])


@pytest.fixture(scope="module")
def lens(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """What TransformerLens 3.9.0 shows of the texts and, behind them, of the paper's prompts."""
    if not ORACLE.is_file():
        pytest.skip("there is no .venv-legacy: make .venv-legacy/.done")
    place = written(tmp_path_factory.mktemp("lens") / "random-4l", erasing, **CONFIG)
    ids = np.concatenate([rows(), np.zeros((len(PROMPTS), LENGTH), dtype=np.int64)])
    for row, (text, *_) in zip(ids[N:], PROMPTS, strict=True):
        own = [1, *spelling()(text)["input_ids"]]
        row[: len(own)] = own
    np.save(place / "ids.npy", ids)
    done = subprocess.run([ORACLE, ROOT / "tests" / "legacy_oracle.py", place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(place / "oracle.npz")), ids


@pytest.mark.promise("paper")
def test_transformer_lens_gives_the_same_figures(lens, result, monkeypatch) -> None:
    """Figures 1, 2, 3 (its own intervention), 4 clean, 5 and the loss."""
    cache, ids = lens
    texts, got, checked = [Lens(cache, i, LENGTH, ids) for i in range(N)], claims(result), set()
    gone = iter([Lens(cache, i, LENGTH, ids, "hidden.") for i in range(N)])
    monkeypatch.setitem(globals(), "Seen", lambda *_, **__: next(gone))
    for part in (of_levels(texts, ["centred, heads without constant"]), of_hiding(texts), of_corpus(texts)):
        checked |= compare(got, part)
    for i, (text, first, second, layer, head) in enumerate(PROMPTS):
        one, known = Lens(cache, N + i, 1 + len(spelling()(text)["input_ids"]), ids), spelling().get_vocab()
        u = cache["unembed.W_U"][:, known[first]] - cache["unembed.W_U"][:, known[second]]
        words = f"prompt {i + 1}: “…{text[-24:]}”"
        for figure, node in (("4a", (0, 2)), ("4b", (layer, head))):
            name = (figure, f"DLA of L{node[0]}H{node[1]}, clean", words)
            checked |= compare(got, iter([(name, one.direct(one.head(*node), u)[-1])]))
    assert len(checked) == len(got) - sum(name[2].startswith("raw") for name in got) - 4 - 8


def test_nothing_but_the_prompts_needs_a_tokenizer(folder, result, proof, monkeypatch) -> None:
    monkeypatch.setattr(REPRODUCE, "verify", partial(verified, proof))
    bare = uw.reproduce(weights=view(uw.load(folder).hf), tokens=from_ids(rows()))
    missing = np.isnan(bare["ours"].values)
    assert set(bare["figure"].values[missing]) == {"4", "4a", "4b"}
    assert not set(bare["figure"].values[~missing]) & {"4", "4a", "4b"}
    of_scan = np.isin(bare["figure"].values, ["1", "1 top", "5", "5 (script)", "–"])
    np.testing.assert_array_equal(bare["ours"].values[of_scan], result["ours"].values[of_scan])
    screen = terminal.console()
    with screen.capture() as shown:
        terminal.show(bare, screen)
    assert "another text than the paper's" in " ".join(shown.get().split())
    assert bare.data.attrs["verdict"] == result.data.attrs["verdict"]


def test_figure_5_reads_as_many_prompts_as_the_paper_did(folder, proof, monkeypatch) -> None:
    real, read = REPRODUCE.corpus_dla, []

    def corpus_dla(lm: Model, tokens: Tokens, *rest: Any, **settings: Any) -> uw.Result:
        read.append(tokens.ids)
        return real(lm, tokens, *rest, **settings)

    monkeypatch.setattr(REPRODUCE, "verify", lambda *_, **__: proof)
    monkeypatch.setattr(REPRODUCE, "corpus_dla", corpus_dla)
    ids = np.concatenate([rows()[:, :36]] * 6)
    found = uw.reproduce(weights=view(uw.load(folder).hf), tokens=ids, n=34)
    for got, n in zip(read, (30, 10), strict=True):
        np.testing.assert_array_equal(got, ids[:n])
    assert found.provenance["tokens"][""]["prompts"] == 34


@pytest.mark.promise("read-back")
def test_a_reproduction_is_kept_printed_and_tabled(result, tmp_path) -> None:
    again = uw.read(result.save(tmp_path))
    assert again.data.identical(result.data)
    assert len(again.table()) == result.data.sizes["claim"]
    screen = terminal.console()
    with screen.capture() as shown:
        terminal.show(again, screen)
    lines = [" ".join(line.split()) for line in shown.get().splitlines()]
    for (figure, quantity, setting), paper, ours in zip(
        claims(result), result["paper"].values, result["ours"].values, strict=True
    ):
        line = " ".join(f"{figure} {quantity} {setting}".replace("\n", "\\n").replace("\t", "\\t").split())
        assert any(found.startswith(line) and found.endswith(f"{paper:+.3f} {ours:+.3f}") for found in lines), line
    near = int((np.abs(result["ours"] - result["paper"]) <= 0.05).sum())
    for words in (" ".join(lines), again._repr_html_()):
        assert f"{near} of {result.data.sizes['claim']} numbers within 0.05 of the paper" in words
    settings = result.provenance["settings"]
    assert (settings["name"], settings["paper_text"]) == ("gelu-4l", False)


@pytest.mark.promise("paper")
def test_the_command_prints_the_papers_numbers_beside_ours(folder, result, monkeypatch, capsys, tmp_path) -> None:
    words = [word.strip() for word in spelling().get_vocab() if word[0] == " "]
    (tmp_path / "text.txt").write_text(" ".join(np.random.default_rng(1).choice(words, 400)))
    command = ("reproduce", "gelu-4l", "--weights", folder, "--text", tmp_path / "text.txt", "-n", 6, "--length", 48)
    assert run(monkeypatch, *command, "--out", tmp_path / "out") == 0
    shown, found = capsys.readouterr().out, uw.read(tmp_path / "out")
    assert found.data.sizes["claim"] == result.data.sizes["claim"]
    assert (found.provenance["tokens"][""]["prompts"], found.provenance["tokens"][""]["length"]) == (6, 48)
    ours = claims(found)["2", "Σ PR of the six erasers", "median of sums"]
    line = next(line for line in shown.splitlines() if "median of sums" in line)
    assert line.split()[-2:] == ["-0.903", f"{ours:+.3f}"]
    assert "By executed runs without it the writer is" in " ".join(shown.split())


def test_what_cannot_be_reproduced(folder, monkeypatch, capsys, tmp_path) -> None:
    with pytest.raises(ModelError, match="nothing to reproduce by this name"):
        uw.reproduce("gpt2", weights=folder, tokens=rows())
    text = ("--text", folder / "tokenizer.json", "--length", 8)
    assert run(monkeypatch, "reproduce", "gpt2", "--weights", folder, *text) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: nothing to reproduce by this name")
    with pytest.raises(ModelError, match="this is not a model like gelu-4l"):
        uw.reproduce(weights=view(tiny.model("gpt2", 0)), tokens=rows() % 50)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64}
    with pytest.raises(ModelError, match=r"like gelu-4l\. Got: blocks whose MLP reads what their attention reads"):
        uw.reproduce(weights=view(tiny.model("phi", 0, **shape)), tokens=rows() % 50)
    three = written(tmp_path / "three-heads", n_ctx=64)
    with pytest.raises(ModelError, match=r"no L0H2, L2H2|no L2H3, L2H4, L2H5, L2H6, L2H7, L3H5"):
        uw.reproduce(weights=three, tokens=rows() % 50)
    with pytest.raises(TokensError, match="longer than the model's context"):
        uw.reproduce(weights=folder, tokens=np.ones((2, 65), dtype=int))


class Read(Exception):
    """What was read, before anything runs."""


class Hub:
    """The library `datasets`, with rows whose second token says what they are of and whose third says which."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, int]] = []

    def load_dataset(self, source: str, split: str, streaming: bool) -> Any:
        assert (split, streaming) == ("train", True)
        number = ["NeelNanda/c4-tokenized-2b", "NeelNanda/code-tokenized"].index(source)

        def shuffle(seed: int, buffer_size: int) -> Any:
            def take(n: int) -> Any:
                self.asked.append((source, (seed, buffer_size), n))
                return ({"tokens": [1, 10 + number, 20 + i, *[5] * 7]} for i in range(n))

            return SimpleNamespace(take=take)

        return SimpleNamespace(shuffle=shuffle)


def read_tokens(monkeypatch: pytest.MonkeyPatch, lm: Model, n: int) -> Tokens:
    """The paper's text as it reaches the first method."""

    def stop(lm: Model, tokens: Tokens, *_: Any, **__: Any) -> None:
        raise Read(tokens)

    monkeypatch.setattr(REPRODUCE, "verify", stop)
    with pytest.raises(Read) as stopped:
        uw.reproduce(weights=lm, n=n)
    return stopped.value.args[0]


@pytest.mark.parametrize("n", [1, 5, 10, 33, 300])
def test_the_papers_text_is_four_parts_of_c4_to_one_of_code(n, folder, monkeypatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    tokens = read_tokens(monkeypatch, uw.load(folder), n)
    c4 = n * 4 // 5
    assert [(source, n) for source, _, n in hub.asked] == [
        ("NeelNanda/c4-tokenized-2b", c4), ("NeelNanda/code-tokenized", n - c4),
    ]  # fmt: skip
    assert {settings for _, settings, _ in hub.asked} == {(5235, 10)}
    assert tokens.ids.shape == (n, 10)
    before = [(10, 20 + i) for i in range(c4)] + [(11, 20 + i) for i in range(n - c4)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5235)).tolist()
    assert [tuple(row) for row in tokens.ids[:, 1:3].tolist()] == [before[i] for i in order]
    assert "4 to 1" in tokens.source


def test_the_papers_text_that_cannot_be_had(folder, monkeypatch) -> None:
    lm = uw.load(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TokensError, match=r"the paper's text comes from the hub.*datasets"):
        uw.reproduce(weights=lm)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(TokensError, match=r"the paper's text cannot be had\. Got: no network"):
        uw.reproduce(weights=lm)
