"""Runs on two machines from one terminal: network namespaces with an ssh server in each."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import BIN, ROOT, Commands, Finished, has_rows, read_lines, wait_until

from launcher.engine.probes.parity import compare, read_trace
from launcher.launch.ssh_remote import EXIT_ENDED, EXIT_STOPPED
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.rundir import RunDir

WORLDS_PY = ROOT / "tests/recipes/worlds.py"

PACED = f"{WORLDS_PY}:paced"

FAILING = ROOT / "tests/recipes/failing.py"

ADDRESSES = ("10.77.0.1", "10.77.0.2")

SPARE = "10.77.0.3"
"""Address of a third machine."""

_NEEDED = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "dropbear", "dropbearkey")

_MACHINE = """
set -e
hostname machine$1
mount --bind $2/passwd /etc/passwd
mount -t proc proc /proc
echo ready
read -r _
exec dropbear -F -E -e -s -r $2/host_key -p 22
"""


_PRINTING = """
import os
from dataclasses import replace
from launcher.recipes.digits import digits

def build_model():
    for name in ("NCCL_DEBUG", "HF_HOME", "HF_TOKEN"):
        print(f"{name}={os.environ.get(name)!r}")
    return digits().model()

def printing():
    return replace(digits(), name="printing", model=build_model)
