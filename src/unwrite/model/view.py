"""What does each part of a decoder write? A read-only view on the user's own, unmodified Hugging Face model.

Every write is linear in a small factor that a forward pass shows: a head's write is its z (attention output before
W_O) times its slice of W_O, times a post-norm's gain where there is one (`fold`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from unwrite.errors import ModelError, shown
from unwrite.model.families import Family
from unwrite.model.inside import decoder_of, find, head_of, headless, text_config
from unwrite.model.layers import Layer, layers_of
from unwrite.model.projections import Effective, has_bias
from unwrite.model.weights import home
from unwrite.nodes import MLPS, Location, Node, reads
from unwrite.prompts.tokens import Images

# Projections -> which of what each puts out is followed.
Columns = Mapping[nn.Module, Bool[Tensor, " output"]]
CONVENTIONS = ("paper", "raw")
# The identities of a certificate that a model without a language-model head has not.
OF_HEAD = ("logits", "reading")
# Why a model that has not something has no such identity.
ABSENT = {
    **dict.fromkeys(OF_HEAD, "there is no language-model head"),
    "values": "no layer has attention, or a mixer that shows its values", "opened": "no layer has attention",
    "continued": "what a mixer keeps of earlier positions is no keys and values", "mlp": "no layer has an MLP",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder as nodes that write into its residual stream. Made by `uw.load`.

    `convention` "paper": heads carry no constant part, and where every reader is a LayerNorm all writes are centred
    (the mean over d_model, which no reader sees, removed). "raw": writes as they are.
    """

    hf: Any
    tokenizer: Any
    family: str
    row: Family
    convention: str
    about: Mapping[str, Any] = field(default_factory=dict)
    certificate: Any = None
    state: Mapping[str, Any] = field(default_factory=dict)  # what changes logits and is no weight, at load
    effective: dict[nn.Module, Effective] = field(default_factory=dict)  # of projections that are not plain
    hashes: dict[Any, str] = field(default_factory=dict)  # state of the parameters -> hash of their values
    by_prompt: set[str] = field(default_factory=set)  # arguments of blocks that are another one for another prompt
    whole: dict[int, bool] = field(default_factory=dict)  # prompt length -> must runs of it be whole?
    mixed: dict[int, Columns] = field(default_factory=dict)  # of mixers that show their values: layer -> these
    images: WeakSet[Images] = field(default_factory=WeakSet)  # vectors of prompts that are kept

    @property
    def config(self) -> Any:
        """The Hugging Face configuration; of a model that reads more than text, that of its text decoder."""
        whole = self.hf.config
        return whole if text_config(whole) is whole else getattr(self.decoder, "config", text_config(whole))

    @cached_property
    def decoder(self) -> nn.Module:
        """The model without its unembedding."""
        return decoder_of(self.hf, self.row)

    @property
    def head(self) -> nn.Module:
        """What makes logits of normed streams, for all who need them. Raises ModelError where there is none."""
        self.require("logits")
        head = head_of(self.hf)
        assert head is not None  # noqa: S101 (asked before)
        return head

    @property
    def has_head(self) -> bool:
        """Does it give logits?"""
        return head_of(self.hf) is not None

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The blocks, first to last."""
        return layers_of(self.row, self.config, [*find(self.decoder, self.row.blocks).children()])

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm between the final stream and the unembedding."""
        return find(self.decoder, self.row.final_norm)

    def to_end(self, location: Location) -> float:
        """By which a state of the stream is multiplied on its way to the end: the gains of blocks behind it; mostly 1.

        What nodes write is given as it arrives there: this state times this number is the sum of what it holds.
        """
        if location == self.states[-1]:
            return 1.0
        layer = self.layers[location.layer + (location.state == "post")]
        return layer.mid_to_end if location.state == "mid" else layer.to_end

    @cached_property
    def parts(self) -> tuple[Node, ...]:
        """The nodes in write order; one that is zero by construction is not listed."""
        start = [Node("embed")] + ([] if self.row.pos_embed is None else [Node("pos_embed")])
        return tuple(start + [node for layer in self.layers for node in self._written(layer)])

    def _written(self, layer: Layer) -> list[Node]:
        heads = [Node(layer.kind, layer.index, head) for head in range(layer.heads)]
        bias = [Node("bias", layer.index)] if _has_constant(self, layer) else []
        return [*heads, *bias, *(Node(kind, layer.index) for kind in MLPS if kind in layer.modules)]

    @cached_property
    def states(self) -> tuple[Location, ...]:
        """The states of the stream that this model has, first to last."""
        return (Location("pre", 0), *(state for layer in self.layers for state in self._states(layer)))

    def _states(self, layer: Layer) -> Iterator[Location]:
        mid = not self.parallel and layer.heads > 0 and layer.has_mlp
        there = {"mid": mid, "late": layer.late is not None, "post": True}
        return (Location(state, layer.index) for state, has in there.items() if has)

    def can_read(self, reader: Node, writer: Node) -> bool:
        """Can a node's input contain what `writer` wrote? Values of a head may be of an earlier state (`carriers`)."""
        return reads(reader, writer, self.parallel, self.layers[reader.layer].late is not None)

    def carriers(self, writer: Node) -> list[int]:
        """The layers whose heads can carry through values what `writer` wrote."""
        carrying = filter(self.carries, self.layers)
        return [layer.index for layer in carrying if layer.makes_values.reads.holds(writer, self.parallel)]

    def after(self, node: Node) -> Location:
        """The state of the stream right after a node has written."""
        return self._after[node]

    @cached_property
    def _after(self) -> dict[Node, Location]:
        return {node: next(state for state in self.states if state.holds(node, self.parallel)) for node in self.parts}

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Node names in write order. Their writes sum to the stream."""
        return tuple(map(str, self.parts))

    @cached_property
    def locations(self) -> tuple[str, ...]:
        """Names of the states of the stream, first to last."""
        return tuple(map(str, self.states))

    @cached_property
    def parallel(self) -> bool:
        """Do attention and MLP of a block read the same state of the stream?"""
        return bool(self.row.parallel(self.config))

    @property
    def centred(self) -> bool:
        """Is the mean over d_model removed from every write?"""
        return self.convention == "paper" and self.row.layer_norm

    @property
    def n_heads(self) -> int:
        """Heads of a layer; of that which has most."""
        return max(layer.heads for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a layer; of that which has most."""
        return max(layer.kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        """Width of a head's values; the largest."""
        return max(layer.head_dim for layer in self.layers)

    @cached_property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.hf.get_input_embeddings().weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Number of embedding rows: ids from 0 to this minus 1 can be read."""
        return embedding_rows(self.hf)

    @property
    def context(self) -> int | None:
        """Number of positions the model was built for; None where the configuration names no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which writes and their products are computed: float32 or better."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where token ids go, and where everything that is recorded and computed from it is kept."""
        return home(self.hf)

    def holds(self) -> Bool[Tensor, "location node"]:
        """Which nodes have written when the stream is in each state."""
        return torch.tensor([[state.holds(node, self.parallel) for node in self.parts] for state in self.states])

    def carries(self, layer: Layer) -> bool:
        """Is it known what this layer's heads, or those of its mixer, carry through values?"""
        return layer.attends or layer.index in self.mixed

    def applies(self, identity: str) -> bool:
        """Does this identity say anything of this model?"""
        if identity in OF_HEAD:
            return self.has_head
        if identity == "values":
            return any(map(self.carries, self.layers))
        if identity == "opened":
            return any(layer.attends for layer in self.layers)
        if identity == "mlp":
            return any(layer.has_mlp for layer in self.layers)
        return identity != "continued" or all(layer.attends for layer in self.layers if layer.heads)

    def proved(self, identity: str) -> bool:
        """Does the certificate say that this identity holds? Where there is none yet, nothing is denied."""
        return self.certificate is None or self.certificate.holds(identity)

    def require(self, identity: str) -> None:
        """Raise ModelError naming this identity, by what rests on it, unless it holds."""
        if identity in OF_HEAD and not self.has_head:
            raise headless(self.hf)
        if not self.applies(identity):
            raise ModelError(
                f"{self.about.get('name', self.family)} cannot be asked for that: {ABSENT[identity]}",
                got=f"what rests on the identity {identity}", fix="use what does not need it, as scan and survival",
            )  # fmt: skip
        if not self.proved(identity):
            self.certificate.refuse(self.about.get("name", self.family), [identity])

    def __repr__(self) -> str:
        return (
            f"Model({self.about.get('name', self.family)!r}: {self.family}, {len(self.layers)} layers × "
            f"{self.n_heads} heads, d_model {self.d_model}, {len(self.parts)} nodes, convention {self.convention!r})"
        )


def require_model(lm: object) -> None:
    """Raise ModelError for anything but a `Model`."""
    if not isinstance(lm, Model):
        raise ModelError(
            "this is no model of unwrite", got=shown(lm), expected="what uw.load returns", fix="lm = uw.load(…)"
        )


def embedding_rows(hf: Any) -> int:
    """Number of token ids that a Hugging Face model can embed."""
    return hf.get_input_embeddings().weight.shape[0]


def _has_constant(lm: Model, layer: Layer) -> bool:
    """Is there anything constant in what attention writes? All that a mixer makes of a bias moves with its input."""
    moved = lm.convention == "paper" and layer.attends and is_constant(lm, layer)
    projections = [layer.modules[name] for name in ("out_proj", "value")[: 1 + moved] if name in layer.modules]
    of_norm = moved and getattr(layer.read_by_value, "bias", None) is not None
    return of_norm or layer.out_bias is not None or any(has_bias(lm, projection) for projection in projections)


def is_constant(lm: Model, layer: Layer) -> bool:
    """Do biases put the same into z at every position: do rows of patterns sum to 1, and is z all that they give?"""
    return not (lm.row.sinks or lm.row.gated_heads) and layer.head_norm is layer.value_norm is None
