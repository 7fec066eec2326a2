"""Site profiles, resources of jobs, and batch scripts as text, without Slurm.

`pytest --update-golden tests/integration/test_slurm_script.py` rewrites the golden scripts.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import BIN, ROOT, Commands

from launcher.environment.program import own_program, program_of
from launcher.errors import SlurmError, UsageError
from launcher.recipe.resolve import resolve
from launcher.slurm.batch_job import SubmitRequest, combinations, prepare
from launcher.slurm.queue import error_text
from launcher.slurm.script import BatchScript, render
from launcher.slurm.site import Site, find_site, read_memory, read_site, read_time, time_text

DIGITS = ROOT / "recipes/digits.py"
GOLDEN = ROOT / "tests/golden"

PROGRAM = ("/env/bin/python", "/env/lib/launcher/__main__.py")

PLAIN = BatchScript(
    name="digits",
    folder="/home/me/project",
    log="/home/me/project/runs/digits/logs/slurm.log",
    nodes=(2, 2),
    gpus_per_node=4,
    cpus_per_node=20,
    memory_per_node=None,
    seconds=7200,
    commands=[[*PROGRAM, "run", "recipes/digits.py:digits", "lr=0.2"]],
    site=Site(),
)

SITE = read_site(ROOT / "slurm/example.yaml")


def changed(**values: object) -> BatchScript:
    """Return the plain script with other values."""
    return BatchScript(**{**vars(PLAIN), **values})


SCRIPTS = {
    "plain": PLAIN,
    "site": changed(site=SITE, memory_per_node=245_760),
    "array": changed(
        nodes=(1, 4),
        gpus_per_node=0,
        seconds=None,
        commands=[["launcher", "run", "digits", f"lr={lr}"] for lr in (0.1, 0.2)],
        is_array=True,
    ),
    "container": changed(
        commands=[[*program_of("python"), "run", "recipes/digits.py:digits", "lr=0.2"]],
        site=Site(container="/images/a b.sqsh", container_mounts=("/data:/data",), python="python"),
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_equals_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    """A rendered script equals its golden file and is valid bash."""
    path = GOLDEN / f"{name}.sbatch"
    script = render(SCRIPTS[name])
    if request.config.getoption("--update-golden"):
        path.write_text(script)
    assert script == path.read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


EVIL = [
    "a'; touch pwned; '",
    'a"=0"; touch pwned #',
    "$(touch pwned)",
    "`touch pwned`",
    "a\ntouch pwned\n",
]
"""Texts that a shell would run as commands if they were not quoted."""

EVIL_IN_A_LINE = [text for text in EVIL if "\n" not in text]


@pytest.mark.parametrize("evil", EVIL)
def test_a_script_quotes_its_values(evil: str, tmp_path: Path) -> None:
    """Arguments, folders and variables pass through the shell unchanged, and none is run."""
    folder = tmp_path / evil.replace("/", "")
    folder.mkdir()
    batch = changed(
        folder=str(folder),
        commands=[["printf", "%s\\0", evil, f"name={evil}"]],
        site=Site(env={"SOME": evil} if "\n" not in evil else {}, scratch=str(tmp_path)),
    )
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin/srun"
    srun.write_text('#!/bin/bash\nshift 3\n"$@"\nprintf "%s\\0%s\\0" "$PWD" "$SOME"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash"],
        input=render(batch),
        text=True,
        capture_output=True,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        cwd=tmp_path,
        check=False,
    )
    values = done.stdout.split("\0")
    assert values[:3] == [evil, f"name={evil}", str(folder)], done.stderr
    assert "\n" in evil or values[3] == evil
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("evil", EVIL_IN_A_LINE)
def test_sbatch_reads_one_option(evil: str) -> None:
    """A value in an #SBATCH line is one word of that line."""
    script = render(changed(log=f"/runs/{evil}/slurm.log"))
    (line,) = [line for line in script.splitlines() if "--output" in line]
    assert shlex.split(line.removeprefix("#SBATCH "), comments=False) == [
        f"--output=/runs/{evil}/slurm.log"
    ]


def test_a_line_break_in_an_sbatch_line_is_refused() -> None:
    """A value with a line break is refused in an #SBATCH line, where it would start a new line."""
    with pytest.raises(SlurmError, match="line break"):
        render(changed(log="/runs/a\n#SBATCH --wrap=id/slurm.log"))
    with pytest.raises(SlurmError, match="line break"):
        render(changed(name="a\ntouch pwned"))


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script has no variables of the submitting user's environment."""
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert all("hunter2" not in render(script) for script in SCRIPTS.values())


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
        ("gpus_per_node: many", "gpus_per_node: expected a whole number at least 0, or none"),
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


