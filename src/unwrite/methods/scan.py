"""Who writes, how does the level along each write change, and who writes against it? All writers, nodes and locations
in one pass.

PR(a, b) = ⟨a, b⟩ / ‖b‖² per position (Dao, Lau, Rager, Janiak 2023, arXiv 2310.07325, eq. 2); share = Σ⟨a, b⟩ / Σ‖b‖²
adds up where medians do not. A level counts all that lies along a write, whoever wrote it: scan says that it rises,
falls or reverses; whether a write was erased only an executed run without it can say (`uw.verify`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats

from unwrite.errors import NumericError, plain
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import Node, choose
from unwrite.prompts.given import by_name
from unwrite.prompts.tokens import Tokens, spelled
from unwrite.result import QUANTILES, Result, build, quantity
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit, admit_floor, batch_size, stream
from unwrite.run.tally.gram import GramTally
from unwrite.run.tally.written import MATERIAL
from unwrite.stats.mergeable import MOST

# A candidate eraser's share is below −ERASES with a false discovery rate of FDR over all pairs that can read.
ERASES = 0.02
FDR = 0.05
# A level has changed if the 95 % interval of its energy-weighted change lies beyond this.
CHANGES = 0.1
# Where a write is largest is said with so many tokens before it.
_BEFORE = 5


def scan(
    lm: Model,
    tokens: Any,
    writers: Iterable[object] | None = None,
    skip: int = 1,
    floor: float = 1e-4,
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """What every node writes, the level along every write at every later location, and who writes against it.

    Arguments: `tokens` from `uw.text`, or text as one has it: a list of strings (each one whole prompt), chats
    (`[{"role": …, "content": …}]`, by the model's template), a file or folder (a Path, or a string that names one),
    what a tokenizer returned, or a LongTensor [prompt, position] with `mask` for its padding, on either side; a mapping
    from names to these is several texts side by side; `bos` what begins a text, as in `uw.text`; `writers` names of
    nodes, all by default; `skip` positions at the start of each prompt (attention sinks) are reported apart; where a
    write's norm is below `floor` times the largest norm of the stream at that position its ratios are left out and
    counted; `batch` prompts at a time; `checkpoint` a folder in which what is done is kept every half minute: however
    the run was stopped, the same call goes on from there, to the same bits (or a `uw.Job`, which has its own interval,
    or does a part of the work); `listener` is told the progress.
    Returns a Result (axes writer, node, location, quantile; text first where there are several):
    `pr`, `level`, `change`, `norm`, `relative_norm`, `dilution` as quantiles over positions; energy-weighted, with
    standard errors clustered by prompt, `share` (= `share_position` + `share_token`), `share_se`, `level_share`,
    `level_share_se`, `change_share`, `change_share_se`; `moved`, the energy that later nodes moved along the write,
    relative to that of the final stream; `eraser`, candidate erasers (named, strongest first, in `opposed_by`);
    `material`; `in_words`; `n_positions`, `n_below_floor`, `n_beyond_grid`; `skipped_share` and
    `skipped_norm`, level shares and root mean square of ‖o_w‖ at the skipped positions; `largest_norm`, `_prompt`,
    `_position` and `_text`, where ‖o_w‖ is largest, at most once in a prompt.
    Raises TokensError, NodeError, NumericError (an activation that is not finite, a named writer that never writes).

    Example: `uw.scan(lm, uw.text("book.txt", lm.tokenizer)).table()`
    """
    texts = {plain(name): admit(lm, part, mask, skip, bos, sees=True) for name, part in by_name(tokens).items()}
    chosen, floor = choose(writers, lm.parts), admit_floor(floor)
    sizes = [batch_size(lm, part, batch, whole_only=True) for part in texts.values()]
    settings = {"writers": [str(node) for node in chosen], "skip": skip, "floor": floor, "batch": batch}
    with opened(checkpoint, listener) as job:
        if done := job.begin("scan", lm, {name: part.hash for name, part in texts.items()}, settings, in_parts=True):
            return done
        tallies: list[GramTally] = []
        for (name, part), size in zip(texts.items(), sizes, strict=True):
            tallies.append(GramTally(lm, part, chosen, skip, floor, n_batches=-(-len(part) // size)))
            stream(lm, part, tallies[-1], size, f"scan {name}".strip(), listener, job)
        job.together()
        data = [_found(tally, chosen) for tally in tallies]
        if writers is not None:
            for part in data:
                _require_writes(part)
        whole = data[0] if list(texts) == [""] else xr.concat(data, xr.Variable("text", list(texts)))
        about = {name: part.about() for name, part in texts.items()}
        return job.signed(build("scan", whole, settings, provenance(lm), about))


def _found(tally: GramTally, writers: tuple[Node, ...]) -> xr.Dataset:
    parts = {**_quantiles(tally), **_shares(tally), **_counts(tally), **_largest(tally)}
    data = xr.Dataset(parts, _coordinates(tally.lm, writers))
    return _judge(data.assign_attrs(n_prompts=len(tally.tokens)), tally.lm, writers)


def _coordinates(lm: Model, writers: tuple[Node, ...]) -> dict[str, Any]:
    return {
        "writer": [str(node) for node in writers],
        "node": list(lm.nodes),
        "location": list(lm.locations),
        "quantile": list(QUANTILES),
    }


def _quantiles(tally: GramTally) -> dict[str, xr.Variable]:
    """The paper's view: quantiles over positions, every position alike."""
    width = len(tally.plan.writers)
    ratios = tally.ratios.quantiles(QUANTILES).reshape(tally.plan.rows, width, -1).swapaxes(0, 1)
    nodes = tally.plan.holds.shape[1]
    norm, relative = np.split(tally.sizes.quantiles(QUANTILES), 2)
    per_writer = ("writer", "quantile")
    return {
        "pr": quantity(("writer", "node", "quantile"), ratios[:, :nodes], "1", "⟨o_e, o_w⟩ / ‖o_w‖²"),
        "level": quantity(("writer", "location", "quantile"), ratios[:, nodes:-1], "1", "⟨x, o_w⟩ / ‖o_w‖²"),
        "change": quantity(per_writer, ratios[:, -1], "1", "level at the end − level right after the write"),
        "norm": quantity(per_writer, norm, "activation", "‖o_w‖"),
        "relative_norm": quantity(per_writer, relative, "1", "‖o_w‖ / ‖x right after‖"),
        "dilution": quantity(per_writer, tally.dilution.quantiles(QUANTILES), "1", "log(‖x right after‖ / ‖x end‖)"),
    }


def _shares(tally: GramTally) -> dict[str, xr.Variable]:
    """The additive view: sums over positions, every position weighted by the write's energy there."""
    sums, nodes = tally.sums.total().closed(), tally.plan.holds.shape[1]
    share, error = (part.T for part in sums.share())
    columns, energy = np.arange(len(share)), sums.x.cpu().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        position = tally.positions.split().cpu().numpy().T / energy[:, None]
        skipped = tally.skipped.total()
        skipped_energy = skipped.cpu().numpy().T[columns, tally.plan.writers.cpu()]
        skipped_norm = np.sqrt(skipped_energy / tally.n_skipped)
        skipped_share = tally.plan.complete(skipped).cpu().numpy().T[:, nodes:-1] / skipped_energy[:, None]
    moved = np.abs(share[:, -1]) * energy / float(tally.stream_energy.total())
    pair, place, alone = ("writer", "node"), ("writer", "location"), ("writer",)
    equation = "Σ⟨o_e, o_w⟩ / Σ‖o_w‖²"
    return {
        "share": quantity(pair, share[:, :nodes], "1", equation),
        "share_se": quantity(pair, error[:, :nodes], "1", "delta-method standard error over clusters of prompts"),
        "share_position": quantity(pair, position, "1", "share with the same position of other prompts"),
        "share_token": quantity(pair, share[:, :nodes] - position, "1", "share − share_position"),
        "level_share": quantity(place, share[:, nodes:-1], "1", "Σ⟨x, o_w⟩ / Σ‖o_w‖²"),
        "level_share_se": quantity(place, error[:, nodes:-1], "1", "as share_se"),
        "change_share": quantity(alone, share[:, -1], "1", "level_share at the end − right after the write"),
        "change_share_se": quantity(alone, error[:, -1], "1", "as share_se"),
        "moved": quantity(alone, moved, "1", "|Σ⟨x_end − x_after, o_w⟩| / Σ‖x_end‖²"),
        "skipped_norm": quantity(alone, skipped_norm, "activation", "root mean square of ‖o_w‖ there"),
        "skipped_share": quantity(place, skipped_share, "1", "level_share over the skipped positions"),
        "n_clusters": quantity((), np.asarray(sums.n), "1", "independent prompts or documents"),
    }


def _counts(tally: GramTally) -> dict[str, xr.Variable]:
    left_out = tally.dilution.left_out
    beyond = tally.ratios.beyond.reshape(tally.plan.rows, -1).sum(axis=0)
    return {
        "n_positions": quantity(("writer",), tally.dilution.counts.sum(1).astype(np.int64), "1", "positions counted"),
        "n_below_floor": quantity(("writer",), left_out.astype(np.int64), "1", "‖o_w‖ below floor · largest ‖x‖"),
        "n_beyond_grid": quantity(("writer",), beyond.astype(np.int64), "1", "ratios beyond ±100, reported as ±inf"),
    }


def _largest(tally: GramTally) -> dict[str, xr.Variable]:
    """Where in the text each write is largest, in words too."""
    found, tokens = tally.largest.total(), tally.tokens
    short = ((0, 0), (0, MOST - len(found.size)))  # where there are fewer prompts
    prompt, place = (np.pad(part.T.cpu().numpy(), short, constant_values=-1) for part in (found.prompt, found.place))
    norm = np.pad(found.size.sqrt().T.cpu().numpy(), short)
    axes = ("writer", "largest")
    says = [_says(tally.lm, tokens, *one) for one in zip(prompt.ravel().tolist(), place.ravel().tolist(), strict=True)]
    return {
        "largest_norm": quantity(axes, np.where(place < 0, np.nan, norm), "activation", "‖o_w‖, one of a prompt"),
        "largest_prompt": quantity(axes, prompt, "1", "index of the prompt; −1: none"),
        "largest_position": quantity(axes, place, "1", "position in it; −1: none"),
        "largest_text": xr.Variable(axes, np.array(says, dtype=object).reshape(place.shape)),
    }


def _says(lm: Model, tokens: Tokens, prompt: int, place: int) -> str:
    """The token at a place, behind some before it."""
    if place < 0:
        return ""
    ids = tokens.ids[prompt]
    before = spelled(ids[max(0, place - _BEFORE) : place], lm.tokenizer) if place else ""
    return f"{before}[{spelled(ids[place : place + 1], lm.tokenizer)}]"


def _judge(data: xr.Dataset, lm: Model, writers: tuple[Node, ...]) -> xr.Dataset:
    """Candidate erasers, materiality and a reading in words."""
    can_read = np.array([[lm.can_read(node, writer) for node in lm.parts] for writer in writers])
    after = [lm.states.index(lm.after(writer)) for writer in writers]
    index = xr.DataArray(after, dims="writer")
    start, end = data["level_share"].isel(location=index), data["level_share"].isel(location=-1)
    end_error = data["level_share_se"].isel(location=-1)
    dilution = data["dilution"].sel(quantile=0.5)
    material = data["relative_norm"].sel(quantile=0.5) >= MATERIAL
    degrees = int(data["n_clusters"]) - 1
    words = [
        _in_words(*row)
        for row in zip(
            *(part.values for part in (start, end, end_error, data["change_share"], data["change_share_se"], dilution)),
            [stats.t.ppf(0.975, degrees) if degrees > 0 else np.nan] * len(writers),
            strict=True,
        )
    ]
    found = candidates(data["share"].values, data["share_se"].values, can_read, degrees)
    return data.assign(
        level_after=data["level"].isel(location=index).drop_vars("location").assign_attrs(equation="level right after"),
        level_end=data["level"].isel(location=-1, drop=True).assign_attrs(equation="level at the end"),
        eraser=(("writer", "node"), found),
        opposed_by=(
            "writer",
            np.array([_opponents(lm, *pair) for pair in zip(data["share"].values, found, strict=True)], object),
        ),
        material=("writer", material.values),
        in_words=("writer", np.array(words, dtype=object)),
        right_after=("writer", np.array([lm.locations[i] for i in after], dtype=object)),
    )


def _opponents(lm: Model, share: np.ndarray, found: np.ndarray) -> str:
    return " ".join(lm.nodes[i] for i in np.argsort(share) if found[i])


def candidates(
    share: Float[np.ndarray, "writer node"],
    error: Float[np.ndarray, "writer node"],
    can_read: Bool[np.ndarray, "writer node"],
    degrees: int,
) -> Bool[np.ndarray, "writer node"]:
    """Pairs whose share has a Benjamini–Hochberg upper bound below −ERASES, among those that can read.

    One-sided t tests of share ≥ −ERASES, rate FDR: the rejected pairs are those whose upper bound at the level that
    the procedure allots them lies below −ERASES. To be significantly below 0 is no finding: nearly every pair is.
    """
    found = np.zeros_like(can_read)
    testable = can_read & np.isfinite(share) & np.isfinite(error)
    if degrees < 1 or not testable.any():
        return found
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, (share + ERASES) / error, np.copysign(np.inf, share + ERASES))
    found[testable] = stats.false_discovery_control(stats.t.cdf(t[testable], degrees)) <= FDR
    return found & (share < -ERASES)


def _in_words(
    start: float, end: float, end_se: float, change: float, change_se: float, dilution: float, t: float
) -> str:
    """One line about a writer. Never "kept" or "erased": a level does not say whose doing it is."""
    if np.isnan(change):
        return "never writes"
    arrow = f"{start:.2f} → {end:.2f}"
    if np.isnan(t):
        return f"{arrow}, from one prompt: no interval"
    if change + t * change_se < -CHANGES:
        reverses = start > 0 and end + t * end_se < 0
        return f"{'reverses' if reverses else 'falls'} {arrow}"
    if change - t * change_se > CHANGES:
        return f"rises {arrow}"
    diluted = dilution < -np.log(2)
    return f"level {arrow}" + (f", diluted ×{np.exp(-dilution):.1f}" if diluted else "")


def _require_writes(data: xr.Dataset) -> None:
    silent = [str(name) for name in data["writer"].values[data["n_positions"].values == 0]]
    if silent:
        verb = "writes" if len(silent) == 1 else "write"
        raise NumericError(
            f"{', '.join(silent)} never {verb} on this text: no position is above the floor",
            fix="leave what never writes out of writers, or lower floor",
        )
