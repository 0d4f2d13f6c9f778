"""Does a method find what is known to be there? A real GPT-2 and a real Llama whose memory management is planted by hand.

Six heads of layer 0 each copy the token's code into a subspace of their own; what becomes of these six writes is known:
erased by one head, erased by four heads together, erased by an MLP, backed up, mimicked, kept. Writer and eraser after
Dao, Lau, Rager and Janiak 2023 (arXiv 2310.07325), the dormant backup after the Hydra effect (McGrath et al. 2023,
arXiv 2307.15771). A constant and a negative of the same source are decoys: PR < 0 without any reading.

A planted node is a `Circuit`: it reads coordinates of the stream in some subspaces and writes gain × them into another.
All subspaces are orthogonal to each other and to the all-ones vector (which a LayerNorm would remove), and every code
has the same norm, so the stream's rms is one number per layer and a circuit's gain is exact at every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as TokenizerFast

from unwrite.errors import ModelError
from unwrite.nodes import Node, parse_node

LAYERS, HEADS, D_HEAD = 3, 6, 8
D_MODEL = HEADS * D_HEAD
LLAMA_GROUP = 3  # query heads that share one key and value head
NEURONS = 8
CONTEXT, VOCABULARY = 256, 256

# What the stream holds of each subspace, as norms. MEAN is the part of a unit code that every token shares.
BALLAST, TOKEN, POSITION, WRITE = 4.0, 3.0, 2.0, 2.0
MEAN = 0.6
QUIET = 0.005

# Per rotary frequency, the attention score of the position looked at; the next best is more than 15 below the sum.
SHARPNESS = 200.0
GPT2_PERIODS = (16.0, 256.0)
ROPE_THETA = 10_000.0

Space = dict[str, Tensor]
Kind = Literal["values", "mlp", "constant", "same source", "backup"]


@dataclass(frozen=True)
class Pair:
    """One planted pair: share[writer, eraser] in the clean run, and in the run in which the write was removed.

    An eraser's second share is 0, a decoy's is the same as the first, a backup's is positive after 0.
    """

    writer: str
    eraser: str
    kind: Kind
    share: float
    share_without: float


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with known memory management: what each node is there for, and each pair's share."""

    hf: PreTrainedModel
    tokenizer: TokenizerFast
    roles: Mapping[str, tuple[str, ...]]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Circuit:
    """One node's job: gain × the coordinates in the subspaces it reads, `back` positions ago, into one subspace."""

    node: Node
    reads: Mapping[str, float]
    into: str
    back: int = 0

    def write(self, space: Space, stream: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """What the node adds to a stream that is the same at every position."""
        coordinates = [gain * (space[name].T @ stream) for name, gain in self.reads.items()]
        return space[self.into] @ torch.stack(coordinates).sum(0)


@dataclass(frozen=True)
class Part:
    """One planted phenomenon: its roles, its circuits, and the shares that follow from their gains."""

    roles: Mapping[str, tuple[str, ...]]
    circuits: tuple[Circuit, ...]
    pairs: tuple[Pair, ...] = ()


def planted(family: Literal["gpt2", "llama"] = "gpt2", seed: int = 0, dtype: torch.dtype = torch.float32) -> Planted:
    """A Hugging Face model with a planted writer, eraser, decoy and backup of every kind, and a byte tokenizer.

    Arguments: `family` "gpt2" (LayerNorm, GELU, biases, learned positions) or "llama" (RMSNorm, SwiGLU, RoPE, grouped
    key and value heads); `seed` draws subspaces, codes, norm gains and unembedding, and nothing else matters;
    `dtype` of the parameters.
    Returns Planted. share[w, e] = Σ⟨o_e, o_w⟩ / Σ‖o_w‖² of `pairs` holds on any text, to about the change of the norm.
    Raises ModelError for another family.

    Example: `weight = planted("llama"); lm = uw.load(weight.hf, weight.tokenizer)`
    """
    if family not in _FAMILIES:
        raise ModelError("there is no planted model of this family", got=family, expected=" or ".join(_FAMILIES))
    build, config, weigh = _FAMILIES[family]
    parts = _parts(family)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
        hf = build(config())
    hf.load_state_dict(weigh(_draw(family, seed, parts)))
    return Planted(
        hf=hf.to(dtype).eval(),
        tokenizer=_tokenizer(),
        roles={role: nodes for part in parts for role, nodes in part.roles.items()},
        pairs=tuple(pair for part in parts for pair in part.pairs),
    )


# The planted parts. Heads 0 to 5 of layer 0 write; every part owns the subspace of its writer.


def _parts(family: str) -> tuple[Part, ...]:
    constant = _decoy_constant("L2.bias" if family == "gpt2" else "L2H3")
    return (_erased_by_head(), constant, _erased_by_many(), _erased_by_mlp(), _backed_up(), _mimicked(), _kept())


def _circuit(node: str, reads: Mapping[str, float], into: str, back: int = 0) -> Circuit:
    return Circuit(parse_node(node), reads, into, back)


def _writer(node: str, into: str, back: int = 0) -> Circuit:
    return _circuit(node, {"token": WRITE / TOKEN}, into, back)


def _erased_by_head() -> Part:
    """A head that reads the write through its values, at its own position, and writes nine tenths of its negative."""
    return Part(
        {"writer erased by a head": ("L0H0",), "eraser head": ("L1H0",)},
        (_writer("L0H0", "erased_by_head"), _circuit("L1H0", {"erased_by_head": -0.9}, "erased_by_head")),
        (Pair("L0H0", "L1H0", "values", -0.9, 0.0),),
    )


def _decoy_constant(node: str) -> Part:
    """A constant against the mean of the write above; share = −0.5 · WRITE · ⟨mean, code⟩ / WRITE = −0.5 · MEAN."""
    share = -0.5 * MEAN
    return Part(
        {"decoy constant": (node,)},
        (_circuit(node, {"ballast": -0.5 * WRITE / BALLAST}, "erased_by_head.mean"),),
        (Pair("L0H0", node, "constant", share, share),),
    )


def _erased_by_many() -> Part:
    """Four heads of one layer, each of which reads the write through its values and erases a fifth."""
    erasers = ("L1H1", "L1H2", "L1H3", "L1H4")
    spread = tuple(_circuit(eraser, {"erased_by_many": -0.2}, "erased_by_many") for eraser in erasers)
    return Part(
        {"writer erased by many": ("L0H1",), "eraser heads": erasers},
        (_writer("L0H1", "erased_by_many"), *spread),
        tuple(Pair("L0H1", eraser, "values", -0.2, 0.0) for eraser in erasers),
    )


def _erased_by_mlp() -> Part:
    """An MLP that reads the write and writes nine tenths of its negative."""
    return Part(
        {"writer erased by an MLP": ("L0H2",), "eraser MLP": ("MLP1",)},
        (_writer("L0H2", "erased_by_mlp"), _circuit("MLP1", {"erased_by_mlp": -0.9}, "erased_by_mlp")),
        (Pair("L0H2", "MLP1", "mlp", -0.9, 0.0),),
    )


def _backed_up() -> Part:
    """A head that writes 0.9 × (what the writer should have written − what it did write): nothing, until it is gone.

    Through its values the head reads −0.9 of the write, and yet it erases nothing.
    """
    reads = {"token": 0.9 * WRITE / TOKEN, "backed_up": -0.9}
    return Part(
        {"writer with a backup": ("L0H3",), "dormant backup": ("L2H0",)},
        (_writer("L0H3", "backed_up"), _circuit("L2H0", reads, "backed_up")),
        (Pair("L0H3", "L2H0", "backup", 0.0, 0.9),),
    )


def _mimicked() -> Part:
    """A head that writes the negative of a write from the same source, the token's code, and never reads the write."""
    return Part(
        {"writer mimicked": ("L0H4",), "decoy same source": ("L1H5",)},
        (_writer("L0H4", "mimicked"), _circuit("L1H5", {"token": -0.4 * WRITE / TOKEN}, "mimicked")),
        (Pair("L0H4", "L1H5", "same source", -0.4, -0.4),),
    )


def _kept() -> Part:
    """The control: the code of the token before this one, which nobody touches afterwards."""
    return Part({"writer kept": ("L0H5",)}, (_writer("L0H5", "kept", back=1),))


def _quiet(circuits: Sequence[Circuit]) -> list[Circuit]:
    """Every node without a job writes a trace of the token, so that no write is exactly zero."""
    heads = [Node("head", layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    mlps = [Node("mlp", layer) for layer in range(LAYERS)]
    busy = {circuit.node for circuit in circuits}
    return [Circuit(node, {"token": QUIET}, "quiet") for node in heads + mlps if node not in busy]


# What the seed draws, and what follows from it for both families.


class Norm(NamedTuple):
    """Gain and offset [d_model] of a LayerNorm or RMSNorm (whose offset is zero)."""

    gain: Tensor
    offset: Tensor

    def read(
        self, directions: Float[Tensor, "d_model k"]
    ) -> tuple[Float[Tensor, "d_model k"], Float[Tensor, " k"]]:
        """Weight and bias with which a module behind this norm sees ⟨directions, stream⟩ / rms."""
        weight = directions / self.gain[:, None]
        return weight, -self.offset @ weight


@dataclass(frozen=True)
class Draft:
    """Everything from which a family's weights are computed.

    `scale` is the stream's rms before a layer's "attention" or "mlp"; `norms` likewise, with (LAYERS, "final").
    """

    space: Space
    circuits: tuple[Circuit, ...]
    embedding: Float[Tensor, "vocabulary d_model"]
    positions: Float[Tensor, "position d_model"]
    unembedding: Float[Tensor, "vocabulary d_model"]
    norms: Mapping[tuple[int, str], Norm]
    scale: Mapping[tuple[int, str], Tensor]

    def heads(self, layer: int) -> list[Circuit]:
        """The circuits of a layer's heads, in order."""
        mine = (circuit for circuit in self.circuits if circuit.node.kind == "head" and circuit.node.layer == layer)
        return sorted(mine, key=lambda circuit: circuit.node.head)

    def mlp(self, layer: int) -> tuple[Circuit, str, float]:
        """The circuit of a layer's MLP, the one subspace that it reads, and its gain."""
        (circuit,) = (circuit for circuit in self.circuits if circuit.node == Node("mlp", layer))
        ((name, gain),) = circuit.reads.items()
        return circuit, name, gain

    def constant(self, layer: int) -> Float[Tensor, " d_model"]:
        """What a layer's attention bias writes; every stream holds the same ballast."""
        ballast = BALLAST * self.space["ballast"][:, 0]
        found = [circuit for circuit in self.circuits if circuit.node == Node("bias", layer)]
        return torch.stack([torch.zeros_like(ballast), *(circuit.write(self.space, ballast) for circuit in found)]).sum(0)


def _draw(family: str, seed: int, parts: Sequence[Part]) -> Draft:
    generator = torch.Generator().manual_seed(seed)
    space = _subspaces(generator)
    jobs = [circuit for part in parts for circuit in part.circuits]
    circuits = (*jobs, *_quiet(jobs))
    embedding = _codes(generator) @ (TOKEN * space["token"]).T + BALLAST * space["ballast"].T
    positions = (_clock() @ space["position"].T) * (family == "gpt2")
    return Draft(
        space=space,
        circuits=circuits,
        embedding=embedding,
        positions=positions,
        unembedding=2 * D_MODEL**-0.5 * _normal(generator, VOCABULARY, D_MODEL),
        norms=_norms(generator, family),
        scale=_scales(space, circuits, embedding[0] + positions[0]),
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _subspaces(generator: torch.Generator) -> Space:
    """Orthonormal column bases [d_model, k]; "x.mean" is the first column of "x"."""
    writers = ("erased_by_head", "erased_by_many", "erased_by_mlp", "backed_up", "mimicked", "kept")
    sizes = {"ones": 1, "ballast": 1, "token": 4, "position": 4, "quiet": 4} | dict.fromkeys(writers, 4)
    frame = _normal(generator, D_MODEL, sum(sizes.values()))
    frame[:, 0] = 1
    orthonormal = torch.linalg.qr(frame).Q
    space = dict(zip(sizes, orthonormal.split(list(sizes.values()), dim=1), strict=True))
    return space | {f"{name}.mean": basis[:, :1] for name, basis in space.items()}


def _codes(generator: torch.Generator) -> Float[Tensor, "vocabulary 4"]:
    """Unit codes whose first coordinate is MEAN and whose rest is a random point of a sphere."""
    rest = torch.nn.functional.normalize(_normal(generator, VOCABULARY, 3), dim=1)
    return torch.cat([torch.full_like(rest[:, :1], MEAN), math.sqrt(1 - MEAN**2) * rest], dim=1)


def _clock() -> Float[Tensor, "position 4"]:
    """Cosine and sine of the position at two periods: what RoPE does to a constant, as an embedding."""
    position = torch.arange(CONTEXT, dtype=torch.float64)
    angles = [2 * math.pi / period * position for period in GPT2_PERIODS]
    return POSITION / 2**0.5 * torch.stack([f(angle) for angle in angles for f in (torch.cos, torch.sin)], dim=1)


def _norms(generator: torch.Generator, family: str) -> dict[tuple[int, str], Norm]:
    """Gains and offsets that no reader may forget, which is why they are not one and zero."""
    places = [(layer, place) for layer in range(LAYERS) for place in ("attention", "mlp")] + [(LAYERS, "final")]
    drawn = {}
    for place in places:
        gain = 0.5 + torch.rand(D_MODEL, generator=generator, dtype=torch.float64)
        drawn[place] = Norm(gain, 0.3 * _normal(generator, D_MODEL) * (family == "gpt2"))
    return drawn


def _scales(
    space: Space, circuits: Sequence[Circuit], stream: Float[Tensor, " d_model"]
) -> dict[tuple[int, str], Tensor]:
    """The stream's rms before each reader: one text of one repeated token stands for all, as all codes have one norm."""
    scale = {}
    for layer in range(LAYERS):
        for place, kinds in (("attention", ("head", "bias")), ("mlp", ("mlp",))):
            scale[layer, place] = stream.norm() / D_MODEL**0.5
            writing = [c for c in circuits if c.node.layer == layer and c.node.kind in kinds]
            stream = stream + torch.stack([circuit.write(space, stream) for circuit in writing]).sum(0)
    return scale


def _values(draft: Draft, layer: int, group: int) -> tuple[Float[Tensor, "d_model v"], Float[Tensor, "z d_model"]]:
    """The directions that a layer's value heads read, and its output matrix [heads · d_head, d_model].

    Heads of one group share their values: each subspace that one of them reads has its own coordinates of the value.
    """
    read = torch.zeros(D_MODEL, HEADS // group, D_HEAD, dtype=torch.float64)
    output = torch.zeros(HEADS, D_HEAD, D_MODEL, dtype=torch.float64)
    taken: list[dict[str, slice]] = [{} for _ in range(HEADS // group)]
    for circuit in draft.heads(layer):
        shared = circuit.node.head // group
        for name, gain in circuit.reads.items():
            basis, start = draft.space[name], max((s.stop for s in taken[shared].values()), default=0)
            rows = taken[shared].setdefault(name, slice(start, start + basis.shape[1]))
            read[:, shared, rows] = basis
            output[circuit.node.head, rows] = gain * draft.scale[layer, "attention"] * draft.space[circuit.into].T
    return read.flatten(1), output.flatten(0, 1)


def _sharp(draft: Draft, layer: int, strength: float) -> Tensor:
    """The query and key gain at which coordinates of this strength score SHARPNESS per frequency."""
    return math.sqrt(SHARPNESS * math.sqrt(D_HEAD)) * draft.scale[layer, "attention"] / strength


# GPT-2: positions are looked up by their own code, constants are biases, and gelu(x) − gelu(−x) = x.


def _gpt2_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_inner=NEURONS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip


def _gpt2_weights(draft: Draft) -> dict[str, Tensor]:
    final = draft.norms[LAYERS, "final"]
    weights = {
        "transformer.wte.weight": draft.embedding,
        "transformer.wpe.weight": draft.positions,
        "transformer.ln_f.weight": final.gain,
        "transformer.ln_f.bias": final.offset,
        "lm_head.weight": draft.unembedding,
    }
    for layer in range(LAYERS):
        block = _gpt2_attention(draft, layer) | _gpt2_mlp(draft, layer)
        weights |= {f"transformer.h.{layer}.{name}": value for name, value in block.items()}
    return weights


def _gpt2_attention(draft: Draft, layer: int) -> dict[str, Tensor]:
    norm = draft.norms[layer, "attention"]
    value, output = _values(draft, layer, group=1)
    query, key = _gpt2_look(draft, layer)
    weight, bias = norm.read(torch.cat([query, key, value], dim=1))
    return {
        "ln_1.weight": norm.gain,
        "ln_1.bias": norm.offset,
        "attn.c_attn.weight": weight,
        "attn.c_attn.bias": bias,
        "attn.c_proj.weight": output,
        "attn.c_proj.bias": draft.constant(layer),
    }


def _gpt2_look(draft: Draft, layer: int) -> tuple[Float[Tensor, "d_model z"], Float[Tensor, "d_model z"]]:
    """The directions that queries and keys read: the position's code, the query's turned back by `back` positions."""
    sharp = _sharp(draft, layer, POSITION / 2**0.5)
    query = torch.zeros(D_MODEL, HEADS, D_HEAD, dtype=torch.float64)
    key = torch.zeros_like(query)
    for circuit in draft.heads(layer):
        turn = torch.block_diag(*(_turn(2 * math.pi / period * circuit.back) for period in GPT2_PERIODS))
        query[:, circuit.node.head, :4] = sharp * draft.space["position"] @ turn
        key[:, circuit.node.head, :4] = sharp * draft.space["position"]
    return query.flatten(1), key.flatten(1)


def _turn(angle: float) -> Float[Tensor, "2 2"]:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


def _gpt2_mlp(draft: Draft, layer: int) -> dict[str, Tensor]:
    norm = draft.norms[layer, "mlp"]
    circuit, name, gain = draft.mlp(layer)
    basis, into = draft.space[name], gain * draft.scale[layer, "mlp"] * draft.space[circuit.into]
    weight, bias = norm.read(torch.cat([basis, -basis], dim=1))
    return {
        "ln_2.weight": norm.gain,
        "ln_2.bias": norm.offset,
        "mlp.c_fc.weight": weight,
        "mlp.c_fc.bias": bias,
        "mlp.c_proj.weight": torch.cat([into, -into], dim=1).T,
        "mlp.c_proj.bias": torch.zeros(D_MODEL, dtype=torch.float64),
    }


# Llama: RoPE turns a query and key made of ballast, constants are ballast, and (silu(g) − silu(−g)) · u = g · u.


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=D_MODEL, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // LLAMA_GROUP, intermediate_size=NEURONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA}, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip


def _llama_weights(draft: Draft) -> dict[str, Tensor]:
    weights = {
        "model.embed_tokens.weight": draft.embedding,
        "model.norm.weight": draft.norms[LAYERS, "final"].gain,
        "lm_head.weight": draft.unembedding,
    }
    for layer in range(LAYERS):
        block = _llama_attention(draft, layer) | _llama_mlp(draft, layer)
        weights |= {f"model.layers.{layer}.{name}": value for name, value in block.items()}
    return weights


def _llama_attention(draft: Draft, layer: int) -> dict[str, Tensor]:
    norm = draft.norms[layer, "attention"]
    value, output = _values(draft, layer, LLAMA_GROUP)
    ballast = _sharp(draft, layer, BALLAST) * draft.space["ballast"]
    query = torch.cat([_rotated(circuit.back) for circuit in draft.heads(layer)])
    key = _rotated(0).repeat(HEADS // LLAMA_GROUP)
    return {
        "input_layernorm.weight": norm.gain,
        "self_attn.q_proj.weight": norm.read(ballast * query)[0].T,
        "self_attn.k_proj.weight": norm.read(ballast * key)[0].T,
        "self_attn.v_proj.weight": norm.read(value)[0].T,
        "self_attn.o_proj.weight": output.T,
    }


def _rotated(back: int) -> Float[Tensor, " d_head"]:
    """A unit in each rotary plane, turned as RoPE turns what stands `back` positions earlier."""
    plane = torch.arange(0, D_HEAD, 2, dtype=torch.float64) / D_HEAD
    angle = back * ROPE_THETA**-plane
    return torch.cat([torch.cos(angle), -torch.sin(angle)])


def _llama_mlp(draft: Draft, layer: int) -> dict[str, Tensor]:
    norm = draft.norms[layer, "mlp"]
    circuit, name, gain = draft.mlp(layer)
    basis = draft.space[name]
    into = gain * draft.scale[layer, "mlp"] ** 2 / BALLAST * draft.space[circuit.into]
    return {
        "post_attention_layernorm.weight": norm.gain,
        "mlp.gate_proj.weight": norm.read(torch.cat([basis, -basis], dim=1))[0].T,
        "mlp.up_proj.weight": norm.read(draft.space["ballast"].expand(-1, NEURONS))[0].T,
        "mlp.down_proj.weight": torch.cat([into, -into], dim=1),
    }


_FAMILIES: Mapping[str, tuple[Callable, Callable, Callable[[Draft], dict[str, Tensor]]]] = {
    "gpt2": (GPT2LMHeadModel, _gpt2_config, _gpt2_weights),
    "llama": (LlamaForCausalLM, _llama_config, _llama_weights),
}


def _tokenizer() -> TokenizerFast:
    """One token per byte of UTF-8, so that any text can be read and every row of the embedding is used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(BPE(vocab={letter: row for row, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return TokenizerFast(
        tokenizer_object=bytewise, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
