"""Pages of real runs, looked at in a real browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CONTRAST, browser, look, needs_browser
from selenium import webdriver
from support import ROOT, Commands, read_lines

from launcher.analysis.time_shares import smoothed, stragglers
from launcher.report.figures import MOST_POINTS, thinned
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

STRAGGLING = ROOT / "tests/recipes/straggling.py"
FAILING = ROOT / "tests/recipes/failing.py"


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Path:
    """Return a folder of runs: one with a straggler, one that failed, one that was gone on with."""

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
    """Start one browser for all pages."""
    with browser() as started:
        yield started


@needs_browser
def test_a_page_shows_what_was_measured(runs: Path, driver: webdriver.Chrome) -> None:
    """Figures hold the numbers of metrics.jsonl, are drawn, and are named for who reads them."""
    seen = look(driver, runs / "slow/report.html")
    assert seen.complaints() == []
    rows = [row for row in read_lines(runs / "slow/metrics.jsonl") if "grad_norm" in row]
    steps = [row["step"] for row in rows]
    assert seen.titles()[:2] == ["loss", "accuracy"]
    assert seen.legend("loss") == ["training", "training, smoothed", "held-out"]
    xs, ys = seen.curves("loss")["training"]
    assert xs == steps
    assert ys == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    for title, name in (("learning rate", "lr"), ("momentum", "momentum")):
        curves = seen.curves(title)
        assert curves["used"][1] == pytest.approx([row[name] for row in rows], rel=1e-5)
        planned = dict(zip(*curves["planned"], strict=True))
        used = dict(zip(*curves["used"], strict=True))
        assert [planned[step] for step in steps] == pytest.approx([used[step] for step in steps])
    assert seen.curves("gradient noise scale")["B_simple"][0][0] == 1
    parts = seen.curves("where the time of a step goes")
    assert list(parts) == [
        "waiting for data",
        "waiting for communication",
        "computing and the rest",
    ]
    sums = [sum(ys) for ys in zip(*(ys for _, ys in parts.values()), strict=True)]
    assert sums == pytest.approx([1e3 * row["step_seconds"] for row in rows], rel=0.01)


@needs_browser
def test_each_figure_is_seen(runs: Path, driver: webdriver.Chrome) -> None:
    """In a picture of each figure there are pixels of its first curve's or bar's colour."""
    seen = look(driver, runs / "slow/report.html")
    titles = seen.titles()
    assert len(titles) >= 12
    for title in titles:
        colours = seen.coloured(title)
        assert sum(colours.values()) > 20, (title, colours)


@needs_browser
def test_the_straggler_is_named(runs: Path, driver: webdriver.Chrome) -> None:
    """The rank that pauses is named, and its bar is the longest."""
    seen = look(driver, runs / "slow/report.html")
    text = seen.ask("document.body.innerText")
    assert re.search(r"The others wait for rank 1 \(\d", text), text
    [(names, values)] = seen.curves(
        "a rank's own part of a step, without waiting for others"
    ).values()
    assert [str(name) for name in names] == ["0", "1"]
    assert values[1] > values[0] + 15, "milliseconds; the pause is 20"


@needs_browser
@pytest.mark.parametrize("page", ["slow/report.html", "both.html", "failed/report.html"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_readable(runs: Path, driver: webdriver.Chrome, page: str, dark: bool) -> None:
    """On a phone, in light and dark: nothing is cut off, text is told from what is behind it."""
    seen = look(driver, runs / page, width=390, dark=dark)
    assert seen.ask("document.documentElement.scrollWidth") <= 390
    light = seen.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark
    contrasts = seen.contrasts()
    assert {"h1", "td", "summary"} <= contrasts.keys() or page.startswith("failed")
    assert all(contrast >= CONTRAST for contrast in contrasts.values()), contrasts
    assert seen.complaints() == []


@needs_browser
def test_a_page_asks_for_nothing(runs: Path, driver: webdriver.Chrome) -> None:
    """It loads nothing besides itself, and what it would load is forbidden."""
    seen = look(driver, runs / "slow/report.html")
    assert seen.ask("performance.getEntriesByType('resource').length") == 0
    seen.ask("void fetch('https://example.com').catch(() => { window.refused = true; })")
    driver.set_script_timeout(10)
    driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert seen.ask("window.refused") is True
    assert "Content Security Policy" in seen.complaints()[0]


@needs_browser
def test_each_figure_is_said_in_words(runs: Path, driver: webdriver.Chrome) -> None:
    """Who cannot see a figure is told its curves with their ends, and finds a table of numbers."""
    seen = look(driver, runs / "slow/report.html")
    labels = seen.ask("[...document.querySelectorAll('[role=img]')].map(e => e.ariaLabel)")
    assert len(labels) == len(seen.titles())
    last = [row for row in read_lines(runs / "slow/metrics.jsonl") if "grad_norm" in row][-1]
    assert f"to {last['loss']:.4g} at {last['step']}" in labels[0]
    for label, title in zip(labels, seen.titles(), strict=True):
        assert label.startswith(title)
    rows = seen.ask("[...document.querySelectorAll('figcaption tbody')].map(e => e.rows.length)")
    assert min(rows) >= 1


@needs_browser
def test_without_scripts_there_are_numbers(runs: Path, driver: webdriver.Chrome) -> None:
    """Where scripts are not run, the page has the words and the tables."""
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        look(driver, runs / "slow/report.html")
        source = driver.page_source
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "js-plotly-plot" not in re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert "training, smoothed: from" in source


@needs_browser
def test_a_failed_run_has_its_post_mortem_first(runs: Path, driver: webdriver.Chrome) -> None:
    """Who failed and how come before anything else."""
    seen = look(driver, runs / "failed/report.html")
    assert seen.ask("document.querySelector('.state').textContent") == "failed"
    assert seen.ask("document.querySelector('h2').textContent") == "Post-mortem"
    text = seen.ask("document.querySelector('section').innerText")
    assert "ValueError: the loss of rank one" in text
    assert "failed on rank 1" in text
    assert seen.complaints() == []


@needs_browser
def test_attempts_are_on_the_clock(runs: Path, driver: webdriver.Chrome) -> None:
    """A run that was gone on with has a stretch of time for each attempt, and its checkpoints."""
    seen = look(driver, runs / "on/report.html")
    curves = seen.curves("what happened when")
    assert list(curves) == ["1", "2", "checkpoint"]
    events = read_lines(runs / "on/events.jsonl")
    began = [event["time"] for event in events if event["event"] == "began"]
    bases = seen.ask(
        "[...document.querySelectorAll('.drawing')]"
        ".flatMap(d => d.data.filter(e => e.base).map(e => e.base[0] / 1000))"
    )
    assert bases == pytest.approx(began, abs=0.01)
    text = seen.ask("document.body.innerText")
    assert "finished after step 36" in text
    assert "finished after step 60" in text
    assert seen.complaints() == []


@needs_browser
def test_runs_are_compared(runs: Path, driver: webdriver.Chrome) -> None:
    """What sets them apart comes first; their curves lie on each other."""
    seen = look(driver, runs / "both.html")
    assert seen.complaints() == []
    assert seen.ask("document.querySelector('h2').textContent") == "What sets them apart"
    rows = seen.ask(
        "[...document.querySelector('table').rows].map(row => [...row.cells].map(c => c.innerText))"
    )
    assert rows[0] == ["", "slow", "on"]
    found = {row[0]: row[1:] for row in rows[1:]}
    assert found["lr"] == ["0.1", "0.2"]
    assert found["epochs"] == ["10", "5"]
    assert found["nproc_per_node"] == ["2", "1"]
    assert "batch_size" not in found, "it is the same"
    for name in ("slow", "on"):
        history = History(RunDir(runs / name))
        xs, ys = seen.curves("training loss, smoothed")[name]
        assert xs == list(history.steps["step"])
        assert ys == pytest.approx(smoothed(history.steps["loss"]), rel=1e-5)
        seconds, _ = seen.curves("training loss over the time at work, smoothed")[name]
        assert 0 < seconds[0] < seconds[-1] <= (history.seconds_at_work() or 0)


def test_what_finders_measured_is_on_the_page(run: Commands) -> None:
    """The plots of a range test and of the loader, of folders that are given."""
    done = run("launcher", "run", "digits", "-n", "1", "epochs=1", "--out", "one")
    assert done.exit_code == 0, done.stderr
    done = run("launcher", "find", "lr", "digits", "-n", "1", "--steps", "40", "--out", "lr")
    assert (run.folder / "lr/curve.json").is_file(), done.stderr
    done = run("launcher", "report", "one", "lr", "--out", "page.html")
    assert done.exit_code == 0, done.stderr
    page = (run.folder / "page.html").read_text()
    assert "<h2>Learning rate, at a batch of 128</h2>" in page
    assert "digits: loss of 128 samples over the learning rate" in page
    done = run("launcher", "report", "lr")
    assert done.exit_code == 2
    assert "Give the folder of one as well." in done.stderr


def test_the_run_that_was_tuned_is_found(run: Commands) -> None:
    """Where settings came from a tuned.yaml, what was measured beside it is on the page."""
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
        plan = (folder / "run.yaml").read_text()
        plan = re.sub(r"workers_per_rank: \d+", f"workers_per_rank: {workers}", plan, count=1)
        (folder / "run.yaml").write_text(plan)
        (folder / "reading.json").write_text(json.dumps({"samples_per_second": rate}))
    done = run("launcher", "report", "one")
    assert done.exit_code == 0, done.stderr
    page = (run.folder / "one/report.html").read_text()
    assert "DataLoader workers" in page
    assert "from 100 at workers 0 to 190 at 2" in page


@pytest.mark.parametrize(
    ("folder", "message"),
    [("missing", "missing is no run folder: it does not exist"), (".", "it has no run.yaml")],
)
def test_what_is_no_run_is_refused(run: Commands, folder: str, message: str) -> None:
    """With what it is instead, and nothing written."""
    done = run("launcher", "report", folder)
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(run.folder.iterdir()) == []


def test_a_folder_of_another_version_is_refused(run: Commands) -> None:
    """A plan that lacks what this version knows is named, without a traceback."""
    (run.folder / "old").mkdir()
    (run.folder / "old/run.yaml").write_text("recipe: digits\nplan:\n  recipe: digits\n")
    done = run("launcher", "report", "old")
    assert done.exit_code == 2
    assert "incompatible version" in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_are_not_on_a_page(run: Commands) -> None:
    """A key of the environment that an error names is hidden, on the page and in the folder."""
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


def test_many_points_are_thinned_to_their_extremes() -> None:
    """A spike among many steps is still there; gaps stay gaps; a logarithm has no zero."""
    xs: list[float] = list(range(100_000))
    ys = [math.sin(x / 1000) for x in xs]
    ys[54_321] = 50.0
    few, kept = thinned(xs, ys)
    assert len(few) <= MOST_POINTS + 2
    assert (few[0], few[-1]) == (0, 99_999)
    assert max(kept) == 50.0
    assert thinned([1, 2, 3], [1.0, 0.0, 2.0], log=True) == ([1, 3], [1.0, 2.0])
    gap = thinned([1, 2, 3], [1.0, math.nan, 2.0])[1]
    assert math.isnan(gap[1])


def test_a_smooth_line_has_the_gaps_of_what_it_smooths() -> None:
    """A loss that is not finite is not drawn as the mean of those before it."""
    assert smoothed([2.0, 2.0, math.nan, 2.0])[:2] == [2.0, 2.0]
    assert math.isnan(smoothed([2.0, math.nan])[1])
    assert smoothed([math.nan, 3.0])[1] == 3.0


def test_stragglers_are_measured_by_the_others() -> None:
    """With two ranks the slow one by the fast one; none where all are alike."""
    assert stragglers([1.0, 3.0]) == [(1, 3.0)]
    assert stragglers([1.0, 1.0, 1.1, 1.0]) == []
    assert stragglers([1.0, 2.0, 1.0, 4.0]) == [(3, 4.0), (1, 2.0)]
    assert stragglers([1.0]) == []


def test_a_long_name_does_not_end_the_script(run: Commands) -> None:
    """A metric that is named like HTML is text, in the page and in its figures."""
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
