"""A real browser without a screen, for what pages show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's packages chromium and chromium-driver, which apt-get could not install",
)

CONTRAST = 4.5
"""Between text and what is behind it (WCAG 2.2, level AA)."""


@dataclass(frozen=True)
class Seen:
    """A page as it is shown."""

    driver: webdriver.Chrome

    def ask(self, script: str) -> Any:
        """Return what a line of JavaScript returns."""
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        """Return what the browser had to say about the page, errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def titles(self) -> list[str]:
        """Return the titles of the figures."""
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, "figure h3")]

    def curves(self, title: str) -> dict[str, tuple[list[float], list[float]]]:
        """Return (xs, ys) by name of what the figure with a title has drawn."""
        index = self.titles().index(title)
        found = self.ask(
            f"[...document.querySelectorAll('.drawing')[{index}].data]"
            ".map(each => [each.name ?? '', [...each.x], [...each.y]])"
        )
        return {name: (xs, ys) for name, xs, ys in found}

    def legend(self, title: str) -> list[str]:
        """Return the legend of a figure, as it can be read."""
        index = self.titles().index(title)
        return list(
            self.ask(
                f"[...document.querySelectorAll('.drawing')[{index}]"
                ".querySelectorAll('.legendtext')].map(each => each.textContent)"
            )
        )

    def coloured(self, title: str) -> dict[str, int]:
        """Return how many pixels of a figure have a curve's or a bar's colour, by that colour."""
        index = self.titles().index(title)
        drawing = self.driver.find_elements(By.CSS_SELECTOR, ".drawing")[index]
        self.driver.execute_script("arguments[0].scrollIntoView()", drawing)
        image = Image.open(BytesIO(drawing.screenshot_as_png)).convert("RGB")
        colours = self.ask(f"document.querySelectorAll('.drawing')[{index}].layout.colorway")
        counts = image.getcolors(image.width * image.height)
        assert counts is not None
        exact = {"#{:02x}{:02x}{:02x}".format(*colour): count for count, colour in counts}  # type: ignore[misc]
        return {colour: exact.get(colour, 0) for colour in colours}

    def contrasts(self) -> dict[str, float]:
        """Return the contrast of each kind of text on the page."""
        kinds = ("h1", ".facts", "dd", "dt", "td", "th", "summary", "a", "pre", ".xtick text")
        colours = self.ask(
            "Object.fromEntries("
            f"{list(kinds)}.map(kind => [kind, document.querySelector(kind)])"
            ".filter(([kind, each]) => each)"
            ".map(([kind, each]) => [kind, getComputedStyle(each)])"
            ".map(([kind, style]) => [kind, kind.includes('text') ? style.fill : style.color]))"
        )
        behind = self.ask("getComputedStyle(document.body).backgroundColor")
        return {kind: _contrast(colour, behind) for kind, colour in colours.items()}


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start the browser, and end it."""
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: webdriver.Chrome, page: Path, *, width: int = 1000, dark: bool = False) -> Seen:
    """Open a page, on a screen so wide, for a reader who likes it light or dark."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(page.resolve().as_uri())  # returns when its scripts have run
    return Seen(driver)


def _contrast(text: str, behind: str) -> float:
    """Return the contrast of two colours, as WCAG has it."""
    light, dark = sorted((_luminance(text), _luminance(behind)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(each) / 255 for each in colour.strip("rgba()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
