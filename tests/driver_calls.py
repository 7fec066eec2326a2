"""A recorder of the calls that reach the driver of GPUs, on a machine without one.

    python tests/driver_calls.py FILE
    python tests/driver_calls.py FILE CASE ARGUMENT...

A program for test_driver_calls.py. It pretends that torch is built for CUDA or ROCm, that the
machine has four GPUs, and that the management library (NVML, amdsmi) works or does not. Then it
does what the process does that starts the ranks, or runs `launcher ARGUMENT...`, and writes the
calls of this process, and of those that it forks, to FILE. A call of the driver makes CUDA unusable
in processes that are forked later.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

GPUS = 4
ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = "ddp", "fsdp", "zero1", "zero2", "zero3"
MIG = "MIG-6e0b6f2f-1a4c-5f0e-9d6a-2b1c0d3e4f5a"

_ENTRY_POINTS = (
    *("_cuda_getDeviceCount", "_cuda_init", "_cuda_getDevice", "_cuda_setDevice"),
    "_cuda_getCurrentRawStream",
)
_LIBRARIES = ("libcuda.", "libcudart", "libamdhip64", "libhsa-runtime")


class Driver:
    """Stands in for the driver: records calls, and cannot be used after a fork."""

    def __init__(self, *, management: str, file: Path | None = None) -> None:
        self.calls: list[str] = []
        self._management, self._file = management, file
        self._used_by: int | None = None

    def install(self) -> None:
        """Replace torch's ways to the driver and to the management library."""
        for name in _ENTRY_POINTS:
            setattr(torch._C, name, self._entry_point(name))
        torch.cuda._is_in_bad_fork = lambda: self._used_by not in (None, os.getpid())
        lazy_init: Any = torch.cuda._lazy_init

        def recorded_init() -> None:
            self._record("_lazy_init")
            lazy_init()

        torch.cuda._lazy_init = recorded_init
        load = ctypes.CDLL

        def recorded_load(name: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "libnvidia-ml.so.1":
                return _Nvml(self._management)
            if name and Path(str(name)).name.startswith(_LIBRARIES):
                self._record(f"loads {name}")
            return load(name, *args, **kwargs)

        ctypes.CDLL = recorded_load  # type: ignore[misc,assignment]

    def _entry_point(self, name: str) -> Callable[..., int]:
        def call(*_: Any) -> int:
            self._record(name)
            return GPUS

        return call

    def _record(self, name: str) -> None:
        self._used_by = os.getpid()
        frames = [f for f in traceback.extract_stack() if f.filename != __file__]
        own = next((f for f in reversed(frames) if "/torch/" not in f.filename), None)
        self.calls.append(f"{name} from {own.filename}:{own.lineno}" if own else name)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(f"{os.getpid()} {self.calls[-1]}\n")


class _Nvml:
    """Stands in for the management library of NVIDIA's driver."""

    def __init__(self, management: str) -> None:
        if management == "missing":
            raise OSError
        self._error = 0 if management == "works" else 999

    def nvmlInit(self) -> int:  # noqa: N802
        return self._error

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = GPUS
        return self._error


CASES: dict[str, tuple[str, dict[str, str], str | None]] = {
    "NVML works": ("works", {}, None),
    "NVML fails": ("fails", {}, None),
    "NVML is missing": ("missing", {}, None),
    "MIG": ("works", {"CUDA_VISIBLE_DEVICES": MIG}, None),
    "ROCm without amdsmi": ("missing", {}, "6.4.0"),
}
"""For each case the state of the management library, variables, and the version of ROCm."""


def shipped_recipes() -> None:
    """Import every shipped recipe, and plan it on four GPUs."""
    for path in sorted((ROOT / "recipes").glob("*.py")):
        _plan(path.stem, *(["steps=1"] if path.stem == "images" else []))  # it has no data


def ranks() -> None:
    """Import what the ranks of every strategy need on GPUs, and on CPUs of this machine."""
    from launcher.launch.launcher import import_for

    import_for([_plan("digits", f"strategy={strategy}") for strategy in STRATEGIES])
    for strategy in STRATEGIES:
        import_for([_plan("digits", f"strategy={strategy}", "device=cpu")])


def choosing() -> None:
    """Import a recipe that asks for a GPU at the top of its file."""
    _plan(str(ROOT / "tests/recipes/choosing.py"))


ACTIONS = {
    # Whatever counts GPUs calls the driver in all cases but the first.
    shipped_recipes: ("NVML works", "NVML is missing", "ROCm without amdsmi"),
    ranks: ("MIG", "ROCm without amdsmi"),
    choosing: tuple(CASES),
}
"""The cases in which each action is measured; imports take seconds."""


def _plan(name: str, *settings: str) -> Any:
    from launcher.environment.machine import read_machine
    from launcher.recipe.overrides import read_arguments
    from launcher.recipe.resolve import resolve
    from launcher.runs.plan_recipe import plan_recipe

    machine = replace(read_machine(), num_gpus=GPUS)
    _, plan = plan_recipe(resolve(name), read_arguments(settings), machine, nproc_per_node=2)
    return plan


def pretend(case: str, file: Path | None = None) -> Driver:
    """Install the driver of a case."""
    management, variables, rocm = CASES[case]
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    torch.version.hip = rocm
    driver = Driver(management=management, file=file)
    driver.install()
    return driver


def measure(case: str, action: Callable[[], None]) -> dict[str, Any]:
    """Return the calls of an action, and why ranks cannot be forked after it, if they cannot."""
    from launcher.forking import reason_not_to_fork

    driver = pretend(case)
    action()
    return {"calls": driver.calls, "reason": reason_not_to_fork()}


def run_launcher(case: str, arguments: list[str], file: Path) -> None:
    """Run a command of launcher in this process, and write a line for each call."""
    from launcher.cli import main as launcher_main

    file.write_text("")
    pretend(case, file)
    launcher_main(arguments)


def measure_all(file: Path) -> None:
    """Measure every action in its cases, each in a process of its own."""
    results = {}
    for action, cases in ACTIONS.items():
        for case in cases:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(write, json.dumps(measure(case, action)).encode())
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as results_file:
                results[f"{action.__name__}: {case}"] = json.loads(results_file.read() or "null")
            os.waitpid(child, 0)
    file.write_text(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[2:]:
        run_launcher(sys.argv[2], sys.argv[3:], Path(sys.argv[1]))
    else:
        measure_all(Path(sys.argv[1]))
