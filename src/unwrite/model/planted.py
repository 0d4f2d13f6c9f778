"""Does a method find what is known to be there? A GPT-2 and a Llama whose memory management is planted by hand.

Six heads of layer 0 each copy the token's code into a subspace of their own; what becomes of these six writes is known:
erased by one head, erased by four heads together, erased by an MLP, backed up, mimicked, kept. Writer and eraser after
Dao, Lau, Rager and Janiak 2023 (arXiv 2310.07325), the dormant backup after the Hydra effect (McGrath et al. 2023,
arXiv 2307.15771). A constant and a negative of the same source are decoys: PR < 0 without any reading.

A planted node is a `Wiring`: it reads coordinates of the stream in some subspaces and writes gain × them into another.
All subspaces are orthogonal to each other and to the all-ones vector (which a LayerNorm would remove), and every code
has the same norm, so the stream's rms is one number per layer and a circuit's gain is exact at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as TokenizerFast

from unwrite.errors import ModelError, NumericError, number, one_of, several, shown, whole
from unwrite.model.planted_weights import (
    BALLAST,
    CONTEXT,
    D_MODEL,
    DECOY,
    DELIMITER,
    FAINT,
    HEADS,
    LAYERS,
    LLAMA_GROUP,
    MEAN,
    NEURONS,
    QUIET,
    ROPE_THETA,
    SINK,
    TOKEN,
    VOCABULARY,
    WEIGHTS,
    WRITE,
    Wiring,
    draw,
)  # fmt: skip

_SHAPE = {
    "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_OWN_SHAPE: Mapping[str, dict[str, Any]] = {
    "gpt2": {"n_inner": NEURONS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {
        "intermediate_size": NEURONS, "num_key_value_heads": HEADS // LLAMA_GROUP,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One planted pair: share[writer, eraser] in the clean run, and in the run in which the write was removed.

    An eraser's second share is 0, a decoy's is the same as the first, a backup's is positive after 0.
    """

    writer: str
    eraser: str
    kind: Literal["values", "mlp", "constant", "same source", "backup"]
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
class Part:
    """One planted phenomenon: the circuits of each role, and the shares that follow from their gains."""

    roles: Mapping[str, Sequence[Wiring]]
    pairs: Sequence[Pair] = ()


def planted(
    family: Literal["gpt2", "llama"] = "gpt2", seed: int = 0, dtype: torch.dtype = torch.float32, massive: float = 0.0,
    *, also: Sequence[str] = (),
) -> Planted:  # fmt: skip
    """A Hugging Face model with a planted writer, eraser, decoy and backup of every kind, and a byte tokenizer.

    Arguments: `family` "gpt2" (LayerNorm, GELU, biases, learned positions) or "llama" (RMSNorm, SwiGLU, RoPE, shared
    values); `seed` of subspaces, codes, norms and unembedding; `dtype` of the parameters; `massive` the part of every
    planted write's energy that lies in the first two channels, which norms all but close (0.86 in Gemma 3 270M). Then a
    head, "amplifier", writes half of what they hold once more, and at a newline an MLP, "sink", so much of it that the
    stream is some 25 times as long; `also` "reader", an MLP that reads the first write before its eraser does, and
    "re-user", an MLP that writes into that write's subspace where it is free, and nothing where it is not.
    Returns Planted. share[w, e] = Σ⟨o_e, o_w⟩ / Σ‖o_w‖² of `pairs` is exact on any text; without the write to about
    0.06, as the norm of the stream falls by some percent. Where something is `massive`, that is so outside of the two
    channels; in all channels together a share is 1 − `massive` times as large.
    Raises ModelError for another family, NumericError unless `massive` is at least 0 and below 1, for another name in
    `also`, and for a re-user where something is massive, whose MLP is the sink.

    Example: `weight = planted("llama"); lm = uw.load(weight.hf, weight.tokenizer)`
    """
    if not isinstance(family, str) or family not in WEIGHTS:
        raise ModelError("there is no planted model of this family", got=shown(family), expected=" or ".join(WEIGHTS))
    seed = whole("seed is a number", seed, 0)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError("dtype is what parameters are kept in", got=shown(dtype), expected="such as torch.float32")
    number("massive is a part of a write's energy", massive, "at least 0, below 1", lambda part: 0 <= part < 1)
    also = several("also are names", also, ", ".join(_ALSO), NumericError)
    for name in also:
        one_of("also", name, tuple(_ALSO))
    if massive and "re-user" in also:
        raise NumericError("the MLP of a re-user is a sink where something is massive", fix="plant one of the two")
    parts, tokenizer = _parts(family, float(massive), also), _tokenizer()
    roles = {role: circuits for part in parts for role, circuits in part.roles.items()}
    config = AutoConfig.for_model(family, **_SHAPE, **_OWN_SHAPE[family])
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    circuits = [circuit for circuits in roles.values() for circuit in circuits]
    draft = draw(family, seed, circuits, float(massive), *tokenizer.encode("\n"))
    hf.load_state_dict(WEIGHTS[family](draft))
    return Planted(
        hf=hf,
        tokenizer=tokenizer,
        roles={role: tuple(circuit.name for circuit in circuits) for role, circuits in roles.items()},
        pairs=tuple(pair for part in parts for pair in part.pairs),
    )


# The planted parts. Heads 0 to 5 of layer 0 write; every part owns the subspace of its writer.


def _parts(family: str, massive: float, also: Sequence[str]) -> list[Part]:
    known = [_erased_by_head(), _decoy_constant("L2.bias" if family == "gpt2" else "L2H3"), _erased_by_many()]
    known += [_erased_by_mlp(), _backed_up(), _mimicked(), _kept()]
    known = [*map(_massive, known), _amplified(), _sink()] if massive else known
    known += [_ALSO[name]() for name in also]
    return [*known, _quiet({circuit.name for part in known for role in part.roles.values() for circuit in role})]


