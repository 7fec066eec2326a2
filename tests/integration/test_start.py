"""How ranks start: after a recipe's import, one before the others, or without the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import BIN, ROOT, Commands

from launcher.engine.ranks import external_store
from launcher.environment.world import World
from launcher.errors import WorldError

RECIPE = str(ROOT / "tests/recipes/starting.py")


def by_hand(rank: int, port: int, recipe: str) -> dict[str, str]:
    """Return the environment of one of two ranks that were started without a launcher."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "RECIPE": recipe}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_a_recipe_that_computes_at_import_trains(run: Commands) -> None:
    """Ranks and the counting of samples do not wait for threads that a fork would lose."""
    threads = {"OMP_NUM_THREADS": "2", "COMPUTES": "1"}
    done = run("launcher", "run", f"{RECIPE}:computed", "-n", "1", "--out", "out", env=threads)
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "out/result.json").is_file()
    assert "threads" in done.stderr
    assert "cannot be forked" in done.stderr


def test_a_recipe_that_computes_at_import_is_checked(run: Commands) -> None:
    """`launcher check` ends for a recipe that computes at import."""
    threads = {"OMP_NUM_THREADS": "2", "COMPUTES": "1"}
    done = run("launcher", "check", f"{RECIPE}:computed", "train_samples=64", env=threads)
    assert "ok       loss" in done.stdout, done.stderr


def test_spawned_ranks_can_be_stopped(run: Commands) -> None:
    """Ranks of a recipe that starts threads train, and a signal that arrives early stops them."""
    command = ("launcher", "run", f"{RECIPE}:locked", "-n", "2", "epochs=500", "--out", "out")
    process = run.start(*command, env={"STARTS_THREAD": "1"}, cold=True)
    assert process.stderr is not None
    assert "started 1 thread (client)" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "checkpoint saved" in stdout


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_after_the_end_leaves_the_exit_code(run: Commands, number: signal.Signals) -> None:
    """A warning of a scheduler at the end of a run's process does not make the run a failure."""
    command = ("launcher", "run", f"{RECIPE}:starting", "-n", "1", "--out", "out")
    variables = {"SIGNALLED_AT_END": str(int(number))}
    done = run(*command, "train_samples=64", env=variables, cold=True)
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "out/result.json").is_file()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import numpy; numpy.ones((500, 500)) @ numpy.ones((500, 500))", "None"),
        (
            "threading.Thread(target=threading.Event().wait, name='logs', daemon=True).start()",
            "logs",
        ),
    ],
)
def test_threads_that_prevent_a_fork(run: Commands, statement: str, reason: str) -> None:
    """Threads prevent a fork, unless their library ends them before each fork."""
    script = (
        "import threading\n"
        "from launcher.forking import observed_threads, reason_not_to_fork\n"
        f"with observed_threads():\n    {statement}\n"
        "print(reason_not_to_fork())"
    )
    done = run("python", "-c", script, env={"OPENBLAS_NUM_THREADS": "2"})
    assert done.exit_code == 0, done.stderr
    assert reason in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("launcher", "run", f"{RECIPE}:prepared", "-n", "2", "train_samples=64"),
        ("torchrun", "--standalone", "--nproc-per-node", "2", RECIPE),
    ],
    ids=["launched", "found"],
)
def test_the_first_rank_fills_caches(run: Commands, command: tuple[str, ...]) -> None:
    """The first rank calls `data` and `model` before the others, which find its caches."""
    done = run(*command, "--out", "out", env={"RECIPE": "prepared"})
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "out/result.json").is_file()


def test_a_recipe_is_built_as_it_was_planned(run: Commands) -> None:
    """A rank that builds the recipe with another setting than the plan's refuses to train."""
    done = run("launcher", "run", f"{RECIPE}:unsettled", "-n", "2", "--out", "out")
    assert done.exit_code == 2, done.stdout
    assert "seed=0" in done.stderr
    assert "seed=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/result.json").exists()


@pytest.mark.parametrize("samples", ["train_samples=64", "train_samples=none"])
def test_a_first_rank_that_fails_ends_the_others(
    run: Commands, free_port: int, samples: str
) -> None:
    """Ranks without a launcher do not wait for a first rank that failed; its error is recorded."""
    ranks = [
        run.start(
            *("python", RECIPE, samples, "--out", "out"), env=by_hand(rank, free_port, "failing")
        )
        for rank in range(2)
    ]
    (_, first), (_, other) = (rank.communicate(timeout=120) for rank in ranks)
    assert all(rank.returncode in (1, 2) for rank in ranks), first + other
    assert first.count("the archive is damaged") >= 1
    assert "the archive is damaged" not in other
    if samples == "train_samples=64":
        failure = json.loads((run.folder / "out/failure.json").read_text())
        assert failure["rank"] == 0
        assert failure["error"] == "OSError"


