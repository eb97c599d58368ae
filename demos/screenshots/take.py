"""Takes the pictures of this folder from a running page: the README shows them.

mm-c2c demo --port 7860
python demos/screenshots/take.py http://127.0.0.1:7860   # needs Playwright and a Chromium
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
STICKERS = {"Add dog": (0.3, 0.7), "Add pizza": (0.7, 0.3), "Add rocket": (0.3, 0.25)}


def main(url: str) -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = visit(browser, url)
        ask(page)
        keep(page, "ask")
        page.get_by_role("tab", name="Look inside", exact=True).click()
        page.get_by_role("button", name="Look inside the answer").click()
        page.locator("svg.chart").nth(1).wait_for()
        page.get_by_role("button", name="Ask with that").click()
        page.locator(".card.own").wait_for()
        keep(page, "inside")
        page.get_by_role("tab", name="Build a scene", exact=True).click()
        build(page)
        keep(page, "build")
        page = visit(browser, url, scheme="dark")
        ask(page)
        keep(page, "dark")
        page = visit(browser, url, PHONE)
        ask(page)
        keep(page, "phone")
        browser.close()


def visit(
    browser: Browser, url: str, viewport: dict[str, int] = DESK, scheme: str = "light"
) -> Page:
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    page.wait_for_timeout(2000)
    return page


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".card.source dl").wait_for()


def build(page: Page) -> None:
    canvas = page.locator(".canvas").bounding_box()
    for name, (x, y) in STICKERS.items():
        start = page.get_by_role("button", name=name, exact=True).bounding_box()
        page.mouse.move(start["x"] + 10, start["y"] + 10)
        page.mouse.down()
        page.mouse.move(
            canvas["x"] + x * canvas["width"], canvas["y"] + y * canvas["height"], steps=6
        )
        page.mouse.up()


def keep(page: Page, name: str) -> None:
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    shot.convert("RGB").save(HERE / f"{name}.webp", quality=85, method=6)


if __name__ == "__main__":
    main(sys.argv[1])
