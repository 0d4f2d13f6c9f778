"""What does a tiny model look like that sees beside reading, and what does its processor return?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForMultimodalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    SiglipVisionConfig,
)

import tiny
from methods import shape

SEEN = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
# The token that holds the place of an image, and how many vectors an image is.
IMAGE, VECTORS = 59, {"llama": 4, "qwen2": 1, "gemma3_text": 4}


def text(family: str) -> Any:
    """A causal language model of two layers in float64."""
    return tiny.model(family, 0, torch.float64, vocab_size=60, tie_word_embeddings=False, **shape(""))


def around(family: str) -> tuple[Any, Any]:
    """A model that also sees pictures, around the decoder of a causal language model; and that model."""
    plain, seen = text(family), SiglipVisionConfig(**SEEN)
    config = {
        "llama": lambda own: LlavaConfig(
            text_config=own, vision_config=CLIPVisionConfig(**SEEN), image_token_index=IMAGE
        ),
        "qwen2": lambda own: Idefics3Config(text_config=own, vision_config=SEEN, image_token_id=IMAGE, scale_factor=2),
        "gemma3_text": lambda own: Gemma3Config(
            text_config=own, vision_config=seen, mm_tokens_per_image=4, image_token_index=IMAGE,
            tie_word_embeddings=False,
        ),
    }[family](plain.config)  # fmt: skip
    # These have no cap of their own around the text model.
    plain.config.final_logit_softcapping = None
    whole = AutoModelForMultimodalLM.from_config(config, dtype=torch.float64).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in whole.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    inner = next(part for part in whole.modules() if type(part) is type(plain.model))
    inner.load_state_dict(plain.model.state_dict())
    whole.get_output_embeddings().load_state_dict(plain.lm_head.state_dict())
    return whole, plain


def inputs(family: str, seed: int = 0, left: bool = False) -> dict[str, Any]:
    """What a processor returns of four texts with an image each, one of them shorter and so padded on a side."""
    draw, count = torch.Generator().manual_seed(seed), VECTORS[family]
    # Of the same texts for every seed: only what is seen differs.
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for prompt, start in enumerate((2, 2, 1, 3)):
        ids[prompt, start : start + count] = IMAGE
    if left:
        ids[2], mask[2, :2] = ids[2].roll(2), 0
    else:
        mask[2, -2:] = 0
    shape = (4, 1, 3, 8, 8) if family == "qwen2" else (4, 3, 8, 8)
    pixels = torch.randn(*shape, generator=draw, dtype=torch.float64)
    more = {"token_type_ids": (ids == IMAGE).long()} if family == "gemma3_text" else {}
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, **more}
