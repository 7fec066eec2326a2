"""A finished run folder that is written in a moment, and ways to damage its files."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.environment.machine import read_machine
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.runs.checkpoints import begin_checkpoint, commit_checkpoint
from launcher.runs.events import record_event
from launcher.runs.files import write_json, write_yaml
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.manifest import FORMAT, Manifest, sum_file
from launcher.runs.plan_recipe import describe_run, plan_recipe
from launcher.runs.run_record import write_run
from launcher.runs.rundir import RunDir
from launcher.schedulers.submission import Submission

STEPS = 12

FILES = (
    "run.yaml",
    "events.jsonl",
    "metrics.jsonl",
    "result.json",
    "failure.json",
    "submission.json",
    "health/rank0.json",
    f"checkpoints/step-{STEPS:08}/checkpoint.json",
    "logs/rank0.log",
    "owner.lock",
)
"""The files of `write_finished_run` that commands read back."""


def write_finished_run(folder: Path) -> RunDir:
    """Write the folder of a run of digits on two ranks that has finished after 12 steps.

    It has an earlier attempt that failed, a checkpoint and a submission to Slurm as well.
    """
    run_dir = RunDir(folder)
    for name in ("logs", "health"):
        (folder / name).mkdir(parents=True)
    overrides = read_arguments(["steps=12", "batch_size=62", "device=cpu", "noise_scale=true"])
    reference = resolve("digits")
    built, plan = plan_recipe(reference, overrides, read_machine(), nproc_per_node=2)
    write_run(run_dir, replace(describe_run(reference, built, plan), host="node1"))
    run_dir.owner.touch()
    _write_history(run_dir)
    beat = Heartbeat(
        rank=0,
        node=platform.node(),
        pid=2**22 + 1,
        step=STEPS,
        phase="finishing",
        since=time.time() - 50,
        time=time.time() - 40,
        memory_bytes=2**20,
        utilisation=0.5,
    )
    for rank in range(2):
        write_json(run_dir.health(rank), asdict(replace(beat, rank=rank)))
        run_dir.log(rank).write_text("step 12\n")
    shard = "shard-00001-model-00001-of-00001.safetensors"
    checkpoint = begin_checkpoint(run_dir, STEPS)
    (checkpoint / shard).write_bytes(bytes(100))
    manifest = Manifest(
        format=FORMAT,
        step=STEPS,
        samples=STEPS * 62,
        world_size=2,
        agreement=json.loads(json.dumps(plan.agreement())),
        values={"optimizer": {}, "groups": [{}], "scaler": None},
        versions={"gpu-launcher": "0.1.0"},
        files={shard: sum_file(checkpoint / shard)},
    )
    commit_checkpoint(checkpoint, manifest)
    log = folder / "job.log"
    log.write_text("job\n")
    Submission(job="12_3", log=str(log), batch_size=62, total_steps=STEPS, settings=("lr=1",)).save(
        run_dir
    )
    result = {"evaluation": {"accuracy": 0.9, "loss": 0.3}, "train_loss": 0.4, "steps": STEPS}
    write_json(run_dir.result, result | {"samples": 744, "seconds": 3.0, "num_trained": 650})
    return run_dir


def write_failure(run_dir: RunDir) -> None:
    """Make the run one that failed after its last step."""
    run_dir.result.unlink()
    values = {"rank": 1, "node": "node1", "pid": 7, "time": time.time() - 30, "exit_code": 1}
    texts = {"error": "ValueError", "message": "no", "traceback": "Traceback:\nValueError: no"}
    write_json(run_dir.failure, values | texts)


def _write_history(run_dir: RunDir) -> None:
    start = time.time() - 100
    began = {"ranks": 2, "nodes": 1, "strategy": "ddp", "device_name": "CPU", "job": "12_3"}
    record_event(run_dir, "began", step=0, **began, time=start)
    record_event(run_dir, "counted", flops_per_sample=1e6)
    failed = {"rank": 1, "node": "node1", "error": "OSError", "message": "gone"}
    record_event(run_dir, "failed", **failed, time=start + 10)
    record_event(run_dir, "began", step=0, **began, time=start + 20)
    cost = {"stall_seconds": 0.01, "write_seconds": 0.02, "seconds": 0.03, "num_bytes": 4000}
    record_event(run_dir, "saved", step=6, **cost, time=start + 30)
    record_event(run_dir, "finished", step=STEPS, time=start + 60)
    rows: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        values = {"loss": 2.0 / step, "lr": 0.1, "momentum": 0.9, "grad_norm": 1.0, "epoch": 0}
        seconds = {"step_seconds": 0.5, "data_wait_seconds": 0.1, "communication_seconds": 0.1}
        position = {"step": step, "samples": step * 62, "time": start + 20 + step}
        rows.append(position | values | seconds | {"samples_per_second": 124.0})
        if step % 6 == 0:
            shares = {"own_seconds": [0.3, 0.4], "data_wait_seconds": [0.1, 0.1]}
            rows.append({"step": step, "ranks": shares | {"memory_bytes": [2**20, 2**20]}})
            rows.append({"step": step, "evaluation": {"accuracy": 0.9, "loss": 0.3}})
            rows.append({"step": step, "noise_scale": 300.0})
            rows.append({"step": step, "checkpoint_stall_seconds": 0.01})
            rows.append({"step": step, "checkpoint_seconds": 0.02})
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _overwrite(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _in_place_of(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


WHOLE_FILE: dict[str, Callable[[Path], object]] = {
    "empty": _overwrite(b""),
    "an empty object": _overwrite(b"{}\n"),
    "an empty list": _overwrite(b"[]\n"),
    "null": _overwrite(b"null\n"),
    "a text": _overwrite(b'"x"\n'),
    "deep lists": _overwrite(b"[" * 100_000 + b"\n"),
    "deep objects": _overwrite(b'{"event": ' * 5000 + b"\n"),
    "not UTF-8": _overwrite(b'{"time": "\xff\xfe"}\n'),
    "a NUL byte": _overwrite(b"\0\n"),
    "5,000 digits": _overwrite(b'{"step": ' + b"1" * 5000 + b"}\n"),
    "a number beyond floats": _overwrite(b'{"time": 1e999, "event": "finished", "step": 1}\n'),
    "numbers that JSON lacks": _overwrite(b'{"time": NaN, "steps": -Infinity}\n'),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a terabyte of nothing": _sparse,
    "a folder": _in_place_of(Path.mkdir),
    "a FIFO": _in_place_of(os.mkfifo),
    "a link to a device": _in_place_of(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _in_place_of(lambda path: path.symlink_to(path)),
    "a link to nothing": _in_place_of(lambda path: path.symlink_to("nowhere")),
}
"""Damages of a whole file, by what stands in its place."""

VALUES: dict[str, Any] = {
    "null": None,
    "a text": "x",
    "a control sequence": "\x1b]0;title\x07\n",
    "a negative number": -1,
    "zero": 0,
    "a huge integer": 10**30,
    "a huge number": 1e300,
    "a list": [],
    "a list of a list": [[]],
    "an object": {"x": {}},
    "a truth value": True,
}
"""Values that replace one value of a file."""


def damaged_documents(document: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a document in which one value is replaced, or one key of a mapping missing.

    Args:
        document: Values as JSON has them.
        value: The replacement.

    Yields:
        The place of the replaced value, and the copy.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document[:2]))
    for key, item in items:
        copy = document.copy()
        copy[key] = value
        yield f"{key}", copy
        for place, inner in damaged_documents(item, value):
            copy = document.copy()
            copy[key] = inner
            yield f"{key}.{place}", copy


def write_document(path: Path, document: Any) -> None:
    """Write a damaged document in the format of its file."""
    if path.suffix == ".yaml":
        write_yaml(path, document)
    else:
        path.write_text(json.dumps(document))
