"""How near is an image to another one, and which text can be read in it? Numbers of images in [0, 1], and of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from unwrite.diffusion.view import Image
from unwrite.errors import ModelError, NumericError, function, require, shown

# Squared steps of a grey value of 8 bits, in which papers count.
_GREY = 255.0
# Wang et al. 2004: a Gaussian window of 11 × 11, and what keeps quotients finite where nothing varies.
_SIGMA, _TRUNCATE, _LIGHT, _CONTRAST = 1.5, 3.5, 0.01**2, 0.03**2
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']+)'(?!\w)")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What an image is compared with: both prompts, the text that each quotes, and both images."""

    prompt: str
    target: str
    text: str
    target_text: str
    base: Image
    aim: Image


ReadsText = Callable[[Image], str]
Score = Callable[[Image, Comparison], float]


def mse(one: Image, other: Image) -> float:
    """Mean squared difference, in squared grey values of 0 to 255."""
    return float(np.mean((_GREY * (one.astype(float) - other)) ** 2))


def psnr(one: Image, other: Image) -> float:
    """10 log₁₀(255² / MSE) in dB; infinite for equal images."""
    error = mse(one, other)
    return float(10 * np.log10(_GREY**2 / error)) if error else float("inf")


def ssim(one: Image, other: Image) -> float:
    """Structural similarity (Wang et al. 2004, equation 13): its mean over pixels and channels, borders mirrored."""
    x, y = (np.moveaxis(image.astype(float), -1, 0) for image in (one, other))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.stack([gaussian_filter(part, _SIGMA, truncate=_TRUNCATE) for part in values])

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    light = (2 * mx * my + _LIGHT) / (mx**2 + my**2 + _LIGHT)
    return float(np.mean(light * (2 * xy + _CONTRAST) / (xx + yy + _CONTRAST)))


def f1(read: str, text: str) -> float:
    """F1 of words, case folded, each as often as it is there: 2 · both / (read + wanted); 0 where nothing is read."""
    own, wanted = (Counter(re.findall(r"\w+", part.casefold())) for part in (read, text))
    return 2 * (own & wanted).total() / max(1, own.total() + wanted.total())


def distance(read: str, text: str) -> int:
    """How many characters must be put in, left out or exchanged to make one text of the other (Levenshtein)."""
    row = list(range(len(text) + 1))
    for i, own in enumerate(read, 1):
        before, row[0] = row[0], i
        for j, theirs in enumerate(text, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (own != theirs))
    return row[-1]


def quoted(prompt: str) -> str:
    """The text that a prompt quotes, all of it by blanks; "" where it quotes none."""
    return " ".join("".join(parts) for parts in _QUOTED.findall(prompt))


def replaced(prompt: str, text: str) -> str:
    """The same prompt with another text in its quotes."""
    return _QUOTED.sub(lambda found: f"{found[0][0]}{text}{found[0][-1]}", prompt)


def clip(model: Any, processor: Any) -> dict[str, Score]:
    """Measures by CLIP: cosine of the image and the prompt, and of the image and the target.

    `model` and `processor` are those of transformers, such as CLIPModel and CLIPProcessor.
    """

    def cosine(image: Image, text: str) -> float:
        eight = np.clip(_GREY * image + 0.5, 0, _GREY).astype(np.uint8)
        made = model(**processor(text=[text], images=[eight], return_tensors="pt", padding=True, truncation=True))
        one, other = (part[0].detach().double() for part in (made.image_embeds, made.text_embeds))
        return float(one @ other / (one.norm() * other.norm()))

    return {
        "clip_prompt": lambda image, scene: cosine(image, scene.prompt),
        "clip_target": lambda image, scene: cosine(image, scene.target),
    }


def tesseract(language: str = "eng") -> ReadsText:
    """A reader of text in images by the program tesseract. Raises ModelError where pytesseract is not installed."""
    try:
        import pytesseract  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError("pytesseract is not installed", fix="pip install pytesseract, and the program") from None

    def read(image: Image) -> str:
        eight = np.clip(_GREY * image + 0.5, 0, _GREY).astype(np.uint8)
        return pytesseract.image_to_string(eight, lang=language).strip()

    return read


# What is always measured: how far an image is from the prompt's own.
_IMAGES: Mapping[str, Callable[[Image, Image], float]] = {"mse": mse, "ssim": ssim, "psnr": psnr}
_EQUATIONS = {
    "mse": "mean of (255 (image − the prompt's own image))²",
    "ssim": "structural similarity to the prompt's own image (Wang et al. 2004)",
    "psnr": "10 log₁₀(255² / mse), dB",
    "text": "F1 of the words read and those that the prompt quotes",
    "target_text": "F1 of the words read and those that the target quotes",
    "distance": "characters to change in what is read to have what the target quotes (Levenshtein)",
}


@dataclass(frozen=True, eq=False)
class Measures:
    """What is measured of every image: pictures always, text where there is a reader, and the caller's own."""

    read: ReadsText | None
    own: Mapping[str, Score]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all of them, in order."""
        return (*_IMAGES, *(("text", "target_text", "distance") if self.read else ()), *self.own)

    @property
    def by(self) -> str:
        """The one that says whether the target's text is there; "" where nothing does."""
        return "target_text" if self.read else next(iter(self.own), "")

    def equation(self, name: str) -> str:
        """How one comes about."""
        return _EQUATIONS.get(name, f"the caller's own {name}")

    @property
    def about(self) -> dict[str, str]:
        """By which functions, as far as these can be named."""
        named = {"read": self.read, **self.own} if self.read else dict(self.own)
        return {name: getattr(one, "__qualname__", type(one).__qualname__) for name, one in named.items()}

    def of(self, image: Image, scene: Comparison) -> np.ndarray:
        """All of them. Raises NumericError for one of the caller's that is no finite number."""
        found: dict[str, Any] = {name: measure(image, scene.base) for name, measure in _IMAGES.items()}
        if self.read is not None:
            says = self.read(image)
            require(isinstance(says, str), NumericError, "read gives the text of an image", says, "a string")
            found |= {"text": f1(says, scene.text), "target_text": f1(says, scene.target_text)}
            found["distance"] = distance(says, scene.target_text)
        for name, score in self.own.items():
            found[name] = _number(name, score(image, scene))
        return np.array([found[name] for name in self.names], dtype=float)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - whatever a stranger's score gives that is no number
        number = float("nan")
    if not np.isfinite(number):
        raise NumericError(f"the score {shown(name)} is no number", got=shown(value), expected="a finite number")
    return number


def scores(read: Any, own: Any) -> Measures:
    """What is to be measured. Raises NumericError for a reader or scores that are none."""
    function("read", read)
    named = isinstance(own, Mapping) and all(isinstance(name, str) and callable(one) for name, one in own.items())
    expected = "functions (image, scene) by name"
    require(own is None or named, NumericError, "score is what else is measured", own, expected)
    taken = [name for name in own or {} if name in _EQUATIONS or not name.isidentifier()]
    if taken:
        raise NumericError("a score needs a name of its own", got=shown(taken[0]), expected="a word that is not taken")
    return Measures(read, dict(own or {}))
