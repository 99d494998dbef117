"""A film's page in a browser: by mouse and by keyboard, for eyes and for screen readers, and without asking anybody."""

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from unrolled.chains.film.colours import webp
from unrolled.chains.film.values import Film, Frame, Guided, Norms, Scene

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = (
    next(filter(None, map(shutil.which, found)), None)
    for found in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver", "chromium.chromedriver"))
)
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed")

EVIL = "</script><script>window.broken = true</script><img src=x onerror='window.broken = true'> & “castle”"

Open = Callable[..., Any]


def square(colour: str) -> bytes:
    return webp(Image.new("RGB", (16, 16), colour))


def frame(index: int, total: int, sigma: float, colour: str, *, digest: str = "", words: tuple[str, ...] = ()) -> Frame:
    """Its pictures' colours tell which one it is."""
    norms, guided = Norms(sigma, 1.0, 1.1, 1.2), Guided(7.5, 1.0, 1.0, 0.3, 0.25) if index else None
    heat = {word: square("yellow") for word in words}
    return Frame(
        index, total, sigma, sigma / 2, 999.0 - index, 1, 0.25, 3 * 2**20, norms, guided, digest or colour,
        square(colour), square(f"dark{colour}"), index + 1 == total, index % 2 == 0, heat,
    )  # fmt: skip


COLOURS = ("red", "orange", "green", "blue", "violet")
SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5)


def film(words: tuple[str, ...] = ("castle", "red"), fork: int = 9, title: str = "a red castle") -> Film:
    """Two stages of three and of two steps; the latents are others from step ``fork`` on."""
    frames = [
        frame(i, (3, 5)[i > 2], sigma, colour, digest=f"{colour} {i >= fork}", words=words)
        for i, (sigma, colour) in enumerate(zip(SIGMAS, COLOURS, strict=True))
    ]
    scenes = Scene("base", 0, "sdxl-base", "euler", title, "", tuple(frames[:3])), Scene("refiner", frames=tuple(frames[3:]))
    return Film(title, scenes, 3, "an abacus", {"torch": "2.13"})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,1400"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a film's page from the disk; at the end nothing may have been logged and nothing asked for."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before

    def opened(shown: Film, beside: Film | None = None) -> Any:
        browser.get(shown.save(tmp_path / "film.html", beside).as_uri())
        return browser

    yield opened
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "film.html").as_uri()]
    resources = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in resources if not name.startswith("data:")] == []


def press(page: Any, *keys: str) -> None:
    webdriver.ActionChains(page).send_keys(*keys).perform()


def slider(page: Any) -> Any:
    return page.find_element(By.ID, "slider")


def focused(page: Any) -> Any:
    return page.switch_to.active_element


def pictures(page: Any, column: int = 0) -> list[Any]:
    """The pictures that can be seen: x, x0, and x0 once for each word."""
    figures = page.find_elements(By.TAG_NAME, "article")[column].find_elements(By.TAG_NAME, "figure")
    return [figure.find_element(By.TAG_NAME, "img") for figure in figures if figure.is_displayed()]


def shows(picture: Any, file: bytes) -> bool:
    """Whether it is this file, and was decoded."""
    return (
        bool(picture.get_property("naturalWidth") == 16)
        and base64.b64decode(picture.get_attribute("src").split(",")[1]) == file
    )


def buttons(page: Any, within: str) -> dict[str, Any]:
    return {button.text.splitlines()[0]: button for button in page.find_elements(By.CSS_SELECTOR, f"{within} button")}


def seen(page: Any, shown: Film, step: int, column: int = 0) -> bool:
    frames = [one for scene in shown.scenes for one in scene.frames]
    x, x0, *_ = pictures(page, column)
    return shows(x, frames[step].x) and shows(x0, frames[step].x0)


def test_it_opens_on_the_finished_picture(opened: Open) -> None:
    page = opened(film())
    assert (page.title, page.find_element(By.TAG_NAME, "h1").text) == ("a red castle: a film", "a red castle")
    assert slider(page).get_attribute("value") == slider(page).get_attribute("max") == "4"
    assert seen(page, film(), 4)
    text = page.find_element(By.TAG_NAME, "main").text
    for said in ("refiner, step 5 of 5, sigma 0.5 to 0.25", "250 ms", "3 MiB", "an abacus", "torch 2.13", "seed"):
        assert said in text


