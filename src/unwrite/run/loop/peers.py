"""How do the ranks of torchrun tell the first of them what they kept?

Statistics are small beside what they are made of, and are sent once, from memory to memory (gloo), as numpy's own
format without pickle.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from unwrite.run.loop.checkpoint import Arrays

# A rank may have to wait until the slowest one is done.
_PATIENCE = timedelta(days=30)


def rank() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says; (0, 1) where it is alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """All processes of a torchrun."""

    rank: int
    size: int

    def gather(self, state: Arrays) -> Iterator[Arrays]:
        """What all others kept, in their order, at rank 0; nothing elsewhere."""
        if self.rank:
            _send(state)
            return
        for other in range(1, self.size):
            yield _receive(other)


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """Inside the `with` the processes of a torchrun can reach each other; None where there is one alone."""
    own, size = rank()
    if size == 1:
        yield None
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(own, size)
    finally:
        dist.destroy_process_group()


def _send(state: Arrays) -> None:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **state)
    content = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    dist.send(torch.tensor([len(content)]), 0)
    for part in _blocks(content):
        dist.send(part, 0)


def _receive(other: int) -> Arrays:
    length = torch.zeros(1, dtype=torch.long)
    dist.recv(length, other)
    content = torch.zeros(int(length), dtype=torch.uint8)
    for part in _blocks(content):
        dist.recv(part, other)
    with np.load(io.BytesIO(content.numpy().tobytes()), allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}


def _blocks(content: Tensor) -> tuple[Tensor, ...]:
    """One message of gloo is at most 2 GiB."""
    return content.split(2**30)
