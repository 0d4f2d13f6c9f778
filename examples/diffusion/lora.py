"""How is a pipeline trained in the layers that write its text, and nowhere else? A LoRA on their keys and values.

    python examples/diffusion/lora.py WORK --layers L4 --name digit-layer

WORK is what `toy.py` trained. It learns another spelling, in which every digit d is drawn as 9 − d; shapes are to stay.
The loop is that of any text-to-image LoRA: put your own pipeline, images and prompts in the place of the toy's. What
came of it is kept as `results/lora-NAME.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy
from peft import LoraConfig

import unwrite as uw

RESULTS = Path(__file__).parent / "results"


def adapted(pipe: Any, layers: Any, rank: int) -> list[torch.nn.Parameter]:
    """Adapters on the keys and values of text of these layers: all else is frozen, and so far nothing has changed."""
    pipe.unet.requires_grad_(False)
    listed = uw.diffusion.lora_targets(pipe, layers, toy.CALL)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=listed))
    return [weight for weight in pipe.unet.parameters() if weight.requires_grad]


def train(pipe: Any, weights: list[torch.nn.Parameter], steps: int, size: int = 32, lr: float = 1e-2) -> None:
    """Adam on the squared error of the clean image, as the toy was trained itself."""
    rng = np.random.default_rng(3)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        chosen = toy.prompts(rng, size)
        images = [toy.drawn(s, str(9 - int(d)), int(rng.integers(11)), int(rng.integers(3))) for s, d in chosen]
        clean = torch.from_numpy(np.stack(images))[:, None] * 2 - 1
        ids = pipe.tokenizer([f'{s} "{d}"' for s, d in chosen], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(ids)[0]
        times = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (size,))
        noisy = pipe.scheduler.add_noise(clean, torch.randn_like(clean), times)
        loss = (pipe.unet(noisy, times, encoder_hidden_states=states).sample[:, :1] - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def judged(pipe: Any, n: int) -> dict[str, float]:
    """How often the digit is the new one, or still the old one, and the shape right; prompts that are all others."""
    seen = []
    for i, (shape, digit) in enumerate(toy.prompts(np.random.default_rng(4), n)):
        generator = torch.Generator().manual_seed(300 + i)
        image = pipe(f'{shape} "{digit}"', generator=generator, output_type="np", **toy.CALL).images[0]
        seen.append((toy.read(image) == str(9 - int(digit)), toy.read(image) == digit, toy.shape_of(image) == shape))
    return dict(zip(("new_digit", "old_digit", "shape"), np.array(seen, dtype=float).mean(0).tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", default="L4")
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = toy.kept(asked.work)
    before, began = judged(pipe, asked.prompts), time.process_time()
    weights = adapted(pipe, asked.layers, asked.rank)
    train(pipe, weights, asked.steps)
    found = {
        "layers": asked.layers, "steps": asked.steps, "rank": asked.rank, "prompts": asked.prompts,
        "weights": sum(weight.numel() for weight in weights), "before": before, "after": judged(pipe, asked.prompts),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"lora-{asked.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found, f"{time.process_time() - began:.0f} s of one core")
