"""Stages wired into whole jobs: chain files, the plan, the runner, what is written beside a picture."""
