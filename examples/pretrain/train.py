"""How was the bundled model made? A small GPT-2, like gelu-4l in miniature, trained on books and Python's own source.

    python examples/pretrain/train.py --books BOOKS --out RUN [--width 128 --seed 0 --tokens 20e6 …]

Text is cut into tokens once (byte-level BPE, digits split) and kept beside the runs. A run is a folder: `run.json`
(settings, loss curve, time) and the newest checkpoint, from which it goes on when it was cut; `steps/` holds the
checkpoints along the way. Batch k of a run depends on its seed and k alone, so a resumed run sees the batches that it
would have seen.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HELD_OUT = ("jane-austen_emma.txt", "h-g-wells_the-war-of-the-worlds.txt")
# Of the standard library: the documentation topics and one package, so that there is code and prose to be shown.
HELD_OUT_LIBRARY = {"pydoc_data", "asyncio"}
NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VOCABULARY, BOS = 4096, "<|bos|>"
CODE = 0.2  # of the rows
SAVE_EVERY = 120  # seconds


def texts(books: Path) -> dict[str, list[str]]:
    """The training text by source: books and the standard library, but for what is held out and for tests."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        file
        for file in sorted(library.rglob("*.py"))
        if not (NO_LIBRARY | HELD_OUT_LIBRARY) & set(file.relative_to(library).parts)
    ]
    return {
        "books": [file.read_text("utf-8") for file in sorted(books.glob("*.txt")) if file.name not in HELD_OUT],
        "code": [file.read_text("utf-8", errors="replace") for file in modules],
    }


def prepare(books: Path, place: Path) -> dict[str, np.ndarray]:
    """Token ids of every source, one long array each; made once, with the tokenizer beside them."""
    files = {source: place / f"{source}.npy" for source in ("books", "code")}
    if not all(file.exists() for file in files.values()):
        place.mkdir(parents=True, exist_ok=True)
        read = texts(books)
        tokenizer = train_tokenizer([text for part in read.values() for text in part])
        tokenizer.save_pretrained(place / "tokenizer")
        for source, part in read.items():
            # A single line break between two words is always a token of its own: pieces cut there give the same ids.
            pieces = [piece for text in part for piece in [*re.split(r"(?<=\S\n)(?=\S)", text), BOS]]
            ids = [np.array(i, np.uint16) for i in tokenizer(pieces, add_special_tokens=False)["input_ids"]]
            np.save(files[source], np.concatenate(ids))
        digest = {source: hashlib.sha256("\0".join(part).encode()).hexdigest() for source, part in read.items()}
        digest["python"] = platform.python_version()
        (place / "text.json").write_text(json.dumps(digest, indent=1))
    return {source: np.load(file) for source, file in files.items()}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet)
    made.train_from_iterator(documents, trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=BOS)


