"""Runs in an object store: a real S3 server on loopback that fails, restarts and is slow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_store import S3Store, serve_s3
from support import ROOT, Commands, fail_on_leftovers, read_lines, read_weights, wait_until

from launcher.engine.ranks.rendezvous import accepts_connections
from launcher.runs.mirror_record import mirror_problem
from launcher.runs.rundir import RunDir

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
pytest.importorskip("moto")

GATED = "project/gated.py"
MANIFEST = "checkpoint.json"


@pytest.fixture(scope="module")
def one_store() -> Iterator[S3Store]:
    """Run a server for all tests of this module."""
    with serve_s3() as store:
        yield store


@pytest.fixture
def store(one_store: S3Store) -> S3Store:
    """Return the server without faults."""
    one_store.proxy.heal()
    return one_store


class Machine:
    """A folder that stands for a machine, with the project of a recipe."""

    def __init__(
        self, run: Commands, name: str, store: S3Store, *, has_project: bool = True
    ) -> None:
        self.folder = run.folder / name
        self.gates = self.folder / "gates"
        self.gates.mkdir(parents=True)
        if has_project:
            (self.folder / "project").mkdir()
            shutil.copy(ROOT / "tests/recipes/gated.py", self.folder / GATED)
        self.run = Commands(self.folder, run.mark)
        self._env = store.environment

    def __call__(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Run launcher; return its exit code and what it printed."""
        done = self.run("launcher", *arguments, env=self._env | env)
        return done.exit_code, done.stdout, done.stderr

    def start(self, *arguments: str, host: str = "") -> subprocess.Popen[str]:
        """Start a run of the recipe that waits at its gates, on a host of another name if asked."""
        command = ("launcher", "run", GATED, f"gates={self.gates}", *arguments)
        return self.run.start(*(on_host(host) if host else ()), *command, env=self._env)

    def open(self, name: str) -> None:
        """Open the gate after a checkpoint."""
        (self.gates / name).touch()

    @property
    def run_folder(self) -> Path:
        """The only run folder below runs/."""
        (folder,) = (self.folder / "runs").iterdir()
        return folder


def on_host(name: str) -> tuple[str, ...]:
    """Return the words before a command that runs it on a host of its own name, as root."""
    return ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)


