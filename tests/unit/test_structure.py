"""Structure of the package: direction of imports, place of torch, unique names, public names."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from support import ROOT

import launcher

PACKAGE = ROOT / "launcher"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "recipes" not in path.parts)
HEAVY = {"torch", "numpy", "accelerate", "deepspeed", "safetensors"}

ROOMS = [
    [
        "launcher.printable",
        "launcher.paths",
        "launcher.errors",
        "launcher.interrupted_start",
        "launcher.signals",
        "launcher.quantities",
        "launcher.svg",
    ],
    ["launcher.regular_file"],
    ["launcher.json_file", "launcher.yaml_file"],
    ["launcher.tensor_file"],
    ["launcher.findings"],
    ["launcher.forking"],
    ["recipe"],
    ["environment"],
    ["object_stores"],
    ["planning"],
    ["runs"],
    ["mirrors"],
    ["analysis"],
    ["schedulers"],
    ["console", "hosts", "kubernetes", "skypilot", "slurm"],
    ["engine.optimizers"],
    ["engine.ranks", "engine.state"],
    ["engine.backends"],
    ["engine.data", "engine.saving"],
    ["engine.data.stores"],
    ["engine.model", "engine.metrics"],
    ["engine.training"],
    ["engine.probes"],
    ["engine"],
    ["launch"],
    ["warm", "tuning", "checks", "sweeps"],
    ["report"],
    ["launcher.api"],
    ["cli.find", "cli"],
    ["launcher.entry", "launcher.__main__"],
]
"""Folders, and modules directly in the package, from the bottom to the top.

A module may import from rooms on lines above its own. Rooms on one line do not import each other,
except that the group `cli.find` belongs to `cli`.
"""

LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def room_of(name: str) -> str:
    """Return the room of a module: its folder, or its own name if it is directly in the package."""
    room = ".".join(NAMES[name].relative_to(PACKAGE).parent.parts)
    return room or name


def imports_of(path: Path, *, at_import: bool) -> set[str]:
    """Return the modules that a file imports, without those inside functions if `at_import`."""
    tree = ast.parse(path.read_text())
    modules: set[str] = set()
    nodes = tree.body if at_import else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                modules.add(submodule if submodule in NAMES else node.module)
    return modules


def test_no_module_imports_in_a_circle() -> None:
    """Imports at the top of modules form no cycle."""
    graph = {
        name: imports_of(path, at_import=True) & NAMES.keys() - {name}
        for name, path in NAMES.items()
        if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "launcher"])
def test_rooms_import_from_rooms_below_them(name: str) -> None:
    """A module imports, also inside functions, only from rooms below its own."""
    room = room_of(name)
    upward = {
        other
        for other in imports_of(NAMES[name], at_import=False) & NAMES.keys() - {"launcher"}
        if room_of(other) != room and LEVELS[room_of(other)] >= LEVELS[room]
    }
    upward = {other for other in upward if not (room == "cli.find" and room_of(other) == "cli")}
    assert upward == set()


def test_a_basename_stands_for_one_module() -> None:
    """No two modules share a basename, except in cli, where commands have the names users type."""
    names = Counter(
        path.name
        for path in MODULES
        if "cli" not in path.parts and path.name not in ("__init__.py", "__main__.py")
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_a_public_class_name_stands_for_one_class() -> None:
    """No two public classes of the package share a name."""
    places = defaultdict(list)
    for name, path in NAMES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_in_the_engine_alone(path: Path) -> None:
    """Only launcher/engine, and the module that starts the agent, import torch or its relatives."""
    if "engine" in path.parts or name_of(path) == "launcher.launch.launcher":
        return
    roots = {name.partition(".")[0] for name in imports_of(path, at_import=False)}
    assert roots.isdisjoint(HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_backends_keep_to_themselves(path: Path) -> None:
    """Backends and trackers alone import Accelerate, and one backend alone imports DeepSpeed."""
    allowed = {
        "launcher.engine.backends.accelerate": {"accelerate"},
        "launcher.engine.backends.fsdp": {"accelerate"},
        "launcher.engine.backends.deepspeed": {"accelerate", "deepspeed"},
        "launcher.engine.backends.zero_optimizers": {"deepspeed"},
        "launcher.engine.metrics.trackers": {"accelerate"},
    }.get(name_of(path), set())
    roots = {name.partition(".")[0] for name in imports_of(path, at_import=False)}
    assert roots & {"accelerate", "deepspeed"} <= allowed


def test_the_command_line_sees_no_engine() -> None:
    """Only cli/standalone.py imports the engine, and only its worker."""
    for path in (PACKAGE / "cli").rglob("*.py"):
        engine = {name for name in imports_of(path, at_import=False) if ".engine" in name}
        assert engine <= ({"launcher.engine.external"} if path.name == "standalone.py" else set())


NOT_FOR_OTHERS = {
    "launcher.json_file",  # `encode_json` itself
    "launcher.engine.data.fingerprint",  # texts that are compared and shown
    "launcher.engine.ranks.rendezvous",  # messages between nodes
    "launcher.engine.state.module_state",  # messages between ranks
    "launcher.runs.manifest",  # the text that a digest is taken of
    "launcher.runs.part_exchange",  # messages between processes of ranks
    "launcher.runs.resumption",  # a value as JSON returns it
    "launcher.runs.shard_files",  # messages between a rank and its process, names and digests
    "launcher.tuning.batch_search",  # the name of a file in the cache
    "launcher.warm.messages",  # messages between a command and its server
    "launcher.warm.surroundings",  # the text that a digest is taken of
}
"""Modules that may write JSON which no other program reads."""


@pytest.mark.parametrize("name", sorted(NAMES.keys() - NOT_FOR_OTHERS))
def test_json_for_others_is_strict(name: str) -> None:
    """JSON that is printed or kept comes from `encode_json`, because json.dumps writes NaN."""
    calls = [
        node.func
        for node in ast.walk(ast.parse(NAMES[name].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    written = [call for call in calls if call.attr in ("dump", "dumps")]
    assert not [call for call in written if ast.unparse(call.value) == "json"]


def test_the_public_names_are_those_listed() -> None:
    """`__all__` is sorted, and each name comes from the module that type checkers see."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert launcher.__all__ == sorted(typed) == dir(launcher)
    for name, module in typed.items():
        assert getattr(launcher, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = launcher.missing
