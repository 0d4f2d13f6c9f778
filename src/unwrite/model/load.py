"""How does a hub name, a folder or a model in memory become a Model? Refuses what it cannot read exactly or safely."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_accelerate_available

from unwrite.errors import ModelError, UnwriteError, plain, shown
from unwrite.files import possible
from unwrite.model.capture import evaluating
from unwrite.model.certificate import certify
from unwrite.model.complete import whole
from unwrite.model.discover import discovered
from unwrite.model.families import BY_HAND, FOUND
from unwrite.model.gguf import configuration, from_gguf, gguf_file
from unwrite.model.inside import class_of, require_decoder, row_of, text_config, unrun
from unwrite.model.legacy import checkpoint, from_legacy, is_legacy, tokenizer_folder, tokenizer_name
from unwrite.model.now import state
from unwrite.model.onednn import fast
from unwrite.model.options import require_numbers, require_options
from unwrite.model.projections import plain_tensor, require_linear
from unwrite.model.single import HALVES
from unwrite.model.view import Model
from unwrite.model.weights import DISK, home, stored

# The model that comes with the package: trained by examples/pretrain, see its own README.
DEFAULT, BUNDLED = "default", Path(__file__).parents[1] / "bundled"
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(
    source: Any,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    convention: str = "paper",
) -> Model:
    """A `Model` from a hub name, a folder, or a Hugging Face causal language model already in memory.

    "default" is the small model that comes with the package; a `.gguf` file is dequantised once and kept so in the
    user's cache folder; a TransformerLens-era checkpoint, by folder or by hub name, becomes a GPT-2.
    Arguments: `tokenizer`, by default the one that comes with the model, or a processor that has one; `revision` a hub
    commit; `dtype` by default that of the weights, but on a CPU float32 for half precision, which "auto" keeps;
    `device` or `device_map` where to put it (not for a model in memory, which stays as and where it is), the latter
    "auto" or {module: device} as in accelerate, with "cpu" and "disk" for what is brought in when it is needed;
    `convention` "paper" (Dao et al. 2023: heads without constant part, LayerNorm streams centred) or "raw".
    Raises ModelError for an unknown architecture, an encoder–decoder, weights that are missing or pickled, remote code
    (unless `trust_remote_code`), what is no tokenizer, or a decomposition whose certificate fails, with the failing
    identity.

    Example: `lm = uw.load("gpt2")`; `print(lm.certificate.explain())`
    """
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    require_options(tokenizer, revision, dtype, device, trust_remote_code, convention)
    if isinstance(source, (str, Path)) and str(source):
        device_map = places(device_map, device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        place = str(BUNDLED if source == DEFAULT else possible(source, ModelError))
        on_cpu = device_map is None and torch.device(device or "cpu").type == "cpu"
        kept = dtype or (None if on_cpu else "auto")
        hf, own = _from_disk(place, {"dtype": kept, "device_map": device_map, **options})
        hf = hf if device is None else hf.to(torch.device(device))  # pyright: ignore[reportArgumentType]
        tokenizer = tokenizer or own()
    elif isinstance(hf := unwrapped(source), PreTrainedModel):
        if any(option is not None for option in (revision, dtype, device, device_map)):
            raise ModelError("a model in memory stays as it is", fix="leave revision, dtype, device and device_map out")
    else:
        raise ModelError(
            "cannot load this", got=shown(source), expected="a hub name, a folder, or a model of transformers"
        )
    return view(hf, tokenizer, convention, name=_called(source))


def unwrapped(source: Any) -> Any:
    """The transformers model inside of what compiles or adapts it; adapters stay in their place.

    Raises ModelError for a model that is given virtual tokens, and for a wrapper that fails.
    """
    source = getattr(source, "_orig_mod", source)
    if not hasattr(type(source), "get_base_model"):
        return source
    try:
        adapters, base = dict(source.peft_config), source.get_base_model()
    except Exception as error:  # the code is the wrapper's own
        raise ModelError(
            f"{shown(source)} does not give the model that it adapts", got=error,
            fix="pass the model itself, with the adapters in it",
        ) from error  # fmt: skip
    for name, adapter in adapters.items():
        if getattr(adapter, "num_virtual_tokens", None):
            raise ModelError(
                f"the adapter {name} puts virtual tokens before a text, which are no tokens of it",
                got=f"{adapter.num_virtual_tokens} of them", expected="adapters that change weights (LoRA and kin)",
                fix="load the model without this adapter",
            )  # fmt: skip
    return getattr(base, "_orig_mod", base)


def view(hf: PreTrainedModel, tokenizer: Any = None, convention: str = "paper", name: str = "") -> Model:
    """A certified `Model` on a Hugging Face model in memory. Raises ModelError as `load` does."""
    family, row = text_config(hf.config).model_type, row_of(hf.config)
    require_decoder(hf)
    about = {"name": name or type(hf).__name__, "commit": getattr(hf.config, "_commit_hash", None)}
    about["row"] = FOUND if row is None else BY_HAND
    try:
        lm = Model(hf, tokenizer, family, row or discovered(hf), convention, about)
        made = (layer.modules.get(name) for layer in lm.layers for name in ("out_proj", "value", "latent"))
        require_linear(lm, *(part for part in made if part is not None))
        with evaluating(hf), fast(hf):
            certificate = certify(lm)
    except UnwriteError:
        raise
    except Exception as error:  # the forward pass is the model's own
        raise unrun(hf, str(about["name"]), error, _alone(hf)) from error
    require_numbers(str(about["name"]), hf, certificate.errors)
    certificate.require(str(about["name"]))
    weights_hash(lm)
    return replace(lm, certificate=certificate, state=state(hf))


def _alone(hf: PreTrainedModel) -> Exception | None:
    """What a pass of two tokens and nothing else raises, if it does."""
    try:
        with evaluating(hf), torch.no_grad():
            hf(input_ids=torch.zeros(1, 2, dtype=torch.long, device=home(hf)), use_cache=False)
    except Exception as error:  # noqa: BLE001 - the forward pass is the model's own
        return error
    return None


def outline(source: str | Path, dtype: torch.dtype | str | None = None) -> Model | None:
    """A `Model` of empty weights, from a configuration alone; None for a checkpoint that does not describe itself.

    Raises ModelError as `load` does, as far as a configuration tells.
    """
    place = str(BUNDLED if source == DEFAULT else source)
    if is_legacy(Path(place)):
        return None
    try:
        config = AutoConfig.from_pretrained(place)
        if (row := row_of(config)) is None:  # it is found from what a model computes
            return None
        with torch.device("meta"):
            hf = class_of(config).from_config(config, dtype=dtype or config.dtype or torch.float32)
    except UnwriteError:
        raise
    except Exception:  # noqa: BLE001 - what is wrong with it is said when it is loaded
        return None
    return Model(hf, None, text_config(config).model_type, row, "paper", {"name": _called(source)})


def untrained(lm: Model, seed: int = 0) -> Model:
    """A model of the same configuration with the weights that its class begins training with.

    Raises ModelError where its class makes none by itself, as where a wrapper has changed its modules.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attention = lm.config._attn_implementation
            hf = type(lm.hf)._from_config(copy.deepcopy(lm.hf.config), dtype=lm.dtype, attn_implementation=attention)
        return view(hf.to(lm.device).eval(), lm.tokenizer, lm.convention, name=f"{lm.about.get('name')}, untrained")
    except UnwriteError:
        raise
    except Exception as error:
        raise ModelError(f"a {type(lm.hf).__name__} makes no untrained copy of itself", got=error) from error


