"""Chains on film: every stage, the same pictures as without, the words that were asked for; the command; live previews."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from unrolled import __main__ as command
from unrolled.chains.chain import Chain, ImageToImage, PriorOptions, Resize, TextToImage
from unrolled.chains.film.filming import Camera, film
from unrolled.chains.film.live import Screen, half_blocks, live, previews
from unrolled.chains.film.values import Film
from unrolled.chains.film.words import spans
from unrolled.chains.run import run
from unrolled.core.errors import BadInput, NonFinite
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import Step
from unrolled.stages.text import encode_text, token_positions


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def chain(tiny_folder: Path) -> Chain:
    first = TextToImage(name="first", model=str(tiny_folder), prompt="a red castle", steps=3, solver="euler")
    style = ImageToImage(name="style", model=str(tiny_folder), prompt="a green house", steps=4, strength=0.5, repeat=2)
    return Chain(stages=(first, style, Resize()), seed=4)


def test_every_stage_and_repetition_is_filmed(chain: Chain, shelf: Shelf) -> None:
    made = film(chain, shelf, words=["castle", "green house"])
    scenes = [(scene.stage, scene.repetition, len(scene.frames), scene.prompt) for scene in made.scenes]
    assert scenes == [
        ("first", 0, 3, "a red castle"), ("style", 0, 2, "a green house"), ("style", 1, 2, "a green house"),
    ]  # fmt: skip
    assert (made.title, made.seed) == ("a red castle", 4)
    assert [list(scene.frames[0].heat) for scene in made.scenes] == [["castle"], ["green house"], ["green house"]]
    first, style, _ = made.scenes
    assert first.solver.startswith("euler")
    assert first.frames[0].guided is not None
    assert first.frames[0].guided.scale == 7.5
    assert [frame.index for frame in style.frames] == [2, 3]
    assert style.frames[0].digest != made.scenes[2].frames[0].digest


def test_a_film_changes_no_picture(chain: Chain, shelf: Shelf) -> None:
    plain = run(chain, shelf).pictures[0]
    camera = Camera(chain, words=["castle"])
    assert run(chain, shelf, observe=camera.observe).pictures[0].tobytes() == plain.tobytes()
    assert len(camera.film(shelf).scenes) == 3


def test_a_batch_that_does_not_fit_is_filmed_once(chain: Chain, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage runs out of memory with two images; the film is of the first image of the parts."""
    camera, failed = Camera(chain.model_copy(update={"batch": 2})), list[int]()

    def fail(stage: Any, step: Step) -> None:
        if stage.name == "style" and len(step.x) == 2:
            failed.append(step.index)
            raise MemoryError

    run(camera.chain, shelf, watch=fail, observe=camera.observe)
    assert failed == [2]
    assert [(scene.stage, scene.repetition) for scene in camera.scenes] == [("first", 0), ("style", 0), ("style", 1)]
    alone = film(chain, shelf)
    assert [scene.frames[-1].digest for scene in camera.scenes] == [scene.frames[-1].digest for scene in alone.scenes]


def test_what_was_seen_before_a_fault_is_kept(chain: Chain, shelf: Shelf) -> None:
    camera = Camera(chain)

    def fail(stage: Any, step: Step) -> None:
        if stage.name == "style":
            raise NonFinite("now")

    with pytest.raises(NonFinite, match="now"):
        run(chain, shelf, watch=fail, observe=camera.observe)
    assert [scene.stage for scene in camera.scenes] == ["first"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"words": ["red", "horse"]}, "'horse' stands in no prompt of this chain: the words there are a, red, castle, gr"),
        ({"words": ["cast"]}, "'cast' stands in no prompt"),
        ({"every": 0}, "Previews are decoded every so many steps, 1 or more, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_filmed_is_said_before_anything_runs(options: Any, sentence: str, chain: Chain) -> None:
    with pytest.raises(BadInput, match=sentence):
        Camera(chain, **options)


def test_words_of_no_prompt_at_all(tiny_folder: Path) -> None:
    with pytest.raises(BadInput, match="'castle' stands in no prompt of this chain: there is no prompt"):
        Camera(Chain(stages=(TextToImage(model=str(tiny_folder)),)), words=["castle"])


def test_kandinskys_decoder_is_told_no_words(tiny_kandinsky_folder: Path, tiny_prior_folder: Path, shelf: Shelf) -> None:
    prior = PriorOptions(model=str(tiny_prior_folder), steps=2)
    stage = TextToImage(prompt="a castle", model=str(tiny_kandinsky_folder), prior=prior, steps=2)
    made = film(Chain(stages=(stage,)), shelf, words=["castle"])
    assert [frame.heat for frame in made.scenes[0].frames] == [{}, {}]


# --- words


def test_words_are_found_whole_in_any_case() -> None:
    assert spans("A castle, castles; the Castle.", "castle") == [(2, 8), (23, 29)]
    assert spans("a (red) castle", "(red)") == [(2, 7)]
    assert spans("anything", "") == []


def test_token_positions_are_those_of_the_context(tiny: Model) -> None:
    """A word of the prompt changed changes the context from its first token on (the encoder looks back only)."""
    prompt = "a red castle"
    red = token_positions(tiny, prompt, 2, 5)
    castle = token_positions(tiny, prompt, 6, 12)
    assert red[0] == 2, "after the start and 'a'"
    assert castle[0] == red[-1] + 1
    one, other = (encode_text(tiny, text).context for text in (prompt, "a red zastle"))
    assert one is not None
    assert other is not None
    changed = (one - other)[0].abs().amax(-1) > 1e-6
    assert int(changed.nonzero()[0]) == castle[0]


def test_token_positions_beyond_the_first_chunk(tiny: Model) -> None:
    prompt = "z " * 80 + "castle"
    assert token_positions(tiny, prompt, 160, 166) == [], "it was dropped"
    first = token_positions(tiny, "z " * 80, 0, 160, chunks=True)
    assert len(first) % 80 == 0
    assert 0 not in first
    assert 76 not in first, "the first chunk's end"
    assert 77 not in first, "the second one's start"
    found = token_positions(tiny, prompt, 160, 166, chunks=True)
    assert found[0] == first[-1] + 1


# --- live


def printed(what: Any, height: int = 40) -> str:
    console = Console(
        width=20, height=height, color_system="truecolor", force_terminal=True, record=True, file=io.StringIO()
    )
    console.print(what)
    return console.export_text(styles=True)


def test_a_picture_is_two_pixels_a_character() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)])
    text = half_blocks(picture, 2)
    assert text.plain == "▀▀\n"
    assert [str(span.style) for span in text.spans] == ["rgb(255,0,0) on rgb(0,0,255)", "rgb(0,255,0) on rgb(9,9,9)"]
    assert half_blocks(Image.new("RGB", (60, 30)), 20).plain == ("▀" * 20 + "\n") * 5


