"""DAAM: where in the picture does a word act?

Tang et al., What the DAAM: Interpreting Stable Diffusion Using Cross Attention, arXiv:2210.04885:
the cross-attention given to the word's tokens, scaled up to the picture and summed over heads, layers and steps.

The seam: :func:`attending` shows every attention layer's queries and keys as it runs, and here changes nothing;
:func:`attention_maps` gives chosen columns of ``softmax(q k^T / sqrt(d))`` without the rest.
The picture: two prompts and some of their words. The miniature's text encoder looks back only, as CLIP's does, so that what
it paints is known to the words behind its name: they trace the thing, and the name itself acts around it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor
from unrolled import Model, attending, classifier_free, decode, denoise, encode_text, grid, load, noise, resize
from unrolled.kernels.attending import Attend, Place
from unrolled.kernels.attention_maps import attention_maps


@contextmanager
def watched(unet: Any, tokens: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Gives (tokens, height, width), to which every call of the UNet within it adds; of a batch its last image counts."""
    heat = torch.zeros(len(tokens), height, width)

    def watch(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        maps = attention_maps(q[-1:], k[-1:], tokens).transpose(1, 2)  # the mean over the heads
        rows = round((maps.shape[-1] * height / width) ** 0.5)
        maps = maps.reshape(1, len(tokens), rows, -1)
        heat.add_(F.interpolate(maps, (height, width), mode="bicubic")[0].clamp_min(0).cpu())
        return attend(q, k, v)

    with attending(unet, watch, lambda place: place.cross):
        yield heat


def tokens_of(model: Model, prompt: str, word: str) -> Tensor:
    """Where the word's tokens stand in the context."""
    ids, wanted = model.tokenizer(prompt).input_ids, model.tokenizer(word, add_special_tokens=False).input_ids
    first = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
    return torch.arange(first, first + len(wanted), device=model.device)


def shown(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The heat in red over the greyed picture, from its least to its most."""
    parts = (heat - heat.min()) / (heat.max() - heat.min())
    mask = Image.fromarray((parts * 255).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", picture.size, "red"), picture.convert("L").convert("RGB"), mask)


def main(folder: str = "outputs") -> None:
    """Paint two pictures and show where their words acted."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule, solver = sd.sampling(steps=20)
    start, pictures, labels = noise(sd, schedule), [], []
    for prompt, words in [
        ("a rose in a garden", ["rose", "in", "garden"]),
        ("a red apple on a table", ["red", "apple", "table"]),
    ]:
        denoiser = classifier_free(sd.denoiser, encode_text(sd, prompt), encode_text(sd, ""), 4.0)
        parts = [tokens_of(sd, prompt, word) for word in words]
        with watched(sd.unet, torch.cat(parts), *start.x.shape[-2:]) as heat:
            picture = resize(decode(sd, denoise(denoiser, start, schedule, solver))[0], 2)
        pictures += [picture, *(shown(picture, one.sum(0)) for one in torch.split(heat, [len(part) for part in parts]))]
        labels += [prompt, *words]
    Path(folder).mkdir(parents=True, exist_ok=True)
    grid(pictures, columns=4, labels=labels).save(Path(folder) / "daam.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
