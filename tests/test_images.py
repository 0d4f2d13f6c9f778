"""Do methods say of prompts that hold images what they say of a text whose tokens are those vectors?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

import every
import unwrite as uw
from methods import few_draws
from seeing import IMAGE, around, inputs
from test_inside import same
from unwrite.errors import ModelError, TokensError
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.prompts.tokens import from_ids

FAMILIES = ("llama", "qwen2")
SOURCE = 1


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


@cache
def seeing(family: str) -> Model:
    return uw.load(around(family)[0])


def embedded(hf: Any, given: dict[str, Any]) -> Tensor:
    """What the decoder inside of a model is given for these inputs [prompt, position, d_model]."""
    found: list[Tensor] = []
    decoder = hf.model.get_decoder() if hasattr(hf.model, "get_decoder") else hf.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda _, __, named: found.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        hf(**given)
    handle.remove()
    return found[0]


@cache
def twin(family: str) -> tuple[Model, tuple[uw.Tokens, uw.Tokens]]:
    """A text model that has the vectors of all images as tokens, and the prompts in these tokens."""
    whole, plain = around(family)
    both = [inputs(family, seed) for seed in (0, SOURCE)]
    vectors = [embedded(whole, given)[given["input_ids"] == IMAGE] for given in both]
    rows = torch.cat(vectors)
    known = plain.config.vocab_size
    plain.resize_token_embeddings(known + len(rows), mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight[known:] = rows
        plain.get_output_embeddings().weight[known:] = 0
    tokens, at = [], known
    for given in both:
        ids, held = given["input_ids"].clone(), given["input_ids"] == IMAGE
        ids[held] = torch.arange(at, at := at + int(held.sum()))
        tokens.append(from_ids(ids, given["attention_mask"]))
    return uw.load(plain), tuple(tokens)


ASKED: dict[str, Callable[[Model, uw.Tokens, uw.Tokens], uw.Result]] = {
    "scan": lambda lm, tokens, _: uw.scan(lm, tokens),
    "survival": lambda lm, tokens, _: uw.survival(lm, tokens, ["embed", "L0H1"], decoys=2),
    "verify": lambda lm, tokens, _: uw.verify(lm, tokens, "L0H0", ["L1H0"]),
    "dla": lambda lm, tokens, _: uw.dla(lm, tokens, 5, 9, replace="resample"),
    "dla texts": lambda lm, tokens, other: uw.dla(lm, tokens, 5, 9, texts=other.take([0, 1, 3])),
    "effects": lambda lm, *both: uw.effects(lm, uw.pairs(*both, 5, 9), ["embed", "L0H0", "L1H1.k", "MLP0"]),
    "effects each": lambda lm, *both: uw.effects(lm, uw.pairs(*both, 5, 9), ["L0H0", "MLP0"], "all"),
    "relp": lambda lm, *both: uw.effects(lm, uw.pairs(*both, 5, 9), "heads", method="relp"),
    "atp*": lambda lm, *both: uw.effects(lm, uw.pairs(*both, 5, 9), ["L0H0", "L1H1.k"], method="atp*"),
    "ig": lambda lm, *both: uw.effects(lm, uw.pairs(*both, 5, 9), ["L0H0", "MLP0"], method="ig", steps=2),
    "paths": lambda lm, *both: uw.paths(lm, uw.pairs(*both, 5, 9), "heads", ["L1H0.v", "MLP1", "logits"]),
}


@pytest.mark.promise("exact")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_what_a_text_is_whose_tokens_are_its_vectors(family: str, asked: str) -> None:
    lm, (plain, tokens) = seeing(family), twin(family)
    seen = [uw.images(lm, inputs(family, seed)) for seed in (0, SOURCE)]
    assert [part.length for part in seen] == [part.length for part in tokens]
    same(ASKED[asked](lm, *seen), ASKED[asked](plain, *tokens))


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_what_plain_hooks_see_in_the_models_own_pass(family: str) -> None:
    lm, given = uw.load(around(family)[0], convention="raw"), inputs(family)
    mask, kept = given["attention_mask"].bool(), {}
    start, end = _writes(lm, given, kept)
    parts = {"embed": start, **kept}
    torch.testing.assert_close(sum(parts.values())[mask], end[mask])
    counted = mask.clone()
    counted[:, 0] = False
    found = uw.scan(lm, given, list(parts))
    for writer, write in parts.items():
        energy = (write[counted] ** 2).sum()
        for node, other in parts.items():
            want = float((other[counted] * write[counted]).sum() / energy)
            assert float(found["share"].sel(writer=writer, node=node)) == pytest.approx(want, abs=1e-9)


@pytest.mark.promise("executed")
@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_is_the_effect_of_what_is_embedded(family: str) -> None:
    lm, both = seeing(family), [inputs(family, seed) for seed in (0, SOURCE)]
    last = both[0]["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = [lm.hf(**given).logits[torch.arange(4), last] for given in both]
    own, other = (each[:, 5] - each[:, 9] for each in logits)
    pairs = uw.pairs(*(uw.images(lm, given) for given in both), 5, 9)
    found = uw.effects(lm, pairs, ["embed"], "all")
    np.testing.assert_allclose(found["base"], own, atol=1e-9)
    np.testing.assert_allclose(found["effect"].sel(node="embed"), other - own, atol=1e-9)
    np.testing.assert_allclose(uw.dla(lm, both[0], 5, 9)["logit_diff"], own, atol=1e-9)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_of_the_models_own_pass_shows_and_edits_what_is_embedded(family: str) -> None:
    lm, given = seeing(family), inputs(family)
    decoder = next(part for part in lm.hf.modules() if type(part).__name__ in ("LlamaModel", "Qwen2Model"))

    def halved(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        put = named["inputs_embeds"].clone()
        put[:, 3] /= 2
        return args, {**named, "inputs_embeds": put}

    handle = decoder.register_forward_pre_hook(halved, with_kwargs=True)
    with torch.no_grad():
        want = lm.hf(**given).logits
    handle.remove()
    # The convention takes no mean away where norms are those of Llama.
    with torch.no_grad(), uw.trace(lm, "embed", edits=uw.Edit.scale("embed", 0.5, at=3)) as seen:
        got = lm.hf(**given).logits
    torch.testing.assert_close(got, want)
    shown = embedded(lm.hf, given)
    shown[:, 3] /= 2
    torch.testing.assert_close(seen["embed"], shown)


class Reader(ProcessorMixin):
    """A processor that reads text alone: image processors of transformers ask for pillow."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)


