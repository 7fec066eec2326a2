"""`launcher tune`: all searches in sequence, their stored results and the files they leave."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, Commands, Finished, wait_until

from launcher.analysis.batch_sizes import SizeTrial, fastest_to_the_loss
from launcher.environment.machine import read_machine
from launcher.launch.signal_handler import SignalHandler
from launcher.recipe.resolve import resolve
from launcher.tuning.probe_run import Target
from launcher.tuning.tune import Tuner
from launcher.tuning.tuning_folder import open_tuning

STEPS, SECONDS = 60, 0.5
ARGUMENTS = ("-n", "2", "--steps", str(STEPS), "--seconds", str(SECONDS))
DIGITS = ("launcher", "tune", "digits", *ARGUMENTS)


def read_settings(file: Path) -> dict[str, object]:
    """Return the settings in a YAML file, each line of which has a comment with its evidence."""
    text = file.read_text()
    assert all("  # " in line for line in text.splitlines()[1:]), text
    settings: dict[str, object] = yaml.safe_load(text)
    return settings


def reused(stdout: str) -> set[str]:
    """Return the names of the searches whose stored results a tuning used."""
    return set(re.findall(r"([\w-]+)\.json", stdout))


class Recorder:
    """A listener that records the names of its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.calls.append(name)


@pytest.fixture(scope="module")
def tuned(module_run: Commands) -> Finished:
    """Tune digits; stop after the first search and continue in the same folder."""
    first = module_run.start(*DIGITS, "--out", "tuned")
    wait_until((module_run.folder / "tuned/lr.json").exists, first)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert "--out tuned\n" in stderr
    return module_run(*DIGITS, "--out", "tuned")


def test_a_stopped_tuning_continues(module_run: Commands, tuned: Finished) -> None:
    """A finished search does not run again, and a plan takes the written file."""
    assert tuned.exit_code == 0, tuned.stderr
    assert reused(tuned.stdout) == {"lr"}
    settings = read_settings(module_run.folder / "tuned/tuned.yaml")
    assert set(settings) >= {"lr", "lr_batch_size", "micro_batch_size", "num_workers"}
    plan = module_run("launcher", "plan", "digits", "--config", "tuned/tuned.yaml")
    assert plan.exit_code == 0, plan.stderr
    assert f"lr={settings['lr']}" in plan.stdout


@pytest.mark.usefixtures("tuned")
def test_the_page_shows_every_setting_and_search(module_run: Commands) -> None:
    """The page has every setting and a plot of each search, and loads nothing."""
    page = (module_run.folder / "tuned/tuned.html").read_text()
    for name in read_settings(module_run.folder / "tuned/tuned.yaml"):
        assert f"<td>{name}</td>" in page
    assert page.count('class="drawing"') == page.count("<h2>") - 1 >= 4
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "src=" not in without_scripts
    assert re.findall(r'href="([^#"][^"]*)"', without_scripts) == ["data:,"]


@pytest.mark.usefixtures("tuned")
def test_stored_results_are_reused(module_run: Commands) -> None:
    """A finished tuning trains nothing again, and refuses other arguments in its folder."""
    before = (module_run.folder / "tuned/tuned.yaml").read_text()
    again = module_run(*DIGITS, "--out", "tuned")
    assert again.exit_code == 0, again.stderr
    assert reused(again.stdout) >= {"lr", "noise", "batch", "trainings", "loader"}
    assert (module_run.folder / "tuned/tuned.yaml").read_text() == before
    other = module_run(*DIGITS, "--out", "tuned", "batch_size=64")
    assert other.exit_code == 2
    assert "overrides=[]" in other.stderr
    assert "overrides=[['batch_size', '64']]" in other.stderr


@pytest.mark.usefixtures("tuned")
def test_a_tuner_returns_values(module_run: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    """A Python caller gets the settings and measurements as values, and nothing is printed."""
    target = Target(
        reference=resolve("digits"), overrides=(), machine=read_machine(), nproc_per_node=2
    )
    _, plan = target.plan()
    arguments: dict[str, Any] = {"memory": None, "steps": STEPS, "seconds": SECONDS}
    folder = open_tuning(module_run.folder / "tuned", target, plan, **arguments)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    recorder = Recorder()
    try:
        result = Tuner(target, folder, SignalHandler(), recorder, **arguments).run()
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
    assert result.values == read_settings(folder.path / "tuned.yaml")
    assert result.lr_search is not None
    found = result.lr_search.suggestions.trainings
    assert found is not None
    assert result.values["lr"] == float(f"{found:.3g}")
    assert result.noise is not None
    assert result.batch is not None
    assert result.values["micro_batch_size"] in [trial.size for trial in result.batch.trials]
    assert result.loader is not None
    assert result.values["num_workers"] == result.loader.best.workers
    assert set(recorder.calls) == {
        *(
            "on_search",
            "on_message",
            "on_lr_result",
            "on_noise_result",
            "on_batch_result",
            "on_loader_result",
        )
    }
    assert capfd.readouterr() == ("", "")


def test_the_batch_follows_the_noise_scale(run: Commands) -> None:
    """A batch far below the noise scale grows to at most twice it; given settings stay."""
    recipe = str(ROOT / "tests/recipes/known_noise.py") + ":known_noise"
    given = ("batch=32", "lr=1e-6", "num_workers=0")
    done = run("launcher", "tune", recipe, "-n", "2", "--steps", "150", *given, "--out", "out")
    assert done.exit_code == 0, done.stderr
    settings = read_settings(run.folder / "out/tuned.yaml")
    assert settings["batch_size"] in (128, 256), "156 is the noise scale"
    assert settings["micro_batch_size"] == int(str(settings["batch_size"])) // 2
    assert int(str(settings["epochs"])) in (6, 8, 9), "4, times the ratio of the samples"
    assert settings["batch"] == 32
    assert settings["num_workers"] == 0
    assert "DataLoader workers" not in done.stdout


def make_trials(*rates: float) -> list[SizeTrial]:
    """Return trials of the sizes 8, 16, 32, ... with these samples per second."""
    return [
        SizeTrial(size=8 << number, fits=True, samples_per_second=rate)
        for number, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(
    ("critical", "rates", "size"),
    [
        (1e6, (1.0, 2.0, 4.0, 8.0), 64),  # every doubling halves the time
        (1e6, (1.0, 1.5, 1.55, 1.56), 32),  # larger sizes are hardly faster
        (40.0, (1.0, 2.0, 4.0, 8.0), 32),  # 128 on two ranks exceeds twice the critical batch
        (1e6, (1.0, 1.02, 1.05, 1.06), 8),  # no batch saves a tenth of the time
        (1.0, (1.0, 1.5, 2.0, 2.5), 8),  # every batch exceeds twice the critical batch
        (1e6, (4.0, 2.0, 1.0, 1.0), 8),  # larger sizes are slower
    ],
)
def test_the_batch_that_reaches_a_loss_soonest_is_chosen(
    critical: float, rates: tuple[float, ...], size: int
) -> None:
    """The choice weighs the samples, by the critical batch, against the measured throughput."""
    chosen = fastest_to_the_loss(
        [*make_trials(*rates), SizeTrial(size=128, fits=False)],
        world_size=2,
        batch_size=16,
        critical=critical,
    )
    assert chosen.size == size
