"""Do a corpus's correlations and a search's hits say what rows computed one by one, and executed removals, say?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import tiny
import unwrite as uw
from executed import exact, hooks
from twin import Truth, carried, into_values, patterns
from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.methods import corpus
from unwrite.methods.adversarial import GENERIC, LARGE, SMALL
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.prompts.texts import windows
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.report import terminal
from unwrite.run.source.rotations import rotations

PATHS = ("raw", "values", "same_position")
PROSE = (
    "It was the best of times, it was the worst of times; 1775 was the year, and all of it was told by a clerk. " * 60
)
SHAPE: dict[str, dict[str, Any]] = {
    "gpt2": {"num_hidden_layers": 3, "num_attention_heads": 3},
    "llama": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def weights(family: str, seed: int = 0) -> Any:
    return tiny.model(family, seed, **SHAPE[family])


def ragged(
    vocabulary: int, lengths: Sequence[int] = (9, 6, 9, 2, 8), seed: int = 1, kinds: int | None = None
) -> Tokens:
    """Prompts of unequal length, of few kinds of tokens where asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, kinds or vocabulary, (len(lengths), max(lengths)), generator=generator)
    return from_ids(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def alone(hf: Any, tokens: Tokens) -> Iterator[Truth]:
    """Every prompt by itself, without padding."""
    for ids, length in zip(tokens.ids, tokens.lengths, strict=True):
        yield Truth(hf, torch.from_numpy(ids[None, :length]))


def seen_by_the_end(truth: Truth, vector: Tensor, logit: str) -> np.ndarray:
    """What a vector at every row adds to the logit asked for, the final norm held: by weights, row by row, in numpy."""
    norm, head = truth.final, truth.hf.get_output_embeddings().weight.detach().numpy()
    stream, moved = truth._clean["final"][0].numpy(), vector[0].numpy()
    gain, logits = norm.weight.detach().numpy(), truth.logits()[0].numpy()
    found = []
    for row, (x, v) in enumerate(zip(stream, moved, strict=True)):
        if logit == "top two":
            first, second = np.argsort(-logits[row], kind="stable")[:2]
            u = head[first] - head[second]
        else:
            u = head[int(truth.ids[0, row + 1])] - head.mean(0) if row + 1 < len(stream) else np.full(len(x), np.nan)
        if truth.hf.config.model_type == "gpt2":
            found.append(u @ (gain * (v - v.mean()) / np.sqrt(np.var(x) + norm.eps)))
            continue
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        one = 1 if truth.hf.config.model_type == "gemma2" else 0
        found.append(u @ ((one + gain) * v / np.sqrt(np.mean(x * x) + eps)))
    return np.array(found)


def points(
    hf: Any, tokens: Tokens, writer: str, erasers: Sequence[str], skip: int = 1, logit: str = "top two"
) -> list[np.ndarray]:
    """Of every prompt, [x, raw, values, same position] × counted row."""
    found = []
    for truth in alone(hf, tokens):
        writes, looks = truth.paper(), patterns(truth)
        write = writes[writer].expand(1, truth.ids.shape[1], -1)
        raw, values, same = (torch.zeros_like(write) for _ in range(3))
        for layer, head in (map(int, eraser[1:].split("H")) for eraser in erasers):
            raw += writes[f"L{layer}H{head}"]
            values += carried(truth, layer, write, looks[layer])[:, :, head]
            itself = torch.eye(write.shape[1], dtype=write.dtype).expand_as(looks[layer])
            same += carried(truth, layer, write, itself)[:, :, head]
        rows = np.stack([seen_by_the_end(truth, part, logit) for part in (write, raw, values, same)])[:, skip:]
        found.append(rows[:, np.isfinite(rows[0])])
    return found


def agrees(result: uw.Result, rows: list[np.ndarray]) -> None:
    x, *ys = np.concatenate(rows, 1)
    assert int(result["n"]) == len(x)
    for path, y in zip(PATHS, ys, strict=True):
        line, one = stats.linregress(x, y), result.data.sel(path=path)
        got = [float(one[name]) for name in ("correlation", "slope", "intercept")]
        np.testing.assert_allclose(got, [line.rvalue, line.slope, line.intercept], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(one["sample_y"].values, y, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(result["sample_x"].values, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_is_drawn_of_many_positions_is_spread_over_prompts_and_positions(monkeypatch, batch) -> None:
    lm = view(weights("gpt2"))
    tokens = ragged(lm.vocabulary)
    whole = uw.corpus_dla(lm, tokens, "L0H1", ["L1H0"], skip=0)
    monkeypatch.setattr(corpus, "DRAWN", 10)
    some = uw.corpus_dla(lm, tokens, "L0H1", ["L1H0"], skip=0, batch=batch)
    place = [(i, p) for i, n in enumerate(tokens.lengths) for p in range(n)]
    kept = [k for k, (i, p) in enumerate(place) if (i + p) % 4 == 0]  # 34 positions, every fourth
    np.testing.assert_allclose(some["sample_x"], whole["sample_x"].values[kept], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(some["sample_y"], whole["sample_y"].values[:, kept], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(some["correlation"], whole["correlation"], rtol=1e-5)


@pytest.mark.parametrize("logit", ["top two", "next token"])
@pytest.mark.parametrize("family", SHAPE)
def test_fits_are_those_of_rows_computed_one_by_one(family, logit) -> None:
    hf = weights(family)
    tokens, erasers = ragged(hf.config.vocab_size), ["L1H0", "L2H2", "L1H2"]
    with exact():
        result = uw.corpus_dla(view(hf), tokens, "L0H1", erasers, logit=logit, batch=2)
        agrees(result, points(hf, tokens, "L0H1", erasers, logit=logit))


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize(("family", "writer"), [("gpt2", "pos_embed"), ("llama", "embed"), ("gemma2", "MLP0")])
def test_any_node_can_be_the_writer_and_rows_are_left_out(family, writer, skip) -> None:
    hf = weights(family, 1)
    tokens = ragged(hf.config.vocab_size)
    with exact():
        result = uw.corpus_dla(view(hf), tokens, writer, ["L1H1"], skip, batch=3)
        agrees(result, points(hf, tokens, writer, ["L1H1"], skip))


def test_a_bias_and_the_constant_of_heads_belong_to_no_eraser() -> None:
    """In the raw convention an eraser has its constant part: the same slope through values, another one of all."""
    hf = weights("gpt2", 2)
    tokens = ragged(hf.config.vocab_size)
    paper, raw = (uw.corpus_dla(view(hf, convention=name), tokens, "MLP0", ["L1H0"]) for name in ("paper", "raw"))
    assert float(raw["slope"][0]) != pytest.approx(float(paper["slope"][0]), abs=1e-3)
    np.testing.assert_allclose(raw["slope"][1:], paper["slope"][1:], atol=1e-12)


@contextmanager
def hidden_from_values(truth: Truth, layer: int, write: Tensor) -> Iterator[None]:
    """Inside the `with`, the values of one layer are computed as if `write` were not in the stream; norms are held."""
    block, lost = truth.blocks[layer], into_values(truth, layer, write)
    if truth.hf.config.model_type == "gpt2":
        rows = truth.hf.config.n_embd

        def less(module: Any, args: Any, output: Tensor) -> Tensor:
            value = output[..., -rows:] - lost @ module.weight[:, -rows:]
            return torch.cat([output[..., :-rows], value], -1)

        handles = [block.attn.c_attn.register_forward_hook(less)]
    else:
        handles = [block.self_attn.v_proj.register_forward_pre_hook(lambda _, args: (args[0] - lost,))]
    if truth._post_norm:
        factor = truth._clean["after", layer] / truth._clean["before", layer]
        handles.append(block.post_attention_layernorm.register_forward_hook(lambda _, args, output: args[0] * factor))
    with hooks(*handles):
        yield


@torch.no_grad()
def attention_output(truth: Truth, layer: int) -> Tensor:
    """What a block's attention hands to the stream, in a run of the model as it is now."""
    block, seen = truth.blocks[layer], []
    module = block.post_attention_layernorm if truth._post_norm else truth._out(block)
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    truth.hf(input_ids=truth.ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", SHAPE)
def test_through_values_is_what_hiding_the_writer_from_them_changes(family) -> None:
    """The paper's intervention, executed with plain hooks on the user's model."""
    hf = weights(family, 3)
    tokens, rows = ragged(hf.config.vocab_size), []
    heads = [f"L2H{head}" for head in range(hf.config.num_attention_heads)]
    with exact():
        for truth in alone(hf, tokens):
            write = truth.paper()["L0H0"]
            before = attention_output(truth, 2)
            with torch.no_grad(), hidden_from_values(truth, 2, write):
                after = attention_output(truth, 2)
            rows.append(np.stack([seen_by_the_end(truth, part, "top two")[1:] for part in (write, before - after)]))
        x, y = np.concatenate(rows, 1)
        assert np.abs(y).max() > 1e-4
        one = uw.corpus_dla(view(hf), tokens, "L0H0", heads).data.sel(path="values")
    line = stats.linregress(x, y)
    assert float(one["correlation"]) == pytest.approx(line.rvalue, rel=1e-8)
    assert float(one["slope"]) == pytest.approx(line.slope, rel=1e-8)
    assert float(one["intercept"]) == pytest.approx(line.intercept, rel=1e-6)


@pytest.mark.promise("batches")
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_batches_change_nothing(batch) -> None:
    hf = weights("llama", 2)
    tokens = ragged(hf.config.vocab_size)
    one, two = (uw.corpus_dla(view(hf), tokens, "L0H1", ["L1H0", "L2H0"], batch=size).data for size in (3, batch))
    for name in one:
        # Weights that resampling gives to prompts do not depend on batches.
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name)


def test_the_interval_is_that_of_resampled_clusters() -> None:
    hf = weights("gpt2", 4)
    plain = ragged(hf.config.vocab_size, (9, 6, 9, 5, 8, 9, 9, 4, 9, 7, 9, 6) * 2, seed=2)
    tokens = Tokens(plain.ids, plain.lengths, np.arange(24) // 2)
    result = uw.corpus_dla(view(hf), tokens, "L0H0", ["L1H1", "L2H0"])
    rows, rng = points(hf, tokens, "L0H0", ["L1H1", "L2H0"]), np.random.default_rng(8)
    draws = []
    for _ in range(3000):
        taken = [rows[2 * i + k] for i in rng.integers(12, size=12) for k in (0, 1)]
        draws.append(np.corrcoef(np.concatenate(taken, 1))[0, 1:])
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    np.testing.assert_allclose(result["correlation_low"], low, atol=0.04)
    np.testing.assert_allclose(result["correlation_high"], high, atol=0.04)
    assert (high - low).min() > 0.3


def test_one_prompt_has_no_interval() -> None:
    hf = weights("gpt2", 4)
    result = uw.corpus_dla(view(hf), ragged(hf.config.vocab_size, (9,)), "L0H0", ["L1H1"])
    assert np.isnan(result["correlation_low"]).all()
    assert np.isfinite(result["correlation"]).all()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def known(request: pytest.FixtureRequest) -> tuple[Model, Tokens]:
    truth = planted(request.param, dtype=torch.float64)
    return view(truth.hf, truth.tokenizer), windows(PROSE, truth.tokenizer, n=8, length=64)


# A planted eraser reads its own row alone and writes −g of the write that it reads, so y = −g · x at every row: slope
# −g without intercept, with pattern or without. Four heads of 0.2 each: −0.8. The backup reads −0.9 of the write, too,
# and writes the other 0.9 from the token: all that it writes is nothing.
@pytest.mark.promise("planted")
@pytest.mark.parametrize(
    ("writer", "erasers", "slopes"),
    [
        ("L0H0", ["L1H0"], (-0.9, -0.9, -0.9)),
        ("L0H1", ["L1H1", "L1H2", "L1H3", "L1H4"], (-0.8, -0.8, -0.8)),
        ("L0H1", ["L1H2"], (-0.2, -0.2, -0.2)),
        ("L0H3", ["L2H0"], (0.0, -0.9, -0.9)),
        ("L0H4", ["L1H5"], (-0.4, 0.0, 0.0)),
        ("L0H0", ["L1H5"], (None, 0.0, 0.0)),
    ],
)
def test_planted_slopes(known, writer, erasers, slopes) -> None:
    result = uw.corpus_dla(*known, writer, erasers)
    for path, slope in zip(PATHS, slopes, strict=True):
        if slope is not None:
            one = result.data.sel(path=path)
            # The model's own norms have an epsilon and its attention a little left over for other rows.
            assert float(one["slope"]) == pytest.approx(slope, abs=2e-3), path
            assert float(one["intercept"]) == pytest.approx(0, abs=2e-3)
            assert slope == 0 or float(one["correlation"]) == pytest.approx(-1, abs=1e-3)


def test_a_result_of_a_corpus_is_kept_and_says_what_it_means(known, tmp_path) -> None:
    result = uw.corpus_dla(*known, "L0H1", ["L1H1", "L1H2"])
    again = uw.read(result.save(tmp_path))
    assert again.data.identical(result.data)
    assert list(again.table()["path"]) == list(PATHS)
    screen = terminal.console()
    with screen.capture() as shown:
        terminal.show(again, screen)
    words = " ".join(shown.get().split())
    assert "L1H1 L1H2 take back +0.40" in words
    assert "-1.000 [-1.000, -1.000]" in words
    assert f"{int(result['n'])} positions" in words


def test_requests_to_a_corpus_that_cannot_be_honoured() -> None:
    hf = weights("gpt2")
    lm, tokens = view(hf), ragged(hf.config.vocab_size)
    with pytest.raises(NodeError, match="no node L9H9"):
        uw.corpus_dla(lm, tokens, "L9H9", ["L1H0"])
    with pytest.raises(NodeError, match="no node L1H7"):
        uw.corpus_dla(lm, tokens, "L0H0", ["L1H7"])
    for eraser in ("L0H1", "L1H0", "MLP2", "L2.bias"):
        with pytest.raises(NodeError, match=rf"{eraser} cannot read L1H0 through values.*heads of layers 2 to 2"):
            uw.corpus_dla(lm, tokens, "L1H0", ["L2H0", eraser])
    with pytest.raises(NodeError, match="no node was named"):
        uw.corpus_dla(lm, tokens, "L0H0", [])
    with pytest.raises(NumericError, match="logit is unknown"):
        uw.corpus_dla(lm, tokens, "L0H0", ["L1H0"], logit="last")
    with pytest.raises(NumericError, match="skip leaves no position"):
        uw.corpus_dla(lm, tokens, "L0H0", ["L1H0"], skip=9)
    with pytest.raises(TokensError, match="outside the model's vocabulary"):
        uw.corpus_dla(lm, np.array([[10**6, 1, 2]]), "L0H0", ["L1H0"])


# The search, against a loop over rows: each prompt cut after the row and run anew with and without the write.


class Slow:
    """A head or MLP of GPT-2 or Llama by the raw convention, and runs in which something else stands for its write."""

    def __init__(self, hf: Any, writer: str):
        self.hf, self.width = hf, hf.config.hidden_size // hf.config.num_attention_heads
        gpt2 = hf.config.model_type == "gpt2"
        blocks = hf.transformer.h if gpt2 else hf.model.layers
        self.final = hf.transformer.ln_f if gpt2 else hf.model.norm
        block = blocks[int(writer.lstrip("LMP").split("H")[0])]
        self.head = None if writer.startswith("MLP") else int(writer.split("H")[1])
        if self.head is None:
            self.module = block.mlp
            return
        self.module = block.attn.c_proj if gpt2 else block.self_attn.o_proj
        if not gpt2:
            self.width = hf.config.head_dim
        matrix = self.module.weight if gpt2 else self.module.weight.T
        self.rows = slice(self.head * self.width, (self.head + 1) * self.width)
        self.out = matrix[self.rows]

    @torch.no_grad()
    def run(self, ids: Tensor, hook: Any = None, before: bool = False) -> tuple[Tensor, Tensor]:
        """Logits and the final stream of one prompt [position, ·]."""
        seen = []
        handles = [self.final.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))]
        if hook is not None:
            add = self.module.register_forward_pre_hook if before else self.module.register_forward_hook
            handles.append(add(hook))
        try:
            return self.hf(input_ids=ids[None], use_cache=False).logits[0], seen[0]
        finally:
            for handle in handles:
                handle.remove()

    def write(self, ids: Tensor) -> Tensor:
        """What the node writes [position, d_model]."""
        seen: list[Tensor] = []
        if self.head is None:
            self.run(ids, lambda _, args, output: seen.append(output[0].clone()))
            return seen[0]
        self.run(ids, lambda _, args: seen.append(args[0][0, :, self.rows].clone()), before=True)
        return (seen[0] @ self.out).detach()

    def silenced(self, ids: Tensor) -> Tensor:
        """The logits of a run in which it writes nothing at any row."""
        if self.head is None:
            return self.run(ids, lambda _, args, output: output * 0)[0]

        def silence(_: nn.Module, args: Any) -> Any:
            z = args[0].clone()
            z[..., self.rows] = 0
            return (z,)

        return self.run(ids, silence, before=True)[0]

    def without(self, ids: Tensor, vector: Tensor) -> Tensor:
        """The logits of a run in which its module writes less by `vector` at every row."""
        return self.run(ids, lambda _, args, output: output - vector)[0]

    def direct(self, stream: Tensor, vector: Tensor, first: int, second: int) -> float:
        """By the final norm's weights and the unembedding."""
        x, v, norm = stream.numpy(), vector.numpy(), self.final
        u = (self.hf.lm_head.weight[first] - self.hf.lm_head.weight[second]).detach().numpy()
        gain = norm.weight.detach().numpy()
        if self.hf.config.model_type == "gpt2":
            return float(u @ (gain * (v - v.mean()) / np.sqrt(np.var(x) + norm.eps)))
        return float(u @ (gain * v / np.sqrt(np.mean(x * x) + norm.variance_epsilon)))


def searched(hf: Any, tokens: Tokens, writer: str, skip: int, turn: Tensor | None = None) -> list[dict[str, Any]]:
    """Every row of every prompt: what is read, what is executed, and whether that is a hit. Turned ones not cut."""
    slow = Slow(hf, writer)
    prompts = [torch.from_numpy(ids[:n]) for ids, n in zip(tokens.ids, tokens.lengths, strict=True)]
    writes = [slow.write(ids) if turn is None else slow.write(ids) @ turn for ids in prompts]
    rows = []
    for prompt, (ids, write) in enumerate(zip(prompts, writes, strict=True)):
        whole = None if turn is None else (*slow.run(ids), slow.without(ids, write))
        for row in range(skip, len(ids)):
            cut = ids[: row + 1]
            logits, stream, gone = (x[row] for x in whole or (*slow.run(cut), slow.silenced(cut)))
            first, second = logits.topk(2).indices.tolist()
            difference = float(logits[first] - logits[second])
            total = difference - float(gone[first] - gone[second])
            typical = torch.stack([other[row] for other in writes if len(other) > row]).mean(0)
            direct, mean = (slow.direct(stream, part, first, second) for part in (write[row], typical))
            large = abs(direct) > 0 and abs(direct) >= LARGE * difference
            hit = large and abs(total) <= SMALL * abs(direct) and abs(direct - mean) <= SMALL * abs(direct)
            rows.append(
                {
                    "prompt": prompt, "row": row, "answer_id": first, "against_id": second, "said": tuple(cut.tolist()),
                    "logit_diff": difference, "direct": direct, "direct_mean": mean, "total": total, "hit": hit,
                }
            )  # fmt: skip
    return rows


def best(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The most misleading row of every prompt, of those each text once, the most misleading first."""
    prompts: dict[int, dict[str, Any]] = {}
    for row in sorted((row for row in rows if row["hit"]), key=lambda row: abs(row["total"]) - abs(row["direct"])):
        prompts.setdefault(row["prompt"], row)
    texts: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in prompts.values():
        texts.setdefault(row["said"], row)
    return [*texts.values()][:n]


def alike(vocabulary: int, seed: int) -> Tokens:
    """Prompts of few kinds of tokens, two of them the same: a position's mean is near what a prompt writes there."""
    some = ragged(vocabulary, (12, 12, 9, 12, 12, 7, 12, 12), seed, kinds=5)
    return some.take([0, 1, 1, 2, 3, 4, 5, 6, 7])


SEARCHES = [("gpt2", 0, "L1H2"), ("llama", 3, "L0H1"), ("llama", 7, "MLP0")]


@pytest.mark.parametrize(("family", "seed", "writer"), SEARCHES)
def test_hits_and_rates_are_those_of_a_loop_over_rows(family, seed, writer) -> None:
    hf = weights(family, seed)
    tokens, other = alike(hf.config.vocab_size, seed), ragged(hf.config.vocab_size, (9, 9, 5, 9), seed + 9, kinds=6)
    with exact():
        lm = view(hf, convention="raw")
        found = uw.adversarial(lm, tokens, writer, other, n=3, skip=1, batch=2)
        rows = [searched(hf, part, writer, 1) for part in (tokens, other)]
        turned = [[searched(hf, part, writer, 1, turn) for turn in rotations(lm, GENERIC)] for part in (tokens, other)]
    want = best(rows[0], 3)
    assert found.data.sizes["hit"] == len(want)
    for i, one in enumerate(want):
        for name in ("prompt", "row", "answer_id", "against_id"):
            assert int(found[name][i]) == one[name]
        for name, tolerance in (("logit_diff", 1e-9), ("direct", 1e-9), ("total", 1e-9), ("direct_mean", 1e-9)):
            assert float(found[name][i]) == pytest.approx(one[name], rel=tolerance, abs=1e-11), name
        ids = found["ids"][i].values
        assert tuple(ids[ids >= 0]) == one["said"]
        assert (ids[len(one["said"]) :] == -1).all()
    for text, own, generic in zip(("searched", "held_out"), rows, turned, strict=True):
        assert int(found["hits"].sel(text=text, source="writer")) == sum(row["hit"] for row in own)
        assert int(found["hits"].sel(text=text, source="generic")) == sum(
            row["hit"] for part in generic for row in part
        )
        counted = found["positions"].sel(text=text).values
        assert counted.tolist() == [len(own), GENERIC * len(own)]
        np.testing.assert_allclose(found["rate"].sel(text=text), found["hits"].sel(text=text) / counted)


@pytest.mark.parametrize(("family", "seed", "writer"), [("gpt2", 6, "L0H0"), ("llama", 0, "L1H2")])
def test_a_hit_is_one_when_its_prompt_ends_there(family, seed, writer) -> None:
    hf = weights(family, seed)
    lm = view(hf)
    found = uw.adversarial(lm, alike(hf.config.vocab_size, seed), writer, n=2).data
    assert found.sizes["hit"] == 2
    score = []
    for i in range(found.sizes["hit"]):
        hit = found.isel(hit=i)
        ids = hit["ids"].values
        asked = uw.dla(lm, ids[ids >= 0][None], at="all").data.sel(node=writer).isel(prompt=0)
        for name in ("answer_id", "against_id"):
            assert int(asked[name]) == int(hit[name])
        for name in ("direct", "total", "logit_diff"):
            assert float(asked[name]) == pytest.approx(float(hit[name]), rel=1e-6, abs=1e-7)
        direct = abs(float(asked["direct"]))
        assert direct >= LARGE * float(asked["logit_diff"]) > 0
        assert abs(float(asked["total"])) <= SMALL * direct
        assert abs(float(hit["direct"] - hit["direct_mean"])) <= SMALL * direct
        score.append(direct - abs(float(asked["total"])))
    assert score == sorted(score, reverse=True)


@pytest.mark.promise("batches")
@pytest.mark.parametrize("batch", [1, 5])
def test_a_search_does_not_depend_on_batches_and_gives_n_different_prompts(batch) -> None:
    hf = weights("llama", 0)
    lm, tokens = view(hf), alike(hf.config.vocab_size, 0)
    every, some = (uw.adversarial(lm, tokens, "L1H2", n=n, batch=size).data for n, size in ((99, 3), (2, batch)))
    texts = [tuple(ids[ids >= 0]) for ids in every["ids"].values]
    assert len(set(texts)) == len(texts) == every.sizes["hit"] > 2
    assert len(set(every["prompt"].values.tolist())) == every.sizes["hit"]
    assert not {1, 2} <= set(every["prompt"].values.tolist())  # these are the same text
    assert some.sizes["hit"] == 2
    np.testing.assert_array_equal(some["hits"], every["hits"])
    for name in ("prompt", "row", "direct", "direct_mean", "total"):
        np.testing.assert_allclose(some[name], every[name][:2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("writer", "often"), [("L0H0", True), ("L0H1", True), ("L0H4", False), ("L0H5", False)])
def test_a_planted_erased_write_is_found_far_more_often_than_a_turned_one(known, writer, often) -> None:
    lm, tokens = known
    other = windows(PROSE[::-1], lm.tokenizer, n=4, length=64)
    found = uw.adversarial(lm, tokens, writer, other)
    for text in ("searched", "held_out"):
        own, generic = (float(found["rate"].sel(text=text, source=source)) for source in ("writer", "generic"))
        assert own > 4 * generic > 0 if often else own < 0.01
    assert found.data.sizes["hit"] == (4 if often else 0)


def test_a_search_that_finds_nothing_is_a_whole_result(known, tmp_path) -> None:
    lm, tokens = known
    found, other = uw.adversarial(lm, tokens, "L0H4", tokens), uw.adversarial(lm, tokens, "L0H0", tokens)
    assert found.data.sizes["hit"] == 0
    assert set(found.data.variables) == set(other.data.variables)
    assert {name: part.dims for name, part in found.data.items()} == {n: p.dims for n, p in other.data.items()}
    for result in (found, other):
        again = uw.read(result.save(tmp_path))
        assert again.data.identical(result.data)
        again.save_table(tmp_path / "table.csv")
        assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + result.data.sizes["hit"]
        screen = terminal.console()
        with screen.capture() as shown:
            terminal.show(again, screen)
        rate = float(result["rate"].sel(text="searched", source="writer"))
        assert f"{rate:.2%} of positions searched" in " ".join(shown.get().split())


def test_a_search_of_one_text_has_no_held_out_rate(known) -> None:
    lm, tokens = known
    found = uw.adversarial(lm, tokens, "L0H0", skip=5)
    assert list(found["text"].values) == ["searched"]
    assert int(found["positions"].sel(text="searched", source="writer")) == len(tokens) * (tokens.length - 5)
    assert found["row"].min() >= 5


def test_requests_to_a_search_that_cannot_be_honoured(known) -> None:
    lm, tokens = known
    with pytest.raises(NodeError, match="no node L9H9"):
        uw.adversarial(lm, tokens, "L9H9")
    with pytest.raises(NumericError, match="skip leaves no position"):
        uw.adversarial(lm, tokens, "L0H0", skip=64)
    with pytest.raises(TokensError, match="outside the model's vocabulary"):
        uw.adversarial(lm, tokens, "L0H0", np.array([[300, 1]]))


def test_a_row_that_no_other_prompt_reaches_is_no_hit(known) -> None:
    lm, tokens = known
    assert uw.adversarial(lm, tokens.take([0]), "L0H0").data.sizes["hit"] == 0
