"""Hands out the components of models, each loaded once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch

from ..kernels.backends import Backend
from ..kernels.backends import require as require_attention
from ..kernels.networks import set_attention
from ..schedulers.config import read_scheduler
from .checkpoint import COMPONENTS, TOKENIZERS, encoder_fingerprint, fingerprint, read_component
from .errors import BadInput, BadModel, Note
from .latents import LatentSpace
from .memory import WORK, Mode, Need, Offload, Placement, read_need, release
from .model import Model, Prior
from .source import Source, check_classes, find
from .weights import Part

__all__ = ["Model", "Prior", "Shelf", "load", "load_prior", "require_known_device"]

X4_SCALING = 0.08333
"""What the x4 upscaler's latents are scaled by, whatever its VAE's config says: not every copy has it, and diffusers
overrides the rest."""


class Shelf:
    """Loads models; components with the same weights are loaded once.

    Args:
        models: "miniature" (offline stand-ins), "hub", or a folder that holds model folders.
        device, dtype: where and in what precision; by default CUDA in float16 if there is one, else
            the CPU in float32.
        variant, revision: which of the weights in a folder ("fp16"), and which state of a hub repository.
        offload, vram: where components live; see :class:`Placement`. By default all on the device if they fit.
        attention: the backend of UNets, VAEs and the prior, by name: "sdpa", "xformers" or "reference"; by default
            what diffusers gives them.
        fast: whether UNets and VAEs are optimised (:func:`unrolled.kernels.fast.optimise`): the same results to
            rounding. Layer-by-layer offloading leaves nothing to optimise.

    Raises:
        BadInput: an offload, a size of memory or an attention that there is not, or that cannot run on the device.
    """

    def __init__(
        self,
        models: str = "miniature",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        *,
        offload: Offload = "auto",
        vram: int | str | None = None,
        attention: str | None = None,
        fast: bool = False,
    ) -> None:
        self.models, self.variant, self.revision = models, variant, revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.memory = Placement(self.device, offload, vram)
        require_attention(attention, self.device)
        self.attention, self.fast = attention, fast
        self._components: dict[tuple[str, str], Any] = {}
        self._placed: dict[tuple[str, str], tuple[Need, Mode]] = {}

    def find(
        self,
        name: str,
        components: Mapping[str, str] | None = None,
        *,
        weights: bool = True,
        allow_pickle: bool = False,
    ) -> Source:
        """Where a model's components lie, some of them those of other models; see :func:`find`."""
        others = components or {}

        def found(name: str, parts: Collection[str]) -> Source:
            wanted = parts if weights else False
            source = find(name, self.models, self.variant, self.revision, weights=wanted, allow_pickle=allow_pickle)
            check_classes(source)
            return source

        source = found(name, COMPONENTS.keys() - others.keys())
        own = {"vae": source.vae}  # Kandinsky's VAE is called movq
        return source.borrowing({own.get(part, part): found(other, {own.get(part, part)}) for part, other in others.items()})

    def load(
        self,
        name: str | Source,
        components: Mapping[str, str] | None = None,
        *,
        allow_pickle: bool = False,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        beside: Sequence[Part] = (),
    ) -> Model:
        """A model by short name, folder, hub id, or a whole checkpoint in one file; see :func:`find`.

        Args:
            name: or where :meth:`find` found it.
            components: whose component to use in place of the model's own: ``{"vae": "sd-1.5"}``.
            allow_pickle: read pickled weights of this model and those components, tensors only, where there are no
                safetensors.
            size, batch: width and height in pixels and number of the pictures that room is planned for; by default
                one of the model's native size. It limits nothing later.
            beside: what else will run with it (:mod:`.companions`), so that there is room for it.

        Raises:
            BadModel: it cannot be found, is damaged, of another class or not safe to read; BadInput: it does not
                fit into the memory given.
        """
        source = name if isinstance(name, Source) else self.find(name, components, allow_pickle=allow_pickle)
        if source.system == "prior":
            raise BadModel(f"{source.name} is a prior, which makes no picture: a Kandinsky decoder takes it as its prior.")
        read_scheduler(source.scheduler)  # refuse what cannot be honoured now, not after the first stage
        parts, digests = self._parts(source, size, batch, beside)
        vae = parts.pop(source.vae)
        return Model(
            source.name,
            vae=vae,
            **parts,
            scheduler=source.scheduler,
            low_res_scheduler=source.low_res_scheduler,
            index=source.index,
            space=self._space(source, vae),
            fingerprints=digests,
            device=self.device,
            dtype=self.dtype,
        )

    def load_prior(self, name: str | Source = "kandinsky-2.2-prior") -> Prior:
        """Kandinsky's prior by short name, folder or hub id; raises as :meth:`load`."""
        source = name if isinstance(name, Source) else self.find(name)
        if source.system != "prior":
            raise BadModel(f"{source.name} is no prior: use kandinsky-2.2-prior, or a folder with a prior in it.")
        parts, digests = self._parts(source)
        return Prior(
            source.name,
            **parts,
            image_processor=source.image_processor,
            scheduler=source.scheduler,
            fingerprints=digests,
            device=self.device,
            dtype=self.dtype,
        )

    def component(self, part: Part, size: tuple[int, int] = (0, 0), downscale: int = 1, batch: int = 1) -> Any:
        """One component by where it lies, loaded once and placed; sizes as for :func:`~.memory.read_need`."""
        return self._component(part, self._place(part.name, [part], size, downscale, batch)[part.name])[0]

    def placement(
        self, source: Source, size: tuple[int, int] | None = None, batch: int = 1, beside: Sequence[Part] = ()
    ) -> dict[str, tuple[Need, Mode]]:
        """What each component of a model takes of the device and where it lives, or would; no weights are read.

        ``peak(shelf.placement(source).values())`` is the memory that the model takes at its worst moment.
        Arguments and errors as for :meth:`load`.
        """
        prior = source.system == "prior"
        size, downscale = size or ((0, 0) if prior else (source.sizes()[0],) * 2), 1 if prior else source.downscale
        parts = [source.part(name) for name in source.parts if name not in TOKENIZERS]
        return self._place(source.name, [*parts, *beside], size, downscale, batch)

    def _place(
        self, name: str, parts: Sequence[Part], size: tuple[int, int], downscale: int, batch: int
    ) -> dict[str, tuple[Need, Mode]]:
        needs = {_key(part): read_need(part, self.dtype, size, downscale, batch) for part in parts}
        held = {key: (needs.get(key, need), mode) for key, (need, mode) in self._placed.items()}
        new = [need for key, need in needs.items() if key not in held]
        mode = self.memory.mode(name, new, list(held.values())) if new else "resident"
        placed = dict[str, tuple[Need, Mode]]()
        for key, need in needs.items():  # two ControlNets are two of one name
            placed[key[0] if key[0] not in placed else " ".join(key)] = held.get(key, (need, mode))
        return placed

    def keep(self, *models: str | Source | Part) -> int:
        """Forget every component that is none of these and that none of these models needs, and free it unless somebody
        still holds it.

        A component that a :class:`Model` in use refers to stays in memory: let go of the model first.

        Args:
            models: names, or sources where components are borrowed; none to forget everything.

        Returns:
            The bytes of weights freed.
        """
        kept = [self.find(model, weights=False) if isinstance(model, str) else model for model in models]
        parts = [part for held in kept for part in ([held] if isinstance(held, Part) else map(held.part, held.parts))]
        needed = set[tuple[str, str]]()
        for part in parts:
            with suppress(BadModel):  # not fetched from the hub yet, so not on the shelf
                needed.add(_key(part))
        gone = self._components.keys() - needed
        watched = [(weakref.ref(self._components[key]), self._placed.pop(key)[0]) for key in gone & self._placed.keys()]
        for key in gone:
            del self._components[key]
        release(self.device, cycles=any(component() is not None for component, _ in watched))
        return sum(need.weights for component, need in watched if component() is None)

    def _parts(
        self, source: Source, size: tuple[int, int] | None = None, batch: int = 1, beside: Sequence[Part] = ()
    ) -> tuple[dict[str, Any], dict[str, str]]:
        placed = self.placement(source, size, batch, beside)
        parts, digests = dict[str, Any](), dict[str, str]()
        for name in source.parts:
            parts[name], digests[name] = self._component(source.part(name), placed.get(name))
        return parts, digests

    def _space(self, source: Source, vae: Any) -> LatentSpace:
        scaling = 1.0 if source.vae == "movq" else X4_SCALING if source.system == "x4" else vae.config.scaling_factor
        return LatentSpace(
            family=type(vae).__name__,
            channels=vae.config.latent_channels,
            downscale=2 ** (len(vae.config.block_out_channels) - 1),
            scaling=scaling,
            fingerprint=encoder_fingerprint(source.part(source.vae)),
        )

    def _component(self, part: Part, placed: tuple[Need, Mode] | None) -> tuple[Any, str]:
        key = _key(part)
        if key not in self._components:
            component = read_component(part, self.dtype)
            if placed is not None:
                fast = self.fast and part.name in WORK
                if not fast and (part.name in WORK or part.name == "prior"):
                    # The prior has no fast form.
                    set_attention(
                        component, None if self.fast and self.attention in ("triton", "chunked") else self.attention
                    )
                self.memory.put(component, placed[1])
                if fast:
                    self._optimise(component, part.name, placed[1])
                self._placed[key] = placed
            self._components[key] = component
        return self._components[key], key[1]

    def _optimise(self, component: Any, name: str, mode: Mode) -> None:
        if mode == "layer":
            warnings.warn(f"The {name} lives layer by layer (offload), and is not made fast.", Note, stacklevel=4)
            set_attention(component, self.attention)
        else:
            from ..kernels.fast import optimise

            optimise(component, attention=cast(Backend, self.attention or "auto"))


def _key(part: Part) -> tuple[str, str]:
    """Equal for components that can stand for each other."""
    return part.name, fingerprint(part)


def load(
    name: str,
    models: str = "miniature",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """One model; to load several that share components, keep a :class:`Shelf`. Arguments as there."""
    return Shelf(models, device, dtype, variant, revision).load(name, allow_pickle=allow_pickle)


def load_prior(
    name: str = "kandinsky-2.2-prior",
    models: str = "miniature",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Prior:
    """Kandinsky's prior; arguments as for :class:`Shelf`."""
    return Shelf(models, device, dtype, variant, revision).load_prior(name)


def require_known_device(device: str) -> None:
    """Raise BadInput if torch cannot use ``device`` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"Device {device!r} cannot be used here ({str(error).splitlines()[0]}): use cpu or see unrolled doctor."
        ) from error
