"""`unwrite lens`, `attention`, `channels`: what do states say, where do heads look, who reads them? And pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.cli.options import COMMON, Common, ModelName, Prompts, TaskName, TaskSeed, listed, pairs_in, spread

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener

Prompt = Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="A prompt; several may be given.")]


@spread
def lens(
    model: ModelName,
    prompt: Prompt,
    answer: Annotated[
        str | None, typer.Option("--answer", help="The token to follow; by default the model's own choice.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="logit, or frozen: by the norm of the last state.")] = "logit",
    top: Annotated[int, typer.Option("--top", min=1, help="So many tokens of each state.")] = 5,
    common: Common = COMMON,
) -> None:
    """What would the model say if it ended here? Every state of the stream through the final norm and unembedding."""
    from unwrite.methods.lens import lens as run
    from unwrite.prompts.encode import prompts

    lm = common.load(model)
    asked = prompts(prompt, lm.tokenizer, common.bos)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, tokens, kind, answer, top, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked, method)


@spread
def decode(
    model: ModelName,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Several may be given.")] = None,
    at: Annotated[
        str, typer.Option("--at", help="Which state: end, a position, a role such as S2, or words of the prompt.")
    ] = "end",
    into: Annotated[
        str | None, typer.Option("--into", help="The prompt that it is put in; by default one that says words twice.")
    ] = None,
    placeholder: Annotated[str, typer.Option("--placeholder", help="The token of it that holds the place.")] = "x",
    locations: Annotated[
        str | None, typer.Option("--locations", help="Such as resid_post3,resid_mid*; by default all between blocks.")
    ] = None,
    place: Annotated[str, typer.Option("--place", help="same, embed, or the name of a state.")] = "same",
    answer: Annotated[str | None, typer.Option("--answer", help="What should be said.")] = None,
    say: Annotated[int, typer.Option("--tokens", min=1, help="So many tokens are said.")] = 20,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Of pairs the base prompts, with their roles.")
    ] = None,
    task: TaskName = None,
    n: Prompts = 20,
    seed: TaskSeed = 0,
    common: Common = COMMON,
) -> None:
    """What does the model itself say of a state, when another prompt holds it at a placeholder?"""
    from unwrite.methods.decode import SAME_AGAIN
    from unwrite.methods.decode import decode as run
    from unwrite.prompts.encode import prompts

    lm = common.load(model)
    if bool(prompt) == (pairs is not None or task is not None):
        raise typer.BadParameter("name prompts, or pairs, or a task", param_hint="--prompt, --pairs, --task")
    both = None if prompt else pairs_in(lm, pairs, task, None, n, seed, common.bos)
    asked = prompts(prompt or [], lm.tokenizer, common.bos) if both is None else both.base
    where = int(at) if at.removeprefix("-").isdecimal() else at

    def method(read: Tokens, listener: Listener, job: Job) -> Result:
        return run(
            lm, both or read, where, into or SAME_AGAIN, placeholder=placeholder, locations=listed(locations),
            place=place, answer=answer, tokens=say, checkpoint=job, listener=listener,
        )  # fmt: skip

    common.produce(lm, lambda _: asked, method)


@spread
def graph(
    model: ModelName,
    claim: Annotated[list[str], typer.Option("--claim", metavar="TEXT", help="A sentence; several may be given.")],
    locations: Annotated[
        str | None, typer.Option("--locations", help="Such as resid_post3,resid_mid*; by default all between blocks.")
    ] = None,
    place: Annotated[str, typer.Option("--place", help="embed, same, or the name of a state.")] = "embed",
    say: Annotated[int, typer.Option("--tokens", min=1, help="So many tokens are said.")] = 100,
    common: Common = COMMON,
) -> None:
    """Which facts does an instruct model state of claims, and of its states? `show --figure snapshots` draws them."""
    from unwrite.prompts.claims import claims_of, weighed
    from unwrite.studies.graph import graph as run

    lm = common.load(model)
    claims = claims_of(claim)

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, claims, locations=listed(locations), place=place, tokens=say, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: weighed(claims, lm.tokenizer)[0], method)


@spread
def attention(
    model: ModelName,
    prompt: Prompt,
    heads: Annotated[str | None, typer.Option("--heads", help="Some, such as L2H3,L4H*; by default all.")] = None,
    weigh: Annotated[str, typer.Option("--weigh", help="pattern, or value: times how much is brought.")] = "pattern",
    common: Common = COMMON,
) -> None:
    """Where does every head look, and how much does it bring from there?"""
    from unwrite.methods.attention import attention as run
    from unwrite.prompts.encode import prompts

    lm = common.load(model)
    asked = prompts(prompt, lm.tokenizer, common.bos)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, tokens, weigh, listed(heads), checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked, method)


@spread
def channels(
    model: ModelName,
    writers: Annotated[str | None, typer.Option("--writers", help="Heads, such as L2H3,L4H*; by default all.")] = None,
    readers: Annotated[str | None, typer.Option("--readers", help="Heads that read; by default all.")] = None,
    sides: Annotated[str, typer.Option("--sides", help="By what they read: some of qkv.")] = "qkv",
    offset: Annotated[int, typer.Option("--offset", min=0, help="Tokens from key to query, where they turn.")] = 0,
    common: Common = COMMON,
) -> None:
    """Which singular channel of a head is read by which later head, by the weights alone?"""
    from unwrite.methods.channels import channels as run
    from unwrite.studies.keep import keep

    lm = common.load(model)
    send, read = (listed(names) or "heads" for names in (writers, readers))
    found = keep(lambda *_: run(lm, send, read, sides, offset), common.out)
    assert found is not None  # noqa: S101 (no shard)
    common.voice.end(found[0], common.out, found[1])


def opened(
    found: Result, folder: Path, out: Path | None, figure: str | None, writer: str | None, of: str | None
) -> Path:
    """What a browser can show of a saved result: its page, unless a picture is asked for or there is no page."""
    from unwrite.report.figures import save

    page = (folder if folder.is_dir() else folder.parent) / "report.html"
    if page.exists() and figure is writer is out is of is None:
        return page.resolve()
    return save(found.figure(figure, writer, of), out or page.with_name("figure.html")).resolve()
