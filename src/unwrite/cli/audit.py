"""`unwrite audit`: scan, survival, verify, dla and a verdict, in the time that there is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import COMMON, Budget, Common, Length, TextPath, read_texts, seconds_of, spread

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.stream import Listener

    Texts = Tokens | dict[str, Tokens]


@spread
def audit(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub name or folder, by default the bundled model.")
    ] = None,
    text: TextPath = [],  # noqa: B006 - typer copies it
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="Ask about this prompt; by default found ones.")
    ] = [],  # noqa: B006
    budget: Budget = "5m",
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Prompts; by default as many as the budget allows.")
    ] = None,
    length: Length = None,
    common: Common = COMMON,
) -> None:
    """Who writes, what survives, which attributions can be believed: scan, survival, verify, dla, in words."""
    from unwrite.model.load import DEFAULT
    from unwrite.run.loop.job import Job
    from unwrite.studies.audit import LENGTH, demonstration
    from unwrite.studies.audit import audit as run
    from unwrite.studies.plan import kept, planned

    if model is None and text:
        raise typer.BadParameter("a text needs a MODEL to read it", param_hint="--text")
    lm, bos, voice, allowed = common.load(model or DEFAULT), common.bos, common.voice, seconds_of(budget)

    def some(count: int, long: int, job: Job) -> Texts:
        return read_texts(lm, text, count, long, bos, job) if model else demonstration(lm, count, long, bos)

    def read(job: Job) -> Texts:
        if n is not None or length is not None:
            return some(n or 300, length or LENGTH, job)
        plan = kept(job.folder, allowed) or planned(lm, partial(some, job=Job()), LENGTH, allowed)
        plan.save(job.folder)
        voice.plan(plan)
        return some(plan.n, plan.length, job)

    def method(tokens: Texts, listener: Listener, job: Job) -> Result:
        return run(lm, tokens, prompt or None, bos=bos if prompt else None, checkpoint=job, listener=listener)

    common.produce(lm, read, method)
