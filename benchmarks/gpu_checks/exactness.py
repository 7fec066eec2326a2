"""Checks that the steps do not depend on the number of GPUs, the strategy or the transport."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_checks.machine import Machine, Verdict
from launcher.engine.probes.parity import compare, read_trace

PARTS = Path(__file__).parents[1] / "parts.py"
STRATEGIES = "ddp,fsdp,zero1,zero2,zero3"
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of losses and weights after 24 steps that counts as rounding."""


def worlds(machine: Machine) -> str:
    """Return powers of two up to the number of ranks, as `launcher prove` takes them."""
    powers = [1 << exponent for exponent in range(machine.ranks.bit_length())]
    return ",".join(map(str, sorted({*powers, machine.ranks})))


def same_steps(machine: Machine, precision: str) -> Verdict:
    """Compare the steps of digits on every number of GPUs under every strategy."""
    tolerance = TOLERANCES[precision]
    printed = machine.launcher(
        *("prove", "digits", "--worlds", worlds(machine), "--strategies", STRATEGIES),
        *("--steps", "24", "--tolerance", str(tolerance), "--json"),
        *("--out", f"prove-{precision}", f"precision={precision}", f"device={machine.device}"),
        ok=(0, 1),
    )
    proof = json.loads(printed)
    largest = max(row.get("weights") or 0.0 for row in proof["rows"])
    return f"weights differ by {largest:.1e}", f"at most {tolerance:g}", bool(proof["agree"])


def same_as_gloo(machine: Machine) -> Verdict:
    """Compare a run over NCCL with one on CPU ranks over gloo."""
    settings = ("epochs=2", "record_samples=true")
    on_devices = machine.train("digits", "nccl", *settings)
    on_cpus = Machine("cpu", machine.ranks, machine.folder).train("digits", "gloo", *settings)
    difference = compare(read_trace(on_cpus), read_trace(on_devices), TOLERANCES["fp32"])
    text = f"losses differ by {difference.loss:.1e}"
    return text, f"at most {TOLERANCES['fp32']:g}", difference.agrees


def same_bits(machine: Machine) -> Verdict:
    """Compare the bits of a net with BatchNorm and dropout on every number of devices."""
    virtual_ranks = max(8, machine.ranks)
    printed = machine.launcher(
        *("prove", f"{PARTS}:norms", "--worlds", worlds(machine), "--strategies", "ddp,fsdp"),
        *("--steps", "30", "--json", "--out", "bits", f"virtual_ranks={virtual_ranks}"),
        f"device={machine.device}",
        ok=(0, 1),
    )
    digests = {row["weights_sha256"] for row in json.loads(printed)["rows"]}
    return f"{len(digests)} SHA-256 of the weights", "1", len(digests) == 1
