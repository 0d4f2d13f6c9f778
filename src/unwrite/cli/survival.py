"""`unwrite survival`: what survives of every write?"""

from __future__ import annotations

from typing import Annotated, Any

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
    ShardOf,
    TableOut,
    TextPath,
)  # fmt: skip


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
    shard: ShardOf = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What survives of every write, beside ordinary writes in its place, and who acts on it? Also under torchrun."""
    from unwrite.cli.shards import Shard, start

    settings: dict[str, Any] = {"method": "survival", "weigh": weigh, "controls": controls, "decoys": decoys}
    asked = Shard(model, text, n, length, writers, 1, device, device_map, dtype, convention, bos, **settings)
    start(asked, out, every, shard, quiet, as_json)
