"""The command kubectl, with the context and the namespace of a job."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import KubernetesError
from launcher.json_file import encode_json

_TIMEOUT_SECONDS = 60.0
"""Longest wait for an answer of the cluster."""

_BYTES_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Kubectl:
    """kubectl for one context and namespace."""

    context: str | None
    """The context; None is the current one."""

    namespace: str | None
    """The namespace; None is that of the context."""

    def __call__(self, *arguments: str, objects: Sequence[Mapping[str, Any]] = ()) -> str:
        """Run a command of kubectl; return its standard output.

        Args:
            *arguments: The command and its options.
            objects: Objects that the command reads from standard input.

        Raises:
            KubernetesError: kubectl is missing, or the command fails.
        """
        documents = "\n".join(map(encode_json, objects))
        try:
            done = subprocess.run(
                [*self._command(), *arguments],
                input=documents,
                text=True,
                errors="replace",
                capture_output=True,
                check=False,
                timeout=_TIMEOUT_SECONDS,
            )
        except FileNotFoundError:
            raise _missing() from None
        except subprocess.TimeoutExpired:
            raise KubernetesError(
                f"kubectl did not answer within {_TIMEOUT_SECONDS:g} s. See whether `kubectl get "
                "pods` answers, and try again later."
            ) from None
        if done.returncode:
            raise KubernetesError(f"kubectl {arguments[0]} failed: {error_text(done.stderr)}")
        return done.stdout

    def stream(self, *arguments: str, write: Callable[[bytes], object]) -> int:
        """Run a command of kubectl and pass its output to `write`; return the number of its bytes.

        Raises:
            KubernetesError: kubectl is missing, or the command fails.
        """
        try:
            process = subprocess.Popen(
                [*self._command(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError:
            raise _missing() from None
        num_bytes = 0
        with process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                while content := os.read(process.stdout.fileno(), _BYTES_AT_ONCE):
                    num_bytes += len(content)
                    write(content)
                errors = process.stderr.read().decode(errors="replace")
            finally:
                process.terminate()
        if process.returncode:
            raise KubernetesError(f"kubectl {arguments[0]} failed: {error_text(errors)}")
        return num_bytes

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the objects that `kubectl get` finds.

        Raises:
            KubernetesError: kubectl is missing, or the command fails.
        """
        text = self("get", *arguments, "-o", "json", "--ignore-not-found")
        if not text.strip():
            return []
        answer = json.loads(text)
        return list(answer.get("items", [answer]))

    def create(self, objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Create objects; return them as Kubernetes has them, in the same order.

        Raises:
            KubernetesError: kubectl is missing, or refuses one of them. Others may exist then.
        """
        text = self("create", "-f", "-", "-o", "json", objects=objects)
        decoder, created, position = json.JSONDecoder(), list[dict[str, Any]](), 0
        while position < len(text := text.strip()):  # one document after another
            value, position = decoder.raw_decode(text, position)
            created += value["items"] if value.get("kind") == "List" else [value]
            position += len(text[position:]) - len(text[position:].lstrip())
        return created

    def _command(self) -> list[str]:
        command = ["kubectl"]
        if self.context:
            command.append(f"--context={self.context}")
        if self.namespace:
            command.append(f"--namespace={self.namespace}")
        return command


def current_context(env: Mapping[str, str]) -> str | None:
    """Return the current context of kubectl; None in a pod, where kubectl needs none.

    Raises:
        KubernetesError: kubectl is missing or has no context.
    """
    try:
        return Kubectl(context=None, namespace=None)("config", "current-context").strip()
    except KubernetesError as error:
        if "current-context is not set" not in str(error):
            raise
        if "KUBERNETES_SERVICE_HOST" in env:
            return None
        raise KubernetesError(
            "kubectl has no current context, so it does not know the cluster. Choose one with "
            "`kubectl config use-context NAME`, or set context: in the site profile."
        ) from None


def error_text(text: str) -> str:
    """Return an error message of kubectl as one sentence, without names of programs."""
    lines = [
        re.sub(r"^(?:error|Error from server(?: \(\w+\))?): ", "", line.strip())
        for line in text.splitlines()
        if not line.startswith(("Warning:", "W0", "E0", "I0"))
    ]
    lines = [re.sub(r'^error when (?:creating|retrieving) "[^"]*": ', "", line) for line in lines]
    lines = [re.sub(r"^Error from server(?: \(\w+\))?: ", "", line) for line in lines]
    shown = "; ".join(dict.fromkeys(line.rstrip(".") for line in lines if line))
    return f"{shown or text.strip()[:400]}."


def _missing() -> KubernetesError:
    return KubernetesError(
        "kubectl is not installed here. Install it and choose a context, or write the manifests "
        "with --dry-run and apply them where there is a kubectl."
    )
