"""Every block of the README and of docs/ is run, page by page, in its order, in a fresh folder.

What a block is, its fence and the line above it say:

    ```sh                             is run; a line that fails ends the block, and fails the test
    ```python                         is run as a script
    ```yaml title="values.yaml"       any language: is written to a file of that name
    <!-- printed -->                  above a block of text: the block before printed these lines
    <!-- not run: needs 8 GPUs -->    above any block: only shown, for this reason
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from browser import browser, look, needs_browser
from local import Cluster, make_cluster
from local_configuration import ClusterError
from support import BIN, ROOT, Commands, fail_on_leftovers

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
OTHERS = tuple(ROOT / name for name in ("CONTRIBUTING.md", "recipes/README.md", "slurm/README.md"))
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?: +title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
OF_SLURM = re.compile(r"^launcher (submit|status|logs|cancel)\b", re.MULTILINE)
PROJECT = ("recipes", "slurm", "benchmarks", "docs", "Makefile", "pyproject.toml")


@dataclass(frozen=True)
class Block:
    """A block of a page, as its fence describes it."""

    page: Path
    number: int
    mark: str
    language: str
    title: str
    text: str

    @property
    def name(self) -> str:
        """The page and which of its blocks it is."""
        return f"{self.page.stem}-{self.number}"

    @property
    def runs(self) -> bool:
        """Whether something is to be done with it."""
        does = self.title or self.language in ("sh", "python") or self.mark == "printed"
        return bool(does) and not self.mark.startswith("not run: ")


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    return [
        Block(
            page=page,
            number=number,
            mark=found["mark"] or "",
            language=found["language"],
            title=found["title"] or "",
            text=re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
        )
        for number, found in enumerate(FENCE.finditer(page.read_text()), start=1)
    ]


def plain_commands(text: str) -> list[list[str]] | None:
    """Return the words of each command, where no line of the block needs a shell."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        if any(set(word) <= set("();<>|&") for word in words) or set("$`~*") & set(line):
            return None
        commands.append(shlex.split(line, comments=True))
    if any("=" in command[0] for command in commands if command):
        return None
    return [command for command in commands if command]


@dataclass
class Reader:
    """Someone who reads a page and does what it says."""

    run: Commands
    env: dict[str, str] = field(default_factory=dict)
    printed: str = ""
    """What the last block printed."""

    def do(self, block: Block) -> None:
        """Write, run or compare a block."""
        if block.title:
            (self.run.folder / block.title).write_text(block.text)
        elif block.language == "python":
            script = self.run.folder / f"block{block.number}.py"
            script.write_text(block.text)
            self.printed = self._checked("python", script.name)
        elif block.language == "sh":
            self._type(block.text)
        else:
            for line in block.text.splitlines():
                assert line in self.printed.splitlines()

    def _type(self, text: str) -> None:
        # The environment is the one that runs this test.
        text = re.sub(r"^make (?=\w)", f"make VENV={sys.prefix} -o {sys.prefix}/.ready ", text)
        commands = plain_commands(text) or [["bash", "-euo", "pipefail", "-c", text]]
        self.printed = "".join(self._checked(*command) for command in commands)
        for shown in re.findall(r"^run folder: (\S+)$", self.printed, re.MULTILINE):
            assert (self.run.folder / shown).is_dir()

    def _checked(self, *command: str) -> str:
        warm = command[0] in ("bash", "python")
        done = self.run(*command, env=self.env, warm=warm)
        assert done.exit_code == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster | None]:
    """Start a cluster of virtual nodes; None where Slurm is not installed."""
    try:
        made = make_cluster(2, cpus=16)
    except ClusterError:
        yield None
        return
    yield made
    made.bring_down()


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Reader]]:
    """Return a reader for each page, with a copy of the project less the package."""
    made = {}
    for page in PAGES:
        folder = tmp_path_factory.mktemp(page.stem)
        for name in PROJECT:
            source, target = ROOT / name, folder / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        run = Commands(folder, f"{os.getpid()}-{folder}", preloaded=("sklearn.datasets",))
        made[page] = Reader(run, {"XDG_CACHE_HOME": str(folder / "cache")})
    yield made
    for reader in made.values():
        fail_on_leftovers(reader.run.mark)


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks_of(page) if block.runs],
    ids=lambda block: block.name,
)
def test_blocks_run(
    readers: dict[Path, Reader], block: Block, request: pytest.FixtureRequest
) -> None:
    """A block that is shown as a command or a script ends with exit code 0."""
    reader = readers[block.page]
    if block.language == "sh" and OF_SLURM.search(block.text):
        made = request.getfixturevalue("cluster")
        if made is None:
            pytest.skip("needs Debian's packages slurmctld, slurmd, slurm-client and munge")
        reader.env |= made.env
    reader.do(block)


@pytest.mark.parametrize("text", [*PAGES, *OTHERS], ids=lambda path: path.stem)
def test_links_lead_somewhere(text: Path) -> None:
    """Relative links of the documents name files that exist."""
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text.read_text()):
        if "://" not in link:
            assert (text.parent / link).exists(), link


def test_generated_pages_are_those_of_the_code() -> None:
    """Settings, commands and public names are documented as they are."""
    subprocess.run([sys.executable, DOCS / "generate.py", "--check"], check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [BIN / "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


def test_the_site_needs_no_network(site: Path) -> None:
    """No page loads a script, a style, a font or an image from elsewhere."""
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        assert loads.findall(page.read_text()) == []
    for style in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//", style.read_text()) == []


@needs_browser
def test_pages_fit_a_phone(site: Path) -> None:
    """No page is wider than a screen of 390 pixels, and none has an error in its scripts."""
    with browser() as driver:
        for page in sorted(site.glob("*.html")):
            seen = look(driver, page, width=390)
            assert seen.ask("document.documentElement.scrollWidth") <= 390, page.name
            errors = [each for each in seen.complaints() if "file://" not in each]
            assert errors == [], page.name
