"""`unwrite circuit`, `nodes`, `overlap`: what keeps a behaviour, who writes the answers, what do two results share?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import (
    COMMON,
    ChangeName,
    Common,
    Json,
    ModelName,
    Out,
    Quiet,
    TaskName,
    TaskSeed,
    listed,
    pairs_in,
    spread,
)
from unwrite.cli.voice import Voice

if TYPE_CHECKING:
    from unwrite.model.view import Model
    from unwrite.prompts.pairs import Pairs
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener


_Order = Annotated[
    str,
    typer.Option(
        "--order", help="Estimators: relp, atp, direct, net, ig, exact; of all edges: eap, eap-ig; names: =L2H3,MLP4."
    ),
]
_Nodes = Annotated[
    str | None,
    typer.Option("--nodes", help="What is replaced where it is not kept: heads, mlp_out, or names; edges of eap's."),
]
_Gates = Annotated[
    bool | None, typer.Option("--gates/--no-gates", help="Runs without each single node; by default not of edges.")
]


@spread
def circuit(
    model: ModelName,
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="FILE", help="CSV or JSON lines, as for effects; a half of them ranks."),
    ] = None,
    task: TaskName = None,
    change: ChangeName = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs of the task that are judged by.")] = 10,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Other pairs of the task, that make the orders.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the task, and of what is drawn.")] = 0,
    order: _Order = "relp",
    nodes: _Nodes = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="How many are kept, such as 10,20,40.")] = None,
    by: Annotated[str, typer.Option("--by", help="absolute, signed, or both.")] = "absolute,signed",
    given: Annotated[str | None, typer.Option("--given", help="Nodes that every circuit has, such as MLP0.")] = None,
    at: Annotated[str | None, typer.Option("--roles", help="By position: tokens of the task, such as S2,end.")] = None,
    source: Annotated[str, typer.Option("--replace", help="By the source prompt, mean, zero or resample.")] = "source",
    draws: Annotated[int, typer.Option("--draws", min=0, help="Random orders beside.")] = 10,
    gates: _Gates = None,
    metric: Annotated[
        str, typer.Option("--metric", help="logit_diff, log_prob, prob, kl, match, restricted or centred.")
    ] = "logit_diff",
    common: Common = COMMON,
) -> None:
    """How much of a behaviour do the first nodes, or edges, of an order keep, all else replaced? Executed."""
    from unwrite.methods.circuit import EDGES
    from unwrite.methods.circuit import circuit as run

    lm, named, roles = common.load(model), EDGES if nodes == EDGES else listed(nodes), listed(at)
    judged, ranking = _both(lm, pairs, task, change, (n, rank), seed, common.bos)
    counts = None if sizes is None else [_number(size) for size in sizes.split(",")]

    def method(_: object, listener: Listener, job: Job) -> Result:
        made = _orders(lm, ranking, order, None if named == EDGES else named, roles or "all", metric, listener)
        return run(
            lm, judged, made, counts, source, by.split(","), listed(given) or (), roles, draws, nodes=named,
            metric=metric, gates=gates, seed=seed, checkpoint=job, listener=listener,
        )  # fmt: skip

    common.produce(lm, lambda _: judged.base, method)


@spread
def nodes(
    model: ModelName,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="A task with choices, see `unwrite tasks`.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Prompts of the task that are judged by.")] = 64,
    rank: Annotated[int, typer.Option("--rank", min=2, help="Other prompts of the task, that name the nodes.")] = 64,
    seed: TaskSeed = 0,
    share: Annotated[float, typer.Option("--share", help="Of all direct effects, that the nodes add up to.")] = 0.8,
    common: Common = COMMON,
) -> None:
    """Which nodes write an answer's label, for which answers, and which help through others: the output nodes."""
    from unwrite.studies.output_nodes import output_nodes

    lm = common.load(model)
    judged, ranking = _both(lm, None, task, None, (n, rank), seed, common.bos)

    def method(_: object, listener: Listener, job: Job) -> Result:
        return output_nodes(lm, ranking, judged, share, seed=seed, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: judged.base, method)


def _orders(
    lm: Model, ranking: Pairs, order: str, nodes: list[str] | None, at: list[str] | str, metric: str, listener: Listener
) -> dict[str, object]:
    """A list of names, or a result for each estimator: of nodes, or of all edges."""
    from unwrite.methods.circuit import NODES
    from unwrite.methods.effects import effects
    from unwrite.methods.paths import SLOPES, paths

    if order.startswith("="):
        return {"listed": listed(order[1:]) or []}
    return {
        name: paths(lm, ranking, "all", "all", None, metric, method=name, at=at, listener=listener)
        if name in SLOPES
        else effects(lm, ranking, nodes or NODES, at, name, metric, listener=listener)
        for name in order.split(",")
    }


def _both(
    lm: Model, file: Path | None, task: str | None, change: str | None, n: tuple[int, int], seed: int, bos: bool | None
) -> tuple[Pairs, Pairs]:
    """Pairs to judge by, and others to rank by."""
    judged = pairs_in(lm, file, task, change, n[0], seed + 1, bos)
    if file is None:
        return judged, pairs_in(lm, file, task, change, n[1], seed, bos)
    ranking, judged = judged.split("pair", 0.5, seed)
    return judged, ranking


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise typer.BadParameter("write whole numbers, such as 10,20,40", param_hint="--sizes")
    return int(text)


def overlap(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder with a result.nc of effects, or a file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same model and nodes.")],
    top: Annotated[str, typer.Option("--top", help="Parts of all nodes, such as 0.02,0.05.")] = "0.02",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the halves of pairs.")] = 0,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Which of their largest nodes do two results share, against chance and their own halves?"""
    from unwrite.result import read
    from unwrite.studies.keep import keep
    from unwrite.studies.overlap import overlap as run

    try:
        parts = [float(part) for part in top.split(",")]
    except ValueError:
        raise typer.BadParameter("write parts of 1, such as 0.02,0.05", param_hint="--top") from None
    found = keep(lambda *_: run(read(a), read(b), parts, seed=seed), out)
    assert found is not None  # noqa: S101 (no shard)
    Voice(quiet, as_json).end(found[0], out, found[1])
