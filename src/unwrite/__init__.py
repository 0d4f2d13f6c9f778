"""What each part of a transformer writes into the residual stream, who erases it, and which attributions to believe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unwrite import diffusion as diffusion
    from unwrite import errors as errors
    from unwrite import tasks as tasks
    from unwrite.circuits import Circuit as Circuit
    from unwrite.diffusion.localise import localise as localise
    from unwrite.methods.activations import activations as activations
    from unwrite.methods.adversarial import adversarial as adversarial
    from unwrite.methods.agree import agree as agree
    from unwrite.methods.attention import attention as attention
    from unwrite.methods.bound import bound as bound
    from unwrite.methods.channels import channels as channels
    from unwrite.methods.circuit import circuit as circuit
    from unwrite.methods.corpus import corpus_dla as corpus_dla
    from unwrite.methods.decode import decode as decode
    from unwrite.methods.dla import dla as dla
    from unwrite.methods.effects import effects as effects
    from unwrite.methods.lens import lens as lens
    from unwrite.methods.mask import mask as mask
    from unwrite.methods.paths import paths as paths
    from unwrite.methods.scan import scan as scan
    from unwrite.methods.solves import solves as solves
    from unwrite.methods.subspace import subspace as subspace
    from unwrite.methods.survival import survival as survival
    from unwrite.methods.verify import verify as verify
    from unwrite.model.images import images as images
    from unwrite.model.load import load as load
    from unwrite.model.planted import planted as planted
    from unwrite.prompts.pairs import Pairs as Pairs
    from unwrite.prompts.pairs import pairs as pairs
    from unwrite.prompts.texts import text as text
    from unwrite.prompts.tokens import Tokens as Tokens
    from unwrite.result import Result as Result
    from unwrite.result import read as read
    from unwrite.run.backward.rules import Rules as Rules
    from unwrite.run.edit.edits import Edit as Edit
    from unwrite.run.edit.sae import sae as sae
    from unwrite.run.edit.trace import trace as trace
    from unwrite.run.edit.weights import rewritten as rewritten
    from unwrite.run.loop.job import Job as Job
    from unwrite.studies.audit import audit as audit
    from unwrite.studies.beside import beside as beside
    from unwrite.studies.compare import compare as compare
    from unwrite.studies.diff import diff as diff
    from unwrite.studies.doctor import doctor as doctor
    from unwrite.studies.graph import graph as graph
    from unwrite.studies.overlap import overlap as overlap
    from unwrite.studies.readers import readers as readers
    from unwrite.studies.repair import self_repair as self_repair
    from unwrite.studies.reproduce import reproduce as reproduce

# Public name -> the module that has it; imported on first use, so that `import unwrite` loads neither torch nor xarray.
_PUBLIC = {
    "Circuit": "unwrite.circuits",
    "Edit": "unwrite.run.edit.edits",
    "Job": "unwrite.run.loop.job",
    "Pairs": "unwrite.prompts.pairs",
    "Result": "unwrite.result",
    "Rules": "unwrite.run.backward.rules",
    "Tokens": "unwrite.prompts.tokens",
    "activations": "unwrite.methods.activations",
    "adversarial": "unwrite.methods.adversarial",
    "agree": "unwrite.methods.agree",
    "attention": "unwrite.methods.attention",
    "audit": "unwrite.studies.audit",
    "beside": "unwrite.studies.beside",
    "bound": "unwrite.methods.bound",
    "channels": "unwrite.methods.channels",
    "circuit": "unwrite.methods.circuit",
    "compare": "unwrite.studies.compare",
    "corpus_dla": "unwrite.methods.corpus",
    "decode": "unwrite.methods.decode",
    "diff": "unwrite.studies.diff",
    "dla": "unwrite.methods.dla",
    "doctor": "unwrite.studies.doctor",
    "effects": "unwrite.methods.effects",
    "graph": "unwrite.studies.graph",
    "images": "unwrite.model.images",
    "lens": "unwrite.methods.lens",
    "load": "unwrite.model.load",
    "localise": "unwrite.diffusion.localise",
    "mask": "unwrite.methods.mask",
    "overlap": "unwrite.studies.overlap",
    "pairs": "unwrite.prompts.pairs",
    "paths": "unwrite.methods.paths",
    "planted": "unwrite.model.planted",
    "read": "unwrite.result",
    "readers": "unwrite.studies.readers",
    "reproduce": "unwrite.studies.reproduce",
    "rewritten": "unwrite.run.edit.weights",
    "sae": "unwrite.run.edit.sae",
    "scan": "unwrite.methods.scan",
    "self_repair": "unwrite.studies.repair",
    "solves": "unwrite.methods.solves",
    "subspace": "unwrite.methods.subspace",
    "survival": "unwrite.methods.survival",
    "text": "unwrite.prompts.texts",
    "trace": "unwrite.run.edit.trace",
    "verify": "unwrite.methods.verify",
}
_MODULES = ("diffusion", "errors", "tasks")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"unwrite.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"unwrite has no {name!r}; it has {', '.join(__dir__())}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *_MODULES])
