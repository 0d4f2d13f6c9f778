"""`unwrite paths`, `bound` and `diff`: effects along edges, what a guess may have missed, two things side by side?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import COMMON, Common, ModelName, TextPath, listed, read_text, spread
from unwrite.cli.voice import Voice

if TYPE_CHECKING:
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener

_PairsFile = Annotated[
    Path, typer.Option("--pairs", metavar="FILE", help="CSV or JSON lines: base, source, answer[, against, position].")
]
_Metric = Annotated[str, typer.Option("--metric", help="logit_diff, log_prob, prob or kl.")]


@spread
def paths(
    model: ModelName,
    pairs: _PairsFile,
    senders: Annotated[str, typer.Option("--senders", help="heads, mlp_out, …, names: L0H1,MLP0, or all.")] = "heads",
    receivers: Annotated[str, typer.Option("--receivers", help="Names: L2H3.q,L2.v,logits, or all.")] = "logits",
    mlps: Annotated[
        str | None, typer.Option("--mlps", help="Of executed edges: recompute (the default), or frozen: direct ones.")
    ] = None,
    metric: _Metric = "logit_diff",
    method: Annotated[
        str, typer.Option("--method", help="exact, or guesses of all direct edges at once: eap, eap-ig.")
    ] = "exact",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of eap-ig, from source to base.")] = 5,
    common: Common = COMMON,
) -> None:
    """What does each sender do through each receiver alone, set to its value in another prompt?"""
    from unwrite.methods.paths import paths as run
    from unwrite.prompts.given_pairs import read_pairs

    lm = common.load(model)
    asked = read_pairs(pairs, lm.tokenizer, common.bos)

    def found(_: object, listener: Listener, job: Job) -> Result:
        ends = (listed(senders) or [], listed(receivers) or [])
        return run(lm, asked, *ends, mlps, metric, method=method, steps=steps, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked.base, found)


@spread
def bound(
    model: ModelName,
    pairs: _PairsFile,
    nodes: Annotated[str, typer.Option("--nodes", help="heads, q, mlp_out, …, or names: L0H1,MLP2.")] = "heads",
    guess: Annotated[str, typer.Option("--guess", help="Of which estimator: atp, atp*, relp, ig, …")] = "atp",
    verified: Annotated[int, typer.Option("--verified", min=0, help="So many of the largest are executed.")] = 10,
    metric: _Metric = "logit_diff",
    common: Common = COMMON,
) -> None:
    """How large an effect may a guess have missed, beyond those that were executed?"""
    from unwrite.methods.bound import bound as run
    from unwrite.methods.effects import effects
    from unwrite.nodes import GROUPS
    from unwrite.prompts.given_pairs import read_pairs

    lm = common.load(model)
    asked, chosen = read_pairs(pairs, lm.tokenizer, common.bos), nodes if nodes in GROUPS else listed(nodes) or []

    def method(_: object, listener: Listener, job: Job) -> Result:
        guessed = effects(lm, asked, chosen, "all", guess, metric, listener=listener)
        return run(lm, asked, guessed, verified, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked.base, method)


@spread
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder with a result.nc; or a model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one of the same method; or of the same shape.")],
    text: TextPath = [],  # noqa: B006 - typer copies it
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Of models: pairs, as for effects.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Of models: at most this many prompts.")] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Of models: tokens of a prompt.")] = 64,
    common: Common = COMMON,
) -> None:
    """What is another in B than in A: two results, or two models that read the same."""
    from unwrite.prompts.given_pairs import read_pairs
    from unwrite.result import FILE, read
    from unwrite.studies.diff import diff as run
    from unwrite.studies.keep import keep

    if (Path(a) / FILE).exists() or a.endswith(".nc"):
        found = keep(lambda *_: run(read(a), read(b)), common.out)
        assert found is not None  # noqa: S101 (no shard)
        Voice(common.quiet, common.as_json).end(found[0], common.out, found[1])
        return
    first, second = common.load(a), common.load(b)
    asked = None if pairs is None else read_pairs(pairs, first.tokenizer, common.bos)

    def method(tokens: object, listener: Listener, job: Job) -> Result:
        return run(first, second, tokens if text else None, asked, listener=listener)

    def given(job: Job) -> object:
        return read_text(first, text, n, length, common.bos, job) if text or asked is None else asked.base

    common.produce(first, given, method)
