"""Are numbers right where a block has a mixer in the place of attention, no MLP, or more than one? By plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import every
import unwrite as uw
from executed import hooks
from methods import IDS, PAIRS, few_draws
from patching import contrasts, executed
from unwrite.errors import NodeError
from unwrite.model.discover import discovered
from unwrite.model.load import view
from unwrite.model.view import Model
from unwrite.studies.described import described

# Of each type by notes of one's own: its blocks, what writes in each of them and its norm if it has one before the
# stream, and how many heads its mixers have, 1 where channels are all that is apart.
NOTES: dict[str, tuple[str, Sequence[Sequence[str]], int]] = {
    "bamba": ("model.layers", [["mamba.out_proj", "feed_forward"], ["self_attn.o_proj", "feed_forward"]], 8),
    "nemotron_h": ("model.layers", [["mixer"]], 8),
    "lfm2": ("model.layers", [["conv.out_proj", "feed_forward"], ["self_attn.out_proj", "feed_forward"]], 1),
    "mamba2": ("backbone.layers", [["mixer.out_proj"]], 8),
    "olmo_hybrid": ("model.layers", [["linear_attn.o_proj", "mlp"], ["self_attn.o_proj", "mlp"]], 4),
}
KINDS = tuple(NOTES)


@pytest.fixture(scope="module", params=KINDS)
def lm(request: pytest.FixtureRequest) -> Model:
    return view(every.model(request.param), convention="raw")


def mixer_of(lm: Model) -> int:
    """A layer with a mixer, as late as one is that has something behind it."""
    return max(layer.index for layer in lm.layers[:-1] if layer.kind == "mixer" and layer.heads)


def projection(lm: Model, layer: int) -> nn.Module:
    """What a mixer writes through: the last projection in its block that gives the stream's width, but for an MLP's."""
    path, writers, _ = NOTES[lm.family]
    block = attrgetter(path)(lm.hf)[layer]
    for names in writers:
        try:
            found = attrgetter(names[0])(block)
        except AttributeError:
            continue
        return found if isinstance(found, nn.Linear) else found.out_proj
    raise AssertionError


def slice_of(lm: Model, head: int) -> slice:
    width = projection(lm, mixer_of(lm)).weight.shape[1] // NOTES[lm.family][2]
    return slice(head * width, (head + 1) * width)


def in_z(lm: Model, head: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes what one head of the mixer hands to its projection."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        z[..., slice_of(lm, head)] = change(z[..., slice_of(lm, head)])
        return (z, *args[1:])

    return projection(lm, mixer_of(lm)).register_forward_pre_hook(hook)


@torch.no_grad()
def ran(lm: Model, ids: Tensor, *handles: Any) -> tuple[Tensor, Tensor]:
    """Logits, and what every block was given and the last one handed on [state, prompt, position, d_model]."""
    seen: list[Tensor] = []
    blocks = attrgetter(NOTES[lm.family][0])(lm.hf)

    def given(module: nn.Module, args: Any, named: Any) -> None:
        seen.append((args[0] if args else named["hidden_states"]).clone())

    def gave(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).clone())

    own = [block.register_forward_pre_hook(given, with_kwargs=True) for block in blocks]
    with hooks(*own, blocks[-1].register_forward_hook(gave), *handles):
        logits = lm.hf(input_ids=ids, use_cache=False).logits
    return logits, torch.stack(seen)


def test_heads_of_a_mixer_are_those_of_its_configuration(lm: Model) -> None:
    assert lm.layers[mixer_of(lm)].heads == NOTES[lm.family][2]
    assert {"continued"} <= {*("values", "opened", "continued")} - {*lm.certificate}
    assert lm.certificate.ok


def test_a_mixer_head_writes_what_its_projection_lacks_without_it(lm: Model) -> None:
    layer, ids = mixer_of(lm), IDS[:2]
    head = NOTES[lm.family][2] - 1
    found: dict[str, Tensor] = {}
    module = projection(lm, layer)
    keep: Callable[[str], Any] = lambda name: module.register_forward_hook(  # noqa: E731
        lambda *seen: found.__setitem__(name, seen[2].clone())
    )
    ran(lm, ids, keep("with"))
    ran(lm, ids, in_z(lm, head, torch.zeros_like), keep("without"))
    with uw.trace(lm, f"L{layer}M{head}") as t:
        lm.hf(input_ids=ids, use_cache=False)
    scale = lm.layers[layer].residual_scale
    # What stands behind the projection (a norm in no type here) would come in between.
    assert torch.allclose(t[f"L{layer}M{head}"], (found["with"] - found["without"]) * scale, atol=1e-5)


def test_nodes_add_up_to_the_stream_and_readings_to_the_difference(lm: Model) -> None:
    with torch.no_grad(), uw.trace(lm, *lm.nodes) as t:
        logits = lm.hf(input_ids=IDS[:1], use_cache=False).logits[0, -1]
    _, states = ran(lm, IDS[:1])
    assert torch.allclose(sum(t[name] for name in lm.nodes), states[-1], atol=2e-5)
    found = uw.dla(lm, IDS[:1], 5, 9)
    assert abs(float(found["logit_diff"].values[0]) - float(logits[5] - logits[9])) < 1e-4
    assert abs(float(found["unexplained"].values[0])) < 1e-4


def test_an_effect_is_that_of_an_executed_patch(lm: Model) -> None:
    layer, head = mixer_of(lm), NOTES[lm.family][2] - 1
    name, z = f"L{layer}M{head}", []
    found = uw.effects(lm, PAIRS, [name])
    for i in range(len(PAIRS)):
        base, source = (torch.from_numpy(part.ids[i : i + 1]) for part in (PAIRS.base, PAIRS.source))
        see = projection(lm, layer).register_forward_pre_hook(lambda _, args: z.append(args[0].clone()))
        ran(lm, source, see)
        clean, _ = ran(lm, base)
        value = z.pop()[..., slice_of(lm, head)]
        row = int(PAIRS.row[i])
        for position in range(row + 1):

            def put(own: Tensor, position: int = position, value: Tensor = value) -> Tensor:
                own = own.clone()
                own[:, position] = value[:, position]
                return own

            patched, _ = ran(lm, base, in_z(lm, head, put))
            want = float((patched - clean)[0, row, 5] - (patched - clean)[0, row, 9])
            assert abs(float(found["effect"].values[i].ravel()[position]) - want) < 1e-4


def test_survival_is_that_of_runs_without_the_write(lm: Model) -> None:
    layer, head = mixer_of(lm), 0
    name = f"L{layer}M{head}"
    found = uw.survival(lm, IDS[:1], [name], "raw", ["rotated"], 1, skip=0)
    with uw.trace(lm, name) as t:
        _, states = ran(lm, IDS[:1])
    write = t[name]
    _, without = ran(lm, IDS[:1], in_z(lm, head, torch.zeros_like))
    want = [float(((x - y) * write).sum() / write.square().sum()) for x, y in zip(states, without, strict=True)]
    got = found["survival"].sel(location=[f"resid_post{i}" for i in range(layer, len(lm.layers))]).values.ravel()
    assert np.allclose(got, want[layer + 1 :], atol=1e-4)


@pytest.mark.parametrize("kind", ["granitemoeshared", "granitemoehybrid"])
def test_what_writes_beside_an_mlp_is_a_node_of_its_own(kind: str) -> None:
    lm, name = view(every.model(kind), convention="raw"), "MLP1.1"
    module, written = lm.hf.model.layers[1].shared_mlp, []
    keep = module.register_forward_hook(lambda *seen: written.append(seen[2].clone()))
    with hooks(keep), torch.no_grad(), uw.trace(lm, name) as t:
        lm.hf(input_ids=torch.from_numpy(PAIRS.source.ids[:1]), use_cache=False)
    assert torch.allclose(t[name], written[0] * lm.hf.config.residual_multiplier, atol=1e-6)
    found = uw.effects(lm, PAIRS, [name])["effect"].values[0].ravel()
    base, row = torch.from_numpy(PAIRS.base.ids[:1]), int(PAIRS.row[0])

    def difference(*handles: Any) -> float:
        with hooks(*handles), torch.no_grad():
            logits = lm.hf(input_ids=base, use_cache=False).logits[0, row]
        return float(logits[5] - logits[9])

    for position in range(row + 1):

        def put(*seen: Any, position: int = position) -> Tensor:
            own = seen[2].clone()
            own[:, position] = written[0][:, position]
            return own

        want = difference(module.register_forward_hook(put)) - difference()
        assert abs(found[position] - want) < 1e-4
    survival = uw.survival(lm, IDS[:1], [name], "raw", ["rotated"], 1, skip=0)["survival"].sel(location="resid_post3")
    assert float(survival.values.ravel()[0]) == pytest.approx(without_beside(lm, module), abs=1e-4)


def without_beside(lm: Model, module: nn.Module) -> float:
    """What survives of it at the end, from a run in which the module gives nothing."""
    kept: list[Tensor] = []

    def end(*handles: Any) -> Tensor:
        seen: list[Tensor] = []
        last = lm.hf.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with hooks(last, *handles), torch.no_grad():
            lm.hf(input_ids=IDS[:1], use_cache=False)
        return seen[0]

    x = end(module.register_forward_hook(lambda *seen: kept.append(seen[2].clone())))
    write = kept[0] * lm.hf.config.residual_multiplier
    gone = end(module.register_forward_hook(lambda *seen: torch.zeros_like(seen[2])))
    return float(((x - gone) * write).sum() / write.square().sum())


def test_what_a_mixer_that_shows_no_values_reads_through_them_is_not_said() -> None:
    hybrid = view(every.model("bamba"))
    hybrid.mixed.clear()
    with few_draws():
        found = uw.verify(hybrid, IDS, "L0M0")
    mixers = [name for name in hybrid.nodes if name.startswith("L2M")]
    assert mixers
    assert found["v_share"].sel(node=mixers).isnull().all()
    assert found["read"].sel(node=mixers).isnull().all()
    assert found["v_share"].sel(node="L1H0").notnull()
    assert found["v_survival"].sel(location="resid_post1").notnull()
    assert found["v_survival"].sel(location="resid_post2").isnull()


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("L0M0.pattern", "not a site"),
        ("L0H0.pattern", "has none but a mixer"),
        ("L0H0.q", "it has no pattern, queries"),
    ],
)
def test_a_mixer_has_no_pattern(site: str, says: str) -> None:
    with pytest.raises(NodeError, match=says), uw.trace(view(every.model("bamba")), site):
        pass


@pytest.mark.parametrize("kind", ["zamba", "zamba2"])
def test_blocks_that_are_given_a_prompts_embeddings_are_given_its_own(kind: str) -> None:
    """In every third layer what reads the stream and these is no writer: a mixer reads what it gives."""
    lm, pairs = view(every.model(kind), convention="raw"), contrasts((5, 4))
    assert lm.by_prompt == {"1"}
    names = ["L0M0", "resid_post1", "L3M0"]
    got, want = uw.effects(lm, pairs, names)["effect"].values, executed(lm, pairs, names)[0]
    assert np.allclose(got, want, atol=1e-4, equal_nan=True)
    assert np.nanmax(abs(want)) > 1e-2
    # Of a prompt by itself there is one row of everything.
    assert np.allclose(uw.effects(lm, contrasts((5,)), names)["effect"].values[0, :, 0], want[0, :, 0], atol=1e-4)


def test_doctor_says_where_mixers_are_and_what_is_not_known_of_them() -> None:
    said = described(view(every.model("granitemoehybrid")))
    assert "in 2 of the layers a mixer (mamba, 8 heads) reads input_layernorm: it shows no pattern, and values" in said
    assert "and values, which in_proj gives, carry what they do with all else in it held" in said
    assert "MLPs (block_sparse_moe, and beside it shared_mlp) read what post_attention_layernorm is given" in said


@pytest.mark.parametrize("kind", KINDS)
def test_finding_what_mixes_costs_few_short_passes(kind: str) -> None:
    hf, passes = every.model(kind), []
    with hooks(
        hf.register_forward_pre_hook(lambda *seen: passes.append(seen[2]["input_ids"].numel()), with_kwargs=True)
    ):
        discovered(hf)
    # Beside them, mixers and MLPs of layers without attention are called once more: about one pass at most.
    assert 1 <= len(passes) <= 3
    assert max(passes) <= 2 * 9
