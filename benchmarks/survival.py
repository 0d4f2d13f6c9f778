"""What does uw.survival cost, beside nothing but the runs of the blocks behind each write? Ratios, on one thread.

    python benchmarks/survival.py                time, FLOPs, peak memory, growth, and what larger models would take
    python benchmarks/survival.py --quick        a small model, one round: a smoke test
    python benchmarks/survival.py --rounds 3 --writers 112

SmolLM2-135M's shape, random weights; writers spread over all layers, each with one decoy. Ideal: the rows of these runs
through the blocks behind each write, an MLP's one block later than a head's, at the rate of plain passes that as many
rows go through at once; of passes whose products are made as in a method (`onednn`), and as torch makes them. Time is
the CPU time of this process, the median over rounds; peak memory that of a fresh one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flops import Cost, Counter, Shape, block, build, ids_of, passes

import unwrite as uw
from unwrite.model.onednn import fast
from unwrite.model.view import Model
from unwrite.nodes import Node
from unwrite.run.replay.removed import at_once, begins
from unwrite.run.tally.gram import ON_DEVICE

CPU = torch.device("cpu")
TIME_LIMIT, MEMORY_LIMIT, WRITERS = 1.15, 1.5, 112
SMOL = Shape(layers=30, d=576, heads=9, kv=3, inner=1536, vocabulary=1024, prompts=1, length=64)
QUICK = replace(SMOL, layers=4, d=96, heads=3, kv=3, inner=256, prompts=2)
# Writers' own runs, and those of one decoy each; two weights: of readers, and the paper's.
RUNS, WEIGHTS = 2, 2
AXES, LADDER = ("layers", "heads", "prompts"), (0.5, 1, 2)
# Bytes/s, FLOP/s in bfloat16 and in float32 by the data sheet of an H100, and the share of them that is reached.
H100, SHARE = (3.35e12, 989e12, 67e12), 0.4
LARGE = {
    "7B": Shape(32, 4096, 32, inner=11008, vocabulary=32000, prompts=32),
    "70B": Shape(80, 8192, 64, inner=28672, kv=8, vocabulary=32000, prompts=32),
}


def every(lm: Model) -> list[Node]:
    """All heads and MLPs."""
    return [node for node in lm.parts if node.kind in ("head", "mlp")]


def spread(lm: Model, writers: int) -> list[Node]:
    """So many of them, over all layers."""
    able = every(lm)
    return [able[i * len(able) // writers] for i in range(min(writers, len(able)))]


def blocks_behind(s: Shape) -> int:
    """Blocks that the runs of all heads and MLPs go through, each write's once."""
    return sum(s.heads * (s.layers - layer) + s.layers - layer - 1 for layer in range(s.layers))


def ideal(s: Shape) -> Cost:
    """Nothing but these runs, for writes and decoys, as many at once as `removed.at_once` says."""
    together = min(at_once(s.length, CPU), RUNS * s.layers * (s.heads + 1))
    return RUNS * s.prompts * blocks_behind(s) / together * block(s, s.length * together, s.length)


def survival(s: Shape) -> Cost:
    """Of all heads and MLPs, a decoy each: two runs of each prompt, those without a write, and what is seen of them."""
    rows, d, own = s.prompts * s.length, s.d, blocks_behind(s)
    writers, runs = s.layers * (s.heads + 1), RUNS * s.layers * (s.heads + 1) * s.prompts
    near = sum(min(layer + 1, s.layers - 1) - max(layer - 1, 0) + 1 for layer in range(s.layers))
    # Each head's write for itself and beside its decoy, how much it is in another prompt, and what decoys are mixed of.
    made = Cost(single=2 * rows * d**2 * (RUNS * s.layers + s.layers + (s.heads + 1) * near))
    # What every head behind a write reads along it, and products of the streams, summed over positions, with weights.
    read = Cost(single=2 * rows * d**2 * own, moved=4 * rows * d * 12 * own)
    seen = Cost(double=2 * d * WEIGHTS * (2 * RUNS * own * s.prompts + runs), moved=4 * rows * d * 8 * RUNS * own)
    ends = Cost(single=4 * s.length * d * runs, moved=4 * rows * d * 20 * RUNS * writers)
    constants = Cost(single=4 * s.layers * d**2 * s.gpt2)
    # Before all that, one pass in which every head's write is looked at, but at the first position.
    looked = Cost(single=2 * s.prompts * (s.length - 1) * d**2 * s.layers)
    return ideal(s) + 3 * passes(s, rows, s.prompts) + made + read + seen + ends + constants + looked


def memory(s: Shape, writers: int) -> dict[str, float]:
    """Bytes at the peak: weights, W_O once more, the clean run of a prompt, and the runs that go up together."""
    together = at_once(s.length, CPU) * s.length
    return {
        "weights": s.width * s.weights,
        "W_O in float32": 4 * s.layers * s.d**2,
        "clean run of a prompt": 4 * s.length * s.d * (12 * s.layers),
        "runs that go up together": together * (4 * 6 * s.d + s.width * (6 * s.d + 3 * s.inner)),
        "sums of a prompt": 8 * writers * (RUNS * (2 * s.layers + 1) * WEIGHTS + 2 * s.nodes + s.d),
    }


def ours(lm: Model, ids: torch.Tensor, writers: Sequence[Node]) -> object:
    return uw.survival(lm, ids, writers, decoys=1, controls=("typical",))


def counted(lm: Any, s: Shape) -> float:
    """Matrix-product FLOPs of a run, attention computed openly, as flops.py counts them."""
    before = lm.config._attn_implementation
    lm.hf.set_attn_implementation("eager")
    with Counter() as counter:
        ours(lm, ids_of(s), every(lm))
    lm.hf.set_attn_implementation(before)
    return counter.total


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    with torch.no_grad():
        work()
    return time.process_time() - start


