"""Which pipelines make images here? Tiny ones of every kind, of configurations and random weights, without network."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs unwrite[diffusion]")

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tiny import of_module

WORDS = ("[pad]", "[unk]", "[eos]", '"', "a", "sign", "wall", "that", "says", "stop", "taxi", *map(str, range(10)))
LENGTH, WIDTH = 8, 32
PROMPT, TARGET = 'a sign that says "stop"', 'a sign that says "taxi"'
# What each is called with: two steps, and guidance where there is some.
CALL: dict[str, dict[str, Any]] = {
    "sdxl": {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.0},
    "if": {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.0, "clean_caption": False},
    "sd3": {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 3.0},
    "flux": {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": LENGTH},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of a few words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[unk]"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[pad]", unk_token="[unk]", eos_token="[eos]", model_max_length=LENGTH
    )


def _clip(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4, pad_token_id=0
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16,
        shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def unet(**other: Any) -> UNet2DConditionModel:
    """Two levels; the second has cross-attention, one block in each direction and one in the middle."""
    settings: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **other}).eval()


def sdxl() -> StableDiffusionXLPipeline:
    denoiser = unet(
        cross_attention_dim=2 * WIDTH, transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_clip(), text_encoder_2=_clip(True), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        unet=denoiser, scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


def if_() -> IFPipeline:
    denoiser = unet(
        in_channels=3, out_channels=6, encoder_hid_dim=WIDTH, cross_attention_dim=WIDTH, act_fn="gelu",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_norm="group_norm",
    )  # fmt: skip
    return IFPipeline(
        tokenizer=tokenizer(), text_encoder=_t5(), unet=denoiser,
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), text_encoder=_clip(True),
        tokenizer=tokenizer(), text_encoder_2=_clip(True), tokenizer_2=tokenizer(), text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip


def flux() -> FluxPipeline:
    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), text_encoder=_clip(), tokenizer=tokenizer(),
        text_encoder_2=_t5(), tokenizer_2=tokenizer(), transformer=denoiser,
    )  # fmt: skip


KINDS = {"sdxl": sdxl, "if": if_, "sd3": sd3, "flux": flux}


@cache
def pipeline(kind: str, pooled: bool = True) -> Any:
    """A pipeline of this kind whose text matters: random weights are made larger than they begin.

    Without what is `pooled` of a prompt, text has one way into an image: the embeddings of its tokens.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = KINDS[kind]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                for weight in part.parameters():
                    weight.requires_grad_(False)
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        for weight in denoiser.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0.0, 0.2)
        if not pooled:
            one = pipe.text_encoder
            last = (
                [one.text_projection, pipe.text_encoder_2.text_projection] if kind == "sd3" else [one.final_layer_norm]
            )
            for weight in (weight for module in last for weight in module.parameters()):
                torch.nn.init.zeros_(weight)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def snapshot_of(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that could have been changed: its parts, its scheduler, what it was called with."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    own = {name: str(part) for name, part in vars(pipe).items() if name not in pipe.components}
    processors = {name: str(module.processor) for name, module in parts.items() for module in module.modules()
                  if hasattr(module, "processor")}  # fmt: skip
    return {
        **{name: of_module(part) for name, part in parts.items()}, "own": own, "processors": processors,
        "scheduler": {name: str(part) for name, part in vars(pipe.scheduler).items()},
    }  # fmt: skip
