"""A picture sharpened, enlarged, and saved in three formats."""

from unrolled import Shelf, classifier_free, decode, denoise, encode_text, noise, resize, sharpen

sd = Shelf().load("sd-1.5")  # Shelf("hub") for the real model
schedule, solver = sd.schedule(25, "dpm++2m"), sd.solver(25, "dpm++2m")
cond, uncond = encode_text(sd, "a photo of a mountain"), encode_text(sd, "")
denoiser = classifier_free(sd.denoiser, cond, uncond, guidance_scale=7.5)
picture = decode(sd, denoise(denoiser, noise(sd, schedule, seeds=[0]), schedule, solver))[0]
picture = resize(sharpen(picture, percent=100.0), factor=2.0)
for ending in ("png", "jpg", "webp"):
    picture.save(f"text-to-image-and-finish.{ending}")
