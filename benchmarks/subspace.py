"""What does it take to learn a direction? CPU seconds of 80 steps at the last token, one thread.

    python benchmarks/subspace.py                     SmolLM2-135M's shape, random weights: 64 pairs of 18 tokens
    python benchmarks/subspace.py --model FOLDER      a real model instead; --site resid_post21

one fit   a direction alone
default   three fits, one of arbitrary tokens, and one in an untrained model; random directions beside

Runs of one step, with all that is done once, are subtracted.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from flops import Shape, build

import unwrite as uw
from unwrite.model.view import Model

SMOL = Shape(layers=30, d=576, heads=9, kv=3, inner=1536, vocabulary=4096, length=18)
PAIRS, STEPS = 64, 80
ASKED: dict[str, dict[str, Any]] = {"one fit": {"seeds": 1, "controls": []}, "default": {}}


def pairs_of(lm: Model) -> uw.Pairs:
    """Random pairs, as many again to judge by."""
    draw = torch.Generator().manual_seed(0)
    base, source = (torch.randint(5, 4000, (2 * PAIRS, SMOL.length), generator=draw) for _ in range(2))
    return uw.pairs(base, source, 5, 9)


def seconds(lm: Model, site: str, steps: int, **asked: Any) -> float:
    """CPU seconds of a whole call."""
    start = time.process_time()
    uw.subspace(lm, pairs_of(lm), site, steps=steps, held="pair", **asked)
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--site", default="resid_post21")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lm = uw.load(asked.model or build(SMOL))
    print(f"{asked.site}, {PAIRS} pairs: CPU seconds of {STEPS} steps")
    for name, settings in ASKED.items():
        once = seconds(lm, asked.site, 1, **settings)
        print(f"{name:8} {seconds(lm, asked.site, STEPS + 1, **settings) - once:7.1f}   (once: {once:.1f})")


if __name__ == "__main__":
    main()
