"""The copy of a project in a run folder: what it has, what it refuses, and imports from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import RunDirError, UsageError
from launcher.launch.code_choice import choose_code
from launcher.recipe.frozen_code import FrozenCode, import_from, restored_imports
from launcher.recipe.project_code import changed_files, digests_of, project_of
from launcher.recipe.resolve import Reference, resolve
from launcher.runs.freezing import DEFAULT_LIMIT, freeze, open_frozen, read_frozen, survey
from launcher.runs.run_record import CodeRecord, RunRecord, read_run, replace_code, write_run
from launcher.runs.rundir import RunDir, find_run_dirs

RECIPE = """
from launcher import Recipe

def frozen_train() -> Recipe:
    from frozen_parts import model
    from frozen_lone import VALUE
    raise RuntimeError(model.VERSION)
"""

FILES = {
    "frozen_train.py": RECIPE,
    "frozen_parts/__init__.py": "",
    "frozen_parts/model.py": "from .layers import VERSION  # as written\n",
    "frozen_parts/layers.py": "VERSION = 'old'\n",
    "frozen_lone.py": "import os, sys as system\nVALUE = 1\n",
    "unused.py": "VALUE = 2\n",
    ".gitignore": "data/\n*.log\nvenv/\n",
    "data/train.bin": "0123456789",
    "notes.log": "a log",
    "venv/pyvenv.cfg": "home = /usr\n",
    "runs/one/run.yaml": "recipe: x\n",
    "runs/one/checkpoints/big.bin": "x" * 1000,
}


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files with these contents below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def git(folder: Path, *arguments: str) -> str:
    """Run a command of git in a folder and return what it prints."""
    identity = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """Forget the modules of the test's project, and restore sys.path."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("frozen_")]:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a git repository with a commit of a recipe and its modules."""
    folder = tmp_path / "project"
    write(folder, FILES)
    git(folder, "init", "-q")
    git(folder, "add", "frozen_train.py", "frozen_parts", ".gitignore")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def reference(project: Path) -> Reference:
    """Return the reference of the project's recipe."""
    return resolve(str(project / "frozen_train.py"))


def frozen(project: Path) -> FrozenCode:
    """Copy a project into the folder `run` beside it."""
    folder = project.with_name("run")
    folder.mkdir(exist_ok=True)
    snapshot = survey(reference(project))
    assert snapshot is not None
    return freeze(snapshot, folder)


