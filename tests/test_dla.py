"""Is every reading, the executed truth and its account what plain hooks on the user's own model find?"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
import unwrite as uw
from executed import Alone, exact, hooks, uncapped, weights
from unwrite.errors import NumericError, TokensError, UnwriteError
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.nodes import parse_node
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.report.views import words
from unwrite.result import Result
from unwrite.run.account import totals
from unwrite.run.account.readings import PARTS, READINGS
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.loop import stream
from unwrite.run.replay import removed
from unwrite.stats.fate import FATES, fates, input_blind

LENGTHS = np.array([6, 4, 7])
POSITION, ROWS = [-1, 2, 4], [5, 2, 4]
ANSWER, AGAINST = [5, 6, 7], [9, 3, 4]
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@cache
def model(family: str, convention: str = "paper") -> Model:
    return view(weights(family, 2, num_hidden_layers=2, num_attention_heads=2), convention=convention)


def tokens(lengths: np.ndarray = LENGTHS, seed: int = 0) -> Tokens:
    ids = np.random.default_rng(seed).integers(3, 50, (len(lengths), max(lengths)))
    return from_ids(ids, np.arange(max(lengths)) < lengths[:, None])


def alone(lm: Model, given: Tokens, prompt: int, row: int, answer: int = 0, against: int | None = None) -> Alone:
    ids = torch.from_numpy(given.ids[prompt, : given.lengths[prompt]])
    return Alone(uncapped(lm.hf), ids, row, answer, against, lm.convention == "raw")


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(
        np.asarray(got, dtype=float), np.asarray(want, dtype=float), rtol=tolerance, atol=tolerance
    )


# Against plain hooks, in every family


class Account:
    """What a result says of each prompt, and what is found for it when it is run alone."""

    def __init__(self, lm: Model, at: str, replace: str, given: Tokens | None = None, texts: Tokens | None = None):
        self.lm, self.at, self.replace, self.texts = lm, at, replace, texts
        self.given = tokens() if given is None else given
        self.result = uw.dla(lm, self.given, ANSWER, AGAINST, POSITION, at, replace, texts, batch=3)
        self.truth = [alone(lm, self.given, p, *ask) for p, ask in enumerate(zip(ROWS, ANSWER, AGAINST, strict=True))]
        pool = self.given if texts is None else texts
        self.pool = self.truth if texts is None else [alone(lm, pool, i, 1) for i in range(len(pool))]

    def change(self, prompt: int, node: str) -> Tensor:
        """The write less what stands in its place, by hand, at the rows that are replaced."""
        truth = self.truth[prompt]
        write, last = truth.writes[node], truth.row
        rows = torch.tensor([t == last or (self.at == "all" and t < last) for t in range(len(write))])
        return (write - self._instead(prompt, node, last, len(write))) * rows[:, None]

    def _instead(self, prompt: int, node: str, last: int, length: int) -> Tensor | float:
        if self.replace == "zero":
            return 0.0
        others = [one.writes[node] for one in self.pool]
        padded = [torch.cat([part, torch.zeros(length, part.shape[1])])[:length] for part in others]
        if self.replace == "mean":
            counts = torch.tensor([[len(part) > t for t in range(length)] for part in others]).sum(0)
            return sum(padded, torch.zeros_like(padded[0])) / counts.clamp_min(1)[:, None]
        n = len(others)
        turn = range(prompt + 1, prompt + n) if self.texts is None else range(prompt, prompt + n)
        return padded[next(i % n for i in turn if len(others[i % n]) > last)]

    def require(self) -> None:
        """The result is what is found by hand, for every prompt and node."""
        for prompt, truth in enumerate(self.truth):
            found = self.result.data.isel(prompt=prompt)
            close(found["logit_diff"], truth.measured)
            close(found["capped"], Alone(self.lm.hf, truth.ids, truth.row, truth.answer, truth.against).measured)
            close(found["constant"], truth.constant())
            close(found["unexplained"], 0)
            for node in self.lm.nodes:
                change = self.change(prompt, node)
                close(found["direct"].sel(node=node), truth.direct(change[truth.row]))
                close(found["total"].sel(node=node), truth.total(node, change))
            close(found["why"].sum("part"), found["total"])


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def account(request: pytest.FixtureRequest) -> Account:
    """Of every family; they take turns in what is asked."""
    turn = tiny.FAMILIES.index(request.param)
    lm = model(request.param, ("paper", "raw")[turn // 6 % 2])
    with exact():
        return Account(lm, ("all", "position")[turn % 2], ("zero", "mean", "resample")[turn % 3])


@pytest.mark.promise("executed")
def test_totals_and_direct_are_those_of_plain_hooks_on_the_users_model(account: Account) -> None:
    with exact():
        account.require()


@pytest.mark.promise("account")
def test_every_part_of_the_account_is_found_by_hand(account: Account) -> None:
    with exact():
        for prompt, node in enumerate(("embed", "L0H0", "MLP0")):
            want = account.truth[prompt].why(node, account.change(prompt, node))
            close(account.result["why"].sel(node=node, part=list(PARTS))[prompt], list(want.values()))


def test_readings_are_the_slopes_under_rules_times_the_change(account: Account) -> None:
    """The slopes themselves are held by test_rules.py."""
    lm = account.lm
    with exact():
        for name in READINGS:
            for prompt, truth in enumerate(account.truth):
                found = cotangents(lm, truth.ids[None], RULES[name], lambda y, t=truth: _logit_difference(lm, y, t))[1]
                for node in lm.nodes:
                    state = next(s for s in lm.states if s.holds(parse_node(node), lm.parallel))
                    want = float((found[state][0] * account.change(prompt, node)).sum())
                    close(account.result[name].sel(node=node)[prompt], want)


def _logit_difference(lm: Model, normed: Tensor, truth: Alone) -> Tensor:
    logits = lm.hf.get_output_embeddings()(normed[:, truth.row]) * truth._scale
    return logits[:, truth.answer] - logits[:, truth.against]


@pytest.mark.parametrize("replace", ["zero", "mean", "resample"])
@pytest.mark.parametrize("at", ["all", "position"])
def test_every_replacement_at_every_place(at: str, replace: str) -> None:
    with exact():
        Account(model("gemma2"), at, replace).require()


@pytest.mark.parametrize("replace", ["mean", "resample"])
def test_texts_take_the_place_of_the_prompts(replace: str) -> None:
    with exact():
        Account(model("llama"), "all", replace, texts=tokens(np.array([8, 9]), seed=5)).require()


@pytest.mark.promise("account")
@every_family
def test_without_help_the_parts_add_up_to_rounding(family: str) -> None:
    """As users run it, and in the other convention: families that compute in float32 inside have seven digits."""
    lm = model(family, ("raw", "paper")[tiny.FAMILIES.index(family) // 6 % 2])
    result = uw.dla(lm, tokens(), position=1, batch=3)
    limit = (1e-6 if lm.row.float32_inside else 1e-9) * (1 + np.abs(result["direct"]).sum("node"))
    added = result["direct"].sum("node") + result["constant"]
    assert (np.abs(added - result["logit_diff"]) <= limit).all()
    assert (np.abs(result["unexplained"]) <= limit).all()
    assert (np.abs(result["why"].sum("part") - result["total"]) <= limit).all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere", "gptj"])
def test_without_answers_the_two_highest_logits_are_asked_about(family: str) -> None:
    lm = model(family)
    result = uw.dla(lm, tokens(), position=POSITION, batch=3)
    for prompt, row in enumerate(ROWS):
        with torch.no_grad():
            logits = lm.hf(torch.from_numpy(tokens().ids[prompt : prompt + 1, : row + 1])).logits[0, -1]
        first, second = logits.topk(2).indices.tolist()
        assert (int(result["answer_id"][prompt]), int(result["against_id"][prompt])) == (first, second)
        close(result["capped"][prompt], float(logits[first] - logits[second]), 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite"])
def test_one_answer_alone_is_asked_about(family: str) -> None:
    lm = model(family)
    with exact():
        result = uw.dla(lm, tokens(), answer=5, position=POSITION, batch=3)
        for prompt, row in enumerate(ROWS):
            truth = alone(lm, tokens(), prompt, row, 5)
            close(result["logit_diff"][prompt], truth.measured)
            close(result["constant"][prompt], truth.constant())
            close(result["capped"][prompt], Alone(lm.hf, truth.ids, row, 5).measured)
    assert "against" not in result.data


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_the_caller_switched_them_off(mode: Callable[[], Any]) -> None:
    lm = model("llama")
    want = uw.dla(lm, tokens(), 5, batch=3)
    with mode():
        got = uw.dla(lm, tokens(), 5, batch=3)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    for name in READINGS:
        close(got[name], want[name])


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_answers_and_positions_may_be_arrays(kind: Callable[[Any], Any]) -> None:
    lm = model("gpt2")
    got, want = (uw.dla(lm, tokens(), each(ANSWER), each(AGAINST), each(POSITION), batch=3) for each in (kind, list))
    close(got["direct"], want["direct"])
    assert got["answer_id"].values.tolist() == ANSWER


def test_a_soft_cap_bends_the_logits_and_not_the_readings() -> None:
    lm = view(weights("gemma2", 2, num_hidden_layers=2, final_logit_softcapping=0.5))
    bare = view(uncapped(lm.hf))
    with exact():
        got, want = (uw.dla(each, tokens(), ANSWER, AGAINST, POSITION) for each in (lm, bare))
        logits = [alone(bare, tokens(), p, row).truth.logits()[0, row] for p, row in enumerate(ROWS)]
    for name in ("logit_diff", "direct", "total", "gradient", "constant"):
        close(got[name], want[name])
    for prompt, each in enumerate(logits):
        capped = 0.5 * torch.tanh(each / 0.5)
        close(got["capped"][prompt], float(capped[ANSWER[prompt]] - capped[AGAINST[prompt]]))
    assert (np.abs(got["capped"] - got["logit_diff"]) > 1e-3).any()


# Who has no replacement


def test_a_prompt_without_a_replacement_is_not_given_one() -> None:
    """Only prompt 2 reaches its last row: no mean, no donor, no other text; of the others everything is known."""
    lm = model("gpt2")
    for replace in ("mean", "resample"):
        result = uw.dla(lm, tokens(), position=[-1, -1, -1], replace=replace, at="position")
        for name in (*READINGS, "total"):
            assert np.isnan(result[name][2]).all()
            assert np.isfinite(result[name][:2]).all()
        assert (result["fate"][2] == "").all()
        assert (result["fate"][:2] != "").all()
        assert np.isnan(result["other_direct"][2]).all()
        assert not result["input_blind"][2].any()
    # Trust in the mean replacement is about the two prompts that have one.
    heads = result["trust_n"].sel(reading="direct", group="heads", form="pooled")
    assert heads.values.tolist() == [3 * 2 * lm.n_heads, 2 * 2 * lm.n_heads]


def test_the_next_prompt_that_reaches_the_row_is_the_donor() -> None:
    """Prompt 1 has four tokens: prompt 0's next donor for row 5 is prompt 2, and prompt 2's for row 3 is prompt 0."""
    lm, given = model("llama"), tokens()
    with exact():
        result = uw.dla(lm, given, 5, 9, position=[5, 3, 3], at="position", replace="resample")
        for prompt, donor, row in ((0, 2, 5), (1, 2, 3), (2, 0, 3)):
            truth, other = (alone(lm, given, i, row, 5, 9) for i in (prompt, donor))
            want = truth.direct(truth.writes["L0H0"][row] - other.writes["L0H0"][row])
            close(result["direct"].sel(node="L0H0")[prompt], want)


# Worked by hand


def by_hand() -> Model:
    """Two layers of one head, no MLP to speak of, d_model 4, RMSNorm without gain; queries and keys are 0.

    Token 0 is (2, 0, 0, 0), token 1 is (0, 2, 0, 0), both of rms 1. A head attends evenly: at row 1 half to each row.
    L0H0 writes 2√3 × (coordinate 1 of what it attends to) into coordinate 2; L1H0 −4 × coordinate 2 into coordinate 2.
    Logit 3 is coordinate 2 of the normed stream, all other logits are 0.
    """
    config = LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=8, rms_norm_eps=1e-30, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        hf.model.embed_tokens.weight[:2] = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
        hf.model.embed_tokens.weight[2:] = 1.0
        for layer, (read, gain) in zip(hf.model.layers, ((1, 2 * math.sqrt(3)), (2, -4.0)), strict=True):
            layer.self_attn.v_proj.weight[0, read] = gain
            layer.self_attn.o_proj.weight[2, 0] = 1.0
        hf.lm_head.weight[3, 2] = 1.0
    return view(hf)


@pytest.mark.promise("account")
def test_two_layers_worked_by_hand() -> None:
    """Row 1, the last: x = (0, 2, 0, 0), rms 1.

    L0H0 attends half to (1, 0, 0, 0) and half to (0, 1, 0, 0) · 2: it reads 1 and writes w = 2√3.
    Then x = (0, 2, 2√3, 0), of rms √((4 + 12)/4) = 2. Coordinate 2 of the normed stream is √3 here and 0 at row 0, so
    L1H0 reads √3/2 and writes −4 · √3/2 = −2√3 = −w. The end is (0, 2, 0, 0), of rms 1, and logit 3 is 0.

    direct   scale 1: w for L0H0, −w for L1H0, 0 for the embedding.
    L0H0     without it L1H0 reads 0 and writes 0; the logit is 0 again: total 0 = direct w + erased −w.
             net: w and what L1H0 writes because of it, −w: 0. Relp the same, as no query or key is moved.
             gradient: of x₂ − 2x₂/ρ with ρ² = (4 + x₂²)/4: 1 − 2/ρ + 2x₂²/(4ρ³) = 1 − 1 + 24/32 = 3/4, times w.
    L1H0     without it the end is (0, 2, w, 0) of rms 2: the logit is w/2. total −w/2 = direct −w + norm w/2.
    """
    w = 2 * math.sqrt(3)
    with exact():
        result = uw.dla(by_hand(), torch.tensor([[0, 1], [1, 1]]), 3, 4, at="position")
    first = result.data.isel(prompt=0)
    want: dict[str, dict[str, Any]] = {
        "L0H0": {"direct": w, "net": 0, "relp": 0, "gradient": 0.75 * w, "total": 0, "why": [w, -w, 0, 0]},
        "L1H0": {"direct": -w, "net": -w, "relp": -w, "total": -w / 2, "why": [-w, 0, 0, w / 2]},
        "embed": {"direct": 0, "total": 0},
        "MLP0": {"direct": 0, "net": 0, "relp": 0, "gradient": 0, "total": 0, "why": [0, 0, 0, 0]},
    }
    for node, numbers in want.items():
        for name, value in numbers.items():
            close(first[name].sel(node=node), value)
    close(first["logit_diff"], 0)
    words = {node: str(first["fate"].sel(node=node).item()) for node in want}
    assert words == {"L0H0": "erased", "L1H0": "norm", "embed": "negligible", "MLP0": "negligible"}


def test_row_by_row_and_everywhere_are_two_questions() -> None:
    """Prompt (1, 1): L0H0 writes at row 0 as well, and L1H0 reads both rows, so what is removed there matters too.

    Row 0: L0H0 reads 2 and writes 2w, so x = (0, 2, 2w, 0). Row 1 attends evenly to equal rows, so it is the same.
    L1H0 attends to two equal rows and reads r = 2w/ρ, ρ² = (4 + 4w²)/4 = 13; it writes −4r.
    Without L0H0 at row 1 it reads r/2 there: the end is (0, 2, −2r, 0). Without it at both rows it reads 0.
    """
    w = 2 * math.sqrt(3)
    r = 2 * w / math.sqrt(13)

    def logit(x: float) -> float:
        return x / math.sqrt((4 + x * x) / 4)

    with exact():
        for at, without in (("position", logit(-2 * r)), ("all", 0.0)):
            result = uw.dla(by_hand(), torch.tensor([[1, 1]]), 3, 4, at=at)
            close(result["total"].sel(node="L0H0"), [logit(2 * w - 4 * r) - without])


# Planted models


PROSE = "It was the best of times, it was the worst"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def told(request: pytest.FixtureRequest) -> Callable[[str], Result]:
    """What is said of a planted writer, asked about the two tokens that its write speaks most for and against."""
    truth = planted(request.param, dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    ids = torch.tensor(truth.tokenizer(PROSE)["input_ids"])
    probe = Alone(truth.hf, ids, len(ids) - 1, 0)

    def ask(node: str) -> Result:
        logits = probe.spoken(probe.writes[node][-1])
        return uw.dla(lm, PROSE, int(logits.argmax()), int(logits.argmin()), at="position")

    return ask


def test_fates_of_planted_writers(told: Callable[[str], Result]) -> None:
    expected = {"L0H0": "erased", "L0H1": "erased", "L0H2": "erased", "L0H3": "filled_in", "L0H5": "direct"}
    said = {}
    for node in expected:
        one = told(node).data.sel(node=node).isel(prompt=0)
        assert float(one["direct"]) > 0
        said[node] = str(one["fate"].item())
        if said[node] in ("erased", "filled_in"):
            assert abs(float(one["total"])) < 0.35 * float(one["direct"])
        else:
            assert float(one["total"]) == pytest.approx(float(one["direct"]), rel=0.2)
        if node == "L0H3":
            assert abs(float(one["why"].sel(part="erased"))) < 0.05 * float(one["direct"])
    assert said == expected


# Invariance


def patched(truth: Alone, other: Alone, row: int) -> dict[str, Tensor]:
    """What every head writes at the row when only this row of its attention's input comes from the other text.

    By plain hooks on the attention modules, a layer at a time; post-norms multiply as they did in the clean run.
    """
    found: dict[str, Tensor] = {}
    for layer, block in enumerate(truth.truth.blocks):
        attention = getattr(block, "attn", None) or getattr(block, "self_attn", None) or block.attention
        inputs: dict[str, Tensor] = {}

        def take(_: Any, args: Any, kwargs: Any, inputs: dict[str, Tensor] = inputs) -> None:
            inputs["other"] = (args[0] if args else kwargs["hidden_states"]).clone()

        def put(_: Any, args: Any, kwargs: Any, inputs: dict[str, Tensor] = inputs) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            x[0, row] = inputs["other"][0, row]
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        z: list[Tensor] = []
        for hook, ids in ((take, other.ids), (put, truth.ids)):
            handles = [
                attention.register_forward_pre_hook(hook, with_kwargs=True),
                truth.truth._out(block).register_forward_pre_hook(lambda _, args, z=z: z.append(args[0][0, row])),
            ]
            with torch.no_grad():
                truth.hf(input_ids=ids[None], use_cache=False)
            for handle in handles:
                handle.remove()
        found |= _heads(truth, layer, z[1], row)
    return found


def _heads(truth: Alone, layer: int, z: Tensor, row: int) -> dict[str, Tensor]:
    """Writes of a layer's heads of one row's z: W_O as it is, what a post-norm multiplied by, less what is constant."""
    block, heads = truth.truth.blocks[layer], truth.hf.config.num_attention_heads
    out = truth.truth._out(block)
    weight = out.weight.detach() if type(out).__name__ == "Conv1D" else out.weight.detach().t()
    gain: Any = 1.0
    if truth.truth._post_norm:
        gain = (truth.truth._clean["after", layer] / truth.truth._clean["before", layer])[0, row]
    constant = torch.zeros(heads, weight.shape[1]) if truth.raw else truth.truth._constants(layer)[:, 0, row]
    parts = z.unflatten(0, (heads, -1)), weight.unflatten(0, (heads, -1))
    return {
        f"L{layer}H{head}": parts[0][head] @ parts[1][head] * gain - constant[head] for head in range(heads)
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_invariance_is_what_patched_runs_say(family: str) -> None:
    """Quartiles over the other prompts that reach the row, never over the prompt itself."""
    lm, given = model(family), tokens(np.array([6, 5, 7, 6, 4]))
    with exact():
        result = uw.dla(lm, given, 5, 9, position=[4, 3, 4, 3, 3], batch=5)
        for prompt, row, others in ((0, 4, (1, 2, 3)), (1, 3, (0, 2, 3, 4))):
            truth = alone(lm, given, prompt, row, 5, 9)
            texts = [alone(lm, given, other, row) for other in others]
            swapped = [patched(truth, text, row) for text in texts]
            for node in lm.nodes:
                context = [truth.direct(text.writes[node][row]) for text in texts]
                # An MLP or an embedding reads one row; a bias reads nothing, but a post-norm may scale it.
                query = [truth.direct(part[node]) for part in swapped] if "H" in node else context
                found = result["other_direct"].sel(node=node).isel(prompt=prompt)
                if not node.endswith("bias"):
                    close(found.sel(replaced="query"), np.quantile(query, [0.25, 0.5, 0.75]))
                close(found.sel(replaced="context"), np.quantile(context, [0.25, 0.5, 0.75]))
                if not node.endswith("bias"):
                    ratio = np.median(query) / truth.direct(truth.writes[node][row])
                    close(result["invariance"].sel(node=node, replaced="query")[prompt], ratio)


def test_invariance_over_given_texts_leaves_the_prompts_out() -> None:
    lm, given, texts = model("llama"), tokens(), tokens(np.array([8, 9, 8]), seed=5)
    with exact():
        result = uw.dla(lm, given, 5, 9, position=POSITION, texts=texts)
        truth = alone(lm, given, 0, 5, 5, 9)
        for node in ("L1H0", "MLP1"):
            context = [truth.direct(alone(lm, texts, i, 5).writes[node][5]) for i in range(3)]
            found = result["other_direct"].sel(node=node, replaced="context")[0]
            close(found, np.quantile(context, [0.25, 0.5, 0.75]))


def test_fewer_than_two_other_texts_say_nothing() -> None:
    lm = model("llama")
    for some, nan in ((tokens(np.array([5])), True), (tokens(np.array([5, 5])), True), (tokens(), False)):
        result = uw.dla(lm, some, position=1)
        assert np.isnan(result["other_direct"]).all() == nan
        assert np.isnan(result["invariance"]).all() == nan
        assert ("fewer than two" in result.data.attrs["invariance_note"]) == nan
        assert not (nan and result["input_blind"].any())


def test_a_head_that_reads_positions_only_is_blind_to_its_input() -> None:
    """Tokens and positions have own halves of the stream, and all codes one length, so LayerNorms scale alike."""
    hf = weights("gpt2", 0, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, tie_word_embeddings=False)
    signs = torch.tensor([[1 - 2 * (n >> bit & 1) for bit in range(4)] for n in range(16)], dtype=torch.float64)
    codes = torch.cat([signs, -signs], 1)  # of mean 0, all of one length, 16 of them
    with torch.no_grad():
        hf.transformer.wte.weight[:] = torch.cat([codes, 0 * codes], 1).repeat(5, 1)[: hf.config.vocab_size]
        hf.transformer.wpe.weight[:] = torch.cat([0 * codes, codes], 1).repeat(4, 1)[: hf.config.n_positions]
        hf.transformer.h[0].ln_1.weight.fill_(1.0)
        # Of q, k and v each, the first 8 columns are head 0.
        for start in (0, 16, 32):
            hf.transformer.h[0].attn.c_attn.weight[:8, start : start + 8] = 0
            hf.transformer.h[0].attn.c_attn.weight[8:, start + 8 : start + 16] = 0
    result = uw.dla(view(hf), tokens(np.full(6, 9)), 5, 9)
    blind = result["input_blind"].sel(node=["L0H0", "L0H1", "pos_embed", "embed"]).values
    assert blind[:, [0, 2]].all()
    assert not blind[:, [1, 3]].all(0).any()
    close(result["invariance"].sel(node="L0H0"), np.ones((6, 2)))


def test_blind_needs_both_replacements_and_half_of_the_texts() -> None:
    quartiles = np.array([
        [[0.9, 1.0, 1.2], [0.76, 1.0, 1.24]],  # both stay within a quarter
        [[0.9, 1.0, 1.2], [0.9, 1.0, 1.26]],  # the context does not
        [[0.74, 1.0, 1.2], [0.9, 1.0, 1.2]],  # the query does not
        [[-1.2, -1.0, -0.9], [-1.2, -1.0, -0.9]],  # of the other sign
        [[np.nan] * 3, [np.nan] * 3],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # says nothing about a write that does nothing
    ])  # fmt: skip
    direct = np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert input_blind(direct, quartiles.swapaxes(0, 1)[None]).tolist() == [[True, False, False, False, False, False]]


# Words


WORDS = {
    # direct, erased, filled_in, norm
    "negligible": [(0.4, 0.0, 0.0, 0.0), (-0.3, 0.2, 0.0, 0.0)],
    "direct": [(2.0, 0.0, 0.0, 0.0), (2.0, -0.4, 0.0, 0.0), (-2.0, 0.0, 0.4, 0.0), (2.0, 0.3, 0.0, 0.1)],
    "indirect": [(0.1, 0.0, 4.0, 0.0), (-0.2, 0.0, 1.5, 0.0), (0.0, 1.0, 0.0, 0.0)],
    "reversed": [(2.0, -3.0, 0.0, 0.0), (-2.0, 0.0, 2.9, 0.0)],
    "erased": [(2.0, -1.9, 0.0, 0.0), (-2.0, 1.9, 0.0, 0.1), (2.0, -2.2, 0.4, 0.0), (2.0, -0.6, -0.5, 0.0)],
    "filled_in": [(2.0, 0.0, -1.9, 0.0), (-2.0, 0.0, 1.6, 0.3), (2.0, -0.4, -0.5, 0.0)],
    "norm": [(2.0, 0.0, 0.0, -1.8), (-2.0, 0.2, 0.0, 1.0)],
    "mixed": [(2.0, 1.0, 1.0, 0.0), (2.0, -0.6, -0.6, -0.6), (-2.0, 0.5, 0.5, 0.5)],
}


@pytest.mark.parametrize("word", FATES)
def test_every_fate_is_reached_from_its_account(word: str) -> None:
    accounts = WORDS[word]
    why = np.array([*accounts, (10.0, 0.0, 0.0, 0.0)])[None]  # beside the largest of the prompt
    said = fates(why, why.sum(-1), "position")[0]
    assert said.tolist() == [word] * len(accounts) + ["direct"]
    assert (fates(why, why.sum(-1), "all") == "").all()


def test_a_fate_is_the_same_in_other_units_and_of_the_other_sign() -> None:
    why = np.array([account for accounts in WORDS.values() for account in accounts] + [(10.0, 0.0, 0.0, 0.0)])[None]
    said = fates(why, why.sum(-1), "position")
    for factor in (1e-6, -1.0, 1e6):
        assert (fates(factor * why, factor * why.sum(-1), "position") == said).all()


# Trust, and what a result says about itself


@pytest.mark.promise("estimates")
def test_trust_is_that_of_the_results_own_cells() -> None:
    lm = view(weights("gpt2", 2, num_hidden_layers=3, num_attention_heads=2))
    given = tokens(np.array([6, 5, 7, 6, 5]))
    heads, mlps = [[f"L{i}H{j}" for j in (0, 1)] for i in range(3)], [f"MLP{i}" for i in range(3)]
    names = {
        "heads": heads[0] + heads[1] + heads[2], "mlps": mlps, "heads before the last layer": heads[0] + heads[1],
        "mlps before the last layer": mlps[:2], "L0.heads": heads[0], "L1.heads": heads[1], "L2.heads": heads[2],
    }  # fmt: skip
    for replacement in ("zero", "mean"):
        result = uw.dla(lm, given, 5, 9, position=3, replace=replacement, batch=5).data
        assert set(result["group"].values) == set(names)
        for group, kept in names.items():
            for reading in READINGS:
                x, y = (result[name].sel(node=kept).values.ravel() for name in (reading, "total"))
                found = result.sel(group=group, reading=reading, form="pooled", replacement=replacement)
                close(found["trust"], stats.pearsonr(x, y).statistic)
                close(found["trust_slope"], stats.linregress(x, y).slope)
                assert int(found["trust_n"]) == 5 * len(kept)


def test_a_result_says_what_was_asked() -> None:
    result = uw.dla(reader(), ["abcd", "xyz"], "q", ["r", "s"], position=[2, -2])
    assert result["prompt_text"].values.tolist() == ["abc", "xy"]
    assert result["row"].values.tolist() == [2, 1]
    assert result["answer"].values.tolist() == ["q", "q"]
    assert result["against"].values.tolist() == ["r", "s"]
    said = result.provenance["settings"]
    assert said["position"] == [2, 1]
    assert (said["at"], said["replace"], said["texts"]) == ("all", "zero", None)


# Batches


@pytest.mark.promise("batches")
@drawn_from(data=st.data())
@settings(max_examples=6)
def test_results_do_not_depend_on_the_batch(data: st.DataObject) -> None:
    lm = model(data.draw(st.sampled_from(tiny.FAMILIES)))
    lengths = np.array(data.draw(st.lists(st.integers(2, 8), min_size=2, max_size=5)))
    given, at = tokens(lengths, seed=3), data.draw(st.sampled_from(["all", "position"]))
    position = [data.draw(st.integers(-n, n - 1)) for n in lengths.tolist()]
    replace, batch = data.draw(st.sampled_from(["zero", "mean", "resample"])), data.draw(st.integers(1, len(lengths)))
    with exact():
        one, other = (
            uw.dla(lm, given, 5, None, position, at, replace, batch=size).data for size in (batch, len(lengths))
        )
    for name in one:
        if one[name].dtype.kind == "f" and "trust" not in name and name != "invariance":
            np.testing.assert_allclose(one[name], other[name], rtol=1e-10, atol=1e-10)
    assert (one["prompt_text"] == other["prompt_text"]).all()


def test_a_listener_hears_of_every_batch_and_a_result_can_be_saved(tmp_path: Path) -> None:
    heard: list[Any] = []
    result = uw.dla(model("gpt2"), tokens(), position=1, at="position", batch=2, listener=heard.append)
    assert [(part.done, part.total) for part in heard] == [(2, 3), (3, 3)]
    again = uw.read(result.save(tmp_path))
    for name in result.data:
        assert (again[name].values == result[name].values).all() or np.isnan(result[name].values.astype(float)).any()
    assert len(result.table()) == 3 * len(model("gpt2").nodes)


# What is executed, and what is not


def passes_of(lm: Model, ask: Callable[[], Any]) -> tuple[int, int]:
    """How often the whole decoder is called, and how often its last block."""
    calls: list[int] = []
    passes: list[int] = []
    handles = [
        lm.layers[-1].block.register_forward_hook(lambda *_: calls.append(1)),
        lm.decoder.register_forward_hook(lambda *_: passes.append(1)),
    ]
    with hooks(*handles):
        ask()
    return len(passes), len(calls)


@pytest.mark.parametrize("replace", ["zero", "mean"])
def test_readings_alone_are_five_passes_and_the_same_numbers(replace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the check that every method begins with, which reads one prompt."""
    monkeypatch.setattr(stream, "_require_same", lambda *_: None)
    lm, found = model("llama"), []
    ask = partial(uw.dla, lm, tokens(), ANSWER, AGAINST, POSITION, "all", replace)
    passes = passes_of(lm, lambda: found.append(ask(total=False)))
    # One clean run, and one with a backward pass for each reading; a mean is taken over one more.
    assert passes == (5 + (replace == "mean"),) * 2
    whole = ask()
    assert set(found[0].data) < set(whole.data)
    for name in found[0].data:
        assert (found[0][name].values == whole[name].values).all(), name
    assert not {"total", "why", "fate", "trust", "invariance", "input_blind"} & set(found[0].data)
    assert "correlates" not in words(found[0])


