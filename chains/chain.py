"""What a chain is: its stages and their keys, checked one by one. `read.py` reads them from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, model_validator

from ..stages.image import Posterior
from ..stages.inpaint import Downsample
from .adapters import Checked, ControlOptions, ImagePromptOptions, LoraOptions


class Cut(Checked):
    """Where a run stops early, in exactly one way (see :meth:`unrolled.core.schedule.Schedule.index`)."""

    step: int | None = None
    steps_fraction: float | None = None
    sigma: float | None = None
    training_time: float | None = None

    def given(self) -> dict[str, float]:
        """The one way that was given."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    @model_validator(mode="after")
    def _one_way(self) -> Cut:
        if len(self.given()) != 1:
            raise ValueError("give exactly one of step, steps_fraction, sigma or training_time")
        return self


class Named(Checked):
    """What every stage may be told."""

    name: str = ""
    after: str | None = Field(None, description="the stage whose output this one takes; by default the one before")


class SizeConditioning(Checked):
    """What SDXL is told of the pictures to be like (see :func:`unrolled.stages.size.with_size`)."""

    original: tuple[int, int] | None = Field(None, description="(height, width)")
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic_score: float | None = Field(None, description="the refiner's, by default 6.0, and 2.5 for the negative")


class Ingredient(Checked):
    """A prompt or a picture, and how much of it goes into Kandinsky's image embedding."""

    prompt: str | None = None
    image: str | None = None
    weight: FiniteFloat = 1.0

    @model_validator(mode="after")
    def _one_thing(self) -> Ingredient:
        if (self.prompt is None) == (self.image is None):
            raise ValueError("an ingredient is either a prompt or an image")
        return self


class PriorOptions(Checked):
    """How Kandinsky's prior makes an image embedding of the prompt."""

    model: str = "kandinsky-2.2-prior"
    steps: int = Field(25, ge=1, strict=True)
    guidance_scale: FiniteFloat = 4.0
    mix: tuple[Ingredient, ...] = Field((), description="prompts and pictures to blend in place of the prompt")


