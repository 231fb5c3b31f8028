"""Joining or starting a Ray cluster, and asking it only for what it has."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

from sse_rl.errors import UserError
from sse_rl.recipe import Recipe

LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
KEEP_FREED_MEMORY = {
    "env_vars": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
}
"""A runtime environment for actors that compute on CPU: glibc then reuses large buffers instead of
asking the kernel for fresh pages each time, which halves the time of a small decode step."""


def connect(address: str) -> None:
    """Join `address` (a host:port, or `auto`: RAY_ADDRESS or a running cluster, else local), or
    start a cluster of this machine alone (`local`). Code travels with the job, so that nodes need
    our dependencies but not our packages. A second call in one process changes nothing.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "auto":
        try:
            _join("auto")
        except ConnectionError:
            _start_local()
    elif address == "local":
        _start_local()
    else:
        try:
            _join(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--address {address}: no Ray cluster answers there ({error})"
            ) from None


def preflight(recipe: Recipe) -> None:
    """Raises UserError if the cluster lacks what the recipe asks for; an infeasible request to Ray
    would wait for ever."""
    rollout, cluster = recipe.rollout, recipe.cluster
    workers = rollout.num_workers + (recipe.eval.num_workers if recipe.grpo else 0)
    wanted = {
        "CPU": workers * rollout.num_cpus_per_worker + cluster.learner_cpus + cluster.reward_cpus,
        "GPU": workers * rollout.num_gpus_per_worker + cluster.learner_gpus,
    }
    total = ray.cluster_resources()
    for resource, amount in wanted.items():
        if amount > total.get(resource, 0) + 1e-6:
            raise UserError(
                f"the recipe asks for {amount:g} {resource}s ({workers} rollout workers, "
                f"one learner, rewards) but the cluster has {total.get(resource, 0):g}: lower "
                f"rollout.num_workers, eval.num_workers, rollout.num_{resource.lower()}s_per_worker or "
                f"cluster.learner_{resource.lower()}s, or add nodes"
            )
    for what, cpus, gpus in (
        ("a rollout worker", rollout.num_cpus_per_worker, rollout.num_gpus_per_worker),
        ("the learner", cluster.learner_cpus, cluster.learner_gpus),
    ):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes):
            raise UserError(f"no single node has the {cpus:g} CPUs and {gpus:g} GPUs of {what}")


def check_shared_folder(run_dir: Path, learner: Any, *, timeout_s: float) -> None:
    """Raises UserError unless the learner's node sees the run folder, where it writes checkpoints."""
    if not ray.get(learner.sees.remote(str(run_dir)), timeout=timeout_s):
        raise UserError(
            f"{run_dir}: the learner's node does not see this folder; on a cluster --runs-dir must "
            "be on storage that all nodes share"
        )


def _start_local() -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        configure_logging=True,
    )


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