"""


_NAMED = (
    "HF_TOKEN",
    "FROM_TERMINAL",
    "FROM_HOME",
    "FROM_FOLDER",
    "OPTION",
    "WANDB_API_KEY",
)

_PRINTING_PROCESSES = """\
    from pathlib import Path
    secret = b"hf_" + b"secret123"
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    print("shown in processes:", sum(secret in line for line in lines))
"""


@dataclass
class Network:
    """Terminal with a network connection to two machines."""

    run: Commands
    """Runner of commands in the project's folder, outside the network."""

    ssh: str
    """Command of ssh with its options."""

    terminal: int
    """Id of a process in the terminal's network namespace."""

    def start(
        self, *arguments: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command of `launcher` in the terminal."""
        enter = ("nsenter", "-t", str(self.terminal), "-n", "--")
        return self.run.start(*enter, BIN / "launcher", *arguments, env=env, cold=True)

    def start_there(self, address: str, line: str) -> subprocess.Popen[str]:
        """Start a line of shell on a machine over ssh."""
        enter = ("nsenter", "-t", str(self.terminal), "-n", "--")
        return self.run.start(*enter, *self.ssh.split(), address, line)

    def __call__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Finished:
        """Run a command of `launcher` in the terminal and wait for it."""
        process = self.start(*arguments, env=env)
        stdout, stderr = process.communicate(timeout=120)
        return Finished(process.returncode, stdout, stderr)

    def set_cable(self, number: int, state: str) -> None:
        """Plug the cable of a machine in (`up`) or pull it (`down`), which closes nothing."""
        enter = ("nsenter", "-t", str(self.terminal), "-n", "ip", "link", "set")
        subprocess.run([*enter, f"cable{number}", state], check=True)

    def wait_for_end(self, address: str, word: str) -> None:
        """Wait until no process of a machine has a word in its command line."""
        wait_until(lambda: not self._has_processes(address, word))

    def _has_processes(self, address: str, word: str) -> bool:
        line = "for f in /proc/[0-9]*/cmdline; do tr '\\0' '\\n' < $f; done 2> /dev/null"
        process = self.start_there(address, line)
        stdout, stderr = process.communicate(timeout=60)
        assert stdout, stderr
        return word in stdout.split("\n")

    def hosts(self, *hosts: str) -> tuple[str, ...]:
        """Return the options that run a command on `hosts`."""
        return ("--hosts", ",".join(hosts), "--ssh", self.ssh)


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Return a folder with the keys of the machines and a home folder that accepts them."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (iproute2, openssh-client, dropbear-bin)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to create network namespaces with an ssh server")
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        folder = Path(name)
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(key, check=True)
        shutil.copy(folder / "key.pub", home / ".ssh/authorized_keys")
        server = ["dropbearkey", "-t", "ed25519", "-f", str(folder / "host_key")]
        subprocess.run(server, check=True, capture_output=True)
        root = pwd.getpwuid(0)
        users = Path("/etc/passwd").read_text().splitlines()
        lines = [
            f"root:x:0:0::{home}:/bin/sh" if line.startswith(f"{root.pw_name}:") else line
            for line in users
        ]
        (folder / "passwd").write_text("\n".join(lines) + "\n")
        yield folder


@pytest.fixture(scope="module")
def network(module_run: Commands, keys: Path) -> Iterator[Network]:
    """Return a terminal and two machines in a network of their own.

    The project's folder, and the folder in which ssh sessions start, each have another module
    called launcher, which must not be run.
    """
    for folder in (module_run.folder, keys / "home"):
        (folder / "launcher.py").write_text("raise SystemExit(0)\n")
    with ExitStack() as stack:

        def start_isolated(*command: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                ["unshare", "--net", "--kill-child", "--fork", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=module_run.environment(),
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                stderr = process.communicate()[1]
                pytest.skip(f"network namespaces are not available: {stderr.strip()}")
            return process

        def ip(process: subprocess.Popen[str], *words: str) -> None:
            enter = ["nsenter", "-t", str(process.pid), "-n", "ip"]
            done = subprocess.run([*enter, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"ip {' '.join(words)} fails: {done.stderr.strip()}")

        terminal = start_isolated("sh", "-c", "echo ready; exec sleep infinity")
        ip(terminal, "link", "add", "bridge", "type", "bridge")
        ip(terminal, "addr", "add", "10.77.0.254/24", "dev", "bridge")
        ip(terminal, "link", "set", "bridge", "up")
        for number, address in enumerate((*ADDRESSES, SPARE), start=1):
            machine = start_isolated(
                *("--mount", "--pid", "--uts", "sh", "-c", _MACHINE, "sh", str(number), str(keys))
            )
            cable = f"cable{number}"
            ends = ("type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
            ip(terminal, "link", "add", cable, *ends)
            ip(terminal, "link", "set", cable, "master", "bridge", "up")
            ip(machine, "addr", "add", f"{address}/24", "dev", "eth0")
            ip(machine, "link", "set", "eth0", "up")
            ip(machine, "link", "set", "lo", "up")
            assert machine.stdin is not None
            assert machine.stderr is not None
            machine.stdin.write("\n")
            machine.stdin.flush()
            assert "Not backgrounding" in machine.stderr.readline()
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "BatchMode=yes",
            "ConnectTimeout=10",
        )
        ssh = f"ssh -q -F none -i {keys}/key" + "".join(f" -o {option}" for option in options)
        yield Network(module_run, ssh, terminal.pid)


def out_of(network: Network, name: str) -> RunDir:
    """Return a run folder in the project's folder."""
    return RunDir(network.run.folder / name)


def test_two_machines_from_one_terminal(network: Network) -> None:
    """A run on two machines takes the steps of one process, with two ranks on each machine."""
    settings = ("epochs=2", "record_samples=true", "device=cpu")
    done = network(
        "run", WORLDS_PY, *settings, "-n", "2", "--out", "two", *network.hosts(*ADDRESSES)
    )
    assert done.exit_code == 0, done.stderr
    assert "4 = 2 nodes x 2 CPU ranks" in done.stdout
    assert done.stdout.count("run folder: two") == 1
    alone = network.run("launcher", "run", WORLDS_PY, *settings, "-n", "1", "--out", "alone")
    assert alone.exit_code == 0, alone.stderr
    one, two = (read_trace(out_of(network, name)) for name in ("alone", "two"))
    difference = compare(one, two, tolerance=1e-5)
    assert difference.agrees, difference
    names = [
        json.loads((network.run.folder / f"two/health/rank{rank}.json").read_text())["node"]
        for rank in range(4)
    ]
    assert names == ["machine1", "machine1", "machine2", "machine2"]


def test_two_machines_are_examined_from_one_terminal(network: Network) -> None:
    """`launcher doctor --hosts` examines the ranks of both machines together."""
    done = network("doctor", "-n", "1", "--device", "cpu", "--json", *network.hosts(*ADDRESSES))
    assert done.exit_code == 0, done.stderr
    output = json.loads(done.stdout)
    assert [report["node"] for report in output["ranks"]] == ["machine1", "machine2"]
    found = [finding["found"] for finding in output["findings"]]
    assert sum(text.startswith("machine2: ") for text in found) == 5


def test_ranks_have_the_variables_of_the_terminal(network: Network) -> None:
    """Ranks on all machines have the variables of libraries, and no keys."""
    (network.run.folder / "printing.py").write_text(_PRINTING)
    env = {"NCCL_DEBUG": "WARN, all", "HF_HOME": "/data/hf", "HF_TOKEN": "hf_secret123"}
    options = ("steps=1", "-n", "1", "device=cpu", "--out", "printed")
    done = network("run", "printing.py", *options, *network.hosts(*ADDRESSES), env=env)
    assert done.exit_code == 0, done.stderr
    for rank in range(2):
        log = out_of(network, "printed").log(rank).read_text()
        assert "NCCL_DEBUG='WARN, all'" in log
        assert "HF_HOME='/data/hf'" in log
        assert "HF_TOKEN=None" in log


def test_named_variables_are_forwarded(network: Network, tmp_path: Path) -> None:
    """--forward and .deepspeed_env reach all ranks, and no list of processes shows a secret.

    The working folder's file takes precedence over that of the home folder, and the option over
    both. A secret and a malformed line of a file are left out and named.
    """
    text = _PRINTING.replace('("NCCL_DEBUG", "HF_HOME", "HF_TOKEN")', repr(_NAMED))
    text = text.replace("def build_model():\n", "def build_model():\n" + _PRINTING_PROCESSES)
    (network.run.folder / "named.py").write_text(text.replace("printing", "named"))
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("# mine\n\nFROM_HOME=home\nFROM_FOLDER=home\n")
    lines = 'FROM_FOLDER="the folder"\nOPTION=file\nWANDB_API_KEY=abcdef123456\nnonsense here\n'
    (network.run.folder / ".deepspeed_env").write_text(lines)
    env = {"HOME": str(home), "HF_TOKEN": "hf_secret123", "FROM_TERMINAL": "a, b"}
    options = ("steps=1", "-n", "1", "device=cpu", "--out", "named")
    forward = ("--forward", "HF_TOKEN", "-qxFROM_TERMINAL", "-x", "OPTION=it's an option")
    done = network("run", "named.py", *options, *forward, *network.hosts(*ADDRESSES), env=env)
    (network.run.folder / ".deepspeed_env").unlink()
    assert done.exit_code == 0, done.stderr
    for rank in range(2):
        log = out_of(network, "named").log(rank).read_text()
        assert "HF_TOKEN='hf_secret123'" in log
        assert "FROM_TERMINAL='a, b'" in log
        assert "FROM_HOME='home'" in log
        assert "FROM_FOLDER='the folder'" in log
        assert 'OPTION="it\'s an option"' in log
        assert "WANDB_API_KEY=None" in log
        assert "shown in processes: 0" in log
    assert ".deepspeed_env, line 3: WANDB_API_KEY" in done.stderr
    assert ".deepspeed_env, line 4: expected NAME=VALUE" in done.stderr
    assert "abcdef123456" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--forward", "HF_TOKEN"), "there is no variable HF_TOKEN here"),
        (("-x", "1A=2"), "expected NAME or NAME=VALUE"),
        (("--forward", "RANK=3"), "launcher sets this variable"),
    ],
)
def test_a_variable_that_cannot_be_forwarded_is_refused(
    run: Commands, arguments: tuple[str, ...], message: str
) -> None:
    """A variable without a value, with a bad name, or of a rank is refused with exit code 2."""
    done = run("launcher", "run", WORLDS_PY, "device=cpu", "--hosts", "a,b", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_forwarding_needs_hosts(run: Commands) -> None:
    """--forward without --hosts is refused with exit code 2."""
    done = run("launcher", "run", WORLDS_PY, "device=cpu", "-x", "A=1")
    assert done.exit_code == 2
    assert "--forward A" in done.stderr
    assert "--hosts" in done.stderr


def test_a_launcher_started_on_each_machine(network: Network) -> None:
    """Two launchers that are started by hand with one --rendezvous train together."""
    options = ("--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:29500", "--out", "typed")
    command = ("launcher", "run", str(WORLDS_PY), "steps=4", "-n", "1", "device=cpu", *options)
    line = f"cd {network.run.folder} && exec {BIN}/{shlex.join(command)}"
    launchers = [network.start_there(address, line) for address in ADDRESSES]
    output = [process.communicate(timeout=120) for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0], output
    assert json.loads(out_of(network, "typed").result.read_text())["steps"] == 4


def test_one_post_mortem(network: Network) -> None:
    """A rank that fails on another machine is shown once, with its traceback."""
    hosts = network.hosts(*ADDRESSES)
    done = network("run", FAILING, "how=raise", "rank=1", "-n", "1", "device=cpu", *hosts)
    assert done.exit_code == 1
    assert done.stderr.count("the run failed on rank 1 (machine2)") == 1
    assert done.stderr.count("ValueError: the loss of rank one") == 1
    assert done.stderr.count("the run ended on this node because machine2 has failed") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_machines(network: Network, number: signal.Signals) -> None:
    """A signal to the terminal saves the run, which exits with 75 and can be resumed from there."""
    name = f"stopped-{number}"
    hosts = network.hosts(*ADDRESSES)
    settings = ("epochs=400", "-n", "1", "device=cpu")
    process = network.start("run", WORLDS_PY, *settings, "--out", name, *hosts)
    run_dir = out_of(network, name)
    wait_until(lambda: has_rows(run_dir, 2), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)
    assert process.returncode == 75, output
    (checkpoint, *_) = list_checkpoints(run_dir)
    if number == signal.SIGINT:  # one of the two is enough
        return
    done = network("resume", name, f"steps={checkpoint.step + 3}", *hosts)
    assert done.exit_code == 0, done.stderr
    assert json.loads(run_dir.result.read_text())["steps"] == checkpoint.step + 3


def test_a_second_run_of_one_folder_is_refused(network: Network) -> None:
    """A run whose folder is owned by another run is refused once, by the name of the owner."""
    paced = (f"{WORLDS_PY}:paced", "pause=0.05", "epochs=400")
    settings = ("run", *paced, "-n", "1", "device=cpu", "--out", "owned")
    hosts = network.hosts(*ADDRESSES)
    process = network.start(*settings, *hosts)
    run_dir = out_of(network, "owned")
    wait_until(lambda: has_rows(run_dir, 2), process)
    other_hosts = ("--rendezvous", f"{ADDRESSES[1]}:29600", *network.hosts(*reversed(ADDRESSES)))
    done = network(*settings, "--continue", *other_hosts)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("has owned it since") == 1
    assert "machine1 (pid " in done.stderr
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)
    assert process.returncode == 75, output
    events = [row["event"] for row in read_lines(run_dir.events)]
    assert [event for event in events if event not in ("counted", "saved")] == ["began", "stopped"]
    assert not run_dir.failure.exists()


