"""Which tasks are there, and does a model do one?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import COMMON, Common, ModelName, pairs_in, spread

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
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the task.")] = 0,
    common: Common = COMMON,
) -> None:
    """Does the model do a task at all, by template: the gate before any effect."""
    from unwrite.methods.solves import solves as run

    lm = common.load(model)
    asked = pairs_in(lm, None, task, None, n, seed, common.bos)

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, asked, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked.base, method)
