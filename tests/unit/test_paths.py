"""Questions about paths: every name has an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import paths

ODD_NAMES = [
    "a" * 300,
    "a/" * 3000,
    "nul\0byte",
    "half a pair \ud800",
    "caf\udce9",
    "",
    "file/below",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_cannot_exist_does_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names too long, with NUL or undecodable bytes, or below a file are answered with False."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert not paths.is_file(name)
    assert not paths.is_dir(Path("x") / name)
    assert not paths.exists(f"x/{name}")
    assert not paths.is_link(f"x/{name}")


def test_paths_that_exist_are_told_apart(tmp_path: Path) -> None:
    """A file and a folder are what they are, also through a link."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert paths.is_file(tmp_path / "file")
    assert paths.is_file(tmp_path / "link")
    assert paths.is_link(tmp_path / "link")
    assert not paths.is_link(tmp_path / "file")
    assert paths.exists(tmp_path / "link")
    assert paths.is_dir(tmp_path)
    assert not paths.is_dir(tmp_path / "file")
    assert not paths.is_file(tmp_path)


def test_a_path_from_a_file_is_found_in_every_locale(tmp_path: Path) -> None:
    """A path that was recorded in UTF-8 leads to its file in a locale that lacks its characters."""
    folder = tmp_path / "rüns"
    folder.mkdir()
    (folder / "path").write_text(str(folder), encoding="utf-8")
    code = (
        "import glob, os, pathlib; from launcher.paths import is_dir, native; "
        "(name,) = glob.glob('r*/path'); text = pathlib.Path(name).read_text(encoding='utf-8'); "
        "assert is_dir(native(text)), ascii(text)"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | locale, check=True)
