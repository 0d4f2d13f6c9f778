"""What does an all-writer scan cost, beside the same model's forward pass with logits? Ratios in one run, one thread.

    python benchmarks/scan.py            both shapes, time and peak memory
    python benchmarks/scan.py --rounds 7

Time is the CPU time of this process, baseline and scan alternating, the median over rounds. Peak memory is the highest
resident size of a fresh process that builds the model and does one of the two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import unwrite as uw
from unwrite.model.onednn import fast


@dataclass(frozen=True)
class Shape:
    """A GPT-2 shape, its prompts, and the ratios that it must stay under."""

    name: str
    layers: int
    d_model: int
    heads: int
    vocabulary: int
    prompts: int
    length: int
    time_limit: float
    memory_limit: float = 1.3


SHAPES = (
    Shape("4 layers, d 512, 8 heads, vocabulary 48262", 4, 512, 8, 48262, 4, 1024, time_limit=0.6),
    Shape("GPT-2 small", 12, 768, 12, 50257, 4, 256, time_limit=1.2),
)


def build(shape: Shape) -> tuple[GPT2LMHeadModel, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocabulary, n_positions=1024, n_embd=shape.d_model, n_layer=shape.layers, n_head=shape.heads,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval(), torch.randint(shape.vocabulary, (shape.prompts, shape.length))


@torch.no_grad()
def forward(model: GPT2LMHeadModel, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(ids, use_cache=False).logits


def scan(model: GPT2LMHeadModel, ids: torch.Tensor) -> Callable[[], object]:
    lm = uw.load(model)
    return lambda: uw.scan(lm, ids)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds; whoever asks has the same library for products, so that ratios compare what is done with them."""
    start = time.process_time()
    with torch.no_grad(), fast():
        work()
    return time.process_time() - start


def time_ratio(shape: Shape, rounds: int) -> float:
    model, ids = build(shape)
    baseline, ours = forward(model, ids), scan(model, ids)
    pairs = [(seconds(baseline), seconds(ours)) for _ in range(rounds + 1)][1:]
    print(
        f"  forward {statistics.median(a for a, _ in pairs):.2f} s, scan {statistics.median(b for _, b in pairs):.2f} s"
    )
    return statistics.median(b / a for a, b in pairs)


def _peak(shape: Shape, which: str, send: multiprocessing.connection.Connection) -> None:
    model, ids = build(shape)
    seconds({"forward": forward, "scan": scan}[which](model, ids))
    # Not getrusage: its maximum is inherited from the parent.
    status = Path("/proc/self/status").read_text()
    send.send(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]))


def peak(shape: Shape, which: str) -> float:
    """Highest resident size in MiB of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(shape, which, send))
    process.start()
    size = receive.recv()
    process.join()
    return size / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for shape in SHAPES:
        print(f"{shape.name}, {shape.prompts} × {shape.length} tokens")
        ratio = time_ratio(shape, rounds)
        print(f"  time    scan / forward = {ratio:.2f}  (limit {shape.time_limit})")
        plain, ours = peak(shape, "forward"), peak(shape, "scan")
        print(
            f"  memory  scan / forward = {ours / plain:.2f}  (limit {shape.memory_limit}; {ours:.0f} / {plain:.0f} MiB)"
        )


if __name__ == "__main__":
    main()
