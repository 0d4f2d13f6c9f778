"""Does a model that is spread over devices and disk give the very numbers of the same model loaded whole?

The oracle is the model loaded whole, and equal means bit for bit: what is brought in is what lies in the file, and it
goes through the same operations in the same order. Devices that this machine does not have are those of elsewhere.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import tiny
import unwrite as uw
from methods import IDS, METHODS, SHAPES, VARIANTS, few_draws
from unwrite import cli
from unwrite.errors import ModelError
from unwrite.model import weights
from unwrite.model.load import weights_hash
from unwrite.model.view import Model
from unwrite.run.backward import rules
from unwrite.studies.doctor import foresee

pytest.importorskip("accelerate", reason="device_map needs accelerate")
from accelerate import dispatch_model
from accelerate.utils import OffloadedWeightsLoader

TIED = {"gpt2", "gemma2"}


SITES = ("L0H0", "L1.bias", "L2H1.z", "resid_mid1", "L1.v_input", "resid_post2")


def _edited(lm: Model) -> uw.Result:
    """What a trace records of edited passes, and the slopes that it hands on."""
    missing = {"L1.bias"} - set(lm.nodes) | {"resid_mid1"} - set(lm.locations)
    sites = [site for site in SITES if site not in missing]
    edits = [uw.Edit.set("L1H0", 0.0), uw.Edit.scale("MLP0", 0.5), uw.Edit.add("L2.v_input", torch.ones(lm.d_model))]
    with uw.trace(lm, *sites, edits=edits) as t:
        logits = lm.hf(IDS.to(lm.device)).logits
        logits[:, -1, 5].sum().backward()
    found = {site: t[site] for site in sites} | {f"slope {site}": t[site].grad for site in sites}
    lm.hf.zero_grad()
    data = xr.Dataset({name: _named(name, part) for name, part in {"logits": logits, **found}.items()})
    return uw.Result(data.assign_attrs(provenance='{"method": "trace"}'))


def _named(name: str, part: torch.Tensor) -> tuple[tuple[str, ...], Any]:
    return tuple(f"{name} {axis}" for axis in range(part.dim())), part.detach().cpu().numpy()


# All that can be asked of one shape; `compare` adds nothing to what it is made of.
ASKED: dict[str, Callable[[Model], uw.Result]] = {
    name: ask for name, ask in (METHODS | VARIANTS).items() if name not in SHAPES and name != "compare"
} | {"trace": _edited}


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "tie_word_embeddings": family in TIED}
            # A saved mixture computes with the kernel of its choice, which wants rows of 16 bytes.
            shape |= {"hidden_size": 16, "intermediate_size": 32} if family == "mixtral" else {}
            tiny.model(family, 3, torch.float32, **shape).save_pretrained(made[family])
        return made[family]

    return folder


def parts_of(hf: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the blocks, and of everything else that has weights."""
    lists = [name for name, module in hf.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = [f"{lists[0]}.{i}" for i in range(3)]
    others = [n for n, m in hf.named_modules() if not any(m.children()) and not n.startswith(lists[0])]
    return blocks, others


def spread(hf: nn.Module, layout: str) -> dict[str, str]:
    """Where every part of a model goes."""
    if layout == "all":
        return {"": "disk"}
    blocks, others = parts_of(hf)
    away = {"blocks": blocks[1:], "ends": [blocks[0], *others]}[layout]
    return {name: "disk" if name in away else "cpu" for name in (*blocks, *others)}


@pytest.fixture(scope="module")
def both(folders: Callable[[str], Path]) -> Callable[[str, str], tuple[Model, Model]]:
    """A family's model loaded whole, and spread by a layout."""
    wholes: dict[str, Model] = {}
    spreads: dict[tuple[str, str], Model] = {}

    def load(family: str, layout: str) -> tuple[Model, Model]:
        whole = wholes.setdefault(family, wholes.get(family) or uw.load(folders(family)))
        if (family, layout) not in spreads:
            spreads[family, layout] = uw.load(folders(family), device_map=spread(whole.hf, layout))
        return whole, spreads[family, layout]

    return load


def equal(got: uw.Result, want: uw.Result, reordered: tuple[str, ...] = ()) -> None:
    """Bit for bit; of what is summed in another order, to rounding."""
    xr.testing.assert_equal(got.data.drop_vars(reordered), want.data.drop_vars(reordered))
    for name in reordered:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-6 * float(abs(want[name]).max()))
    assert len(want.data.data_vars)


def left_over(hf: nn.Module) -> Any:
    """What a run could have left on a model: hooks, other forwards, weights that it brought in."""
    return (
        {(name, kind): len(getattr(module, kind)) for name, module in hf.named_modules() for kind in dir(module)
         if kind.endswith("_hooks") and isinstance(getattr(module, kind), dict)},
        {name: module.__dict__.get("forward") for name, module in hf.named_modules()},
        {name: (part.device, part.requires_grad, part.grad) for name, part in hf.named_parameters()},
        hf.config._attn_implementation,
    )  # fmt: skip


