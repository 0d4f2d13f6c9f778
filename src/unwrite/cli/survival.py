"""`unwrite survival`: what survives of every write?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from unwrite.cli.options import COMMON, Common, Length, ModelName, ShardOf, TextPath, seconds_of, spread

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
