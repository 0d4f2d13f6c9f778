"""What can be done from a shell? Thin: parses, calls one method, prints, saves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from unwrite.cli.audit import audit
from unwrite.cli.circuit import circuit, overlap
from unwrite.cli.circuit import nodes as output_nodes
from unwrite.cli.doctor import doctor
from unwrite.cli.look import attention, channels, decode, graph, lens, opened
from unwrite.cli.options import (
    COMMON,
    ChangeName,
    Common,
    Json,
    Length,
    ModelName,
    Out,
    Prompts,
    Quiet,
    ShardOf,
    TaskName,
    TaskSeed,
    TextPath,
    Total,
    listed,
    pairs_in,
    read_text,
    spread,
)  # fmt: skip
from unwrite.cli.patch import bound, diff, paths
from unwrite.cli.survival import readers, self_repair, survival
from unwrite.cli.tasks import mask, solves, subspace, tasks
from unwrite.cli.voice import Voice, event, fail
from unwrite.errors import Stopped, UnwriteError
from unwrite.files import version

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener

    Texts = Tokens | dict[str, Tokens]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="What each part of a transformer writes into the residual stream, and who writes against it.",
)

P = ParamSpec("P")


def _command(body: Callable[P, None]) -> Callable[P, None]:
    """A command that an interrupt ends in words; typer would end it without any."""

    @app.command()
    @wraps(body)
    def stoppable(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            body(*args, **kwargs)
        except Stopped as stop:
            fail("stopped", str(stop), 130, out=stop.place and str(stop.place), kept=stop.kept, missing=stop.missing)
        except KeyboardInterrupt:
            fail("stopped", "stopped.", 130)

    return stoppable


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"unwrite {version('unwrite')}")
        raise typer.Exit
    return asked


@app.callback()
def _app(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which it is.")
    ] = False,
) -> None:
    """Options of every command."""


_command(audit)


@_command
@spread
def scan(
    model: ModelName,
    text: TextPath,
    writers: Annotated[str | None, typer.Option("--writers", help="Nodes, such as L0H1,MLP2; by default all.")] = None,
    n: Prompts = 300,
    length: Length = None,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Positions at the start of a prompt, apart.")] = 1,
    shard: ShardOf = None,
    common: Common = COMMON,
) -> None:
    """Who writes, how the level along each write changes, and who writes against it. Also under torchrun."""
    from unwrite.cli.shards import Shard, start

    start(Shard(model, text, n, length, writers, skip, **common.loading), common, shard)


@_command
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="The --out of every shard of a run.")],
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put the shards of a scan or of survival together: to the bit what one process would have found."""
    from unwrite.cli.shards import asked_of, run
    from unwrite.run.loop.job import Job

    run(asked_of(folders), out, Voice(quiet, as_json), Job(out, of=tuple(folders)))


@_command
@spread
def verify(
    model: ModelName,
    writer: Annotated[str, typer.Argument(metavar="WRITER", help="One node, such as L0H2.")],
    text: TextPath,
    erasers: Annotated[str | None, typer.Option("--erasers", help="Heads to hide it from, such as L2H3,L2H4.")] = None,
    n: Prompts = 100,
    length: Length = None,
    common: Common = COMMON,
) -> None:
    """What survives of one node's write, and who removes it because of it? By executed runs without the write."""
    from unwrite.methods.verify import verify as run

    lm = common.load(model)
    read = partial(read_text, lm, text, n, length, common.bos)

    def method(tokens: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, tokens, writer, listed(erasers), checkpoint=job, listener=listener)

    common.produce(lm, read, method)


@_command
@spread
def dla(
    model: ModelName,
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="A prompt; several may be given.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="One token, such as ' Paris'; by default the model's first choice.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The token it is compared with; by default the second choice.")
    ] = None,
    at: Annotated[str, typer.Option("--at", help="Replace writes at 'all' rows, or at the last 'position'.")] = "all",
    replace: Annotated[str, typer.Option("--replace", help="By zero, mean or resample.")] = "zero",
    total: Total = True,
    text: Annotated[
        list[str], typer.Option("--text", metavar="PATH", help="Other text, for means and invariance.")
    ] = [],  # noqa: B006 - typer copies it
    n: Prompts = 100,
    common: Common = COMMON,
) -> None:
    """What does each node do to a logit difference: four readings, the executed truth, and which to believe."""
    from unwrite.methods.dla import dla as run
    from unwrite.prompts.encode import prompts

    lm = common.load(model)
    asked = prompts(prompt, lm.tokenizer, common.bos)

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        texts = read_text(lm, text, n, max(2, asked.length), common.bos, job) if text else None
        return run(lm, asked, answer, against, -1, at, replace, texts, total=total, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked, method)


