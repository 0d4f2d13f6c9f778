"""What does the model do if one write is changed? Executed for many writes at once, each as a row of one batch.

A run whose write is changed is the clean run up to that write, so it begins where the write is read, and goes up
together with those that began before it. What happens there is looked at as it goes by, since no machine holds what
every node writes in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.cache import Handed, Past
from unwrite.model.capture import Recording, inside, recording
from unwrite.model.continued import Calls, block_from, calls_from
from unwrite.model.fold import centre
from unwrite.model.hooks import Handle, after, hooked
from unwrite.model.view import Layer, Model
from unwrite.nodes import Location, Node
from unwrite.run.replay.clean import Clean
from unwrite.run.replay.walk import ROWS


@dataclass(frozen=True, eq=False)
class Changed:
    """Runs of prompts `prompt[i]` of a clean run in which `change[i]` is added right after `node[i]` has written.

    `looked_at`: of which of them, in ascending order, it is recorded what nodes write; None: of all.
    """

    node: Sequence[Node]
    prompt: Int[Tensor, " run"]
    change: Float[Tensor, "run row d_model"]
    looked_at: Int[Tensor, " looked_at"] | None = None


# Rows of which what a block makes stays near a processor: of SmolLM2's blocks 12 % faster than ROWS.
_CACHED = 1024
# Told of every block that runs 0 … n went through: what the nodes of that layer wrote, and its states of the stream.
Seen = Callable[[int, int, Recording], object]


def begins(lm: Model, node: Node) -> int:
    """The first block that a run goes through in which this node's write is changed."""
    return max(node.layer, 0) + int(lm.after(node).state == "post")


def behind(lm: Model, nodes: Iterable[Node]) -> int:
    """Blocks that runs go through in which the write of one of these nodes is changed, in all."""
    return sum(len(lm.layers) - begins(lm, node) for node in nodes)


def in_order(lm: Model, nodes: Sequence[Node]) -> list[int]:
    """Where the nodes are, in the order in which their runs begin: of a block before those inside of it."""
    return sorted(range(len(nodes)), key=lambda i: (begins(lm, nodes[i]), nodes[i].layer, lm.after(nodes[i]).order))


def at_once(length: int, device: torch.device) -> int:
    """How many runs of prompts of this length go up together, on a processor fewer than on what has many."""
    rows = _CACHED if device.type == "cpu" else ROWS
    return max(1, rows // length)


def alone(lm: Model, ids: Int[Tensor, "prompt position"]) -> Calls:
    """How the model calls its blocks for whole runs of these prompts: so it can be called for any number of them."""
    return calls_from(lm, ids.to(lm.device), (), 0, ids.shape[1])


@torch.no_grad()
def changed(
    run: Clean, calls: Calls, runs: Changed, seen: Seen, kept: Sequence[Past] = (), first: int = 0
) -> Float[Tensor, "run row d_model"]:
    """The final stream of every run. `runs` are in the order in which they begin (`in_order`), `calls` are `alone`'s.

    Where keys and values of the clean run are `kept`, runs may bring some rows only, from `first` on, before which
    nothing is changed and behind which nothing is read; `calls` are then those of these rows.

    `seen(layer, n, record)` is told of every block that the first `n` runs went through; `record` holds what that
    block's nodes write there, in those that are looked at, and its states of the stream in all: post, and those inside.
    """
    lm = run.lm
    start, handed = [begins(lm, node) for node in runs.node], Handed()
    x = run.input(0).to(lm.device)[:0, : runs.change.shape[1]]
    with ExitStack() as stack:
        record = stack.enter_context(recording(lm, run.folded))
        stack.enter_context(hooked(_inner_states(lm, record)))
        for index in range(min(start), len(lm.layers) + 1):
            n = sum(begin <= index for begin in start)
            if n > len(x):
                x = torch.cat([x, _begun(run, runs, slice(len(x), n), index, first)])
            if index == len(lm.layers):
                break
            record.only = runs.looked_at if runs.looked_at is None else runs.looked_at[runs.looked_at < n]
            # Edits come last, so what nodes hand on after one is not what is recorded of them.
            with hooked(_edits(run, runs, slice(0, n), lm.layers[index])):
                x = block_from(lm, kept, index, x, runs.prompt[:n], first, calls, handed)
            post = Location("post", index)
            record.stream[post] = centre(x.to(lm.device, lm.compute_dtype) * lm.to_end(post), lm)
            seen(index, n, record)
            for store in (record.z, record.gain, record.vectors, record.stream):
                store.clear()
    return centre(x.to(lm.device, lm.compute_dtype), lm)


def _inner_states(lm: Model, record: Recording) -> Iterator[Handle]:
    for layer in lm.layers:
        if not lm.parallel:
            yield from inside(lm, layer, record)


def _begun(run: Clean, runs: Changed, rows: slice, index: int, first: int) -> Float[Tensor, "run position d_model"]:
    """What a block reads in the runs that begin there; the change is in it, or is yet to come inside the block."""
    lm, last = run.lm, index == len(run.lm.layers)
    x = run.record.stream[lm.states[-1]] if last else run.input(index)
    change = runs.change[rows]
    x = x.to(lm.device)[runs.prompt[rows], first : first + change.shape[1]]
    read = torch.tensor([node.layer < index for node in runs.node[rows]], dtype=torch.bool, device=x.device)
    to_end = 1.0 if last else lm.layers[index].to_end
    return torch.where(read[:, None, None], x + (change / to_end).to(x), x)


def _edits(run: Clean, runs: Changed, rows: slice, layer: Layer) -> Iterator[Handle]:
    """Where runs begin inside a block: its attention or MLP writes something else, which what is after it reads."""
    begun = [i for i in range(rows.stop) if begins(run.lm, runs.node[i]) == layer.index == runs.node[i].layer]
    for end in dict.fromkeys(layer.end(runs.node[i].kind) for i in begun):
        part = [i for i in begun if layer.end(runs.node[i].kind) is end]
        yield after(end, partial(_plus, layer, slice(part[0], part[-1] + 1), runs.change[part[0] : part[-1] + 1]))


def _plus(layer: Layer, part: slice, change: Tensor, written: Tensor) -> Tensor:
    """What a module writes with something added in some runs, in units of the final stream, which it reaches scaled."""
    whole = written.clone()
    whole.view(-1, *change.shape[1:])[part] += (change / layer.into).to(written)
    return whole
