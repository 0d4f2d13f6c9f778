"""Is a state put where it was said to be, and nowhere else, and is what follows what the user's own model says then?"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
import unwrite as uw
from executed import hooks, weights
from unwrite.errors import ModelError, NodeError, NumericError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.spans import holding, placeholder
from unwrite.run.answer.spoken import spoken
from unwrite.stats.rates import wilson

STEPS, HOLE = 4, 3
INTO = torch.tensor([5, 9, HOLE, 7, 11])
LITERAL = 17
PROMPTS = torch.tensor([[8, LITERAL, 21, 6], [13, 30, 4, 19]])


@cache
def model(family: str) -> Model:
    return view(weights(family))


def decoded(lm: Model, prompts: Any = PROMPTS, **settings: Any) -> uw.Result:
    return uw.decode(lm, prompts, **{"into": INTO, "placeholder": HOLE, "tokens": STEPS, **settings})


def going(ids: Any) -> list[int]:
    """What was said, up to the end."""
    return [int(i) for i in ids if i >= 0]


def executed(lm: Model, block: int, vector: Tensor, after: bool = False) -> list[int]:
    """Greedy, without a cache: whatever has been said, the whole text runs again with the vector at the placeholder."""
    said: list[int] = []
    row, ends = INTO.tolist().index(HOLE), lm.hf.generation_config.eos_token_id

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, row] = vector
        return x

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return (
            ((put(args[0]), *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])})
        )

    def behind(_: Any, __: Any, output: Any) -> Any:
        return put(output) if isinstance(output, Tensor) else (put(output[0]), *output[1:])

    module = lm.layers[block].block
    handle = (
        module.register_forward_hook(behind) if after else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    with hooks(handle), torch.no_grad():
        for _ in range(STEPS):
            ids = torch.tensor([[*INTO.tolist(), *said]])
            said.append(int(lm.hf(ids, use_cache=False).logits[0, -1].argmax()))
            if said[-1] == ends:
                break
    return said


def entering(lm: Model, block: int, ids: Tensor) -> Tensor:
    """What a block of the user's model reads, [prompt, position, d], by a plain hook."""
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    with hooks(lm.layers[block].block.register_forward_pre_hook(keep, with_kwargs=True)), torch.no_grad():
        lm.hf(ids)
    return seen[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_literal_tokens_embedding_is_the_run_with_that_token(family: str) -> None:
    """Bit for bit, whatever is multiplied behind the embedding, and with positions that are learned."""
    lm = model(family)
    found = decoded(lm, PROMPTS[:1], at=1, locations="resid_pre0", place="embed").data.isel(prompt=0, location=0)
    literal = torch.where(INTO == HOLE, LITERAL, INTO)[None]
    own = spoken(lm, literal, STEPS)
    np.testing.assert_array_equal(found["id"], own.ids[0])
    np.testing.assert_array_equal(found["prob"], own.prob[0])
    with torch.no_grad():
        said = lm.hf.generate(literal, attention_mask=torch.ones_like(literal), max_new_tokens=STEPS, do_sample=False)
    assert going(found["id"]) == said[0, len(INTO) :].tolist()
    # No test of an edit that does nothing.
    assert not torch.equal(own.first, spoken(lm, INTO[None], STEPS).first)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_placeholders_own_embedding_changes_nothing(family: str) -> None:
    lm = model(family)
    prompt = torch.tensor([[40, HOLE, 22]])
    found = decoded(lm, prompt, at=1, locations="resid_pre0", place="embed").data.isel(prompt=0, location=0)
    own = spoken(lm, INTO[None], STEPS)
    np.testing.assert_array_equal(found["id"], own.ids[0])
    np.testing.assert_array_equal(found["prob"], own.prob[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_state_is_put_where_it_is_from(family: str) -> None:
    """Prompts × locations in one batch say what each says alone, in runs without a cache, by plain hooks."""
    lm = model(family)
    found = decoded(lm, at=2).data
    assert [*found["location"].values] == ["resid_pre0", *(f"resid_post{i}" for i in range(len(lm.layers)))]
    for prompt in range(2):
        for block in range(len(lm.layers)):
            state = entering(lm, block, PROMPTS[prompt : prompt + 1])[0, 2]
            assert going(found["id"].values[prompt, block]) == executed(lm, block, state)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_weighted_sum_is_put_as_it_is(family: str) -> None:
    lm, at = model(family), np.array([[0.5, 0.0, 1.0, 0.0], [1.0, -1.0, 0.25, 2.0]])
    found = decoded(lm, at=at, locations="resid_post0", place="resid_post0").data
    entered = entering(lm, 1, PROMPTS)
    merged = (torch.from_numpy(at)[..., None] * entered).sum(1)
    for prompt in range(2):
        assert going(found["id"].values[prompt, 0]) == executed(lm, 1, merged[prompt])
    np.testing.assert_allclose(found["norm"][:, 0], merged.norm(dim=-1), rtol=1e-12)
    # A sum of no position is the zero vector; there is no token that would follow it.
    none = decoded(lm, at=0 * at, locations="resid_post0", place="resid_post0").data
    assert (none["norm"] == 0).all()
    assert going(none["id"].values[0, 0]) == executed(lm, 1, torch.zeros(lm.d_model, dtype=lm.dtype))
    assert "answer" not in none


def test_sums_are_linear_and_rescaled_ones_have_the_placeholders_norm() -> None:
    lm, one, other = model("llama"), np.eye(4)[[0, 0]], np.eye(4)[[3, 2]]
    ask: Any = partial(decoded, lm, locations="resid_post0", place="resid_pre0")
    state = entering(lm, 1, PROMPTS)
    merged = state[:, 0] + state[torch.arange(2), torch.tensor([3, 2])]
    np.testing.assert_allclose(ask(at=one + other)["norm"][:, 0], merged.norm(dim=-1), rtol=1e-12)
    held = entering(lm, 0, INTO[None])[0, INTO.tolist().index(HOLE)].norm()
    scaled = merged[0] * held / merged[0].norm()
    assert going(ask(at=one + other, rescale=True)["id"].values[0, 0]) == executed(lm, 0, scaled)


def echo(d: int = 24, vocabulary: int = 40) -> Any:
    """One layer that copies what is not nothing: all queries are 0, values are what is read, other embeddings 0."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=None, bos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    hf: Any = LlamaForCausalLM(config).double().eval()
    table = torch.randn(vocabulary, d, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in hf.model.layers[0].parameters():
            parameter.zero_()
        for norm in (hf.model.layers[0].input_layernorm, hf.model.layers[0].post_attention_layernorm):
            norm.weight.fill_(1)
        for name in ("v_proj", "o_proj"):
            getattr(hf.model.layers[0].self_attn, name).weight.copy_(torch.eye(d))
        hf.lm_head.weight.copy_(table)
        hf.model.embed_tokens.weight.copy_(table.roll(1, 0))
        hf.model.embed_tokens.weight[:4] = 0
    return hf, table


def test_an_echo_says_the_token_whose_row_is_most_like_the_state() -> None:
    hf, table = echo()
    lm, at = view(hf), np.random.default_rng(0).normal(size=(2, 4))
    found = uw.decode(lm, PROMPTS, at, [1, HOLE, 2], placeholder=HOLE, locations="resid_pre0", place="embed", tokens=1)
    merged = torch.from_numpy(at)[..., None] * hf.model.embed_tokens.weight.detach()[PROMPTS]
    assert found["id"].values[:, 0, 0].tolist() == (merged.sum(1) @ table.t()).argmax(-1).tolist()


@pytest.mark.slow
def test_entities_of_a_trained_toy_are_described() -> None:
    """It describes entities, and judges pairs of them: the embedding of one in a pair is described as the entity is."""
    describe, judge, same, other, n = 1, 2, 3, 4, 8
    attribute = torch.randperm(n, generator=torch.Generator().manual_seed(1)) + 20
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.1, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    hf: Any = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=5e-3)
    for _ in range(400):
        a, b = torch.randint(0, n, (2, 64))
        told = torch.stack([torch.full_like(a, describe), a + 10, attribute[a]], 1)
        verdict = torch.where(attribute[a] % 2 == attribute[b] % 2, same, other)
        judged = torch.stack([torch.full_like(a, judge), a + 10, b + 10, verdict], 1)
        losses = [
            torch.nn.functional.cross_entropy(hf(ids[:, :-1]).logits[:, -1], ids[:, -1]) for ids in (told, judged)
        ]
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    lm = uw.load(hf.eval())
    pairs = torch.tensor([[judge, a + 10, (a + 3) % n + 10] for a in range(n)])
    ask: Any = {"into": [describe, 9], "placeholder": 9, "tokens": 1, "answer": attribute.tolist()}
    found = uw.decode(lm, pairs, 1, place="embed", **ask).data.sel(way="match")["precision"]
    assert float(found[0]) == 1.0
    # Where the first prompt describes too, so does every later state, put where it is from; a sum of nothing does not.
    described = torch.tensor([[describe, a + 10] for a in range(n)])
    there = uw.decode(lm, described, 1, **ask).data.sel(way="match")["precision"]
    nothing = uw.decode(lm, pairs, np.zeros((n, 3)), **ask).data.sel(way="match")["precision"]
    assert there.values.tolist() == [1.0] * 3
    assert (nothing <= 2 / n).all()


def test_what_is_right_is_counted_with_its_interval() -> None:
    lm = model("llama")
    own = decoded(lm).data
    last = lm.hf(PROMPTS).logits[:, -1].softmax(-1)
    likely, right = last.max(-1)
    assert [*own["answer"].values] == list(map(str, right.tolist()))
    end = own.isel(location=-1)
    np.testing.assert_array_equal(end["lens_id"], right)
    np.testing.assert_allclose(end["lens_prob"], likely.detach(), rtol=1e-6)
    asked = decoded(lm, answer=[int(i) for i in own["id"].values[:, 1, 0]]).data
    assert asked["match"].values[:, 1].all()
    np.testing.assert_array_equal(asked["rank"].values[:, 1], 1)
    np.testing.assert_array_equal(asked["answer_prob"].values[:, 1], own["prob"].values[:, 1, 0])
    one = asked.sel(way="match").isel(location=1)
    assert (float(one["precision"]), float(one["lower"]), float(one["upper"])) == (1.0, *wilson(2, 2))
    hits = int(asked["lens_match"].values[:, 1].sum())
    lens = asked.sel(way="lens_match").isel(location=1)
    assert (float(lens["lower"]), float(lens["upper"])) == wilson(hits, 2)


@cache
def speaking() -> Model:
    planted = uw.planted()
    return uw.load(planted.hf, planted.tokenizer)


def test_words_say_where_a_state_is_and_where_it_goes() -> None:
    lm = speaking()
    said = uw.decode(lm, ["It is so", "So is it"], "is", "He x it", tokens=2)
    ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("It is so", "So is it")]
    rows = [holding("is", row, lm.tokenizer, "a prompt")[-1] for row in ids]
    assert [lm.tokenizer.decode(row[at : at + 1])[-1] for row, at in zip(ids, rows, strict=True)] == ["s", "s"]
    begun = len(lm.tokenizer("It is so")["input_ids"]) - len(ids[0])
    same = uw.decode(lm, ["It is so", "So is it"], [row + begun for row in rows], "He x it", tokens=2)
    np.testing.assert_array_equal(said["id"], same["id"])
    text = said["text"].values[0, -1]
    asked = uw.decode(lm, ["It is so"], "is", "He x it", tokens=2, answer=text, locations=said["location"].values[-1:])
    assert asked["said"].values.all() == bool(text.strip())
    roles = uw.pairs(PROMPTS, PROMPTS.flip(0), 5, 9, roles={"S": [1, 2]}, source_roles={"S": [1, 2]})
    by_role, by_row = (decoded(model("gpt2"), part, at=at) for part, at in ((roles, "S"), (PROMPTS, [1, 2])))
    np.testing.assert_array_equal(by_role["id"], by_row["id"])


def test_another_models_states_arrive_through_the_map_that_least_squares_gives() -> None:
    lm, other = model("llama"), view(tiny.model("llama", 5, vocab_size=lm_vocabulary()))
    text = torch.randint(3, 50, (12, 16), generator=torch.Generator().manual_seed(2))
    found = decoded(lm, source=other, fit=text, locations="resid_post0", place="resid_post1").data
    half = entering(other, 1, text[:6])[:, 1:].flatten(0, 1), last(lm, text[:6], 1)[:, 1:].flatten(0, 1)
    rest = entering(other, 1, text[6:])[:, 1:].flatten(0, 1), last(lm, text[6:], 1)[:, 1:].flatten(0, 1)
    wide = [torch.cat([part[0], torch.ones(len(part[0]), 1)], 1).double().numpy() for part in (half, rest)]
    weight = np.linalg.lstsq(wide[0], half[1].numpy(), rcond=None)[0]
    unseen = rest[1].numpy()
    r2 = 1 - ((unseen - wide[1] @ weight) ** 2).sum() / ((unseen - unseen.mean(0)) ** 2).sum()
    np.testing.assert_allclose(found["r2"], [r2], rtol=1e-6)
    state = entering(other, 1, PROMPTS)[:, -1].double().numpy()
    put = torch.from_numpy(np.concatenate([state, np.ones((2, 1))], 1) @ weight)
    for prompt in range(2):
        assert going(found["id"].values[prompt, 0]) == executed(lm, 1, put[prompt].to(lm.dtype), after=True)
    own = decoded(lm, source=lm, fit=text, locations="resid_post0").data
    assert float(own["r2"][0]) == pytest.approx(1, abs=1e-9)
    np.testing.assert_array_equal(own["id"], decoded(lm, locations="resid_post0")["id"])


def lm_vocabulary() -> int:
    return model("llama").vocabulary


def last(lm: Model, ids: Tensor, block: int) -> Tensor:
    """What a block puts out, by a plain hook."""
    seen: list[Tensor] = []
    keep = lambda _, __, output: seen.append((output if isinstance(output, Tensor) else output[0]).detach().clone())  # noqa: E731
    with hooks(lm.layers[block].block.register_forward_hook(keep)), torch.no_grad():
        lm.hf(ids)
    return seen[0]


def test_what_cannot_be_put_is_refused_by_name() -> None:
    lm, other = model("llama"), view(tiny.model("gpt2", 2, hidden_size=24, num_attention_heads=2))
    assert other.d_model != lm.d_model
    for error, match, settings in (
        (TokensError, "0 tokens", {"placeholder": 1}),
        (NodeError, "another width", {"source": other}),
        (ModelError, "between two models", {"fit": PROMPTS}),
        (NodeError, "no state of the stream", {"locations": "MLP0"}),
        (NodeError, "no location", {"locations": []}),
        (NodeError, "place says", {"place": "resid_post*"}),
        (NodeError, "place says", {"place": "L0H0"}),
        (NumericError, "weights of positions", {"at": np.ones((2, 3))}),
        (NumericError, "weights of positions", {"at": np.full((2, 4), np.nan)}),
        (TokensError, "no such at", {"at": 4}),
        (TokensError, "one for each prompt", {"answer": [5]}),
        (NumericError, "how many are said", {"tokens": 0}),
        (TokensError, "beyond the model's context", {"tokens": 1000}),
        (TokensError, "too little text", {"source": lm, "fit": PROMPTS.repeat(2, 1)}),
    ):
        with pytest.raises(error, match=match):
            decoded(lm, **settings)
    with pytest.raises(TokensError, match="2 tokens"):
        uw.decode(lm, PROMPTS, into=[HOLE, 4, HOLE], placeholder=HOLE)
    with pytest.raises(ModelError, match="head"):
        uw.decode(view(model("gpt2").hf.transformer), PROMPTS, into=INTO, placeholder=HOLE)
    said, tokenizer = speaking(), speaking().tokenizer
    with pytest.raises(TokensError, match="stands in prompt 0 2 times"):
        uw.decode(said, "It is it is", "is", "He x it")
    with pytest.raises(TokensError, match="several tokens"):
        placeholder("zqzq", tokenizer("zqzq")["input_ids"], tokenizer)
