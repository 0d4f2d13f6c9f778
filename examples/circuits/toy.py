"""How does one train, in minutes on a CPU, a model that tracks entities, and keep what it was before it could?

    python examples/circuits/toy.py --out TOY [--seed 0 --steps 800]

A Llama of three layers reads `uw.tasks.boxes` in the words that carry something: its tokenizer skips "the", "is",
"in", "Box" and commas, so that "The pen is in Box C, … . Box C contains the" is "pen C … . C contains". It is trained
on scenes of four boxes with eight questions each, drawn with replacement and of three kinds: where a thing is ("pen" →
"C"), what is in a box ("C" → "pen"), and what a box contains ("C contains" → "pen"); of the last kind alone it stays
at chance for far longer. TOY/young is the model when it first named every second thing, TOY/model the same run at its
end. Batch k depends on the seed and k alone; a cut run goes on to the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN = "?"
THINGS = ["pen", "cup", "book", "ball", "key", "phone", "hat", "bag", "ring", "plate"]
LETTERS = [*"ABCDEFGHKL"]
WORDS = [UNKNOWN, ".", "contains", *THINGS, *LETTERS]
SKIPPED = r"\b([Tt]he|is|in|Box)\b|[,\s]+"
BOXES, QUESTIONS, BATCH = 4, 8, 64
WHERE, WHAT, CONTAINS = range(3)
SAVE_EVERY, LOOK_EVERY, LOOKED_AT = 100, 5, 256
YOUNG = 0.5  # of the answers


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each thing, letter and full stop, and for "contains"; none for the other words of a scene."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SKIPPED), "removed"), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN)


def batch(random: np.random.Generator, n: int, kinds: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """Ids [row, position] of scenes with questions of these kinds, and the positions of the answers."""

    def some(words: list[str]) -> np.ndarray:
        return random.permuted(np.tile(np.arange(len(words)), (n, 1)), axis=1)[:, :BOXES] + WORDS.index(words[0])

    things, letters, row = some(THINGS), some(LETTERS), np.arange(n)
    stop, contains = (np.full(n, WORDS.index(word)) for word in (".", "contains"))
    columns = [part[:, i] for i in range(BOXES) for part in (things, letters)]
    answers = []
    for kind, asked in zip(kinds, random.integers(BOXES, size=(len(kinds), n)), strict=True):
        thing, letter = things[row, asked], letters[row, asked]
        columns += {WHERE: [stop, thing, letter], WHAT: [stop, letter, thing],
                    CONTAINS: [stop, letter, contains, thing]}[int(kind)]  # fmt: skip
        answers.append(len(columns) - 1)
    return torch.from_numpy(np.stack(columns, 1)), answers


def drawn(seed: int, step: int) -> tuple[torch.Tensor, list[int]]:
    """The batch of a step."""
    random = np.random.default_rng((seed, step))
    return batch(random, BATCH, random.integers(3, size=QUESTIONS))


def said(model: LlamaForCausalLM, ids: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """Logits [row, answer, word] where answers are to be given."""
    hidden = model.model(ids[:, :-1]).last_hidden_state
    return model.lm_head(hidden[:, [place - 1 for place in answers]])


@torch.no_grad()
def solved(model: LlamaForCausalLM, seed: int) -> float:
    """Part of the scenes, none of which is trained on, in which it says what a box contains."""
    ids, answers = batch(np.random.default_rng((seed, 2**32)), LOOKED_AT, np.array([CONTAINS]))
    return float((said(model, ids, answers)[:, 0].argmax(-1) == ids[:, answers[0]]).float().mean())


def build(seed: int) -> LlamaForCausalLM:
    """The model before training."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def rate(step: int, steps: int, lr: float) -> float:
    """Up over the first three tenths, then down to nothing, by cosines."""
    warm = 0.3 * steps
    way = step / warm if step < warm else 1 + (step - warm) / (steps - warm)
    return lr * max(0.5 * (1 - math.cos(math.pi * way)), 1e-3)


class Run:
    """A folder that a run can be taken up from."""

    def __init__(self, settings: argparse.Namespace):
        self.settings, self.place, self.model = settings, settings.out, build(settings.seed)
        inner = [p for name, p in self.model.named_parameters() if p.dim() == 2 and ".layers." in name]
        outer = [p for name, p in self.model.named_parameters() if p.dim() != 2 or ".layers." not in name]
        # Muon is through the plateau, on which all words of a scene are as likely, in half of AdamW's steps.
        self.optimizers = [
            torch.optim.Muon(inner, lr=settings.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=settings.lr, weight_decay=0.0),
        ]
        asked = {"seed": settings.seed, "steps": settings.steps, "lr": settings.lr}
        self.record = {"settings": asked, "torch": torch.__version__, "step": 0, "young": None, "seconds": 0.0}
        self.record |= {"loss": [], "solved": []}
        if (self.place / "run.json").exists():
            found = json.loads((self.place / "run.json").read_text("utf-8"))
            if found["settings"] != asked:
                raise SystemExit(f"{self.place} holds a run of other settings: name another --out")
            self.record = found
            self._restore(load_file(self.place / "newest.safetensors"))

    def _state(self) -> dict[str, torch.Tensor]:
        moments = {
            f"{k}.{parameter}.{name}": value
            for k, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return {f"model.{name}": part for name, part in self.model.state_dict().items()} | moments

    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        weights = {name.removeprefix("model."): part for name, part in kept.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, part in kept.items():
                if name.startswith(f"{k}."):
                    _, parameter, what = name.split(".")
                    state.setdefault(int(parameter), {})[what] = part
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self) -> None:
        """Write beside, then put in place: a cut leaves the older one."""
        self.place.mkdir(parents=True, exist_ok=True)
        save_file(self._state(), self.place / "newest.tmp")
        (self.place / "run.tmp").write_text(json.dumps(self.record), encoding="utf-8")
        (self.place / "newest.tmp").replace(self.place / "newest.safetensors")
        (self.place / "run.tmp").replace(self.place / "run.json")

    def export(self, name: str) -> None:
        """A folder that `uw.load` reads."""
        self.model.save_pretrained(self.place / name)
        tokenizer().save_pretrained(self.place / name)

    def step(self) -> float:
        """One step; the loss before it."""
        step, settings = self.record["step"], self.settings
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step, settings.steps, settings.lr)
        ids, answers = drawn(settings.seed, step)
        logits = said(self.model, ids, answers)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, answers].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def train(settings: argparse.Namespace) -> Run:
    """All steps; `young` is written once, when so many answers are right."""
    torch.set_num_threads(1)  # sums of several threads round by how many there are
    run = Run(settings)
    record, began, before = run.record, time.process_time(), run.record["seconds"]
    while record["step"] < settings.steps:
        loss = run.step()
        record["step"] += 1
        if record["step"] % LOOK_EVERY == 0:
            part = solved(run.model, settings.seed)
            if part >= YOUNG and record["young"] is None:
                record["young"] = record["step"]
                run.export("young")
            if record["step"] % 50 == 0:
                record["loss"].append((record["step"], round(loss, 4)))
                record["solved"].append((record["step"], round(part, 4)))
                print(f"step {record['step']}/{settings.steps} loss {loss:.3f} solved {part:.2f}", flush=True)
        record["seconds"] = before + time.process_time() - began
        if record["step"] % SAVE_EVERY == 0:
            run.save()
    run.save()
    run.export("model")
    return run


def arguments() -> argparse.Namespace:
    """Settings of a run, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    for name, default in (("seed", 0), ("steps", 800)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
