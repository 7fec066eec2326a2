"""run.yaml: what a run is, written and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from examples import NODE, recipe

from launcher import make_plan
from launcher.errors import RunDirError
from launcher.runs.history import History
from launcher.runs.provenance import GitState
from launcher.runs.run_record import CodeRecord, RunRecord, read_run, write_resumption, write_run
from launcher.runs.rundir import RunDir

RECORD = RunRecord(
    recipe="/home/me/digits.py:digits",
    overrides={"lr": 0.2, "betas": [0.9, 0.99]},
    plan={"recipe": "digits", "nproc_per_node": 2},
    versions={"python": "3.11", "torch": "2.10"},
    code=CodeRecord(project="/home/me", files={"digits.py": "0123456789abcdef"}),
    git=GitState(commit="0123456789" * 4, branch="main", changed_files=3),
    host="1234",
    folder="/home/me",
    command=("launcher", "run", "digits", "lr=0.2"),
)


@pytest.mark.parametrize(
    "record",
    [RECORD, replace(RECORD, git=None, probe=True), replace(RECORD, earlier=({"recipe": "x"},))],
    ids=["run", "probe", "resumed"],
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: RunRecord) -> None:
    """A record survives the file unchanged, texts that look like numbers included."""
    write_run(RunDir(tmp_path), record)
    assert read_run(RunDir(tmp_path)) == record


def test_the_keys_of_the_file(tmp_path: Path) -> None:
    """run.yaml has these keys in this order, and further ones only for probes and resumed runs."""
    write_run(RunDir(tmp_path), RECORD)
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    names = ["recipe", "overrides", "plan", "versions", "code", "git", "host", "folder", "command"]
    assert list(values) == names
    assert list(replace(RECORD, probe=True).to_dict()) == [*names, "probe"]


def test_keys_of_other_versions(tmp_path: Path) -> None:
    """Unknown keys are ignored, and missing optional ones have defaults."""
    (tmp_path / "run.yaml").write_text("recipe: digits\nplan: {}\ncolour: blue\n")
    assert read_run(RunDir(tmp_path)) == RunRecord(recipe="digits", plan={})


DAMAGES = {
    "recipe: [": "YAML",
    "recipe: 2020-99-99": "YAML",
    "\x00": "YAML",
    "": "object",
    "[]": "object",
    "plan: {}": "recipe",
    "recipe: digits": "plan",
    "recipe: digits\nplan: []": r"\$\.plan",
    "recipe: digits\nplan: {}\noverrides: 3": r"\$\.overrides",
    "recipe: digits\nplan: {}\ngit: {commit: a, branch: b, changed_files: x}": "changed_files",
}


@pytest.mark.parametrize(("text", "field"), DAMAGES.items())
def test_a_damaged_record_names_its_file_and_field(tmp_path: Path, text: str, field: str) -> None:
    """What is missing or of the wrong type is named, and a resumption leaves the file alone."""
    run_dir = RunDir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(RunDirError, match=rf"run\.yaml.*{field}"):
        read_run(run_dir)
    with pytest.raises(RunDirError, match=rf"run\.yaml.*{field}"):
        History(run_dir)
    with pytest.raises(RunDirError, match=r"run\.yaml"):
        write_resumption(run_dir, RECORD)
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_missing_record_names_its_file(tmp_path: Path) -> None:
    """A folder without run.yaml is refused with the reason of the operating system."""
    with pytest.raises(RunDirError, match=r"run\.yaml: No such file"):
        read_run(RunDir(tmp_path))


def test_a_resumption_keeps_what_was_there(tmp_path: Path) -> None:
    """Each resumption appends the record before it, unknown keys included, and nests nothing."""
    run_dir = RunDir(tmp_path)
    run_dir.health(0).parent.mkdir()
    run_dir.health(0).write_text("{}")
    (tmp_path / "run.yaml").write_text("recipe: first\nplan: {}\ncolour: blue\n")
    write_resumption(run_dir, replace(RECORD, recipe="second"))
    write_resumption(run_dir, replace(RECORD, recipe="third"))
    record = read_run(run_dir)
    assert record.recipe == "third"
    assert [earlier["recipe"] for earlier in record.earlier] == ["first", "second"]
    assert record.earlier[0]["colour"] == "blue"
    assert not any("earlier" in earlier for earlier in record.earlier)
    assert not run_dir.health(0).exists()


def test_a_plan_survives_the_file(tmp_path: Path) -> None:
    """The plan that is read is the plan that was written, under the names of version 0.1 too."""
    plan = make_plan(recipe(), NODE, nodes=2)
    values = plan.to_dict()
    former = {"derivations": "reasons", "performance_flags": "speed_ups"}
    for written in (values, {former.get(name, name): value for name, value in values.items()}):
        write_run(RunDir(tmp_path), replace(RECORD, plan=written))
        assert History(RunDir(tmp_path)).plan == plan


@pytest.mark.parametrize("value", [None, "2", 2.0])
def test_ranks_per_node_are_checked(value: object) -> None:
    """A plan without a number of ranks per node is refused by the name of that number."""
    assert RECORD.nproc_per_node == 2
    with pytest.raises(RunDirError, match=r"plan\.nproc_per_node"):
        _ = replace(RECORD, plan={"nproc_per_node": value}).nproc_per_node
