"""Joining or starting a Ray cluster, asking it only for what it has, and waiting with a limit."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import ray.exceptions
import torch

from sse_rl.errors import RunError, UserError
from sse_rl.recipe import Cluster, Recipe

LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
POLL_S = 0.2
KEEP_FREED_MEMORY = {
    "env_vars": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
}
"""A runtime environment for actors that compute on CPU: glibc then reuses large buffers instead of
asking the kernel for fresh pages each time, which halves the time of a small decode step."""


def on_learner(kind: type, resources: Cluster) -> Any:
    """An actor class on the learner's share of the cluster; `.remote(...)` starts one."""
    return ray.remote(kind).options(
        num_cpus=resources.learner_cpus,
        num_gpus=resources.learner_gpus,
        runtime_env=KEEP_FREED_MEMORY,
    )


def connect(address: str) -> None:
    """Join `address` (a host:port, or `auto`: RAY_ADDRESS or a running cluster, else local), or
    start a cluster of this machine alone (`local`). Code travels with the job, so that nodes need
    our dependencies but not our packages. A second call in one process changes nothing.

    Raises UserError if no cluster answers at an address that was given.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    given = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    if address == "local" or given == "local":
        _start_local()
        return
    try:
        _join(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if given is None and isinstance(error, ConnectionError):
            _start_local()
            return
        where = f"--address {given}" if address != "auto" else f"RAY_ADDRESS={given}"
        raise UserError(f"{where}: no Ray cluster can be joined there ({error})") from None


def preflight(recipe: Recipe) -> None:
    """Raises UserError if the cluster lacks what the recipe asks for, or if others still use it
    after `cluster.placement_timeout_s`; a request that Ray cannot place would wait for ever."""
    rollout, cluster = recipe.rollout, recipe.cluster
    workers = rollout.num_workers + (recipe.eval.num_workers if recipe.grpo else 0)
    wanted = {
        "CPU": workers * rollout.num_cpus_per_worker + cluster.learner_cpus + cluster.reward_cpus,
        "GPU": workers * rollout.num_gpus_per_worker + cluster.learner_gpus,
    }
    total = ray.cluster_resources()
    for resource, amount in wanted.items():
        if amount > total.get(resource, 0) + 1e-6:
            unit = resource.lower()
            raise UserError(
                f"the recipe asks for {amount:g} {resource}s ({workers} rollout and evaluation "
                f"workers, one learner, rewards) but the cluster has {total.get(resource, 0):g}: "
                f"lower rollout.num_workers, eval.num_workers, rollout.num_{unit}s_per_worker or "
                f"cluster.learner_{unit}s, or add nodes"
            )
    for key, cpus, gpus in (
        ("rollout.num_*_per_worker", rollout.num_cpus_per_worker, rollout.num_gpus_per_worker),
        ("cluster.learner_*", cluster.learner_cpus, cluster.learner_gpus),
    ):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes):
            raise UserError(f"{key}: no single node has {cpus:g} CPUs and {gpus:g} GPUs")
    await_room(wanted, cluster.placement_timeout_s, "the recipe", key="cluster.placement_timeout_s")


def await_room(
    wanted: dict[str, float],
    timeout_s: float,
    who: str,
    *,
    key: str = "",
    interrupted: Callable[[], None] = lambda: None,
) -> None:
    """Wait until the cluster has `wanted` free.

    Raises UserError after `timeout_s`: it says `who` asks, and which `key` sets the limit, if one
    does. What `interrupted` raises passes through.
    """
    deadline = time.monotonic() + timeout_s
    while lacking := _lacking(wanted):
        interrupted()
        if time.monotonic() > deadline:
            limit = f"{key} = {timeout_s:g} s" if key else f"{timeout_s:g} s"
            raise UserError(
                f"{who} asks for {lacking} on the cluster for {limit}: others use the rest; end "
                "them or ask for less"
            )
        time.sleep(POLL_S)


def get(reference: Any, what: str, *, timeout_s: float | None = None) -> Any:
    """The result of a call to an actor or task; `what` names it in messages.

    Raises UserError if the call raised one, RunError if it raised anything else, its process died,
    or `timeout_s` passed.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise failure(error, what, timeout_s) from None


def failure(error: ray.exceptions.RayError, what: str, timeout_s: float | None = None) -> Exception:
    """What an error of Ray means: UserError if that is its cause, else RunError."""
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return RunError(f"{what}: no answer within {timeout_s:g} s")
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, UserError):
            return UserError(str(error.cause))
        return RunError(f"{what} failed: {type(error.cause).__name__}: {error.cause}\n\n{error}")
    return RunError(f"{what} died: {error}")


def check_shared_folder(run_dir: Path, learner: Any, *, timeout_s: float) -> None:
    """Raises UserError unless the learner's node sees the run folder: checkpoints go there."""
    mark = run_dir / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        seen = get(learner.sees.remote(str(mark)), "the learner's start", timeout_s=timeout_s)
    finally:
        mark.unlink()
    if not seen:
        raise UserError(
            f"{run_dir}: the learner's node does not see this folder; on a cluster --runs-dir must "
            "be on storage that all nodes share"
        )


def _lacking(wanted: dict[str, float]) -> str:
    free = ray.available_resources()
    return ", ".join(
        f"{amount:g} {resource}s but {free.get(resource, 0):g} were free"
        for resource, amount in wanted.items()
        if amount > free.get(resource, 0) + 1e-6
    )


def _start_local() -> None:
    memory = None if torch.cuda.is_available() else LOCAL_OBJECT_STORE_BYTES
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=memory,
            configure_logging=True,
        )
    except Exception as error:  # Ray raises a bare one when its processes do not come up in time
        raise RunError(f"Ray did not start on this machine: {error}") from error


def _join(address: str) -> None:
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"py_modules": [str(_folder(package)) for package in _packages()]},
    )


def _packages() -> list[ModuleType]:
    import sse_eval
    import sse_kernels
    import sse_rewards

    import sse_rl

    return [sse_rl, sse_kernels, sse_rewards, sse_eval]


def _folder(package: ModuleType) -> Path:
    return Path(package.__path__[0])
