"""`unwrite survival`, `readers`, `self-repair`: what survives of writes, who reads one, what is repaired?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unwrite.cli.options import (
    COMMON,
    ChangeName,
    Common,
    Length,
    ModelName,
    ShardOf,
    TaskName,
    TaskSeed,
    TextPath,
    listed,
    pairs_in,
    read_text,
    seconds_of,
    spread,
)

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener

# So many prompts a budget chooses from.
_MOST = 1000


@spread
def survival(
    model: ModelName,
    text: TextPath,
    writers: Annotated[
        str | None,
        typer.Option("--writers", help="Nodes, such as L0H1,MLP2; by default all material ones."),
    ] = None,
    weigh: Annotated[str, typer.Option("--weigh", help="How channels count: readers, unembed or raw.")] = "readers",
    controls: Annotated[
        str, typer.Option("--controls", help="What stands in for a write: typical, signs, rotated.")
    ] = "typical,signs",
    decoys: Annotated[int | None, typer.Option("--decoys", min=1, help="Stand-ins for each writer.")] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TIME", help="How long it may take: 90s, 5m, 2h; of at most -n prompts."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Prompts, by default 8, or as many as the budget allows.")
    ] = None,
    length: Length = 64,
    shard: ShardOf = None,
    common: Common = COMMON,
) -> None:
    """What survives of every write, beside ordinary writes in its place, and who acts on it? Also under torchrun."""
    from unwrite.cli.shards import Shard, start

    settings: dict[str, Any] = {"method": "survival", "weigh": weigh, "controls": controls, "decoys": decoys}
    allowed = None if budget is None else seconds_of(budget)
    n = n or (8 if allowed is None else _MOST)
    asked = Shard(model, text, n, length, writers, 1, **common.loading, **settings)
    start(asked, common, shard, allowed)


@spread
def readers(
    model: ModelName,
    writer: Annotated[str, typer.Argument(metavar="WRITER", help="A node, such as L20H0.")],
    text: TextPath = [],  # noqa: B006 - typer copies it
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Pairs instead, as for effects.")
    ] = None,
    task: TaskName = None,
    change: ChangeName = None,
    seed: TaskSeed = 0,
    metric: Annotated[str | None, typer.Option("--metric", help="Of pairs: logit_diff, log_prob, prob or kl.")] = None,
    erasers: Annotated[
        str | None, typer.Option("--erasers", help="Nodes; by default those that surely take the write away.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Prompts, or pairs of a task.")] = 16,
    length: Length = 32,
    common: Common = COMMON,
) -> None:
    """Who reads one write and through what, who erases it and when, and what uses its space afterwards? Executed."""
    from unwrite.studies.readers import readers as run

    lm = common.load(model)
    asked = None if text and pairs is None and task is None else pairs_in(lm, pairs, task, change, n, seed, common.bos)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        given = tokens if asked is None else asked
        return run(lm, given, writer, metric, erasers=listed(erasers), checkpoint=job, listener=listener)

    def read(job: Job) -> Tokens:
        return read_text(lm, text, n, length, common.bos, job) if asked is None else asked.base

    common.produce(lm, read, method)


@spread
def self_repair(
    model: ModelName,
    text: TextPath,
    replace: Annotated[str, typer.Option("--replace", help="By zero, mean or resample.")] = "resample",
    top: Annotated[float, typer.Option("--top", help="Part of the prompts that is counted of each node.")] = 0.1,
    n: Annotated[int, typer.Option("-n", min=1, help="Prompts.")] = 96,
    length: Length = 32,
    common: Common = COMMON,
) -> None:
    """How much of a node's direct effect is not missed without it: by the norm, nodes that fill in, or erasure?

    Asked at the end of every prompt, about the model's first choice against its second.
    """
    from unwrite.methods.dla import dla
    from unwrite.studies.repair import self_repair as run

    lm = common.load(model)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        return run(dla(lm, tokens, at="position", replace=replace, checkpoint=job, listener=listener), top)

    common.produce(lm, lambda job: read_text(lm, text, n, length, common.bos, job), method)