def test_a_killed_terminal_stops_the_run(network: Network) -> None:
    """The machines of a run save a checkpoint when the terminal's launcher is killed."""
    hosts = network.hosts(*ADDRESSES)
    settings = ("epochs=400", "-n", "1", "device=cpu")
    process = network.start("run", WORLDS_PY, *settings, "--out", "gone", *hosts)
    run_dir = out_of(network, "gone")
    wait_until(lambda: has_rows(run_dir, 2), process)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: list_checkpoints(run_dir))
    for address in ADDRESSES:
        network.wait_for_end(address, "gone")


LASTING = ("steps=60", "record_samples=true", "checkpoint_every=10", "device=cpu", "pause=0.05")


def test_a_machine_that_is_cut_off_is_replaced(network: Network) -> None:
    """When the cable of the first machine is pulled, the others notice, and a spare goes on.

    The command ends with the run, while the machine is still cut off. Before that, the machines
    have sent each other their parts of quick checkpoints.
    """
    options = ("--spares", "1", "--max-restarts", "2", "--node-timeout", "4", "-n", "1")
    hosts = network.hosts(*ADDRESSES, SPARE)
    out = "pulled"
    quick = (f"quick_checkpoints={network.run.folder}/quick", "quick_checkpoint_every=3")
    process = network.start("run", PACED, *LASTING, *quick, *options, "--out", out, *hosts)
    run_dir = out_of(network, out)
    try:
        wait_until(lambda: has_rows(run_dir, 25), process)
        network.set_cable(1, "down")
        output = process.communicate(timeout=240)
    finally:
        network.set_cable(1, "up")
        process.kill()
    assert process.returncode == 0, output
    network.wait_for_end(ADDRESSES[0], out)
    nodes = [read_heartbeat(run_dir, rank) for rank in range(2)]
    assert [node.node for node in nodes if node is not None] == ["machine2", "machine3"]
    events = read_lines(run_dir.events)
    (failed,) = [row for row in events if row["event"] == "failed"]
    assert failed["error"] == "LostNode"
    places = [(row["time"] < failed["time"], row["place"]) for row in events if "place" in row]
    assert {(True, "quick"), (False, "quick")} <= set(places)
    alone = network.run("launcher", "run", PACED, *LASTING[:-1], "-n", "1", "--out", "alone-paced")
    assert alone.exit_code == 0, alone.stderr
    one, other = (read_trace(out_of(network, name)) for name in ("alone-paced", out))
    difference = compare(one, other, tolerance=1e-5)
    assert difference.agrees, difference


