"""The numbers of a run in progress, in a real Prometheus that scrapes a real node_exporter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from support import ROOT, Commands, wait_until

STEADY = ROOT / "benchmarks/steady.py"
PROGRAMS = ("prometheus", "prometheus-node-exporter")

needs_prometheus = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)),
    reason=f"needs Debian's packages {' and '.join(PROGRAMS)}",
)


def two_ports() -> tuple[int, int]:
    """Return two ports on loopback that no process listens on."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def query(port: int, expression: str) -> float | None:
    """Return the value of an expression in Prometheus, which has one or none."""
    text = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{text}") as answer:
            found = json.load(answer)["data"]["result"]
    except OSError:  # it has not started yet
        return None
    return float(found[0]["value"][1]) if found else None


def quiet(run: Commands, *command: str | Path) -> subprocess.Popen[str]:
    """Start a program whose output goes to a file, so that it never waits for a reader."""
    return run.start("sh", "-c", 'log=$1; shift; exec "$@" > "$log" 2>&1', "sh", "log", *command)


@needs_prometheus
def test_a_run_in_progress_is_seen(run: Commands) -> None:
    """The step, the state and the age of a heartbeat of a run can be asked for while it trains."""
    exported, served = two_ports()
    numbers = run.folder / "numbers"
    numbers.mkdir()
    scrape = {"job_name": "nodes", "static_configs": [{"targets": [f"127.0.0.1:{exported}"]}]}
    (run.folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    exporter = quiet(
        run,
        *(PROGRAMS[1], "--collector.disable-defaults", "--collector.textfile"),
        f"--collector.textfile.directory={numbers}",
        f"--web.listen-address=127.0.0.1:{exported}",
    )
    server = quiet(
        run,
        *(PROGRAMS[0], "--config.file=prometheus.yml", f"--storage.tsdb.path={run.folder}/data"),
        f"--web.listen-address=127.0.0.1:{served}",
    )
    training = run.start(
        *("launcher", "run", STEADY, "-n", "1", "device=cpu", "epochs=1000", "--out", "seen"),
        env={"LAUNCHER_PROMETHEUS": str(numbers)},
    )
    wait_until(
        lambda: (query(served, 'launcher_step{run="seen"}') or 0) > 1, exporter, server, training
    )
    assert query(served, 'launcher_run_state{run="seen",state="running"}') == 1
    age = query(served, 'time() - launcher_heartbeat_timestamp_seconds{run="seen"}')
    assert age is not None
    assert age < 60
    training.send_signal(signal.SIGTERM)
    training.communicate(timeout=60)
    assert training.returncode == 75
    assert not list(numbers.iterdir())
    for process in (server, exporter):
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