def kill_host(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and its mirror at once, as a power failure of their host does."""
    (mirror,) = _children(process.pid, "--mirror-process")
    os.kill(mirror, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    assert end_of(process)[0] == -signal.SIGKILL


needs_hosts = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for names of hosts")


def committed(store: S3Store, run: str) -> set[str]:
    """Return the checkpoints that a run has in the store."""
    names = store.names(run)
    return {name.split("/")[1] for name in names if name.endswith(f"/{MANIFEST}")}


def contents(run_folder: Path, older: str) -> dict[str, bytes]:
    """Return the files of a run folder that a download has, without its older checkpoint."""
    left_out = {"owner.lock", "mirror.json", "rank0.json", "rank1.json", "rank2.json"}
    return {
        str(path.relative_to(run_folder)): path.read_bytes()
        for path in run_folder.rglob("*")
        if path.is_file() and path.name not in left_out and path.parent.name != older
    }


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a command; return its exit code and what it printed."""
    stdout, stderr = process.communicate(timeout=240)
    return process.returncode, stdout, stderr


def test_a_killed_run_is_resumed_on_a_machine_that_has_nothing(
    run: Commands, store: S3Store
) -> None:
    """After kill -9 in the middle of an upload, the run ends elsewhere with the same weights.

    The machine that takes over has neither the run folder nor the project, another number of ranks,
    and a store that fails now and then. As root, it has another name, so that only the age of the
    lock tells that its owner has died.
    """
    import torch

    first = Machine(run, "first", store)
    host = "first" if os.geteuid() == 0 else ""
    process = first.start("-n", "2", "--out", "s3://bucket/killed", host=host)
    wait_until(
        lambda: f"PUT bucket/killed/checkpoints/step-00000010/{MANIFEST}" in store.proxy.writes,
        process,
    )
    store.proxy.held_name = "checkpoints/step-00000020/shard-00002"
    first.open("step-00000010")
    wait_until(store.proxy.is_holding.is_set, process)
    kill_host(process)
    fail_on_leftovers(run.mark)
    assert committed(store, "killed") == {"step-00000010"}
    assert "mirror.lock" in store.names("killed")
    store.age("killed/mirror.lock", 61.0)
    assert "checkpoints/step-00000020/shard-00001-model-00001-of-00001.safetensors" in (
        store.names("killed")
    )

    store.proxy.heal()
    store.proxy.statuses, store.proxy.cut_off = [500, 503], 1
    store.proxy.write_statuses, store.proxy.lost_answers = [500, 503], 1
    (first.folder / "project").rename(first.folder / "gone")
    second = Machine(run, "second", store, has_project=False)
    code, stdout, stderr = second("resume", "s3://bucket/killed", "-n", "3", "gates=", "--json")
    assert code == 0, stderr
    assert '"step": 11' in stdout
    assert '"step": 10' not in stdout
    assert committed(store, "killed") == {"step-00000020", "step-00000030"}
    assert "mirror.lock" not in store.names("killed")
    steps = [
        row["step"] for row in read_lines(second.run_folder / "metrics.jsonl") if "loss" in row
    ]
    assert steps == list(range(1, 31))

    third = Machine(run, "third", store)
    code, _, stderr = third("run", GATED, "-n", "2", "--out", "undisturbed")
    assert code == 0, stderr
    weights = read_weights(second.run_folder)
    for name, expected in read_weights(third.folder / "undisturbed").items():
        assert torch.allclose(weights[name], expected, rtol=1e-4, atol=1e-6), name

    code, stdout, stderr = third("download", "s3://bucket/killed", "copy")
    assert code == 0, stderr
    older = "step-00000020"
    assert contents(third.folder / "copy", older) == contents(second.run_folder, older)


def test_an_outage_delays_uploads_and_not_the_training(run: Commands, store: S3Store) -> None:
    """Uploads are made up for after a restart of the store; a run that ends without one says so.

    While it runs, nobody else can write to its URL.
    """
    machine, other = Machine(run, "a", store), Machine(run, "b", store)
    url = "s3://bucket/outage"
    process = machine.start("-n", "1", "--out", "mine", "--mirror", url, "--mirror-timeout", "1")
    wait_until(lambda: "PUT bucket/outage/run.yaml" in store.proxy.writes, process)
    wait_until(lambda: "mirror.lock" in store.names("outage"), process)
    for arguments in (("run", GATED, "-n", "1", "--out", url), ("resume", url)):
        code, _, stderr = other(*arguments)
        assert code == 2
        assert f"(pid {process.pid})" in stderr
    code, stdout, _ = other("runs", "s3://bucket", "recipe=gated", "--json")
    states = {row["run"]: row["state"] for row in json.loads(stdout)}
    assert states[url] == "running"
    assert not (other.folder / "runs").exists()

    store.stop()
    machine.open("step-00000010")
    mine = machine.folder / "mine"
    wait_until((mine / "checkpoints/step-00000020").exists, process)
    wait_until(lambda: mirror_problem(RunDir(mine)), process)
    watching = machine.run.start("launcher", "watch", "mine", "--json")
    assert watching.stdout is not None
    shown = json.loads(watching.stdout.readline())
    assert (shown["state"], shown["mirror_problem"]) == ("running", mirror_problem(RunDir(mine)))
    assert url in shown["mirror_problem"]
    store.start()
    wait_until(lambda: committed(store, "outage") >= {"step-00000010", "step-00000020"}, process)
    store.stop()
    machine.open("all")
    code, _, stderr = end_of(process)
    assert code == 1
    last = json.loads(end_of(watching)[1].splitlines()[-1])
    assert last["state"] == "finished"
    assert "step 20 is the newest there" in mirror_problem(RunDir(mine))
    assert (mine / "result.json").exists()
    assert "launcher resume mine" in stderr
    store.start()
    assert "result.json" not in store.names("outage")
    code, _, stderr = machine("resume", "mine")
    assert code == 0, stderr
    assert "result.json" in store.names("outage")
    assert mirror_problem(RunDir(mine)) == ""
    assert committed(store, "outage") == {"step-00000020", "step-00000030"}


def test_a_stopped_run_continues_by_the_same_command(run: Commands, store: S3Store) -> None:
    """SIGTERM leaves the last step in the store, even if the mirror was killed before.

    `--continue` starts the run where there is none, and continues it on another machine.
    """
    first, second = Machine(run, "first", store), Machine(run, "second", store)
    arguments = ("-n", "1", "--out", "s3://bucket/stopped", "--continue")
    process = first.start(*arguments)
    wait_until(lambda: committed(store, "stopped"), process)
    (mirror,) = _children(process.pid, "--mirror-process")
    os.kill(mirror, signal.SIGKILL)
    process.terminate()
    first.open("all")
    code, _, stderr = end_of(process)
    assert code == 75, stderr
    (folder,) = (first.folder / "runs").iterdir()
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert committed(store, "stopped") == saved
    second.open("all")
    code, stdout, stderr = end_of(second.start(*arguments))
    assert code == 0, stderr
    assert max(saved) in stdout
    assert "result.json" in store.names("stopped")
    kept = {path.name for path in (second.run_folder / "checkpoints").iterdir()}
    assert committed(store, "stopped") == kept
    assert max(kept) == "step-00000030"
    code, _, stderr = first("resume", str(folder))
    assert code == 2
    assert "continued from elsewhere" in stderr


def test_a_url_that_cannot_be_used_is_refused_before_the_first_step(
    run: Commands, store: S3Store
) -> None:
    """Each mistake is one error with exit code 2, and no run folder is made."""
    machine = Machine(run, "a", store)
    for url, words, env in (
        ("s3://bucket/secret", "denied access (403)", {}),
        ("s3://nowhere/run", "no bucket", {}),
        ("s3://bucket/run", "NoCredentialsError", {"AWS_ACCESS_KEY_ID": ""}),
        ("nowhere://bucket/run", "Protocol not known: nowhere", {}),
    ):
        code, _, stderr = machine("run", "digits", "-n", "1", "--mirror", url, **env)
        assert (code, words in stderr, stderr.count("launcher:")) == (2, True, 1), stderr
    for arguments, words in (
        (("resume", "s3://bucket/nothing"), "no run at s3://bucket/nothing"),
        (("evaluate", "s3://bucket/nothing"), "launcher download"),
        (
            ("run", "digits", "--nodes", "2", "--rendezvous", "localhost:9", "--out", "s3://b/c"),
            "--mirror s3://b/c",
        ),
    ):
        code, _, stderr = machine(*arguments)
        assert (code, words in stderr) == (2, True), stderr
    assert not (machine.folder / "runs").exists()


def test_a_run_on_several_nodes_has_one_mirror(run: Commands, free_port: int) -> None:
    """The first node uploads what all nodes write into the shared folder, and resumes it."""
    url = f"file://{run.folder}/store"

    def on_both(*arguments: str) -> None:
        meeting = ("--nodes", "2", "-n", "1", "--rendezvous", f"localhost:{free_port}")
        starts = [run.start("launcher", *arguments, *meeting) for _ in range(2)]
        for process in starts:
            code, _, stderr = end_of(process)
            assert code == 0, stderr

    on_both("run", "digits", "device=cpu", "steps=4", "--out", "shared", "--mirror", url)
    on_both("resume", "shared", "steps=6")
    assert run("launcher", "download", url, "copy").exit_code == 0
    assert contents(run.folder / "copy", "") == contents(run.folder / "shared", "step-00000004")


@needs_hosts
def test_a_new_host_takes_the_mirror_over(run: Commands, store: S3Store, free_port: int) -> None:
    """After the host of a run has died, its successor has the lock at once and uploads the rest."""
    machine = Machine(run, "shared", store)
    options = (
        *("-n", "1", "--nodes", "1:2", "--max-restarts", "1", "--rendezvous"),
        *(f"localhost:{free_port}", "--out", "out", "--mirror", "s3://bucket/taken"),
    )
    first = machine.start(*options, host="first")
    wait_until(lambda: accepts_connections("localhost", free_port), first)
    second = machine.start(*options, host="second")
    wait_until(lambda: committed(store, "taken") == {"step-00000010"}, first, second)
    assert owner_of(store, "taken") == "first"
    kill_host(first)
    wait_until(lambda: owner_of(store, "taken") == "second", second)
    machine.open("all")
    code, _, stderr = end_of(second)
    assert code == 0, stderr
    assert "was in use by" not in stderr, "it waits for no lease"
    assert committed(store, "taken") == {"step-00000020", "step-00000030"}
    assert "result.json" in store.names("taken")
    assert "mirror.lock" not in store.names("taken")


def owner_of(store: S3Store, run: str) -> str:
    """Return the host whose process has the lock of a run; empty if nobody has it."""
    store.files.invalidate_cache()
    try:
        content = store.files.cat_file(f"bucket/{run}/mirror.lock")
    except FileNotFoundError:
        return ""
    return str(json.loads(content)["owner"]["host"])


def _children(pid: int, word: str) -> list[int]:
    """Return the children of a process whose command has a word."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if word.encode() in command:
            found.append(int(child))
    return found
