"""Examines each part of a model by itself, on input that is known to be good, and judges what it finds.

The bounds below were found by measuring the miniatures of this repository, all systems, on the CPU in float32; the
figures are beside each. They are wide, as published models are others: a verdict of "wrong" is far outside of all that
was seen, and "odd" is outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import ConditionalDenoiser
from ..core.errors import NonFinite
from ..core.latents import Latents
from ..core.model import Model, Prior
from ..core.noise import Noise
from ..core.prediction import Kind, Prediction
from ..core.schedule import Schedule
from ..stages.decode import decode_tensor
from ..stages.image import encode_image
from ..stages.inpaint import inpaint_channels, with_channels
from ..stages.pictures import read_picture, to_tensor
from ..stages.text import dropped_text, encode_text
from ..stages.upscale import with_latents, with_low_res

Verdict = Literal["ok", "odd", "wrong"]

KNOWN_PICTURE = Path(__file__).parent / "inputs" / "astronaut.jpg"
KNOWN_PROMPTS = "a red apple", "a castle at night"
PROBED = (0.3, 1.0, 3.0)
"""Noise levels at which a network is asked once: below, at and above the picture's own, where its kinds differ most."""


class Bounds(NamedTuple):
    """What is ok lies within the inner two, what is odd within the outer two; the rest, and NaN, is wrong."""

    least: float
    low: float
    high: float
    most: float

    def judge(self, value: float) -> Verdict:
        """Of one number."""
        if self.low <= value <= self.high:
            return "ok"
        return "odd" if self.least <= value <= self.most else "wrong"

    def __str__(self) -> str:
        if math.isinf(self.low) or math.isinf(self.high):
            return f"below {self.high:.3g}" if math.isinf(self.low) else f"above {self.low:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


INF = math.inf
ROUND_TRIP = Bounds(15.0, 20.0, INF, INF)
"""PSNR in dB: 24.2 to 32.4 on the two pictures that come along."""
LATENT_MEAN = Bounds(-2.0, -1.0, 1.0, 2.0)
"""-0.74 to 0.43; not 0, as no VAE is trained for it."""
LATENT_STD = Bounds(0.5, 0.7, 1.4, 2.0)
"""0.86 to 1.04. The usual mistake, another model's scaling factor, is a factor of 1.4 between SD and SDXL."""
APART = Bounds(1e-3, 1e-2, INF, INF)
ONE_STEP = Bounds(-INF, -INF, 0.85, 1.0)
BETTER = 0.8
"""Another kind of prediction that leaves less than that part of the error is the right one."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what was found there and what is expected."""

    what: str
    found: str
    expected: str
    verdict: Verdict


def within(what: str, value: float, bounds: Bounds, unit: str = "") -> Check:
    """A number that is to lie within bounds."""
    return Check(what, f"{value:.3g}{unit}", f"{bounds}{unit}", bounds.judge(value))


def holds(what: str, good: bool, found: str, expected: str) -> Check:
    """Something that is either so or wrong."""
    return Check(what, found, expected, "ok" if good else "wrong")


def finite(what: str, tensors: Iterable[Tensor]) -> Check:
    """NaN or infinity among numbers."""
    bad, count = 0, 0
    for tensor in tensors:
        bad, count = bad + int((~torch.isfinite(tensor)).sum()), count + tensor.numel()
    return holds(what, not bad, f"{bad} of {count} numbers NaN or infinite" if bad else "all finite", "all finite")


def apart(one: Conditioning, other: Conditioning) -> float:
    """How far two conditionings lie apart, relative to their size; 0 if they say the same."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Conditioning) if f.name in SAID]
    held = [(a.float(), b.float()) for a, b in pairs if a is not None and b is not None]
    return max((relative(a - b, a, b) for a, b in held), default=0.0)


SAID = {"context", "pooled", "image_embeds"}
"""What of a conditioning comes from the prompt."""


def relative(difference: Tensor, *of: Tensor) -> float:
    """The root of the mean square of a difference, over the largest of what it is between."""
    size = max(rms(tensor) for tensor in of)
    return rms(difference) / size if size else 0.0


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.float().square().mean().sqrt())


# --- text


@dataclass(frozen=True)
class Tokens:
    """What a prompt became: its tokens, and the text that lies beyond the 77 that the encoder reads."""

    prompt: str
    tokens: tuple[str, ...]
    dropped: str


def tokens(model: Model | Prior, prompt: str) -> Tokens:
    """A prompt as its first text encoder reads it."""
    tokenizer = model.tokenizer if model.tokenizer is not None else model.tokenizer_2  # type: ignore[union-attr]
    dropped = dropped_text(model, prompt)
    kept = prompt[: prompt.rindex(dropped)] if dropped else prompt
    return Tokens(prompt, tuple(token.removesuffix("</w>") for token in tokenizer.tokenize(kept)), dropped)


def text_checks(
    model: Model | Prior, pair: tuple[Conditioning, Conditioning], prompts: tuple[str, str], *, chunks: bool
) -> Iterator[Check]:
    """The encoder on two prompts that have nothing in common, and what it made of the stage's own two."""
    known = [encode_text(model, prompt) for prompt in KNOWN_PROMPTS]
    yield finite("encoded prompts", (t for said in (*pair, *known) for t in vars(said).values() if t is not None))
    yield within(f"distance of {KNOWN_PROMPTS[0]!r} from {KNOWN_PROMPTS[1]!r}", apart(*known), APART)
    if prompts[0] != prompts[1]:
        yield within("distance of the prompt from the negative one", apart(*pair), APART)
    for prompt in prompts:
        dropped = "" if chunks else dropped_text(model, prompt)
        if dropped:
            yield Check("prompt beyond 77 tokens", f"dropped: {dropped!r}", "nothing dropped", "odd")


