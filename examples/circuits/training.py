"""How does one train, in minutes on a CPU, a small model for one task, and keep what it was before it could?

A course says in which words, of which batches and in what shape; `toy.py` and `choice.py` are two. Of a run in OUT,
OUT/young is the model when it first gave every second answer, OUT/model the same run at its end. Batch k depends on the
seed and k alone; a cut run goes on to the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SAVE_EVERY, LOOK_EVERY = 100, 5
YOUNG = 0.5  # of the answers
# Ids [row, position], and the positions of the answers.
Asked = tuple[torch.Tensor, list[int]]


@dataclass(frozen=True)
class Course:
    """What is learned: words, of which the first stands for all others, and what of a text is `skipped`.

    `shape` is what a model of so many words is, `drawn` gives the batch of a seed and step, `looked` what it is judged
    by on the way, which is not trained on.
    """

    words: tuple[str, ...]
    skipped: str
    shape: Callable[[int], PretrainedConfig]
    drawn: Callable[[int, int], Asked]
    looked: Callable[[int], Asked]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token for each word and mark, and none for what is skipped."""
        unknown = self.words[0]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.words)}, unk_token=unknown))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(self.skipped), "removed"), pre_tokenizers.Punctuation()]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown)

    def build(self, seed: int) -> PreTrainedModel:
        """The model before training."""
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.shape(len(self.words)))


def llama(words: int) -> LlamaConfig:
    """Three layers of four heads."""
    return LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def said(model: PreTrainedModel, ids: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """Logits [row, answer, word] where answers are to be given."""
    hidden = model.base_model(ids[:, :-1]).last_hidden_state
    return model.get_output_embeddings()(hidden[:, [place - 1 for place in answers]])


@torch.no_grad()
def solved(model: PreTrainedModel, asked: Asked) -> float:
    """Part of the first answers that it gives."""
    ids, answers = asked
    return float((said(model, ids, answers)[:, 0].argmax(-1) == ids[:, answers[0]]).float().mean())


def rate(step: int, steps: int, lr: float) -> float:
    """Up over the first three tenths, then down to nothing, by cosines."""
    warm = 0.3 * steps
    way = step / warm if step < warm else 1 + (step - warm) / (steps - warm)
    return lr * max(0.5 * (1 - math.cos(math.pi * way)), 1e-3)


class Run:
    """A folder that a run can be taken up from."""

    def __init__(self, course: Course, settings: argparse.Namespace):
        self.course, self.settings, self.place = course, settings, settings.out
        self.model = course.build(settings.seed)
        inner, outer = [], []
        for name, p in self.model.named_parameters():
            (inner if p.dim() == 2 and re.search(r"\.(layers|h)\.", name) else outer).append(p)
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
        self.course.tokenizer().save_pretrained(self.place / name)

    def step(self) -> float:
        """One step; the loss before it."""
        step, settings = self.record["step"], self.settings
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step, settings.steps, settings.lr)
        ids, answers = self.course.drawn(settings.seed, step)
        logits = said(self.model, ids, answers)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, answers].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def train(course: Course, settings: argparse.Namespace) -> Run:
    """All steps; `young` is written once, when so many answers are right."""
    torch.set_num_threads(1)  # sums of several threads round by how many there are
    run = Run(course, settings)
    record, began, before = run.record, time.process_time(), run.record["seconds"]
    while record["step"] < settings.steps:
        loss = run.step()
        record["step"] += 1
        if record["step"] % LOOK_EVERY == 0:
            part = solved(run.model, course.looked(settings.seed))
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


def arguments(doc: str | None, steps: int) -> argparse.Namespace:
    """Settings of a run, from the command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    for name, default in (("seed", 0), ("steps", steps)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()
