"""What was a run asked, so that whoever puts its shards together can ask the same again?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unwrite.cli.options import Common, job_in, joined_ranks, listed, load_model, read_text, read_texts
from unwrite.cli.voice import Voice, produce
from unwrite.errors import ResultError
from unwrite.files import write

if TYPE_CHECKING:
    from unwrite.prompts.tokens import Tokens
    from unwrite.result import Result
    from unwrite.run.loop.job import Job
    from unwrite.run.loop.stream import Listener

    Texts = Tokens | dict[str, Tokens]

_FILE = "shard.json"
_OPTIONAL = (str, type(None))
_KINDS: dict[str, Any] = {
    "model": str, "text": list, "n": int, "length": (int, type(None)), "writers": _OPTIONAL, "skip": int,
    "device": _OPTIONAL, "device_map": _OPTIONAL, "dtype": _OPTIONAL, "convention": str,
    "bos": (bool, type(None)), "method": str, "weigh": str, "controls": str, "decoys": (int, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """What `unwrite scan` or `unwrite survival` was told: the model, how to load it, the texts, how they are cut, and
    the settings; the last three are survival's."""

    model: str
    text: list[str]
    n: int
    length: int | None
    writers: str | None
    skip: int
    device: str | None
    device_map: str | None
    dtype: str | None
    convention: str
    bos: bool | None = None
    method: str = "scan"
    weigh: str = "readers"
    controls: str = "typical,signs"
    decoys: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What survival alone is told."""
        return {"weigh": self.weigh, "controls": tuple(self.controls.split(",")), "decoys": self.decoys}

    def write(self, folder: Path) -> None:
        """Leave it beside what the shard keeps. Raises ResultError where it cannot be written."""
        write(folder / _FILE, lambda place: place.write_text(json.dumps(asdict(self)), encoding="utf-8"))


def asked_of(folders: Sequence[Path]) -> Shard:
    """What all these shards were asked. Raises ResultError for a folder without a shard, and for two that differ."""
    found = {folder: _read(folder / _FILE) for folder in folders}
    first = next(iter(found))
    for folder, asked in found.items():
        other = [part.name for part in fields(Shard) if getattr(asked, part.name) != getattr(found[first], part.name)]
        if other:
            raise ResultError(
                f"{folder} and {first} hold shards of different runs", got=f"another {', '.join(other)}",
                expected="the same command, but for --shard and --out",
            )  # fmt: skip
    return found[first]


def start(asked: Shard, common: Common, shard: str | None, budget: float | None = None) -> None:
    """Do what was asked, or that part of it which the shard, or this rank of a torchrun, is there for."""
    if shard is not None and common.out is None:
        raise typer.BadParameter("a shard needs a folder that keeps it", param_hint="--out")
    with joined_ranks() as ranks:
        job = job_in(common.out, common.every, shard, ranks)
        if budget is not None and job.shard[1] > 1:
            raise typer.BadParameter("each part would choose its own prompts; say -n", param_hint="--budget")
        voice = replace(common.voice, quiet=True) if job.shard[0] > 1 and ranks is not None else common.voice
        run(asked, common.out, voice, job, budget)


def run(asked: Shard, out: Path | None, voice: Voice, job: Job, budget: float | None = None) -> None:
    """Do what was asked: the whole, or the job's part of it."""
    from unwrite.methods.scan import scan
    from unwrite.methods.survival import survival

    lm = load_model(asked.model, asked.device, asked.dtype, asked.convention, asked.device_map)
    several = asked.method == "scan"
    texts = partial(read_texts if several else read_text, lm, asked.text, asked.n, asked.length, asked.bos)
    writers, settings = listed(asked.writers), asked.settings

    def read(job: Job) -> Texts:
        tokens = texts(job)
        alone = job.shard[1] == 1 and not job.of
        return tokens if isinstance(tokens, dict) or several or not alone else planned(tokens)

    def planned(tokens: Tokens) -> Tokens:
        from unwrite.studies.plan import kept, removals

        plan = kept(job.folder, budget) or removals(lm, tokens, budget, writers=writers, skip=asked.skip, **settings)
        plan.save(job.folder)
        voice.plan(plan)
        return tokens.spread(plan.n)

    def method(tokens: Texts, listener: Listener, job: Job) -> Result:
        if job.shard[1] > 1 and job.peers is None:
            asked.write(Path(str(job.folder)))
        if several:
            return scan(lm, tokens, writers, asked.skip, checkpoint=job, listener=listener)
        return survival(lm, tokens, writers, skip=asked.skip, **settings, checkpoint=job, listener=listener)

    produce(lm, read, method, out, voice, job)


def _read(file: Path) -> Shard:
    try:
        named: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        asked = Shard(**named)
    except (OSError, ValueError, TypeError) as error:
        raise ResultError(
            f"{file.parent} holds no shard", got=error, expected="the --out of a command with --shard i/n"
        ) from None
    wrong = [name for name, kinds in _KINDS.items() if not isinstance(getattr(asked, name), kinds)]
    if wrong or asked.method not in ("scan", "survival") or not all(isinstance(part, str) for part in asked.text):
        raise ResultError(f"{file} is not what a shard writes", got=f"another kind of {', '.join(wrong) or 'text'}")
    return asked
