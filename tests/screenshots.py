"""Makes the README's pictures of the page anew: PYTHONPATH=. python tests/screenshots.py"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from conftest import CHROMIUM_FLAGS, ROOT, TIMEOUT, serving
from PIL import Image
from playwright.sync_api import Page, sync_playwright

MAX_BYTES = 150_000
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 1340}, "color_scheme": "dark"}


def run(page: Page, url: str) -> None:
    page.set_default_timeout(TIMEOUT)
    page.goto(url)
    page.locator("#chips li").first.wait_for(state="attached")
    page.get_by_role("button", name="Attack this picture").click()
    page.locator("#sentence", has_text="Done in").wait_for()
    page.wait_for_timeout(700)


def save(png: bytes, path: Path) -> None:
    """With a palette, which is enough for a page of few colours."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path.name} must be at most {MAX_BYTES // 1000} kB.")


def main() -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)))
    folder = ROOT / "tapt" / "ui"
    with (
        tempfile.TemporaryDirectory() as empty,
        serving(Path(empty)) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=browser_path, args=CHROMIUM_FLAGS)
        page = browser.new_page(**DESKTOP)
        run(page, url)
        save(page.screenshot(), folder / "screenshot.png")
        page = browser.new_page(**PHONE)
        run(page, url)
        save(page.screenshot(), folder / "screenshot-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
