"""A diffusion model of 16 × 16 images whose text has two words, each read by one layer that is known beforehand.

An image holds a shape on the left, somewhere, and a digit on the right; its prompt says both: `circle "7"`. Of the six
cross-attention layers one is let see which shape a word names, another one which digit, and the rest neither: words of
both kinds lie in dimensions of their own, and the columns of `to_k` and `to_v` that would read the others are held at
zero. All else is diffusers' own: the UNet, the pipeline and its sampler are as they are.

    python examples/diffusion/toy.py WORK           trains it (some minutes on one core) and keeps it in WORK
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

SHAPES = ("circle", "square", "cross", "triangle")
DIGITS = tuple("0123456789")
WORDS = ("[pad]", '"', *SHAPES, *DIGITS)
# Layers in the order of execution: two on the way down, one in the middle, three on the way up.
PLANTED = {"shape": 2, "digit": 4}
SIZE, WIDTH, LENGTH, HALF = 16, 32, 4, 16
CALL = {"num_inference_steps": 20, "guidance_scale": 1.0, "clean_caption": False}
_GLYPHS = {
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111", "3": "111001111001111",
    "4": "101101111001001", "5": "111100111001111", "6": "111100111101111", "7": "111001010010010",
    "8": "111101111101111", "9": "111101111001111",
}  # fmt: skip
_SHAPES = {
    "circle": "001100010010100001100001010010001100", "square": "111111100001100001100001100001111111",
    "cross": "100001010010001100001100010010100001", "triangle": "001100001100010010010010100001111111",
}  # fmt: skip
# Where the digit is: rows, then columns. A shape is to the left of that.
PLACE = (slice(3, 13), slice(9, 15))


class Words(PreTrainedTokenizerFast):
    """A token for each word, always four of them."""

    def __call__(self, *args: Any, max_length: int | None = None, **more: Any) -> Any:
        return super().__call__(*args, max_length=LENGTH, **more)


def glyph(digit: str) -> np.ndarray:
    """Ten rows and six columns, 1 where there is ink."""
    return np.kron(np.array([*_GLYPHS[digit]], dtype=np.float32).reshape(5, 3), np.ones((2, 2), np.float32))


def outline(shape: str) -> np.ndarray:
    """Six rows and columns, 1 where there is ink."""
    return np.array([*_SHAPES[shape]], dtype=np.float32).reshape(6, 6)


def drawn(shape: str, digit: str, row: int, column: int) -> np.ndarray:
    """An image [row, column] from 0 to 1, the shape's corner at this row and column."""
    image = np.zeros((SIZE, SIZE), dtype=np.float32)
    image[row : row + 6, column : column + 6] = outline(shape)
    image[PLACE] = glyph(digit)
    return image


def read(image: np.ndarray) -> str:
    """The digit that is there: the glyph nearest to what stands in its place; "" where that is no nearer than white."""
    seen = image[PLACE].mean(-1)
    errors = {digit: float(((seen - glyph(digit)) ** 2).mean()) for digit in DIGITS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < 0.1 else ""


def shape_of(image: np.ndarray) -> str:
    """The shape that is there, wherever it is, by its outline; the nearest one always."""
    left = image[:, :8].mean(-1)
    windows = np.lib.stride_tricks.sliding_window_view(left, (6, 6))
    return min(SHAPES, key=lambda shape: float(((windows - outline(shape)) ** 2).mean((2, 3)).min()))


def prompts(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """Shapes and digits by chance."""
    return [(SHAPES[rng.integers(4)], DIGITS[rng.integers(10)]) for _ in range(n)]


def pipeline() -> IFPipeline:
    """The untrained model."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[pad]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Words(tokenizer_object=words, pad_token="[pad]", unk_token="[pad]")  # noqa: S106
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=1, out_channels=2, block_out_channels=(16, 32), layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
    )  # fmt: skip
    return IFPipeline(
        tokenizer=tokenizer, text_encoder=_encoder(), unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"), watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def _encoder() -> T5EncoderModel:
    """Each word as a vector of its own: digits in the first half of the dimensions, shapes in the second."""
    config = T5Config(vocab_size=len(WORDS), d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0)
    encoder = T5EncoderModel(config).eval()
    generator, table = torch.Generator().manual_seed(0), torch.zeros(len(WORDS), WIDTH)
    turned = torch.linalg.qr(torch.randn(HALF, HALF, generator=generator)).Q
    for i, word in enumerate(WORDS):
        if word in DIGITS:
            table[i, :HALF] = turned[DIGITS.index(word)]
        elif word in SHAPES:
            table[i, HALF:] = turned[SHAPES.index(word)]
    encoder.shared.weight.copy_(table)
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].DenseReluDense.wo.weight.zero_()
    return encoder


def cross(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Cross-attention in the order of execution, by hand."""
    blocks = [unet.down_blocks[1], unet.mid_block, unet.up_blocks[0]]
    return [attention.transformer_blocks[0].attn2 for block in blocks for attention in block.attentions]


@torch.no_grad()
def blinded(unet: UNet2DConditionModel) -> None:
    """Let each layer see what it is planted to see, and nothing else."""
    for i, layer in enumerate(cross(unet)):
        for module in (layer.to_k, layer.to_v):
            if i != PLANTED["digit"]:
                module.weight[:, :HALF] = 0
            if i != PLANTED["shape"]:
                module.weight[:, HALF:] = 0


def batch(pipe: IFPipeline, rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Images from −1 to 1, and the states of their prompts; of every tenth none, for guidance."""
    chosen = prompts(rng, n)
    images = [drawn(*each, int(rng.integers(11)), int(rng.integers(3))) for each in chosen]
    said = ["" if rng.random() < 0.1 else f'{shape} "{digit}"' for shape, digit in chosen]
    ids = pipe.tokenizer(said, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0]
    return torch.from_numpy(np.stack(images))[:, None] * 2 - 1, states


def train(pipe: IFPipeline, steps: int, size: int = 32, lr: float = 3e-3, seed: int = 0) -> list[float]:
    """Adam on the squared error of the clean image; the loss of every step."""
    torch.manual_seed(seed)
    rng, losses = np.random.default_rng(seed), []
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    pipe.unet.train()
    blinded(pipe.unet)
    for _ in range(steps):
        clean, states = batch(pipe, rng, size)
        times = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (size,))
        noisy = pipe.scheduler.add_noise(clean, torch.randn_like(clean), times)
        loss = (pipe.unet(noisy, times, encoder_hidden_states=states).sample[:, :1] - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        blinded(pipe.unet)
        losses.append(float(loss.detach()))
    pipe.unet.eval()
    return losses


def kept(work: Path) -> IFPipeline:
    """The model that was trained."""
    pipe = pipeline()
    pipe.unet.load_state_dict(load_file(work / "toy.safetensors"))
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=850)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe, began = pipeline(), time.process_time()
    losses = train(pipe, asked.steps)
    asked.work.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: part.contiguous() for name, part in pipe.unet.state_dict().items()}, asked.work / "toy.safetensors"
    )
    print(f"{asked.steps} steps, loss {np.mean(losses[-50:]):.4f}, {time.process_time() - began:.0f} s of one core")