@pytest.mark.parametrize(
    ("rank", "number", "code"), [(0, signal.SIGINT, 130), (1, signal.SIGTERM, 143)]
)
def test_a_rank_that_waits_can_be_stopped(
    run: Commands, free_port: int, rank: int, number: signal.Signals, code: int
) -> None:
    """A rank whose peers are missing prints the address where it waits; one signal ends it."""
    process = run.start(
        "python", RECIPE, "train_samples=64", env=by_hand(rank, free_port, "starting")
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "waiting for" in line
    assert f"127.0.0.1:{free_port}" in line
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (run.folder / "runs").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_forever(
    monkeypatch: pytest.MonkeyPatch, free_port: int, rank: int
) -> None:
    """A rank whose peers do not come ends with a usage error that names the address."""
    monkeypatch.setattr(external_store, "PATIENCE_SECONDS", 0.2)
    world = World(
        rank=rank,
        world_size=2,
        local_rank=rank,
        local_world_size=2,
        address=("127.0.0.1", free_port),
    )
    with pytest.raises(WorldError, match=f"127.0.0.1:{free_port}"):
        external_store.open_store(world)


def test_an_occupied_port_is_named(run: Commands) -> None:
    """A rank that cannot listen on its port names it, without a traceback."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run("python", RECIPE, "train_samples=64", env=by_hand(0, port, "starting"))
    assert done.exit_code == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_main_leaves_no_handlers(run: Commands) -> None:
    """A script that continues after `main` has its signal handlers back."""
    script = (
        "import signal, sys\n"
        f"sys.path.insert(0, {str(Path(RECIPE).parent)!r})\n"
        "from starting import starting\n"
        "from launcher import main\n"
        "numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: None)\n"
        "before = [signal.getsignal(number) for number in numbers]\n"
        "sys.argv[1:] = ['train_samples=64']\n"
        "main(starting)\n"
        "assert [signal.getsignal(number) for number in numbers] == before\n"
        "print('continued')"
    )
    done = run("python", "-c", script)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith("continued\n")


@pytest.mark.parametrize("closed", range(1, 8))
def test_closed_streams_are_opened(tmp_path: Path, closed: int) -> None:
    """No file or pipe gets the number of a standard stream that is closed."""
    script = (
        "import os, sys\n"
        "from launcher.cli.standard_streams import prepare_streams\n"
        "prepare_streams()\n"
        "[os.fstat(number) for number in range(3)]\n"
        "print('shown'), sys.stderr.write('shown'), sys.stdin.read()\n"
        "open('out', 'w').write(str(min(os.pipe())))"
    )
    numbers = [number for number in range(3) if closed >> number & 1]
    closing = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in numbers)
    command = ["bash", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, script]
    ended = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, check=False)
    assert ended.returncode == 0
    assert int((tmp_path / "out").read_text()) > 2


def test_a_run_with_closed_streams_ends(run: Commands) -> None:
    """A run of two ranks trains and ends with stdin and stdout closed."""
    command = f"exec {BIN / 'launcher'} run {RECIPE} -n 2 train_samples=64 --out out <&- >&-"
    done = run("bash", "-c", command, env=dict(os.environ))
    assert done.exit_code == 0, done.stderr
    assert (run.folder / "out/result.json").is_file()


def test_ranks_that_torchrun_restarts_rendezvous_again(run: Commands) -> None:
    """Keys that an attempt left in the agent's store are not taken for those of the next one."""
    (run.folder / "again.py").write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from launcher import Recipe, main\n"
        "from launcher.recipes.digits import build_data, digits\n"
        "def data():\n"
        '    if not Path("tried").exists():\n'
        '        Path("tried").touch()\n'
        '        raise ValueError("the first time")\n'
        "    return build_data()\n"
        "def again() -> Recipe:\n"
        '    """Digits whose data cannot be read the first time."""\n'
        '    return replace(digits(), data=data, epochs=None, steps=2, device="cpu")\n'
        'if __name__ == "__main__":\n'
        "    main(again)\n"
    )
    done = run("torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "again.py")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "ValueError: the first time" in done.stderr