def test_a_processor_is_taken_for_its_tokenizer() -> None:
    reader = Reader(uw.planted().tokenizer)
    assert uw.load(around("llama")[0], reader).tokenizer is reader.tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_content_wherever_padding_is(family: str) -> None:
    lm, tokens = seeing(family), uw.images(seeing(family), inputs(family))
    again, left, other = (uw.images(lm, inputs(family, *how)) for how in ((0,), (0, True), (SOURCE,)))
    assert tokens.hash == again.hash == left.hash != other.hash
    assert tokens.written.tolist() == from_ids(*list(inputs(family).values())[:2]).ids.tolist()
    assert (tokens.ids < lm.vocabulary).tolist() == (tokens.written != IMAGE).tolist()
    # An answer is asked for as after any text, and a part of the prompts is read as they are.
    part = tokens.take([3, 1])
    same(uw.scan(lm, part, ["L0H0"]), uw.scan(lm, uw.images(lm, _some(inputs(family), [3, 1])), ["L0H0"]))


def _some(given: dict[str, Any], prompts: list[int]) -> dict[str, Any]:
    return {name: value[prompts] for name, value in given.items()}


def _qwen2_vl() -> tuple[Any, dict[str, Any]]:
    hf = every.model("qwen2_vl", "images")
    hf.config.image_token_id = 100
    ids = torch.arange(20).view(2, 10) + 5
    ids[:, 3:7] = 100
    size = hf.config.vision_config.patch_size
    pixels = torch.randn(32, 6 * size**2, generator=torch.Generator().manual_seed(0))
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == 100).long()}
    return hf, {"input_ids": ids, "pixel_values": pixels, **grid}


MORE: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], str]] = {
    "a mask": (lambda: (around("gemma3_text")[0], inputs("gemma3_text")), "is also told a mask"),
    "positions": (_qwen2_vl, "is also told position_ids"),
}