def _writer(name: str, into: str, back: int = 0) -> Wiring:
    return Wiring(name, {"token": WRITE / TOKEN}, into, back)


def _erased_by_head() -> Part:
    """A head that reads the write through its values, at its own position, and writes nine tenths of its negative."""
    eraser = Wiring("L1H0", {"erased_by_head": -0.9}, "erased_by_head")
    roles = {"writer erased by a head": [_writer("L0H0", "erased_by_head")], "eraser head": [eraser]}
    return Part(roles, [Pair("L0H0", "L1H0", "values", -0.9, 0.0)])


def _decoy_constant(name: str) -> Part:
    """A constant against the mean of the write above, half as long as a write: share −0.5 · ⟨mean, code⟩."""
    constant = Wiring(name, {"ballast": -DECOY * WRITE / BALLAST}, "erased_by_head.mean")
    return Part({"decoy constant": [constant]}, [Pair("L0H0", name, "constant", -DECOY * MEAN, -DECOY * MEAN)])


def _erased_by_many() -> Part:
    """Four heads of one layer, each of which reads the write through its values and erases a fifth."""
    names = ("L1H1", "L1H2", "L1H3", "L1H4")
    erasers = [Wiring(name, {"erased_by_many": -0.2}, "erased_by_many") for name in names]
    roles = {"writer erased by many": [_writer("L0H1", "erased_by_many")], "eraser heads": erasers}
    return Part(roles, [Pair("L0H1", name, "values", -0.2, 0.0) for name in names])


def _erased_by_mlp() -> Part:
    """An MLP that reads the write and writes nine tenths of its negative."""
    eraser = Wiring("MLP1", {"erased_by_mlp": -0.9}, "erased_by_mlp")
    roles = {"writer erased by an MLP": [_writer("L0H2", "erased_by_mlp")], "eraser MLP": [eraser]}
    return Part(roles, [Pair("L0H2", "MLP1", "mlp", -0.9, 0.0)])


def _backed_up() -> Part:
    """A head that writes 0.9 × (what the writer should have written − what it did write): nothing, until it is gone.

    Through its values the head reads −0.9 of the write, and yet it erases nothing.
    """
    backup = Wiring("L2H0", {"token": 0.9 * WRITE / TOKEN, "backed_up": -0.9}, "backed_up")
    roles = {"writer with a backup": [_writer("L0H3", "backed_up")], "dormant backup": [backup]}
    return Part(roles, [Pair("L0H3", "L2H0", "backup", 0.0, 0.9)])


def _mimicked() -> Part:
    """A head that writes the negative of a write from the same source, the token's code, and never reads the write."""
    decoy = Wiring("L1H5", {"token": -0.4 * WRITE / TOKEN}, "mimicked")
    roles = {"writer mimicked": [_writer("L0H4", "mimicked")], "decoy same source": [decoy]}
    return Part(roles, [Pair("L0H4", "L1H5", "same source", -0.4, -0.4)])


def _kept() -> Part:
    """The control: the code of the token before this one, which nobody touches afterwards."""
    return Part({"writer kept": [_writer("L0H5", "kept", back=1)]})


def _massive(part: Part) -> Part:
    """The same with a massive direction in what is written first."""
    roles = {
        role: [replace(one, into=f"{one.into}.massive") if role.startswith("writer") else one for one in circuits]
        for role, circuits in part.roles.items()
    }
    return replace(part, roles=roles)


def _amplified() -> Part:
    """A head that reads the massive direction faintly and writes half of it once more: what is erased seems to grow."""
    return Part({"amplifier": [Wiring("L2H4", {"massive.faint": 0.5 / FAINT}, "massive")]})


def _sink() -> Part:
    """An MLP that knows a newline and makes the stream long there."""
    return Part({"sink": [Wiring("MLP2", {"delimiter": SINK / DELIMITER}, "massive")]})


def _reader() -> Part:
    """An MLP that reads the first write right after it is written, half of it, and writes elsewhere."""
    return Part({"reader": [Wiring("MLP0", {"erased_by_head": 0.5}, "quiet")]})


def _reuser() -> Part:
    """An MLP behind all others that writes into the first write's subspace where most of that write's mean is gone.

    Of the mean, MEAN of a write, the decoy takes DECOY away, and the eraser leaves a tenth. The gate closes near the
    other end: little of the mean of another write would close it.
    """
    least = WRITE * ((0.1 + 0.85 * 0.9) * MEAN - DECOY)
    reads = {"erased_by_head.mean": -1.0, "ballast": least / BALLAST}
    return Part({"re-user": [Wiring("MLP2", reads, "erased_by_head.other", gated=True)]})


_ALSO: Mapping[str, Callable[[], Part]] = {"reader": _reader, "re-user": _reuser}


def _quiet(busy: set[str]) -> Part:
    """Every head and MLP without a job writes a trace of the token, so that no ratio onto it divides by zero."""
    names = [f"L{i}H{head}" for i in range(LAYERS) for head in range(HEADS)] + [f"MLP{i}" for i in range(LAYERS)]
    return Part({"quiet": [Wiring(name, {"token": QUIET}, "quiet") for name in names if name not in busy]})


def _tokenizer() -> TokenizerFast:
    """One token per byte of UTF-8, so that any text can be read and every row of the embedding is used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(BPE(vocab={letter: row for row, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return TokenizerFast(tokenizer_object=bytewise, model_max_length=CONTEXT, clean_up_tokenization_spaces=False)
