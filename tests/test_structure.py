"""The package's structure: one direction of imports, one place for torch, a known surface."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from support import ROOT

import launcher

PACKAGE = ROOT / "launcher"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "numpy", "accelerate", "deepspeed", "safetensors"}


def name_of(path: Path) -> str:
    """Return a module's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, at_import: bool) -> set[str]:
    """Return the modules that a file imports, those inside functions only if asked."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    nodes = tree.body if at_import else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_in_a_circle() -> None:
    """Imports at the top of modules go one way, through the whole package."""
    names = {name_of(path) for path in MODULES}
    graph = {
        name_of(path): imports_of(path, at_import=True) & names - {name_of(path)}
        for path in MODULES
        if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_in_the_engine_alone(path: Path) -> None:
    """Outside launcher/engine nothing imports torch and its kin, except the agent in launch.py."""
    if "engine" in path.parts or path.name == "launch.py":
        return
    roots = {name.partition(".")[0] for name in imports_of(path, at_import=False)}
    assert roots.isdisjoint(HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_backends_keep_to_themselves(path: Path) -> None:
    """Accelerate is imported where it starts ranks or trackers, DeepSpeed in its own alone."""
    allowed = {
        "launcher.engine.backends.accelerate": {"accelerate"},
        "launcher.engine.backends.deepspeed": {"accelerate", "deepspeed"},
        "launcher.engine.trackers": {"accelerate"},
    }.get(name_of(path), set())
    roots = {name.partition(".")[0] for name in imports_of(path, at_import=False)}
    assert roots & {"accelerate", "deepspeed"} <= allowed


def test_the_command_line_sees_no_engine() -> None:
    """Commands reach the engine through launch, and a recipe's file through its worker."""
    for path in (PACKAGE / "cli").glob("*.py"):
        engine = {name for name in imports_of(path, at_import=False) if "engine" in name}
        names = ("found_count", "found_rank")
        allowed = {"launcher.engine.worker", *(f"launcher.engine.worker.{n}" for n in names)}
        assert engine <= (allowed if path.name == "standalone.py" else set())


def test_the_public_names_are_those_listed() -> None:
    """`__all__` is sorted, each name in it is fetched from the module that types say it is in."""
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
