"""Does `uw.localise` find which layer writes a text, say how sure that is, and keep the rules of all methods?"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import unwrite as uw
from painting import CALL, PROMPT, TARGET, pipeline, snapshot_of
from unwrite import errors
from unwrite.diffusion import scores as scoring
from unwrite.diffusion.localise import small
from unwrite.diffusion.scores import distance, f1, mse, psnr, quoted, replaced, ssim
from unwrite.report.image_grid import png
from unwrite.report.terminal import console, show
from unwrite.result import build, quantity
from unwrite.run.loop.job import Stage
from unwrite.stats.text_layers import NOT, PART, UNDECIDED, WRITES, changes, shares, word

PROMPTS = [PROMPT, 'a wall that says "1"', 'a sign "2"']
TARGETS = [TARGET, 'a wall that says "7"', 'a sign "9"']


def red(image: np.ndarray, scene: Any) -> float:
    """A score that is easy to follow."""
    return float(image[..., 0].mean())


def ask(kind: str = "sd3", prompts: Any = PROMPTS, targets: Any = TARGETS, **other: Any) -> uw.Result:
    return uw.localise(pipeline(kind), prompts, targets, **{"call": CALL[kind], "score": {"red": red}, **other})


def slowly(*values: Any) -> list[Any]:
    """Cases that are left to `--slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def found() -> uw.Result:
    return ask()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file after every image."""
    monkeypatch.setattr(Stage, "due", property(lambda self: True))


# What is found.


def test_every_number_is_that_of_an_image_which_the_pipeline_makes(found: uw.Result) -> None:
    """Those of source and target by calling the pipeline; one layer's by exchanging its keys and values by hand."""
    pipe, asked = pipeline("sd3"), CALL["sd3"]

    def image(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt=prompt, generator=generator, output_type="np", **asked).images[0]

    value = found["value"].sel(score="red")
    for i, (own, theirs) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        assert float(value.sel(run="source", prompt=i)) == red(base := image(own, i), None)
        assert float(value.sel(run="target", prompt=i)) == red(aim := image(theirs, i), None)
        assert float(found["value"].sel(score="mse", run="target", prompt=i)) == pytest.approx(
            float((255 * (base.astype(float) - aim) ** 2 * 255).mean())
        )
    one = pipe.transformer.transformer_blocks[1].attn
    seen: list[torch.Tensor] = []
    handles = [
        part.register_forward_hook(lambda _, __, out: seen.append(out)) for part in (one.add_k_proj, one.add_v_proj)
    ]
    image(TARGETS[2], 2)
    for handle in handles:
        handle.remove()
    instead = lambda _, __, out: torch.cat([out[:1], seen.pop(0)[1:]])  # noqa: E731
    handles = [part.register_forward_hook(instead) for part in (one.add_k_proj, one.add_v_proj)]
    by_hand = image(PROMPTS[2], 2)
    for handle in handles:
        handle.remove()
    assert float(value.sel(run="L1", prompt=2)) == red(by_hand, None)
    assert np.array_equal(found["image"].sel(run="L1").values[2], small(by_hand))


def test_a_share_is_a_ratio_of_sums(found: uw.Result) -> None:
    value = found["value"].sel(score="red")
    gain = value - value.sel(run="source")
    for run in ("L0", "L1", "L2"):
        assert float(found["share"].sel(run=run)) == pytest.approx(
            float(gain.sel(run=run).sum() / gain.sel(run="all").sum())
        )
    assert np.isnan(found["share"].sel(run=["source", "target", "all"])).all()
    assert found["verdict"].sel(run="L0") == UNDECIDED  # of three prompts
    assert found["parameters"].sel(run=["L1", "all"]).values.tolist() == [512, 1536]
    assert found["path"].sel(run="L1").item() == "transformer_blocks.1.attn"


def test_sets_of_layers_and_the_start(found: uw.Result) -> None:
    sets = ask(layers=["L1", [2, 0], "L0+L1+L2"], prompts=PROMPTS[0], targets=TARGETS[0])
    assert sets["run"].values.tolist() == ["source", "target", "all", "L1", "L0+L2", "L0+L1+L2"]
    value = sets["value"].sel(score="red", prompt=0)
    assert float(value.sel(run="L0+L1+L2")) == float(value.sel(run="all"))
    assert float(value.sel(run="L1")) == float(found["value"].sel(score="red", run="L1", prompt=0))
    assert sets["path"].sel(run="L0+L2").item() == "transformer_blocks.0.attn transformer_blocks.2.attn"
    late = ask(layers=1, start=1, prompts=PROMPTS[0], targets=TARGETS[0])
    assert float(late["value"].sel(score="red", run="L1", prompt=0)) != float(value.sel(run="L1"))
    with pytest.raises(errors.NumericError, match="start is after the last step"):
        ask(start=2)


def test_text_that_is_read_is_scored_and_the_finding_said() -> None:
    """A reader by a template: the digit that the brightness stands for, which a prompt's is not."""

    def read(image: np.ndarray) -> str:
        return "stop" if image.mean() < 0.5 else "taxi"

    result = ask("if", PROMPT, TARGET, read=read, score=None, layers=[0])
    assert result["score"].values.tolist() == ["mse", "ssim", "psnr", "text", "target_text", "distance"]
    first = result["value"].isel(prompt=0).sel(run="source")
    says = read(pipeline("if")(prompt=PROMPT, generator=torch.Generator().manual_seed(0), output_type="np",
                               **CALL["if"]).images[0])  # fmt: skip
    assert float(first.sel(score="text")) == (says == "stop")
    assert float(first.sel(score="target_text")) == (says == "taxi")
    assert float(first.sel(score="distance")) == distance(says, "taxi")
    assert [float(first.sel(score=name)) for name in ("mse", "ssim", "psnr")] == [0, 1, np.inf]


def judged(gain: np.ndarray, every: np.ndarray, by: str = "target_text") -> uw.Result:
    """A result as `localise` gives it, of effects that are known."""
    n, layers = gain.shape
    runs = ["source", "target", "all", *(f"L{i}" for i in range(layers))]
    values = np.concatenate([np.zeros((n, 1)), every[:, None], every[:, None], gain], 1).T[None]
    share, low, high = (np.concatenate([np.full(3, np.nan), part]) for part in shares(gain, every))
    moved = changes(every)
    words = [""] * 3 + [word(*ends, n, moved[1]) for ends in zip(low[3:], high[3:], strict=True)]
    axes = {"score": [by], "run": runs, "prompt": np.arange(n)}
    each = {"share": share, "low": low, "high": high, "verdict": np.array(words, dtype=object),
            "parameters": np.arange(len(runs)), "path": np.array(runs, dtype=object)}  # fmt: skip
    data = xr.Dataset({"value": quantity(("score", "run", "prompt"), values, "1", ""),
                       "mean": (("score", "run"), values.mean(-1)),
                       **{name: ("run", part) for name, part in each.items()}}, axes)  # fmt: skip
    ends = dict(zip(("moved", "moved_low", "moved_high"), moved, strict=True))
    attributes = {"by": by, "start": 0, "layers": layers, "put": "kv", "prompts": n, **ends}
    return build("localise", data.assign_attrs(attributes), {}, {"name": "made", "pipeline": "x"}, {})


def test_a_planted_layer_is_found_and_the_others_are_not() -> None:
    """One draws all of it, one a third, two nothing; with noise, and none."""
    rng, n = np.random.default_rng(0), 40
    every = rng.uniform(0.6, 1.0, n)
    for noise in (0.05, 0.0):
        gain = every[:, None] * [1.0, 0.45, 0.0, 0.0] + noise * rng.standard_normal((n, 4))
        result = judged(gain, every)
        assert result["verdict"].values[3:].tolist() == [WRITES, PART, NOT, NOT]
        assert "these write it, by their shares of that: L0 1.0" in repr(result)
    few = judged(np.eye(4), np.ones(4))
    assert few["verdict"].values[3:].tolist() == [UNDECIDED] * 4
    nothing = judged(rng.standard_normal((20, 3)), rng.standard_normal(20))
    assert nothing["verdict"].values[3:].tolist() == [UNDECIDED] * 3
    assert "is not sure, so no layer can be said to write it" in repr(nothing)
    same = judged(np.zeros((6, 2)), np.zeros(6))
    assert np.isnan(same["share"]).all()


def test_intervals_hold_for_all_layers_together() -> None:
    """Of 200 draws of 30 prompts and ten layers that draw nothing, at most about 5 % have any layer outside."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(200):
        every = rng.uniform(0.5, 1.0, 30)
        share, low, high = shares(0.8 * rng.standard_normal((30, 10)), every)
        missed += bool((low > 0).any() or (high < 0).any())
        assert (low < share).all()
    assert missed <= 200 * 0.05 + 2 * np.sqrt(200 * 0.05 * 0.95)


# Scores.


def test_scores_of_images_by_hand() -> None:
    zero, one = np.zeros((4, 4, 1), np.float32), np.full((4, 4, 1), 0.5, np.float32)
    assert mse(zero, one) == 127.5**2
    assert psnr(zero, one) == pytest.approx(20 * np.log10(2))
    # Of two even images all that is left is the light: (2·0·½ + c) / (0 + ¼ + c).
    assert ssim(zero, one) == pytest.approx(1e-4 / (0.25 + 1e-4))
    assert ssim(one, one) == 1


def test_structural_similarity_by_its_definition() -> None:
    """Slowly, window by window of 11 × 11, at the pixels whose window lies inside."""
    rng = np.random.default_rng(0)
    x = rng.random((14, 13, 3)).astype(np.float32)
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1).astype(np.float32)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    pad = ((5, 5), (5, 5), (0, 0))
    px, py = (np.pad(image.astype(float), pad, mode="symmetric") for image in (x, y))
    want = np.empty(x.shape)
    for i, j, c in np.ndindex(*x.shape):
        a, b = px[i : i + 11, j : j + 11, c], py[i : i + 11, j : j + 11, c]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb, ab = (
            (window * (a - ma) ** 2).sum(),
            (window * (b - mb) ** 2).sum(),
            (window * (a - ma) * (b - mb)).sum(),
        )
        want[i, j, c] = (2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ssim(x, y) == pytest.approx(want.mean(), abs=1e-6)


def test_scores_of_words_by_hand() -> None:
    assert f1("stop the BUS", "Stop, bus!") == pytest.approx(2 * 2 / 5)
    assert f1("bus bus", "bus") == pytest.approx(2 / 3)
    assert f1("", "bus") == f1("", "") == 0
    assert [distance("kitten", "sitting"), distance("", "abc"), distance("abc", "abc")] == [3, 3, 0]
    assert quoted('a sign that says "STOP" and “GO”') == "STOP GO"
    assert quoted("the dog's sign says 'no dogs'") == "no dogs"
    assert quoted("a sign") == ""
    assert replaced('a "STOP" sign, “slow”', "GO") == 'a "GO" sign, “GO”'


def test_clip_is_a_cosine() -> None:
    from transformers import CLIPConfig, CLIPModel

    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {**both, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2}
    images = {**both, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=images, projection_dim=8)).eval()

    def processor(text: Any, images: Any, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[5, 6, 2]]) if text[0] == PROMPT else torch.tensor([[7, 8, 2]])
        assert images[0].dtype == np.uint8
        return {"input_ids": ids, "pixel_values": torch.from_numpy(images[0].transpose(2, 0, 1)[None] / 255).float()}

    image = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    scene = scoring.Comparison(PROMPT, TARGET, "", "", image, image)
    found = {name: score(image, scene) for name, score in uw.diffusion.clip(model, processor).items()}
    with torch.no_grad():
        for name, text in (("clip_prompt", PROMPT), ("clip_target", TARGET)):
            asked = processor([text], [np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)])
            want = model(**asked).logits_per_image.item() / model.logit_scale.exp().item()
            assert found[name] == pytest.approx(want, abs=1e-6)


def test_tesseract_is_asked_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytesseract", None)
    with pytest.raises(errors.ModelError, match="pytesseract is not installed"):
        uw.diffusion.tesseract()
    heard: list[Any] = []
    fake = SimpleNamespace(image_to_string=lambda image, lang: heard.append((image, lang)) or " STOP\n")
    monkeypatch.setitem(__import__("sys").modules, "pytesseract", fake)
    assert uw.diffusion.tesseract("deu")(np.ones((2, 2, 3), np.float32)) == "STOP"
    assert heard[0][1] == "deu"
    assert heard[0][0].dtype == np.uint8


# Long runs.


def test_the_cost_is_said_first_and_progress_moves() -> None:
    heard: list[Any] = []
    ask(prompts=PROMPTS[:2], targets=TARGETS[:2], layers=[0], listener=heard.append)
    assert (heard[0].done, heard[0].total, heard[0].doing) == (0, 2, "4 images for each of 2 prompts")
    assert [step.doing for step in heard[1:5]] == [f"{n}/4 images" for n in (1, 2, 3, 4)]
    assert [step.done for step in heard] == [0, *[0] * 4, 1, *[1] * 4, 2]


@pytest.mark.promise("resumed")
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("after", [*slowly(1, 4, 10), 8])
def test_it_goes_on_where_it_was_stopped(found: uw.Result, after: int, tmp_path: Path) -> None:
    """In the middle of a prompt, too, to the same bits; images that are there are not scored again."""
    scored = [0]

    def stopping(image: np.ndarray, scene: Any) -> float:
        scored[0] += 1
        if scored[0] == after + 1:
            raise KeyboardInterrupt
        return red(image, scene)

    stopping.__qualname__ = "red"
    with pytest.raises(KeyboardInterrupt):
        ask(score={"red": stopping}, checkpoint=tmp_path)
    again = ask(score={"red": stopping}, checkpoint=tmp_path)
    assert scored[0] == found["value"].sel(score="red").size + 1
    for name in found.data:
        np.testing.assert_array_equal(again[name].values, found[name].values)
    assert not [*tmp_path.glob("*.npz")]


@pytest.mark.usefixtures("always")
def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    few = {"prompts": PROMPTS[0], "targets": TARGETS[0], "layers": 0, "checkpoint": tmp_path}
    first = ask(**few)
    first.save(tmp_path)
    assert ask(**few, listener=lambda _: pytest.fail("it is there")).data.identical(uw.read(tmp_path).data)
    with pytest.raises(errors.ResultError, match="another settings seed"):
        ask(**few, seed=1)
    weight = pipeline("sd3").transformer.transformer_blocks[0].attn.add_k_proj.bias
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(errors.ResultError, match="another model weights"):
            ask(**few)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.promise("untouched")
def test_a_pipeline_is_untouched(found: uw.Result) -> None:
    before = snapshot_of(pipeline("flux"))
    ask("flux", PROMPTS[0], TARGETS[0], layers=[0, 3])
    uw.diffusion.edit(pipeline("flux"), PROMPT, TARGET, [1], call=CALL["flux"])
    uw.diffusion.lora_targets(pipeline("flux"), [1], CALL["flux"])
    assert snapshot_of(pipeline("flux")) == before


# Shown and saved.


def test_a_result_is_saved_shown_and_drawn(
    found: uw.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found.save(tmp_path)
    again = uw.read(tmp_path)
    assert again.data.identical(found.data)
    show(again, console())
    said = capsys.readouterr().out
    assert "transformer_blocks.1.attn" in said
    assert "certificate: none" in said
    assert len(found.table()) == 6
    assert found._repr_html_().count("<image") == 18
    marks = found.figure().to_dict()["data"]["values"]
    assert [mark["run"] for mark in marks[:6]] == ["source", "target", "all", "L0", "L1", "L2"]
    assert len(found.figure(picture=1).to_dict()["data"]["values"]) == 6
    with pytest.raises(errors.ResultError, match="no such picture"):
        found.figure(picture=9)
    for end in (".svg", ".png"):
        found.figure().save(str(tmp_path / f"x{end}"))


def test_an_image_in_the_picture_is_that_of_the_result(found: uw.Result) -> None:
    """Unpacked by the format's own rules, and by pillow."""
    from PIL import Image

    for pixels in (found["image"].values[1, 2], found["image"].values[1, 2, :, :5, :1]):
        raw = base64.b64decode(png(pixels).partition(",")[2])
        shown = np.asarray(Image.open(io.BytesIO(raw))).reshape(pixels.shape)
        np.testing.assert_array_equal(shown, pixels)
        length = struct.unpack(">I", raw[33:37])[0]
        lines = np.frombuffer(zlib.decompress(raw[41 : 41 + length]), np.uint8).reshape(len(pixels), -1)
        np.testing.assert_array_equal(lines[:, 1:].reshape(pixels.shape), pixels)


def test_what_a_stranger_wrote_is_no_code() -> None:
    hostile = 'a "</script><img src=x>\x1b[2J"'
    result = ask(prompts=hostile, targets=TARGETS[0], layers=0)
    assert "<img" not in result._repr_html_()
    assert "</script" not in str(result.figure().to_dict())
    assert "\x1b" not in repr(result)


def test_small_images_are_means() -> None:
    image = np.zeros((200, 100, 3), np.float32)
    image[:3, :3, 0] = 1.0
    made = small(image)
    assert made.shape == (66, 33, 3)
    assert made[0, 0].tolist() == [255, 0, 0]
    assert made[1:].sum() == 0


# Editing, prevention, adapters.


def test_an_edit_is_the_image_of_a_run(found: uw.Result) -> None:
    pipe = pipeline("sd3")
    image = uw.diffusion.edit(pipe, PROMPT, TARGET, "L1", call=CALL["sd3"])
    assert red(image, None) == float(found["value"].sel(score="red", run="L1", prompt=0))
    both = uw.diffusion.edit(pipe, PROMPT, TARGET, ["L0", "L1", "L2"], call=CALL["sd3"])
    assert red(both, None) == float(found["value"].sel(score="red", run="all", prompt=0))
    own = uw.diffusion.edit(pipe, PROMPT, PROMPT, "L1", call=CALL["sd3"])
    assert red(own, None) == float(found["value"].sel(score="red", run="source", prompt=0))


def test_harmful_text_is_exchanged_before_it_is_drawn() -> None:
    def bad(text: str) -> bool:
        return "stop" in text.lower()

    assert uw.diffusion.harmless('a sign "STOP it"', bad, "hello") == 'a sign "hello"'
    assert uw.diffusion.harmless('a sign "go"', bad, "hello") == 'a sign "go"'
    with pytest.raises(errors.TokensError, match="harmful, too"):
        uw.diffusion.harmless('a sign "stop"', bad, "don't stop")
    with pytest.raises(errors.TokensError, match="quotes no text"):
        uw.diffusion.harmless("a sign", bad, "hello")


@pytest.mark.parametrize("kind", [*slowly("sdxl"), "sd3"])
def test_adapters_attach_to_the_listed_modules_only(kind: str) -> None:
    """3d: zero at first, they change nothing; they have Σ r (in + out) weights."""
    import copy

    from peft import LoraConfig

    pipe = pipeline(kind)
    denoiser = pipe.unet if kind == "sdxl" else pipe.transformer
    listed = uw.diffusion.lora_targets(pipe, [1, 2], CALL[kind])
    assert len(listed) == 4
    adapted = copy.copy(pipe)
    part = copy.deepcopy(denoiser)
    setattr(adapted, "unet" if kind == "sdxl" else "transformer", part)
    part.add_adapter(LoraConfig(r=3, target_modules=listed))
    have = {name for name, module in part.named_modules() if hasattr(module, "lora_A")}
    assert have == set(listed)
    modules = dict(denoiser.named_modules())
    want = sum(3 * (modules[name].in_features + modules[name].out_features) for name in listed)  # pyright: ignore
    assert sum(weight.numel() for weight in part.parameters() if weight.requires_grad) == want
    images = [
        one(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **CALL[kind]).images[0]
        for one in (pipe, adapted)
    ]
    assert np.array_equal(*images)
    # An adapter that says something is seen by an exchange like any other weight.
    asked = {"call": CALL[kind], "score": {"red": red}, "layers": [1]}
    own = uw.localise(adapted, PROMPT, TARGET, **asked)
    assert own.provenance["model"]["adapters"] == ["default"]
    with torch.no_grad():
        for name, weight in part.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    other = uw.localise(adapted, PROMPT, TARGET, **asked)
    assert not np.array_equal(own["value"].sel(run="L1"), other["value"].sel(run="L1"))


# What is refused.


def _refused() -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    yield {"prompts": []}, errors.TokensError, "prompts are texts"
    yield {"targets": TARGETS[:2]}, errors.TokensError, "every prompt has one target. Got: 3 prompts, 2 targets"
    yield {"layers": "L3"}, errors.NodeError, "no such layer reads text. Got: 'L3'. Expected: L0 to L2"
    yield {"layers": ["L0", -1]}, errors.NodeError, "no such layer"
    yield {"layers": []}, errors.NodeError, "layers are numbers or names"
    yield {"start": -1}, errors.NumericError, "start is a step"
    yield {"put": "values"}, errors.NumericError, "put is unknown"
    yield {"put": "embedding"}, errors.ModelError, "do not make their keys of the prompt's embedding alone"
    yield {"score": {"mse": red}}, errors.NumericError, "a score needs a name of its own"
    yield {"score": [red]}, errors.NumericError, "score is what else is measured"
    yield {"score": {"red": lambda *_: float("nan")}}, errors.NumericError, "the score 'red' is no number"
    yield {"score": {"red": lambda *_: "much"}}, errors.NumericError, "the score 'red' is no number"
    yield {"read": lambda _: 3}, errors.NumericError, "read gives the text of an image"
    yield {"read": str, "prompts": ["a", "b", "c"]}, errors.TokensError, "a prompt quotes no text that could be read"
    yield {"call": {"generator": None}}, errors.NumericError, "call has what is not the caller's"
    yield {"call": {"num_inference_steps": object()}}, errors.NumericError, "numbers, texts and lists"
    yield {"pictures": -1}, errors.NumericError, "pictures"


@pytest.mark.promise("errors")
@pytest.mark.parametrize(("other", "error", "says"), [*_refused()])
def test_bad_input_is_refused_in_words(other: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ask(**other)


def test_an_image_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sd3")
    real = type(pipe).__call__

    def spoilt(change: Any) -> Any:
        def call(self: Any, **asked: Any) -> Any:
            made = real(self, **asked)
            change(made)
            return made

        call.__signature__ = __import__("inspect").signature(real)  # pyright: ignore
        return call

    for change, says in (
        (lambda made: made.images.fill(np.nan), "an image is not finite"),
        (lambda made: setattr(made, "nsfw_content_detected", [True]), "the pipeline's checker has blanked an image"),
        (lambda made: setattr(made, "images", made.images[0]), "makes no images"),
    ):  # fmt: skip
        monkeypatch.setattr(type(pipe), "__call__", spoilt(change))
        with pytest.raises(errors.UnwriteError, match=says):
            ask()


@pytest.mark.promise("errors")
def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    from unwrite.diffusion import view

    monkeypatch.setattr(view, "find_spec", lambda _: None)
    with pytest.raises(errors.ModelError, match=r"pip install 'unwrite\[diffusion\]'"):
        ask()