def test_runs_go_up_together_and_nodes_that_change_nothing_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = model("llama"), []
    real = totals.changed

    def changed(run: Any, calls: Any, runs: Any, *rest: Any) -> Tensor:
        seen.append(runs)
        return real(run, calls, runs, *rest)

    monkeypatch.setattr(totals, "changed", changed)
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7], [3, 4, 5, 8]])
    whole = uw.dla(lm, ids, 5, 9, replace="mean")
    # Of the mean only the last row differs, since all prompts read the same before.
    assert [runs.change.shape[1] for runs in seen] == [4, 1]
    assert [len(runs.node) for runs in seen] == [3 * len(lm.nodes)] * 2
    same = uw.dla(lm, ids[:1].repeat(3, 1), 5, 9, replace="mean")
    assert [runs.change.shape[1] for runs in seen[2:]] == [4]
    assert (same["total"] == 0).all()
    assert (same["why"] == 0).all()
    monkeypatch.setattr(removed, "_CACHED", 12)
    close(uw.dla(lm, ids, 5, 9, replace="mean")["total"], whole["total"])
    assert max(len(runs.node) * runs.change.shape[1] for runs in seen[3:]) == 12


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("at", ["all", "position"])
def test_an_interrupt_is_obeyed_inside_a_batch_and_what_was_done_lasts(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, real, ran = model("gemma2"), totals.changed, []
    monkeypatch.setattr(removed, "_CACHED", 24)
    monkeypatch.setattr(stream, "_BETWEEN", 0.0)
    heard: list[Any] = []
    ask = partial(uw.dla, lm, tokens(), 5, 9, at=at)
    whole = ask(listener=heard.append)
    shares = [step.begun for step in heard if step.doing]
    assert shares == sorted(shares)
    assert shares[-1] == 3.0
    assert heard[-2].doing == f"{len(lm.nodes)}/{len(lm.nodes)} nodes"

    def changed(*asked: Any) -> Tensor:
        ran.append(1)
        if len(ran) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*asked)

    monkeypatch.setattr(totals, "changed", changed)
    # Whoever is begun in the background may ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        ask(checkpoint=tmp_path)
    signal.signal(signal.SIGINT, before)
    # It ends at the next block, not at the end of the batch, and two chunks are kept.
    assert len(ran) == 3
    again = ask(checkpoint=tmp_path)
    for name in whole.data:
        got, want = again[name].values, whole[name].values
        assert np.array_equal(got, want, equal_nan=got.dtype.kind == "f"), name
    # Two chunks were done and one was begun anew.
    counted = len(ran)
    ask()
    assert len(ran) - counted == counted - 1


