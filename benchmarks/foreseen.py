"""What did doctor foresee of each stage, and what did it take? Seconds and bytes, one thread, on real models.

    python benchmarks/foreseen.py                          the bundled model
    python benchmarks/foreseen.py FOLDER… --stages verify,dla --shapes 4x32,8x64

Every stage runs in a process of its own, which loads the model, foresees, and runs. Seconds are CPU time: what else the
machine does is not counted, neither in the trial that foresees nor in the run. Bytes are the most that the process
held, less what it held before the model was there. Texts are Python's own documentation. Of dla, n prompts of `length`
tokens are asked about at once, where doctor says what one takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unwrite as uw
from unwrite.model.load import quieten
from unwrite.studies.audit import demonstration
from unwrite.studies.foreseen import spread

STAGES, SHAPES, WRITERS = ("scan", "survival", "verify", "dla", "audit"), ("4x32", "8x64"), 40
TIME_LIMIT, MEMORY_LIMIT = 1.5, 1.25
WIDTHS = (8, 8, 7, 9, 8, 7, 9, 8)
DIGITS = (1, 1, 2, 0, 0, 2, 1, 1)
STATUS = Path("/proc/self/status")


def held(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith(name)).split()[1])


def run_of(lm: Any, stage: str, n: int, length: int) -> Callable[[], object]:
    """A run of the stage; its text is read before."""
    tokens, nodes = demonstration(lm, n, length), spread(lm, WRITERS)
    runs: dict[str, Callable[[], object]] = {
        "scan": lambda: uw.scan(lm, tokens),
        "survival": lambda: uw.survival(lm, tokens, nodes),
        "verify": lambda: uw.verify(lm, tokens, nodes[len(nodes) // 2]),
        "dla": lambda: uw.dla(lm, tokens),
        "audit": lambda: uw.audit(lm, tokens),
    }
    return runs[stage]


def measure(model: str, stage: str, n: int, length: int, send: Any) -> None:
    torch.set_num_threads(1)
    quieten()
    empty = held("VmRSS")
    lm = uw.load(model)
    begun = time.process_time()
    diagnosis = uw.doctor(lm, n, length, None if stage == "audit" else spread(lm, WRITERS))
    trial = time.process_time() - begun
    need = next(need for need in diagnosis.stages if need.stage == stage)
    work = run_of(lm, stage, n, length)
    Path("/proc/self/clear_refs").write_text("5")  # the most that is held is asked anew
    begun, wall = time.process_time(), time.monotonic()
    work()
    took = time.process_time() - begun
    send.send((need.seconds, need.memory, took, time.monotonic() - wall, held("VmHWM") - empty, trial))


def row(model: str, stage: str, n: int, length: int) -> str:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(model, stage, n, length, send))
    process.start()
    send.close()
    seconds, memory, took, wall, most, trial = receive.recv()
    process.join()
    seconds *= n if stage == "dla" else 1
    time_off, room_off = (max(a / b, b / a) for a, b in ((seconds, took), (memory, most)))
    beyond = " !" if time_off > TIME_LIMIT or room_off > MEMORY_LIMIT else ""
    found = (seconds, took, seconds / took, memory / 2**20, most / 2**20, memory / most, wall, trial)
    shown = (f"{value:>{width}.{digits}f}" for value, width, digits in zip(found, WIDTHS, DIGITS, strict=True))
    return f"{Path(model).name:<15}{stage:<10}{n:>4} × {length:<5}" + "".join(shown) + beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["default"])
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    asked = parser.parse_args()
    print(f"limits: a factor of {TIME_LIMIT} in seconds, {MEMORY_LIMIT} in MiB; survival of {WRITERS} writers")
    names = ("foreseen", "took", "ratio", "foreseen", "held", "ratio", "by clock", "trial")
    print(" " * 37 + "".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True)))
    for model in asked.models:
        for stage in asked.stages.split(","):
            for shape in asked.shapes.split(","):
                n, length = map(int, shape.split("x"))
                print(row(model, stage, n, length), flush=True)


if __name__ == "__main__":
    main()