def test_resources_follow_from_plan_and_site(tmp_path: Path) -> None:
    """A job asks for a core per rank and worker, its share of memory, and the site's time."""
    request = SubmitRequest(
        reference=resolve(str(ROOT / "tests/recipes/worlds.py")),
        arguments=("num_workers=6",),
        grid=(),
        config=None,
        nodes=(2, 2),
        gpus_per_node=4,
        nproc_per_node=None,
        time=None,
    )
    batch = prepare(request, SITE, tmp_path / "out").batch
    assert (batch.gpus_per_node, batch.cpus_per_node) == (4, 28)
    assert (batch.memory_per_node, batch.seconds) == (480 * 1024 // 2, 43_200)
    (command,) = batch.commands
    assert command[:3] == [*own_program(), "run"]
    assert command[4:] == [
        *("-n", "4", "--nodes", "2", "--out", str(tmp_path / "out"), "--continue"),
        *("device=cuda", "num_workers=6"),
    ]
    one = prepare(replace(request, grid=(("lr=0.1",),)), SITE, tmp_path / "out").batch
    assert "#SBATCH --array=0-0\n" in render(one), "an array of one run is an array"
    for changes, message in (
        ({"gpus_per_node": 9}, "--gpus-per-node 9 exceeds the 8 GPUs"),
        ({"time": "3-0"}, "--time 3-0 exceeds the longest time of the site, 2-00:00:00"),
        ({"arguments": ("num_workers=20",)}, "need 84 cores, and a node has 64"),
        ({"nproc_per_node": 2}, "each GPU has one rank"),
    ):
        with pytest.raises(UsageError) as caught:
            prepare(replace(request, **changes), SITE, tmp_path / "out")
        assert message in str(caught.value)
    with pytest.raises(SlurmError, match="backslash"):
        prepare(request, SITE, tmp_path / "a\\b")


@pytest.mark.parametrize("name", ["launcher.py", "launcher/__init__.py"])
@pytest.mark.parametrize("profile", ["{}\n", f"python: {sys.executable}\n"])
def test_a_project_has_a_launcher_of_its_own(run: Commands, name: str, profile: str) -> None:
    """The job starts this launcher, and the recipe can import the project's modules."""
    (run.folder / name).parent.mkdir(exist_ok=True)
    (run.folder / name).write_text("print('another launcher')\n")
    (run.folder / "sub").mkdir()
    (run.folder / "sub/helper.py").write_text("EPOCHS = 1\n")
    (run.folder / "sub/mine.py").write_text(
        "from dataclasses import replace\n"
        "from launcher import Recipe\n"
        "from launcher.recipes.digits import digits\n"
        "from helper import EPOCHS\n"
        "def mine() -> Recipe:\n"
        "    return replace(digits(), epochs=EPOCHS)\n"
    )
    (run.folder / "site.yaml").write_text(profile)
    options = ("--cluster", "site.yaml", "--gpus-per-node", "0", "-n", "1", "--out", "out")
    done = run("launcher", "submit", "sub/mine.py", *options, "--dry-run")
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("command="))
    done = run("bash", "-c", f'{command}; exec "${{command[@]}}"')
    assert done.exit_code == 0, done.stderr
    assert "another launcher" not in done.stdout
    assert (run.folder / "out/result.json").is_file()


def test_an_interpreter_without_this_launcher_says_so(run: Commands) -> None:
    """The job fails, and the error names the module that Python found instead."""
    other = run.folder / "site/launcher.py"
    other.parent.mkdir()
    other.write_text("")
    done = run(*program_of(sys.executable), "recipes", env={"PYTHONPATH": str(other.parent)})
    assert done.exit_code == 1
    assert str(other) in done.stderr
    assert "Traceback" not in done.stderr


def test_submission_needs_slurm(run: Commands) -> None:
    """Without Slurm, --dry-run prints the script; submitting is one error that leaves nothing."""
    (run.folder / "bin").mkdir()
    for name in ("python", "launcher"):
        (run.folder / "bin" / name).symlink_to(BIN / name)
    command = (
        "bash",
        "-c",
        f"PATH={run.folder}/bin exec launcher submit {DIGITS} -n 1 $0 --out out",
    )
    done = run(*command, "device=cpu")
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "sbatch is not installed" in done.stderr
    assert not (run.folder / "out").exists()
    done = run(*command, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "sbatch is not installed" in done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")


def test_train_sbatch_does_what_submit_does() -> None:
    """The script for submission by hand has the same options and the same end."""
    by_hand = (ROOT / "slurm/train.sbatch").read_text()
    ours = render(PLAIN)
    for option in ("--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in by_hand
        assert f"#SBATCH {option}\n" in ours
    ending = re.search(r"^# 75: .*", ours, re.MULTILINE | re.DOTALL)
    assert ending is not None
    assert by_hand.endswith(ending[0])
