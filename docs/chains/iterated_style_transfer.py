"""A picture drawn as a comic over and over, each time on what came out before, as a GIF."""

from pathlib import Path

from PIL import Image, ImageOps
from unrolled import (
    Shelf,
    add_noise,
    classifier_free,
    decode,
    denoise,
    encode_image,
    encode_text,
    gif,
    read_picture,
    start_step,
)
from unrolled.chains.read import PACKAGED

comic = Shelf().load("comic-diffusion")  # Shelf("hub") for the real model
cond, uncond = encode_text(comic, "Astronaut in a jungle, charliebo artstyle"), encode_text(comic, "")
denoiser = classifier_free(comic.denoiser, cond, uncond, guidance_scale=7.5)
schedule, solver = comic.schedule(20, "dpm++2m")[start_step(20, strength=0.4) :], comic.solver(20, "dpm++2m")

picture = read_picture(PACKAGED / "inputs" / "astronaut.jpg")
picture = ImageOps.fit(picture, (comic.native_size, comic.native_size), Image.Resampling.LANCZOS)
latents, frames = encode_image(comic, picture, seeds=[0]), []
for count in range(6):
    start = add_noise(latents.handed_on(f"/{count}" if count else ""), schedule)
    latents = denoise(denoiser, start, schedule, solver)
    frames += decode(comic, latents)
frames[-1].save("iterated-style-transfer.png")
Path("iterated-style-transfer.gif").write_bytes(gif(frames))
