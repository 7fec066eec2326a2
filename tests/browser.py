"""Open pages in a real browser without a screen, and read what they show."""

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
"""Smallest contrast between text and its background (WCAG 2.2, level AA)."""


@dataclass(frozen=True)
class Seen:
    """Page that is open in the browser."""

    driver: webdriver.Chrome
    """Connection to the browser."""

    def ask(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        """Return the errors and warnings that the browser logged for the page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def titles(self) -> list[str]:
        """Return the titles of the figures."""
        headings = self.driver.find_elements(By.CSS_SELECTOR, "figure h3")
        return [heading.text for heading in headings]

    def curves(self, title: str) -> dict[str, tuple[list[float], list[float]]]:
        """Return the (xs, ys) of each curve of a figure by name."""
        index = self.titles().index(title)
        curves = self.ask(
            f"[...document.querySelectorAll('.drawing')[{index}].data]"
            ".map(curve => [curve.name ?? '', [...curve.x], [...curve.y]])"
        )
        return {name: (xs, ys) for name, xs, ys in curves}

    def legend(self, title: str) -> list[str]:
        """Return the visible entries of a figure's legend."""
        index = self.titles().index(title)
        return list(
            self.ask(
                f"[...document.querySelectorAll('.drawing')[{index}]"
                ".querySelectorAll('.legendtext')].map(entry => entry.textContent)"
            )
        )

    def coloured(self, title: str) -> dict[str, int]:
        """Return the number of pixels of a figure in each colour of its curves and bars."""
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
        """Return the contrast of each kind of text with the background of the page."""
        kinds = ("h1", ".facts", "dd", "dt", "td", "th", "summary", "a", "pre", ".xtick text")
        colours = self.ask(
            "Object.fromEntries("
            f"{list(kinds)}.map(kind => [kind, document.querySelector(kind)])"
            ".filter(([kind, element]) => element)"
            ".map(([kind, element]) => [kind, getComputedStyle(element)])"
            ".map(([kind, style]) => [kind, kind.includes('text') ? style.fill : style.color]))"
        )
        background = self.ask("getComputedStyle(document.body).backgroundColor")
        return {kind: _contrast(colour, background) for kind, colour in colours.items()}


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start the browser, and end it on exit from the context."""
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
    """Open a page on a screen of `width` pixels, in the light or the dark colour scheme."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(page.resolve().as_uri())  # returns when the scripts of the page have run
    return Seen(driver)


def _contrast(text: str, background: str) -> float:
    """Return the contrast ratio of two colours by the definition of WCAG."""
    light, dark = sorted((_luminance(text), _luminance(background)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(channel) / 255 for channel in colour.strip("rgba()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
