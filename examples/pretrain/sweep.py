"""Does a narrower stream make a model erase more? Three widths, three seeds, so many tokens each.

    python examples/pretrain/sweep.py --books BOOKS --out RUNS [--tokens 8e6]      hours; a run that was cut goes on
    python examples/pretrain/sweep.py --books BOOKS --out RUNS --finished          train nothing, keep what is finished
    python examples/survey/survey.py --small --runs RUNS --work FOLDER             what survives of every write of them

Trains what is missing in RUNS (`train.py`, one process each) as `w128-s0` and so on, with checkpoints in `steps/`, and
keeps settings, loss curve and loss on the held-out books of each run in `results/` beside this file. What these models
erase is surveyed like that of any other model; docs/bandwidth.md is made from both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import loss, rounded
from train import prepare

import unwrite as uw

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# All widths before the next seed: where time runs out, seeds are fewer, not widths.
WIDTHS, SEEDS = (128, 32, 64), (0, 1, 2)
# In single precision throughout: a processor without products in bfloat16 takes many times as long for them.
SETTINGS = ["--keep", "0.04", "0.15", "0.4", "--no-half"]


def run(width: int, seed: int, asked: argparse.Namespace) -> None:
    """Train one model, unless it is there already, and keep what is known of its training."""
    place = asked.out / f"w{width}-s{seed}"
    kept = RESULTS / f"{place.name}.json"
    if kept.exists():
        return
    if not (place / "model").is_dir():
        if asked.finished:
            return
        train(place, width, seed, asked)
    held_out = {name: rounded(nats) for name, nats in loss(uw.load(place / "model"), asked.books).items()}
    found = {**json.loads((place / "run.json").read_text()), "held_out": held_out}
    RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{place.name}: {held_out}", flush=True)


def train(place: Path, width: int, seed: int, asked: argparse.Namespace) -> None:
    """One process, with its part of the machine."""
    threads = max(1, (os.cpu_count() or 1) // asked.workers)
    where = ["--books", str(asked.books), "--out", str(place), "--data", str(asked.out / "tokens")]
    own = ["--width", str(width), "--seed", str(seed), "--tokens", str(asked.tokens)]
    command = [sys.executable, str(HERE / "train.py"), *where, *own, *SETTINGS]
    with (asked.out / f"{place.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--tokens", type=float, default=8e6, help="of every run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--finished", action="store_true", help="train nothing")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.finished:
        prepare(asked.books, asked.out / "tokens")  # once, before the runs could all begin with it
    with ThreadPoolExecutor(1 if asked.finished else asked.workers) as pool:
        list(pool.map(lambda one: run(*one, asked), [(width, seed) for seed in SEEDS for width in WIDTHS]))


if __name__ == "__main__":
    main()
