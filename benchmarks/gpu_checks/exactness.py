"""Checks that the steps do not depend on the number of GPUs, the strategy or the transport."""

from __future__ import annotations

import json

from gpu_checks.machine import Machine, Verdict
from launcher.engine.probes.parity import compare, read_trace

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
    """Compare the weights of virtual ranks on one rank and on all, to the bit."""
    settings = ("epochs=2", "virtual_ranks=8", "exact=true", "deterministic=true")
    one, others = (
        machine.train("digits", f"bits-{ranks}", *settings, ranks=ranks).model.read_bytes()
        for ranks in (1, machine.ranks)
    )
    return "equal" if one == others else "different", "equal", one == others
