"""Jobs in Kubernetes: manifests as text, and runs on a small Kubernetes by the real kubectl.

`pytest --update-golden tests/integration/test_kubernetes.py` rewrites the golden manifests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_kubernetes import SmallKubernetes, schema_errors
from support import BIN, ROOT, Commands, has_rows, wait_until

from launcher.environment.nodes import NodesRequest, find_nodes
from launcher.errors import KubernetesError, UsageError, WorldError
from launcher.kubernetes.cluster import Cluster, find_cluster, read_cluster, read_quantity
from launcher.kubernetes.kubernetes_scheduler import job_name, prepare_pods
from launcher.kubernetes.manifests import manifests, render_manifests
from launcher.kubernetes.pod import PodJob
from launcher.recipe.resolve import resolve
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir
from launcher.schedulers.request import SubmitRequest

WORLDS_PY = ROOT / "tests/recipes/worlds.py"

GOLDEN = ROOT / "tests/golden/kubernetes"

EXAMPLE = read_cluster(ROOT / "kubernetes/example.yaml")

PLAIN = PodJob(
    name="digits",
    nodes=2,
    gpus_per_node=8,
    cpus_per_node=40,
    memory_per_node=None,
    seconds=None,
    command=["launcher", "run", "recipes/digits.py:digits", "lr=0.2"],
    cluster=Cluster(image="train:1.0"),
)

FOR_TRAINER = replace(
    EXAMPLE,
    kind="trainjob",
    secrets=(),
    image_pull_policy=None,
    priority_class=None,
    annotations={},
    keep_seconds=None,
    max_restarts=0,
)

JOBS = {
    "plain": PLAIN,
    "one-node": replace(PLAIN, nodes=1),
    "site": replace(PLAIN, cluster=EXAMPLE, memory_per_node=960 * 2**30, seconds=7200),
    "array": replace(PLAIN, name="grid-1", array="grid", nodes=1),
    "jobset": replace(PLAIN, cluster=replace(EXAMPLE, kind="jobset"), seconds=7200),
    "trainjob": replace(PLAIN, cluster=FOR_TRAINER, seconds=7200),
}


@pytest.mark.parametrize("name", JOBS)
def test_manifests_equal_their_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    """Rendered manifests equal their golden file, and YAML reads them as they were."""
    path = GOLDEN / f"{name}.yaml"
    objects = manifests(JOBS[name])
    text = render_manifests(objects)
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    assert list(yaml.safe_load_all(text)) == objects


def jobs_in(manifest: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects whose schema Kubernetes publishes, also from inside a JobSet."""
    if manifest["kind"] in ("Job", "Service"):
        yield manifest
    for replicated in manifest["spec"].get("replicatedJobs", []):
        yield {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}


@pytest.mark.parametrize("name", [name for name in JOBS if name != "trainjob"])
def test_manifests_fit_the_published_schema(name: str) -> None:
    """Kubernetes' own schema accepts every Job and Service, and refuses a misspelt field."""
    for manifest in manifests(JOBS[name]):
        for each in jobs_in(manifest):
            assert schema_errors(each) == []
            each["spec"]["paralelism"] = 2
            assert len(schema_errors(each)) == 1


def test_jobsets_and_trainjobs_fit_the_models_of_kubeflow() -> None:
    """The classes that Kubeflow publishes read a JobSet and a TrainJob and lose nothing of them."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kinds = {"jobset": models.JobsetV1alpha2JobSet, "trainjob": models.TrainerV1alpha1TrainJob}
    for name, model in kinds.items():
        (manifest,) = manifests(JOBS[name])
        assert model.from_dict(manifest).to_dict() == manifest


def test_secrets_are_named_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests refer to secrets, and have no variable of the submitting user's environment."""
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    for job in JOBS.values():
        assert "hunter2" not in render_manifests(manifests(job))
    container = manifests(JOBS["site"])[0]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}} in (
        container["env"]
    )
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]


def test_words_reach_the_container_unchanged() -> None:
    """Kubernetes would replace $(NAME) in commands and variables, so it is escaped."""
    job = replace(
        PLAIN,
        command=["launcher", "run", "digits", "tag=$(HOME)"],
        cluster=Cluster(image="i", env={"A": "$(B)"}),
    )
    container = manifests(job)[0]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][3] == "tag=$$(HOME)"
    assert container["env"][1] == {"name": "A", "value": "$$(B)"}


