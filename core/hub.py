"""Fetches models from the Hugging Face hub into its cache: of a repository only what is read, pickles only if asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .catalog import MOVED
from .checkpoint import COMPONENTS, TOKENIZERS
from .errors import BadModel
from .single_file import is_single_file
from .weights import PICKLE_ADVICE

CONFIGS = ("scheduler", "low_res_scheduler", "image_processor")
"""Folders of a model that hold no component but a config."""


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model in diffusers' layout."""
    return (folder / "model_index.json").is_file() or any((folder / part).is_dir() for part in ("unet", "prior"))


def download_folder(
    repository: str, variant: str | None, revision: str | None, weights: Collection[str], allow_pickle: bool
) -> Path:
    """A repository's model folders: all configs, and the weights of some components.

    Pickles are fetched of components that have no safetensors.

    Raises:
        BadModel: it cannot be fetched, holds no model folders, or only pickles that are not allowed.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    def fetch(wanted: list[str]) -> Path:
        skipped = None if variant else ["*.fp16.*", "*.fp16-*", "*.non_ema.*"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=skipped))

    def named(parts: Collection[str], end: str) -> list[str]:
        return [f"{part}/*.{variant}*{end}" if variant else f"{part}/*.{end}" for part in parts]

    configs = [f"{part}/*.{end}" for part in (*COMPONENTS, *CONFIGS) for end in ("json", "txt")]
    with _hub_faults(repository):
        folder = fetch(["model_index.json", *configs, *named(weights, "safetensors")])
        if not is_model(folder):
            refuse_single_files(repository, list_repo_files(repository, revision=revision))
        parts = [part for part in weights if part not in TOKENIZERS and (folder / part).is_dir()]
        bare = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
        if bare and allow_pickle:
            fetch(named(bare, "bin"))
        elif bare:
            files = list_repo_files(repository, revision=revision)
            if pickles := [file for part in bare for file in files if file.startswith(f"{part}/") and file.endswith(".bin")]:
                raise BadModel(f"{repository} holds only pickled weights ({pickles[0]}), {PICKLE_ADVICE}")
    return folder


def download_component(name: str, revision: str | None, variant: str | None, weights: bool) -> Path:
    """One component that is a repository, ``owner/name``, or a folder in one, ``owner/name/folder``.

    Raises:
        BadModel: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    owner, repository, *inside = name.split("/")
    folder = "/".join(inside)
    files = ["config.json", *([f"*.{variant}*safetensors" if variant else "*.safetensors"] if weights else [])]
    wanted = [f"{folder}/{file}" if folder else file for file in files]
    skipped = None if variant else ["*.fp16.*", "*.fp16-*"]
    with _hub_faults(name):
        found = snapshot_download(f"{owner}/{repository}", revision=revision, allow_patterns=wanted, ignore_patterns=skipped)
    return Path(found) / folder


def download_file(name: str, revision: str | None) -> Path:
    """A file of a repository, given as ``owner/name/file``.

    Raises:
        BadModel: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    owner, repository, inside = name.split("/", 2)
    repository = MOVED.get(f"{owner}/{repository}", f"{owner}/{repository}")
    with _hub_faults(name):
        return Path(hf_hub_download(repository, inside, revision=revision))


def refuse_single_files(name: str, files: Collection[str]) -> None:
    """Raise BadModel if a place that holds no model folders holds whole checkpoints in one file each."""
    if single := [file for file in files if is_single_file(file)]:
        raise BadModel(
            f"{name} holds no model folders but {', '.join(single[:5])}{', …' * (len(single) > 5)}: "
            f"name the file, as {name}/{single[0]}."
        )


@contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadModel(
            f"{name} could not be fetched from the hub ({reason}): check the name and the network, "
            "or give a folder with --models FOLDER."
        ) from error