def test_a_screen_shows_the_newest_picture() -> None:
    screen = Screen()
    assert printed(screen).strip() == ""
    screen(Image.new("RGB", (8, 8), "red"), "the first")
    screen(Image.new("RGB", (8, 8), "blue"), "the second")
    shown = printed(screen)
    assert "the second" in shown
    assert "the first" not in shown
    assert "0;0;255" in shown
    assert shown.count("▀") == 20 * 10
    assert printed(screen, height=12).count("▀") == 8 * 4, "and leaves room below"


def test_previews_show_every_step(chain: Chain, shelf: Shelf) -> None:
    shown = list[str]()
    run(chain, shelf, observe=previews(lambda picture, words: shown.append(words)))
    assert len(shown) == 3 + 2 + 2


def test_in_a_terminal_pictures_are_half_blocks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with live(Console(force_terminal=True)) as show:
        show(Image.new("RGB", (8, 8), "red"), "a step")
    assert "▀" in capsys.readouterr().out


def test_in_a_notebook_pictures_are_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = list[Any]()
    display = SimpleNamespace(display=lambda what, display_id: SimpleNamespace(update=updated.append))
    for name, module in (("ipykernel", SimpleNamespace()), ("IPython", SimpleNamespace()), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    picture = Image.new("RGB", (8, 8))
    with live() as show:
        show(picture, "a step")
    assert updated == [picture]


# --- the document


def test_the_documents_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (Path(command.__file__).parent / "docs" / "film.md").read_text(), re.S):
        exec(block.replace("steps=8", "steps=2"), {})
    assert [len(Film.load(name).scenes[0].frames) for name in ("film.html", "mine.html")] == [2, 2]


# --- the command


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def unrolled(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["unrolled", *arguments])
        try:
            command.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return unrolled


def test_the_command(unrolled: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["text-to-image", "--steps", "2", "--prompt", "a red castle"]
    assert unrolled("film", *shared, "--words", "castle, red,", "--every", "2") == 0
    assert capsys.readouterr().out == "film.html\n"
    first = Film.load("film.html")
    assert [list(frame.heat) for frame in first.scenes[0].frames] == [["castle", "red"]] * 2
    assert unrolled("film", *shared, "--cfg-scale", "3", "--output", "fork.html", "--beside", "film.html", "--preview") == 0
    assert Path("fork.html").read_text().count("a red castle") > first.title.count("a red castle")
    fork = Film.load("fork.html").scenes[0].frames[0].guided
    assert fork is not None
    assert fork.scale == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--output", "film.mp4"], "'film.mp4' is no name of one: let it end in .html"),
        (["--words", "horse"], "'horse' stands in no prompt of this chain"),
        (["--every", "0"], "Previews are decoded every so many steps"),
        (["--beside", "nowhere.html"], "There is no film to read at nowhere.html"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], sentence: str, unrolled: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert unrolled("film", "text-to-image", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
    assert not list(Path().iterdir())


def test_an_interrupted_film_shows_what_was_made(
    unrolled: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unrolled.chains.film.recorder import Recorder

    see = Recorder.see

    def interrupted(recorder: Recorder, step: Step) -> None:
        see(recorder, step)
        if step.index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "see", interrupted)
    assert unrolled("film", "text-to-image", "--steps", "4") == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("film.html\n", "unrolled: Interrupted.\n")
    assert len(Film.load("film.html").scenes[0].frames) == 2


def test_run_shows_previews_in_a_terminal(
    unrolled: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unrolled.commands import run as run_command

    monkeypatch.setattr(run_command, "err", Console(stderr=True, force_terminal=True, width=40))
    assert unrolled("run", "text-to-image", "--steps", "2", "--preview") == 0
    assert "▀" in capsys.readouterr().err
    assert unrolled("run", "text-to-image", "--steps", "2") == 0
    assert "▀" not in capsys.readouterr().err
