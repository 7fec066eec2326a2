"""`launcher tune`: the finders together, what they leave, and how it goes on."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from support import ROOT, Commands, Finished

from launcher.analysis.batch_sizes import SizeTrial, fastest_to_the_loss

DIGITS = ("launcher", "tune", "digits", "-n", "2", "--steps", "60", "--seconds", "0.5")


def values_of(file: Path) -> dict[str, object]:
    """Return what a YAML file sets, each line of which says why."""
    text = file.read_text()
    assert all("  # " in line for line in text.splitlines()[1:]), text
    values: dict[str, object] = yaml.safe_load(text)
    return values


@pytest.fixture(scope="module")
def tuned(module_run: Commands) -> Finished:
    """Tune digits, stopped once after the first finder."""
    first = module_run.start(*DIGITS, "--out", "tuned")
    while not (module_run.folder / "tuned/lr.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert "stopped, it goes on with --out tuned\n" in errors
    return module_run(*DIGITS, "--out", "tuned")


def test_it_goes_on_where_it_was_stopped(module_run: Commands, tuned: Finished) -> None:
    """What was found is not looked for again; the lines are a file for --config."""
    assert tuned.exit_code == 0, tuned.stderr
    assert tuned.stdout.count("found before") == 1
    values = values_of(module_run.folder / "tuned/tuned.yaml")
    assert set(values) >= {"lr", "lr_batch_size", "micro_batch_size", "num_workers"}
    planned = module_run("launcher", "plan", "digits", "--config", "tuned/tuned.yaml")
    assert planned.exit_code == 0, planned.stderr
    assert f"lr={values['lr']}" in planned.stdout


@pytest.mark.usefixtures("tuned")
def test_the_page_shows_all_of_it(module_run: Commands) -> None:
    """Every setting with why, and a curve for each finder, in one file that loads nothing."""
    page = (module_run.folder / "tuned/tuned.html").read_text()
    for name in values_of(module_run.folder / "tuned/tuned.yaml"):
        assert f"<td>{name}</td>" in page
    assert page.count('class="drawing"') == page.count("<h2>") - 1 >= 4
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "src=" not in without_scripts
    assert re.findall(r'href="([^#"][^"]*)"', without_scripts) == ["data:,"]


@pytest.mark.usefixtures("tuned")
def test_all_of_it_is_kept(module_run: Commands) -> None:
    """A third time nothing is trained, and the same is said; other questions are refused."""
    before = (module_run.folder / "tuned/tuned.yaml").read_text()
    again = module_run(*DIGITS, "--out", "tuned")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count("found before") >= 4
    assert (module_run.folder / "tuned/tuned.yaml").read_text() == before
    other = module_run(*DIGITS, "--out", "tuned", "batch_size=64")
    assert other.exit_code == 2
    assert "tuned is of another tuning: its overrides is []" in other.stderr


def test_the_batch_follows_the_noise(run: Commands) -> None:
    """A batch far below the noise scale grows up to twice of it; what is given stays."""
    recipe = str(ROOT / "tests/recipes/known_noise.py") + ":known_noise"
    given = ("batch=32", "lr=1e-6", "num_workers=0")
    done = run("launcher", "tune", recipe, "-n", "2", "--steps", "150", *given, "--out", "out")
    assert done.exit_code == 0, done.stderr
    values = values_of(run.folder / "out/tuned.yaml")
    assert values["batch_size"] in (128, 256), "156 is the noise scale"
    assert values["micro_batch_size"] == int(str(values["batch_size"])) // 2
    assert int(str(values["epochs"])) in (6, 8, 9), "4, by as much as the samples are worth less"
    assert {name: values[name] for name in ("batch", "num_workers")} == {
        "batch": 32,
        "num_workers": 0,
    }
    assert "DataLoader workers" not in done.stdout


def trials(*rates: float) -> list[SizeTrial]:
    """Return trials of sizes 8, 16, 32, ... with these samples per second."""
    return [
        SizeTrial(size=8 << number, fits=True, samples_per_second=rate)
        for number, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(
    ("noise_scale", "rates", "size"),
    [
        (1e6, (1.0, 2.0, 4.0, 8.0), 64),  # every doubling halves the time
        (1e6, (1.0, 1.5, 1.55, 1.56), 32),  # the largest is hardly faster than that
        (40.0, (1.0, 2.0, 4.0, 8.0), 32),  # 128 on two ranks is beyond twice the noise scale
        (1e6, (1.0, 1.02, 1.05, 1.06), 8),  # not for less than a tenth of the time
        (1.0, (1.0, 1.5, 2.0, 2.5), 8),  # all are beyond it
        (1e6, (4.0, 2.0, 1.0, 1.0), 8),
    ],
)
def test_the_batch_that_is_there_the_soonest(
    noise_scale: float, rates: tuple[float, ...], size: int
) -> None:
    """Samples by the noise scale, seconds by what was measured."""
    found = fastest_to_the_loss(
        [*trials(*rates), SizeTrial(size=128, fits=False)],
        world_size=2,
        batch_size=16,
        noise_scale=noise_scale,
    )
    assert found.size == size