def batch(tokens: dict[str, np.ndarray], settings: argparse.Namespace, step: int) -> torch.Tensor:
    """Rows of BOS and consecutive tokens of one source."""
    random = np.random.default_rng((settings.seed, step))
    rows = []
    for is_code in random.random(settings.batch) < CODE:
        source = tokens["code" if is_code else "books"]
        start = int(random.integers(len(source) - settings.context))
        rows.append(np.concatenate([[0], source[start : start + settings.context - 1]]))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def build(settings: argparse.Namespace) -> GPT2LMHeadModel:
    """The model before training."""
    torch.manual_seed(settings.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=settings.context, n_embd=settings.width, n_layer=settings.layers,
            n_head=settings.heads, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            tie_word_embeddings=settings.tied, initializer_range=settings.width**-0.5, bos_token_id=0, eos_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip


def rate(settings: argparse.Namespace, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < settings.warm_up:
        return settings.lr * (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, steps - settings.warm_up)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Run:
    """A folder that a run can be taken up from."""

    def __init__(self, settings: argparse.Namespace):
        self.settings, self.place = settings, settings.out
        self.place.mkdir(parents=True, exist_ok=True)
        self.model = build(settings)
        matrices, others = [], []
        for name, p in self.model.named_parameters():
            (matrices if p.dim() == 2 and ".h." in name else others).append(p)
        decayed = {"lr": settings.lr, "weight_decay": settings.decay}
        # Muon's updates have equal singular values: under AdamW, MLP0 outgrows every head of its layer.
        first = (
            torch.optim.AdamW(matrices, betas=(0.9, 0.95), **decayed)
            if settings.adamw
            else torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decayed)
        )
        second = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = [first, second]
        self.record = {"settings": {k: v for k, v in vars(settings).items() if not isinstance(v, Path)}}
        self.record |= {"text": json.loads((settings.data / "text.json").read_text()), "torch": torch.__version__}
        self.record |= {"step": 0, "seconds": 0.0, "loss": []}
        if (self.place / "run.json").exists():
            found = json.loads((self.place / "run.json").read_text())
            same = {**found["settings"], "minutes": settings.minutes} == self.record["settings"]
            if not same or found["text"] != self.record["text"]:
                raise SystemExit(f"{self.place} holds a run of other settings or text: name another --out")
            self.record = {**found, "settings": self.record["settings"]}
            self.model.load_state_dict(load_file(self.place / "newest.safetensors"), strict=False)
            self._restore(load_file(self.place / "optimizer.safetensors"))

    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in kept.items():
                which, parameter, variable = name.split(".")
                if int(which) == k:
                    state.setdefault(int(parameter), {})[variable] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self) -> None:
        """Write everything beside, then put it in place: a cut leaves the older checkpoint."""
        moments = {
            f"{k}.{parameter}.{variable}": value
            for k, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for variable, value in state.items()
        }
        weights = {
            k: v.contiguous()
            for k, v in self.model.state_dict().items()
            if k != "lm_head.weight" or not self.settings.tied
        }
        for name, part in (("newest", weights), ("optimizer", moments)):
            save_file(part, self.place / f"{name}.tmp")
            (self.place / f"{name}.tmp").replace(self.place / f"{name}.safetensors")
        (self.place / "run.tmp").write_text(json.dumps(self.record))
        (self.place / "run.tmp").replace(self.place / "run.json")

    def export(self, place: Path) -> None:
        """A folder that `uw.load` reads: weights kept in float16, to be computed with in float32, and the tokenizer."""
        copy.deepcopy(self.model).half().save_pretrained(place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        tokenizer = self.settings.data / "tokenizer"
        own = PreTrainedTokenizerFast.from_pretrained(tokenizer, model_max_length=self.settings.context)
        own.save_pretrained(place)


def train(settings: argparse.Namespace) -> None:
    """Train until the tokens are used up, or the minutes, whichever comes first."""
    tokens = prepare(settings.books, settings.data)
    run = Run(settings)
    steps = int(settings.tokens / (settings.batch * settings.context))
    kept = {round(steps * part) for part in settings.keep}
    forward = torch.compile(run.model) if settings.compile else run.model
    begin = saved = time.monotonic()
    already, seen = run.record["seconds"], run.record["step"]
    for step in range(run.record["step"], steps):
        for group in [group for optimizer in run.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate(settings, step, steps)
        ids = batch(tokens, settings, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.half):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        run.record |= {"step": step + 1, "seconds": already + now - begin}
        if step % 50 == 0:
            run.record["loss"].append((step, round(float(loss.detach()), 4)))
            speed = (step + 1 - seen) * settings.batch * settings.context / (now - begin)
            print(f"step {step}/{steps} loss {float(loss.detach()):.3f} {speed:,.0f} tokens/s", flush=True)
        if step + 1 in kept:
            run.export(run.place / "steps" / str(step + 1))
        if now - saved > SAVE_EVERY:
            run.save()
            saved = now
        if settings.minutes and now - begin > 60 * settings.minutes:
            run.save()
            return
    run.save()
    run.export(run.place / "model")


def arguments() -> argparse.Namespace:
    """Settings of a run, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, help="folder of the token ids, by default beside the run")
    for name, default in (
        ("width", 128),
        ("layers", 4),
        ("heads", 8),
        ("context", 256),
        ("batch", 16),
        ("seed", 0),
        ("warm-up", 40),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 3e-3), ("decay", 0.1), ("tokens", 2e6), ("minutes", 0.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--adamw", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--half", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16; slow on some CPUs"
    )
    parser.add_argument("--keep", type=float, nargs="*", default=[], help="parts of the run whose weights are kept")
    settings = parser.parse_args()
    settings.data = settings.data or settings.out.parent / "tokens"
    return settings


if __name__ == "__main__":
    train(arguments())