def plain(lm: Model, ids: torch.Tensor) -> Callable[[], object]:
    """A pass of as many prompts as go up together."""
    many = ids[:1].expand(at_once(ids.shape[1], CPU), -1)
    return lambda: lm.decoder(input_ids=many, use_cache=False)


def ratios(lm: Model, s: Shape, writers: Sequence[Node], rounds: int) -> list[tuple[float, float, float]]:
    """Seconds of the ideal, with a method's products and with torch's own, and of a run, round by round."""
    ids = ids_of(s)
    blocks = RUNS * s.prompts * sum(s.layers - begins(lm, node) for node in writers)
    per_block = blocks / (s.layers * at_once(s.length, CPU))
    found = []
    ours(lm, ids[:, :8], writers[-2:])  # also hashes the weights, which is done once for a model
    for _ in range(rounds):
        around = [passed(lm, ids)]
        taken = seconds(lambda: ours(lm, ids, writers))
        around.append(passed(lm, ids))
        found.append((*(per_block * statistics.mean(part) for part in zip(*around, strict=True)), taken))
    return found


def passed(lm: Model, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a plain pass, its products made as in a method, and as torch makes them."""
    with fast(lm.hf):
        alike = seconds(plain(lm, ids))
    return alike, seconds(plain(lm, ids))


def _peak(s: Shape, writers: int, send: Any) -> None:
    torch.set_num_threads(1)
    lm = uw.load(build(s))
    seconds((lambda: ours(lm, ids_of(s), spread(lm, writers))) if writers else plain(lm, ids_of(s)))
    # Not getrusage: its maximum is inherited from the parent.
    status = Path("/proc/self/status").read_text()
    send.send(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def peak(s: Shape, writers: int = 0) -> float:
    """Highest resident size in MiB of a fresh process that runs a survival, or without writers one plain pass."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(s, writers, send))
    process.start()
    size = receive.recv()
    process.join()
    return size


def growth(base: Shape, rounds: int) -> None:
    """Exponents of time and of modelled FLOPs, of all heads and MLPs as writers."""
    print("\ngrowth: exponent of time, of modelled FLOPs; modelled / counted FLOPs")
    for axis in AXES:
        shapes = [replace(base, **{axis: round(factor * getattr(base, axis))}) for factor in LADDER]
        shapes = [replace(s, kv=s.heads) for s in shapes]
        took, ratio = [], []
        for s in shapes:
            lm = uw.load(build(s))
            ratio.append(survival(s).counted / counted(lm, s))
            took.append(
                statistics.median(seconds(lambda lm=lm, s=s: ours(lm, ids_of(s), every(lm))) for _ in range(rounds))
            )
        at = np.log([getattr(s, axis) for s in shapes])
        slopes = (np.polyfit(at, np.log(part), 1)[0] for part in (took, [survival(s).counted for s in shapes]))
        print(f"{axis:<8}" + "".join(f"{slope:8.2f}" for slope in slopes) + f"   {min(ratio):.4f} to {max(ratio):.4f}")


def predict(rate: float) -> None:
    """What models of public shapes would take: arithmetic, nothing of that size was run."""
    print(f"\n32 prompts, all heads and MLPs and a decoy each; here in float32 at {rate / 1e9:.0f} GFLOP/s, the rate")
    print(f"of the run above; H100 at {SHARE:.0%} of its data sheet, as if the model fitted on it")
    moved, half, single = (SHARE * part for part in H100)
    for name, model in LARGE.items():
        for length in (64, 1024):
            s = replace(model, length=length)
            cost = survival(replace(s, width=2, room=ON_DEVICE))
            there = cost.model / half + (cost.single + cost.double) / single + cost.moved / moved
            held = memory(replace(s, width=2), s.nodes)
            parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in held.items())
            here = survival(s).counted / rate / 3600
            print(f"{name:<4} × {length:<5} here {here:8.0f} h   H100 {there / 60:8.1f} min   GB: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--writers", type=int, default=WRITERS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    s, rounds = (QUICK, 1) if asked.quick else (SMOL, asked.rounds)
    lm = uw.load(build(s))
    writers = spread(lm, asked.writers)
    pairs = ratios(lm, s, writers, rounds)
    ratio = [statistics.median(one[-1] / one[i] for one in pairs) for i in (0, 1)]
    print(
        f"{len(writers)} writers, {s.prompts} × {s.length} tokens: "
        + ", ".join(f"{taken:.1f} / {alike:.1f}, {own:.1f} s" for alike, own, taken in pairs)
    )
    print(
        f"  time    survival / ideal = {ratio[0]:.2f}  (limit {TIME_LIMIT}); / ideal by torch's products {ratio[1]:.2f}"
    )
    small = replace(s, layers=min(s.layers, 6))
    found = counted(uw.load(build(small)), small)
    print(f"  FLOPs   counted / ideal = {found / ideal(small).counted:.3f}, modelled / counted ="
          f" {survival(small).counted / found:.4f}, all heads and MLPs of {small.layers} layers")  # fmt: skip
    least, most = peak(s), peak(s, asked.writers)
    print(f"  memory  survival / one pass = {most / least:.2f}  (limit {MEMORY_LIMIT}; {most:.0f} / {least:.0f} MiB)")
    growth(replace(QUICK, layers=4, prompts=2), rounds)
    blocks = RUNS * s.prompts * sum(s.layers - begins(lm, node) for node in writers)
    predict(blocks * block(s, s.length, s.length).model / statistics.median(one[-1] for one in pairs))


if __name__ == "__main__":
    main()
