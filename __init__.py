"""The diffusion pipeline, unrolled.

Everything a script needs is here; the map of the house is in the README.
"""

from .core.companions import load_controlnet, load_image_adapter
from .core.conditioning import Conditioning
from .core.control import Control, between, controlled
from .core.denoiser import Denoiser, PriorDenoiser, UNetDenoiser, UpscalerDenoiser, conditioned, edited
from .core.errors import Note, UnrolledError
from .core.guidance import classifier_free
from .core.image_adapter import image_prompted
from .core.latents import Latents, LatentSpace
from .core.loading import Model, Prior, Shelf, load, load_prior
from .core.loop import Step, denoise, steps
from .core.lora import lora
from .core.mixture import GaussianMixture
from .core.noise import Brownian, DiffusersNoise, Noise
from .core.prediction import Prediction
from .core.schedule import Schedule
from .core.solver import History, Past, Solver
from .core.textual_inversion import textual_inversion
from .kernels.attending import attending
from .schedulers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    IPNDM,
    LCM,
    LMS,
    PLMS,
    PNDM,
    TCD,
    Ancestral,
    Churned,
    Clipped,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Renoised,
    SASolver,
    Singlestep,
    TauBetween,
    Thresholded,
    ToZero,
    UniPC,
)
from .stages.control import with_control
from .stages.decode import decode
from .stages.finish import gif, grid, resize, sharpen
from .stages.image import encode_image
from .stages.image_prompt import with_image_prompt
from .stages.inpaint import composite, inpaint_channels, keep_known, known, latent_mask, with_channels
from .stages.noise import add_noise, noise, start_step, unit_noise
from .stages.pictures import read_mask, read_picture
from .stages.prior import blend, embed_image, sample_prior, zero_image_embeds
from .stages.size import with_size
from .stages.text import encode_text
from .stages.upscale import enlarged_size, with_latents, with_low_res

__version__ = "0.1.0"

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
    "Brownian",
    "Churned",
    "Clipped",
    "Conditioning",
    "Control",
    "DPMSolver",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3MSDE",
    "DPMppSDE",
    "Denoiser",
    "DiffusersNoise",
    "Euler",
    "EulerAncestral",
    "GaussianMixture",
    "Heun",
    "History",
    "LatentSpace",
    "Latents",
    "Model",
    "Noise",
    "Note",
    "Past",
    "Prediction",
    "Prior",
    "PriorDenoiser",
    "Renoised",
    "SASolver",
    "Schedule",
    "Shelf",
    "Singlestep",
    "Solver",
    "Step",
    "TauBetween",
    "Thresholded",
    "ToZero",
    "UNetDenoiser",
    "UniPC",
    "UnrolledError",
    "UpscalerDenoiser",
    "add_noise",
    "attending",
    "between",
    "blend",
    "classifier_free",
    "composite",
    "conditioned",
    "controlled",
    "decode",
    "denoise",
    "edited",
    "embed_image",
    "encode_image",
    "encode_text",
    "enlarged_size",
    "gif",
    "grid",
    "image_prompted",
    "inpaint_channels",
    "keep_known",
    "known",
    "latent_mask",
    "load",
    "load_controlnet",
    "load_image_adapter",
    "load_prior",
    "lora",
    "noise",
    "read_mask",
    "read_picture",
    "resize",
    "sample_prior",
    "sharpen",
    "start_step",
    "steps",
    "textual_inversion",
    "unit_noise",
    "with_channels",
    "with_control",
    "with_image_prompt",
    "with_latents",
    "with_low_res",
    "with_size",
    "zero_image_embeds",
]
