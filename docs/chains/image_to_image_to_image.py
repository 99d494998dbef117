"""A picture changed a little, then drawn as a comic, then as pixel art: one latent space, decoded once."""

from PIL import Image, ImageOps
from unrolled import Shelf, add_noise, classifier_free, decode, denoise, encode_image, encode_text, read_picture, start_step
from unrolled.chains.read import PACKAGED

STAGES = {
    "sd-1.5": "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
    "comic-diffusion": "Astronaut in a jungle, charliebo artstyle",
    "pixel-art-style": "Astronaut in a jungle, pixelartstyle",
}

shelf = Shelf()  # Shelf("hub") for the real models
sd = shelf.load("sd-1.5")
picture = read_picture(PACKAGED / "inputs" / "astronaut.jpg")
picture = ImageOps.fit(picture, (sd.native_size, sd.native_size), Image.Resampling.LANCZOS)
latents = encode_image(sd, picture, seeds=[0])

for stream, (name, prompt) in zip(["", "comic", "pixels"], STAGES.items(), strict=True):
    model = shelf.load(name)  # VAE and text encoder are the first one's: loaded once
    schedule = model.schedule(25, "dpm++2m")[start_step(25, strength=0.6) :]
    denoiser = classifier_free(model.denoiser, encode_text(model, prompt), encode_text(model, ""), guidance_scale=7.5)
    start = add_noise(latents.handed_on(stream), schedule)  # every stage draws its own noise
    latents = denoise(denoiser, start, schedule, model.solver(25, "dpm++2m"))

decode(sd, latents)[0].save("image-to-image-to-image.png")
