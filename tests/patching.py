"""What does a patch do when it is really made, and what are slopes when each is a backward pass of its own?

Whole runs of the user's model, a prompt at a time and without padding, through `uw.trace` (which has its own tests) and
plain hooks. Nothing of the sweep, of the rules or of the estimates is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import unwrite as uw
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import from_ids

# What a metric makes of logits [run, vocabulary], those of the clean run [vocabulary], and the two tokens.
METRICS: dict[str, Callable[[Tensor, Tensor, int, int | None], Tensor]] = {
    "logit_diff": lambda y, _, a, b: y[:, a] - (0 if b is None else y[:, b]),
    "log_prob": lambda y, _, a, b: y[:, a] - y.exp().sum(-1).log(),
    "prob": lambda y, _, a, b: y[:, a].exp() / y.exp().sum(-1),
    "top": lambda y, _, a, b: (y > torch.cat([y[:, :a], y[:, a + 1 :]], 1).amax(1)[:, None])[:, a].to(y),
    "kl": lambda y, y0, a, b: (y0.softmax(-1) * (y0.log_softmax(-1) - y.log_softmax(-1))).sum(-1),
    "entropy": lambda y, *_: -(y.softmax(-1) * y.log_softmax(-1)).sum(-1),
}


NOTHING: Mapping[str, Tensor] = {}


def entropy(logits: Tensor) -> Tensor:
    """A metric of the caller's own."""
    return METRICS["entropy"](logits, logits, 0, None)


def contrasts(lengths: Sequence[int] = (6, 4, 7), seed: int = 0, against: bool = True, rows: Any = -1) -> Pairs:
    """Random pairs of these lengths, which begin to differ at the first, second, … position, and again later on."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randint(3, 50, (len(lengths), max(lengths)), generator=draw)
    source = base.clone()
    for i, length in enumerate(lengths):
        places = [i % length, min(i + 2, length - 1)]
        source[i, places] = 3 + (base[i, places] + 11) % 47
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    answer = [5 + i for i in range(len(lengths))]
    texts = (from_ids(ids, mask) for ids in (base, source))
    return uw.pairs(*texts, answer, [a + 9 for a in answer] if against else None, rows)


def site(name: str) -> str:
    """Where a node's value is: that of a head is its z."""
    return f"{name}.z" if re.fullmatch(r"L\d+[HM]\d+", name) else name