def start_endless(network: Network, out: str) -> subprocess.Popen[str]:
    """Start a run on two machines that lasts, and wait for its first checkpoint."""
    options = ("--node-timeout", "4", "-n", "1", "--out", out, *network.hosts(*ADDRESSES))
    settings = ("steps=100000", "checkpoint_every=10", "device=cpu", "pause=0.05")
    process = network.start("run", PACED, *settings, *options)
    wait_until(lambda: list_checkpoints(out_of(network, out)), process)
    return process


def test_the_command_ends_while_a_machine_is_cut_off(network: Network) -> None:
    """A run that ends because the first machine is cut off ends the command, which names it.

    The launcher and the rank of that machine end once it has returned.
    """
    process = start_endless(network, "cut-off")
    network.set_cable(1, "down")
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        network.set_cable(1, "up")
        process.kill()
    assert process.returncode == 75, (stdout, stderr)
    assert stderr.count(f"launcher: the run is over, and {ADDRESSES[0]} ") == 1, stderr
    network.wait_for_end(ADDRESSES[0], "cut-off")


def test_the_command_ends_while_a_launcher_is_stopped(network: Network) -> None:
    """A launcher that is stopped is lost, keeps nobody waiting, and ends once it continues.

    Another connection tells whether it runs, is stopped or has ended.
    """
    process = start_endless(network, "stopped-there")
    launcher, key = launcher_on(1, "stopped-there")
    program = f"{BIN}/python {ROOT}/launcher/__main__.py"

    def state(key: str) -> int:
        line = f"exec {program} --ssh-remote-state {key}"
        look = network.start_there(ADDRESSES[1], line)
        look.communicate(timeout=60)
        return look.returncode

    assert [state(key), state("other")] == [0, EXIT_ENDED]
    os.kill(launcher, signal.SIGSTOP)
    try:
        assert state(key) == EXIT_STOPPED
        stdout, stderr = process.communicate(timeout=120)
    finally:
        os.kill(launcher, signal.SIGCONT)
        process.kill()
    assert process.returncode == 75, (stdout, stderr)
    assert stderr.count(f"launcher: the run is over, and the launcher on {ADDRESSES[1]} ") == 1
    network.wait_for_end(ADDRESSES[1], "stopped-there")


