"""What can be said to several commands, and what becomes of it: a model, tokens, a job."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from unwrite.cli.voice import JSON, Voice, produce

if TYPE_CHECKING:
    from unwrite.model.view import Model
    from unwrite.prompts.pairs import Pairs
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.peers import Ranks
    from unwrite.run.loop.stream import Listener

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A hub name, a folder of a model, or default.")]
TextPath = Annotated[
    list[str],
    typer.Option("--text", metavar="[NAME=]PATH", help="A text file, folder or hub:owner/name; several are compared."),
]
Prompts = Annotated[int, typer.Option("-n", min=1, help="At most this many prompts of each text.")]
Budget = Annotated[
    str,
    typer.Option("--budget", metavar="TIME", help="How long it may take: 90s, 5m, 2h. Not with -n."),
]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="Pairs of a task, see `unwrite tasks`, instead of a file.")
]
ChangeName = Annotated[str | None, typer.Option("--change", help="What a task's source prompts have otherwise.")]
TaskSeed = Annotated[int, typer.Option("--seed", min=0, help="Of the task.")]
Length = Annotated[
    int | None, typer.Option("--length", min=2, help="Tokens of a prompt, by default min(1024, context).")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin every text with BOS, or not; by default as the tokenizer does."),
]
Total = Annotated[
    bool, typer.Option("--total/--no-total", help="Execute the truth beside the readings; without, it takes seconds.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for the result and its table.")]
Every = Annotated[
    float, typer.Option("--checkpoint-every", metavar="SECONDS", min=0, help="How often --out keeps what is done.")
]
Device = Annotated[str | None, typer.Option("--device", help="Where the model goes, such as cuda.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto: spread the model over all devices, memory and disk.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …, or auto: that of the weights.")]
Convention = Annotated[str, typer.Option("--convention", help="paper or raw.")]
ShardOf = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Do the I-th of N parts, to be put together by merge.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the verdict alone.")]
Json = Annotated[bool, typer.Option(JSON, help="Print events for another program, one JSON object per line.")]


def job_in(out: Path | None, every: float, shard: str | None = None, ranks: Ranks | None = None) -> Job:
    """What is kept in `out`; a part of the work where a shard is named, or this is a rank of several."""
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.peers import rank

    if ranks is None and rank()[1] > 1:
        raise typer.BadParameter("only scan and survival run in several processes", param_hint="torchrun")
    if shard is None:
        return Job(out, every) if ranks is None else Job(out, every, (ranks.rank + 1, ranks.size), peers=ranks)
    part, _, of = shard.partition("/")
    if ranks is not None or not (part.isdecimal() and of.isdecimal()):
        raise typer.BadParameter("write --shard I/N, and not under torchrun", param_hint="--shard")
    return Job(out, every, (int(part), int(of)))


@contextmanager
def joined_ranks() -> Iterator[Ranks | None]:
    """The processes of a torchrun; None without one. torch is not loaded to find that out."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from unwrite.run.loop.peers import joined

    with joined() as ranks:
        yield ranks


def load_model(
    model: str, device: str | None, dtype: str | None, convention: str, device_map: str | None = None
) -> Model:
    """The model that a command names; of several processes on one machine each has an accelerator of its own."""
    from unwrite.errors import ModelError
    from unwrite.model.load import load, quieten

    quieten()
    if dtype is not None and dtype not in ("auto", "float64", "float32", "float16", "bfloat16"):
        raise ModelError("unknown dtype", got=dtype, expected="float64, float32, float16, bfloat16 or auto")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return load(model, device=device, device_map=device_map, dtype=dtype, convention=convention)


def read_texts(
    lm: Model, paths: list[str], n: int, length: int | None, bos: bool | None, job: Job
) -> Tokens | dict[str, Tokens]:
    """The text that --text names, or the texts by their names; the job keeps how far a data set is read."""
    from unwrite.prompts.texts import text

    if not paths:
        raise typer.BadParameter("name the text that the model should read", param_hint="--text")
    named = [path.split("=", 1) if "=" in path and not Path(path).exists() else [path, path] for path in paths]
    length = length or min(1024, lm.context or 1024)
    sources: dict[str, Any] = {name: _source(path) for name, path in named}
    if len(sources) < len(named):
        raise typer.BadParameter("two texts have the same name; write NAME=PATH", param_hint="--text")
    whole = sources if len(named) > 1 else next(iter(sources.values()))
    return text(whole, lm.tokenizer, n, length, bos, checkpoint=job)


