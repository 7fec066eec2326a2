"""Experiment trackers beside real runs: what they receive, and that they stop no run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import Commands, read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.runs.redaction import hidden_values, redacted

KEY = "0123456789abcdef0123456789abcdef01234567"


def tensorboard(run_dir: Path) -> EventAccumulator:
    """Return the events of a run that TensorBoard would show."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def numbers(events: EventAccumulator, name: str) -> dict[int, float]:
    """Return the values of a scalar by step."""
    return {scalar.step: scalar.value for scalar in events.Scalars(name)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensorboard_has_what_was_measured(run: Commands, ranks: int) -> None:
    """TensorBoard's files hold the run's metrics, its settings, and the path of its report."""
    done = run(
        *("launcher", "run", "digits", "-n", str(ranks), "epochs=4", "noise_scale=true"),
        *("trackers=tensorboard", "micro_batch_size=32", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    out = run.folder / "out"
    events = tensorboard(out)
    rows = {row["step"]: row for row in read_lines(out / "metrics.jsonl") if "grad_norm" in row}
    held_out = {
        row["step"]: row["evaluation"]
        for row in read_lines(out / "metrics.jsonl")
        if "evaluation" in row
    }
    rates = numbers(events, "train/lr")
    assert set(held_out) <= set(rates) <= set(rows)
    for step, lr in rates.items():
        assert lr == pytest.approx(rows[step]["lr"], rel=1e-6)
    for name in ("loss", "accuracy"):
        sent = numbers(events, f"evaluation/{name}")
        assert sent == pytest.approx({step: values[name] for step, values in held_out.items()})
    losses = numbers(events, "train/loss")
    first = min(losses)
    assert losses[first] == pytest.approx(rows[first]["loss"], rel=1e-6)
    tags: Any = events.Tags()
    assert {"train/momentum", "train/samples_per_second", "train/noise_scale"} <= set(
        tags["scalars"]
    )
    [text] = events.Tensors("report/text_summary")[0].tensor_proto.string_val
    page = re.search(r"\S+report\.html", text.decode())
    assert page is not None
    assert "<h2>Learning</h2>" in Path(page[0]).read_text()
    hparams = next((out / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "batch_size: 128" in hparams
    assert f"world_size: {ranks}" in hparams


def test_a_tracker_that_fails_stops_nothing(run: Commands) -> None:
    """Each tracker that fails causes one warning, and the final weights are the same."""
    plain = run("launcher", "run", "digits", "-n", "2", "epochs=2", "--out", "plain")
    assert plain.exit_code == 0
    (run.folder / "broken.py").write_text(
        "from pathlib import Path\nfrom dataclasses import replace\n"
        "from launcher import Recipe\nfrom launcher.recipes.digits import build_data, digits\n\n\n"
        "def broken() -> Recipe:\n"
        "    def data():\n"
        "        Path('out/tensorboard').touch()\n"
        "        return build_data()\n"
        "    return replace(digits(), data=data, epochs=2)\n"
    )
    done = run(
        *("launcher", "run", "broken.py", "-n", "2", "trackers=tensorboard,aim", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("trackers: tensorboard: ") == 1
    assert "FileExistsError" in done.stdout or "NotADirectoryError" in done.stdout
    assert done.stdout.count("trackers: aim: the package aim is not installed") == 1
    for folder in ("out", "plain"):
        assert (run.folder / folder / "model.safetensors").is_file()
    assert (run.folder / "out/model.safetensors").read_bytes() == (
        run.folder / "plain/model.safetensors"
    ).read_bytes()


def test_a_failed_run_lets_its_trackers_finish(run: Commands) -> None:
    """The metrics before a failure are in TensorBoard's files."""
    done = run(
        *("launcher", "run", "digits", "-n", "2", "lr=1e30", "trackers=tensorboard"),
        *("--out", "out"),
    )
    assert done.exit_code == 1
    assert numbers(tensorboard(run.folder / "out"), "train/lr")


def test_keys_go_nowhere(run: Commands) -> None:
    """A key in the environment is neither printed nor in any file of the run."""
    env = {"WANDB_API_KEY": KEY, "MLFLOW_TRACKING_URI": f"https://me:{KEY}@example.org"}
    done = run(
        *("launcher", "run", "digits", "-n", "2", "epochs=1", "--out", "out"),
        "trackers=wandb,mlflow,tensorboard",
        env=env,
    )
    assert done.exit_code == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    for path in (run.folder / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_an_unknown_tracker_is_refused(run: Commands) -> None:
    """An unknown tracker is refused before training, with a list of the known ones."""
    done = run("launcher", "run", "digits", "trackers=tensorbord", "--out", "out")
    assert done.exit_code == 2
    assert "tensorboard or trackio or wandb" in done.stderr
    assert not (run.folder / "out").exists()


def test_secrets_are_hidden() -> None:
    """Values of secret variables and credentials in URLs are hidden, and nothing else is."""
    env = {
        "A_TOKEN": "sesamopen",
        "SHORT_KEY": "abc",
        "KEYBOARD": "qwertyuiop",
        "SSH_AUTH": "/x/yz/abc",
    }
    assert (
        redacted("sesamopen abc qwertyuiop /x/yz/abc", env) == "[hidden] abc qwertyuiop /x/yz/abc"
    )
    assert redacted("see http://user:pass@host/x", {}) == "see http://[hidden]@host/x"
    assert redacted("see http://host:80/x@y", {}) == "see http://host:80/x@y"
    values = {"max_tokens": 40960000, "hub_token": "hf_abcdefgh", "lr": 0.1}
    assert hidden_values(values) == {"max_tokens": 40960000, "hub_token": "[hidden]", "lr": 0.1}
