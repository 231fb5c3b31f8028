"""What this machine and a Ray cluster can do: versions, devices, kernels, problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

SHOWN = ("torch", "triton", "transformers", "trl", "ray", "datasets")
MIN_SHARED_MEMORY = 2**30
MIN_DISK = 5 * 2**30


@dataclass(slots=True)
class Findings:
    facts: dict[str, str] = field(default_factory=dict)
    """What there is, in the order to print it."""
    problems: list[str] = field(default_factory=list)
    """What will go wrong, and what to do about it."""


def examine(address: str | None = None) -> Findings:
    """Look at this machine, and at the Ray cluster at `address` if one is given.

    Raises:
        UserError: no cluster answers at `address`.
    """
    findings = Findings()
    _versions(findings)
    _host(findings)
    _devices(findings)
    if address is not None:
        _cluster(findings, address)
    return findings


def _versions(findings: Findings) -> None:
    findings.facts["python"] = f"{platform.python_version()} ({sys.executable})"
    for package in SHOWN:
        findings.facts[package] = _version(package) or "not installed"
    for line in importlib.metadata.requires("sse-rl") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            findings.problems.append(f"{requirement.name} is not installed: pip install -e .")
        elif not requirement.specifier.contains(found, prereleases=True):
            findings.problems.append(
                f"{requirement.name} is {found}, wanted {requirement.specifier}"
            )


def _host(findings: Findings) -> None:
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.facts["cpu"] = f"{cpus} cores, {_gib(memory)} memory"
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < MIN_SHARED_MEMORY:
        free = _gib(shutil.disk_usage(shared).free)
        findings.problems.append(f"/dev/shm has {free} free: Ray's object store will be slow")
    disk = shutil.disk_usage(".").free
    findings.facts["disk"] = f"{_gib(disk)} free here"
    if disk < MIN_DISK:
        findings.problems.append(f"{_gib(disk)} of disk free here: checkpoints may not fit")


def _devices(findings: Findings) -> None:
    import torch

    if not torch.cuda.is_available():
        findings.facts["gpu"] = "none"
        if torch.version.cuda and shutil.which("nvidia-smi"):
            findings.problems.append(
                f"there is a GPU driver but torch (CUDA {torch.version.cuda}) finds no GPU: "
                "is the driver too old for it, or CUDA_VISIBLE_DEVICES empty?"
            )
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        findings.facts[f"gpu {index}"] = (
            f"{device.name}, {_gib(device.total_memory)}, sm_{device.major}{device.minor}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        findings.facts["kernels"] = f"{_serving_form(device)} on {device}"
    except (RuntimeError, ImportError) as error:
        findings.facts["kernels"] = f"none on {device}"
        findings.problems.append(f"the SSE operators fail on {device}: {error}")


def _serving_form(device: str) -> str:
    """`torch` or `triton`: which form of the SSE operators serves a tensor there, found by use."""
    import torch
    from sse_kernels import route, sse_gla

    tokens, heads, width, partitions = 64, 1, 64, 2
    x = torch.randn(tokens, heads, width, device=device)
    routing = route(torch.randn(tokens, partitions, device=device), 1)
    ends = torch.tensor([0, tokens], device=device)
    sse_gla(x, x, x, x, x, -x.abs(), -x.abs(), routing, cu_seqlens=ends)
    used = any(name.startswith("sse_kernels.") and ".triton_" in name for name in sys.modules)
    return "triton" if used else "torch"


def _cluster(findings: Findings, address: str) -> None:
    import ray

    from sse_rl.pipeline.cluster import connect

    connect(address)
    nodes = ray.nodes()
    findings.facts["ray cluster"] = ray.get_runtime_context().gcs_address
    for node in nodes:
        resources = node["Resources"]
        findings.facts[f"  {node['NodeManagerAddress']}"] = (
            f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, "
            f"{_gib(resources.get('memory', 0))} memory" + ("" if node["Alive"] else ", dead")
        )
        if not node["Alive"]:
            findings.problems.append(f"node {node['NodeManagerAddress']} is dead")
    ray.shutdown()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