def launcher_on(index: int, out: str) -> tuple[int, str]:
    """Return the id, outside its machine, of the launcher on a machine, and its key."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_launcher = b"--ssh-remote" in words and out.encode() in words
        if is_launcher and f"LAUNCHER_HOST_INDEX={index}".encode() in variables:
            return int(folder.name), words[words.index(b"--ssh-remote") + 1].decode()
    raise AssertionError(f"no launcher of {out} on machine {index}")


@pytest.mark.parametrize(
    ("hosts", "arguments", "code", "message"),
    [
        (("10.77.0.1", "10.77.0.9"), (), 1, "10.77.0.9: ssh .* 255"),
        (("10.77.0.1", "10.77.0.1"), (), 2, "--hosts 10.77.0.1,10.77.0.1"),
        (("localhost", "10.77.0.2"), (), 2, "--hosts localhost,10.77.0.2"),
        (ADDRESSES, ("--nodes", "3"), 2, "--nodes 3 .*--hosts.* 2"),
        (ADDRESSES, ("lr=fast",), 2, "lr"),
        (ADDRESSES, ("--spares", "1"), 2, "--spares 1: .* Add --max-restarts N"),
        (ADDRESSES, ("--spares", "2", "--max-restarts", "1"), 2, "--spares 2 .*--hosts names 2"),
        (ADDRESSES, ("--nodes", "2:1"), 2, "'2:1': expected"),
        (ADDRESSES, ("--nodes", "1:2"), 2, "--nodes 1:2: .* Add"),
        (ADDRESSES, ("--node-timeout", "1"), 2, "--node-timeout.*1.*x>=4"),
    ],
)
def test_a_run_that_cannot_start_is_refused_once(
    network: Network, hosts: tuple[str, ...], arguments: tuple[str, ...], code: int, message: str
) -> None:
    """A run that cannot start prints one error and does not wait for a missing machine."""
    ssh = network.ssh.replace("ConnectTimeout=10", "ConnectTimeout=2")
    options = ("-n", "1", "device=cpu", "--out", "never", "--hosts", ",".join(hosts), "--ssh", ssh)
    done = network("run", WORLDS_PY, *options, *arguments)
    assert done.exit_code == code, done.stderr
    assert len(re.findall(message, done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (network.run.folder / "never").exists()


def test_a_missing_ssh_program_is_refused(run: Commands) -> None:
    """A program of --ssh that is not installed is named, and the exit code is 2."""
    done = run(
        "launcher", "run", WORLDS_PY, "device=cpu", "--hosts", "a,b", "--ssh", "nothing -p 1"
    )
    assert done.exit_code == 2
    assert "nothing" in done.stderr