REQUEST = SubmitRequest(
    reference=resolve("digits"),
    arguments=("num_workers=4",),
    grid=(),
    config=None,
    nodes=(2, 2),
    gpus_per_node=4,
    nproc_per_node=None,
    time=None,
)


def test_resources_follow_from_plan_and_profile(tmp_path: Path) -> None:
    """A pod asks for a core per rank and worker, its share of memory, GPUs and the site's time."""
    (job,) = prepare_pods(REQUEST, EXAMPLE, tmp_path / "Out_1").jobs
    assert (job.name, job.nodes, job.gpus_per_node, job.cpus_per_node) == ("out-1", 2, 4, 20)
    assert (job.memory_per_node, job.seconds) == (480 * 2**30, 43_200)
    assert job.full_command == [
        *("launcher", "run", "launcher.recipes.digits:digits", "-n", "4"),
        *("--out", "/runs/out-1", "--continue", "device=cuda", "num_workers=4"),
        *("--nodes", "2", "--rendezvous", "out-1-0.out-1:29400", "--join-timeout", "3600"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus_per_node": 9}, "--gpus-per-node 9 exceeds the 8 GPUs"),
        ({"time": "8-0"}, "--time 8-0 exceeds the longest time of the site, 7-00:00:00"),
        ({"arguments": ("num_workers=40",)}, "need 164 cores, and a node has 96"),
        ({"nodes": (2, 4)}, "--nodes 2:4: a Job has a fixed number of pods"),
        ({"reference": resolve(str(ROOT / "tests/recipes/worlds.py"))}, "outside the working fold"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what was asked for and what the site has."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        prepare_pods(replace(REQUEST, **changes), EXAMPLE, tmp_path / "out")
    assert message in str(caught.value)


def test_an_array_is_a_job_for_each_run(tmp_path: Path) -> None:
    """Each run of an array has a job, a run folder and its settings, and all have one label."""
    grid = (("lr=0.1", "seed=1"), ("lr=0.2", "seed=1"))
    prepared = prepare_pods(replace(REQUEST, grid=grid), EXAMPLE, tmp_path / "grid")
    assert [job.name for job in prepared.jobs] == ["grid-0", "grid-1"]
    assert [run_dir.path for run_dir in prepared.folders] == [
        *(tmp_path / "grid/0", tmp_path / "grid/1")
    ]
    for index, job in enumerate(prepared.jobs):
        command = list(job.command)
        assert command[command.index("--out") + 1] == f"/runs/grid/{index}"
        assert command[-3:] == ["num_workers=4", *grid[index]]
        assert job.first_host == f"grid-{index}-0.grid-{index}"
        assert job.labels["app.kubernetes.io/part-of"] == "grid"
    kinds = [each["kind"] for each in yaml.safe_load_all(prepared.text)]
    assert kinds == ["Job", "Service", "Job", "Service"]
    with pytest.raises(KubernetesError, match="at most 43 letters"):
        prepare_pods(replace(REQUEST, grid=grid), EXAMPLE, tmp_path / ("a" * 44))


@pytest.mark.parametrize("name", ["1st", "größe" * 12, "a" * 46, "---"])
def test_a_folder_that_gives_no_name_is_refused(name: str) -> None:
    """The name of a job is a DNS label that begins with a letter and is short enough."""
    with pytest.raises(KubernetesError, match="Give another --out"):
        job_name(Path("runs", name))
    assert job_name(Path("runs/Größe_2")) == "gr-e-2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imge: a", "unknown key 'imge' in the site profile. Did you mean image or time?"),
        ("kind: job", "the site profile needs image"),
        ("image: a\nkind: cronjob", "kind: expected job or jobset or trainjob"),
        ("image: a\nnamespace: My_Team", "namespace: expected a name of lower-case letters"),
        ("image: a\nvolumes: [runs]", "volumes: expected CLAIM:/FOLDER"),
        ("image: a\nsecret_env: {A: token}", "secret_env: expected SECRET/KEY"),
        ("image: a\ntolerations: ['gpu:Never']", "tolerations: expected KEY=VALUE:EFFECT"),
        ("image: a\nmemory_per_node: lots", "expected a size such as 480Gi; found 'lots'"),
        ("image: a\nenv: {a-b: c}", "env: 'a-b' is not a valid name"),
        ("image: a\ntime: soon", "time: expected a time such as 90"),
        ("image: a\nruns: here", "runs: expected an absolute path"),
        ("image: a\nkind: trainjob\nsecrets: [a]", "secrets: a trainjob takes this from its"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file and what was expected."""
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(KubernetesError) as caught:
        read_cluster(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_profile_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile is found in kubernetes/, in the user's folder or by path, and one is needed."""
    monkeypatch.chdir(tmp_path)
    env = {"HOME": str(tmp_path)}
    home = tmp_path / ".config/launcher/kubernetes"
    home.mkdir(parents=True)
    (home / "lab.yaml").write_text("image: theirs")
    assert find_cluster("lab", env).image == "theirs"
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes/lab.yaml").write_text("image: ours")
    assert find_cluster(None, env | {"LAUNCHER_KUBERNETES_CLUSTER": "lab"}).image == "ours"
    with pytest.raises(KubernetesError, match=r"--cluster lub: .* Did you mean lab"):
        find_cluster("lub", env)
    with pytest.raises(KubernetesError, match="needs a site profile"):
        find_cluster(None, env)


def test_quantities_are_read_as_kubernetes_reads_them() -> None:
    """Sizes have binary and decimal suffixes."""
    texts = ("480Gi", "1.5Gi", "2T", "1024")
    assert [read_quantity(text, "x") for text in texts] == [
        *(480 * 2**30, 3 * 2**29, 2 * 10**12, 1024)
    ]


def test_a_pod_has_the_index_that_kubernetes_gives_it() -> None:
    """JOB_COMPLETION_INDEX is the index of the node, and one that does not fit is refused."""
    nodes = find_nodes(
        NodesRequest(count=(2, 2), rendezvous="a-0.a"), env={"JOB_COMPLETION_INDEX": "1"}
    )
    assert nodes is not None
    assert (nodes.index, nodes.host, nodes.names) == (1, "a-0.a", ())
    with pytest.raises(WorldError, match="JOB_COMPLETION_INDEX=2"):
        find_nodes(
            NodesRequest(count=(2, 2), rendezvous="a-0.a"), env={"JOB_COMPLETION_INDEX": "2"}
        )


def _has_kubectl() -> bool:
    """Return whether kubectl reads the OpenAPI of version 3, which the small Kubernetes has."""
    if shutil.which("kubectl") is None:
        return False
    command = ["kubectl", "version", "--client", "--output=json"]
    done = subprocess.run(command, capture_output=True, check=False)
    version = json.loads(done.stdout or "{}").get("clientVersion", {}).get("minor", "0")
    return done.returncode == 0 and int(version.rstrip("+")) >= 27


needs_kubectl = pytest.mark.skipif(
    not _has_kubectl(),
    reason="needs kubectl 1.27 or newer, and Debian's package kubernetes-client is older",
)


def _can_isolate() -> bool:
    command = ["unshare", "--mount", "--uts", "true"]
    return os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0


@pytest.fixture
def kubernetes(run: Commands, tmp_path: Path) -> Iterator[SmallKubernetes]:
    """Return a small Kubernetes that the commands' kubectl talks to."""
    profile = {
        "image": "train:1.0",
        "program": [str(BIN / "launcher")],
        "folder": str(run.folder),
        "runs": str(run.folder / "shared"),
    }
    (run.folder / "site.yaml").write_text(json.dumps(profile))
    shutil.copy(WORLDS_PY, run.folder / "mine.py")
    (run.folder / "shared").mkdir()
    with SmallKubernetes(tmp_path, run.environment()) as cluster:
        yield cluster


OPTIONS = ("--to", "kubernetes", "--cluster", "site.yaml")


@needs_kubectl
@pytest.mark.skipif(not _can_isolate(), reason="needs root, for host names of pods")
def test_a_run_on_two_pods(run: Commands, kubernetes: SmallKubernetes) -> None:
    """A run meets by the names of its pods, continues after an eviction, and is cancelled."""
    env = {"KUBECONFIG": str(kubernetes.config)}
    settings = ("epochs=400", "-n", "1", "--nodes", "2", "device=cpu")
    done = run(
        "launcher", "submit", "mine.py:worlds", *settings, *OPTIONS, "--out", "pair", env=env
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "job pair\nrun folder: pair\n"
    run_dir = RunDir(run.folder / "shared/pair")
    wait_until(lambda: has_rows(run_dir, 3))
    done = run("launcher", "status", "pair", env=env)
    assert "running on machine0, machine1" in done.stdout
    kubernetes.evict(1)
    wait_until(lambda: len(kubernetes.pods) == 4)
    assert [pod.process.wait(30) for pod in kubernetes.pods[:2]] == [75, 75]
    (checkpoint, *_) = list_checkpoints(run_dir)
    wait_until(lambda: has_rows(run_dir, checkpoint.step + 2))
    done = run("launcher", "status", "--json", env=env)
    (status,) = json.loads(done.stdout)
    assert (status["state"], status["scheduler"]) == ("running", "kubernetes")
    assert "started again 1 time" in status["words"]
    done = run("launcher", "logs", "pair", env=env)
    assert "2 = 2 nodes x 1 CPU rank" in done.stdout
    done = run("launcher", "cancel", "pair", env=env)
    assert done.stdout == "pair: job pair is cancelled\n"
    assert [pod.process.wait(30) for pod in kubernetes.pods[2:]] == [75, 75]
    assert kubernetes.objects == {}, "the Service belongs to the Job"
    done = run("launcher", "status", "pair", "--json", env=env)
    assert json.loads(done.stdout)["state"] == "unknown"


@needs_kubectl
@pytest.mark.skipif(not _can_isolate(), reason="needs root, for host names of pods")
def test_a_mistake_of_the_user_ends_the_job(run: Commands, kubernetes: SmallKubernetes) -> None:
    """A setting that only the pods find wrong fails the job at once, and the log shows it."""
    env = {"KUBECONFIG": str(kubernetes.config)}
    (run.folder / "mine.py").write_text(
        WORLDS_PY.read_text() + "\nimport os\n\nif 'JOB_COMPLETION_INDEX' in os.environ:\n"
        "    raise SystemExit(2)\n"
    )
    options = ("-n", "1", "device=cpu", *OPTIONS, "--out", "wrong")
    assert run("launcher", "submit", "mine.py:worlds", *options, env=env).exit_code == 0
    wait_until(lambda: kubernetes.objects["jobs", "wrong"]["status"])
    assert len(kubernetes.pods) == 1
    done = run("launcher", "status", "wrong", env=env)
    assert "failed with exit code 2 on pod 0" in done.stdout
    done = run("launcher", "logs", "wrong", "-f", env=env)
    assert done.exit_code == 0
    assert "mine.py" in done.stdout


@needs_kubectl
def test_nothing_is_half_submitted(run: Commands, kubernetes: SmallKubernetes) -> None:
    """A job that is refused, wholly or in part, is one error and leaves nothing behind."""
    env = {"KUBECONFIG": str(kubernetes.config)}
    kubernetes.runs_pods = False
    command = (
        "launcher",
        "submit",
        "mine.py:worlds",
        "-n",
        "1",
        "device=cpu",
        "--nodes",
        "2",
        *OPTIONS,
    )
    kubernetes.refused["Service"] = "exceeded quota: services=0"
    done = run(*command, "--out", "first", env=env)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "exceeded quota: services=0" in done.stderr
    assert kubernetes.requests == ["DRY POST Job", "DRY POST Service"]
    assert kubernetes.objects == {}
    assert not (run.folder / "first").exists()
    kubernetes.refused.clear()
    kubernetes.refused_at_last["Service"] = "exceeded quota: services=1"
    done = run(*command, "--out", "first", env=env)
    assert done.exit_code == 2
    assert kubernetes.requests[-3:] == ["POST Job", "POST Service", "DELETE jobs"]
    assert kubernetes.objects == {}
    kubernetes.refused_at_last.clear()
    assert run(*command, "--out", "first", env=env).exit_code == 0
    assert kubernetes.objects.keys() == {("jobs", "first"), ("services", "first")}
    shutil.rmtree(run.folder / "first")
    done = run(*command, "--out", "first", env=env)
    assert done.exit_code == 2
    assert "already exists" in done.stderr
    assert kubernetes.objects.keys() == {("jobs", "first"), ("services", "first")}
    done = run(*command, "--out", "second", "--dry-run", env=env)
    assert done.exit_code == 0
    assert "job.batch/second created (server dry run)" in done.stderr
    assert [each["kind"] for each in yaml.safe_load_all(done.stdout)] == ["Job", "Service"]


@needs_kubectl
def test_a_waiting_job_says_what_it_waits_for(run: Commands, kubernetes: SmallKubernetes) -> None:
    """The status shows the last warning about a job that has no pods."""
    env = {"KUBECONFIG": str(kubernetes.config)}
    kubernetes.runs_pods = False
    options = ("-n", "1", "device=cpu", *OPTIONS, "--out", "waits")
    assert run("launcher", "submit", "mine.py:worlds", *options, env=env).exit_code == 0
    kubernetes.warn("waits", "exceeded quota: gpus")
    done = run("launcher", "status", "waits", env=env)
    assert "waiting, 0 of 1 pods are running: exceeded quota: gpus" in done.stdout
    done = run("launcher", "logs", "waits", env=env)
    assert done.exit_code == 2
    assert "waits has printed nothing yet: waiting" in done.stderr


@needs_kubectl
def test_an_array_is_submitted_wholly_or_not(run: Commands, kubernetes: SmallKubernetes) -> None:
    """An array that is refused at its last object leaves no job; status and cancel take all."""
    env = {"KUBECONFIG": str(kubernetes.config)}
    kubernetes.runs_pods = False
    command = (
        *("launcher", "submit", "mine.py:worlds", "-n", "1", "--nodes", "2", "device=cpu"),
        *(*OPTIONS, "--out", "grid", "--array", "lr=0.1,0.2", "seed=1,2"),
    )
    kubernetes.refused_at_last["Service"] = "exceeded quota: services=3"
    done = run(*command, env=env)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "exceeded quota: services=3" in done.stderr
    assert kubernetes.requests.count("DELETE jobs") == 4
    assert kubernetes.objects == {}
    assert not (run.folder / "grid").exists()
    kubernetes.refused_at_last.clear()
    done = run(*command, env=env)
    assert done.stdout == "job grid, an array of 4\nrun folder: grid\n", done.stderr
    names = [f"grid-{index}" for index in range(4)]
    assert {name for plural, name in kubernetes.objects if plural == "jobs"} == set(names)
    kubernetes.warn("grid-2", "exceeded quota: gpus")
    done = run("launcher", "status", "grid", "--json", env=env)
    rows = {row["job"]: row for row in json.loads(done.stdout)}
    assert {row["state"] for row in rows.values()} == {"waiting"}
    assert rows["grid-1"]["settings"] == ["lr=0.1", "seed=2"]
    assert ["gpus" in rows[name]["words"] for name in names] == [False, False, True, False]
    assert run("launcher", "cancel", "grid", env=env).exit_code == 0
    assert {plural for plural, _ in kubernetes.objects} == {"events"}


@needs_kubectl
def test_a_missing_context_is_one_error(run: Commands, kubernetes: SmallKubernetes) -> None:
    """Without a context, submission says how to choose one, and --dry-run still prints the job."""
    kubernetes.config.write_text("{}")
    env = {"KUBECONFIG": str(kubernetes.config)}
    command = (
        "launcher",
        "submit",
        "mine.py:worlds",
        "-n",
        "1",
        "device=cpu",
        *OPTIONS,
        "--out",
        "out",
    )
    done = run(*command, env=env)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "kubectl config use-context" in done.stderr
    assert not (run.folder / "out").exists()
    done = run(*command, "--dry-run", env=env)
    assert done.exit_code == 0
    assert "kind: Job" in done.stdout


def test_a_missing_kubectl_is_one_error(run: Commands, kubernetes: SmallKubernetes) -> None:
    """Without kubectl, submission is one error that leaves nothing behind."""
    (run.folder / "bin").mkdir()
    for name in ("python", "launcher"):
        (run.folder / "bin" / name).symlink_to(BIN / name)
    line = f"PATH={run.folder}/bin exec launcher submit mine.py:worlds -n 1 device=cpu $@ --out out"
    done = run("bash", "-c", line, "bash", *OPTIONS)
    assert done.exit_code == 2
    assert "kubectl is not installed here" in done.stderr
    assert not (run.folder / "out").exists()
    assert kubernetes.requests == []