@dataclass(frozen=True, eq=False)
class Alone:
    """One pair of prompts [position] of a model, the row that is read, and what is asked there."""

    lm: Model
    base: Tensor
    source: Tensor
    row: int
    answer: int
    against: int | None
    metric: str = "logit_diff"

    def score(self, logits: Tensor) -> Tensor:
        """The metric of logits [run, vocabulary]."""
        return METRICS[self.metric](logits, self.clean, self.answer, self.against)

    @cached_property
    @torch.no_grad()
    def clean(self) -> Tensor:
        """What the model itself returns at the row that is read."""
        return self.lm.hf(input_ids=self.base[None], use_cache=False).logits[0, self.row]

    @torch.no_grad()
    def values(self, names: Sequence[str], ids: Tensor | None = None, start: Tensor | None = None) -> dict[str, Tensor]:
        """Values [position, d] of nodes, in a run of the source prompt, of another, or from another stream on."""
        with uw.trace(self.lm, *map(site, names), edits=_starting(start)) as t:
            self.lm.hf(input_ids=(self.source if ids is None else ids)[None], use_cache=False)
        return {name: t[site(name)][0] for name in names}

    @torch.no_grad()
    def patched(
        self, name: str, value: Tensor, also: Sequence[str] = (), held: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits at the read row, and the values of other nodes, when one is set at one position, and last at all.

        `held` are sites that are set to a value in all of these runs.
        """
        n = len(self.base)
        where = torch.cat([torch.eye(n, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool)])
        edits = [uw.Edit.set(other, there.expand(n + 1, *there.shape)) for other, there in held.items()]
        edits.append(uw.Edit.set(site(name), value.expand(n + 1, *value.shape), at=where))
        with uw.trace(self.lm, *map(site, also), edits=edits) as t:
            logits = self.lm.hf(input_ids=self.base.expand(n + 1, -1), use_cache=False).logits[:, self.row]
        return logits, {other: t[site(other)] for other in also}

    def effect(self, name: str, value: Tensor, held: Mapping[str, Tensor] = NOTHING) -> Tensor:
        """What the patch does to the metric: at each position up to the read row, and last at all."""
        moved = self.score(self.patched(name, value, held=held)[0]) - self.score(self.clean[None])
        return torch.cat([moved[: self.row + 1], moved[-1:]])

    def slopes(
        self,
        names: Sequence[str],
        without: int | None = None,
        mlp_only: bool = False,
        start: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The metric's gradient [position, d] at nodes, by one ordinary backward pass.

        `without` a layer none enters what that layer writes, or with `mlp_only` what its MLP does; `start` stands in
        for the stream before the first layer.
        """
        edits = _starting(start)
        with uw.trace(self.lm, *map(site, names), edits=edits) as t, stopped(self.lm, without, mlp_only):
            logits = self.lm.hf(input_ids=self.base[None], use_cache=False).logits[:, self.row]
            seen = [t[site(name)] for name in names]
            found = torch.autograd.grad(self.score(logits).sum(), seen, allow_unused=True)
        return {
            name: torch.zeros_like(x[0]) if slope is None else slope[0]
            for name, x, slope in zip(names, seen, found, strict=True)
        }

    def guess(self, name: str, slopes: dict[str, Tensor]) -> Tensor:
        """⟨source − base, slope⟩ at each position."""
        return ((self.values([name])[name] - self.values([name], self.base)[name]) * slopes[name]).sum(-1)

    def through_softmax(self, name: str, slopes: dict[str, Tensor]) -> Tensor:
        """The same for a query or key at each position, with what its head's z really does."""
        heads = read_by(self.lm, name)
        z = self.values(heads, self.base)
        moved = self.patched(name, self.values([name])[name], heads)[1]
        return sum(((moved[head][:-1] - z[head]) * slopes[head]).sum((1, 2)) for head in heads)  # pyright: ignore


def _starting(start: Tensor | None) -> tuple[uw.Edit, ...]:
    return () if start is None else (uw.Edit.set("resid_pre0", start[None]),)


def alone(lm: Model, pairs: Pairs, metric: str = "logit_diff") -> Iterator[Alone]:
    """Every pair by itself."""
    for i, (base, source) in enumerate(zip(pairs.base.ids, pairs.source.ids, strict=True)):
        n, against = pairs.base.lengths[i], pairs.against
        ids = [torch.from_numpy(part[:n]) for part in (base, source)]
        asked = int(pairs.answer[i]), None if against is None else int(against[i])
        yield Alone(lm, *ids, int(pairs.row[i]), *asked, metric)


def read_by(lm: Model, name: str) -> list[str]:
    """The heads that a query or key is of."""
    layer, kind, head = re.match(r"L(\d+)(H|KV)(\d+)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    each = lm.n_heads // lm.kv_heads if kind == "KV" else 1
    return [f"L{layer}H{int(head) * each + i}" for i in range(each)]


@contextmanager
def stopped(lm: Model, layer: int | None, mlp_only: bool = False) -> Iterator[None]:
    """Inside the `with`, no gradient enters what attention and MLP of a layer write."""
    if layer is None:
        yield
        return
    here = lm.layers[layer]
    writers = [here.post_mlp_norm or here.mlp]
    writers += [] if mlp_only else [here.post_attention_norm or here.out_proj]
    with ExitStack() as stack:
        for module in writers:
            stack.callback(module.register_forward_hook(lambda _, __, out: out.detach()).remove)
        yield


Given = Callable[[int, Alone, str], Tensor]


def executed(
    lm: Model, pairs: Pairs, names: Sequence[str], metric: str = "logit_diff", given: Given | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of nodes at each position [pair, node, position], NaN behind the read row, and at all [pair, node].

    `given(pair, alone, name)` is what a node is set to; by default what it is in the source run.
    """
    whole = np.full((len(pairs), len(names), pairs.base.length + 1), np.nan)
    for i, one in enumerate(alone(lm, pairs, metric)):
        values = one.values(names) if given is None else {name: given(i, one, name) for name in names}
        for j, name in enumerate(names):
            *each, together = one.effect(name, values[name]).tolist()
            whole[i, j, : len(each)], whole[i, j, -1] = each, together
    return whole[..., :-1], whole[..., -1]
