"""Noise schedules, spacings and solvers: tensors and floats in, tensors and floats out."""

from .adams import DEIS, IPNDM, LMS
from .churn import Churned
from .clip import Clipped, Thresholded
from .dpm import DPMpp2M, DPMpp2MSDE, DPMpp3M, DPMpp3MSDE, DPMSolver
from .dpmpp_sde import DPMppSDE
from .euler import DDIM, DDPM, Euler, EulerAncestral
from .heun import Heun
from .pndm import PLMS, PNDM
from .renoise import LCM, TCD, Ancestral, Renoised, ToZero
from .sa import SASolver, TauBetween
from .singlestep import DPM2, DPMpp2S, Singlestep
from .unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "IPNDM",
    "LCM",
    "LMS",
    "PLMS",
    "PNDM",
    "TCD",
    "Ancestral",
    "Churned",
    "Clipped",
    "DPMSolver",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3MSDE",
    "DPMppSDE",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Renoised",
    "SASolver",
    "Singlestep",
    "TauBetween",
    "Thresholded",
    "ToZero",
    "UniPC",
]
