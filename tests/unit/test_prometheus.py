"""The numbers of a run for Prometheus."""

from __future__ import annotations

import math
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from damaged_run import write_finished_run
from fuzz.harness import invoke
from prometheus_client.parser import text_string_to_metric_families

from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.prometheus import metrics_file_of, metrics_text
from launcher.runs.rundir import RunDir
from launcher.runs.status import STATES, RunState, last_step


def values_in(text: str) -> dict[str, float]:
    """Return the samples of a text by their names, those of a state by the name and the state."""
    return {
        sample.name + sample.labels.get("state", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    """Step, loss, checkpoint, starts and failures are those that the folder records."""
    run_dir = write_finished_run(tmp_path / "run")
    values = values_in(metrics_text(run_dir))
    row = last_step(run_dir.metrics)
    assert row is not None
    assert values["launcher_step"] == row.step
    assert values["launcher_loss"] == row.loss
    (checkpoint, *_) = list_checkpoints(run_dir)
    assert values["launcher_checkpoint_step"] == checkpoint.step
    assert values["launcher_checkpoint_stall_seconds"] == 0.01
    assert values["launcher_checkpoint_write_seconds"] == 0.02
    assert values["launcher_checkpoint_timestamp_seconds"] == checkpoint.path.stat().st_mtime
    assert values["launcher_failures_total"] == 1
    assert [values[f"launcher_run_state{state}"] for state in STATES] == [
        float(state == "finished") for state in STATES
    ]


def test_unknown_numbers_are_left_out(tmp_path: Path) -> None:
    """An empty folder has a state and no step, and a loss of null is NaN."""
    (tmp_path / "run").mkdir()
    run_dir = RunDir(tmp_path / "run")
    values = values_in(metrics_text(run_dir))
    assert values["launcher_run_stateunknown"] == 1
    assert "launcher_step" not in values
    run_dir.metrics.write_text('{"step": 3, "loss": null, "lr": 0.1, "samples": 9}\n{"step": 4, "')
    values = values_in(metrics_text(run_dir))
    assert values["launcher_step"] == 3
    assert math.isnan(values["launcher_loss"])


def test_a_name_is_escaped(tmp_path: Path) -> None:
    """Quotes, backslashes, line breaks and bytes that are not UTF-8 in a name break no line."""
    name = 'a"\\b\nc' + os.fsdecode(b"\xff")
    (tmp_path / name).mkdir()
    text = metrics_text(RunDir(tmp_path / name))
    (family, *_) = text_string_to_metric_families(text)
    assert {sample.labels["run"] for sample in family.samples} == {'a"\\b\nc?'}


def test_a_run_writes_its_file_where_the_site_asks(tmp_path: Path) -> None:
    """The file is named after the run, all users can read it, and it goes when the run ends."""
    run_dir = write_finished_run(tmp_path / "my run")
    assert metrics_file_of(run_dir, {}) is None
    file = metrics_file_of(run_dir, {"LAUNCHER_PROMETHEUS": str(tmp_path)})
    assert file is not None
    file.write(RunState(name="running", words=""))
    path = tmp_path / "launcher-my_run.prom"
    assert values_in(path.read_text())["launcher_run_staterunning"] == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.write_text("")
    file.write()
    assert path.read_text() == "", "the file is ten seconds old at most"
    file.remove()
    assert not path.exists()


def test_watching_writes_the_file(tmp_path: Path) -> None:
    """`launcher watch --prometheus FILE` leaves the final state there."""
    write_finished_run(tmp_path / "run")
    ended = invoke(["watch", "run", "--prometheus", "run.prom"], tmp_path)
    assert ended.exit_code == 0
    values = values_in((tmp_path / "run.prom").read_text())
    assert values["launcher_run_statefinished"] == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")
def test_promtool_accepts_the_text(tmp_path: Path) -> None:
    """Prometheus' own checker finds no fault with names, types and help texts."""
    text = metrics_text(write_finished_run(tmp_path / "run"))
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
