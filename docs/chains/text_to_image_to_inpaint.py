"""Stable Diffusion paints a castle, Kandinsky a waterfall into the white part of a mask."""

from PIL import Image, ImageOps
from unrolled import (
    Shelf,
    classifier_free,
    composite,
    decode,
    denoise,
    encode_image,
    encode_text,
    inpaint_channels,
    keep_known,
    known,
    latent_mask,
    noise,
    read_mask,
    sample_prior,
    unit_noise,
    with_channels,
    zero_image_embeds,
)
from unrolled.chains.read import PACKAGED

CASTLE = "concept art digital painting of an elven castle, inspired by lord of the rings, highly detailed, 8k"
WATERFALL = "digital painting of a fantasy waterfall, cloudy"

shelf = Shelf()  # Shelf("hub") for the real models
sd, kandinsky, prior = shelf.load("sd-1.5"), shelf.load("kandinsky-2.2-decoder-inpaint"), shelf.load_prior()

schedule, solver = sd.schedule(25, "dpm++2m"), sd.solver(25, "dpm++2m")
denoiser = classifier_free(sd.denoiser, encode_text(sd, CASTLE), encode_text(sd, ""), guidance_scale=7.5)
picture = decode(sd, denoise(denoiser, noise(sd, schedule, seeds=[0]), schedule, solver))[0]
mask = ImageOps.fit(read_mask(PACKAGED / "inputs" / "mask-below.png"), picture.size, Image.Resampling.LANCZOS)

schedule, solver = kandinsky.schedule(steps=25), kandinsky.solver(steps=25)
clean = encode_image(kandinsky, picture, seeds=[0], stream="waterfall")
channels = inpaint_channels(kandinsky, picture, mask, seeds=[0], stream="waterfall", clean=clean)
embeds = sample_prior(prior, WATERFALL, seeds=[0], stream="waterfall")
cond, uncond = (with_channels(c, channels) for c in (embeds, zero_image_embeds(prior)))
denoiser = classifier_free(kandinsky.denoiser, cond, uncond, guidance_scale=4.0)
start = noise(kandinsky, schedule, picture.height, picture.width, seeds=[0], stream="waterfall")
keep = keep_known(latent_mask(mask, kandinsky.space), known(clean, unit_noise(clean), schedule))
painted = decode(kandinsky, denoise(denoiser, start, schedule, solver, hooks=[keep]))[0]
composite(picture, painted, mask).save("text-to-image-to-inpaint.png")
