"""Is what was planted really there? Ground truth by raw hooks and executed interventions on the Hugging Face model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from unwrite.errors import NumericError
from unwrite.model.planted import Pair, Planted, planted
from unwrite.nodes import Node, parse_node, reads

# Level and survival at the end: what lies along the write, and what is left of the write itself.
ENDS = {
    "writer erased by a head": (-0.2, 0.1),
    "writer erased by many": (0.2, 0.2),
    "writer erased by an MLP": (0.1, 0.1),
    "writer with a backup": (1.0, 0.05),
    "writer mimicked": (0.6, 1.0),
    "writer kept": (1.0, 1.0),
}
FAMILIES = ("gpt2", "llama")
ERASING = ("values", "mlp")
DECOYS = ("constant", "same source")
TEXT = topics["assert"] + topics["yield"]

Writes = Mapping[str, Tensor]


# The variant has this part of a write's energy in two channels, as Gemma 3 270M has in three.
MASSIVE = 0.86


@cache
def _model(family: str, massive: float = 0.0) -> Planted:
    return planted(family, dtype=torch.float64, massive=massive)


@cache
def _ids(family: str) -> Tensor:
    tokens = _model(family).tokenizer(TEXT, verbose=False)["input_ids"][: 6 * 200]
    return torch.tensor(tokens).view(6, 200)


@cache
def _clean(family: str) -> Writes:
    return _run(_model(family).hf, _ids(family))


@cache
def _without(family: str, writer: str) -> Writes:
    """The writes of a run in which the clean write of `writer` was subtracted right after it."""
    return _run(_model(family).hf, _ids(family), {writer: _clean(family)[writer]})


def _run(hf: Any, ids: Tensor, removed: Writes | None = None) -> Writes:
    """What every node writes [prompt, position, d_model], centred for GPT-2, and the "stream" before the final norm."""
    seen: dict[str, Tensor] = {}
    with _hooked(hf, seen, removed or {}), torch.no_grad():
        hf(ids)
    if hf.config.model_type == "gpt2":
        seen = {name: write - write.mean(-1, keepdim=True) for name, write in seen.items()}
    return {name: write.expand_as(seen["embed"]) for name, write in seen.items()}


@contextmanager
def _hooked(hf: Any, seen: dict[str, Tensor], removed: Writes) -> Iterator[None]:
    gpt2 = hf.config.model_type == "gpt2"
    body = hf.transformer if gpt2 else hf.model
    named = {"embed": body.wte, "pos_embed": body.wpe} if gpt2 else {"embed": body.embed_tokens}
    with ExitStack() as stack:
        for name, module in named.items():
            stack.enter_context(_hook(module, _keep(seen, name)))
        for layer, block in enumerate(body.h if gpt2 else body.layers):
            project = block.attn.c_proj if gpt2 else block.self_attn.o_proj
            stack.enter_context(_hook(project, _attention(hf, layer, seen, removed)))
            stack.enter_context(_hook(block.mlp, _keep(seen, f"MLP{layer}")))
        stack.enter_context(_hook(body.ln_f if gpt2 else body.norm, _keep_input(seen, "stream")))
        yield


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    return lambda module, args, output: seen.__setitem__(name, output)


def _keep_input(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    return lambda module, args, output: seen.__setitem__(name, args[0])


def _attention(hf: Any, layer: int, seen: dict[str, Tensor], removed: Writes) -> Callable[..., Tensor]:
    heads = hf.config.num_attention_heads

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        matrix = module.weight if hf.config.model_type == "gpt2" else module.weight.T
        for head, (z, rows) in enumerate(zip(args[0].chunk(heads, -1), matrix.chunk(heads, 0), strict=True)):
            seen[f"L{layer}H{head}"] = z @ rows
        if module.bias is not None:
            seen[f"L{layer}.bias"] = module.bias.detach().expand_as(output)
        gone = [write for name, write in removed.items() if parse_node(name).layer == layer]
        return output - sum(gone, torch.zeros_like(output))

    return hook


def _share(eraser: Tensor, writer: Tensor) -> float:
    return float((eraser * writer).sum() / (writer * writer).sum())


def _pairs(*kinds: str) -> list[Any]:
    """Every planted pair of these kinds, as (family, pair)."""
    chosen = [(family, pair) for family in FAMILIES for pair in _model(family).pairs if pair.kind in kinds]
    return [pytest.param(family, pair, id=f"{family}-{pair.writer}-{pair.eraser}") for family, pair in chosen]


def _nodes(writes: Writes) -> list[Node]:
    return sorted((parse_node(name) for name in writes if name != "stream"), key=lambda node: node.order)


def _relative_norm(writes: Writes, name: str) -> Tensor:
    """Norm of a write over the norm of the stream right after it [prompt, position]."""
    before = [writes[str(node)] for node in _nodes(writes) if node.order <= parse_node(name).order]
    return writes[name].norm(dim=-1) / torch.stack(before).sum(0).norm(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_sum_to_the_stream(family: str) -> None:
    writes = _clean(family)
    total = torch.stack([writes[str(node)] for node in _nodes(writes)]).sum(0)
    torch.testing.assert_close(total, writes["stream"])


@pytest.mark.promise("planted")
@pytest.mark.parametrize(("family", "pair"), _pairs(*ERASING, *DECOYS, "backup"))
def test_share_is_the_planted_one(family: str, pair: Pair) -> None:
    writes = _clean(family)
    assert _share(writes[pair.eraser], writes[pair.writer]) == pytest.approx(pair.share, abs=1e-3)


@pytest.mark.promise("causal")
@pytest.mark.parametrize(("family", "pair"), _pairs(*ERASING))
def test_eraser_stops_when_the_write_is_gone(family: str, pair: Pair) -> None:
    clean, without = _clean(family), _without(family, pair.writer)
    assert without[pair.eraser].norm() < 1e-3 * clean[pair.eraser].norm()
    assert pair.share_without == 0


@pytest.mark.promise("causal")
@pytest.mark.parametrize(("family", "pair"), _pairs(*DECOYS))
def test_decoy_goes_on_when_the_write_is_gone(family: str, pair: Pair) -> None:
    clean, without = _clean(family), _without(family, pair.writer)
    assert _share(without[pair.eraser], clean[pair.writer]) == pytest.approx(pair.share_without, abs=0.02)
    # Only the norm's scale moves: the decoy writes the same direction at every position.
    cosine = torch.cosine_similarity(without[pair.eraser], clean[pair.eraser], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize(("family", "pair"), _pairs("backup"))
def test_backup_wakes_when_the_write_is_gone(family: str, pair: Pair) -> None:
    clean, without = _clean(family), _without(family, pair.writer)
    assert _relative_norm(clean, pair.eraser).max() < 1e-4
    assert _share(without[pair.eraser], clean[pair.writer]) == pytest.approx(pair.share_without, abs=0.07)


@pytest.mark.promise("planted")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_writes_against_a_writer(family: str) -> None:
    writes = {str(node): _clean(family)[str(node)] for node in _nodes(_clean(family))}
    known = {(pair.writer, pair.eraser) for pair in _model(family).pairs}
    against = {
        (writer, later)
        for writer, later in itertools.permutations(writes, 2)
        if parse_node(writer).order < parse_node(later).order
        and writes[writer].norm() > 1e-6 * writes["embed"].norm()
        and (writer, later) not in known
        and _share(writes[later], writes[writer]) < -0.05
    }
    # A dormant backup writes 10⁻⁶ of the stream: ratios onto it mean nothing.
    assert {writer for writer, _ in against} <= {*_model(family).roles["dormant backup"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_planted_readers_change(family: str) -> None:
    for writer in itertools.chain(*(_model(family).roles[role] for role in ENDS)):
        clean, without = _clean(family), _without(family, writer)
        partners = {pair.eraser for pair in _model(family).pairs if pair.writer == writer}
        for node in _nodes(clean):
            if str(node) not in partners and reads(node, parse_node(writer), parallel=False):
                change = (without[str(node)] - clean[str(node)]).norm()
                # All readers see the norm's scale change by up to 6 %, and both factors of a gated MLP do.
                assert change < 0.13 * clean[str(node)].norm() + 1e-3 * clean[writer].norm(), (writer, str(node))


@pytest.mark.parametrize("role", ENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_level_and_survival_at_the_end(family: str, role: str) -> None:
    (writer,) = _model(family).roles[role]
    clean, without = _clean(family), _without(family, writer)
    level, survival = ENDS[role]
    assert _share(clean["stream"], clean[writer]) == pytest.approx(level, abs=1e-3)
    assert _share(clean["stream"] - without["stream"], clean[writer]) == pytest.approx(survival, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_writes_are_material(family: str) -> None:
    model, writes = _model(family), _clean(family)
    for role in ENDS:
        assert _relative_norm(writes, *model.roles[role]).min() > 0.25
    for role in ("eraser head", "eraser MLP", "decoy constant", "decoy same source"):
        assert _relative_norm(writes, *model.roles[role]).min() > 0.1
    together = [_relative_norm(writes, eraser) for eraser in model.roles["eraser heads"]]
    assert torch.stack(together).min() > 0.05
    assert torch.stack(together).sum(0).min() > 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_writers_have_a_token_part_and_a_mean(family: str) -> None:
    writes = _clean(family)
    for role in ENDS:
        (writer,) = _model(family).roles[role]
        rows = writes[writer][:, 1:].flatten(0, 1)
        mean = rows.mean(0).norm() / rows.norm(dim=-1).mean()
        assert 0.5 < mean < 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_look_at_their_own_or_the_previous_position(family: str) -> None:
    planted_ = planted(family, dtype=torch.float64)
    planted_.hf.set_attn_implementation("eager")
    ids = torch.arange(256)[None]
    attentions = planted_.hf(ids, output_attentions=True).attentions
    own, previous = torch.eye(256), torch.eye(256).roll(1, dims=1).T.tril()
    previous[0, 0] = 1
    for layer, head in itertools.product(range(3), range(6)):
        expected = previous if f"L{layer}H{head}" in planted_.roles["writer kept"] else own
        assert torch.allclose(attentions[layer][0, head].float(), expected, atol=1e-6), (layer, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_and_mlp_has_one_role(family: str) -> None:
    model = _model(family)
    named = [parse_node(name) for names in model.roles.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) - {Node("bias", 2)} == {node for node in _nodes(_clean(family)) if node.kind in ("head", "mlp")}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_reads_any_text_and_uses_every_row(family: str) -> None:
    model = _model(family)
    tokenizer, vocabulary = model.tokenizer, model.hf.config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocabulary))
    assert model.hf.get_input_embeddings().weight.shape[0] == vocabulary
    for text in (*list(topics.values())[:20], "naïve — 漢字 \t\r\n \x00 🙂"):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert tokenizer.model_max_length == model.hf.config.max_position_embeddings == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_survives_saving_and_loading(family: str, tmp_path: Path) -> None:
    model = planted(family, seed=3)
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT[:200], return_tensors="pt")["input_ids"]
    assert torch.equal(ids, model.tokenizer(TEXT[:200], return_tensors="pt")["input_ids"])
    with torch.no_grad():
        logits = model.hf(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_depends_on_the_seed_and_on_nothing_else(family: str) -> None:
    torch.manual_seed(0)
    first = planted(family, seed=1).hf.state_dict()
    state = torch.manual_seed(12345).get_state()
    again, other = planted(family, seed=1).hf.state_dict(), planted(family, seed=2).hf.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_hold_for_every_seed_and_dtype(family: str, dtype: torch.dtype, seed: int) -> None:
    model = planted(family, seed, dtype)
    assert {parameter.dtype for parameter in model.hf.parameters()} == {dtype}
    assert sum(parameter.numel() for parameter in model.hf.parameters()) < 70_000
    writes = {name: write.double() for name, write in _run(model.hf, _ids(family)[:2]).items()}
    for pair in model.pairs:
        assert _share(writes[pair.eraser], writes[pair.writer]) == pytest.approx(pair.share, abs=0.02)


@cache
def _with_massive(family: str, *without: str) -> Writes:
    """The writes of the variant, or of it in a run without a write."""
    gone = {writer: _with_massive(family)[writer] for writer in without}
    return _run(_model(family, MASSIVE).hf, _ids(family), gone)


def _beside(write: Tensor) -> Tensor:
    return write[..., 2:]


@pytest.mark.parametrize("family", FAMILIES)
def test_so_much_of_a_write_is_massive_as_was_asked_for(family: str) -> None:
    writes, roles = _with_massive(family), _model(family, MASSIVE).roles
    for role in ENDS:
        (write,) = (writes[name] for name in roles[role])
        assert float(write[..., :2].pow(2).sum() / write.pow(2).sum()) == pytest.approx(MASSIVE, abs=1e-6)
    (amplifier,) = roles["amplifier"]
    # Half of what was there before it; at a newline the stream is longer by its coordinate, and that much is less.
    before = sum(writes[str(node)][..., :2] for node in _nodes(writes) if node.layer < 2)
    torch.testing.assert_close(writes[amplifier][..., :2], before / 2, rtol=5e-3, atol=1e-6)


@pytest.mark.promise("planted")
@pytest.mark.parametrize("family", FAMILIES)
def test_beside_what_is_massive_shares_are_the_planted_ones(family: str) -> None:
    writes = _with_massive(family)
    for pair in _model(family, MASSIVE).pairs:
        eraser, writer = writes[pair.eraser], writes[pair.writer]
        assert _share(_beside(eraser), _beside(writer)) == pytest.approx(pair.share, abs=2e-3)
        assert _share(eraser, writer) == pytest.approx((1 - MASSIVE) * pair.share, abs=2e-3)
        without = _beside(_with_massive(family, pair.writer)[pair.eraser])
        assert _share(without, _beside(writer)) == pytest.approx(pair.share_without, abs=0.07)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_massive_write_that_is_taken_out_leaves_the_stream_as_long(family: str) -> None:
    for role in ENDS:
        (writer,) = _model(family, MASSIVE).roles[role]
        before = [
            sum(part[str(node)] for node in _nodes(part) if node.layer < 1).norm(dim=-1)
            for part in (_with_massive(family), _with_massive(family, writer))
        ]
        torch.testing.assert_close(before[1] / before[0], torch.ones_like(before[0]), rtol=0, atol=0.06)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_a_newline_and_nowhere_else_the_stream_is_far_longer(family: str) -> None:
    length = _with_massive(family)["stream"].norm(dim=-1)
    newline = _ids(family) == _model(family).tokenizer("\n")["input_ids"][0]
    assert 0 < newline.sum() < 0.1 * newline.numel()
    assert torch.equal(length > 10 * length.median(1, keepdim=True).values, newline)


@pytest.mark.parametrize("massive", [-0.1, 1.0, float("nan")])
def test_no_more_than_all_of_a_write_is_massive(massive: float) -> None:
    with pytest.raises(NumericError, match="massive is a part"):
        planted("gpt2", massive=massive)
