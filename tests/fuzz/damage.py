"""Damage to the files of a run folder, as disks, crashes, editors and hostile users cause it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fuzz.strategies import broken_documents, changed_bytes, changed_json, changed_lines
from hypothesis import strategies as st

KINDS = ["values", "bytes", "broken", "empty", "missing", "folder", "fifo", "link", "loop", "zero"]


def copy_run(run: Path, folder: Path) -> Path:
    """Return a copy of a run folder, whose files are links to the original's, in `folder`."""
    copy = folder / "run"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(run, copy, copy_function=os.link)
    return copy


def files_of(run: Path) -> list[str]:
    """Return the files of a run folder, as paths relative to it, in order."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


@st.composite
def damages(draw: st.DrawFn, run: Path, names: list[str]) -> list[tuple[str, str, bytes]]:
    """Return one or two damages of files as (file, kind, new content)."""
    chosen = []
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        kind = draw(st.sampled_from(KINDS))
        original = (run / name).read_bytes()
        content = b""
        if kind == "values":
            change = changed_lines if name.endswith(".jsonl") else changed_json
            content = draw(change(original))
        elif kind == "bytes":
            content = draw(changed_bytes(original))
        elif kind == "broken":
            content = draw(broken_documents())
        chosen.append((name, kind, content))
    return chosen


def apply(run: Path, damage: list[tuple[str, str, bytes]]) -> None:
    """Damage the files of a copied run folder; the modification time of run.yaml stays old."""
    for name, kind, content in damage:
        path = run / name
        path.unlink()
        if kind in ("values", "bytes", "broken", "empty"):
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("/nonexistent/file")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        if kind not in ("missing", "fifo", "link", "loop", "zero"):
            os.utime(path, (1e9, 1e9))
