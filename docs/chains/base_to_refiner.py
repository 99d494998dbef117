"""SDXL's base takes four fifths of the noise away, its refiner the rest: one schedule, split."""

from unrolled import Conditioning, Model, Shelf, classifier_free, decode, denoise, encode_text, noise, with_size
from unrolled.core.denoiser import Denoiser

PROMPT = "macro photograph of a dewdrop on a leaf"

shelf = Shelf()  # Shelf("hub") for the real models
base, refiner = shelf.load("sdxl-base"), shelf.load("sdxl-refiner")

schedule = base.schedule(steps=40)
first, rest = schedule.split(schedule.index(training_time=0.8))
latents = noise(base, schedule, seeds=[0])


def guided(model: Model) -> Denoiser:
    """Each model reads the prompt its own way; both are told the picture's size."""

    def told(text: Conditioning, score: float) -> Conditioning:
        return with_size(model, text, *latents.size, aesthetic_score=score)

    cond, uncond = told(encode_text(model, PROMPT), 6.0), told(encode_text(model, None), 2.5)
    return classifier_free(model.denoiser, cond, uncond, guidance_scale=5.0)


latents = denoise(guided(base), latents, first, base.solver(steps=40))
latents = denoise(guided(refiner), latents.handed_on("refiner"), rest, refiner.solver(steps=40))
decode(refiner, latents)[0].save("base-to-refiner.png")
