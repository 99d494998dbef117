"""The page of a film: one that asks for nothing, whatever a prompt says, and from which the film is read back."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from unrolled.chains.film.page import moments, page
from unrolled.chains.film.values import Film, Frame, Guided, Norms, Scene
from unrolled.core.errors import BadInput


def frame(index: int, digest: str = "", total: int = 3) -> Frame:
    norms, guided = Norms(1.0, None, 0.5, 1e-7), Guided(7.0, 1.0, 1.0, 0.3, None)
    return Frame(
        index, total, 3.0 - index, 2.0 - index, 1.0, 1, 0.1, None, norms, guided, digest or f"{index}",
        b"x", b"x0", False, True, {"red": b"heat"},
    )  # fmt: skip


def scene(stage: str, *frames: Frame, repetition: int = 0) -> Scene:
    return Scene(stage, repetition, "a model", "euler", "a prompt", "", frames)


FILM = Film(
    "a prompt", (scene("base", *map(frame, range(3))), scene("refiner", frame(3), frame(4))), 7, "cpu", {"torch": "2"}
)


def test_a_film_is_read_back_from_its_page(tmp_path: Path) -> None:
    assert Film.load(FILM.save(tmp_path / "film.html")) == FILM
    other = replace(FILM, title="another")
    assert Film.load(other.save(tmp_path / "film.html", beside=FILM)) == other


@pytest.mark.parametrize(
    "evil",
    [
        "</script><script>alert(1)</script>",
        "<!-- <script>",
        "</title><img src=x onerror=alert(1)>",
        "$title ${data} $$",
        "\u2028 \ud83d \N{CASTLE} \" ' & \\u003c/script>",
    ],
)
def test_a_prompt_cannot_break_out(evil: str, tmp_path: Path) -> None:
    heated = replace(frame(0), heat={evil: b"heat"})
    film = Film(evil, (replace(scene(evil, heated), prompt=evil, negative_prompt=evil, model=evil),), 0, evil, {evil: evil})
    text, harmless = page(film), page(FILM)
    for mark in ("<script", "</script", "<img", "<!--", "</title"):
        assert text.count(mark) == harmless.count(mark) == {"<script": 2, "</script": 2, "</title": 1}.get(mark, 0)
    assert Film.load(film.save(tmp_path / "film.html")) == film


def test_the_page_names_nothing_outside_itself() -> None:
    text = page(FILM)
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    assert not re.findall(r"<(?:script|img|link)[^>]* (?:src|href)=\"(?!data:)", text)
    assert "default-src 'none'; img-src data:;" in text


def test_three_stages_of_thirty_steps_are_under_ten_megabytes(tmp_path: Path) -> None:
    """The worst there can be: every picture of the largest size, and nothing but noise."""
    from unrolled.chains.film.colours import CELLS, WIDEST, webp

    random = np.random.default_rng(0)

    def noise(side: int) -> bytes:
        return webp(Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)))

    worst = replace(frame(0), x=noise(CELLS), x0=noise(WIDEST), heat=dict.fromkeys(("red", "green", "blue"), noise(64)))
    film = Film("a", tuple(scene(f"{n}", *(replace(worst, index=i) for i in range(30))) for n in range(3)))
    assert film.save(tmp_path / "film.html").stat().st_size < 10e6
    assert Image.open(io.BytesIO(worst.x0)).size == (256, 256)


def test_moments_of_one_film_are_its_frames() -> None:
    assert moments([FILM]) == [
        {"shown": [place], "shared": False} for place in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1)]
    ]


def test_steps_stand_beside_the_same_steps_and_what_is_the_same_is_marked() -> None:
    fork = Film(
        "fork", (scene("base", frame(0), frame(1, "other"), frame(2, "other")), scene("refiner", frame(4, "o", 6), frame(5)))
    )
    assert moments([FILM, fork]) == [
        {"shown": [(0, 0, 0), (1, 0, 0)], "shared": True},
        {"shown": [(0, 0, 1), (1, 0, 1)], "shared": False},
        {"shown": [(0, 0, 2), (1, 0, 2)], "shared": False},
        {"shown": [(0, 1, 0), None], "shared": False},
        {"shown": [(0, 1, 1), (1, 1, 0)], "shared": False},
        {"shown": [None, (1, 1, 1)], "shared": False},
    ]


def test_a_fork_that_was_not_run_until_then_shows_its_parents_frames() -> None:
    fork = Film("fork", (scene("refiner", frame(4, "other")),))
    found = moments([FILM, fork])
    assert [moment["shown"][1] for moment in found] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 0)]
    assert [moment["shared"] for moment in found] == [True] * 4 + [False]


def test_repetitions_are_scenes_of_their_own() -> None:
    film = Film("f", (scene("style", frame(0)), scene("style", frame(0, "other"), repetition=1)))
    assert [moment["shared"] for moment in moments([film, film])] == [True, True]
    assert [moment["shown"][0] for moment in moments([film, film])] == [(0, 0, 0), (0, 1, 0)]


def test_a_film_is_written_as_a_page_only(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'film.mp4' is no name of one: let it end in .html"):
        FILM.save(tmp_path / "film.mp4")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<p>nothing</p>", "is no page that a film was saved to"),
        ('<script type="application/json" id="data">{]</script>', "is damaged and cannot be read as a film"),
        ('<script type="application/json" id="data">{"films": [{}]}</script>', "is damaged and cannot be read as a film"),
        ('<script type="application/json" id="data">{"films": []}</script>', "is damaged and cannot be read as a film"),
    ],
)
def test_what_is_no_film_is_said_to_be_none(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "film.html").write_text(text)
    with pytest.raises(BadInput, match=sentence):
        Film.load(tmp_path / "film.html")
    with pytest.raises(BadInput, match=r"There is no film to read at .*nowhere.html \(No such file"):
        Film.load(tmp_path / "nowhere.html")
