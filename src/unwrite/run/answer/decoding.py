"""What is said of the states of some prompts? Runs prompts × locations of one other prompt, some side by side."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import counted
from unwrite.model.load import weights_hash
from unwrite.model.view import Model
from unwrite.nodes import Site
from unwrite.prompts.tokens import Tokens
from unwrite.run.answer.injected import EMBED, START, Target, embedded
from unwrite.run.answer.logits import at_once, vocabulary
from unwrite.run.answer.translated import Translation
from unwrite.run.edit.trace import recorded
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, batch_size

# Tokens of runs that go side by side.
_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Injection:
    """What is put where: of every prompt a sum over positions, at every location, into one row of another prompt."""

    target: Target
    origin: Model
    prompts: Tokens
    weight: Float[np.ndarray, "prompt position"]
    locations: tuple[Site, ...]
    put_at: tuple[Site | str, ...]
    steps: int
    rescale: bool
    row: Int[np.ndarray, " prompt"] | None
    words: list[str] | None = None
    answer: Int[np.ndarray, "prompt spelling"] | None = None
    lens_answer: Int[np.ndarray, "prompt spelling"] | None = None
    translation: Translation | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, beside prompts and weights of the model."""
        exact = hashlib.sha256(np.ascontiguousarray(self.weight).tobytes()).hexdigest()
        other = None if self.origin.hf is self.target.lm.hf else weights_hash(self.origin)
        return {
            "locations": [*map(str, self.locations)], "place": [*map(str, self.put_at)], "weight": exact,
            "rescale": self.rescale, "tokens": self.steps, "row": self.target.row, "source": other,
            "answer": None if self.answer is None else self.answer.tolist(),
        }  # fmt: skip

    @property
    def at_once(self) -> int:
        """Runs that go side by side."""
        most = min(at_once(self.target.lm), at_once(self.origin))
        return max(1, min(most, _AT_ONCE // (len(self.target.written) + self.steps)))

    @property
    def stage(self) -> str:
        """What it will take, said before it starts."""
        runs = len(self.prompts) * len(self.locations)
        return f"decode, {counted(runs, 'run')} of {len(self.target.written)} + {self.steps} tokens"

    def size(self, batch: int | None) -> int:
        """Prompts per batch."""
        size = batch_size(self.origin, self.prompts, batch)
        return size if batch is not None else max(1, min(size, self.at_once // len(self.locations)))

    def states(self, batch: Batch) -> tuple[Float[Tensor, "prompt location d"], Tensor | None]:
        """What is decoded, as it is in the model that it is from, and what stands at the end of the row it is from."""
        names, end = [str(site) for site in self.locations], str(self.origin.states[-1])
        found = recorded(self.origin, batch.ids, [*dict.fromkeys([*names, end])])
        weight = torch.from_numpy(self.weight[batch.first : batch.first + len(batch.ids)])
        each = []
        for name, put in zip(names, self.put_at, strict=True):
            alone = put == EMBED and name == str(START) and self.translation is None
            state = embedded(self.origin, batch.ids) if alone else found[name]
            each.append(_summed(state, weight[:, : batch.ids.shape[1]]))
        if self.row is None:
            return torch.stack(each, 1), None
        rows = torch.from_numpy(self.row[batch.first : batch.first + len(batch.ids)])
        return torch.stack(each, 1), found[end][torch.arange(len(rows)), rows]

    def put(self, states: Float[Tensor, "prompt location d"]) -> Float[Tensor, "prompt location other"]:
        """What is put in the other prompt for it."""
        if self.translation is not None:
            each = [self.translation.of(i, part) for i, part in enumerate(states.unbind(1))]
            states = torch.stack(each, 1)
        if not self.rescale:
            return states
        want, have = self.target.own(self.put_at).norm(dim=-1), states.norm(dim=-1)
        return states * torch.where(have > 0, want.to(have) / have, 1.0)[..., None]


def _summed(state: Float[Tensor, "prompt position d"], weight: Tensor) -> Float[Tensor, "prompt d"]:
    """A weighted sum over positions; of one position of weight 1 that state, bit for bit."""
    weight = weight.to(state)[..., None]
    return torch.where(weight == 0, 0, weight * state).sum(1)


@dataclass(eq=False)
class SaidOf:
    """Runs prompts × locations, some side by side."""

    asked: Injection
    job: Job
    rows: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.rows = Rows(self.measured)

    @torch.no_grad()
    def measured(self, batch: Batch) -> Arrays:
        """By name, [prompt, location] and further axes."""
        asked, shape = self.asked, (len(batch.ids), len(self.asked.locations))
        states, end = asked.states(batch)
        finite, names = states.isfinite().all(-1), [*map(str, asked.locations)]
        require_finite(finite, "{location} is not finite at {prompt}", prompt=batch.first, location=names)
        own = None if end is None else vocabulary(asked.origin, end)
        logits = vocabulary(asked.origin, states)
        for part in (logits.flatten(1), *(() if own is None else (own,))):
            require_finite(part.isfinite().all(-1), "a logit of {prompt} is not finite", prompt=batch.first)
        answer, lens_answer = (self._answer(batch, own, name) for name in ("answer", "lens_answer"))
        lens = _first(logits.flatten(0, 1), _each(lens_answer, shape))
        found = {**self._said(asked.put(states), _each(answer, shape)), "norm": states.norm(dim=-1).flatten()}
        found |= {f"lens_{name}": part for name, part in lens.items()}
        whole = {name: part.unflatten(0, shape) for name, part in found.items()}
        whole |= {} if answer is None else {"answer": answer}
        return {name: part.cpu().numpy() for name, part in whole.items()}

    def _said(self, put: Float[Tensor, "prompt location d"], answer: Tensor | None) -> dict[str, Tensor]:
        """What follows, run by run."""
        asked, values, found = self.asked, put.flatten(0, 1), []
        sites, total = list(asked.put_at) * len(put), len(put) * len(asked.put_at)
        for start in range(0, total, asked.at_once):
            own = slice(start, min(start + asked.at_once, total))

            def hear(step: int, own: slice = own) -> None:
                done = own.start + (own.stop - own.start) * step / asked.steps
                words = f"{own.stop}/{total} runs, token {step}/{asked.steps}"
                self.job.tick(self.rows.kept, done / total, words)

            said = asked.target.said(sites[own], values[own], asked.steps, hear)
            first = _first(said.first, None if answer is None else answer[own])
            of_answer = {name: part.cpu() for name, part in first.items() if "answer" in name or name == "rank"}
            found.append({"id": said.ids, "prob": said.prob, **of_answer})
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _answer(self, batch: Batch, own: Tensor | None, name: str) -> Int[Tensor, "prompt spelling"] | None:
        """The tokens that would be right: those given, or the model's own next one."""
        if (known := getattr(self.asked, name)) is not None:
            return torch.from_numpy(known[batch.first : batch.first + len(batch.ids)])
        return None if own is None else own.argmax(-1, keepdim=True).cpu()


def _each(answer: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The same of every location."""
    return None if answer is None else answer.repeat_interleave(shape[1], 0)


def _first(logits: Float[Tensor, "run vocabulary"], answer: Int[Tensor, "run spelling"] | None) -> dict[str, Tensor]:
    """The likeliest token, and how likely an answer is, by any of its spellings (−1: there is no such)."""
    logits = logits.double()
    prob = logits.softmax(-1)
    found = {"id": logits.argmax(-1), "prob": prob.amax(-1)}
    if answer is None:
        return found
    answer = answer.to(logits.device)
    own = logits.gather(-1, answer.clamp(min=0)).masked_fill(answer < 0, -torch.inf)
    likely = prob.gather(-1, answer.clamp(min=0)).masked_fill(answer < 0, 0)
    above = logits > own.amax(-1, keepdim=True)
    return {**found, "answer_prob": likely.sum(-1), "rank": above.sum(-1) + 1}
