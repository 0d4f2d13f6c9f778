"""Is all that a model needs in its checkpoint? transformers makes up what is missing, at random."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from unwrite.errors import ModelError
from unwrite.model.inside import class_of
from unwrite.model.options import require_whole

# What gives other numbers than logits of tokens, as transformers calls it.
_OTHER = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")


def whole(source: str, name: str, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint, without a head where that has none.

    Raises ModelError for a classifier, and where other weights than the head's are missing.
    """
    _require_head(config)
    hf, found = class_of(config).from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing, head = {*found["missing_keys"]}, hf.get_output_embeddings()
    of_head = {name for name, part in hf.named_parameters() if any(part is own for own in head.parameters())}
    if missing and missing <= of_head and hf.base_model is not hf:
        return hf.base_model
    require_whole(name, found)
    return hf


def _require_head(config: Any) -> None:
    if type(config) not in class_of(config)._model_mapping and not hasattr(config, "auto_map"):
        raise ModelError(
            f"transformers has no model that makes logits of text from {config.model_type} by itself",
            expected=f"a type of {class_of(config).__name__}", fix="load the model that it is a part of",
        )  # fmt: skip
    others = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in _OTHER]
    for name in getattr(config, "architectures", None) or ():
        if any(name in names.values() for names in others):
            raise ModelError(
                f"{name} has no language-model head, so it gives no logits of tokens",
                expected="a causal language model",
                fix="load the model that it was made of, or pass AutoModel.from_pretrained(…) for a scan or verify",
            )
