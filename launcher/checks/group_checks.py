"""What there is to say of what the ranks of a group found out about themselves and each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.findings import Finding, RankDiagnostics, failure, ok, warning
from launcher.planning.derivations import counted
from launcher.planning.plan import Plan
from launcher.quantities import size

_LARGEST_ERROR = {"cpu": 1e-5, "cuda": 1e-2}
"""Relative to the largest entry of a product, in fp32; on GPUs it may be TF32."""

_SLOWEST = 0.7
"""A GPU that computes at less than this share of the median holds the others up."""

_LEAST_BANDWIDTH = 4e9
"""Bytes a second between GPUs; PCIe 3.0 x16 has 13e9 in theory."""


def judge(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    """Yield what there is to say of what the ranks found."""
    nodes = list(dict.fromkeys(report.node for report in reports))
    for report in reports:
        for finding in report.node_findings:
            named = f"{report.node}: {finding.found}" if len(nodes) > 1 else finding.found
            yield replace(finding, found=named)
    yield _met(reports, plan, nodes)
    yield from _versions(reports)
    yield from _devices(reports, plan)
    yield _torchvision(reports)
    yield from _products(reports, plan)
    if plan.world_size > 1:
        yield from _reduces(reports, plan)


def _met(reports: Sequence[RankDiagnostics], plan: Plan, nodes: Sequence[str]) -> Finding:
    seconds = max(report.meeting_seconds for report in reports)
    where = f" on {counted(len(nodes), 'node')}" if plan.nodes > 1 else ""
    found = f"{counted(len(reports), 'rank')}{where} met in {seconds:.1f} s"
    return ok("rendezvous", found)


def _versions(reports: Sequence[RankDiagnostics]) -> Iterator[Finding]:
    first = reports[0]
    for report in reports[1:]:
        pairs = {
            name: (first.versions.get(name, "missing"), report.versions.get(name, "missing"))
            for name in sorted(first.versions.keys() | report.versions.keys())
        }
        different = [
            f"{name} {one} and {other}" for name, (one, other) in pairs.items() if one != other
        ]
        if different:
            yield failure(
                "versions",
                f"rank 0 ({first.node}) and rank {report.rank} ({report.node}) have "
                + ", ".join(different),
                "install the same environment on every node, or share one",
            )
            return
    found = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    yield ok("versions", found)


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
            "every step waits for the slowest: use one kind",
        )
    for report in reports:
        if report.device_memory is None:
            continue
        free, total = report.device_memory
        if free < 0.9 * total:
            yield warning(
                "GPU memory",
                f"rank {report.rank} ({report.node}): {size(free)} free of {size(total)}",
                "another process holds the rest: `nvidia-smi` lists them",
            )
    totals = [report.device_memory[1] for report in reports if report.device_memory]
    if plan.device == "cuda" and totals:
        yield ok("GPU memory", f"{size(min(totals))} at least")


def _torchvision(reports: Sequence[RankDiagnostics]) -> Finding:
    for report in reports:
        if report.torchvision:
            return failure(
                "torchvision",
                f"rank {report.rank} ({report.node}) cannot import it: {report.torchvision}",
                "install the one that belongs to this torch, from the same index, or remove "
                "it: other packages import it where they find it",
            )
    return ok("torchvision", "loads, or is not installed")


def _products(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    wrong = [
        report
        for report in reports
        if report.product_error is None or report.product_error > _LARGEST_ERROR[plan.device]
    ]
    for report in wrong:
        error = (
            "not finite" if report.product_error is None else f"off by {report.product_error:.0e}"
        )
        yield failure(
            "arithmetic",
            f"rank {report.rank} ({report.node}): a matrix product is {error}",
            "take this device out of service: it would spoil every run that it is part of",
        )
    speeds = sorted(report.flops for report in reports)
    median, slowest = speeds[len(speeds) // 2], min(reports, key=lambda report: report.flops)
    found = f"matrix products are right, at {slowest.flops / 1e9:,.0f} GFLOP/s or more on each rank"
    if slowest.flops < _SLOWEST * median and plan.device == "cuda":
        yield warning(
            "arithmetic",
            f"rank {slowest.rank} ({slowest.node}) computes at {slowest.flops / median:.0%} of "
            "the median of all",
            "every step waits for the slowest: look at its clocks and temperature "
            "(`nvidia-smi -q -d PERFORMANCE`)",
        )
    elif not wrong:
        yield ok("arithmetic", found)


def _reduces(reports: Sequence[RankDiagnostics], plan: Plan) -> Iterator[Finding]:
    for report in reports:
        if not report.sums_right:
            yield failure(
                "all-reduce",
                f"rank {report.rank} ({report.node}) got a wrong sum",
                "look at the links (`nvidia-smi topo -m`, `dmesg`); NCCL_P2P_DISABLE=1 tells "
                "whether it is the one between GPUs",
            )
            return
    latency = max(report.reduce_seconds or 0.0 for report in reports)
    bandwidth = min(report.reduce_bandwidth or 0.0 for report in reports)
    found = f"{latency * 1e6:,.0f} us for 8 bytes, {bandwidth / 1e9:.2g} GB/s for large tensors"
    if plan.device == "cuda" and bandwidth < _LEAST_BANDWIDTH:
        yield warning(
            "all-reduce",
            found,
            "gradients take long to average: NCCL_DEBUG=INFO says which way they go (P2P, "
            "SHM, NET), and NCCL_SOCKET_IFNAME names another network",
        )
    else:
        yield ok("all-reduce", found)