# Every method in the plainest family and in the one with the most norms (an audit, which is made of the others, in the
# latter alone); elsewhere one method of each way to read a weight.
SOME = ("scan", "dla mean", "paths recompute", "effects", "effects relp", "trace")
OTHERS = [("gpt2", "blocks"), ("gpt_neox", "blocks"), ("olmo2", "blocks"), ("gpt2", "ends"), ("olmo2", "all")]
MATRIX = [(method, "gemma2", "blocks") for method in ASKED]
MATRIX += [(method, "llama", "blocks") for method in ASKED if method not in ("audit", "dla position")]
MATRIX += [(method, family, layout) for family, layout in OTHERS for method in SOME]


@pytest.mark.parametrize(("method", "family", "layout"), MATRIX)
def test_every_number_is_that_of_the_model_loaded_whole(method: str, family: str, layout: str, both: Any) -> None:
    whole, lm = both(family, layout)
    before = left_over(lm.hf)
    equal(ASKED[method](lm), ASKED[method](whole))
    assert left_over(lm.hf) == before
    assert weights.offloaded(lm.hf)


def test_a_part_of_a_block_may_be_elsewhere(folders: Any) -> None:
    whole = uw.load(folders("mixtral"))
    places = spread(whole.hf, "ends") | dict.fromkeys(["model.embed_tokens", "model.norm"], "cpu")
    del places["model.layers.0"]
    places |= {f"model.layers.0.{name}": "cpu" for name, _ in whole.hf.model.layers[0].named_children()}
    lm = uw.load(folders("mixtral"), device_map=places | {"model.layers.0.self_attn": "disk"})
    assert {one.name for one in weights.stored(lm.hf) if one.moves} >= {"model.layers.0.self_attn.o_proj.weight"}
    for method in ("scan", "dla mean", "effects", "effects relp", "trace"):
        equal(ASKED[method](lm), ASKED[method](whole))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_every_number_is_the_same_where_layers_compute_on_other_devices(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is ever made of tensors on two devices, and nothing that is handed out is anywhere but here."""
    from elsewhere import Devices, spread

    more = ("verify", "corpus_dla", "adversarial", "effects atp*", "effects ig", "effects kl")
    asked = [*SOME, *(more if family == "gemma2" else ())]
    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "tie_word_embeddings": False}
    whole, hf = uw.load(tiny.model(family, 3, torch.float32, **shape)), tiny.model(family, 3, torch.float32, **shape)
    want = {name: ASKED[name](whole) for name in asked}
    follow, devices = rules._follow, Devices()
    # What a Function of autograd makes is not seen by a mode.
    monkeypatch.setattr(rules, "_follow", lambda value, *other: devices.put(follow(value, *other), devices.of(value)))
    with devices:
        blocks, others = parts_of(hf)
        spread(hf, devices, {name: f"cuda:{2 if _is_last(name) else 0}" for name in others})
        spread(hf, devices, {name: f"cuda:{i}" for i, name in enumerate(blocks)})
        lm = uw.load(hf)
        assert lm.device == torch.device("cuda:0")
        for name in asked:
            # Autograd adds up what several readers hand back as it arrives: one on another device is one step further.
            slopes = tuple(part for part in want[name].data if str(part).startswith("slope "))
            equal(ASKED[name](lm), want[name], slopes)


def _is_last(name: str) -> bool:
    return name.endswith(("norm", "ln_f", "lm_head", "embed_out"))


@pytest.mark.parametrize(("family", "layout"), [("llama", "blocks"), ("gemma2", "all"), ("gpt2", "ends")])
def test_weights_have_the_hash_of_the_model_loaded_whole(family: str, layout: str, both: Any) -> None:
    whole, lm = both(family, layout)
    assert len(list(lm.hf.named_parameters())) >= len(list(whole.hf.named_parameters()))
    assert [one.name for one in weights.stored(lm.hf)] == [one.name for one in weights.stored(whole.hf)]
    assert weights_hash(lm) == weights_hash(whole)


def test_weights_are_hashed_one_at_a_time_and_again_when_their_file_changes(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, read = uw.load(folders("opt"), device_map={"": "disk"}), []
    brought = weights._brought
    monkeypatch.setattr(weights, "_brought", lambda *asked: read.append(asked[1]) or brought(*asked))
    first = weights_hash(lm)
    assert not read, "it is known from the load"
    (file,) = folders("opt").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    assert weights_hash(lm) != first
    assert len(read) == len(list(weights.stored(lm.hf)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_graph_holds_no_weight_that_was_brought_in(family: str, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the graph of a whole pass would be as large as the model."""
    (whole, lm), brought = both(family, "blocks"), []
    get = OffloadedWeightsLoader.__getitem__

    def seen(store: Any, name: str) -> torch.Tensor:
        value = get(store, name)
        brought.append(StorageWeakRef(value.untyped_storage()))
        return value

    def passed(hf: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = hf.get_input_embeddings()(IDS).detach().requires_grad_()
        return embedded, hf(inputs_embeds=embedded).logits.sum()

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", seen)
    embedded, plain = passed(lm.hf)
    assert any(not storage.expired() for storage in brought)
    del plain
    with weights.reloading(lm.hf):
        embedded, followed = passed(lm.hf)
    assert brought
    assert all(storage.expired() for storage in brought)
    there, end = passed(whole.hf)
    assert torch.equal(torch.autograd.grad(followed, embedded)[0], torch.autograd.grad(end, there)[0])


def test_what_cannot_work_is_refused_in_words(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("llama")
    with pytest.raises(ModelError, match="both say where the model goes"):
        uw.load(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="name every part of the model"):
        uw.load(folder, device_map={"": "cpu", "model.layers.1": "disk"})
    with pytest.raises(ModelError, match="name every part of the model"):
        uw.load(folder, device_map={"model.layers.1": "disk"})
    with pytest.raises(ModelError, match=r"from_pretrained.*offload_folder"):
        uw.load(folders("mixtral"), device_map={"": "disk"})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.config("llama", random.Random(0)))
    with pytest.raises(ModelError, match=r"empty.*nothing brings its values in"):
        uw.load(empty)
    monkeypatch.setattr("unwrite.model.load.is_accelerate_available", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'unwrite\[accelerate\]'"):
        uw.load(folder, device_map="auto")


def test_a_model_in_memory_that_was_spread_by_hand_is_read_as_well(folders: Any, tmp_path: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folders("llama"))
    whole = uw.load(folders("llama"))
    dispatch_model(hf, spread(hf, "blocks"), offload_dir=tmp_path)
    lm = uw.load(hf)
    assert weights.offloaded(hf)
    for method in ("scan", "dla mean", "effects"):
        equal(ASKED[method](lm), ASKED[method](whole))
    assert weights_hash(lm) == weights_hash(whole)


def test_doctor_foresees_where_a_model_will_lie(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("llama")
    bytes_of = {one.name: one.bytes for one in weights.stored(uw.load(folder).hf)}
    room = sum(bytes_of.values()) * 3 // 4
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda _=None: {"cpu": room})
    before = foresee(folder, "auto", n=4, length=8)
    lm = uw.load(folder, device_map="auto")
    after = uw.doctor(lm, n=4, length=8)
    assert before is not None
    assert before.ok
    assert before.regions == after.regions
    assert before.memory == after.memory
    assert sum(region.bytes for region in after.regions) == sum(bytes_of.values())
    here, away = after.regions
    assert (here.place, here.moves, away.place, away.moves) == ("cpu", False, "disk", True)
    assert str(here).startswith("embed, layer 0: cpu, ")
    assert str(away).startswith("layers 1–2, final norm, unembed: disk, ")
    assert str(away).endswith("read at every forward pass")
    assert after.per_pass.startswith("every forward pass reads")
    assert away.largest == max(size for name, size in bytes_of.items() if not name.startswith("model.layers.0"))
    assert after.seconds > 0


def test_doctor_says_without_loading_what_will_not_fit(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices that are not here there is no room; what lies in memory beside them is moved at every pass."""
    whole = uw.load(folders("gemma2")).hf
    blocks, others = parts_of(whole)
    places = dict.fromkeys(others, "cuda:0") | {blocks[0]: "cuda:1", blocks[1]: "cpu", blocks[2]: "disk"}
    found = foresee(folders("gemma2"), places, n=4, length=8)
    assert found is not None
    assert [str(region).split(",")[0] for region in found.regions[:1]] == ["embed"]
    assert [(region.place, region.moves) for region in found.regions] == [
        ("cuda:0", False), ("cuda:1", False), ("cpu", True), ("disk", True),
    ]  # fmt: skip
    assert "reads" in found.per_pass
    assert "moves" in found.per_pass
    failing = [check.name for check in found.checks if not check.ok]
    assert failing == [f"memory of cuda:{i}" for i in range(2) if torch.cuda.device_count() <= i]
    monkeypatch.setattr("unwrite.model.load.load", None)
    monkeypatch.setattr("sys.argv", ["unwrite", "doctor", str(folders("llama")), "--device-map", "cuda:99"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1


def test_the_command_says_where_a_model_lies(
    folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unwrite", "doctor", str(folders("llama")), "-n", "4", "--length", "8", "--device-map", "disk"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    where = "embed, layers 0–2, final norm, unembed: disk, "
    assert f"before loading: {where}" in shown
    assert shown.count(where) == 1
    assert "every forward pass reads" in shown
    assert "timed on this model, with what it reads and moves" in shown
    assert stopped.value.code == 1, "this model has no tokenizer"
