"""Where in a model is the decoder that reads text, and has it a head? Found by structure: no wrapper is named."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from unwrite.errors import ModelError
from unwrite.model.families import FAMILIES, Family

# What to do with a model that cannot be run.
_BY_ITSELF = "see that it runs by itself: model(input_ids=ids).logits"


def text_config(config: Any) -> Any:
    """The configuration of the decoder that reads text, in a model that reads other things as well; mostly itself."""
    return config.get_text_config(decoder=True)


def row_of(config: Any) -> Family | None:
    """The row of the decoder that reads text; None where the table has none, and one is to be found.

    Raises ModelError for what cannot be decomposed.
    """
    around, config = config, text_config(config)
    family = config.model_type
    if getattr(around, "is_encoder_decoder", False):
        raise ModelError(f"{family} is an encoder–decoder", expected="a decoder with one residual stream")
    if (row := FAMILIES.get(family)) is not None and (why := row.refuse(config)):
        raise ModelError(
            f"this {family} configuration cannot be decomposed exactly: {why}", expected=f"a {family} without that"
        )
    return row


def class_of(config: Any) -> Any:
    """The class of transformers that makes logits of text from such a configuration."""
    causal = text_config(config) is config or type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForMultimodalLM


def head_of(hf: Any) -> nn.Module | None:
    """What makes logits of normed streams, where a model, or one inside of it, has it."""
    every = (part for part in hf.modules() if isinstance(part, PreTrainedModel))
    return next((head for part in every if (head := part.get_output_embeddings()) is not None), None)


def require_decoder(hf: Any) -> None:
    """Raise ModelError for what stands on a decoder and gives other numbers than logits, as classifiers do."""
    if hf.get_output_embeddings() is None and hf.base_model is not hf:
        raise headless(hf)


def headless(hf: Any) -> ModelError:
    """What is to be said where logits are asked of a model that has none."""
    kind = type(hf).__name__
    inside = "" if hf.base_model is hf else f", or pass its .{hf.base_model_prefix} for what needs none (scan, verify)"
    return ModelError(
        f"{kind} has no language-model head, so it gives no logits of tokens", expected="a causal language model",
        fix=f"load it with {class_of(hf.config).__name__} instead of {kind}{inside}",
    )  # fmt: skip


def unrun(hf: Any, name: str, error: Exception, alone: Exception | None) -> ModelError:
    """What is to be said of an error in a model's own pass; `alone` is what token ids by themselves raise, if they do.

    Names of arguments in it are what the model asks for beside the ids: pictures, states of another model.
    """
    takes = [] if alone is None else [*inspect.signature(hf.forward).parameters]
    asks = [part for part in takes if part != "input_ids" and re.search(rf"\b{part}\b", str(alone))]
    within = ((path, part) for path, part in hf.named_modules() if path and isinstance(part, PreTrainedModel))
    inner = next((f".{path} ({type(part).__name__})" for path, part in within if head_of(part) is not None), None)
    if not asks:
        inside = "" if inner is None else f", or pass the causal language model inside of it, its {inner}"
        itself = "does not run on token ids alone: its own forward pass fails"
        what = "could not be run on short random prompts" if alone is None else itself
        got = error if alone is None else alone
        return ModelError(f"{name} ({text_config(hf.config).model_type}) {what}", got=got, fix=_BY_ITSELF + inside)
    return ModelError(
        f"{name} does not run on text alone: its forward pass asks for {', '.join(asks)}",
        expected="a model that gives logits of token ids and nothing else",
        fix="use a decoder that does" if inner is None else f"pass the causal language model inside of it, its {inner}",
    )  # fmt: skip


def decoder_of(hf: Any, row: Family) -> nn.Module:
    """Where the row says; in a model without a head, or around a decoder, the first module that holds all it names."""
    named = [row.blocks, row.embed, row.final_norm]
    kind = text_config(hf.config).model_type
    places = [maybe(hf, row.decoder), *hf.modules()] if text_config(hf.config) is hf.config else hf.modules()
    for module in places:
        own = getattr(getattr(module, "config", None), "model_type", kind)
        if module is not None and own == kind and all(maybe(module, path) is not None for path in named):
            return module
    return find(hf, row.decoder)


def find(root: nn.Module, path: str) -> nn.Module:
    """The submodule at `path` ("a|b": the first that exists). Raises AttributeError if there is none."""
    for option in path.split("|")[:-1]:
        try:
            return root.get_submodule(option)
        except AttributeError:
            continue
    return root.get_submodule(path.split("|")[-1])


def maybe(root: nn.Module | None, path: str | None) -> nn.Module | None:
    """`find`, or None where there is none."""
    if root is None or path is None:
        return None
    try:
        return find(root, path)
    except AttributeError:  # a parallel block may have no norm of its own for its MLP
        return None


def held(root: nn.Module, path: str | None) -> tuple[nn.Module, str] | None:
    """The module that holds the parameter at `path`, and its name there; None where there is none."""
    above, _, name = (path or "").rpartition(".")
    module = maybe(root, above)
    return (module, name) if module is not None and module._parameters.get(name) is not None else None
