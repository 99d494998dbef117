"""A part of a picture repainted, enlarged, repainted in detail by SDXL's refiner, and gone over by the same refiner."""

from PIL import Image, ImageOps
from unrolled import (
    Conditioning,
    Shelf,
    add_noise,
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
    read_picture,
    resize,
    start_step,
    unit_noise,
    with_channels,
    with_size,
)
from unrolled.chains.read import PACKAGED

PROMPT = "concept art digital painting of an elven castle, inspired by lord of the rings, highly detailed, 8k"

shelf = Shelf()  # Shelf("hub") for the real models
sd, refiner = shelf.load("sd-1.5-inpainting"), shelf.load("sdxl-refiner")

picture = read_picture(PACKAGED / "inputs" / "mountain.jpg")
picture = ImageOps.fit(picture, (sd.native_size, sd.native_size), Image.Resampling.LANCZOS)
white = read_mask(PACKAGED / "inputs" / "mask.png")
mask = ImageOps.fit(white, picture.size, Image.Resampling.LANCZOS)

channels = inpaint_channels(sd, picture, mask, seeds=[0])
cond, uncond = (with_channels(encode_text(sd, prompt), channels) for prompt in (PROMPT, ""))
schedule, solver = sd.schedule(25, "dpm++2m"), sd.solver(25, "dpm++2m")
start = noise(sd, schedule, picture.height, picture.width, seeds=[0])
latents = denoise(classifier_free(sd.denoiser, cond, uncond, 7.5), start, schedule, solver)
picture = resize(composite(picture, decode(sd, latents)[0], mask), factor=2.0)
mask = ImageOps.fit(white, picture.size, Image.Resampling.LANCZOS)


def told(text: Conditioning, score: float) -> Conditioning:
    """SDXL is told the picture's size, its refiner how beautiful it is to be."""
    return with_size(refiner, text, picture.height, picture.width, aesthetic_score=score)


cond, uncond = told(encode_text(refiner, PROMPT), 6.0), told(encode_text(refiner, None), 2.5)

whole, solver = refiner.schedule(steps=30), refiner.solver(steps=30)
schedule = whole[start_step(30, strength=0.3) :]
clean = encode_image(refiner, picture, seeds=[0], stream="detail")
keep = keep_known(latent_mask(mask, refiner.space), known(clean, unit_noise(clean), schedule))
denoiser = classifier_free(refiner.denoiser, cond, uncond, guidance_scale=7.5)
latents = denoise(denoiser, add_noise(clean, schedule), schedule, solver, hooks=[keep])

schedule = whole[start_step(30, strength=0.15) :]
denoiser = classifier_free(refiner.denoiser, cond, uncond, guidance_scale=5.0)
latents = denoise(denoiser, add_noise(latents.handed_on("final"), schedule), schedule, solver)
decode(refiner, latents)[0].save("inpaint-to-image-to-image.png")