def _source(path: str) -> str | Path:
    from unwrite.prompts.dataset import PREFIX

    return path if path.startswith(PREFIX) else Path(path)


def read_text(lm: Model, paths: list[str], n: int, length: int | None, bos: bool | None, job: Job) -> Tokens:
    """The one text that --text names."""
    tokens = read_texts(lm, paths, n, length, bos, job)
    if isinstance(tokens, dict):
        raise typer.BadParameter("one text at a time", param_hint="--text")
    return tokens


def pairs_in(
    lm: Model, file: Path | None, task: str | None, change: str | None, n: int, seed: int, bos: bool | None
) -> Pairs:
    """The pairs that --pairs or --task names."""
    from unwrite import tasks
    from unwrite.errors import one_of
    from unwrite.prompts.given_pairs import read_pairs

    if (file is None) == (task is None):
        raise typer.BadParameter("name a file of pairs, or a task", param_hint="--pairs, --task")
    if file is not None:
        return read_pairs(file, lm.tokenizer, bos)
    one_of("task", task, tasks.NAMES)
    return getattr(tasks, str(task))(n, lm.tokenizer, seed, bos=bos, **({} if change is None else {"change": change}))


def listed(names: str | None) -> list[str] | None:
    """Names between commas; None where none is given."""
    return names.split(",") if names else None


def seconds_of(budget: str) -> float:
    """A time as a person writes it."""
    from unwrite.errors import NumericError, seconds

    try:
        return seconds("not a time", budget)
    except NumericError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from None


@dataclass(frozen=True)
class Common:
    """What every command that asks a model can be told, in one order: how to read, keep, load and say."""

    bos: Bos = None
    out: Out = None
    every: Every = 30.0
    device: Device = None
    device_map: DeviceMap = None
    dtype: Dtype = None
    convention: Convention = "paper"
    quiet: Quiet = False
    as_json: Json = False

    @property
    def loading(self) -> dict[str, Any]:
        """Where a model goes, and how it and its text are read."""
        names = ("device", "device_map", "dtype", "convention", "bos")
        return {name: getattr(self, name) for name in names}

    @property
    def voice(self) -> Voice:
        """How a command speaks."""
        return Voice(self.quiet, self.as_json, "" if self.out is None else " · Ctrl-C stops and keeps what is done")

    def load(self, model: str) -> Model:
        """The model that a command names."""
        return load_model(model, self.device, self.dtype, self.convention, self.device_map)

    def produce(self, lm: Model, read: Callable[[Job], Any], method: Callable[[Any, Listener, Job], Result]) -> None:
        """Read and run a method, keep what it finds and say it."""
        produce(lm, read, method, self.out, self.voice, job_in(self.out, self.every))


# As of a command that is told nothing.
COMMON = Common()


def spread(body: Callable[..., None]) -> Callable[..., None]:
    """A command that is told the fields of a `Common`, of which its last parameter is one, one by one."""
    hints, own = get_type_hints(body, include_extras=True), list(inspect.signature(body).parameters.values())[:-1]
    of_common, keyword = get_type_hints(Common, include_extras=True), inspect.Parameter.POSITIONAL_OR_KEYWORD
    more = [inspect.Parameter(part.name, keyword, default=part.default) for part in fields(Common)]
    whole = [part.replace(annotation={**hints, **of_common}[part.name]) for part in (*own, *more)]

    def told(**given: Any) -> None:
        common = Common(**{part.name: given.pop(part.name) for part in fields(Common)})
        body(**given, common=common)

    told.__name__, told.__doc__ = body.__name__, body.__doc__
    told.__annotations__ = {part.name: part.annotation for part in whole}
    told.__signature__ = inspect.Signature(whole)  # pyright: ignore[reportFunctionMemberAccess]
    return told
