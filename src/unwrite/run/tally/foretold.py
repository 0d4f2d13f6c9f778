"""How long will all runs without a write of a prompt take? Told by a few of them, before the others are paid for."""

from __future__ import annotations

from dataclasses import replace

from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.stream import batch_size, batches
from unwrite.run.loop.trial import clock
from unwrite.run.replay.removed import at_once, begins, behind
from unwrite.run.tally.survives import Measuring, Removals
from unwrite.run.tally.written import Written

# Blocks behind the writers that are tried, if there are such: enough to be timed, and far fewer than behind most.
_TRIED = 10


def per_prompt(asked: Removals) -> float:
    """Seconds that each prompt takes, from as many runs of the first one as go up together; a block costs alike in all.

    The seconds are those of `clock`.
    """
    lm, now = asked.lm, clock(asked.lm)
    some = _tried(asked)
    weights = {name: part[some] for name, part in asked.weights.items()}
    few = replace(asked, writers=[asked.writers[i] for i in some], weights=weights)
    start = now()
    of = Measuring(few, next(batches(asked.tokens, 1)))
    prepared = now() - start
    for _ in of.all({}):
        pass
    of.found()
    runs = now() - start - prepared
    return prepared + runs * behind(lm, asked.writers) / max(behind(lm, few.writers), 1)


def _tried(asked: Removals) -> list[int]:
    """Writers with about so many blocks behind, whose runs fill what goes up together."""
    lm, size = asked.lm, at_once(asked.tokens.length, asked.lm.device)
    near = [abs(len(lm.layers) - begins(lm, node) - _TRIED) for node in asked.writers]
    count = max(1, size // len(asked.puts_in))
    return sorted(sorted(range(len(near)), key=near.__getitem__)[:count])


def looked_at(lm: Model, tokens: Tokens, skip: int = 1) -> tuple[Written, float]:
    """What is written on some prompts, and the seconds that it takes to see that of one."""
    tally, now = Written(lm, tokens, skip), clock(lm)
    start = now()
    for batch in batches(tokens, batch_size(lm, tokens)):
        tally.step(batch)
    return tally, (now() - start) / len(tokens)
