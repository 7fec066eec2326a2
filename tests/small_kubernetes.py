"""A small Kubernetes for tests: an HTTP server that the real kubectl talks to, and pods.

It has Jobs, Services, Pods and Events in one process. It checks objects against the schema that
Kubernetes publishes, which `kubernetes_schema.json` has a part of. A pod is a process with a host
name of its own and the environment and the command of its container. The Job controller follows
completions, the rules of podFailurePolicy and backoffLimit as the documentation of Kubernetes
describes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema

Object = dict[str, Any]

SCHEMA: Object = json.loads(Path(__file__).with_name("kubernetes_schema.json").read_text())

_KINDS = {"Job": "io.k8s.api.batch.v1.Job", "Service": "io.k8s.api.core.v1.Service"}

_GROUPS = {
    "batch/v1": {"jobs": "Job"},
    "v1": {"services": "Service", "pods": "Pod", "events": "Event"},
}

_START = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def schema_errors(manifest: Object) -> list[str]:
    """Return what the published schema refuses in an object, with the place of each error."""
    reference = {"$ref": f"#/$defs/{_KINDS[manifest['kind']]}", "$defs": SCHEMA["$defs"]}
    validator = jsonschema.Draft202012Validator(reference)
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(manifest)
    ]


@dataclass
class Pod:
    """A pod and its process."""

    index: int
    data: Object
    log: Path
    process: subprocess.Popen[bytes]
    disrupted: bool = False
    """Whether Kubernetes itself stopped it."""

    counted: bool = False
    """Whether the Job controller has seen its end."""

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None


@dataclass
class SmallKubernetes:
    """A cluster with one namespace, in which pods are processes of this machine."""

    folder: Path
    environment: dict[str, str]
    """What an image would give the containers."""

    refused: dict[str, str] = field(default_factory=dict)
    """Messages with which objects of a kind are refused."""

    refused_at_last: dict[str, str] = field(default_factory=dict)
    """The same for objects that were accepted in a dry run."""

    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    """Jobs, Services and Events by plural and name."""

    pods: list[Pod] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of each request that changes something or asks for a log."""

    runs_pods: bool = True
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> SmallKubernetes:
        cluster = self

        class Handler(_Handler):
            kubernetes = cluster

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        threading.Thread(target=self._control, daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "small",
            "clusters": [{"name": "small", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "small", "context": {"cluster": "small", "user": "me"}}],
        }
        self.config = self.folder / "kubeconfig"
        self.config.write_text(json.dumps(config))
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        for pod in self.pods:
            if pod.is_running:
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()

    def evict(self, index: int) -> None:
        """Evict the running pod with an index, as a drain of its node does."""
        with self._lock:
            (pod,) = [pod for pod in self.pods if pod.index == index and pod.is_running]
            pod.disrupted = True
            pod.process.terminate()

    def warn(self, name: str, message: str) -> None:
        """Record a warning about a job, as the Job controller does."""
        event = {"kind": "Event", "apiVersion": "v1", "metadata": {"name": f"{name}.warning"}}
        about = {"involvedObject": {"kind": "Job", "name": name}, "type": "Warning"}
        self.objects["events", f"{name}.warning"] = {**event, **about, "message": message}

    def create(self, plural: str, manifest: Object, *, dry: bool) -> tuple[int, Object]:
        """Create an object; return the status of HTTP and the answer."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if errors := schema_errors(manifest):
            return 422, _failure(f"{kind} {name!r} is invalid: {'; '.join(errors)}", "Invalid", 422)
        if refusal := self.refused.get(kind) or (not dry and self.refused_at_last.get(kind)):
            return 403, _failure(refusal, "Forbidden", 403)
        with self._lock:
            if (plural, name) in self.objects:
                message = f"{plural} {name!r} already exists"
                return 409, _failure(message, "AlreadyExists", 409)
            made = {**manifest, "metadata": {**manifest["metadata"], "uid": str(uuid.uuid4())}}
            made.setdefault("status", {})
            if not dry:
                self.objects[plural, name] = made
        return 201, made

    def delete(self, plural: str, name: str) -> tuple[int, Object]:
        """Delete an object, what belongs to it, and the pods of a Job."""
        with self._lock:
            gone = self.objects.pop((plural, name), None)
            if gone is None:
                return 404, _failure(f"{plural} {name!r} not found", "NotFound", 404)
            for key, other in list(self.objects.items()):
                owners = other["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    del self.objects[key]
            if plural == "jobs":
                for pod in self.pods:
                    if pod.is_running:
                        pod.process.terminate()
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def list(self, plural: str, query: dict[str, str]) -> list[Object]:
        """Return the objects that a query selects."""
        with self._lock:
            if plural == "pods":
                found = [self._seen(pod) for pod in self.pods]
            else:
                found = [each for (kind, _), each in self.objects.items() if kind == plural]
        wanted = dict(
            pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair
        )
        return [
            each for each in found if wanted.items() <= each["metadata"].get("labels", {}).items()
        ]

    def _seen(self, pod: Pod) -> Object:
        """Return a pod with its present status."""
        code = pod.process.poll()
        status: Object = {"phase": "Running"}
        if code is not None:
            ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error"}
            state = {"name": "launcher", "state": {"terminated": ended}}
            status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [state]}
        return {**pod.data, "status": status}

    def _control(self) -> None:
        while not self._ended.wait(0.05):
            with self._lock:
                for (plural, _), job in list(self.objects.items()):
                    if plural == "jobs" and self.runs_pods and not job["status"]:
                        self._control_job(job)

    def _control_job(self, job: Object) -> None:
        """Start the pods that a Job lacks, and judge those that have ended."""
        spec, name = job["spec"], job["metadata"]["name"]
        self._publish_names(job)
        pods = [pod for pod in self.pods if pod.data["metadata"]["labels"]["job-name"] == name]
        for pod in pods:
            if not pod.is_running and not pod.counted:
                pod.counted = True
                self._judge(job, pod)
        done = {pod.index for pod in pods if pod.process.poll() == 0}
        if len(done) == spec["completions"]:
            job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
        if job["status"]:
            for pod in pods:
                if pod.is_running:
                    pod.process.terminate()
            return
        for index in set(range(spec["completions"])) - done:
            if not any(pod.index == index and pod.is_running for pod in pods):
                self._start(job, index)

    def _judge(self, job: Object, pod: Pod) -> None:
        """Apply podFailurePolicy and backoffLimit to a pod that has ended."""
        code = pod.process.returncode
        if code == 0:
            return
        action = "Count"
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if (codes and code in codes["values"]) or (not codes and pod.disrupted):
                action = rule["action"]
                break
        failures = job.setdefault("_failures", 0) + (action == "Count")
        job["_failures"] = failures
        if action == "FailJob" or failures > job["spec"]["backoffLimit"]:
            reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
            condition = {"type": "Failed", "status": "True", "reason": reason}
            job["status"] = {"conditions": [condition]}

    def _publish_names(self, job: Object) -> Path:
        """Write the names of the pods of a Job that can be looked up; return the file."""
        name, domain = job["metadata"]["name"], job["spec"]["template"]["spec"].get("subdomain", "")
        pods = [f"{name}-{each}" for each in range(job["spec"]["completions"])]
        if ("services", domain) in self.objects:
            pods += [f"{pod}.{domain}" for pod in pods]
        hosts = self.folder / f"hosts-{name}"
        text = f"127.0.0.1 localhost {' '.join(pods)}\n"
        if not hosts.exists() or hosts.read_text() != text:
            hosts.write_text(text)
        return hosts

    def _start(self, job: Object, index: int) -> None:
        """Start the process of a pod with what Kubernetes would give its container."""
        template, name = job["spec"]["template"], job["metadata"]["name"]
        hostname = f"{name}-{index}"
        hosts = self._publish_names(job)
        (container,) = template["spec"]["containers"]
        env = {each["name"]: _unescaped(each["value"]) for each in container["env"]}
        pod_name = f"{hostname}-{uuid.uuid4().hex[:5]}"
        log = self.folder / f"{pod_name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--uts", "sh", "-c", _START, hostname, str(hosts)),
                    *map(_unescaped, container["command"]),
                ],
                cwd=container["workingDir"],
                env={**self.environment, **env, "JOB_COMPLETION_INDEX": str(index)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        own_labels = {"job-name": name, "batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {
            "name": pod_name,
            "namespace": job["metadata"].get("namespace", "default"),
            "labels": {**template["metadata"]["labels"], **own_labels},
            "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        spec = {**template["spec"], "nodeName": f"machine{index}"}
        data = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        self.pods.append(Pod(index, data, log, process))


class _Handler(BaseHTTPRequestHandler):
    """The part of Kubernetes' HTTP interface that kubectl needs for these objects."""

    kubernetes: SmallKubernetes
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's
        del format, args

    def do_GET(self) -> None:
        path, query = self._target()
        if (answer := _discovery(path)) is not None:
            self._answer(200, answer)
            return
        match = re.fullmatch(r"/.*/namespaces/\w+/(\w+)(?:/([\w.-]+))?(/log)?", path)
        if match is None:
            self._answer(404, _failure(f"{path} not found", "NotFound", 404))
            return
        plural, name, is_log = match.groups()
        found = self.kubernetes.list(plural, query)
        if is_log:
            self.kubernetes.requests.append(f"LOG {name}")
            self._send_log(str(name), follow=query.get("follow") == "true")
        elif name is None:
            kind = next(kinds[plural] for kinds in _GROUPS.values() if plural in kinds)
            version = next(each for each, kinds in _GROUPS.items() if plural in kinds)
            self._answer(200, {"kind": f"{kind}List", "apiVersion": version, "items": found})
        else:
            named = [each for each in found if each["metadata"]["name"] == name]
            missing = _failure(f"{plural} {name!r} not found", "NotFound", 404)
            self._answer(200 if named else 404, named[0] if named else missing)

    def do_POST(self) -> None:
        path, query = self._target()
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        dry = "dryRun" in query
        self.kubernetes.requests.append(f"{'DRY ' if dry else ''}POST {manifest['kind']}")
        self._answer(*self.kubernetes.create(path.rpartition("/")[2], manifest, dry=dry))

    def do_DELETE(self) -> None:
        path, _ = self._target()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        *_, plural, name = path.split("/")
        self.kubernetes.requests.append(f"DELETE {plural}")
        self._answer(*self.kubernetes.delete(plural, name))

    def _target(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return parts.path, dict(urllib.parse.parse_qsl(parts.query))

    def _answer(self, status: int, value: Object) -> None:
        content = json.dumps({k: v for k, v in value.items() if k != "_failures"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_log(self, name: str, *, follow: bool) -> None:
        pod = next(each for each in self.kubernetes.pods if each.data["metadata"]["name"] == name)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with pod.log.open("rb") as file, contextlib.suppress(OSError):
            while True:
                was_running = pod.is_running
                self.wfile.write(file.read())
                if not (follow and was_running):
                    return
                time.sleep(0.05)


def _discovery(path: str) -> Object | None:
    """Return the answer to a question about what the server has; None for other paths."""
    batch = {"groupVersion": "batch/v1", "version": "v1"}
    group = {"name": "batch", "versions": [batch], "preferredVersion": batch}
    roots: dict[str, Object] = {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "/api": {"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]},
    }
    if path in roots:
        return roots[path]
    version_paths = {"/api/v1": "v1", "/apis/batch/v1": "batch/v1"}
    if path == "/openapi/v3":
        urls = {each[1:]: {"serverRelativeURL": f"/openapi/v3{each}"} for each in version_paths}
        return {"paths": urls}
    if (version_name := version_paths.get(path.removeprefix("/openapi/v3"))) is None:
        return None
    kinds = _GROUPS[version_name]
    group_name, _, short = version_name.rpartition("/")
    if path.startswith("/openapi"):
        parameters = [{"name": name, "in": "query"} for name in ("dryRun", "fieldValidation")]
        gvk = {"group": group_name, "version": short}
        paths: Object = {
            f"{path.removeprefix('/openapi/v3')}/namespaces/{{namespace}}/{plural}/{{name}}": {
                "patch": {
                    "parameters": parameters,
                    "x-kubernetes-group-version-kind": gvk | {"kind": kind},
                }
            }
            for plural, kind in kinds.items()
        }
        return {"openapi": "3.0.0", "info": {"title": "k", "version": "v1"}, "paths": paths}
    verbs = ["create", "delete", "get", "list", "patch"]
    resources = [
        {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}
        for plural, kind in kinds.items()
    ]
    return {"kind": "APIResourceList", "groupVersion": version_name, "resources": resources}


def _failure(message: str, reason: str, code: int) -> Object:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return {**status, "message": message, "reason": reason, "code": code}


def _unescaped(text: str) -> str:
    return text.replace("$$(", "$(")
