"""Tests of DataLoader workers: shared files, batches that cannot be sent, and start methods."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from support import Commands, read_lines

RECIPE = """
from launcher import Data, Recipe, constant, main


def packed(*, kind: str = "held") -> Recipe:
    return Recipe(
        name="packed", model=lambda: build_model(kind), data=lambda: build_data(kind), loss=loss,
        batch_size=16, lr=0.1, lr_batch_size=16, steps=6, schedule=constant(), num_workers=2,
        forward=lambda model, batch: model(batch[0]), train_samples=512,
    )


OPEN = []


def build_data(kind):
    import struct
    from pathlib import Path
    from collections import namedtuple

    import torch

    path = Path("packed.bin")
    if not path.exists():
        content = b"".join(struct.pack("<i8f", i, *[i / 512] * 8) for i in range(512))
        path.write_bytes(content)

    class Records:
        def __init__(self):
            self.file = path.open("rb") if kind != "lazy" else None
            self.log = open("log.txt", "a+")
            self.content = path.read_bytes()
            OPEN.append(self.file)

        def __len__(self):
            return 512

        def __getitem__(self, index):
            print(index, file=self.log, flush=True)
            if self.file is None:
                self.file = path.open("rb")
            if kind == "model":
                x = struct.unpack_from("<i8f", self.content, index * 36)[1:]
            else:
                self.file.seek(index * 36)
                found, *x = struct.unpack("<i8f", self.file.read(36))
            return torch.tensor(x), index % 3

    def collate(samples):
        if kind == "raises" and any(y == 2 for _, y in samples):
            raise KeyError("no such class")
        xs, ys = zip(*samples)
        batch = torch.stack(xs), torch.tensor(ys)
        return namedtuple("Pair", "x y")(*batch) if kind == "local" else batch

    return Data(train=Records(), collate=collate)


def build_model(kind):
    from torch import nn

    if kind == "model":
        OPEN[0].read()
    return nn.Linear(8, 3)


def loss(outputs, batch):
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


if __name__ == "__main__":
    main(packed)
