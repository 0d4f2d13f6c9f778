"""What do channels of all heads cost, against all readers, in time and memory?

    python benchmarks/channels.py                  of the bundled model
    python benchmarks/channels.py FOLDER …         of models in folders of Hugging Face

Time is the CPU time of this process on one thread. Memory is by how much its peak grows, beside what the weights take;
of the last of several models it is what it needs beyond the others. The same by whole products, d_model × d_model, is
timed on some edges, and reckoned for all.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import unwrite as uw
from unwrite.model.channels import compared
from unwrite.model.fold import folded
from unwrite.model.queries import turned
from unwrite.model.values import read_by_values

SOME = 12
_KILO = 1024 if sys.platform != "darwin" else 1


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILO


@torch.no_grad()
def by_products(lm: Any) -> float:
    """Seconds of one edge, by queries: the singular values of a writer's whole OV, and each channel's norm."""
    last = lm.layers[-1]
    query, key = compared(lm, last, turned(lm, [last], 0)[last.index])

    def work() -> None:
        for head in range(SOME):
            own = head % lm.layers[0].heads
            ov = read_by_values(lm, lm.layers[0])[own] @ folded(lm, lm.layers[0]).w_o[own]
            qk = query[head % last.heads] @ key[head % last.heads].T
            write = torch.linalg.svd(ov, full_matrices=False)[2][: lm.head_dim]
            (write @ qk).norm(dim=1) / qk.norm()

    return timed(work)[0] / SOME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["default"])
    torch.set_num_threads(1)
    print(f"{'model':<24} {'heads':>6} {'edges':>8} {'seconds':>8} {'by products':>12} {'memory / weights':>17}")
    for name in parser.parse_args().models:
        lm = uw.load(name, dtype="float32")
        held, before = sum(part.numel() * part.element_size() for part in lm.hf.parameters()), peak()
        spent, found = timed(lambda lm=lm: uw.channels(lm))
        edges = int(np.isfinite(found["best"].values).sum())
        grown = (peak() - before) / held
        print(f"{name[-24:]:<24} {found.data.sizes['writer']:>6} {edges:>8} {spent:>8.1f} "
              f"{by_products(lm) * edges:>12.0f} {grown:>17.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