# --- VAE


@dataclass(frozen=True)
class Known:
    """A picture that is known to be good, and its latents."""

    picture: Image.Image
    latents: Latents

    @classmethod
    def of(cls, model: Model) -> Known:
        """In the model's native size.

        Raises:
            NonFinite: its VAE's encoder gives NaN.
        """
        picture = sized(read_picture(KNOWN_PICTURE), model.native_size)
        return cls(picture, encode_image(model, picture, posterior="mode"))


def sized(picture: Image.Image, side: int) -> Image.Image:
    """A square of that many pixels."""
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def vae_checks(model: Model, known: Known) -> Iterator[Check]:
    """A known picture into latents and back."""
    x = known.latents.x
    if model.system != "x4":  # whose latents are scaled by a constant of its own, far from unit variance
        yield within("mean of a known picture's latents", float(x.mean()), LATENT_MEAN)
        yield within("their standard deviation (scaling factor)", float(x.std()), LATENT_STD)
    try:
        pixels = decode_tensor(model, known.latents)
    except NonFinite as error:
        yield Check("known picture, encoded and decoded", str(error), "a picture", "wrong")
        return
    psnr = -10 * math.log10(max(float((pixels.cpu().clamp(-1, 1) - to_tensor(known.picture)).square().mean()) / 4, 1e-12))
    yield within("known picture, encoded and decoded, PSNR", psnr, ROUND_TRIP, " dB")


# --- network


def with_known(model: Model, said: Conditioning, known: Known) -> Conditioning:
    """A conditioning with a known picture in the further channels that a network takes, if it takes any."""
    side = model.native_size
    if model.system == "x2":
        return with_latents(model, said, encode_image(model, sized(known.picture, side // 2), posterior="mode"))
    if model.system == "x4":
        return with_low_res(model, said, sized(known.picture, side // 4))
    if model.inpaints:
        white = Image.new("L", known.picture.size, 255)
        return with_channels(said, inpaint_channels(model, known.picture, white))
    return said


def network_checks(network: ConditionalDenoiser, said: Conditioning, known: Latents, schedule: Schedule) -> Iterator[Check]:
    """The network asked once at a few noise levels for a known picture under noise, without guidance.

    Its error is relative to that of the best guess without a network, ``x / (1 + sigma^2)``, which is off by ``sigma /
    sqrt(1 + sigma^2)`` for data of unit variance. The same output is read as every kind there is.
    """
    x0 = known.x.expand(len(said), -1, -1, -1)
    noise = Noise((0,), "known")(known.x.shape, "latents").to(x0.device)
    with torch.no_grad():
        asked = [network(x0 + sigma * noise, sigma, schedule.timestep_at(sigma), said) for sigma in PROBED]
    own = asked[0].kind
    yield finite("network's output for a known picture under noise", (prediction.out for prediction in asked))
    error = _error(asked, own, x0)
    yield within(f"its error read as {_named(own)}, over that of no network", error, ONE_STEP)
    others: dict[Kind, float] = {kind: _error(asked, kind, x0) for kind in ("epsilon", "v", "x0") if kind != own}
    best = min(others, key=lambda kind: others[kind])
    yield holds(
        f"read as {_named(best)} instead (prediction_type)",
        not others[best] < BETTER * error,
        f"{others[best]:.3g}",
        f"above {BETTER * error:.3g}",
    )


def _error(asked: list[Prediction], kind: Kind, x0: Tensor) -> float:
    errors = [rms(replace(p, kind=kind).x0 - x0) * math.sqrt(1 + p.sigma**2) / p.sigma for p in asked]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def _named(kind: Kind) -> str:
    return kind if isinstance(kind, str) else "its preconditioning's"
