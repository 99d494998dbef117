"""A picture changed, enlarged twice in latent space, then four times from its pixels."""

from PIL import Image, ImageOps
from unrolled import (
    Shelf,
    add_noise,
    classifier_free,
    decode,
    denoise,
    encode_image,
    encode_text,
    enlarged_size,
    noise,
    read_picture,
    start_step,
    with_latents,
    with_low_res,
)
from unrolled.chains.read import PACKAGED

PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"

shelf = Shelf()  # Shelf("hub") for the real models
sd, x2, x4 = shelf.load("sd-1.5"), shelf.load("x2-latent-upscaler"), shelf.load("x4-upscaler")

picture = read_picture(PACKAGED / "inputs" / "astronaut.jpg")
picture = ImageOps.fit(picture, (sd.native_size, sd.native_size), Image.Resampling.LANCZOS)
schedule = sd.schedule(25, "dpm++2m")[start_step(25, strength=0.6) :]
denoiser = classifier_free(sd.denoiser, encode_text(sd, PROMPT), encode_text(sd, ""), guidance_scale=7.5)
start = add_noise(encode_image(sd, picture, seeds=[0]), schedule)
small = denoise(denoiser, start, schedule, sd.solver(25, "dpm++2m"))

schedule = x2.schedule(steps=12)
cond, uncond = (with_latents(x2, encode_text(x2, prompt), small) for prompt in (PROMPT, ""))
start = noise(x2, schedule, *enlarged_size(x2, small.size), seeds=[0], stream="x2")
latents = denoise(classifier_free(x2.denoiser, cond, uncond, guidance_scale=1.5), start, schedule, x2.solver(steps=12))

twice = decode(x2, latents)
schedule = x4.schedule(steps=12)
cond, uncond = (with_low_res(x4, encode_text(x4, prompt), twice, seeds=[0], stream="x4") for prompt in (PROMPT, ""))
start = noise(x4, schedule, *enlarged_size(x4, latents.size), seeds=[0], stream="x4")
latents = denoise(classifier_free(x4.denoiser, cond, uncond, guidance_scale=1.5), start, schedule, x4.solver(steps=12))
decode(x4, latents)[0].save("image-to-upscaler-to-super-resolution.png")
