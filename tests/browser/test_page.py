"""The page in Debian's Chromium, headless, on the tiny pair: `make test-browser`.

Without Playwright or a Chromium these tests are skipped, and say so.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need Playwright: pip install playwright"
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip(
        "the browser tests need a Chromium: apt-get install chromium, or CHROMIUM=PATH",
        allow_module_level=True,
    )
TIMEOUT_MS = 120_000
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of its own process, so that the browser's waits and the models' do not mix."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mm_c2c.cli", "demo", "--tiny", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, **kept})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, "the page did not start"
            try:
                urllib.request.urlopen(address, timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                break
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, url: str) -> Iterator:
    """Opens the page as one more visitor."""
    contexts = []

    def visit(viewport: dict[str, int] = DESK, scheme: str = "light"):
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url)
        button(page, "Ask").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def ask(page) -> None:
    button(page, "Ask").click()
    page.locator(".card.source dl").wait_for()


def shown_picture(page) -> str:
    return page.locator(".image-frame img, .image-container img").first.get_attribute("src")


def test_a_bundled_scene_is_asked_about_and_perceived_once(open_page) -> None:
    page = open_page()
    before = shown_picture(page)
    page.locator(".scenes button").nth(3).click()
    page.wait_for_function("(old) => !document.body.innerHTML.includes(old)", arg=before)
    ask(page)
    titles = page.locator(".card h3").all_inner_texts()
    assert titles[0] == "Fused cache"
    assert len(titles) >= 4
    page.get_by_label("Question", exact=True).fill("What is on the left?")
    page.locator(".card").first.evaluate("card => card.remove()")
    ask(page)
    assert "perceived once" in page.locator(".seen").first.inner_text()


def test_a_scene_is_built_by_dragging_and_by_keys(open_page) -> None:
    page = open_page()
    before = shown_picture(page)
    open_tab(page, "Build a scene")
    button(page, "Add dog").wait_for()
    canvas = page.locator(".canvas").bounding_box()
    start = button(page, "Add dog").bounding_box()
    page.mouse.move(start["x"] + 10, start["y"] + 10)
    page.mouse.down()
    page.mouse.move(
        canvas["x"] + 0.2 * canvas["width"], canvas["y"] + 0.2 * canvas["height"], steps=6
    )
    page.mouse.up()
    dog = page.locator(".canvas .sticker")
    assert dog.get_attribute("aria-label") == "dog, top left"
    box = dog.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(
        canvas["x"] + 0.8 * canvas["width"], canvas["y"] + 0.2 * canvas["height"], steps=6
    )
    page.mouse.up()
    assert dog.get_attribute("aria-label") == "dog, top right"
    dog.focus()
    for _ in range(4):
        page.keyboard.press("Shift+ArrowDown")
    assert dog.get_attribute("aria-label") == "dog, middle right"
    wide = dog.bounding_box()["width"]
    page.keyboard.press("+")
    assert dog.bounding_box()["width"] > wide
    button(page, "Add pizza").focus()
    page.keyboard.press("Enter")
    assert page.locator(".canvas .sticker").count() == 2
    page.locator(".canvas .sticker").nth(1).focus()
    page.keyboard.press("Delete")
    assert page.locator(".canvas .sticker").count() == 1
    button(page, "Ask about this scene").click()
    button(page, "Ask").wait_for()
    page.wait_for_function("(old) => !document.body.innerHTML.includes(old)", arg=before)
    ask(page)


def test_another_cache_is_handed_over(open_page) -> None:
    page = open_page()
    open_tab(page, "Look inside")
    button(page, "Look inside the answer").click()
    page.locator("svg.chart").nth(1).wait_for()
    assert page.locator(".figures figure img").count() == 3
    button(page, "Ask with that").click()
    page.locator(".card.own").wait_for()
    assert "another picture's cache" in page.locator(".card h3").all_inner_texts()[1]


def test_a_question_can_be_stopped_and_another_asked(open_page) -> None:
    page = open_page()
    button(page, "Ask").click()
    page.locator(".card.fused").wait_for()
    button(page, "Stop").click()
    page.wait_for_timeout(2000)
    count = page.locator(".card dl").count()
    page.wait_for_timeout(2000)
    assert page.locator(".card dl").count() == count, "nothing goes on"
    ask(page)


def test_junk_and_nothing_are_refused_with_what_to_do(open_page, tmp_path: Path) -> None:
    page = open_page()
    junk = tmp_path / "junk.png"
    junk.write_bytes(b"no picture")
    page.get_by_label("Question", exact=True).fill(" ")
    button(page, "Ask").click()
    page.get_by_text("The question is empty").wait_for()
    page.get_by_label("Question", exact=True).fill("What is it?")
    button(page, "Clear").or_(page.get_by_label("Remove Image")).first.click()
    button(page, "Ask").click()
    page.get_by_text("There is no picture").wait_for()
    page.locator("input[type=file]").first.set_input_files(str(junk))
    page.wait_for_timeout(3000)
    button(page, "Ask").click()
    page.get_by_text(re.compile("junk.png is not a picture")).wait_for()


def test_two_visitors_do_not_see_each_other(open_page) -> None:
    one, two = open_page(), open_page(PHONE)
    two.locator(".scenes button").nth(5).click()
    one.get_by_label("Question", exact=True).fill("Is there a cat?")
    button(one, "Ask").click()
    button(two, "Ask").click()
    for page in (one, two):
        page.locator(".card.source dl").wait_for()
    assert shown_picture(one) != shown_picture(two)
    captions = [page.locator(".caption").first.inner_text() for page in (one, two)]
    assert captions[0] != captions[1]
    assert two.get_by_label("Question", exact=True).input_value() != "Is there a cat?"


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_an_episode_is_stepped_through_by_keys_and_asked_about(open_page, viewport: dict) -> None:
    page = open_page(viewport)
    if not page.get_by_role("tab", name="Robot", exact=True).is_visible():
        page.locator(".overflow-menu button").first.click()
        button(page, "Robot").click()
    else:
        open_tab(page, "Robot")
    page.locator("input[type=range]:visible").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.get_by_text("Step 4 of").wait_for()
    button(page, "Step on").press("Enter")
    page.get_by_text("Step 5 of").wait_for()
    assert page.locator(".figures:visible img").count() == 3
    button(page, "Ask about this step").press("Enter")
    page.locator(".card.instruction .answer").wait_for()
    assert page.locator(".card:visible h3").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(open_page, scheme: str) -> None:
    page = open_page(PHONE, scheme)
    ask(page)
    for name in ("Ask", "Look inside", "Build a scene"):
        if page.get_by_role("tab", name=name, exact=True).is_visible():
            open_tab(page, name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], name


def test_the_chosen_tab_can_be_read_in_the_dark(open_page) -> None:
    page = open_page(DESK, "dark")
    chosen = page.get_by_role("tab", name="Ask", exact=True)
    red, green, blue = map(
        int, re.findall(r"\d+", chosen.evaluate("tab => getComputedStyle(tab).color"))
    )
    # Relative luminance of WCAG 2; 4.5 to 1 on black.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in (red, green, blue))
    ]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert (luminance + 0.05) / 0.05 >= 4.5


def test_bundled_scenes_are_shown_alike(open_page) -> None:
    boxes = [b.bounding_box() for b in open_page().locator(".scenes button").all()]
    assert len({(box["width"], box["height"], box["y"]) for box in boxes}) == 1


def test_axe_finds_nothing_serious(open_page) -> None:
    script = os.environ.get("AXE")
    if not script:
        pytest.skip("AXE=PATH of axe.min.js (npm pack axe-core) is not given")
    for scheme in ("light", "dark"):
        page = open_page(DESK, scheme)
        ask(page)
        for name in ("Ask", "Look inside", "Build a scene", "Robot", "Results", "Your own pair"):
            open_tab(page, name)
            if name == "Results":
                page.locator(".results svg").first.wait_for()  # dim until then
            page.wait_for_timeout(1500)
            page.evaluate(Path(script).read_text(encoding="utf-8"))
            found = page.evaluate("async () => (await axe.run()).violations")
            bad = [
                (v["id"], [n["html"][:100] for n in v["nodes"]])
                for v in found
                if v["impact"] in ("serious", "critical")
            ]
            assert not bad, (scheme, name, bad)