def test_the_slider_and_its_keys_move_through_the_steps(opened: Open) -> None:
    page = opened(film())
    slider(page).click()  # in the middle
    assert seen(page, film(), 2)
    for key, step in (
        (Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_UP, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_LEFT, 2),
        (Keys.ARROW_DOWN, 1), (Keys.END, 4), (Keys.ARROW_RIGHT, 4), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0),
    ):  # fmt: skip
        press(page, key)
        assert slider(page).get_attribute("value") == str(step)
        assert seen(page, film(), step)
    assert slider(page).get_attribute("aria-valuetext") == "base, step 1 of 3, sigma 8 to 4"
    assert "guidance scale\noff" in page.find_element(By.CLASS_NAME, "facts").text
    press(page, Keys.ARROW_RIGHT)
    facts = page.find_element(By.CLASS_NAME, "facts").text
    assert "guidance scale\n7.5" in facts
    assert "guided − cond\n0.25" in facts


def test_cells_are_shown_as_cells_and_pictures_as_pictures(opened: Open) -> None:
    page = opened(film())
    slider(page).send_keys(Keys.HOME)
    x, x0, *_ = pictures(page)
    assert (x.get_attribute("class"), x0.get_attribute("class")) == ("cells", "")
    slider(page).send_keys(Keys.ARROW_RIGHT)
    assert x0.get_attribute("class") == "cells"
    slider(page).send_keys(Keys.END)
    assert (x.get_attribute("class"), x0.get_attribute("class")) == ("", "")


def test_stages_lead_to_their_last_step(opened: Open) -> None:
    page = opened(film())
    stages = buttons(page, "#strip")
    assert list(stages) == ["base", "refiner"]
    assert [stage.get_attribute("aria-current") for stage in stages.values()] == ["false", "true"]
    stages["base"].send_keys(Keys.ENTER)
    assert seen(page, film(), 2)
    assert [stage.get_attribute("aria-current") for stage in stages.values()] == ["true", "false"]


def test_every_word_has_a_heat_map_of_its_own_to_switch(opened: Open) -> None:
    page = opened(film())
    words = buttons(page, "#words")
    assert list(words) == ["castle", "red"]
    assert len(pictures(page)) == 4
    words["castle"].send_keys(Keys.SPACE)
    assert [word.get_attribute("aria-pressed") for word in words.values()] == ["false", "true"]
    assert len(pictures(page)) == 3
    assert pictures(page)[2].get_attribute("alt") == "Where “red” is attended to in refiner, step 5 of 5"
    slider(page).send_keys(Keys.ARROW_LEFT)
    assert len(pictures(page)) == 3, "it stays off at other steps"
    heat = page.find_elements(By.CSS_SELECTOR, "img.over")
    assert shows(heat[1], square("yellow"))
    words["castle"].click()
    words["red"].click()
    assert "castle" in pictures(page)[2].get_attribute("alt")


def test_without_words_there_is_nothing_to_switch(opened: Open) -> None:
    page = opened(film(words=()))
    assert not page.find_element(By.ID, "words").is_displayed()
    assert len(pictures(page)) == 2


