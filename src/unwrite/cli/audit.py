"""`unwrite audit`: scan, survival, verify, dla and a verdict, in the time that there is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import (
    Bos,
    Budget,
    Convention,
    Device,
    DeviceMap,
    Dtype,
    Every,
    Json,
    Length,
    Out,
    Quiet,
    TextPath,
    job_in,
    load_model,
    read_texts,
    seconds_of,
)
from unwrite.cli.voice import Voice, produce

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.stream import Listener

    Texts = Tokens | dict[str, Tokens]


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
    bos: Bos = None,
    out: Out = None,
    every: Every = 30.0,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Who writes, what survives, which attributions can be believed: scan, survival, verify, dla, in words."""
    from unwrite.model.load import DEFAULT
    from unwrite.run.loop.job import Job
    from unwrite.studies.audit import LENGTH, demonstration
    from unwrite.studies.audit import audit as run
    from unwrite.studies.plan import kept, planned

    if model is None and text:
        raise typer.BadParameter("a text needs a MODEL to read it", param_hint="--text")
    lm = load_model(model or DEFAULT, device, dtype, convention, device_map)
    voice = Voice(quiet, as_json, "" if out is None else " · Ctrl-C stops and keeps what is done")
    allowed = seconds_of(budget)

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

    produce(lm, read, method, out, voice, job_in(out, every))
