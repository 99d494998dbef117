"""A denoiser that computes once for a run what depends on the prompt or the schedule alone.

Of a prompt: keys and values of every cross attention, and the context itself where the network makes it (Kandinsky). Of
the schedule: the embedding of every timestep, and what each block makes of it. All of it is looked up by the very tensors
it was made of and by the state of the weights, so that whatever was changed is computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...core.conditioning import Conditioning
from ...core.denoiser import ConditionalDenoiser, UNetDenoiser, UpscalerDenoiser, told, with_channels_of
from ...core.prediction import Prediction
from ...core.schedule import Schedule
from .network import fast_of
from .shared import Shared
from .unet import embed, plain_config
from .untouched import Version, fault, keepable, pristine, version, versions

AT_MOST = 4
"""Conditionings kept at a time: guidance in two calls has two, and a run that changes its prompt should not grow."""


def prepared(denoiser: ConditionalDenoiser, schedule: Schedule) -> ConditionalDenoiser:
    """The same denoiser, keeping for one run what does not change in it; itself if its UNet was not optimised.

    Wraps ``model.denoiser`` before guidance does: ``classifier_free(prepared(model.denoiser, schedule), cond, uncond)``.
    The results are the same. What is kept lives as long as the denoiser that is returned. Weights written to through
    ``.data``, of which torch keeps no count, are not seen: prepare anew after diffusers' ``fuse_lora``.
    """
    if type(denoiser) not in (UNetDenoiser, UpscalerDenoiser):
        return denoiser
    unet: Any = getattr(denoiser, "unet", None)
    if fast_of(unet) is None or not plain_config(unet.config):
        return denoiser
    return FastDenoiser(denoiser, schedule)  # type: ignore[arg-type]


@dataclass
class FastDenoiser:
    """A :class:`UNetDenoiser` or :class:`UpscalerDenoiser` of an optimised UNet; see :func:`prepared`."""

    inner: UNetDenoiser | UpscalerDenoiser
    schedule: Schedule
    kept: list[Kept] = field(default_factory=list, repr=False)

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """As the denoiser's own."""
        made = fast_of(self.inner.unet)
        if made is None or torch.is_grad_enabled():
            return self.inner(x, sigma, timestep, conditioning)
        kept = self.kept_for(conditioning, x)
        if kept is None:
            return self.inner(x, sigma, timestep, conditioning)
        latents = with_channels_of(kept.ready, self.inner.scaled(x, sigma), self.inner.unet.config.in_channels)
        at = kept.go_to(self.inner.tells(sigma, timestep), x)
        with using(made.shared, kept):
            out = self.inner.unet(latents, at, **kept.arguments, return_dict=False)[0]
        return self.inner.read(out, x, sigma)

    def kept_for(self, conditioning: Conditioning, x: Tensor) -> Kept | None:
        """What is kept of a conditioning, made now if nothing is; None if it cannot be known when it changes."""
        for kept in self.kept:
            if kept.still(conditioning, x):
                return kept
        weights = list(self.inner.unet.parameters())
        elsewhere = any(w.device != x.device for w in weights)  # offloaded: it comes when it is called, or layer by layer
        if elsewhere or not keepable(*vars(conditioning).values(), *weights):
            return None
        gone = [k for k in self.kept if k.conditioning is conditioning and len(k.ready) == len(x)]
        self.kept = [k for k in self.kept if k not in gone][-(AT_MOST - 1) :]
        self.kept.append(keep(self.inner, self.schedule, conditioning, x))
        return self.kept[-1]


