"""A self-contained HTML page of paragraphs, tables and figures.

The page loads nothing from the network, and a content security policy makes the browser enforce
that. It contains plotly, which draws the figures. A browser without scripts shows the description
and the numbers of each figure instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from launcher.report.figures import Figure, as_rows, describe, to_json
from launcher.runs.redaction import redacted

_GENERATOR = b'<meta name="generator" content="launcher">'


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text."""

    head: Sequence[str]
    """Names of the columns."""

    rows: Sequence[Sequence[str]]
    """Rows of as many cells as there are columns."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page. Its parts are shown in the order of the fields."""

    title: str
    paragraph: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = ()
    text: str = ""
    """Preformatted text, shown with its line breaks in a monospaced font."""

    folded: bool = False
    """Whether table, figures and text are hidden until the reader opens them."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of a page, shown in the order of the fields."""

    title: str
    facts: str
    """One line below the title."""

    state: str = ""
    """State of the run, shown beside the title; empty for pages of more than one run."""

    cards: Sequence[tuple[str, str]] = ()
    """Pairs (name, value) of the most important numbers."""

    sections: Sequence[Section] = ()


def is_page(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a page that launcher wrote."""
    return _GENERATOR in head


def render(page: Page) -> str:
    """Return the page as HTML, with the values of secret environment variables redacted."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    def script_json(figure: Figure) -> Markup:
        # Escaping "<" keeps a name that contains "</script>" from ending the script element.
        text = to_json(figure).replace("<", "\\u003c")
        return Markup(text)  # noqa: S704

    template = resources.files("launcher.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    has_figures = any(section.figures for section in page.sections)
    html = environment.from_string(template).render(
        page=page, json=script_json, describe=describe, as_rows=as_rows, has_figures=has_figures
    )
    library = get_plotlyjs() if has_figures else ""
    return redacted(html).replace("/*plotly*/", library)
