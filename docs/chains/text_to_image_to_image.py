"""Stable Diffusion composes, Kandinsky paints it again: through pixels, because their latent spaces differ."""

from unrolled import (
    Shelf,
    add_noise,
    classifier_free,
    decode,
    denoise,
    encode_image,
    encode_text,
    noise,
    sample_prior,
    start_step,
    zero_image_embeds,
)

PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"

shelf = Shelf()  # Shelf("hub") for the real models
sd, kandinsky, prior = shelf.load("sd-1.5"), shelf.load("kandinsky-2.2-decoder"), shelf.load_prior()

schedule, solver = sd.schedule(25, "dpm++2m"), sd.solver(25, "dpm++2m")
denoiser = classifier_free(sd.denoiser, encode_text(sd, PROMPT), encode_text(sd, ""), guidance_scale=7.5)
picture = decode(sd, denoise(denoiser, noise(sd, schedule, seeds=[0]), schedule, solver))[0]

schedule = kandinsky.schedule(steps=25)
schedule = schedule[start_step(25, strength=0.5) :]
latents = add_noise(encode_image(kandinsky, picture, seeds=[0], stream="kandinsky"), schedule)
cond, uncond = sample_prior(prior, PROMPT, seeds=[0], stream="kandinsky"), zero_image_embeds(prior)
denoiser = classifier_free(kandinsky.denoiser, cond, uncond, guidance_scale=4.0)
latents = denoise(denoiser, latents, schedule, kandinsky.solver(steps=25))
decode(kandinsky, latents)[0].save("text-to-image-to-image.png")
