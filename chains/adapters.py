"""Tables in a stage of a chain for what people bring to a model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


class Checked(BaseModel):
    """No unknown keys, no change after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


class LoraOptions(Checked):
    """A LoRA and how much of it (see :func:`unrolled.core.lora.lora`); its file alone is all of it."""

    file: str = Field(description="a .safetensors file, here or on the hub")
    weight: FiniteFloat = 1.0

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class ControlOptions(Checked):
    """A ControlNet, and the picture it is to follow (see :func:`unrolled.core.control.between`)."""

    model: str = Field(description="a folder, a hub id or a .safetensors file, for the stage's model")
    image: str
    fit: bool = Field(False, description="crop and resize the picture to the size that is painted")
    scale: FiniteFloat = 1.0
    start: float = Field(0.0, ge=0.0, le=1.0)
    end: float = Field(1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _some_steps(self) -> ControlOptions:
        if self.start >= self.end:
            raise ValueError(
                f"a ControlNet acts from a fraction of the steps to a later one, not {self.start} to {self.end}"
            )
        return self


class ImagePromptOptions(Checked):
    """A picture as a prompt, through an IP-Adapter."""

    adapter: str = Field(description="its .safetensors file, here or on the hub")
    image: str
    scale: FiniteFloat = 1.0
    image_encoder: str | None = Field(None, description="a folder or a hub's; by default image_encoder beside the adapter")
