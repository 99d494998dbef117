"""What a stage is handed: a picture, latents, noise; and whether it can start from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.checkpoint import encoder_fingerprint
from ..core.errors import BadInput
from ..core.latents import Latents
from ..core.source import Source, enlarges
from ..core.weights import has_weights
from ..stages.pictures import read_mask, read_picture, require_size
from ..stages.upscale import require_enlargeable
from .chain import Chain, Denoising, FromPicture, ImageToImage, Inpaint, TextToImage

if TYPE_CHECKING:
    from .plan import StagePlan


@dataclass(frozen=True)
class Handed:
    """What a stage starts from.

    Args:
        size: width and height in pixels.
        takes: in words.
        sigma: how noisy it is, for a stage that goes on from there.
        decodes: whether latents of the stage before have to be decoded for it.
        goes_on: whether it comes noisy from the stage before.
        notes: what the plan should say of it.
    """

    size: tuple[int, int]
    takes: str
    sigma: float | None = None
    decodes: bool = False
    goes_on: bool = False
    notes: tuple[str, ...] = ()


def what_is_handed(chain: Chain, stage: Denoising, before: StagePlan | None, source: Source) -> Handed:
    """What a stage starts from, checked.

    Raises:
        BadInput: there is nothing, or it does not fit the stage or its model.
    """
    native, cell = source.sizes()
    if isinstance(stage, FromPicture):
        handed = _input(chain, stage, before, source, native)
    else:
        assert isinstance(stage, TextToImage)
        handed = Handed((stage.width or native, stage.height or native), "noise")
    require_size(handed.size, cell, "The size")
    if source.system == "x2":
        require_enlargeable(handed.size, cell)
    if isinstance(stage, Inpaint):
        _require_mask(chain, stage, handed.size)
    return handed


def pixels_of(before: StagePlan | None) -> tuple[int, int]:
    """Width and height of the finished picture of the stage before; BadInput if there is none."""
    if before is None:
        raise BadInput("there is no picture to work on: put a stage before it.")
    if before.left_noisy:
        raise BadInput(
            f"it is handed latents at sigma {before.end:.3g}, which are no picture yet: leave out stop before it."
        )
    return before.size


def _input(chain: Chain, stage: FromPicture, before: StagePlan | None, source: Source, native: int) -> Handed:
    noisy = isinstance(stage, ImageToImage) and stage.start != "strength"
    if stage.image is not None:
        picture, side = read_picture(chain.folder / stage.image), native // enlarges(source.system)
        return Handed((side, side), f"{stage.image}, fitted") if stage.fit else Handed(picture.size, stage.image)
    if stage.latents is not None:
        return _from_file(chain, stage, source, noisy)
    if before is None:
        raise BadInput('there is no picture to start from: give image = "file.png" or put a stage before it.')
    if noisy:
        if not before.left_noisy:
            raise BadInput('start = "handoff" needs a stage before it that stops early (stop = { steps_fraction = 0.8 }).')
        _require_same_space(stage, before, source)
        return Handed(before.size, "noisy latents", before.end, goes_on=True)
    if before.left_noisy:
        raise BadInput(
            f'it is handed latents at sigma {before.end:.3g}: give start = "handoff", or leave out stop before it.'
        )
    composited = isinstance(before.stage, Inpaint) and before.stage.composite
    wants_pixels = isinstance(stage, Inpaint) or source.system == "x4" or stage.via == "pixels"
    if wants_pixels or composited or before.run is None:
        notes: tuple[str, ...] = ()
        if before.source is not None and not _may_share(source, before.source):
            notes = (f"through pixels, because the latent spaces of {before.source.name} and {source.name} differ",)
        return Handed(before.size, "pixels", decodes=True, notes=notes)
    _require_same_space(stage, before, source)
    return Handed(before.size, "latents")


def _from_file(chain: Chain, stage: FromPicture, source: Source, noisy: bool) -> Handed:
    latents, name = Latents.load(chain.folder / str(stage.latents)), str(stage.latents)
    if not noisy:
        latents.require_clean("start from")
    if len(latents) not in (1, chain.batch):
        raise BadInput(f"{name} holds {len(latents)} images, but the chain makes {chain.batch}: set its batch.")
    own = _encoder(source)
    if own is not None and own != latents.space.fingerprint:
        raise BadInput(f"{name} holds latents of another VAE than that of {stage.model}: decode them and give image.")
    return Handed((latents.size[1], latents.size[0]), name, latents.sigma if noisy else None)


def _require_mask(chain: Chain, stage: Inpaint, size: tuple[int, int]) -> None:
    mask = read_mask(chain.folder / stage.mask)
    if mask.size != size and not stage.fit:
        raise BadInput(
            f"the mask is {mask.width}x{mask.height} but the picture is {size[0]}x{size[1]}: "
            "they must be of one size, or say fit = true."
        )


def _require_same_space(stage: Denoising, before: StagePlan, source: Source) -> None:
    if before.source is None or _may_share(source, before.source):
        return
    names = f"{source.name} and {before.source.name} have different VAEs, so latents cannot be handed on"
    if before.left_noisy:
        raise BadInput(f"{names} while they are noisy: let two models of one VAE share a run.")
    raise BadInput(f'{names}: say via = "pixels" to decode and encode in between.')


def _may_share(one: Source, other: Source) -> bool:
    """Whether two models have one latent space, as far as the weights on this disk tell."""
    prints = {_encoder(one), _encoder(other)}
    return None in prints or len(prints) == 1


def _encoder(source: Source) -> str | None:
    """The encoder's fingerprint if its weights are on this disk."""
    part = source.part(source.vae)
    return encoder_fingerprint(part) if has_weights(part) else None
