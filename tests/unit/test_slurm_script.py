"""Site profiles, resources of jobs, and batch scripts as text, without Slurm.

`pytest --update-golden tests/integration/test_slurm_script.py` rewrites the golden scripts.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from launcher.errors import SlurmError, UsageError
from launcher.schedulers.request import combinations
from launcher.schedulers.site_profile import read_time
from launcher.slurm.queue import error_text
from launcher.slurm.site import Site, find_site, read_memory, read_site, time_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:00:00", 43_200),
        ("2-0", 172_800),
        ("2-12:30", 217_800),
        ("1-00:00:01", 86_401),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    """Times are read in Slurm's formats, and a written time is read as the same time."""
    assert read_time(text, "--time") == seconds
    assert read_time(time_text(seconds), "--time") == seconds


def test_sizes_are_read_as_slurm_reads_them() -> None:
    """Memory sizes are read in MiB or with a unit, and other texts are refused."""
    assert [read_memory(text, "x") for text in ("512", "480G", "1T", "2048K")] == [
        512,
        491_520,
        1_048_576,
        2,
    ]
    with pytest.raises(SlurmError, match="expected a size such as 480G; found '3 GB'"):
        read_memory("3 GB", "memory_per_node")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "partiton: gpu",
            "line 1: unknown key 'partiton' in the site profile. Did you mean partition?",
        ),
        ("gpus_per_node: many", "gpus_per_node: expected a whole number of at least 0, or none"),
        ("time: soon", "time: expected a time such as 90"),
        ("memory_per_node: lots", "expected a size such as 480G"),
        ("env: {a-b: c}", "env: 'a-b' is not a valid name"),
        ('account: "a\\nb"', "account: expected text of one line, or none"),
        ("- a", "`name: value`"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the line and what was expected."""
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_site(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_profile_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile is found in slurm/, the user's folder or by path; no name gives an empty one."""
    monkeypatch.chdir(tmp_path)
    env = {"HOME": str(tmp_path)}
    assert find_site(None, env) == Site()
    home = tmp_path / ".config/launcher"
    home.mkdir(parents=True)
    (home / "lab.yaml").write_text("partition: theirs")
    assert find_site("lab", env).partition == "theirs"
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/lab.yaml").write_text("partition: ours")
    assert find_site("lab", env).partition == "ours"
    assert find_site(None, env | {"LAUNCHER_CLUSTER": "lab"}).partition == "ours"
    assert find_site(str(home / "lab.yaml"), env).partition == "theirs"
    with pytest.raises(SlurmError, match=r"--cluster lub: .* Did you mean lab"):
        find_site("lub", env)


def test_an_array_is_all_combinations() -> None:
    """Combinations come in order, the last axis fastest; commas in brackets belong to a value."""
    grid = combinations(["lr=0.1,0.2", "schedule=wsd(a=1,b=2),cosine()"])
    assert grid == tuple(
        itertools.product(["lr=0.1", "lr=0.2"], ["schedule=wsd(a=1,b=2)", "schedule=cosine()"])
    )
    with pytest.raises(UsageError, match="expected name=value,value"):
        combinations(["lr"])


def test_errors_of_slurm_lose_the_names_of_programs() -> None:
    """The message of Slurm remains, without the prefix of the program."""
    message = "Requested node configuration is not available\n"
    assert (
        error_text(f"sbatch: error: Batch job submission failed: {message}")
        == "Requested node configuration is not available."
    )
    assert error_text("allocation failure: Invalid account\n") == "Invalid account."