def quieten() -> None:
    """Switch off the progress bars and warnings of transformers for this process: what matters is raised."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()


def provenance(lm: Model) -> dict[str, Any]:
    """What identifies the model in a result: name, commit, weights, shape, convention and certificate."""
    return {
        **lm.about,
        "family": lm.family,
        "weights": weights_hash(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "attention": lm.config._attn_implementation,
        "layers": len(lm.layers),
        "heads": lm.n_heads,
        "d_model": lm.d_model,
        "convention": lm.convention,
        "centred": lm.centred,
        "certificate": dict(lm.certificate.errors),
        "certificate_limit": lm.certificate.limit,
        "certificate_rounding": lm.certificate.rounding,
        "certificate_beyond": lm.certificate.unchecked,
        "certificate_limits": {name: lm.certificate.allowed(name) for name in lm.certificate},
    }


def weights_hash(lm: Model) -> str:
    """SHA-256 of all parameters, name by name: two models with equal hashes have equal weights.

    Computed once, and again only after a parameter was replaced or changed in place, or the file that one is read from.
    Weights that are kept elsewhere are read one by one.
    """
    every = sorted(stored(lm.hf), key=lambda one: one.name)
    state = tuple(one.state for one in every)
    if state not in lm.hashes:
        lm.hashes.clear()
        total = hashlib.sha256()
        for one in every:
            total.update(f"{one.name} {tuple(one.shown.shape)} {one.shown.dtype}".encode())
            flat = plain_tensor(one.values()).cpu().contiguous().view(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        lm.hashes[state] = total.hexdigest()
    return lm.hashes[state]


def _from_disk(source: str, options: dict[str, Any]) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """The model, and what finds its own tokenizer."""
    if (file := gguf_file(source)) is not None:
        return _from_gguf(file, options)
    if not is_legacy(Path(source)):
        _check_folder(Path(source))
    hub = {key: options[key] for key in ("revision", "trust_remote_code")}
    try:
        if (legacy := checkpoint(source, options["revision"])) is not None:
            hf = from_legacy(legacy, options["dtype"] or "auto", device_map=options["device_map"])
            return hf, partial(_legacy_tokenizer, legacy, hf.config)
        config = AutoConfig.from_pretrained(source, **hub)
        row_of(config)
        options["dtype"] = options["dtype"] or _wide(source, config.dtype)
        hf = whole(source, _called(source), config, options)
        return hf, partial(_tokenizer, source, hf.config, hub)
    except UnwriteError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {source}", got=error, fix=_advice(error)) from error


def _wide(source: str, kept: Any) -> Any:
    """float32 instead of half precision: a CPU gains nothing by that, and every number loses by it."""
    if kept not in HALVES:
        return "auto"
    name = str(kept).removeprefix("torch.")
    said = f"{_called(source)} is kept in {name} and, on a CPU, computed in float32; dtype='auto' keeps {name}"
    logging.getLogger("unwrite").warning("%s", plain(said))
    return torch.float32


def _from_gguf(file: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, Callable[[], Any]]:
    if options["device_map"] is not None:
        raise ModelError(
            "a GGUF file is dequantised in memory", fix="leave device_map out, or save_pretrained() it first"
        )
    try:
        config = configuration(file)
        row_of(config)
        hf = from_gguf(file, options["dtype"])
    except UnwriteError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {file.name}", got=error, fix=_advice(error)) from error
    return hf, partial(_tokenizer, str(file.parent), hf.config, {"gguf_file": file.name})


def places(device_map: Any, device: Any = None) -> Any:
    """A device map as transformers reads it: "disk" puts everything there. Raises ModelError for what is none."""
    if device_map is None:
        return None
    if device is not None:
        raise ModelError("device and device_map both say where the model goes", fix="leave one of them out")
    if not is_accelerate_available():
        raise ModelError("device_map needs accelerate, which is not installed", fix="pip install 'unwrite[accelerate]'")
    named = device_map if isinstance(device_map, dict) else {"": device_map}
    for place in named.values():
        if place != DISK and not (place in _SPREADS and named is not device_map):
            try:
                torch.device(place)
            except (RuntimeError, TypeError):
                expected = f"{', '.join(_SPREADS)}, a device, {DISK}, or {{part of the model: device}}"
                raise ModelError("device_map names no device", got=shown(place), expected=expected) from None
    return named if device_map == DISK else device_map


def _called(source: Any) -> str:
    """A hub name as it is; of a file or folder its last part: results travel, and a path tells about a machine."""
    name = str(getattr(source, "name_or_path", source))
    if name in (DEFAULT, str(BUNDLED)):
        return "unwrite's own model"
    return Path(name).resolve().name if name and Path(name).exists() else name


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ModelError(f"{folder} is a file", expected="a folder as save_pretrained writes it, or a GGUF file")
    if not folder.is_dir():
        # A hub name is "name" or "owner/name"; anything longer or anchored was meant as a path.
        if folder.is_absolute() or len(folder.parts) > 2 or folder.parts[:1] in (("..",), ("~",)):
            raise ModelError(
                f"cannot load {folder}: there is no such folder", expected="a folder as save_pretrained writes it",
                fix="check the path; on the hub a model is called name or owner/name",
            )  # fmt: skip
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", expected="a folder as save_pretrained writes it")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights, which can run any code when opened",
            got=pickled[0],
            expected="*.safetensors",
            fix="if you trust them, load them yourself, save_pretrained() them, and load that folder",
        )
    raise ModelError(f"{folder} has no weights", expected="*.safetensors")


def _advice(error: Exception) -> str | None:
    if "trust_remote_code" in str(error):
        return "the model brings its own code; read it, then pass trust_remote_code=True with a revision"
    if "offload_folder" in str(error) or "offload_dir" in str(error):
        return (
            "these weights cannot be read from disk as they lie there; load the model yourself with "
            "from_pretrained(…, device_map=…, offload_folder=…), or keep them all in memory, and pass the model"
        )
    if "meta device" in str(error) or "device_map" in str(error):
        return "name every part of the model in device_map, without a part that holds another one (such as '')"
    if any(sign in str(error) for sign in ("model_type", "Unrecognized", "does not recognize this architecture")):
        return f"check model_type in its config.json, or update transformers, which is {transformers.__version__}"
    if "ignore_mismatched_sizes" in str(error):
        return "take config.json and weights from one place: they are of different shapes"
    return "check the name, the folder and the network"


def _tokenizer(source: str, config: Any, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # noqa: BLE001 - a model without a tokenizer is complete: token ids can be given
        return None
    # A tokenizer that names no limit reports an astronomical one; windows need the model's.
    context = getattr(config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    return tokenizer


def _legacy_tokenizer(folder: Path, config: Any) -> Any:
    """The one that comes with the weights or that they name, which may be out of reach: that is said once."""
    place = tokenizer_folder(folder)
    tokenizer = None if place is None else _tokenizer(str(place), config, {})
    if tokenizer is None:
        wanted = f"{tokenizer_name(folder) or 'one that its checkpoint does not name'} cannot be had"
        logging.getLogger("unwrite").warning("%s", plain(f"no tokenizer: {wanted}; pass tokenizer=… or token ids"))
    elif tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True  # as such models were trained, and TransformerLens reads text
    return tokenizer
