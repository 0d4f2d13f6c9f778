"""Which tasks are there, does a model do one, and which nodes, or directions of a site, carry what is another in it?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import COMMON, ChangeName, Common, ModelName, TaskName, TaskSeed, listed, pairs_in, spread

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener


def tasks() -> None:
    """The tasks that --task takes: each with its changes and an example."""
    from unwrite.tasks.listed import TASKS

    for name, task in TASKS.items():
        typer.echo(f"{name}: {task.says}")
        for change, what in task.changes.items():
            typer.echo(f"    --change {change}: {what.says}")
        typer.echo("".join(f"    | {line}\n" for line in task.example().splitlines()))


@spread
def solves(
    model: ModelName,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="A task, see `unwrite tasks`.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Prompts.")] = 56,
    seed: TaskSeed = 0,
    common: Common = COMMON,
) -> None:
    """Does the model do a task at all, by template: the gate before any effect."""
    from unwrite.methods.solves import solves as run

    lm = common.load(model)
    asked = pairs_in(lm, None, task, None, n, seed, common.bos)

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, asked, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked.base, method)


@spread
def mask(
    model: ModelName,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Pairs, as for effects; held out pair by pair.")
    ] = None,
    task: TaskName = None,
    change: ChangeName = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="CHANGE", help="A change of the task that is to stay without effect."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs of the task.")] = 96,
    seed: TaskSeed = 0,
    nodes: Annotated[str, typer.Option("--nodes", help="heads, q, mlp_out, …, or names: L0H1,MLP2.")] = "heads",
    at: Annotated[str, typer.Option("--at", help="A role, or several: S2,end; 'last', 'all', or 'each'.")] = "end",
    penalty: Annotated[str, typer.Option("--penalty", help="What a node costs, in logits.")] = "0.3,0.1,0.03",
    source: Annotated[
        str, typer.Option("--source", help="source, mean, zero, resample, or another model of the same shape.")
    ] = "source",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Masks for each penalty.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the optimiser.")] = 100,
    common: Common = COMMON,
) -> None:
    """Which nodes carry what base and source prompts differ in: a mask, learned, and tried on other templates."""
    from unwrite.errors import NumericError
    from unwrite.methods.mask import mask as run
    from unwrite.nodes import GROUPS
    from unwrite.run.source.values import DONORS

    try:
        costs = [float(one) for one in penalty.split(",")]
    except ValueError:
        raise NumericError(
            "penalty is what a node costs, in logits", got=penalty, expected="numbers: 0.3,0.1"
        ) from None
    lm = common.load(model)
    asked = pairs_in(lm, pairs, task, change, n, seed, common.bos)
    kept = None if keep is None else pairs_in(lm, None, task, keep, n, seed, common.bos)
    given = source if source in DONORS else common.load(source)
    held = "template" if len({*(asked.template or ())}) > 1 else "pair"

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        names = nodes if nodes in GROUPS else listed(nodes) or []
        where = at.split(",") if "," in at else at
        return run(
            lm, asked, names, where, kept, costs, given, seeds, steps, held=held, checkpoint=job, listener=listener
        )

    common.produce(lm, lambda _: asked.base, method)


@spread
def subspace(
    model: ModelName,
    site: Annotated[str, typer.Option("--site", help="resid_post21, MLP20.act, L0H1.q+L0H2.q; several by commas.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Pairs, as for effects; held out pair by pair.")
    ] = None,
    task: TaskName = None,
    change: ChangeName = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs of the task.")] = 112,
    seed: TaskSeed = 0,
    k: Annotated[int, typer.Option("-k", min=1, help="Directions.")] = 1,
    at: Annotated[str, typer.Option("--at", help="The role at which the site is looked at.")] = "end",
    method: Annotated[str, typer.Option("--method", help="das (learned), mean, svd or gradient.")] = "das",
    readers: Annotated[str | None, typer.Option("--readers", help="Who reads a state: L23H0.q,L23H1.q.")] = None,
    restrict: Annotated[
        bool, typer.Option("--restrict", help="Keep these directions alone, with --method svd: are so few enough?")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Fits of each site.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the optimiser.")] = 100,
    controls: Annotated[str, typer.Option("--controls", help="Some of random,arbitrary,untrained; or none.")] = (
        "random,arbitrary,untrained"
    ),
    common: Common = COMMON,
) -> None:
    """Directions of a site that carry what base and source prompts differ in, with the controls of an illusion."""
    from unwrite.methods.subspace import subspace as run

    lm = common.load(model)
    asked = pairs_in(lm, pairs, task, change, n, seed, common.bos)
    sites = site if "," not in site else listed(site)
    held = "template" if len({*(asked.template or ())}) > 1 else "pair"

    def method_(_: Tokens, listener: Listener, job: Job) -> Result:
        return run(
            lm, asked, sites or site, k, at, method, listed(readers), restrict, seeds, steps, held=held,
            controls=[] if controls == "none" else listed(controls) or [], checkpoint=job, listener=listener,
        )  # fmt: skip

    common.produce(lm, lambda _: asked.base, method_)