class Denoising(Named):
    """What every stage that denoises may be told. What is None is the system's usual (see defaults.py)."""

    model: str = "sd-1.5"
    components: dict[str, str] = Field(default_factory=dict, description="whose component to use: { unet = ... }")
    vae: str | None = Field(None, description="whose VAE to use, by the model's name")
    allow_pickle: bool = False
    prompt: str = ""
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    size: SizeConditioning | None = None
    negative_size: SizeConditioning | None = None
    prior: PriorOptions | None = None
    lora: tuple[LoraOptions, ...] = ()
    embeddings: dict[str, str] = Field(default_factory=dict, description="learned words of the prompts, and their files")
    control: tuple[ControlOptions, ...] = ()
    image_prompt: ImagePromptOptions | None = None
    steps: int = Field(30, ge=1, strict=True)
    guidance_scale: FiniteFloat | list[FiniteFloat] | None = None
    guidance_rescale: float = Field(0.0, ge=0.0, le=1.0)
    guidance_interval: tuple[int, int] | None = Field(None, description="first and last + 1 step that is guided")
    guidance_batched: bool = True
    solver: str | None = None
    scheduler: dict[str, Any] = Field(default_factory=dict, description="diffusers' scheduler options to change")
    spacing: str | None = Field(None, description="noise levels by a rule of that name, e.g. karras or kl-optimal")
    sigmas: list[FiniteFloat] | None = Field(None, description="noise levels of your own, falling; steps follow from them")
    timesteps: list[FiniteFloat] | None = Field(None, description="training timesteps of your own, likewise")
    eta: float = Field(0.0, ge=0.0, le=1.0)
    stop: Cut | None = None
    clip_skip: int = Field(0, ge=0)
    chunks: bool = False
    prompt_weights: bool = False
    tiled: bool | None = None
    faithful: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_many_steps_as_levels(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "steps" in values:
            return values
        listed: Any = values.get("sigmas") or values.get("timesteps")
        if not isinstance(listed, list | tuple):
            return values
        return values | {"steps": max(1, len(listed) - (listed[-1] == 0 and "timesteps" not in values))}

    @property
    def prompts(self) -> tuple[str, ...]:
        """All that it is told in words."""
        return tuple(p for p in (self.prompt, self.prompt_2, self.negative_prompt, self.negative_prompt_2) if p)

    @property
    def borrowed(self) -> dict[str, str]:
        """Whose components stand in for the model's own."""
        return self.components | ({"vae": self.vae} if self.vae else {})


class TextToImage(Denoising):
    """Pure noise to a picture."""

    do: Literal["text-to-image"] = "text-to-image"
    height: int | None = Field(None, ge=1, strict=True)
    width: int | None = Field(None, ge=1, strict=True)


class FromPicture(Denoising):
    """What every stage may be told that starts from a picture or latents."""

    image: str | None = Field(None, description="a picture file, instead of a stage's output")
    latents: str | None = Field(None, description="a file that Latents.save wrote, instead of a stage's output")
    fit: bool = Field(False, description="crop and resize picture and mask files to the size they are needed in")
    posterior: Posterior = "sample"
    via: Literal["pixels"] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> FromPicture:
        if self.image and self.latents:
            raise ValueError("give image or latents, not both")
        if self.via and (self.image or self.latents):
            raise ValueError("via says how a stage's output is handed on, it has no effect with a file")
        return self


class ImageToImage(FromPicture):
    """A picture or latents, noised and denoised again; or the rest of a run that was stopped."""

    do: Literal["image-to-image"] = "image-to-image"
    strength: float | None = None
    first_step: int | None = Field(None, ge=0)
    start: Literal["strength", "handoff"] | Cut = "strength"
    repeat: int = Field(1, ge=1, strict=True, description="so many times, each on what the one before made")

    @model_validator(mode="after")
    def _one_start(self) -> ImageToImage:
        if self.strength is not None and self.first_step is not None:
            raise ValueError("give strength or first_step, not both")
        set_ = (self.image, self.strength, self.first_step, self.via)
        if self.start != "strength" and any(v is not None for v in set_):
            said = 'start = "handoff"' if self.start == "handoff" else "a start at a cut"
            raise ValueError(f"{said} goes on from noisy latents: leave out image, strength, first_step and via")
        if self.repeat > 1 and (self.start != "strength" or self.stop):
            raise ValueError("repeat is for whole runs by strength: leave out start and stop")
        return self


class Inpaint(FromPicture):
    """Repaint where the mask is white."""

    do: Literal["inpaint"] = "inpaint"
    model: str = "sd-1.5-inpainting"
    strength: float | None = None
    first_step: int | None = Field(None, ge=0)
    mask: str
    mask_blur: float = Field(0.0, ge=0.0)
    downsample: Downsample = "max"
    composite: bool = True

    @model_validator(mode="after")
    def _what_goes_together(self) -> Inpaint:
        if self.strength is not None and self.first_step is not None:
            raise ValueError("give strength or first_step, not both")
        if self.mask_blur and not self.composite:
            raise ValueError("mask_blur fades the edge of the composite, it has no effect with composite = false")
        return self


class Upscale(FromPicture):
    """Twice the size from latents, or four times from a picture, by Stability's upscalers."""

    do: Literal["upscale"] = "upscale"
    model: str = "x2-latent-upscaler"
    noise_level: int | None = Field(None, ge=0, strict=True, description="what the x4 upscaler puts on the picture first")


class Sharpen(Named):
    """Unsharp masking."""

    do: Literal["sharpen"] = "sharpen"
    percent: float = Field(100.0, ge=0.0)
    radius: float = Field(1.0, gt=0.0)


class Resize(Named):
    """Lanczos by a factor."""

    do: Literal["resize"] = "resize"
    factor: float = Field(2.0, gt=0.0)


Stage = Annotated[TextToImage | ImageToImage | Inpaint | Upscale | Sharpen | Resize, Field(discriminator="do")]
STAGE: TypeAdapter[Stage] = TypeAdapter(Stage)
KINDS: dict[str, type[Named]] = {
    kind.model_fields["do"].default: kind for kind in (TextToImage, ImageToImage, Inpaint, Upscale, Sharpen, Resize)
}


class Chain(Checked):
    """A whole job: stages in order, and what is written.

    In Python: ``Chain(stages=[TextToImage(prompt="a castle"), Resize(factor=2)])``.
    """

    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, strict=True)
    batch: int = Field(1, ge=1, strict=True)
    formats: tuple[Literal["png", "jpg", "webp"], ...] = ("png",)
    grid: bool = False
    gif: bool | Literal["steps", "stages"] = Field(False, description="true is steps")
    folder: Path = Field(Path(), exclude=True, description="what file names in the chain are relative to")

    @model_validator(mode="before")
    @classmethod
    def _name_stages(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stages"), Sequence):
            stages = [s if isinstance(s, dict) else s.model_dump() for s in values["stages"]]
            return values | {"stages": [s | {"name": n} for s, n in zip(stages, stage_names(stages), strict=True)]}
        return values

    @model_validator(mode="after")
    def _order(self) -> Chain:
        names: list[str] = []
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name!r}")
            if stage.after is not None and stage.after not in names:
                raise ValueError(f"stage {stage.name!r} comes after {stage.after!r}, which is no earlier stage")
            names.append(stage.name)
        return self

    def before(self, index: int) -> Stage | None:
        """The stage whose output stage ``index`` takes."""
        after = self.stages[index].after
        if after is not None:
            return next(stage for stage in self.stages if stage.name == after)
        return self.stages[index - 1] if index else None

    def seeds(self) -> tuple[int, ...]:
        """One per image: seed + i."""
        return tuple(self.seed + i for i in range(self.batch))


def stage_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stages' own names; else what they do, numbered from the second of a kind on."""
    names: list[str] = []
    for stage in stages:
        plain = str(stage.get("name") or stage.get("do", "stage"))
        again = sum(name == plain or name.startswith(f"{plain}-") for name in names)
        names.append(plain if stage.get("name") or not again else f"{plain}-{again + 1}")
    return names
