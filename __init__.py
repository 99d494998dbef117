"""The diffusion pipeline, unrolled."""
