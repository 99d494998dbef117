"""One optimisation, as the three trainings share it: resumable, averaged, published now and then.

Every step draws its randomness from the seed and its own number, so a training that was killed goes on
from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

HERE: Final = Path(__file__).parent

Losses = dict[str, Tensor]
Report = dict[str, object]


class Recipe(NamedTuple):
    """One training: what runs it, the miniature it makes, and its batch, learning rate and steps."""

    train: Callable[[argparse.Namespace], None]
    folder: str
    batch: int
    lr: float
    steps: int


Recipes = Mapping[str, Recipe]


def command(recipes: Recipes, about: str | None) -> None:
    """`python -P -m unrolled.miniatures.train vae --data DATA --work WORK`, and so on."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("what", choices=recipes)
    parser.add_argument("--data", type=Path, required=True, help="folder with the npm packages, unpacked")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--models", type=Path, default=HERE, help="folder for the finished miniatures")
    parser.add_argument("--steps", type=int, help="how many steps in all")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = recipes[args.what]
    args.batch, args.lr, args.steps = args.batch or recipe.batch, args.lr or recipe.lr, args.steps or recipe.steps
    args.out, args.text_to_image = args.models / recipe.folder, args.models / "sd-1.5"
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    recipe.train(args)


class Training:
    """One optimisation: AdamW, warm-up then cosine decay, a moving average of the weights, checkpoints."""

    def __init__(self, parts: dict[str, nn.Module], args: argparse.Namespace, average: float) -> None:
        self.parts = nn.ModuleDict(parts)
        self.args, self.average = args, average
        self.state: Path = args.work / f"{args.what}.pt"
        weights = [p for p in self.parts.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(weights, args.lr, betas=(0.9, 0.98), weight_decay=1e-3)
        self.smooth = {name: value.clone() for name, value in self.parts.state_dict().items()}
        self.done, self.seconds, self.curve = 0, 0.0, list[dict[str, float]]()
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.parts.load_state_dict(saved["parts"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.smooth, self.done = saved["smooth"], saved["done"]
            self.seconds, self.curve = saved["seconds"], saved["curve"]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        decay = 0.5 * (1 + math.cos(math.pi * step / self.args.steps))
        return float(self.args.lr) * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * decay)

    def run(self, losses: Callable[[int], Losses], publish: Callable[[Report], None]) -> None:
        """Train to the last step, publishing the averaged weights now and then."""
        begun, sums = time.monotonic() - self.seconds, dict[str, list[float]]()
        for step in range(self.done, self.args.steps):
            torch.manual_seed(self.args.seed * 1_000_003 + step)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate(step)
            terms = losses(step)
            terms["loss"].backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
            keep = min(self.average, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in self.parts.state_dict().items():
                    self.smooth[name].lerp_(value, 1 - keep)
            for name, term in terms.items():
                sums.setdefault(name, []).append(term.item())
            if (step + 1) % 50 == 0:
                self.seconds = time.monotonic() - begun
                self.curve.append(
                    {"step": step + 1, **{name: round(sum(values) / len(values), 5) for name, values in sums.items()}}
                )
                print(self.curve[-1], f"{self.seconds:.0f} s", flush=True)
                sums.clear()
            self.done = step + 1
            if self.done % self.args.every == 0 or self.done == self.args.steps:
                self.save()
                self.show(publish)

    def save(self) -> None:
        """A checkpoint that is either the old one or the new one."""
        part = self.state.with_suffix(".part")
        saved = {"parts": self.parts.state_dict(), "optimiser": self.optimiser.state_dict(), "smooth": self.smooth}
        torch.save({**saved, "done": self.done, "seconds": self.seconds, "curve": self.curve}, part)
        part.replace(self.state)

    def show(self, publish: Callable[[Report], None]) -> None:
        """Publish with the averaged weights in place of the current ones."""
        current = {name: value.clone() for name, value in self.parts.state_dict().items()}
        self.parts.load_state_dict(self.smooth)
        args = {"seed": self.args.seed, "batch": self.args.batch, "lr": self.args.lr, "steps": self.args.steps}
        samples, minutes = self.done * self.args.batch, round(self.seconds / 60, 1)
        with torch.no_grad():
            publish({**args, "done": self.done, "samples": samples, "minutes": minutes, "curve": self.curve})
        self.parts.load_state_dict(current)