@_command
@spread
def effects(
    model: ModelName,
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="FILE", help="CSV or JSON lines: base, source, answer[, against, position]."),
    ] = None,
    task: TaskName = None,
    change: ChangeName = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs of the task.")] = 32,
    seed: TaskSeed = 0,
    nodes: Annotated[
        str, typer.Option("--nodes", help="heads, q, k, v, attn_out, mlp_out, …, or names: L0H1,MLP2.")
    ] = "heads",
    at: Annotated[
        str, typer.Option("--at", help="Patch 'all' positions at once, 'each', the 'last', or roles: S2,end.")
    ] = "all",
    metric: Annotated[
        str, typer.Option("--metric", help="logit_diff, log_prob, prob, kl, top, match, restricted, centred or fldd.")
    ] = "logit_diff",
    methods: Annotated[
        str, typer.Option("--methods", help="Some of exact, atp, atp*, relp, ig, direct, net.")
    ] = "direct,net,atp,relp,exact",
    common: Common = COMMON,
) -> None:
    """What does each node do when it is set to its value in another prompt: guesses beside the executed truth."""
    from unwrite.nodes import GROUPS
    from unwrite.studies.compare import compare as run

    lm = common.load(model)
    asked, names = pairs_in(lm, pairs, task, change, n, seed, common.bos), nodes if nodes in GROUPS else listed(nodes)
    where = at.split(",") if "," in at else at

    def method(_: Tokens, listener: Listener, job: Job) -> Result:
        return run(lm, asked, names or nodes, where, methods.split(","), metric, checkpoint=job, listener=listener)

    common.produce(lm, lambda _: asked.base, method)


@_command
@spread
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gelu-4l.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="DIR", help="The checkpoint's folder; by default the hub's.")
    ] = None,
    text: Annotated[
        list[str], typer.Option("--text", metavar="PATH", help="A text; by default the paper's own, from the hub.")
    ] = [],  # noqa: B006 - typer copies it
    n: Prompts = 300,
    length: Length = None,
    common: Common = COMMON,
) -> None:
    """The five figures of Dao, Lau, Rager and Janiak 2023: the paper's numbers beside ours."""
    from unwrite.studies.reproduce import WEIGHTS
    from unwrite.studies.reproduce import reproduce as run

    lm = common.load(str(weights or WEIGHTS))

    def read(job: Job) -> Texts:
        return read_text(lm, text, n, length, common.bos, job) if text else {}

    def method(tokens: Texts, listener: Listener, job: Job) -> Result:
        return run(name, lm, tokens or None, n, bos=common.bos, checkpoint=job, listener=listener)

    common.produce(lm, read, method)


@_command
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a result.nc.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Save the picture: .png, .svg, .pdf or .html.")
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(
            "--figure",
            help="heatmap, bars, matrix, curve, precision, graph, snapshots, levels, circuit, positions, fig1 to fig5.",
        ),
    ] = None,
    writer: Annotated[str | None, typer.Option("--writer", help="Whose; by default the foremost.")] = None,
    of: Annotated[str | None, typer.Option("--of", help="The variable that one of the first four draws.")] = None,
    whole: Annotated[bool, typer.Option("--all", help="Every row of every table, not only the foremost.")] = False,
    browse: Annotated[bool, typer.Option("--open", help="Open it in the browser: its page, or the picture.")] = False,
    quiet: Quiet = False,
) -> None:
    """Print a saved result again, or save a picture of it."""
    from unwrite.report.figures import save
    from unwrite.result import read

    found = read(folder)
    if browse:
        typer.launch(str(opened(found, folder, out, figure, writer, of)))
    elif out is not None:
        save(found.figure(figure, writer, of), out)
    elif figure or writer or of:
        raise typer.BadParameter("name the file that the picture goes to", param_hint="--out")
    else:
        Voice(quiet, False).end(found, None, (), whole)


_command(doctor)
_command(survival)
_command(readers)
_command(self_repair)
_command(solves)
_command(circuit)
_command(output_nodes)
_command(overlap)
_command(tasks)
_command(mask)
_command(subspace)
_command(lens)
_command(decode)
_command(graph)
_command(attention)
_command(channels)
_command(paths)
_command(bound)
_command(diff)


def main() -> None:
    """Entry point: one clear message and exit code 1 for what a user can cause, 2 for usage, 130 for Ctrl-C."""
    try:
        app()
    except UnwriteError as error:
        fail(type(error).__name__, str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except SystemExit as stop:
        # A person has been told what is wrong with the usage; another program reads events alone.
        if stop.code == 2:
            event("usage", getattr(stop.__context__, "format_message", lambda: "wrong usage")(), 2)
        raise
    except Exception as error:
        event(type(error).__name__, str(error), 1)
        raise
    finally:
        # Python looks for rings among all that is there before it ends, for seconds; the system takes it back anyway.
        gc.freeze()
