"""Which layers of an image pipeline read text: in order, counted as published, and exchanged exactly?

Oracles 3a to 3e: runs of the pipeline itself that are given the embeddings that an exchange would put there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from painting import CALL, LENGTH, PROMPT, TARGET, pipeline, snapshot_of, unet
from unwrite import errors
from unwrite.diffusion import view as viewing
from unwrite.diffusion.passes import Exchange, way_of
from unwrite.diffusion.view import Painter, TextLayer, in_order, painter

CROSS, JOINT = ("sdxl", "if"), ("sd3", "flux")


def slowly(*kinds: str) -> list[Any]:
    """Kinds that are left to `--slow`."""
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def looked(kind: str, pooled: bool = True, **call: Any) -> Painter:
    return painter(pipeline(kind, pooled), PROMPT, {**CALL[kind], **call})


def exchange(
    one: Painter, put: str | None = None, prompt: str = PROMPT, target: str = TARGET, **other: Any
) -> Exchange:
    made = Exchange(one, prompt, target, **{"seed": 3, "start": 0, "way": way_of(one.layers, put), "layers": one.layers,
                                            **other})  # fmt: skip
    made.base()
    made.aim()
    return made


def embedded(kind: str, prompt: str) -> dict[str, Any]:
    """What a pipeline of a UNet is given of a prompt, by its own encoders."""
    pipe = pipeline(kind)
    with torch.no_grad():
        found = pipe.encode_prompt(prompt, do_classifier_free_guidance=True, device=torch.device("cpu"))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, found, strict=False))


def crossed(kind: str, seed: int = 3, **other: Any) -> np.ndarray:
    """The pipeline's own image of the target's embedding and the prompt's pooled one."""
    own, theirs = embedded(kind, PROMPT), embedded(kind, TARGET)
    pooled = {name: own[name] for name in own if "pooled" in name}
    asked = {**CALL[kind], **theirs, **pooled, **other}
    return pipeline(kind)(generator=torch.Generator().manual_seed(seed), output_type="np", **asked).images[0]


@pytest.mark.parametrize("kind", CROSS)
def test_the_targets_text_in_all_cross_layers_is_a_run_with_its_embedding(kind: str) -> None:
    """3a; and a pooled embedding is another way, which stays the prompt's own."""
    one = looked(kind)
    run = exchange(one)
    image = run.changed(one.layers)
    assert np.array_equal(image, crossed(kind))
    assert not np.array_equal(image, run.base())
    assert np.array_equal(image, run.aim()) == (kind == "if")


@pytest.mark.parametrize("kind", JOINT)
def test_the_targets_keys_and_values_in_all_joint_layers_are_its_run(kind: str) -> None:
    """3c: where text has no other way, at every step by induction; a pooled embedding is one."""
    one = looked(kind, pooled=False)
    run = exchange(one)
    assert not np.array_equal(run.base(), run.aim())
    assert np.array_equal(run.changed(one.layers), run.aim())
    other = exchange(looked(kind))
    assert not np.array_equal(other.changed(other.layers), other.aim())


