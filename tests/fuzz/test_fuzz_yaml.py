"""Fuzzing of YAML files that users write: settings and site profiles."""

from __future__ import annotations

from pathlib import Path

from fuzz.harness import invoke
from fuzz.strategies import broken_documents, changed_bytes, yaml_documents
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

_PROFILE = (ROOT / "slurm" / "example.yaml").read_bytes()


@given(content=yaml_documents().map(lambda text: text.encode(errors="surrogatepass")))
def test_settings(tmp_path: Path, content: bytes) -> None:
    """`launcher plan --config` takes or refuses any document."""
    (tmp_path / "settings.yaml").write_bytes(content)
    invoke(["plan", "digits", "--config", "settings.yaml"], tmp_path)


@given(content=changed_bytes(_PROFILE) | broken_documents())
def test_site_profiles(tmp_path: Path, content: bytes) -> None:
    """`launcher submit --cluster` takes or refuses any document."""
    (tmp_path / "site.yaml").write_bytes(content)
    invoke(["submit", "digits", "--dry-run", "--cluster", "site.yaml"], tmp_path)


@given(kind=st.sampled_from(["/dev/zero", "/dev/stdin", ".", "missing.yaml", "/dev/null"]))
def test_what_is_not_a_file(tmp_path: Path, kind: str) -> None:
    """A device or a folder is refused at once where a YAML file is expected."""
    if kind != "/dev/null":
        assert invoke(["plan", "digits", "--config", kind], tmp_path).exit_code == 2
