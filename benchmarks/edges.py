"""What do scores of all edges cost, and how well do they say what executed edges, and circuits of the best, do?

    python benchmarks/edges.py FOLDER L23H0.q,logits              of a model in a folder of Hugging Face
    python benchmarks/edges.py FOLDER L23H0.q,logits --pairs 8

Pairs of the IOI task. Time is the CPU time of this process on one thread; costs are of one pair, after a first call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import unwrite as uw
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.answer.metrics import metric_of
from unwrite.run.replay.clean import base_of
from unwrite.run.replay.edge_circuits import edge_table, kept_edges
from unwrite.run.source.values import donor

GUESSES: dict[str, dict[str, Any]] = {"eap": {"method": "eap"}, "eap-ig 5": {"method": "eap-ig", "steps": 5}}
NODES = ["embed", "heads", "mlp_out"]
SHARES = (0.002, 0.01, 0.05, 0.2)
TOP = 10


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def costs(lm: Model, pairs: Pairs) -> None:
    """Of one pair, the second of two calls."""
    one = pairs.take(np.arange(len(pairs)) < 1)
    asked: dict[str, Callable[[], object]] = {
        "nodes, ig 5": lambda: uw.effects(lm, one, NODES, "all", "ig", steps=5),
        **{f"edges, {name}": lambda how=how: uw.paths(lm, one, "all", "all", **how) for name, how in GUESSES.items()},
    }
    spent = {name: [seconds(work) for _ in range(3)][1:] for name, work in asked.items()}
    for name, each in spent.items():
        ratio = min(each) / min(spent["nodes, ig 5"])
        print(f"{name:<18} {min(each):6.2f} s of one pair, {ratio:4.2f} × nodes by ig 5")


def single(lm: Model, pairs: Pairs, receivers: list[str]) -> None:
    """Scores beside executed direct edges: over all cells, and of means over pairs."""
    executed = uw.paths(lm, pairs, "all", receivers, "frozen")["effect"]
    print(
        f"{'receiver':<12} {'guess':<10} r of cells      ranks r of means  of the {TOP} largest  Σ executed  Σ guessed"
    )
    for name, how in GUESSES.items():
        guessed = uw.paths(lm, pairs, "all", receivers, **how)["effect"]
        for receiver in receivers:
            there = executed.sel(receiver=receiver).notnull().all("pair")
            truth, guess = (part.sel(receiver=receiver)[:, there.values].values for part in (executed, guessed))
            means = truth.mean(0), guess.mean(0)
            shared = np.intersect1d(*(np.argsort(-np.abs(mean))[:TOP] for mean in means))
            numbers = [np.corrcoef(truth.ravel(), guess.ravel())[0, 1], spearmanr(truth.ravel(), guess.ravel())[0],
                       np.corrcoef(*means)[0, 1]]  # fmt: skip
            print(f"{receiver:<12} {name:<10} {' '.join(f'{number:+10.3f}' for number in numbers)} {len(shared):>18}"
                  f" {means[0].sum():+11.2f} {means[1].sum():+10.2f}")  # fmt: skip


@torch.no_grad()
def circuits(lm: Model, pairs: Pairs, other: Pairs) -> None:
    """What the best edges alone keep of the answers to other pairs, executed: (m − m(∅)) / (m(all) − m(∅))."""
    table, rows = edge_table(lm), slice(0, len(other))
    base, joins = base_of(lm, other, rows, table.sent), torch.from_numpy(table.joins)
    source, metric = donor(lm, other, table.sent, "source").values(rows), metric_of(lm, other, "logit_diff", rows)

    def kept(mask: torch.Tensor) -> float:
        return float(metric(kept_edges(base, source, table, mask)).mean())

    full, none = kept(joins), kept(torch.zeros_like(joins))
    print(f"{int(joins.sum()):,} edges; logit difference {full:+.2f} with all, {none:+.2f} with none of them")
    ranks = {name: uw.paths(lm, pairs, "all", "all", **how)["mean"].values for name, how in GUESSES.items()}
    ranks["random"] = np.where(table.joins, np.random.default_rng(0).standard_normal(joins.shape), np.nan)
    print(f"{'faithfulness of':<24} {' '.join(f'{share:>7.1%}' for share in SHARES)}  of all edges")
    # Signed: first the edges without which the answer is less.
    for by, sign in (("absolute", 0), ("signed", -1)):
        for name, score in ranks.items() if by == "absolute" else [*ranks.items()][:-1]:
            value = np.nan_to_num(sign * score if sign else np.abs(score), nan=-np.inf)
            order, found = np.argsort(-value, axis=None), []
            for share in SHARES:
                mask = torch.zeros(joins.numel(), dtype=torch.bool)
                mask[order[: int(share * joins.sum())].copy()] = True
                found.append((kept(mask.view_as(joins)) - none) / (full - none))
            print(f"{name + ', ' + by:<24} {' '.join(f'{one:7.2f}' for one in found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("receivers", nargs="?", default="L2H3.q,MLP3,logits", help="of edges that are executed")
    parser.add_argument("--pairs", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lm = uw.load(asked.model)
    pairs, other = (uw.tasks.ioi(asked.pairs, lm.tokenizer, seed=seed) for seed in (0, 1))
    print(uw.solves(lm, pairs).data.attrs["solves"])
    costs(lm, pairs)
    single(lm, pairs, asked.receivers.split(","))
    circuits(lm, pairs, other)


if __name__ == "__main__":
    main()
