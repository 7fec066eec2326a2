"""Site profiles, resources of jobs, and batch scripts as text, without Slurm.

`pytest --update-golden tests/integration/test_slurm_script.py` rewrites the golden scripts.
"""

from __future__ import annotations

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
from launcher.schedulers.request import SubmitRequest
from launcher.slurm.batch_job import prepare
from launcher.slurm.script import BatchScript, render
from launcher.slurm.site import Site, read_site

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
        run_folders=["/home/me/project/runs/it's/0", "/home/me/project/runs/it's/1"],
        is_array=True,
        array_cap=1,
        dependency="afterok:1234",
    ),
    "restarting": changed(
        nodes=(3, 3),
        commands=[["launcher", "run", "digits", "--nodes", "2", "--spares", "1"]],
        run_folders=["/home/me/project/runs/digits"],
        restarts=True,
    ),
    "container": changed(
        commands=[[*program_of("python"), "run", "recipes/digits.py:digits", "lr=0.2"]],
        site=Site(container="/images/a b.sqsh", container_mounts=("/data:/data",), python="python"),
    ),
    "apptainer": changed(
        commands=[["launcher", "run", "recipes/digits.py:digits", "lr=0.2"]],
        site=Site(
            container="/images/a b.sif",
            container_runtime="apptainer",
            container_mounts=("/data:/data", "/my runs:/runs"),
            env={"NCCL_DEBUG": "WARN"},
        ),
    ),
    "docker": changed(
        commands=[["launcher", "run", "recipes/digits.py:digits", "lr=0.2"]],
        site=Site(
            container="lab/train:1.0",
            container_runtime="docker",
            container_mounts=("/data:/data", "/my runs:/runs"),
            env={"NCCL_DEBUG": "WARN"},
        ),
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


@pytest.mark.parametrize("name", ["apptainer", "docker"])
def test_a_container_gets_the_command(name: str, tmp_path: Path) -> None:
    """The runtime gets its image and the command as they are, and Docker every variable's name."""
    batch = BatchScript(**{**vars(SCRIPTS[name]), "folder": str(tmp_path)})
    (tmp_path / "bin").mkdir()
    for program, line in (("srun", 'shift 3; exec "$@"'), (name, 'printf "%s\\0" "$@"')):
        path = tmp_path / "bin" / program
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash"],
        input=render(batch),
        text=True,
        capture_output=True,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        check=False,
    )
    words = done.stdout.split("\0")[:-1]
    image = batch.site.container
    assert image is not None
    assert words[words.index(image) + 1 :] == list(batch.commands[0])
    mount = {"apptainer": "--bind=/my runs:/runs", "docker": "--volume=/my runs:/runs"}[name]
    assert mount in words
    assert ("--env=NCCL_DEBUG" in words) == (name == "docker")
    source = (ROOT / "launcher/environment/slurm_step.py").read_text()
    read = re.findall(r'env(?:\.get\(|\[)"(SLURM_\w+)"', source)
    assert len(read) == 7
    if name == "docker":
        assert {f"--env={each}" for each in read} <= set(words)


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
    copy = tmp_path / "out/code"
    assert command[3] == f"{copy}/tests/recipes/worlds.py:worlds"
    assert command[4:] == [
        *("--code", str(copy), "-n", "4", "--nodes", "2"),
        *("--out", str(tmp_path / "out"), "--continue", "--health", "quick"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "2", "--spares", "1"), "--spares 1: .* Add --max-restarts N"),
        (("--max-restarts", "2"), "--max-restarts 2: .* this job has one node"),
        (("--nodes", "2", "--node-timeout", "9", "--to", "kubernetes"), "goes to kubernetes"),
        (("--nodes", "2", "--max-restarts", "1", "--to", "ssh"), "goes to ssh"),
        (("--nodes", "4:2"), "'4:2': expected a number of nodes"),
        (
            ("--spares", "1", "--max-restarts", "1", "--to", "kubernetes"),
            "--spares 1: .*kubernetes",
        ),
        (("--dependency", "afterok:1", "--to", "ssh"), "--dependency afterok:1: only Slurm"),
        (("--array-cap", "2"), "--array-cap 2 .*Add --array"),
    ],
)
def test_restarts_that_a_job_cannot_make_are_refused(
    run: Commands, arguments: tuple[str, ...], message: str
) -> None:
    """Spares and restarts are refused where nothing gives or uses them, with exit code 2."""
    done = run("launcher", "submit", "digits", "device=cpu", "--dry-run", *arguments)
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("launcher: ") <= 1


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
