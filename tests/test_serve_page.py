"""The page in a real browser: images by file and by drop, methods, the slider, errors, keys alone, a narrow window."""

import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_serve import encoded, png_claiming, tiny

from tokenzoo.serve import Shelf, create_app
from tokenzoo.serve.samples import load_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # milliseconds

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; scripts/browser.sh installs it")


@pytest.fixture(scope="module")
def address():
    torch.manual_seed(0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(Shelf({"tiny": tiny()}), load_samples())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT)
    faults = []
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(address)
    expect(page.locator("#method-0 option").first).to_be_attached()
    yield page
    assert not faults
    page.close()


def done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Done.", timeout=WAIT)


def pixels(page: Page, panel: int) -> str:
    return page.locator("canvas").nth(panel).evaluate("canvas => canvas.toDataURL()")


def test_a_file_two_methods_and_the_slider(page: Page, tmp_path: Path):
    path = tmp_path / "own.jpg"
    path.write_bytes(encoded("JPEG"))
    page.select_option("#method-1", "evit")
    page.set_input_files("#file", path)
    done(page)
    expect(page.locator("#chosen")).to_have_text("own.jpg")
    expect(page.locator("article h2")).to_have_text(["Unpatched", "tome", "evit"])
    expect(page.locator("article").nth(1).locator("tbody tr")).to_have_count(5)
    expect(page.locator("article").nth(1).locator("pre")).to_contain_text("method: tome")
    expect(page.locator("article").nth(0).locator("pre")).to_be_hidden()
    last = pixels(page, 1)
    page.locator("#step").fill("0")
    expect(page.locator("#step-text")).to_have_text("the patches")
    assert pixels(page, 1) != last and pixels(page, 1) == pixels(page, 0)
    page.locator("#step").fill("1")
    expect(page.locator("article").nth(1).locator(".tokens")).to_contain_text("tokens")
    assert len({pixels(page, 1), last, pixels(page, 0)}) == 3


def test_changing_the_method_and_its_strength(page: Page):
    page.get_by_alt_text("Sample: china").click()
    done(page)
    before = page.locator("article").nth(1).locator("dd").first.inner_text()
    page.select_option("#method-0", "evit")
    expect(page.locator("#summary-0")).to_contain_text("Liang et al.")
    page.locator("#share-0").fill("80")
    expect(page.locator("#share-text-0")).to_have_text("80 %")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("article h2")).to_have_text(["Unpatched", "evit"], timeout=WAIT)
    assert page.locator("article").nth(1).locator("dd").first.inner_text() != before


def test_dropping_a_file(page: Page):
    data = list(encoded("PNG"))
    file = "new File([new Uint8Array(data)], 'a.png')"
    transfer = page.evaluate_handle(f"data => {{ const t = new DataTransfer(); t.items.add({file}); return t; }}", data)
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    done(page)
    expect(page.locator("#chosen")).to_have_text("a.png")


@pytest.mark.parametrize("kind", ["damaged", "huge", "no image", "unknown model"])
def test_errors_are_sentences_on_the_page(kind: str, page: Page, tmp_path: Path):
    path = tmp_path / "bad.png"
    path.write_bytes({"damaged": encoded("PNG")[:-200], "huge": png_claiming(8_000, 8_000)}.get(kind, encoded("PNG")))
    if kind == "unknown model":
        page.fill("#model", "vit_tinny")
    if kind == "no image":
        page.get_by_role("button", name="Show").click()
    else:
        page.set_input_files("#file", path)
    said = {"damaged": "is damaged", "huge": "8000 x 8000", "no image": "Choose an image first"}
    expect(page.locator("#error")).to_contain_text(said.get(kind, "not the name of a timm model"), timeout=WAIT)
    expect(page.locator("#run")).to_be_enabled()
    page.fill("#model", "tiny")
    page.get_by_alt_text("Sample: flower").click()  # the page goes on
    done(page)
    expect(page.locator("#error")).to_be_hidden()


def test_keys_alone(page: Page):
    """Tab reaches everything in order, Enter shows, arrows move the slider."""
    page.locator("body").press("Tab")
    reached = []
    for _ in range(9):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.title"))
        page.keyboard.press("Tab")
    assert reached[:6] == ["file", "china", "flower", "model", "method-0", "share-0"] and "run" in reached
    page.locator("button[title=china]").focus()
    page.keyboard.press("Enter")
    done(page)
    page.locator("#step").focus()
    page.keyboard.press("Home")
    expect(page.locator("#step-text")).to_have_text("the patches")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step-text")).to_have_text("block 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_legible_in_every_window(width: int, scheme: str, browser: Browser, address: str):
    """Nothing wider than the window, and text that stands out from its ground; TOKENZOO_SHOTS keeps the screenshots."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.select_option("#method-1", "evit")
    page.get_by_alt_text("Sample: flower").click()
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        """() => ["body", ".quiet", "#run", "article", "dt", "pre", "select"].map((name) => {
          const style = getComputedStyle(document.querySelector(name));
          let ground = document.querySelector(name);
          while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
          const both = [style.color, getComputedStyle(ground).backgroundColor];
          return both.map((text) => text.match(/[0-9.]+/g).map(Number));
        })"""
    )
    for text, ground in colours:
        high, low = sorted((_luminance(text), _luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.1, level AA
    if os.environ.get("TOKENZOO_SHOTS"):
        page.screenshot(path=Path(os.environ["TOKENZOO_SHOTS"]) / f"serve_{scheme}_{width}.png", full_page=True)
    page.close()


def _luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