@dataclass(eq=False)
class Kept:
    """What one conditioning and one schedule make of a network.

    Args:
        conditioning: as it was given, with the state its tensors had; ``ready`` as the UNet takes it.
        arguments: what the UNet is called with; these very tensors are the keys.
        timesteps: (steps,), what the UNet is told; ``rows`` finds one by its value.
        makers, weights: what embeddings and projections were made by, and the state of its weights.
        embeddings: (steps, batch, width), None if something was put into the layers that make them.
        projections: (steps, batch, widths of all blocks), and ``parts`` of it by the layer that makes them.
        made_context: what the network made of image embeddings.
        keys: keys and values by layer, with the state of the weights that made them.
        timestep, now, now_projected: where the run is.
    """

    conditioning: Conditioning
    source: tuple[Version, ...]
    ready: Conditioning
    arguments: dict[str, Any]
    timesteps: Tensor
    rows: dict[float, int]
    makers: list[nn.Module | None]
    weights: tuple[Version, ...] = ()
    embeddings: Tensor | None = None
    projections: Tensor | None = None
    parts: dict[nn.Linear, slice] = field(default_factory=dict)
    made_context: Tensor | None = None
    keys: dict[nn.Module, tuple[Tensor, Tensor, tuple[Version, ...]]] = field(default_factory=dict)
    timestep: Tensor | None = None
    now: Tensor | None = None
    now_projected: Tensor | None = None

    def still(self, conditioning: Conditioning, x: Tensor) -> bool:
        """Whether it holds for this conditioning, these latents and the weights as they are."""
        return (
            conditioning is self.conditioning
            and len(self.ready) == len(x)
            and self.timesteps.device == x.device
            and self.source == state(conditioning)
            and self.weights == versions(*self.makers)
        )

    def go_to(self, tells: float, x: Tensor) -> Tensor:
        """Take the row of a timestep, and return that timestep as the UNet is told it."""
        row = self.rows.get(tells)
        if row is None or self.embeddings is None:
            self.timestep = self.now = self.now_projected = None
            return told(tells, x)
        self.timestep, self.now = self.timesteps[row], self.embeddings[row]
        self.now_projected = None if self.projections is None else self.projections[row]
        return self.timestep

    def row(self, tells: float, inner: UNetDenoiser | UpscalerDenoiser) -> tuple[Tensor | None, Tensor | None]:
        """Embedding and projections of a timestep, computed now if the schedule has no such."""
        if self.embeddings is None:
            return None, None
        row = self.rows.get(tells)
        if row is not None:
            return self.embeddings[row], None if self.projections is None else self.projections[row]
        at = self.timesteps.new_full((1,), tells)
        embedding = _embeddings(inner.unet, at, len(self.ready), inner.dtype, self.arguments)
        made = _project(inner.unet, embedding)
        return embedding[0], None if not made else torch.cat(list(made.values()), dim=-1)[0]

    def keys_hold(self) -> bool:
        """Whether the weights that made the keys and values are as they were."""
        return all(made_by == versions(*key_makers(layer)) for layer, (_, _, made_by) in self.keys.items())

    def note(self, layer: nn.Module) -> None:
        """The keys and values of a layer were written anew."""
        keys, values, _ = self.keys[layer]
        self.keys[layer] = keys, values, versions(*key_makers(layer))

    # --- what the network asks (shared.Keeper)

    def embedding(self, unet: Any, timestep: Any, given: dict[str, Any]) -> Tensor | None:
        """Of the timestep we are at, if it is asked for that and with our arguments, by layers still as they were."""
        if self.timestep is None or timestep is not self.timestep or not self._ours(given):
            return None
        return self.now if all(map(pristine, embedders(unet))) else None

    def projected(self, projection: nn.Linear, embedding: Tensor) -> Tensor | None:
        """What a block makes of it."""
        if self.now_projected is None or embedding is not self.now or projection not in self.parts:
            return None
        return self.now_projected[:, self.parts[projection]] if fault(projection, nn.Linear) is None else None

    def context(self, unet: Any, given: dict[str, Any]) -> Tensor | None:
        """What the network made of image embeddings."""
        usable = self.made_context is not None and self._ours(given) and pristine(unet.encoder_hid_proj)
        return self.made_context if usable else None

    def keys_values(self, layer: Any, context: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of our context, while the weights are as they were."""
        if context is not self._context or (found := self.keys.get(layer)) is None:
            return None
        if torch.compiler.is_compiling():  # whoever calls compiled code has asked before
            return found[:2]
        return found[:2] if found[2] == versions(*key_makers(layer)) else None

    def keep(self, layer: Any, context: Tensor, keys: Tensor, values: Tensor) -> None:
        """In memory of their own, one after the other: they are read at every step and made once."""
        if context is self._context:
            self.keys[layer] = (keys.contiguous(), values.contiguous(), versions(*key_makers(layer)))

    @property
    def _context(self) -> Tensor | None:
        return self.arguments["encoder_hidden_states"] if self.made_context is None else self.made_context

    def _ours(self, given: dict[str, Any]) -> bool:
        mine = {**self.arguments, **(self.arguments.get("added_cond_kwargs") or {})}
        return all(given.get(name) is mine.get(name) for name in {*given, *mine} - {"added_cond_kwargs"})


class using:  # noqa: N801
    """While the network runs, its layers may look at what is kept."""

    def __init__(self, shared: Shared, kept: Kept) -> None:
        self.shared, self.kept = shared, kept

    def __enter__(self) -> None:
        self.shared.kept = self.kept

    def __exit__(self, *_: object) -> None:
        self.shared.kept = None


def keep(inner: UNetDenoiser | UpscalerDenoiser, schedule: Schedule, conditioning: Conditioning, x: Tensor) -> Kept:
    """Compute ahead what can be."""
    unet, ready = inner.unet, inner.ready(conditioning, x)
    arguments = inner.arguments(ready)
    tells = _told(inner, schedule)
    timesteps = torch.tensor(tells, dtype=torch.float32).to(x.device)
    rows = {value: row for row, value in enumerate(tells)}
    kept = Kept(conditioning, state(conditioning), ready, arguments, timesteps, rows, [*embedders(unet)])
    if unet.config.encoder_hid_dim_type == "image_proj" and pristine(unet.encoder_hid_proj):
        kept.makers.append(unet.encoder_hid_proj)
        kept.made_context = unet.process_encoder_hidden_states(None, arguments["added_cond_kwargs"])
    if tells and all(map(pristine, embedders(unet))):
        kept.embeddings = _embeddings(unet, timesteps, len(x), inner.dtype, arguments)
        made = _project(unet, kept.embeddings)
        ends = [0, *accumulate(part.shape[-1] for part in made.values())]
        kept.parts = {layer: slice(*at) for layer, at in zip(made, pairwise(ends), strict=True)}
        kept.makers += made
        kept.projections = torch.cat(list(made.values()), dim=-1) if made else None
    kept.weights = versions(*kept.makers)
    return kept


def _told(inner: UNetDenoiser | UpscalerDenoiser, schedule: Schedule) -> list[float]:
    """Everything a solver that keeps to the schedule's levels may have the UNet told."""
    levels = [s for s in schedule.sigmas if s > 0 or isinstance(inner, UNetDenoiser)]
    return list(dict.fromkeys(inner.tells(sigma, schedule.timestep_at(sigma)) for sigma in levels))


def _embeddings(unet: Any, timesteps: Tensor, batch: int, dtype: torch.dtype, arguments: dict[str, Any]) -> Tensor:
    """(steps, batch, width): every step's embedding of every image, as one large batch."""
    steps = len(timesteps)

    def tiled(given: Tensor | None) -> Tensor | None:
        return None if given is None else given.repeat(steps, *(1,) * (given.ndim - 1))

    added = {name: tiled(given) for name, given in (arguments.get("added_cond_kwargs") or {}).items()}
    emb: Tensor = embed(
        unet, timesteps.new_empty(steps * batch, 1, dtype=dtype), timesteps.repeat_interleave(batch), None,
        tiled(arguments.get("class_labels")), tiled(arguments.get("timestep_cond")), added,
    )  # fmt: skip
    return emb.view(steps, batch, -1)


def _project(unet: Any, embeddings: Tensor) -> dict[nn.Linear, Tensor]:
    """What every block makes of every step's embedding, by the layer that makes it."""
    activated, made = F.silu(embeddings), dict[nn.Linear, Tensor]()
    for block in unet.modules():
        if type(block) is ResnetBlock2D and block.time_emb_proj is not None:
            layer, start = block.time_emb_proj, embeddings if block.skip_time_act else activated
        elif type(block) is AdaGroupNorm and block.act is None:
            layer, start = block.linear, embeddings
        else:
            continue
        if fault(layer, nn.Linear) is None:
            made[layer] = layer(start)
    return made


def state(conditioning: Conditioning) -> tuple[Version, ...]:
    """Changes when one of its tensors is written to."""
    return tuple(version(t) for t in vars(conditioning).values())


def embedders(unet: Any) -> list[nn.Module | None]:
    """What makes the embedding of a timestep and of what is added to it, and what blocks make of it."""
    names = ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding", "time_embed_act")
    return [getattr(unet, name, None) for name in names]


def key_makers(layer: Any) -> tuple[nn.Module | None, ...]:
    """What makes the keys and values of a context."""
    if layer.added_kv_proj_dim is not None:
        return layer.add_k_proj, layer.add_v_proj
    return layer.norm_cross, layer.to_k, layer.to_v
