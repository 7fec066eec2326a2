"""A run on two machines that is typed once: network namespaces with an ssh server in each."""

from __future__ import annotations

import json
import os
import pwd
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
from support import BIN, ROOT, Commands, Finished, read_lines

from launcher.cli.machines import without
from launcher.engine.probes.parity import compare, read_trace
from launcher.environment.nodes import find_nodes, nodes_environment, nodes_of_hosts
from launcher.errors import UsageError
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

WORLDS_PY = ROOT / "tests/recipes/worlds.py"
FAILING = ROOT / "tests/recipes/failing.py"
ADDRESSES = ("10.77.0.1", "10.77.0.2")

_NEEDED = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "dropbear", "dropbearkey")
_MACHINE = """
set -e
hostname machine$1
mount --bind $2/passwd /etc/passwd
mount -t proc proc /proc
echo made
read -r _
exec dropbear -F -E -e -s -r $2/host_key -p 22
"""


@dataclass
class Network:
    """A terminal that reaches two machines."""

    run: Commands
    ssh: str
    terminal: int
    """A process in the terminal's network."""

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command of `launcher` in the terminal."""
        enter = ("nsenter", "-t", str(self.terminal), "-n", "--")
        return self.run.start(*enter, BIN / "launcher", *arguments, cold=True)

    def start_there(self, address: str, line: str) -> subprocess.Popen[str]:
        """Start a line of shell on a machine."""
        enter = ("nsenter", "-t", str(self.terminal), "-n", "--")
        return self.run.start(*enter, *self.ssh.split(), address, line)

    def __call__(self, *arguments: str | Path) -> Finished:
        """Run a command of `launcher` in the terminal."""
        process = self.start(*arguments)
        said = process.communicate(timeout=120)
        return Finished(process.returncode, *said)

    def hosts(self, *hosts: str) -> tuple[str, ...]:
        """Return the options of a command that runs on `hosts`."""
        return ("--hosts", ",".join(hosts), "--ssh", self.ssh)


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Return a folder with the keys of the machines, and a home that has them."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (iproute2, openssh-client, dropbear-bin)")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces with an ssh server in them")
    with tempfile.TemporaryDirectory(prefix="hosts-") as made:
        folder = Path(made)
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
        subprocess.run(key, check=True)
        shutil.copy(folder / "key.pub", home / ".ssh/authorized_keys")
        server = ["dropbearkey", "-t", "ed25519", "-f", str(folder / "host_key")]
        subprocess.run(server, check=True, capture_output=True)
        own = pwd.getpwuid(0)
        users = Path("/etc/passwd").read_text().splitlines()
        lines = [
            f"root:x:0:0::{home}:/bin/sh" if line.startswith(f"{own.pw_name}:") else line
            for line in users
        ]
        (folder / "passwd").write_text("\n".join(lines) + "\n")
        yield folder


@pytest.fixture(scope="module")
def network(module_run: Commands, keys: Path) -> Iterator[Network]:
    """Return a terminal and two machines in a network of their own, and a project.

    What is called launcher in the project, and where ssh arrives, is not ours.
    """
    for folder in (module_run.folder, keys / "home"):
        (folder / "launcher.py").write_text("raise SystemExit(0)\n")
    with ExitStack() as stack:

        def alone(*command: str) -> subprocess.Popen[str]:
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
            if process.stdout.readline() != "made\n":
                said = process.communicate()[1]
                pytest.skip(f"network namespaces are refused here: {said.strip()}")
            return process

        def ip(process: subprocess.Popen[str], *words: str) -> None:
            enter = ["nsenter", "-t", str(process.pid), "-n", "ip"]
            done = subprocess.run([*enter, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"ip {' '.join(words)} is refused here: {done.stderr.strip()}")

        terminal = alone("sh", "-c", "echo made; exec sleep infinity")
        ip(terminal, "link", "add", "bridge", "type", "bridge")
        ip(terminal, "addr", "add", "10.77.0.254/24", "dev", "bridge")
        ip(terminal, "link", "set", "bridge", "up")
        for number, address in enumerate(ADDRESSES, start=1):
            machine = alone(
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
            "ConnectTimeout=2",
        )
        ssh = f"ssh -q -F none -i {keys}/key" + "".join(f" -o {option}" for option in options)
        yield Network(module_run, ssh, terminal.pid)


def out_of(network: Network, name: str) -> RunDir:
    """Return a run folder of a test."""
    return RunDir(network.run.folder / name)


def test_two_machines_from_one_terminal(network: Network) -> None:
    """The steps are those of one process, and each machine has its ranks."""
    settings = ("epochs=2", "record_samples=true", "device=cpu")
    done = network(
        "run", WORLDS_PY, *settings, "-n", "2", "--out", "two", *network.hosts(*ADDRESSES)
    )
    assert done.exit_code == 0, done.stderr
    assert "4 = 2 nodes x 2 CPU ranks" in done.stdout
    assert done.stdout.count("run folder: two") == 1
    alone = network.run("launcher", "run", WORLDS_PY, *settings, "-n", "1", "--out", "alone")
    assert alone.exit_code == 0, alone.stderr
    wanted, found = (read_trace(out_of(network, name)) for name in ("alone", "two"))
    difference = compare(wanted, found, tolerance=1e-5)
    assert difference.agrees, difference
    names = [
        json.loads((network.run.folder / f"two/health/rank{rank}.json").read_text())["node"]
        for rank in range(4)
    ]
    assert names == ["machine1", "machine1", "machine2", "machine2"]


def test_machines_that_each_are_typed_on(network: Network) -> None:
    """Without --hosts: a launcher on each, and where they meet."""
    place = ("--nodes", "2", "--rendezvous", f"{ADDRESSES[0]}:29500", "--out", "typed")
    command = ("launcher", "run", str(WORLDS_PY), "steps=4", "-n", "1", "device=cpu", *place)
    line = f"cd {network.run.folder} && exec {BIN}/{shlex.join(command)}"
    typed = [network.start_there(address, line) for address in ADDRESSES]
    said = [process.communicate(timeout=120) for process in typed]
    assert [process.returncode for process in typed] == [0, 0], said
    assert json.loads(out_of(network, "typed").result.read_text())["steps"] == 4


def test_one_post_mortem(network: Network) -> None:
    """A rank that fails is shown once, with its traceback, wherever it was."""
    hosts = network.hosts(*ADDRESSES)
    done = network("run", FAILING, "how=raise", "rank=1", "-n", "1", "device=cpu", *hosts)
    assert done.exit_code == 1
    assert done.stderr.count("the run failed on rank 1 (machine2)") == 1
    assert done.stderr.count("ValueError: the loss of rank one") == 1
    assert done.stderr.count("the run ended on this node because machine2 has failed") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_machines(network: Network, number: signal.Signals) -> None:
    """The run is saved, ends with 75, and goes on from the same terminal."""
    name = f"stopped-{number}"
    hosts = network.hosts(*ADDRESSES)
    settings = ("epochs=400", "-n", "1", "device=cpu")
    process = network.start("run", WORLDS_PY, *settings, "--out", name, *hosts)
    run_dir = out_of(network, name)
    while not run_dir.metrics.exists() or len(read_lines(run_dir.metrics)) < 2:
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    (checkpoint, *_) = list_checkpoints(run_dir)
    done = network("resume", name, f"steps={checkpoint.step + 3}", *hosts)
    assert done.exit_code == 0, done.stderr
    assert json.loads(run_dir.result.read_text())["steps"] == checkpoint.step + 3


def test_a_run_that_is_at_work_is_refused(network: Network) -> None:
    """The first machine of a second run finds the owner, and one message names it."""
    settings = ("run", WORLDS_PY, "epochs=400", "-n", "1", "device=cpu", "--out", "owned")
    hosts = network.hosts(*ADDRESSES)
    process = network.start(*settings, *hosts)
    run_dir = out_of(network, "owned")
    while not run_dir.metrics.exists() or len(read_lines(run_dir.metrics)) < 2:
        assert process.poll() is None, process.communicate()
    elsewhere = ("--rendezvous", f"{ADDRESSES[1]}:29600", *network.hosts(*reversed(ADDRESSES)))
    done = network(*settings, "--continue", *elsewhere)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("has owned it since") == 1
    assert "machine1 (pid " in done.stderr
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    events = [row["event"] for row in read_lines(run_dir.events)]
    assert [each for each in events if each != "counted"] == ["began", "stopped"]
    assert not run_dir.failure.exists()


def test_a_terminal_that_goes_stops_the_run(network: Network) -> None:
    """Killed, it cannot pass on anything; the machines notice, and save."""
    hosts = network.hosts(*ADDRESSES)
    settings = ("epochs=400", "-n", "1", "device=cpu")
    process = network.start("run", WORLDS_PY, *settings, "--out", "gone", *hosts)
    run_dir = out_of(network, "gone")
    while not run_dir.metrics.exists() or len(read_lines(run_dir.metrics)) < 2:
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate(timeout=60)
    while not list_checkpoints(run_dir):
        pass


@pytest.mark.parametrize(
    ("hosts", "arguments", "code", "said"),
    [
        (("10.77.0.1", "10.77.0.9"), (), 1, "10.77.0.9: ssh ended with 255"),
        (("10.77.0.1", "10.77.0.1"), (), 2, "--hosts 10.77.0.1,10.77.0.1"),
        (("localhost", "10.77.0.2"), (), 2, "--hosts localhost,10.77.0.2"),
        (ADDRESSES, ("--nodes", "3"), 2, "--nodes 3 was asked for, and --hosts names 2"),
        (ADDRESSES, ("lr=fast",), 2, "lr"),
        (ADDRESSES, ("--max-restarts", "2"), 2, "--max-restarts 2"),
    ],
)
def test_what_cannot_work_is_said_once(
    network: Network, hosts: tuple[str, ...], arguments: tuple[str, ...], code: int, said: str
) -> None:
    """And nobody waits for a machine that does not come."""
    options = ("-n", "1", "device=cpu", "--out", "never", *network.hosts(*hosts))
    done = network("run", WORLDS_PY, *options, *arguments)
    assert done.exit_code == code, done.stderr
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr
    assert not (network.run.folder / "never").exists()


def test_without_ssh_it_says_so(run: Commands) -> None:
    """The program that is missing is named."""
    done = run(
        "launcher", "run", WORLDS_PY, "device=cpu", "--hosts", "a,b", "--ssh", "nothing -p 1"
    )
    assert done.exit_code == 2
    assert "with nothing, which is not here" in done.stderr


def test_machines_know_their_place() -> None:
    """What is set in their environment is what they find there."""
    nodes = nodes_of_hosts(["me@a", "b"], None)
    assert (nodes.host, nodes.port, nodes.count) == ("a", 29_400, 2)
    second = find_nodes(None, None, 7.0, env=nodes_environment(nodes, 1))
    assert second is not None
    assert (second.index, second.host, second.names) == (1, "a", ("me@a", "b"))
    assert second.join_timeout == 7.0
    v6 = nodes_of_hosts(["me@fe80::1", "b"], None)
    assert v6.host == "fe80::1"
    assert find_nodes(None, None, env=nodes_environment(v6, 0)) is not None
    with pytest.raises(UsageError, match="--hosts localhost,b"):
        nodes_of_hosts(["localhost", "b"], None)
    assert nodes_of_hosts(["localhost", "b"], "a:1234").port == 1234


def test_what_says_where_is_left_out() -> None:
    """In both ways to write an option."""
    typed = ["run", "x", "--hosts", "a,b", "--ssh=ssh -p 2", "-n", "2", "lr=1", "--nodes", "2"]
    kept = without(typed, ("--hosts", "--ssh", "--nodes"))
    assert kept == ["run", "x", "-n", "2", "lr=1"]
