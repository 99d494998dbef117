"""Examines each part of a model by itself, on input that is known to be good, and judges what it finds.

The bounds were found by measuring the miniatures of this repository, every system, on both pictures that come along, in
float32 on the CPU; the figures are beside each. They are wide, as published models are others: "odd" is outside of all that
was seen, "wrong" far outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..stages.prior import embed_image
from ..stages.size import with_size
from ..stages.text import TokenRow, encode_text
from ..stages.upscale import with_latents, with_low_res
from .prompts import Pair

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
"""PSNR in dB: 24.2 to 32.4."""
LATENT_MEAN = Bounds(-2.0, -1.0, 1.0, 2.0)
"""-0.74 to 0.43; not 0, as no VAE is trained for it."""
LATENT_STD = Bounds(0.5, 0.7, 1.4, 2.0)
"""0.86 to 1.04. The usual mistake, another model's scaling factor, is a factor of 1.4 between SD and SDXL."""
APART = Bounds(1e-3, 1e-2, INF, INF)
"""0.94 to 1.7; an encoder that does not listen gives 0. Far below, as one token may be much larger than all others."""
ONE_STEP = Bounds(-INF, -INF, 0.85, 1.0)
"""0.10 to 0.64; at 1 a network is of no use."""
BETTER = 0.8
"""Another kind of prediction that leaves less than that part of the error is the right one: 1.47 times and more."""


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
    """How far what two prompts became lies apart, relative to its size; of chunks, those that both have."""
    said = ("context", "pooled", "image_embeds")
    pairs = [(getattr(one, name).float(), getattr(other, name).float()) for name in said if name in one.names()]
    cut = [(a[:, : b.shape[1]], b[:, : a.shape[1]]) for a, b in pairs]
    return max(relative(a - b, a, b) for a, b in cut)


def relative(difference: Tensor, *of: Tensor) -> float:
    """The root of the mean square of a difference, over the largest of what it is between."""
    size = max(rms(tensor) for tensor in of)
    return rms(difference) / size if size else 0.0


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.float().square().mean().sqrt())


# --- text


def text_checks(
    encoder: Model | Prior, pair: Pair, tables: Mapping[str, Sequence[TokenRow]], *, differ: bool
) -> Iterator[Check]:
    """The encoder on two prompts that have nothing in common, and what a stage's own became.

    Args:
        pair: what the stage's prompt and negative prompt became.
        tables: what became of the tokens of each of its prompts.
        differ: whether the two say different things.
    """
    known = [encode_text(encoder, prompt) for prompt in KNOWN_PROMPTS]
    yield finite("encoded prompts", (t for said in (*pair, *known) for t in vars(said).values() if t is not None))
    yield within(f"distance of {KNOWN_PROMPTS[0]!r} from {KNOWN_PROMPTS[1]!r}", apart(*known), APART)
    if differ:
        yield within("distance of the prompt from the negative one", apart(*pair), APART)
    for prompt, rows in tables.items():
        if lost := [row for row in rows if row.chunk is None]:
            yield Check("tokens beyond 77", f"dropped: {prompt[lost[0].start :].strip()!r}", "none dropped", "odd")


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
        yield within("std of a known picture's latents (scaling factor)", float(x.std()), LATENT_STD)
    try:
        pixels = decode_tensor(model, known.latents)
    except NonFinite as error:
        yield Check("known picture, encoded and decoded", str(error), "", "wrong")
        return
    psnr = -10 * math.log10(max(float((pixels.cpu().clamp(-1, 1) - to_tensor(known.picture)).square().mean()) / 4, 1e-12))
    yield within("known picture, encoded and decoded, PSNR", psnr, ROUND_TRIP, " dB")


# --- network


def said_of(model: Model, prior: Prior | None, known: Known) -> Conditioning:
    """What a network is told of a known picture: no prompt, or Kandinsky's its embedding; and the further channels.

    Args:
        prior: Kandinsky's.
    """
    side = model.native_size
    if prior is not None:
        said = embed_image(prior, known.picture)
    elif model.system == "sdxl":
        said = with_size(model, encode_text(model, None), side, side)
    else:
        said = encode_text(model, "")
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
    yield finite("UNet's output for a known picture under noise", (prediction.out for prediction in asked))
    error = _error(asked, own, x0)
    yield within(f"its error as {_named(own)}, over that of no network", error, ONE_STEP)
    others: dict[Kind, float] = {kind: _error(asked, kind, x0) for kind in ("epsilon", "v", "x0") if kind != own}
    best = min(others, key=lambda kind: others[kind])
    yield holds(
        f"its error as {_named(best)} instead (prediction_type)",
        not others[best] < BETTER * error,
        f"{others[best]:.3g}",
        f"above {BETTER * error:.3g}",
    )


def _error(asked: list[Prediction], kind: Kind, x0: Tensor) -> float:
    errors = [rms(replace(p, kind=kind).x0 - x0) * math.sqrt(1 + p.sigma**2) / p.sigma for p in asked]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def _named(kind: Kind) -> str:
    return kind if isinstance(kind, str) else "its preconditioning's"