def names_in(folder: Path) -> set[str]:
    """Return the names of files and links below a folder."""
    found = {path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return {str(path.relative_to(folder)) for path in found}


def test_a_copy_has_what_the_working_tree_has(project: Path) -> None:
    """A copy has tracked and untracked files as they are, and links to what git ignores."""
    (project / "frozen_parts/layers.py").write_text("VERSION = 'edited'\n")
    (project / "unused.py").chmod(0o755)
    code = frozen(project)
    assert names_in(code.copy) == {
        *("frozen_train.py", "frozen_lone.py", "unused.py", ".gitignore", "data", "notes.log"),
        *(f"frozen_parts/{name}.py" for name in ("__init__", "model", "layers")),
    }
    assert (code.copy / "frozen_parts/layers.py").read_text() == "VERSION = 'edited'\n"
    assert os.access(code.copy / "unused.py", os.X_OK)
    assert not os.access(code.copy / "frozen_train.py", os.X_OK)
    assert (code.copy / "data").readlink() == project / "data"
    record = read_frozen(code.copy)
    assert record.git is not None
    assert (record.git.commit, record.git.changed_files) == (git(project, "rev-parse", "HEAD"), 4)
    assert (record.project, record.num_files) == (str(project), 7)
    diff = code.copy.with_name("code.diff").read_text()
    assert "-VERSION = 'old'\n+VERSION = 'edited'\n" in diff


def test_links_are_not_followed(project: Path) -> None:
    """A link out of the project stays a link, and one within it leads to the copy."""
    outside = project.with_name("outside")
    write(outside, {"secret.txt": "secret", "folder/more.txt": "more"})
    (project / "out.txt").symlink_to("../outside/secret.txt")
    (project / "out").symlink_to(outside / "folder")
    (project / "within.py").symlink_to(project / "unused.py")
    (project / "gone.txt").symlink_to("nowhere")
    copy = frozen(project).copy
    assert (copy / "out.txt").readlink() == outside / "secret.txt"
    assert (copy / "out").readlink() == outside / "folder"
    assert (copy / "within.py").readlink() == copy / "unused.py"
    assert str((copy / "gone.txt").readlink()) == "nowhere"
    assert (project / "data/train.bin").read_text() == "0123456789"


def test_a_large_project_is_refused(project: Path) -> None:
    """A project over the limit is refused with its largest files, and copied with a higher one."""
    with (project / "weights.bin").open("wb") as file:
        file.truncate(DEFAULT_LIMIT * 10**6)
    with pytest.raises(UsageError, match=r"project has 100\.0 MB in 8 .* weights\.bin \(100\.0 MB"):
        survey(reference(project))
    snapshot = survey(reference(project), DEFAULT_LIMIT + 1)
    assert snapshot is not None
    assert "weights.bin" in snapshot.files
    (project / ".gitignore").write_text("weights.bin\n")
    ignoring = survey(reference(project))
    assert ignoring is not None
    assert "weights.bin" not in ignoring.files


def test_a_project_without_git(tmp_path: Path) -> None:
    """Without git a copy has the file's folder, but no hidden files, environments and runs."""
    write(tmp_path / "project", {**FILES, ".cache/x": "x"})
    code = frozen(tmp_path / "project")
    assert names_in(code.copy) == {
        *("frozen_train.py", "frozen_lone.py", "unused.py", "data/train.bin", "notes.log"),
        *(f"frozen_parts/{name}.py" for name in ("__init__", "model", "layers")),
    }
    assert read_frozen(code.copy).git is None
    assert not code.copy.with_name("code.diff").exists()


def test_a_package_without_git(tmp_path: Path) -> None:
    """Without git a recipe in a package takes the package, and what it imports from beside it."""
    project = tmp_path / "project"
    write(project, {"frozen_app/__init__.py": "", "frozen_lone.py": "VALUE = 1\n", "other.py": ""})
    write(project, {"frozen_app/frozen_train.py": RECIPE.replace("frozen_parts", "frozen_app")})
    sys.path.insert(0, str(project))
    snapshot = survey(resolve(str(project / "frozen_app/frozen_train.py")))
    assert snapshot is not None
    assert set(snapshot.files) == {
        *("frozen_app/__init__.py", "frozen_app/frozen_train.py", "frozen_lone.py"),
    }


def test_submodules_are_copied(project: Path) -> None:
    """A copy has the files of submodules, and of repositories in the project."""
    write(project, {"inner/frozen_inner.py": "VALUE = 3\n", "inner/.gitignore": "x.bin\n"})
    write(project, {"inner/x.bin": "x"})
    git(project / "inner", "init", "-q")
    copy = frozen(project).copy
    assert (copy / "inner/frozen_inner.py").read_text() == "VALUE = 3\n"
    assert (copy / "inner/x.bin").readlink() == project / "inner/x.bin"


def test_shipped_recipes_have_no_project() -> None:
    """Nothing is copied for a recipe of this package."""
    assert survey(resolve("digits")) is None


def test_imported_files_are_found_without_importing(project: Path) -> None:
    """The recipe's files are those that it imports, inside functions and packages as well."""
    found = project_of(reference(project))
    assert found is not None
    digests = digests_of(found)
    assert set(digests) == {
        *("frozen_train.py", "frozen_lone.py"),
        *(f"frozen_parts/{name}.py" for name in ("__init__", "model", "layers")),
    }
    assert "frozen_parts" not in sys.modules
    assert changed_files(project, digests) == []
    (project / "unused.py").write_text("VALUE = 4\n")
    (project / "frozen_lone.py").unlink()
    (project / "frozen_parts/layers.py").write_text("VERSION = 'new'\n")
    assert changed_files(project, digests) == ["frozen_lone.py", "frozen_parts/layers.py"]


def test_a_change_while_copying_is_refused(project: Path) -> None:
    """A file of the recipe that changes between the plan and the copy is named."""
    snapshot = survey(reference(project))
    assert snapshot is not None
    (project / "frozen_parts/layers.py").write_text("VERSION = 'late'\n")
    with pytest.raises(RunDirError, match=r"layers\.py was changed"):
        freeze(snapshot, project)


def test_recipes_are_imported_from_the_copy(project: Path) -> None:
    """Old code runs after the project has changed, and the project's own modules come back."""
    import_path = list(sys.path)
    sys.path.insert(0, str(project))
    own = reference(project)
    code = frozen(project)
    (project / "frozen_parts/layers.py").write_text("VERSION = 'new'\n")
    (project / "frozen_new.py").write_text("VALUE = 5\n")
    with pytest.raises(RuntimeError, match="new"):
        own.function()
    before = sys.modules["frozen_parts.layers"]
    with restored_imports():
        copied = resolve(str(project / "frozen_train.py"), open_frozen(code.copy))
        assert copied.location == f"{code.copy}/frozen_train.py:frozen_train"
        with pytest.raises(RuntimeError, match="old"):
            copied.function()
        with pytest.raises(ImportError):
            __import__("frozen_new")
        assert str(project) not in sys.path
    assert sys.modules["frozen_parts.layers"] is before
    assert sys.path[0] == str(project)
    sys.path[:] = import_path


def test_namespace_packages_are_imported_from_the_copy(project: Path) -> None:
    """A package without __init__.py is imported from the copy as well."""
    write(project, {"frozen_space/part.py": "VERSION = 'old'\n"})
    sys.path.insert(0, str(project))
    import frozen_space.part as own  # type: ignore[import-not-found]

    code = frozen(project)
    (project / "frozen_space/part.py").write_text("VERSION = 'new and longer'\n")
    with restored_imports():
        import_from(code)
        import frozen_space.part as copied

        assert (copied.VERSION, copied is own) == ("old", False)


def test_a_diff_has_no_keys_and_an_end(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """code.diff hides keys of the environment and is cut off after a megabyte."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    (project / "frozen_parts/layers.py").write_text("KEY = 'hf_secret123'\n" + "x = 1\n" * 300_000)
    diff = frozen(project).copy.with_name("code.diff").read_text()
    assert "hf_secret123" not in diff
    assert "KEY = '[hidden]'" in diff
    assert 2**20 < len(diff) < 2**20 + 200


def test_the_record_moves_with_its_run(project: Path) -> None:
    """run.yaml names the copy relative to the run folder, one that an array shares as well."""
    code = frozen(project)
    for folder, relative in ((project.with_name("run"), "./"), (code.copy.parent / "0", "../")):
        folder.mkdir(exist_ok=True)
        run_dir = RunDir(folder)
        write_run(run_dir, RunRecord(recipe="x:y", plan={}, folder="f"))
        record = CodeRecord(project=str(project), files={"a.py": "1"}, copy=str(code.copy))
        replace_code(run_dir, f"{code.copy}/frozen_train.py:frozen_train", record)
        text = run_dir.run_yaml.read_text()
        assert f"recipe: {relative}code/frozen_train.py:frozen_train\n" in text
        assert f"copy: {relative}code\n" in text
        assert read_run(run_dir).code == record
        run_dir.run_yaml.rename(folder / "other.yaml")


def test_a_copy_holds_no_runs(project: Path) -> None:
    """The search for runs does not look into the copy of the code that an array shares."""
    copy = frozen(project).copy
    write(copy.parent, {"code/inner/run.yaml": "recipe: x\n", "0/run.yaml": "recipe: x\n"})
    assert [run.path.name for run in find_run_dirs(copy.parent)] == ["0"]


@pytest.mark.parametrize("is_copied", [False, True])
def test_changed_code_is_not_resumed_by_accident(project: Path, *, is_copied: bool) -> None:
    """A run of the project refuses changed files unless told; a run of a copy keeps the copy."""
    found = project_of(reference(project))
    assert found is not None
    digests = digests_of(found)
    copy = str(frozen(project).copy) if is_copied else None
    location = f"{copy or project}/frozen_train.py:frozen_train"
    code = CodeRecord(project=str(project), files=digests, copy=copy)
    record, run_dir = RunRecord(recipe=location, plan={}, code=code), RunDir(project)
    same = choose_code(record, run_dir, allow_change=False)
    assert (same.recipe, same.changes) == (location, ())
    (project / "frozen_parts/layers.py").write_text("VERSION = 'new'\n")
    which = r"frozen_parts/layers\.py \(1 of the recipe's 5 files\)"
    if is_copied:
        kept = choose_code(record, run_dir, allow_change=False)
        assert kept.code is not None
        assert (kept.recipe, len(kept.changes)) == (location, 1)
    else:
        with pytest.raises(RunDirError, match=which):
            choose_code(record, run_dir, allow_change=False)
    allowed = choose_code(record, run_dir, allow_change=True)
    assert (allowed.recipe, allowed.code) == (f"{project}/frozen_train.py:frozen_train", None)
    assert len(allowed.changes) == 1
    if is_copied:
        Path(f"{copy}").rename(f"{copy}.gone")
        with pytest.raises(RunDirError, match="does not exist"):
            choose_code(record, run_dir, allow_change=False)