# Refusals


@cache
def reader() -> Model:
    truth = planted("gpt2")
    return view(truth.hf, truth.tokenizer)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two tokens": (lambda: uw.dla(reader(), "abc", "xy"), r"'xy' is not one token\. Got: 'x' \(\d+\), 'y' \(\d+\)"),
    "against two tokens": (lambda: uw.dla(reader(), "abc", "x", "yz"), r"'yz' is not one token.*'y'.*'z'"),
    "no token": (lambda: uw.dla(reader(), "abc", ""), r"'' is not one token\. Got: none"),
    "id too high": (lambda: uw.dla(reader(), "abc", 256), "not a token. Got: 256.*0 to 255"),
    "id below zero": (lambda: uw.dla(reader(), "abc", -1), "not a token"),
    "truth value": (lambda: uw.dla(reader(), "abc", True), "not a token. Got: True"),
    "the same token": (lambda: uw.dla(reader(), "abc", "x", "x"), "answer and against are the same token"),
    "the same for one": (lambda: uw.dla(reader(), ["abc", "abd"], [1, 2], [3, 2]), "the same token. Got: 2"),
    "against alone": (lambda: uw.dla(reader(), "abc", None, "x"), "against needs an answer"),
    "answers for others": (lambda: uw.dla(reader(), ["abc", "abd"], [1, 2, 3]), "Got: 3 tokens. Expected: 1 or 2"),
    "no answers": (lambda: uw.dla(reader(), ["abc", "abd"], []), "Got: 0 tokens"),
    "one token": (lambda: uw.dla(reader(), ["abc", "a"]), "prompt 1 is one token long"),
    "after the end": (lambda: uw.dla(reader(), "abc", position=3), "prompt 0 has no such position. Got: 3.*−3 to 2"),
    "before the start": (lambda: uw.dla(reader(), "abc", position=-4), "no such position. Got: -4"),
    "in one of them": (lambda: uw.dla(reader(), ["abc", "ab"], position=[2, 2]), "prompt 1 has no such position"),
    "too many positions": (lambda: uw.dla(reader(), "abc", position=[1, 2]), "position is a row of each prompt"),
    "uneven positions": (lambda: uw.dla(reader(), "abc", position=[[1], [1, 2]]), "position is a row"),
    "a fraction": (lambda: uw.dla(reader(), "abc", position=0.5), "position is a row of each prompt"),
    "no position": (lambda: uw.dla(reader(), "abc", position=None), "position is a row of each prompt"),
    "at": (lambda: uw.dla(reader(), "abc", at="here"), "at is unknown. Got: 'here'.*'all' or 'position'"),
    "replace": (lambda: uw.dla(reader(), "abc", replace="noise"), "replace is unknown.*'zero', 'mean', 'resample'"),
    "no others": (lambda: uw.dla(reader(), "abc", replace="mean"), "replace='mean' needs other texts"),
    "no donor": (lambda: uw.dla(reader(), "abc", replace="resample"), "replace='resample' needs other texts"),
    "short texts": (lambda: uw.dla(reader(), "abcdef", texts=tokens()), "texts are shorter.*4 tokens.*at least 6"),
    "texts no tokens": (lambda: uw.dla(reader(), "abc", texts=3.5), "matrix of integers"),
    "no prompts": (lambda: uw.dla(reader(), []), "the prompt is empty"),
    "empty prompt": (lambda: uw.dla(reader(), ""), "the prompt is empty"),
    "one empty prompt": (lambda: uw.dla(reader(), ["abc", ""]), "prompt 1 has no token"),
    "no tokenizer": (lambda: uw.dla(model("gpt2"), "abc"), "came without one. Next: pass token ids"),
    "no tokenizer for a token": (lambda: uw.dla(model("gpt2"), tokens(), "x"), "pass its id"),
    "ids of another model": (lambda: uw.dla(model("gpt2"), torch.tensor([[1, 2000]])), "outside the model's vocab"),
    "no prompts at all": (lambda: uw.dla(reader(), None), "matrix of integers"),
    "batch": (lambda: uw.dla(reader(), "abc", batch=0), "batch is a number of prompts"),
    "masked strings": (lambda: uw.dla(reader(), "abc", mask=torch.ones(1, 3)), "this is text. Next: leave mask out"),
}  # fmt: skip