@pytest.mark.promise("exact")
@pytest.mark.parametrize("kind", MORE)
def test_an_image_that_changes_more_than_vectors_is_refused(kind: str) -> None:
    (hf, given), told = MORE[kind][0](), MORE[kind][1]
    with pytest.raises(
        ModelError, match=rf"an image changes more in .* at its positions\. Got: .*{told}.* Next: use text"
    ):
        uw.scan(view(hf), given)


REFUSED: dict[str, tuple[Callable[[Model], object], type[Exception], str]] = {
    "text": (lambda lm: uw.images(lm, "a cat"), TokensError, "images are read from what a processor returned"),
    "no pixels": (
        lambda lm: uw.images(lm, _without("pixel_values")), TokensError, "none of these prompts holds an image",
    ),
    "pixels of another shape": (
        lambda lm: uw.images(lm, {**inputs("llama"), "pixel_values": torch.zeros(4, 3, 5)}), ModelError,
        "could not be run on these inputs",
    ),
    "one image for four texts": (
        lambda lm: uw.images(lm, {**inputs("llama"), "pixel_values": torch.zeros(1, 3, 8, 8)}), ModelError,
        "could not be run on these inputs",
    ),
    "a method that predicts": (
        lambda lm: uw.corpus_dla(lm, uw.images(lm, inputs("llama")), "L0H0", ["L1H0"]), TokensError, "reads text alone",
    ),
    "what a processor returned for such a method": (
        lambda lm: uw.corpus_dla(lm, inputs("llama"), "L0H0", ["L1H0"]), TokensError, r"Next: .*uw\.images\(lm, …\)",
    ),
    "another model": (
        lambda lm: uw.scan(lm, uw.images(uw.load(around("llama")[0]), inputs("llama"))), TokensError,
        "another model saw the images",
    ),
    "ids alone": (lambda lm: uw.scan(lm, uw.images(lm, inputs("llama")).ids), TokensError, "outside the model's vocab"),
    "a text model": (
        lambda lm: uw.images(uw.load("default"), _without("pixel_values")), ModelError, "is not shown by one call",
    ),
}  # fmt: skip


def _without(name: str) -> dict[str, Any]:
    return {other: value for other, value in inputs("llama").items() if other != name}


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_image_that_the_model_saw_is_refused(kind: str) -> None:
    call, error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        call(seeing("llama"))


def test_a_model_whose_embedding_no_module_puts_out_sees_no_image() -> None:
    with pytest.raises(ModelError, match="no module of NanoChatForCausalLM puts out what its first block reads"):
        uw.images(view(every.model("nanochat")), {"input_ids": torch.tensor([[5, 6, 7]])})


def test_vectors_are_kept_no_longer_than_the_tokens_are() -> None:
    lm = uw.load(around("llama")[0])
    tokens = uw.images(lm, inputs("llama"))
    part = tokens.take([0])
    del tokens
    gc.collect()
    assert len(lm.images) == 1
    del part
    gc.collect()
    assert not lm.images


def _writes(lm: Model, given: dict[str, Any], kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is embedded, and the final stream of the model's own pass; what heads and MLPs write in `kept`."""
    decoder = next(part for part in lm.hf.modules() if type(part).__name__ in ("LlamaModel", "Qwen2Model"))
    ends: dict[str, Tensor] = {}

    def heads(layer: int) -> Callable[..., None]:
        def hook(module: nn.Linear, read: tuple[Tensor, ...]) -> None:
            for head, z in enumerate(read[0].chunk(2, -1)):
                kept[f"L{layer}H{head}"] = z @ module.weight.chunk(2, 1)[head].T
            if module.bias is not None:
                kept[f"L{layer}.bias"] = module.bias.detach().expand_as(read[0])

        return hook

    handles = [decoder.norm.register_forward_pre_hook(lambda _, read: ends.update(end=read[0]))]
    for layer, block in enumerate(decoder.layers):
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(heads(layer)))
        handles.append(
            block.mlp.register_forward_hook(lambda _, __, out, layer=layer: kept.update({f"MLP{layer}": out}))
        )
    with torch.no_grad():
        lm.hf(**given)
    for handle in handles:
        handle.remove()
    return embedded(lm.hf, given), ends["end"]
