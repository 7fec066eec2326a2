"""`launcher doctor` examines this machine; its rules are tested on synthetic diagnostics."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from support import ROOT, Commands


def test_this_machine_passes(run: Commands) -> None:
    """Two real ranks give no failure and leave no temporary folder behind."""
    done = run("launcher", "doctor", "-n", "2", env={"TMPDIR": str(run.folder)})
    assert done.exit_code == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout
    for check in ("cores", "/dev/shm", "rendezvous    2 ranks", "versions", "all-reduce"):
        assert check in done.stdout
    assert list(run.folder.glob("launcher-*")) == []


def test_json_has_the_measurements(run: Commands) -> None:
    """--json prints one JSON object with every finding and the measurements of each rank."""
    done = run("launcher", "doctor", "-n", "2", "--json")
    output = json.loads(done.stdout)
    assert [report["rank"] for report in output["ranks"]] == [0, 1]
    for report in output["ranks"]:
        assert 0 < report["product_error"] < 1e-5
        assert report["flops"] > 1e8
        assert 0 < report["reduce_seconds"] < 1
        assert report["sums_correct"]
    assert {finding["level"] for finding in output["findings"]} <= {"ok", "warning"}


def test_ranks_of_torchrun_are_examined(run: Commands) -> None:
    """Under torchrun, as the quickstart says, the ranks are examined, and rank 0 alone prints."""
    page = (ROOT / "docs/quickstart.md").read_text()
    (command,) = re.findall(r"^torchrun .* launcher doctor$", page, re.MULTILINE)
    done = run(*command.replace("torchrun", "torchrun --standalone").split())
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("2 ranks formed") == 1
    assert done.stdout.count("host memory") == 1, "the first rank of the node checks it"


def test_a_failed_rendezvous_is_a_failure(run: Commands) -> None:
    """Ranks that cannot form a group give a failure, and the reason is printed."""
    done = run("launcher", "doctor", "-n", "2", env={"GLOO_DEVICE_TRANSPORT": "nosuch"})
    assert done.exit_code == 1
    assert "failure  ranks" in done.stdout
    assert "unsupported gloo device" in done.stderr


def test_a_broken_torchvision_is_a_failure(run: Commands) -> None:
    """A torchvision that cannot be imported gives a failure with the exception."""
    package = run.folder / "packages/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    done = run("launcher", "doctor", "-n", "1", env={"PYTHONPATH": str(package.parent)})
    assert done.exit_code == 1
    assert "RuntimeError: operator nms does not exist" in done.stdout


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for host names"
)
def test_several_machines_are_compared(run: Commands, free_port: int) -> None:
    """Launchers on two machines examine them together; one prints the findings about both."""
    options = ("--nodes", "2", "-n", "1", "--device", "cpu", "--json")
    line = 'hostname "$0"; exec launcher doctor "$@"'
    meet = ("--rendezvous", f"localhost:{free_port}")
    doctors = [
        run.start("unshare", "-u", "bash", "-c", line, name, *options, *meet)
        for name in ("first", "second")
    ]
    done = [doctor.communicate(timeout=120) for doctor in doctors]
    assert [doctor.returncode for doctor in doctors] == [0, 0], done
    (output,) = (json.loads(out) for out, _ in done if out)
    assert {report["node"] for report in output["ranks"]} == {"first", "second"}
    found = [finding["found"] for finding in output["findings"]]
    for name in ("first", "second"):
        assert sum(text.startswith(f"{name}: ") for text in found) == 5
    assert any(text.startswith("2 ranks on 2 nodes formed a group") for text in found)