@pytest.mark.parametrize("kind", ["if", *slowly("sdxl")])
def test_keys_and_values_are_the_embedding_where_they_are_made_of_it_alone(kind: str) -> None:
    """(A) is (B) for any one layer."""
    one = looked(kind)
    a, b = exchange(one, "kv"), exchange(one, "embedding")
    assert (a.way, b.way) == ("kv", "embedding")
    chosen = one.layers[:: max(1, len(one.layers) // 3)]
    images = [a.changed([layer]) for layer in chosen]
    for layer, image in zip(chosen, images, strict=True):
        assert np.array_equal(image, b.changed([layer]))
    assert not any(np.array_equal(images[0], image) for image in images[1:])


@pytest.mark.parametrize(("kind", "put"), [("sdxl", "kv"), ("if", "embedding"), ("sd3", "kv"), ("flux", "kv")])
def test_a_prompts_own_text_changes_nothing(kind: str, put: str) -> None:
    """3b: of the same prompt, and with the rows of guidance, which are not the prompt's."""
    one = looked(kind)
    same = exchange(one, put, target=PROMPT)
    assert np.array_equal(same.changed(one.layers), same.base())

    # As if it had been another prompt, in all rows.
    def all_rows(self: Exchange, clock: Any) -> None:
        self._rows.append(torch.arange(len(clock.texts[-1])))
        self._length = clock.texts[-1].shape[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "_compared", all_rows)
        forced = exchange(one, put, target=PROMPT)
    assert forced._kept
    assert np.array_equal(forced.changed(one.layers), forced.base())


def test_under_guidance_only_the_prompts_half_is_exchanged() -> None:
    """A run with the target's embedding has the negative prompt's in its other half, as it was."""
    one, negative = looked("sdxl", negative_prompt="wall"), embedded("sdxl", "wall")
    run = exchange(one)
    assert [rows.tolist() for rows in run._rows] == [[1], [1]]
    other = {f"negative_{name}": negative[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    assert np.array_equal(run.changed(one.layers), crossed("sdxl", **other))
    assert not np.array_equal(run.changed(one.layers), crossed("sdxl"))


def test_guidance_by_a_second_pass_is_not_exchanged() -> None:
    """FLUX asks its transformer twice a step for a negative prompt."""
    one = looked("flux", pooled=False, negative_prompt="wall", true_cfg_scale=3.0)
    run = exchange(one)
    assert [rows.tolist() for rows in run._rows] == [[0], [], [0], []]
    assert {call for call, *_ in run._kept} == {0, 2}
    assert np.array_equal(run.changed(one.layers), run.aim())
    late = exchange(one, start=1)
    assert {call for call, *_ in late._kept} == {2}


@pytest.mark.parametrize("kind", ["sd3", *slowly("if", "flux", "sdxl")])
def test_from_a_later_step_on(kind: str) -> None:
    """By hand, with hooks of torch: outputs of the two projections of one layer, in the last row, from step 1 on."""
    one = looked(kind)
    layer, seen = one.layers[0], []
    late = exchange(one, start=1).changed([layer])

    def record(_: Any, __: Any, output: torch.Tensor) -> None:
        seen.append(output.clone())

    def instead(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        theirs = seen.pop(0)
        return torch.cat([output[:-1], theirs[-1:]]) if len(seen) < 2 else output

    def hooked(prompt: str, hook: Any) -> np.ndarray:
        handles = [module.register_forward_hook(hook) for module in layer.projections]
        try:
            return one.paint(prompt, 3)
        finally:
            for handle in handles:
                handle.remove()

    hooked(TARGET, record)
    want = hooked(PROMPT, instead)
    assert seen == []
    assert np.array_equal(late, want)
    assert not np.array_equal(late, exchange(one).changed([layer]))
    with pytest.raises(errors.NumericError, match="after the last step"):
        exchange(one, start=2)


def test_text_that_stands_before_the_image_is_exchanged_alone() -> None:
    """Of FLUX's single stream: keys of the image's positions stay as they were."""
    one = looked("flux")
    run, layer, seen = exchange(one), one.layers[-1], []
    handle = layer.projections[0].register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    try:
        run.aim()
    finally:
        handle.remove()
    own = torch.randn_like(seen[1])
    new = run._put(1, layer, "key", own)
    assert new is not None
    assert torch.equal(new[:, :LENGTH], seen[1][:, :LENGTH])
    assert torch.equal(new[:, LENGTH:], own[:, LENGTH:])


# The order, and what has been published.

SDXL = {
    "act_fn": "silu", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
}  # fmt: skip
IF = {
    "act_fn": "gelu", "addition_embed_type": "text", "addition_embed_type_num_heads": 64, "attention_head_dim": 64,
    "block_out_channels": (704, 1408, 2112, 2816), "cross_attention_dim": 2816, "cross_attention_norm": "group_norm",
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3), "encoder_hid_dim": 4096,
    "in_channels": 3, "layers_per_block": 3, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift", "sample_size": 64,
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
}  # fmt: skip


def on_meta(model: Any, settings: dict[str, Any], **call: Any) -> tuple[Any, tuple[TextLayer, ...]]:
    """A model of published size without weights, and its layers by a pass that computes nothing but shapes."""
    with torch.device("meta"), torch.no_grad():
        whole = model(**settings).eval()
        return whole, in_order(whole, lambda: whole(**{name: part() for name, part in call.items()}))


def weights(layers: Any) -> int:
    return sum(layer.parameters for layer in layers)


def test_sdxl_in_the_order_of_execution() -> None:
    """Layers 55 to 57 of 70 have the 15.7 M weights, 0.61 %, that the paper gives (table 1)."""
    from diffusers import UNet2DConditionModel

    whole, layers = on_meta(
        UNet2DConditionModel, SDXL, sample=lambda: torch.zeros(1, 4, 16, 16), timestep=lambda: torch.zeros(1),
        encoder_hidden_states=lambda: torch.zeros(1, 77, 2048),
        added_cond_kwargs=lambda: {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)},
    )  # fmt: skip
    assert len(layers) == 70
    assert [layer.path for layer in layers[55:58]] == [
        f"up_blocks.0.attentions.2.transformer_blocks.{i}.attn2" for i in (1, 2, 3)
    ]
    assert weights(layers[55:58]) == 15_728_640
    assert weights(layers[55:58]) / sum(part.numel() for part in whole.parameters()) == pytest.approx(0.0061, abs=5e-5)
    # By the order in which modules are registered, up before mid, number 55 is another layer, of another width.
    registered = [path for path, _ in whole.named_modules() if path.endswith("attn2")]
    assert registered[55].startswith("up_blocks.1")
    assert [layer.path for layer in layers] != registered
    assert sorted(layer.path for layer in layers) == sorted(registered)


def test_deepfloyd_if_in_the_order_of_execution() -> None:
    """Layer 17 of 22. The published 8.9 M, 0.21 %, are its keys and values of the image: those of text are 11.9 M."""
    from diffusers import UNet2DConditionModel

    whole, layers = on_meta(
        UNet2DConditionModel, IF, sample=lambda: torch.zeros(1, 3, 64, 64), timestep=lambda: torch.zeros(1),
        encoder_hidden_states=lambda: torch.zeros(1, 77, 4096),
    )  # fmt: skip
    assert len(layers) == 22
    one = layers[17]
    assert (one.path, one.kind) == ("up_blocks.1.attentions.3", "cross")
    published = one.module.to_k.weight.numel() + one.module.to_v.weight.numel()
    assert published == 8_921_088
    assert published / sum(part.numel() for part in whole.parameters()) == pytest.approx(0.0021, abs=5e-5)
    assert one.parameters == 2 * 2816 * 2112 == 11_894_784


def test_sd3_in_the_order_of_execution() -> None:
    """Layer 10 of 24: 4.7 M, 0.23 %."""
    from diffusers import SD3Transformer2DModel

    settings = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192, "caption_projection_dim": 1536}
    whole, layers = on_meta(
        SD3Transformer2DModel, settings, hidden_states=lambda: torch.zeros(1, 16, 16, 16),
        encoder_hidden_states=lambda: torch.zeros(1, 9, 4096), pooled_projections=lambda: torch.zeros(1, 2048),
        timestep=lambda: torch.zeros(1),
    )  # fmt: skip
    assert [layer.path for layer in layers] == [f"transformer_blocks.{i}.attn" for i in range(24)]
    assert layers[10].targets == ("transformer_blocks.10.attn.add_k_proj", "transformer_blocks.10.attn.add_v_proj")
    assert layers[10].parameters == 4_718_592
    assert layers[10].parameters / sum(part.numel() for part in whole.parameters()) == pytest.approx(0.0023, abs=5e-5)


def test_flux_in_the_order_of_execution() -> None:
    kinds = [(layer.path, layer.kind, layer.targets[0].rpartition(".")[2]) for layer in looked("flux").layers]
    assert kinds == [
        ("transformer_blocks.0.attn", "joint", "add_k_proj"), ("transformer_blocks.1.attn", "joint", "add_k_proj"),
        ("single_transformer_blocks.0.attn", "mixed", "to_k"), ("single_transformer_blocks.1.attn", "mixed", "to_k"),
    ]  # fmt: skip


# What cannot be asked.


def test_what_is_no_such_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blind = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4,
                        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    with pytest.raises(errors.ModelError, match="no layer that reads text"):
        in_order(blind, lambda: blind(torch.zeros(1, 3, 8, 8), 0))
    with pytest.raises(errors.ModelError, match=r"makes no images of text\. Got: DDPMPipeline"):
        painter(DDPMPipeline(blind, DDPMScheduler()), PROMPT, None)
    with pytest.raises(errors.NumericError, match=r"takes no such argument\. Got: steps"):
        painter(pipeline("sd3"), PROMPT, {"steps": 3})
    with pytest.raises(
        errors.ModelError, match=r"cannot be called so\. Got: \`height\` and \`width\` have to be divisible"
    ):
        painter(pipeline("sd3"), PROMPT, {"height": 17})
    with pytest.raises(errors.ModelError, match="this is no pipeline"):
        painter(blind, PROMPT, None)
    with pytest.raises(errors.NumericError, match=r"call has what is not the caller's\. Got: prompt"):
        painter(pipeline("sd3"), PROMPT, {"prompt": "mine"})
    with pytest.raises(errors.ModelError, match='put="kv"'):
        way_of(looked("sd3").layers, "embedding")
    monkeypatch.setattr(viewing, "find_spec", lambda _: None)
    with pytest.raises(
        errors.ModelError, match=r"diffusers is not installed\. Next: pip install 'unwrite\[diffusion\]'"
    ):
        painter(pipeline("sd3"), PROMPT, None)


def test_masked_and_fused_text_is_refused() -> None:
    masked = unet()
    call = {"encoder_hidden_states": torch.zeros(1, 8, 32), "encoder_attention_mask": torch.ones(1, 8)}
    with pytest.raises(errors.ModelError, match=r"cannot be exchanged by itself\. Got: a mask, attention_mask"):
        in_order(masked, lambda: masked(torch.zeros(1, 4, 8, 8), 0, **call))
    fused = unet()
    fused.fuse_qkv_projections()
    with pytest.raises(errors.ModelError, match="made by one product"):
        in_order(fused, lambda: fused(torch.zeros(1, 4, 8, 8), 0, encoder_hidden_states=torch.zeros(1, 8, 32)))


def test_a_layer_that_hides_its_keys_is_named() -> None:
    """As a processor that never asks `to_k`: nothing would be exchanged, and nobody would know."""
    one = looked("sdxl")
    run = exchange(one, "kv")
    stray = TextLayer("elsewhere", "cross", unet().mid_block.attentions[0].transformer_blocks[0].attn2)
    with pytest.raises(errors.ModelError, match=r"cannot be seen\. Got: elsewhere"):
        run.changed([stray])


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("kind", ["if", "flux", *slowly("sd3", "sdxl")])
def test_a_pipeline_is_untouched_by_success_and_by_what_is_raised_in_the_middle(kind: str) -> None:
    one = looked(kind)
    before = snapshot_of(one.pipe)
    run = exchange(one)
    run.changed(one.layers[:1])
    assert snapshot_of(one.pipe) == before
    calls = [0]

    def fails(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    handle = one.layers[-1].projections[1].register_forward_hook(fails)
    try:
        before = snapshot_of(one.pipe)
        for work in (run.base, run.aim, lambda: run.changed(one.layers), lambda: looked(kind)):
            calls[0] = 2 if work not in (run.base, run.aim) else 1
            with pytest.raises(KeyboardInterrupt):
                work()
            assert snapshot_of(one.pipe) == before
    finally:
        handle.remove()
