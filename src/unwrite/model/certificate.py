"""Is the decomposition exact for this very model? Five identities, measured at load on short random prompts.

heads      the heads' writes and the bias (from weights alone) sum to what each attention block really adds
stream     all nodes sum to the final state of the stream
locations  the nodes so far sum to every earlier state (in a parallel block, also to what its MLP reads)
logits     final norm and unembedding of that sum give the model's logits
values     with pattern and norm frozen, what all earlier nodes put into a head through its values is what it writes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.errors import ModelError
from unwrite.model.attention import patterns
from unwrite.model.capture import Recording, recording
from unwrite.model.values import carry, into_values, value_scale
from unwrite.model.view import Folded, Layer, Model, fold, value_constant, value_weights
from unwrite.model.weights import through
from unwrite.model.writes import Writes, expand
from unwrite.nodes import Location

IDENTITIES = ("heads", "stream", "locations", "logits", "values")
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_FLOAT32_INSIDE = 1e-6
_LENGTHS = (5, 9)
_PADDING = 3


@dataclass(frozen=True)
class Certificate(Mapping[str, float]):
    """Identity -> worst relative error over layers, positions and prompts, and the `limit` above which to refuse."""

    errors: Mapping[str, float]
    limit: float
    dtype: str

    def __getitem__(self, identity: str) -> float:
        return self.errors[identity]

    def __iter__(self) -> Iterator[str]:
        return iter(self.errors)

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def ok(self) -> bool:
        """Do all identities hold within the limit?"""
        # Written so that NaN is not ok.
        return all(error <= self.limit for error in self.errors.values())

    def explain(self) -> str:
        """The certificate in one line."""
        parts = ", ".join(f"{name} {error:.0e}" for name, error in self.errors.items())
        verdict = "exact to rounding" if self.ok else "NOT exact"
        return f"{verdict} in {self.dtype}: {parts} (relative error, limit {self.limit:.0e})"

    def require(self, model: str) -> None:
        """Raise ModelError naming the failing identities unless all hold."""
        failing = [f"{name} {error:.1e}" for name, error in self.errors.items() if not error <= self.limit]
        if failing:
            raise ModelError(
                f"the decomposition of {model} is not exact, so per-node numbers would be wrong",
                got=f"relative error of {', '.join(failing)}",
                expected=f"at most {self.limit:.0e} in {self.dtype}",
                fix="see 'How to add a family' in CONTRIBUTING.md; load in float32 if this is half precision",
            )  # fmt: skip


@torch.no_grad()
def certify(lm: Model) -> Certificate:
    """Measure the five identities on two batches of random prompts of two lengths, the second padded as methods pad."""
    worst: dict[str, float] = dict.fromkeys(map(str, IDENTITIES), 0.0)
    for ids, mask in _prompts(lm):
        for identity, error in _errors(lm, ids, mask):
            # max() would drop a NaN.
            worst[identity] = error if not error <= worst[identity] else worst[identity]
    return Certificate(worst, _limit(lm), str(lm.dtype).removeprefix("torch."))


def _limit(lm: Model) -> float:
    limit = _LIMITS.get(lm.dtype, 5e-2)
    # Most families' eager attention has its softmax in float32.
    inexact = lm.row.float32_inside or lm.config._attn_implementation != "sdpa"
    return max(limit, _FLOAT32_INSIDE) if inexact else limit


def _prompts(
    lm: Model,
) -> Iterator[tuple[Int[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]]:
    generator = torch.Generator().manual_seed(0)
    for length, padding in zip(_LENGTHS, (0, _PADDING), strict=True):
        length = min(length, lm.context or length)
        ids = torch.randint(lm.vocabulary, (2, length), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, max(1, length - padding) :] = False
        yield ids.to(lm.device), mask.to(lm.device)


def _errors(lm: Model, ids: Tensor, mask: Tensor) -> Iterator[tuple[str, float]]:
    folded = fold(lm)
    with recording(lm, folded, truth=True) as record:
        logits = _run(lm, ids, mask)
    nodes = expand(lm, folded, _per_prompt(record, mask).map(lambda part: part[mask]))
    rows = {state: x[mask] for state, x in record.stream.items()}
    for layer in lm.layers:
        yield "heads", _relative(_attention_nodes(lm, nodes, layer), record.attention[layer.index][mask])
    holds = lm.holds().to(nodes.device)
    for state, held in zip(lm.states, holds, strict=True):
        yield "stream" if state == lm.states[-1] else "locations", _relative(nodes[held], rows[state])
    if lm.parallel:
        for layer in lm.layers:
            if (read := rows.get(Location("mid", layer.index))) is not None:
                yield "locations", _relative(nodes[_earlier(lm, layer)], read)
    yield "logits", _relative(_unembed(lm, nodes.sum(0))[None], logits[mask])
    yield "values", _values_error(lm, ids, mask, folded)


def _run(lm: Model, ids: Tensor, mask: Tensor) -> Tensor:
    padded = not bool(mask.all())
    return lm.hf(input_ids=ids, use_cache=False, **({"attention_mask": mask.long()} if padded else {})).logits.to(
        ids.device
    )


def _per_prompt(record: Recording, mask: Tensor) -> Writes:
    return record.writes.map(lambda part: part.expand(len(mask), *part.shape[1:]))


def _earlier(lm: Model, layer: Layer) -> list[int]:
    return [i for i, node in enumerate(lm.parts) if node.layer < layer.index]


def _attention_nodes(lm: Model, nodes: Tensor, layer: Layer) -> Tensor:
    kept = [i for i, node in enumerate(lm.parts) if node.layer == layer.index and node.kind in ("head", "bias")]
    return nodes[kept]


def _relative(parts: Float[Tensor, "part row d"], truth: Float[Tensor, "row d"]) -> float:
    """Worst over rows: ‖Σ parts − truth‖ relative to the larger of ‖truth‖ and the largest part.

    Rounding is as large as the largest part, which may dwarf a sum that cancels.
    """
    size = torch.maximum(truth.norm(dim=-1), parts.norm(dim=-1).amax(0)).clamp_min(torch.finfo(parts.dtype).tiny)
    error = (parts.sum(0) - truth).norm(dim=-1) / size
    return float(error.amax()) if error.isfinite().all() else float("nan")


def _unembed(lm: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocabulary"]:
    normed = through(lm.final_norm, stream.to(lm.dtype))
    logits = through(lm.hf.get_output_embeddings(), normed) * lm.row.logit_scale(lm.config)
    cap = lm.row.logit_cap(lm.config)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _values_error(lm: Model, ids: Tensor, mask: Tensor, folded: tuple[Folded, ...]) -> float:
    with patterns(lm) as found, recording(lm, folded, truth=True) as record:
        _run(lm, ids, mask)
    everywhere = expand(lm, folded, _per_prompt(record, mask).map(lambda part: part.flatten(0, 1)))
    worst = 0.0
    for layer, folds in zip(lm.layers, folded, strict=True):
        stream = everywhere[_earlier(lm, layer)].sum(0).unflatten(0, mask.shape)
        normed = into_values(lm, layer, stream, value_scale(lm, layer, stream))
        gain = record.gain.get(layer.index)
        z = record.z[layer.index] if gain is None else record.z[layer.index] / gain[..., None, None]
        constant = value_constant(lm, layer)
        if constant is not None and folds.constant is None:
            z = z - constant
        error = _head_error(lm, layer, normed, found[layer.index], z, constant, mask)
        worst = error if not error <= worst else worst
    return worst


def _head_error(
    lm: Model, layer: Layer, normed: Tensor, pattern: Tensor, z: Tensor, constant: Tensor | None, mask: Tensor
) -> float:
    """Worst ‖A · normed · W_V − z‖ of a head, relative to A · |normed| · |W_V|, what is summed there."""
    weight, _ = value_weights(lm, layer)
    through, summed = carry(pattern, normed, weight)[mask], carry(pattern, normed.abs(), weight.abs())[mask]
    size = summed.norm(dim=-1) + (0.0 if constant is None else constant.norm(dim=-1))
    error = (through - z[mask]).norm(dim=-1) / size.clamp_min(torch.finfo(z.dtype).tiny)
    return float(error.amax()) if error.isfinite().all() else float("nan")
