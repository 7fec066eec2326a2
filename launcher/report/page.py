"""A page of HTML that stands by itself: a table, then sections of curves and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from launcher.report.plots import Plot, draw, has_images, svg


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page."""

    title: str
    text: str = ""
    """Shown as it is laid out."""

    plot: Plot | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom."""

    title: str
    facts: str
    """In a line below the title."""

    head: Sequence[str] = ()
    """Names of the table's columns; the last holds sentences, the others values."""

    rows: Sequence[Sequence[str]] = ()
    commands: str = ""
    """To be copied."""

    sections: Sequence[Section] = ()


def render(page: Page) -> str:
    """Return the page as HTML, with curves as images where matplotlib is installed."""
    from jinja2 import Environment
    from markupsafe import Markup, escape

    def drawn(plot: Plot) -> Markup:
        if has_images():
            return Markup(svg(plot))  # noqa: S704  # matplotlib's own, and it escapes texts
        return Markup("<pre>{}</pre>").format(escape(draw(plot)))

    template = resources.files("launcher.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True)
    return environment.from_string(template).render(page=page, drawn=drawn)
