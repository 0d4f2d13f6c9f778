"""`unwrite survival`: what survives of every write?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import (
    Bos,
    Convention,
    Device,
    DeviceMap,
    Dtype,
    Every,
    Json,
    Length,
    ModelName,
    Prompts,
    Quiet,
    TableOut,
    TextPath,
    job_in,
    listed,
    load_model,
    read_text,
)  # fmt: skip
from unwrite.cli.voice import Voice, produce

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener


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
    n: Prompts = 8,
    length: Length = 64,
    bos: Bos = None,
    out: TableOut = None,
    every: Every = 30.0,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What survives of every write, beside ordinary writes in its place, and who acts on it? By executed runs."""
    from unwrite.methods.survival import survival as run

    lm = load_model(model, device, dtype, convention, device_map)
    read = partial(read_text, lm, text, n, length, bos)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        named, kinds = listed(writers), tuple(controls.split(","))
        return run(lm, tokens, named, weigh, kinds, decoys, checkpoint=job, listener=listener)

    produce(lm, read, method, out, Voice(quiet, as_json), job_in(out, every))
