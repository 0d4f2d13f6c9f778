"""How do circuits become weights? What a seed draws, and the parameters of a GPT-2 and a Llama that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.nodes import Node, parse_node

LAYERS, HEADS, D_HEAD, LLAMA_GROUP = 3, 6, 8, 3  # a group is the query heads that share one key and value head
D_MODEL = HEADS * D_HEAD
NEURONS, CONTEXT, VOCABULARY = 8, 256, 256

# What the stream holds of each subspace, as norms. MEAN is the part of a unit code that every token shares.
BALLAST, TOKEN, POSITION, WRITE = 4.0, 3.0, 2.0, 2.0
MEAN = 0.6
DECOY = 0.5  # how long the constant against the mean of a write is, as a part of a write
QUIET = 0.005

# A massive direction lies in these channels, which norms all but close. Who reads it does so with a weight of FAINT;
# the DELIMITER has a coordinate of its own, by which a sink knows it and writes a vector of norm SINK there.
MASSIVE, CLOSED, FAINT = (0, 1), 0.01, 0.01
DELIMITER, SINK = 0.5, 240.0

# A gate that is closed below a threshold is open this far above it, and is driven by so much.
OPEN, DRIVEN = 0.1, 100.0

# Query and key gain: the score per rotary frequency is its square; the next best position is more than 20 below.
SHARPNESS = 12.0
ROPE_THETA = 10_000.0

Space = dict[str, Tensor]


@dataclass(frozen=True)
class Wiring:
    """One node's job: gain × the coordinates in the subspaces it reads, `back` positions ago, into one subspace.

    An MLP that is `gated` writes its subspace's one direction where the sum of what it reads is above 0, or nothing.
    """

    name: str
    reads: Mapping[str, float]
    into: str
    back: int = 0
    gated: bool = False

    @property
    def node(self) -> Node:
        """The name, parsed."""
        return parse_node(self.name)

    def write(self, space: Space, stream: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """What the node adds to a stream that is the same at every position."""
        read = sum(gain * space[name].T @ stream for name, gain in self.reads.items())
        return space[self.into] @ ((torch.as_tensor(read) / OPEN).clamp(0, 1) if self.gated else read)


# What the seed draws, and what follows from it for both families.


@dataclass(frozen=True)
class Draft:
    """Everything from which a family's weights are computed.

    `scale[layer, kind]` is the stream's rms before the layer's nodes of kind "head" or "mlp". `norms` has the gain and
    offset of the same places and of (LAYERS, "final"); an RMSNorm's offset is zero.
    """

    space: Space
    circuits: tuple[Wiring, ...]
    embedding: Float[Tensor, "vocabulary d_model"]
    positions: Float[Tensor, "position d_model"]
    unembedding: Float[Tensor, "vocabulary d_model"]
    norms: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    scale: Mapping[tuple[int, str], Tensor]

    def behind(self, place: tuple[int, str], directions: Float[Tensor, "d_model k"]) -> tuple[Tensor, Tensor]:
        """Weight [d_model, k] and bias [k] with which a module behind a norm sees ⟨directions, stream⟩ / rms."""
        gain, offset = self.norms[place]
        weight = directions / gain[:, None]
        return weight, -offset @ weight


def _at(circuits: Sequence[Wiring], layer: int, *kinds: str) -> list[Wiring]:
    return [circuit for circuit in circuits if circuit.node.layer == layer and circuit.node.kind in kinds]


def draw(family: str, seed: int, jobs: Sequence[Wiring], massive: float = 0.0, delimiter: int = 0) -> Draft:
    """`massive`: the part of each write into "NAME.massive" that lies in the massive direction, if there is one."""
    generator = torch.Generator().manual_seed(seed)
    space = _subspaces(generator, massive)
    circuits = tuple(sorted(jobs, key=lambda circuit: circuit.node.order))
    embedding = _codes(generator) @ (TOKEN * space["token"]).T + BALLAST * space["ballast"].T
    clock = torch.stack([_turned(-position) for position in range(CONTEXT)]) / (D_HEAD / 2) ** 0.5
    positions = POSITION * clock @ space["position"].T * (family == "gpt2")
    unembedding = 2 * D_MODEL**-0.5 * torch.randn(VOCABULARY, D_MODEL, generator=generator, dtype=torch.float64)
    norms = _norms(generator, family)
    if massive:
        # What the embedding holds there leaves half a write once all have written: whichever of them is taken out, the
        # other half's negative is left, the stream is as long as before, and nobody is scaled otherwise.
        writers = sum(circuit.into.endswith(".massive") for circuit in circuits)
        embedding -= (writers - 0.5) * WRITE * _times(massive) * space["massive"].T
        embedding[delimiter] += DELIMITER * space["delimiter"][:, 0]
        for gain, _ in norms.values():
            gain[[*MASSIVE]] = CLOSED
    scale = _scales(space, circuits, embedding[0] + positions[0])
    return Draft(space, circuits, embedding, positions, unembedding, norms, scale)


def _times(massive: float) -> float:
    """How long the massive part of a write is beside the rest, if this part of its energy is massive."""
    return math.sqrt(massive / (1 - massive))


def _subspaces(generator: torch.Generator, massive: float) -> Space:
    """Orthonormal column bases [d_model, k]; "x.mean" is the first column of "x".

    And with a massive direction: "x.massive" is "x" with so much of it that every code has the same, "massive.faint"
    the direction as it is hardly read.
    """
    writers = ("erased_by_head", "erased_by_many", "erased_by_mlp", "backed_up", "mimicked", "kept")
    sizes = {"ones": 1} | dict.fromkeys(("massive", "beside", "delimiter") if massive else (), 1)
    sizes |= {"ballast": 1, "position": D_HEAD} | dict.fromkeys(("token", "quiet", *writers), 4)
    frame = torch.randn(D_MODEL, sum(sizes.values()), generator=generator, dtype=torch.float64)
    frame[:, 0] = 1
    if massive:
        # Two channels against each other, which a LayerNorm does not centre away; all else lies outside of both.
        frame[:, 1:3] = 0
        frame[MASSIVE[0], 1:3], frame[MASSIVE[1], 1:3] = 1, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    orthonormal = torch.linalg.qr(frame).Q
    space = dict(zip(sizes, orthonormal.split(list(sizes.values()), dim=1), strict=True))
    for i, which in enumerate(("mean", "other")):
        several = {name: basis for name, basis in space.items() if name in sizes and basis.shape[1] > i}
        space |= {f"{name}.{which}": basis[:, i : i + 1] for name, basis in several.items()}
    if massive:
        tilt = nn.functional.pad(_times(massive) / MEAN * space["massive"], (0, 3))
        space |= {f"{name}.massive": space[name] + tilt for name in writers}
        space["massive.faint"] = FAINT * space["massive"]
    return space


def _codes(generator: torch.Generator) -> Float[Tensor, "vocabulary 4"]:
    """Unit codes whose first coordinate is MEAN and whose rest is a random point of a sphere."""
    rest = nn.functional.normalize(torch.randn(VOCABULARY, 3, generator=generator, dtype=torch.float64), dim=1)
    return torch.cat([torch.full_like(rest[:, :1], MEAN), math.sqrt(1 - MEAN**2) * rest], dim=1)


def _norms(generator: torch.Generator, family: str) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Gains and offsets that no reader may forget, which is why they are not one and zero."""
    places = [(layer, kind) for layer in range(LAYERS) for kind in ("head", "mlp")] + [(LAYERS, "final")]
    gains = 0.5 + torch.rand(len(places), D_MODEL, generator=generator, dtype=torch.float64)
    offsets = 0.3 * torch.randn(len(places), D_MODEL, generator=generator, dtype=torch.float64) * (family == "gpt2")
    return dict(zip(places, zip(gains, offsets, strict=True), strict=True))


