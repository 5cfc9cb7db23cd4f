"""The page, in a real browser: Debian's or Ubuntu's Chromium, driven by Playwright."""

import io

import pytest
from PIL import Image
from service import CHROMIUM, digit_images

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium (CI does)"
)
QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(QUIET), chromium_sandbox=False
        )
        yield running
        running.close()


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", lambda request: page.trouble.append(request.url)
            if not request.url.startswith((url, "data:", "blob:")) else None)  # fmt: skip
    page.goto(url)
    yield page
    context.close()


def files(name: str) -> list[dict]:
    return [
        {"name": f"{i}.png", "mimeType": "image/png", "buffer": data}
        for i, data in enumerate(digit_images(name, 6))
    ]


def test_a_person_drops_images_types_a_name_and_sees_the_meanings_ranked(page, tmp_path):
    page.fill("#class-name", "seven")
    page.set_input_files("#files", files("seven"))
    page.get_by_text("More options").click()
    page.fill("#meanings", "the number seven\na large wading bird")
    page.click("#ask")
    page.wait_for_selector("#candidates li", timeout=120_000)
    choice = page.inner_text("#choice")
    ranked = page.eval_on_selector_all("#candidates li", "all => all.map(x => x.dataset.meaning)")
    assert ranked[0] in choice
    assert {"the number seven", "a large wading bird"} <= set(ranked)
    assert ranked.index("the number seven") < ranked.index("a large wading bird")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.trouble == []
    shot = page.screenshot(full_page=True, path=tmp_path / "page.png")
    assert Image.open(io.BytesIO(shot)).width == 390


def test_a_refusal_is_shown_in_words_and_the_next_question_works(page):
    page.fill("#class-name", "seven")
    text = {"name": "a.png", "mimeType": "image/png", "buffer": b"not an image"}
    page.set_input_files("#files", [text])
    page.click("#ask")
    page.locator("#error:not(:empty)").wait_for(timeout=60_000)
    assert "image" in page.inner_text("#error")
    assert page.trouble == []


def test_markup_in_a_name_is_text(page):
    page.fill("#class-name", "<b onmouseover=alert(1)>seven</b>")
    page.set_input_files("#files", files("seven"))
    page.click("#ask")
    page.locator("#error:not(:empty), #choice:not(:empty)").first.wait_for(timeout=120_000)
    assert page.locator("b[onmouseover]").count() == 0
    assert page.trouble == []