"""


@pytest.fixture
def packed(run: Commands) -> Commands:
    """Return a function that runs commands in a folder with the recipe."""
    (run.folder / "packed.py").write_text(RECIPE)
    return run


def losses_of(folder: Path) -> list[float]:
    """Return the losses of the steps in a run folder."""
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row]


def test_a_shared_file_is_refused(packed: Commands) -> None:
    """`run` and `check` refuse data that reads through a file that forked workers share."""
    done = packed("launcher", "run", "packed.py", "-n", "1", "--out", "out")
    assert done.exit_code == 2, done.stdout
    assert str(packed.folder / "packed.bin") in done.stderr
    assert "worker_start=spawn" in done.stderr
    assert not (packed.folder / "out/metrics.jsonl").exists() or not losses_of(
        packed.folder / "out"
    )
    done = packed("launcher", "check", "packed.py")
    assert done.exit_code == 1
    assert "worker_start=spawn" in done.stdout


@pytest.mark.parametrize(
    "settings",
    [("num_workers=0",), ("num_workers=1",), ("kind=lazy",), ("kind=model",)],
)
def test_other_open_files_are_accepted(packed: Commands, settings: tuple[str, ...]) -> None:
    """Files with one reader, opened by each worker, read by the model or written are accepted."""
    done = packed("launcher", "run", "packed.py", "-n", "1", *settings, "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert len(losses_of(packed.folder / "out")) == 6


def test_spawned_workers_open_their_own_files(packed: Commands) -> None:
    """Spawned workers call data() themselves, so losses equal those of one process."""
    done = packed("launcher", "run", "packed.py", "-n", "1", "num_workers=0", "--out", "one")
    assert done.exit_code == 0, done.stderr
    done = packed("python", "packed.py", "worker_start=spawn", "--out", "two")
    assert done.exit_code == 0, done.stderr
    assert "semaphore" not in done.stderr
    assert losses_of(packed.folder / "one") == losses_of(packed.folder / "two")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_batch_that_cannot_be_sent_ends_the_run(packed: Commands, method: str) -> None:
    """A batch that cannot be pickled ends the run with its type; without workers it trains."""
    command = ("launcher", "run", "packed.py", "-n", "1", "kind=local", f"worker_start={method}")
    done = packed(*command, "num_workers=1", "--out", "out")
    assert done.exit_code == 1, done.stdout
    assert "Pair" in done.stderr
    assert "num_workers=0" in done.stderr
    if method == "fork":
        assert packed(*command, "num_workers=0", "--out", "alone").exit_code == 0


def test_a_long_temporary_folder_is_refused(packed: Commands) -> None:
    """A temporary folder whose path is too long for sockets is refused if there are workers."""
    folder = packed.folder / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    command = ("launcher", "run", "packed.py", "-n", "1", "kind=lazy", "--out")
    done = packed(*command, "out", env={"TMPDIR": str(folder)})
    assert done.exit_code == 2, done.stdout
    assert "TMPDIR" in done.stderr
    done = packed(*command, "alone", "num_workers=0", env={"TMPDIR": str(folder)})
    assert done.exit_code == 0, done.stderr


def test_a_failing_collate_names_the_samples(packed: Commands) -> None:
    """An exception in the collate function is reported with the samples of the batch."""
    done = packed(
        *("launcher", "run", "packed.py", "-n", "1", "kind=raises", "num_workers=0"),
        *("--out", "out"),
    )
    assert done.exit_code == 1
    assert re.search(r"collate function .* raised KeyError for samples? \d", done.stderr)
    assert "no such class" in done.stderr


def test_a_hang_in_the_first_samples_ends_the_run(packed: Commands) -> None:
    """The watchdog ends a run that hangs in the first samples and reports that it reads data."""
    recipe = packed.folder / "packed.py"
    text = RECIPE.replace(
        "            if self.file is None:",
        "            import signal\n            signal.pause()\n            if self.file is None:",
    )
    recipe.write_text(text)
    done = packed(
        *("launcher", "run", "packed.py", "-n", "1", "kind=lazy", "hang_timeout=start:10"),
        *("--out", "out"),
    )
    assert done.exit_code == 1, done.stdout
    assert "is reading data" in done.stderr
    assert "num_workers=0" in done.stderr


_HELPERS = '''
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

from torch.utils.data import Dataset

from launcher import Data, main
from launcher.recipes.digits import digits

def end(process):
    """Terminate a process of multiprocessing; return how it ended, or None after 20 s."""
    process.terminate()
    process.join(20)
    return process.exitcode

def end_fork():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def end_program():
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    return program.wait(20)

class Helped(Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        if index == 0:
            print("ENDED in", multiprocessing.current_process().daemon, end_fork(), end_program())
        return self.inner[index]

def helped():
    recipe = digits()

    def build_data():
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            pool.map(abs, [1])
        process = context.Process(target=time.sleep, args=[60])
        process.start()
        print("ENDED data", end(process), end_fork(), end_program(), flush=True)
        return Data(train=Helped(recipe.data().train))

    return replace(
        recipe, name="helped", data=build_data, in_memory=False, num_workers=1, train_samples=None
    )

if __name__ == "__main__":
    main(helped)
'''


@pytest.mark.parametrize(
    "command", ["launcher run helped.py -n 2 --out out", "python helped.py --out out"]
)
def test_a_recipe_ends_the_processes_that_it_forks(run: Commands, command: str) -> None:
    """terminate() ends processes that a recipe starts, in `data` and in a DataLoader worker."""
    (run.folder / "helped.py").write_text(_HELPERS)
    done = run(*command.split(), "epochs=1", "device=cpu")
    assert done.exit_code == 0, done.stderr
    log = (run.folder / "out/logs/rank0.log").read_text() + done.stdout
    assert "ENDED data -15 -15 -15" in log
    assert "ENDED in True -15 -15" in log


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a namespace"
)
@pytest.mark.parametrize(("batch_size", "exit_code"), [(1024, 2), (32, 0)])
def test_queues_larger_than_shared_memory_are_refused(
    run: Commands, batch_size: int, exit_code: int
) -> None:
    """Batches that workers could not keep in /dev/shm end the run before its first step."""
    line = 'mount -t tmpfs -o size=512k none /dev/shm && exec launcher run digits "$@"'
    settings = ("num_workers=2", f"batch_size={batch_size}", "steps=2", "device=cpu")
    arguments = ("-n", "1", *settings, "--out", "out")
    done = run("unshare", "-m", "bash", "-c", line, "bash", *arguments)
    assert done.exit_code == exit_code, done.stderr
    assert ("/dev/shm" in done.stderr) == bool(exit_code)
    assert (run.folder / "out" / "metrics.jsonl").exists() == (not exit_code)


def test_too_few_open_files_are_one_error(run: Commands) -> None:
    """Where workers need more open files than the hard limit allows, one error says what to do."""
    command = "ulimit -n 64; launcher run digits -n 1 num_workers=32 in_memory=false --out out"
    done = run("bash", "-c", command)
    assert done.exit_code != 0
    assert "ulimit -n" in done.stderr
    assert "num_workers=0" in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(file.stat().st_size for file in (run.folder / "out/logs").iterdir()) < 10_000