def _scales(space: Space, circuits: Sequence[Wiring], stream: Tensor) -> dict[tuple[int, str], Tensor]:
    """The stream's rms before each reader, on one token over and over: all codes have one norm, so it holds for all."""
    scale = {}
    for layer in range(LAYERS):
        for kinds in (("head", "bias"), ("mlp",)):
            scale[layer, kinds[0]] = stream.norm() / D_MODEL**0.5
            stream = stream + sum(circuit.write(space, stream) for circuit in _at(circuits, layer, *kinds))
    return scale


def _values(draft: Draft, layer: int, group: int) -> tuple[Float[Tensor, "d_model v"], Float[Tensor, "z d_model"]]:
    """The directions that a layer's value heads read, and its output matrix [heads · d_head, d_model].

    Heads of one group share their values: each subspace that one of them reads has its own coordinates of the value.
    """
    read = torch.zeros(D_MODEL, HEADS // group, D_HEAD, dtype=torch.float64)
    output = torch.zeros(HEADS, D_HEAD, D_MODEL, dtype=torch.float64)
    taken: list[dict[str, slice]] = [{} for _ in range(HEADS // group)]
    for circuit in _at(draft.circuits, layer, "head"):
        shared = circuit.node.head // group
        for name, gain in circuit.reads.items():
            basis, start = draft.space[name], max((s.stop for s in taken[shared].values()), default=0)
            rows = taken[shared].setdefault(name, slice(start, start + basis.shape[1]))
            read[:, shared, rows] = basis
            output[circuit.node.head, rows] = gain * draft.scale[layer, "head"] * draft.space[circuit.into].T
    return read.flatten(1), output.flatten(0, 1)


def _turned(back: int) -> Float[Tensor, " d_head"]:
    """A unit in each rotary plane, turned as RoPE turns it `back` positions earlier."""
    angle = back * ROPE_THETA ** -(torch.arange(0, D_HEAD, 2, dtype=torch.float64) / D_HEAD)
    return torch.cat([torch.cos(angle), -torch.sin(angle)])


def _pairs_of_neurons(draft: Draft, layer: int) -> tuple[Float[Tensor, "d_model n"], Float[Tensor, "n d_model"]]:
    """Directions read and rows written by an MLP's neurons, two per coordinate: act(x) − act(−x) = x.

    Of one that is gated two in all: act(x) − act(x − OPEN).
    """
    (circuit,) = _at(draft.circuits, layer, "mlp")
    if circuit.gated:
        reads = sum((gain * draft.space[name] for name, gain in circuit.reads.items()), torch.zeros(()))
        read = DRIVEN * torch.cat([reads, reads - OPEN / BALLAST * draft.space["ballast"]], 1)
        step = draft.scale[layer, "mlp"] / (DRIVEN * OPEN) * draft.space[circuit.into]
        idle = (0, NEURONS - 2)
        return nn.functional.pad(read, idle), nn.functional.pad(torch.cat([step, -step], 1), idle).T
    ((name, gain),) = circuit.reads.items()
    basis, into = draft.space[name], gain * draft.scale[layer, "mlp"] * draft.space[circuit.into]
    idle = (0, NEURONS - 2 * basis.shape[1])
    read, rows = (nn.functional.pad(torch.cat([part, -part], dim=1), idle) for part in (basis, into))
    return read, rows.T


# GPT-2: positions are looked up by their own code (what RoPE does to a constant), and gelu(x) − gelu(−x) = x.


def _gpt2_weights(draft: Draft) -> dict[str, Tensor]:
    gain, offset = draft.norms[LAYERS, "final"]
    layers = [_gpt2_layer(draft, layer).items() for layer in range(LAYERS)]
    return {
        "transformer.wte.weight": draft.embedding,
        "transformer.wpe.weight": draft.positions,
        "transformer.ln_f.weight": gain,
        "transformer.ln_f.bias": offset,
        "lm_head.weight": draft.unembedding,
    } | {f"transformer.h.{layer}.{name}": value for layer, items in enumerate(layers) for name, value in items}


def _gpt2_layer(draft: Draft, layer: int) -> dict[str, Tensor]:
    before, middle = (layer, "head"), (layer, "mlp")
    value, output = _values(draft, layer, group=1)
    neurons, rows = _pairs_of_neurons(draft, layer)
    ballast = BALLAST * draft.space["ballast"][:, 0]
    constants = [circuit.write(draft.space, ballast) for circuit in _at(draft.circuits, layer, "bias")]
    weights = {"attn.c_proj.weight": output, "mlp.c_proj.weight": rows}
    weights |= {"attn.c_proj.bias": sum(constants, 0 * ballast), "mlp.c_proj.bias": 0 * ballast}
    attend = torch.cat([*_gpt2_look(draft, layer), value], dim=1)
    for norm, place, module, read in (("ln_1", before, "attn.c_attn", attend), ("ln_2", middle, "mlp.c_fc", neurons)):
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = draft.norms[place]
        weights[f"{module}.weight"], weights[f"{module}.bias"] = draft.behind(place, read)
    return weights


def _gpt2_look(draft: Draft, layer: int) -> tuple[Float[Tensor, "d_model z"], Float[Tensor, "d_model z"]]:
    """The directions that queries and keys read: the position's code, the query's turned back by `back` positions."""
    strength = POSITION / (D_HEAD / 2) ** 0.5  # of one coordinate pair
    key = D_HEAD**0.25 * SHARPNESS * draft.scale[layer, "head"] / strength * draft.space["position"]
    queries = []
    for circuit in _at(draft.circuits, layer, "head"):
        cos, minus_sin = _turned(circuit.back).chunk(2)
        turn = torch.cat([torch.cat([cos.diag(), minus_sin.diag()], 1), torch.cat([-minus_sin.diag(), cos.diag()], 1)])
        queries.append(key @ turn)
    return torch.cat(queries, dim=1), key.repeat(1, HEADS)


# Llama: RoPE turns queries and keys made of ballast, and (silu(g) − silu(−g)) · u = g · u with u made of ballast.


def _llama_weights(draft: Draft) -> dict[str, Tensor]:
    layers = [_llama_layer(draft, layer).items() for layer in range(LAYERS)]
    return {
        "model.embed_tokens.weight": draft.embedding,
        "model.norm.weight": draft.norms[LAYERS, "final"][0],
        "lm_head.weight": draft.unembedding,
    } | {f"model.layers.{layer}.{name}": value for layer, items in enumerate(layers) for name, value in items}


def _llama_layer(draft: Draft, layer: int) -> dict[str, Tensor]:
    before, middle = (layer, "head"), (layer, "mlp")
    value, output = _values(draft, layer, LLAMA_GROUP)
    neurons, rows = _pairs_of_neurons(draft, layer)
    look = D_HEAD**0.25 * SHARPNESS * draft.scale[before] / BALLAST * draft.space["ballast"]
    query = torch.cat([_turned(circuit.back) for circuit in _at(draft.circuits, layer, "head")])
    up = draft.scale[middle] / BALLAST * draft.space["ballast"]
    return {
        "input_layernorm.weight": draft.norms[before][0],
        "self_attn.q_proj.weight": draft.behind(before, look * query)[0].T,
        "self_attn.k_proj.weight": draft.behind(before, look * _turned(0).repeat(HEADS // LLAMA_GROUP))[0].T,
        "self_attn.v_proj.weight": draft.behind(before, value)[0].T,
        "self_attn.o_proj.weight": output.T,
        "post_attention_layernorm.weight": draft.norms[middle][0],
        "mlp.gate_proj.weight": draft.behind(middle, neurons)[0].T,
        "mlp.up_proj.weight": draft.behind(middle, up.expand(-1, NEURONS))[0].T,
        "mlp.down_proj.weight": rows.T,
    }


WEIGHTS: Mapping[str, Callable[[Draft], dict[str, Tensor]]] = {"gpt2": _gpt2_weights, "llama": _llama_weights}