@pytest.mark.promise("tokens")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_words(case: str) -> None:
    ask, message = REFUSED[case]
    with pytest.raises(UnwriteError, match=message):
        ask()


@pytest.mark.promise("finite")
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (3, "the logits of prompt 2 are not finite"),
        (2, "what a mean is taken over is not finite at prompt 2, position 1"),
    ],
)
def test_what_is_not_finite_is_named(batch: int, said: str) -> None:
    hf = weights("llama", 7, tie_word_embeddings=False)
    with torch.no_grad():
        hf.model.embed_tokens.weight[2] = float("nan")
    ids = torch.ones(3, 5, dtype=torch.long)
    ids[2, 1] = 2
    with pytest.raises(NumericError, match=rf"{said}.*float32"):
        uw.dla(view(hf), ids, batch=batch)


def test_refusals_are_of_their_kind() -> None:
    with pytest.raises(TokensError):
        uw.dla(reader(), "abc", "xy")
    with pytest.raises(NumericError):
        uw.dla(reader(), "abc", at="here")


# On a trained model


def test_readings_on_stories260k_are_believed_as_measured(shared: Path) -> None:
    """20 windows of 96 tokens, from a text that was tokenised in one go."""
    lm = uw.load(shared / "models" / "stories260K", dtype=torch.float64)
    text = (shared / "corpus" / "tinystories.txt").read_text(encoding="utf-8")
    ids = lm.tokenizer(text, verbose=False)["input_ids"][:1920]
    result = uw.dla(lm, torch.tensor(ids).view(20, 96), at="position")
    heads = result.data.sel(group="heads", form="pooled", replacement="zero")
    for reading, want in (("direct", 0.44), ("relp", 0.66), ("gradient", 0.98)):
        assert float(heads["trust"].sel(reading=reading)) == pytest.approx(want, abs=0.005)
    kept = [node for node in lm.nodes if "H" in node]
    x, y = (result[name].sel(node=kept).values for name in ("direct", "total"))
    z = [np.arctanh(np.corrcoef(*(np.delete(part, i, 0).ravel() for part in (x, y)))[0, 1]) for i in range(20)]
    each = 20 * np.arctanh(np.corrcoef(x.ravel(), y.ravel())[0, 1]) - 19 * np.array(z)
    low, high = np.tanh(stats.t.interval(0.95, 19, each.mean(), stats.sem(each)))
    direct = heads.sel(reading="direct")
    close([direct["trust_low"], direct["trust_high"]], [low, high])
