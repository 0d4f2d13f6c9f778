"""What do the totals of dla cost, beside runs of nothing but the blocks that a change reaches? Ratios, one thread.

    python benchmarks/dla.py                     SmolLM2-135M's shape, random weights: 1 and 20 prompts of 6 tokens
    python benchmarks/dla.py --model FOLDER      a real model instead; --rounds 3

ideal    seconds of as many rows through as many blocks as totals need (flops.py: every node's run, from where it
         begins, both replacements where there are other prompts), at the rate of whole forward passes of 1,024 rows
one run  seconds of one run for each node and replacement, as `edited.added` makes them: some, multiplied

Time is the CPU time of this process, the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from flops import Shape, build, executed

import unwrite as uw
from unwrite.model.fold import fold
from unwrite.model.onednn import fast
from unwrite.model.view import Model
from unwrite.run.replay.clean import clean
from unwrite.run.replay.edited import added

SMOL = Shape(layers=30, d=576, heads=9, kv=3, inner=1536, vocabulary=4096, length=6)
PROMPTS, ROWS, SAMPLED = (1, 20), 1024, 12


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ids_of(lm: Model, prompts: int, length: int) -> torch.Tensor:
    return torch.randint(5, min(lm.vocabulary, 4096), (prompts, length), generator=torch.Generator().manual_seed(0))


def per_row(lm: Model, length: int) -> float:
    """Seconds of one row through one block, in passes of the decoder, their products made as in a method."""
    ids = ids_of(lm, ROWS // length, length)
    with torch.no_grad(), fast(lm.hf):
        times = [seconds(lambda: lm.decoder(input_ids=ids, use_cache=False)) for _ in range(4)]
    return statistics.median(times[1:]) / ids.numel() / len(lm.layers)


def one_by_one(lm: Model, ids: torch.Tensor) -> float:
    """Seconds of one run for every node."""
    run = clean(lm, ids, fold(lm))
    some = lm.parts[:: max(1, len(lm.parts) // SAMPLED)]
    return (
        sum(seconds(lambda node=node: added(run, node, -run.write(node))) for node in some) * len(lm.parts) / len(some)
    )


def measured(lm: Model, s: Shape, rounds: int) -> None:
    ids = ids_of(lm, s.prompts, s.length)
    uw.dla(lm, ids[:1], 0, 1, total=False)  # hashes the weights, which is done once for a model
    taken = statistics.median(seconds(lambda: uw.dla(lm, ids, 0, 1)) for _ in range(rounds))
    alone = statistics.median(seconds(lambda: uw.dla(lm, ids, 0, 1, total=False)) for _ in range(rounds))
    both = 2 if s.prompts > 1 else 1
    ideal = per_row(lm, s.length) * executed(s).calls * both / 2 * s.prompts * s.length
    with fast(lm.hf):
        before = both * one_by_one(lm, ids)
    print(
        f"{s.prompts:>7} × {s.length:<6}{taken:>9.2f}{alone:>15.2f}{ideal:>9.2f}{taken / ideal:>12.2f}{before:>10.1f}"
        f"{before / taken:>10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub name, in float32")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lm = uw.load(asked.model, dtype=torch.float32) if asked.model else uw.load(build(SMOL))
    shape = replace(SMOL, layers=len(lm.layers), d=lm.d_model, heads=lm.n_heads)
    print(f"{len(lm.nodes)} nodes of {shape.layers} layers × {shape.heads} heads, width {shape.d}: CPU seconds")
    print(f"{'prompts':>16}{'dla':>9}{'readings alone':>15}{'ideal':>9}{'dla / ideal':>12}{'one run':>10}{'times':>10}")
    for prompts in PROMPTS:
        measured(lm, replace(shape, prompts=prompts), asked.rounds)


if __name__ == "__main__":
    main()
