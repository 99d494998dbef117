"""Noise schedules, spacings and solvers: tensors and floats in, tensors and floats out."""

from .dpmpp import DPMpp2M
from .euler import DDIM, DDPM, Euler, EulerAncestral
from .heun import Heun
from .pndm import PLMS, PNDM

__all__ = ["DDIM", "DDPM", "PLMS", "PNDM", "DPMpp2M", "Euler", "EulerAncestral", "Heun"]
