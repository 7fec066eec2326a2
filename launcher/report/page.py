"""A page of HTML that stands by itself: sections of sentences, tables and figures.

It asks the network for nothing, and says so to the browser. Its figures are drawn by plotly, which
is in the page; without scripts there are the numbers behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from launcher.report.figures import Figure, as_rows, in_words, to_json
from launcher.runs.redaction import redacted


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, from top to bottom."""

    title: str
    words: str = ""
    """A paragraph."""

    table: Table | None = None
    text: str = ""
    """Shown as it is laid out."""

    figures: Sequence[Figure] = ()
    folded: bool = False
    """Whether it is opened by who wants it."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom."""

    title: str
    facts: str
    """In a line below the title."""

    state: str = ""
    """In one word, beside the title."""

    cards: Sequence[tuple[str, str]] = ()
    """(what, value): what is seen first."""

    sections: Sequence[Section] = ()


def render(page: Page) -> str:
    """Return the page as HTML. What the environment keeps secret is not in it."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    def inside_script(figure: Figure) -> Markup:
        text = to_json(figure).replace("<", "\\u003c")  # no name of a curve ends the script
        return Markup(text)  # noqa: S704

    template = resources.files("launcher.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    has_figures = any(section.figures for section in page.sections)
    html = environment.from_string(template).render(
        page=page, json=inside_script, in_words=in_words, as_rows=as_rows, has_figures=has_figures
    )
    library = get_plotlyjs() if has_figures else ""
    return redacted(html).replace("/*plotly*/", library)
