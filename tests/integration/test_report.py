"""`launcher report`: pages of real runs, checked in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CONTRAST, browser, look, needs_browser
from selenium import webdriver
from support import ROOT, Commands, read_lines

from launcher.analysis.time_shares import smoothed
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

STRAGGLING = ROOT / "tests/recipes/straggling.py"

FAILING = ROOT / "tests/recipes/failing.py"


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Path:
    """Return a folder with three runs: one with a straggler, a failed one and a resumed one."""

    def launch(*arguments: str | Path, code: int = 0) -> None:
        done = module_run("launcher", *arguments)
        assert done.exit_code == code, done.stderr

    launch(
        *("run", STRAGGLING, "-n", "2", "epochs=10", "checkpoint_every=20", "noise_scale=true"),
        *("--out", "slow"),
    )
    launch("run", FAILING, "-n", "2", "how=raise", "rank=1", "--out", "failed", code=1)
    launch("run", "digits", "-n", "2", "epochs=3", "lr=0.2", "checkpoint_every=6", "--out", "on")
    launch("resume", "on", "-n", "1", "epochs=5")
    launch("report", "slow")
    launch("report", "failed")
    launch("report", "on")
    launch("report", "slow", "on", "--out", "both.html")
    return module_run.folder


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    """Start one browser for all tests of this module."""
    with browser() as started:
        yield started


@needs_browser
def test_figures_show_the_measured_values(runs: Path, driver: webdriver.Chrome) -> None:
    """The curves in the browser hold the numbers of metrics.jsonl under their names."""
    shown = look(driver, runs / "slow/report.html")
    assert shown.complaints() == []
    rows = [row for row in read_lines(runs / "slow/metrics.jsonl") if "grad_norm" in row]
    steps = [row["step"] for row in rows]
    assert shown.titles()[:2] == ["loss", "accuracy"]
    assert shown.legend("loss") == ["training", "training, smoothed", "held-out"]
    xs, ys = shown.curves("loss")["training"]
    assert xs == steps
    assert ys == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    for title, name in (("learning rate", "lr"), ("momentum", "momentum")):
        curves = shown.curves(title)
        assert curves["used"][1] == pytest.approx([row[name] for row in rows], rel=1e-5)
        planned = dict(zip(*curves["planned"], strict=True))
        used = dict(zip(*curves["used"], strict=True))
        assert [planned[step] for step in steps] == pytest.approx([used[step] for step in steps])
    assert shown.curves("gradient noise scale")["B_simple"][0][0] == 1
    parts = shown.curves("breakdown of step time")
    assert len(parts) == 3
    for name, word in zip(parts, ("data", "communication", "computing"), strict=True):
        assert word in name
    sums = [sum(ys) for ys in zip(*(ys for _, ys in parts.values()), strict=True)]
    assert sums == pytest.approx([1e3 * row["step_seconds"] for row in rows], rel=0.01)


@needs_browser
def test_each_figure_is_drawn(runs: Path, driver: webdriver.Chrome) -> None:
    """A screenshot of each figure has pixels in the colours of its curves or bars."""
    shown = look(driver, runs / "slow/report.html")
    titles = shown.titles()
    assert len(titles) >= 12
    for title in titles:
        colours = shown.coloured(title)
        assert sum(colours.values()) > 20, (title, colours)


@needs_browser
def test_the_straggler_is_named(runs: Path, driver: webdriver.Chrome) -> None:
    """The rank that pauses is named as a straggler and has the longest bar."""
    shown = look(driver, runs / "slow/report.html")
    text = shown.ask("document.body.innerText")
    assert re.search(r"rank 1 \(\d", text), text
    title = "step time of each rank, excluding waits for other ranks"
    [(names, values)] = shown.curves(title).values()
    assert [str(name) for name in names] == ["0", "1"]
    assert values[1] > values[0] + 15, "milliseconds; the pause is 20"


@needs_browser
@pytest.mark.parametrize("page", ["slow/report.html", "both.html", "failed/report.html"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_readable(runs: Path, driver: webdriver.Chrome, page: str, dark: bool) -> None:
    """On a phone, in light and dark, nothing overflows and text has the contrast of WCAG AA."""
    shown = look(driver, runs / page, width=390, dark=dark)
    assert shown.ask("document.documentElement.scrollWidth") <= 390
    is_light = shown.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert is_light is not dark
    contrasts = shown.contrasts()
    assert {"h1", "td", "summary"} <= contrasts.keys() or page.startswith("failed")
    assert all(contrast >= CONTRAST for contrast in contrasts.values()), contrasts
    assert shown.complaints() == []


@needs_browser
def test_a_page_loads_nothing(runs: Path, driver: webdriver.Chrome) -> None:
    """A page loads no resource, and its content security policy blocks requests."""
    shown = look(driver, runs / "slow/report.html")
    assert shown.ask("performance.getEntriesByType('resource').length") == 0
    shown.ask("void fetch('https://example.com').catch(() => { window.refused = true; })")
    driver.set_script_timeout(10)
    driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert shown.ask("window.refused") is True
    assert "Content Security Policy" in shown.complaints()[0]


@needs_browser
def test_each_figure_has_a_description(runs: Path, driver: webdriver.Chrome) -> None:
    """Each figure has a text alternative with its last value, and a table of numbers."""
    shown = look(driver, runs / "slow/report.html")
    labels = shown.ask("[...document.querySelectorAll('[role=img]')].map(img => img.ariaLabel)")
    assert len(labels) == len(shown.titles())
    last = [row for row in read_lines(runs / "slow/metrics.jsonl") if "grad_norm" in row][-1]
    assert f"to {last['loss']:.4g} at {last['step']}" in labels[0]
    for label, title in zip(labels, shown.titles(), strict=True):
        assert label.startswith(title)
    rows = shown.ask(
        "[...document.querySelectorAll('figcaption tbody')].map(body => body.rows.length)"
    )
    assert min(rows) >= 1


@needs_browser
def test_without_scripts_there_are_numbers(runs: Path, driver: webdriver.Chrome) -> None:
    """Without scripts a page still has the descriptions and tables of its figures."""
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        look(driver, runs / "slow/report.html")
        source = driver.page_source
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "js-plotly-plot" not in re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert "training, smoothed: from" in source


@needs_browser
def test_a_failure_comes_first(runs: Path, driver: webdriver.Chrome) -> None:
    """The page of a failed run begins with the rank that failed and its exception."""
    shown = look(driver, runs / "failed/report.html")
    assert shown.ask("document.querySelector('.state').textContent") == "failed"
    assert shown.ask("document.querySelector('h2').textContent") == "Failure"
    text = shown.ask("document.querySelector('section').innerText")
    assert "ValueError: the loss of rank one" in text
    assert "rank 1" in text
    assert shown.complaints() == []


@needs_browser
def test_attempts_are_on_a_timeline(runs: Path, driver: webdriver.Chrome) -> None:
    """The timeline of a resumed run has a span for each attempt, and its checkpoints."""
    shown = look(driver, runs / "on/report.html")
    curves = shown.curves("attempts and checkpoints over time")
    assert list(curves) == ["1", "2", "checkpoint"]
    events = read_lines(runs / "on/events.jsonl")
    began = [event["time"] for event in events if event["event"] == "began"]
    bases = shown.ask(
        "[...document.querySelectorAll('.drawing')]"
        ".flatMap(d => d.data.filter(bar => bar.base).map(bar => bar.base[0] / 1000))"
    )
    assert bases == pytest.approx(began, abs=0.01)
    text = shown.ask("document.body.innerText")
    assert "finished after step 36" in text
    assert "finished after step 60" in text
    assert shown.complaints() == []


@needs_browser
def test_runs_are_compared(runs: Path, driver: webdriver.Chrome) -> None:
    """A comparison begins with the differing settings and draws the curves of all runs together."""
    shown = look(driver, runs / "both.html")
    assert shown.complaints() == []
    assert shown.ask("document.querySelector('h2').textContent") == "Differences"
    rows = shown.ask(
        "[...document.querySelector('table').rows].map(row => [...row.cells].map(c => c.innerText))"
    )
    assert rows[0] == ["", "slow", "on"]
    differences = {row[0]: row[1:] for row in rows[1:]}
    assert differences["lr"] == ["0.1", "0.2"]
    assert differences["epochs"] == ["10", "5"]
    assert differences["nproc_per_node"] == ["2", "1"]
    assert "batch_size" not in differences, "both runs have the same"
    for name in ("slow", "on"):
        history = History(RunDir(runs / name))
        xs, ys = shown.curves("training loss, smoothed")[name]
        assert xs == list(history.steps["step"])
        assert ys == pytest.approx(smoothed(history.steps["loss"]), rel=1e-5)
        seconds, _ = shown.curves("training loss over run time, smoothed")[name]
        assert 0 < seconds[0] < seconds[-1] <= (history.active_seconds() or 0)


def test_a_page_shows_a_range_test(run: Commands) -> None:
    """The folder of `launcher find lr` adds its plot to a page, and is refused without a run."""
    done = run("launcher", "run", "digits", "-n", "1", "epochs=1", "--out", "one")
    assert done.exit_code == 0, done.stderr
    find = ("launcher", "find", "lr", "digits", "-n", "1", "--from", "1e-4", "--steps", "60")
    done = run(*find, "--out", "lr")
    assert done.exit_code == 0, done.stderr
    done = run("launcher", "report", "one", "lr", "--out", "page.html")
    assert done.exit_code == 0, done.stderr
    page = (run.folder / "page.html").read_text()
    assert "<h2>Learning rate, at a batch of 128</h2>" in page
    assert "digits: loss of 128 samples" in page
    assert page.count("final loss") > 2
    done = run("launcher", "report", "lr")
    assert done.exit_code == 2
    assert "lr" in done.stderr


def test_a_page_shows_the_tuning_of_its_run(run: Commands) -> None:
    """A run with --config tuned.yaml shows what `launcher tune` measured in that folder."""
    tuned = run.folder / "runs/tuned"
    (tuned / "loader").mkdir(parents=True)
    (tuned / "tuned.yaml").write_text("lr: 0.05\n")
    done = run(
        *("launcher", "run", "digits", "-n", "1", "epochs=1", "--config", "runs/tuned/tuned.yaml"),
        *("--out", "one"),
    )
    assert done.exit_code == 0, done.stderr
    for workers, rate in ((0, 100.0), (2, 190.0)):
        folder = tuned / f"loader/workers-{workers}"
        folder.mkdir()
        (folder / "run.yaml").write_text((run.folder / "one/run.yaml").read_text())
        text = (folder / "run.yaml").read_text()
        text = re.sub(r"workers_per_rank: \d+", f"workers_per_rank: {workers}", text, count=1)
        (folder / "run.yaml").write_text(text)
        (folder / "reading.json").write_text(json.dumps({"samples_per_second": rate}))
    done = run("launcher", "report", "one")
    assert done.exit_code == 0, done.stderr
    page = (run.folder / "one/report.html").read_text()
    assert "DataLoader workers" in page
    assert "from 100 at workers 0 to 190 at 2" in page


@pytest.mark.parametrize(
    ("folder", "fragment"),
    [("missing", "missing"), (".", "run.yaml")],
)
def test_another_folder_is_refused(run: Commands, folder: str, fragment: str) -> None:
    """A folder without a run gives exit code 2, and nothing is written."""
    done = run("launcher", "report", folder)
    assert done.exit_code == 2
    assert fragment in done.stderr
    assert list(run.folder.iterdir()) == []


def test_a_folder_of_another_version_is_refused(run: Commands) -> None:
    """A run.yaml that lacks fields of this version is refused without a traceback."""
    (run.folder / "old").mkdir()
    (run.folder / "old/run.yaml").write_text("recipe: digits\nplan:\n  recipe: digits\n")
    done = run("launcher", "report", "old")
    assert done.exit_code == 2
    assert "nodes" in done.stderr
    assert "Traceback" not in done.stderr


def test_secrets_are_redacted(run: Commands) -> None:
    """An API key of the environment is redacted on the page and in every file of the folder."""
    key = "a1b2c3d4e5f6a7b8"
    (run.folder / "leaky.py").write_text(
        "import os\nfrom dataclasses import replace\nfrom launcher.recipes.digits import digits\n"
        "from launcher import Recipe\n\n\ndef leaky() -> Recipe:\n"
        "    def forward(model, batch):\n"
        "        key = os.environ['STORE_API_KEY']\n"
        "        raise OSError(f'cannot reach https://me:{key}@x.org with {key}')\n"
        "    return replace(digits(), name='leaky', forward=forward)\n"
    )
    done = run("launcher", "run", "leaky.py", "-n", "1", "--out", "out", env={"STORE_API_KEY": key})
    assert done.exit_code == 1
    done = run("launcher", "report", "out", env={"STORE_API_KEY": key})
    page = (run.folder / "out/report.html").read_text()
    assert "cannot reach https://[hidden]@x.org with [hidden]" in page
    assert key not in page
    for path in (run.folder / "out").rglob("*"):
        assert path.is_dir() or key not in path.read_text(errors="replace"), path


def test_a_metric_name_cannot_end_the_script(run: Commands) -> None:
    """A metric with HTML in its name is escaped in the page and in its figures."""
    (run.folder / "odd.py").write_text(
        "from dataclasses import replace\nfrom launcher.recipes.digits import digits\n"
        "from launcher import Recipe\n\n\ndef odd() -> Recipe:\n"
        "    base = digits()\n"
        "    return replace(base, metrics={'</script><b>x': base.metrics['accuracy']})\n"
    )
    done = run("launcher", "run", "odd.py", "-n", "1", "epochs=1", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert run("launcher", "report", "out").exit_code == 0
    page = (run.folder / "out/report.html").read_text()
    assert "</script><b>" not in page
