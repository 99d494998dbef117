"""One optimisation, as the three trainings share it: resumable, averaged, published now and then.

Every step draws its randomness from the seed and its own number, so a training that was killed goes on
from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
Report = dict[str, object]


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
