"""Does a narrower stream make a model erase more? Short runs over width, tying, context and seed.

    python examples/pretrain/sweep.py --books BOOKS --out RUNS [--workers 2]

Runs what is missing in RUNS (`train.py`, then `measure.py`, one process each), and keeps each run's numbers in
`results/` beside this file, from which `table.py` makes the table and the figure of the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train import prepare

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)
# One setting at a time is moved away from width 128, untied, context 256.
CONFIGURATIONS = {
    "width 32": ["--width", "32"],
    "width 64": ["--width", "64"],
    "width 128": [],
    "tied": ["--tied"],
    "context 64": ["--context", "64", "--batch", "64"],
}


def run(name: str, seed: int, asked: argparse.Namespace) -> None:
    """Train and measure one configuration, unless its numbers are there already."""
    kept = RESULTS / f"{name.replace(' ', '-')}-{seed}.json"
    if kept.exists():
        return
    place = asked.out / kept.stem
    books, threads = ["--books", str(asked.books)], max(1, (os.cpu_count() or 1) // asked.workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def call(script: str, *arguments: str) -> None:
        with (asked.out / f"{kept.stem}.log").open("a") as log:
            command = [sys.executable, str(HERE / script), *arguments, *books]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)

    call("train.py", "--out", str(place), "--seed", str(seed), *CONFIGURATIONS[name])
    call("measure.py", str(place / "model"), "--out", str(place / "measured.json"))
    record = json.loads((place / "run.json").read_text())
    found = {"configuration": name, "seed": seed, **record, **json.loads((place / "measured.json").read_text())}
    RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{kept.stem}: {found['held_out']}", flush=True)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    prepare(asked.books, asked.out / "tokens")  # once, before the runs could all begin with it
    with ThreadPoolExecutor(asked.workers) as pool:
        list(pool.map(lambda one: run(*one, asked), [(name, seed) for seed in SEEDS for name in CONFIGURATIONS]))


if __name__ == "__main__":
    main()
