"""Tiny but genuine Stable Diffusion checkpoints, and the scripts that trained them."""
