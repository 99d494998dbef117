"""What the Kandinsky decoders learn: to draw the latents of a picture from its embedding, and how sure to be."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d
from transformers import CLIPVisionModelWithProjection

from . import networks, world
from .denoising import hole
from .kandinsky_networks import encoded, normalised
from .kandinsky_views import cutouts, on_white, view
from .pictures import pixels

VIEWS: Final = 8
HOLES: Final = 4
NOTHING: Final = 0.1


def from_folder(kind: Any, folder: Path) -> Any:
    """A part that an earlier training left, in full precision and no longer learning."""
    return kind.from_pretrained(folder).float().eval().requires_grad_(False)


def embedded(image_encoder: CLIPVisionModelWithProjection, pictures: Tensor) -> Tensor:
    """The embeddings of pictures in [-1, 1]."""
    with torch.no_grad():
        return torch.cat([image_encoder(normalised(some)).image_embeds for some in torch.split(pictures, 64)])


class Drawing:
    """The world's latents, and the embeddings to draw them from: of themselves, of the flat emoji, of other views."""

    def __init__(self, args: argparse.Namespace) -> None:
        stems = [thing.stem for thing in world.things(args.data)]
        image_encoder = from_folder(CLIPVisionModelWithProjection, args.models / "kandinsky-2.2-prior/image_encoder")
        self.movq = from_folder(VQModel, args.models / "kandinsky-2.2-decoder/movq")
        self.solid, flat = (cutouts(args.data, stems, kind) for kind in (False, True))
        self.pictures = pixels(args.data, stems)
        self.clean = encoded(self.movq, self.pictures)
        torch.manual_seed(args.seed)
        views = [view(self.solid if i % 3 else flat) for i in range(VIEWS)]
        self.seen = torch.stack([embedded(image_encoder, one) for one in (self.pictures, on_white(flat), *views)])
        # What stands for "no picture" is all zeros *after* the processor, as in diffusers' get_zero_embed.
        with torch.no_grad():
            self.nothing = image_encoder(torch.zeros(1, 3, world.SIZE, world.SIZE)).image_embeds
        betas = torch.linspace(networks.BETA_START, networks.BETA_END, networks.TRAIN_STEPS, dtype=torch.float64)
        self.alphas = torch.cumprod(1 - betas, 0).float()

    def embeds(self, chosen: Tensor) -> Tensor:
        """Half of themselves, half of other views; a little off, as the prior is; one in ten of nothing."""
        count = len(chosen)
        which = torch.where(torch.rand(count) < 0.5, 0, torch.randint(len(self.seen), (count,)))
        seen = self.seen[which, chosen]
        seen = seen + 0.2 * torch.rand(count, 1) * self.seen[0].std(0) * torch.randn_like(seen)
        return torch.where(torch.rand(count, 1) < NOTHING, self.nothing, seen)

    def loss(self, unet: UNet2DConditionModel, clean: Tensor, embeds: Tensor, *beside: Tensor) -> Tensor:
        """Nichol & Dhariwal's hybrid: the noise, min-SNR weighted, and a little of the bound, for the variance alone."""
        count = len(clean)
        steps = ((torch.randperm(count) + torch.rand(count)) / count * networks.TRAIN_STEPS).long()
        kept, noise = self.alphas[steps].view(-1, 1, 1, 1), torch.randn_like(clean)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        output: Tensor = unet(torch.cat([noisy, *beside], 1), steps, None, added_cond_kwargs={"image_embeds": embeds}).sample
        predicted, share = output.chunk(2, 1)
        ratio = kept / (1 - kept)
        simple = (ratio.clamp(max=5) / ratio * (predicted - noise) ** 2).mean()
        return simple + 0.1 * self.bound(steps.clamp(min=1), share, (predicted - noise).detach())

    def bound(self, steps: Tensor, share: Tensor, error: Tensor) -> Tensor:
        """How far the step the network would take is from the true one (a divergence of two Gaussians).

        `share` says where the variance's logarithm lies between its bounds: -1 the lower, 1 the upper one.
        """
        kept, before = (self.alphas[at].view(-1, 1, 1, 1) for at in (steps, steps - 1))
        upper = 1 - kept / before
        lower = (1 - before) / (1 - kept) * upper
        logarithm = torch.lerp(lower.log(), upper.log(), (share + 1) / 2)
        off = upper * (before / kept / (1 - kept)).sqrt() * error
        return 0.5 * (logarithm - lower.log() - 1 + (lower + off**2) / logarithm.exp()).mean()


class Inpainting(Drawing):
    """Pictures with holes; into a hole goes the rest of the picture or, small enough to fit, another thing."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        rng, count = random.Random(f"{args.seed}/holes"), len(self.pictures)
        self.asked = torch.arange(count).repeat(HOLES)
        around = torch.tensor([i if rng.random() < 0.35 else rng.randrange(count) for i in self.asked.tolist()])
        holes = torch.stack([hole(rng) for _ in self.asked])
        filled = [
            self.pictures[b] if a == b else torch.where(cut > 0.5, fitted(self.solid[a], cut), self.pictures[b])
            for a, b, cut in zip(self.asked.tolist(), around.tolist(), holes, strict=True)
        ]
        # diffusers' pipeline lets the hole grow by a cell, and hides what is in it in latent space, not in the picture.
        grown = max_pool2d(interpolate(holes, size=self.clean.shape[-2:]), 3, 1, 1)
        self.keep = 1 - grown
        self.hidden = self.clean[around] * self.keep
        self.whole = self.hidden + grown * encoded(self.movq, torch.stack(filled))


def fitted(cut: Tensor, mask: Tensor) -> Tensor:
    """A cutout on white, as large as the hole's box and stretched to it by no more than a half."""
    rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    high, wide = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    height, width = min(high, wide * 3 // 2), min(wide, high * 3 // 2)
    top, left = top + (high - height) // 2, left + (wide - width) // 2
    page = torch.zeros_like(cut)
    small = interpolate(cut[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    page[:, top : top + height, left : left + width] = small[0]
    return on_white(page[None])[0]