def test_a_fork_lies_beside_its_parent_step_by_step(opened: Open) -> None:
    parent, fork = film(), film(fork=2, title="a green castle")
    page = opened(fork, parent)
    heads = [head.text for head in page.find_elements(By.TAG_NAME, "h2")]
    assert heads == ["parent: a red castle", "fork: a green castle"]
    slider(page).send_keys(Keys.HOME)
    badges = page.find_elements(By.CLASS_NAME, "badge")
    assert [badge.text for badge in badges] == ["Shared: the same latents, bit for bit."] * 2
    assert slider(page).get_attribute("aria-valuetext").endswith(", shared")
    slider(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert [badge.text for badge in badges] == ["Not the same latents."] * 2
    assert seen(page, parent, 2, column=0)
    assert seen(page, fork, 2, column=1)
    assert [fact.text for fact in page.find_elements(By.CLASS_NAME, "differs")] == ["a red castle", "a green castle"]
    assert len(page.find_elements(By.CSS_SELECTOR, "#curves figure:first-child .shared")) == 2


def test_a_fork_that_was_run_from_its_fork_on_shows_its_parents_steps(opened: Open) -> None:
    parent = film()
    page = opened(Film("a fork", (film(fork=3).scenes[1],)), parent)
    slider(page).send_keys(Keys.HOME)
    assert seen(page, parent, 0, column=1)
    badges = page.find_elements(By.CLASS_NAME, "badge")
    assert badges[1].text == "Shared: computed once, by the parent."


def test_a_step_that_one_film_lacks_is_said_to_be_missing(opened: Open) -> None:
    parent = film()
    page = opened(Film("shorter", parent.scenes[:1]), parent)
    assert page.find_elements(By.CLASS_NAME, "badge")[1].text == "This run has no such step."
    assert pictures(page, 1) == []


def test_the_film_plays_and_stops_at_its_end(opened: Open) -> None:
    page = opened(film())
    play = page.find_element(By.ID, "play")
    play.click()
    assert (play.text, play.get_attribute("aria-pressed"), slider(page).get_attribute("value")) == ("Pause", "true", "0")
    until = time.monotonic() + 10
    while play.text == "Pause" and time.monotonic() < until:
        time.sleep(0.05)
    assert (play.text, play.get_attribute("aria-pressed"), slider(page).get_attribute("value")) == ("Play", "false", "4")


def test_the_curves_lead_to_their_steps(opened: Open) -> None:
    page = opened(film())
    curve = page.find_element(By.TAG_NAME, "svg")
    webdriver.ActionChains(page).move_to_element_with_offset(curve, -curve.size["width"] // 2 + 70, 0).click().perform()
    assert slider(page).get_attribute("value") == "0"
    assert curve.get_attribute("aria-label") == "Noise level: sigma 8"


def test_everything_is_reached_by_the_tabulator(opened: Open) -> None:
    page, reached = opened(film()), list[str]()
    for _ in range(8):
        press(page, Keys.TAB)
        reached.append(focused(page).text.splitlines()[0] if focused(page).text else focused(page).get_attribute("id"))
        outline = focused(page).value_of_css_property("outline-width")
        assert outline == "3px", "and one sees where one is"
    assert reached == [
        "base",
        "refiner",
        "Play",
        "slider",
        "castle",
        "red",
        "Every step in numbers",
        "How to read this page",
    ]


def test_a_screen_reader_is_told_what_is_there(opened: Open) -> None:
    page = opened(film(), film(fork=2))
    for details in page.find_elements(By.TAG_NAME, "summary"):
        details.click()
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    named = [name for role, name in told if role == "image"]
    assert all(named), "decoration is ignored, and the rest has a name"
    for part in (
        ("main", ""), ("navigation", "Stages"), ("slider", "Step"), ("button", "Play"), ("button", "castle"),
        ("group", "Heat maps"),
        ("article", "parent: a red castle"), ("article", "fork: a red castle"), ("image", "Noise level: sigma 0.5 | 0.5"),
        ("image", "x after refiner, step 5 of 5, at sigma 0.25"), ("image", "x0 estimated in refiner, step 5 of 5"),
        ("columnheader", "guided − cond"), ("rowheader", "base, step 1 of 3"), ("heading", "a red castle"),
    ):  # fmt: skip
        assert part in told, part
    assert page.execute_script("return document.documentElement.lang") == "en"


def test_whatever_a_prompt_says_is_text(opened: Open) -> None:
    page = opened(film(words=(EVIL,), title=EVIL))
    assert page.find_element(By.TAG_NAME, "h1").text == EVIL
    assert list(buttons(page, "#words")) == [EVIL]
    slider(page).send_keys(Keys.HOME)
    assert EVIL in page.find_element(By.CLASS_NAME, "facts").text
    assert page.execute_script("return window.broken === undefined")
    assert pictures(page)[2].get_attribute("alt").startswith(f"Where “{EVIL}”")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(scheme: str, opened: Open) -> None:
    page = opened(film(), film(fork=2))
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    try:
        colours = page.execute_script(
            "return [getComputedStyle(document.documentElement).backgroundColor, ...[...document.querySelectorAll("
            "'h1, #where, figcaption, .badge, dt, dd, legend')].map((one) => getComputedStyle(one).color)]"
        )
        keys = page.execute_script(
            "return [...document.querySelectorAll('.key')].map((one) => getComputedStyle(one).borderColor)"
        )
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    paper, *inks = (luminance(colour) for colour in colours)
    assert (paper < 0.5) == (scheme == "dark")
    # 4.5 for text and 3 for curves, as the Web Content Accessibility Guidelines have it.
    assert all(contrast(paper, ink) >= 4.5 for ink in inks)
    assert all(contrast(paper, luminance(key)) >= 3 for key in keys)


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_narrow_window_needs_no_scrolling_sideways(opened: Open) -> None:
    page = opened(film(title="a " + "very" * 40 + " long castle"), film(fork=2))
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        wide = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide == [390, 390]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scenes", [(), (Scene("only", frames=(frame(0, 1, 1.0, "red"),)),)])
def test_the_shortest_films_open_too(scenes: tuple[Scene, ...], opened: Open) -> None:
    page = opened(Film("short", scenes))
    assert slider(page).get_attribute("max") == "0"
