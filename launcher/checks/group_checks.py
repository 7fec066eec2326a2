"""Findings about a group of ranks: rendezvous, versions, devices, arithmetic and all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.findings import Finding, RankDiagnostics, failure, ok, warning
from launcher.planning.derivations import counted
from launcher.planning.plan import Plan
from launcher.quantities import size

_MAX_PRODUCT_ERROR = {"cpu": 1e-5, "cuda": 1e-2}
"""Error of an fp32 matrix product relative to its largest entry; GPUs may compute it in TF32."""

_MIN_SPEED_SHARE = 0.7
"""A GPU slower than this share of the median slows every step."""

_MIN_BANDWIDTH = 4e9
"""Bytes per second between GPUs; the theoretical bandwidth of PCIe 3.0 x16 is 13e9 (one way)."""

_MIN_FREE_SHARE = 0.9
"""A GPU with a smaller share of its memory free is used by another process."""


def check_group(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    """Yield the findings about a group of ranks.

    Args:
        reports: The diagnostics of each rank, by rank. With several nodes, the findings about a
            node are prefixed with its name.
        plan: The plan of the ranks.
    """
    nodes = list(dict.fromkeys(report.node for report in reports))
    for report in reports:
        for finding in report.node_findings:
            prefix = f"{report.node}: " if len(nodes) > 1 else ""
            yield replace(finding, found=f"{prefix}{finding.found}")
    yield _rendezvous(reports, plan, nodes)
    yield from _versions(reports)
    yield from _devices(reports, plan)
    yield from _cpu_bindings(reports, nodes)
    yield _torchvision(reports)
    yield from _arithmetic(reports, plan)
    if plan.world_size > 1:
        yield from _all_reduce(reports, plan)


def _rendezvous(reports: Sequence[RankDiagnostics], plan: Plan, nodes: Sequence[str]) -> Finding:
    seconds = max(report.rendezvous_seconds for report in reports)
    on_nodes = f" on {counted(len(nodes), 'node')}" if plan.nodes > 1 else ""
    ranks = counted(len(reports), "rank")
    return ok("rendezvous", f"{ranks}{on_nodes} formed a group in {seconds:.1f} s")


def _versions(reports: Sequence[RankDiagnostics]) -> Iterator[Finding]:
    first = reports[0]
    for report in reports[1:]:
        pairs = {
            name: (first.versions.get(name, "missing"), report.versions.get(name, "missing"))
            for name in sorted(first.versions.keys() | report.versions.keys())
        }
        differences = [
            f"{name} {one} and {other}" for name, (one, other) in pairs.items() if one != other
        ]
        if differences:
            yield failure(
                "versions",
                f"rank 0 ({first.node}) and rank {report.rank} ({report.node}) have "
                + ", ".join(differences),
                "install the same environment on every node, or share one between them",
            )
            return
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    yield ok("versions", versions)


def _devices(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    names = [report.device for report in reports]
    kinds = list(dict.fromkeys(names))
    listed = ", ".join(f"{names.count(kind)} x {kind}" for kind in kinds)
    if len(kinds) == 1:
        yield ok("devices", listed)
    else:
        yield warning(
            "devices",
            listed,
            "use devices of one kind: every step waits for the slowest",
        )
    for report in reports:
        if report.device_memory is None:
            continue
        free, total = report.device_memory
        if free < _MIN_FREE_SHARE * total:
            yield warning(
                "GPU memory",
                f"rank {report.rank} ({report.node}): {size(free)} free of {size(total)}",
                "another process uses the rest: `nvidia-smi` lists the processes",
            )
    totals = [report.device_memory[1] for report in reports if report.device_memory]
    if plan.device == "cuda" and totals:
        yield ok("GPU memory", f"at least {size(min(totals))} per rank")


def _cpu_bindings(reports: Sequence[RankDiagnostics], nodes: Sequence[str]) -> Iterator[Finding]:
    """Yield which ranks keep to which CPUs, and those that should and cannot; nothing on CPUs."""
    ranks: dict[str, list[str]] = {}
    for report in reports:
        place = f" ({report.node})" if len(nodes) > 1 else ""
        if report.cpus:
            text = f"on NUMA node {report.numa_node}{place}, CPUs {report.cpus}"
            ranks.setdefault(text, []).append(str(report.rank))
        elif report.numa_node is not None:
            yield warning(
                "CPU binding",
                f"rank {report.rank} ({report.node}) is not bound to a NUMA node: {report.unbound}",
                "give the ranks CPUs of every NUMA node that has GPUs, for example all of a node's "
                "cores in the batch system; numa=off says that this is intended",
            )
        elif report.unbound:
            ranks.setdefault(f"not bound to a NUMA node: {report.unbound}", []).append(
                str(report.rank)
            )
    if ranks:
        listed = (
            f"{'ranks' if len(own) > 1 else 'rank'} {', '.join(own)} {text}"
            for text, own in ranks.items()
        )
        yield ok("CPU binding", "; ".join(listed))


def _torchvision(reports: Sequence[RankDiagnostics]) -> Finding:
    for report in reports:
        if report.torchvision:
            return failure(
                "torchvision",
                f"rank {report.rank} ({report.node}) cannot import it: {report.torchvision}",
                "install the version that matches this torch, from the same index, or remove it: "
                "other packages import torchvision if it is installed",
            )
    return ok("torchvision", "can be imported, or is not installed")


def _arithmetic(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    max_error = _MAX_PRODUCT_ERROR[plan.device]
    wrong = [
        report
        for report in reports
        if report.product_error is None or report.product_error > max_error
    ]
    for report in wrong:
        error = (
            "not finite"
            if report.product_error is None
            else f"off by {report.product_error:.0e} (relative; at most {max_error:.0e} is allowed)"
        )
        yield failure(
            "arithmetic",
            f"rank {report.rank} ({report.node}): a matrix product is {error}",
            "take this device out of service: it would corrupt every run that uses it",
        )
    speeds = sorted(report.flops for report in reports)
    median, slowest = speeds[len(speeds) // 2], min(reports, key=lambda report: report.flops)
    if slowest.flops < _MIN_SPEED_SHARE * median and plan.device == "cuda":
        yield warning(
            "arithmetic",
            f"rank {slowest.rank} ({slowest.node}) computes at {slowest.flops / median:.0%} of "
            "the median of all ranks",
            "check its clocks and temperature (`nvidia-smi -q -d PERFORMANCE`): every step waits "
            "for the slowest",
        )
    elif not wrong:
        speed = f"{slowest.flops / 1e9:,.0f} GFLOP/s"
        yield ok("arithmetic", f"matrix products are correct, at {speed} or more on each rank")


def _all_reduce(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    for report in reports:
        if not report.sums_correct:
            yield failure(
                "all-reduce",
                f"rank {report.rank} ({report.node}) got a wrong sum",
                "check the links (`nvidia-smi topo -m`, `dmesg`); if NCCL_P2P_DISABLE=1 gives the "
                "right sum, the link between the GPUs is at fault",
            )
            return
    latency = max(report.reduce_seconds or 0.0 for report in reports)
    bandwidth = min(report.reduce_bandwidth or 0.0 for report in reports)
    found = f"{latency * 1e6:,.0f} us for 8 bytes, {bandwidth / 1e9:.2g} GB/s for large tensors"
    if plan.device == "cuda" and bandwidth < _MIN_BANDWIDTH:
        yield warning(
            "all-reduce",
            found,
            "averaging gradients will be slow: NCCL_DEBUG=INFO prints the transport in use (P2P, "
            "SHM, NET), and NCCL_SOCKET_IFNAME selects another network",
        )
    else:
        yield ok("all-reduce", found)
