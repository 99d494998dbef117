"""A film as one HTML page, and back."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ...core.errors import BadInput
from ...core.files import write_atomically
from .values import Film, Frame, Guided, Norms, Scene

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


def save(path: str | Path, film: Film, beside: Film | None = None) -> Path:
    """See :meth:`Film.save`."""
    require_html(path)
    return write_atomically(path, page(film, beside).encode(errors="replace"))


def require_html(path: str | Path) -> None:
    """Raise BadInput unless the name says that it is a page."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"A film is written as a page, but {Path(path).name!r} is no name of one: let it end in .html.")


def page(film: Film, beside: Film | None = None) -> str:
    """The page: markup, style, script and data in one, none of which may ask for anything from elsewhere."""
    films = [film] if beside is None else [beside, film]
    data = {"films": [asdict(one) for one in films], "moments": moments(films)}
    here = files(__package__)
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(film.title),
        style=style,
        script=script,
        # Whatever a prompt says, it cannot end the element it stands in.
        data=json.dumps(data, default=_text, allow_nan=False).replace("<", "\\u003c"),
        may_style=_digest(style),
        may_run=_digest(script),
    )


def load(path: str | Path) -> Film:
    """See :meth:`Film.load`."""
    try:
        found = _DATA.search(Path(path).read_text(encoding="utf-8"))
        if found is None:
            raise BadInput(f"{path} is no page that a film was saved to.")
        return _film(json.loads(found[1])["films"][-1])
    except OSError as error:
        raise BadInput(f"There is no film to read at {path} ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path} is damaged and cannot be read as a film ({error}).") from error


def moments(films: list[Film]) -> list[dict[str, Any]]:
    """The steps of one film, or of two side by side, in order: which frame each film shows, and whether they are the same.

    Frames stand side by side that are the same step of the same repetition of the same stage. A fork that was not run up
    to where it was forked shows its parent's frames until then.
    """
    places = [
        {(scene.stage, scene.repetition, frame.index): (n, s, f) for s, scene in enumerate(film.scenes)
         for f, frame in enumerate(scene.frames)}
        for n, film in enumerate(films)
    ]  # fmt: skip
    scenes = dict.fromkeys(key[:2] for at in places for key in at)
    found, begun = list[dict[str, Any]](), [False] * len(films)
    for scene in scenes:
        for step in sorted({key[2] for at in places for key in at if key[:2] == scene}):
            shown = [at.get((*scene, step)) for at in places]
            begun = [before or one is not None for before, one in zip(begun, shown, strict=True)]
            if not begun[-1]:
                shown[-1] = shown[0]
            frames = [films[n].scenes[s].frames[f] for n, s, f in filter(None, shown)]
            same = len(frames) == 2 and frames[0].digest == frames[1].digest
            found.append({"shown": shown, "shared": same})
    return found


def _digest(text: str) -> str:
    """What a content security policy knows an element by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(file: object) -> str:
    if not isinstance(file, bytes):
        raise TypeError(f"{type(file).__name__} cannot be put into a page")
    return base64.b64encode(file).decode()


def _film(data: Mapping[str, Any]) -> Film:
    return Film(**{**data, "scenes": tuple(_scene(scene) for scene in data["scenes"])})


def _scene(data: Mapping[str, Any]) -> Scene:
    return Scene(**{**data, "frames": tuple(_frame(frame) for frame in data["frames"])})


def _frame(data: Mapping[str, Any]) -> Frame:
    return Frame(
        **{
            **data,
            "norms": Norms(**data["norms"]),
            "guided": data["guided"] and Guided(**data["guided"]),
            "x": base64.b64decode(data["x"]),
            "x0": base64.b64decode(data["x0"]),
            "heat": {word: base64.b64decode(file) for word, file in data["heat"].items()},
        }
    )
