"""Compiles the kernels of many calls in several processes, so that one process can measure."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

import torch


def compile_first(calls: Iterable[Callable[[], object]], processes: int) -> None:
    """Run every call once, for the cache of compiled kernels that processes share.

    The calls travel to other processes: functions of modules, or partials of them.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for done in [pool.submit(_run, call) for call in calls]:
            done.result()


def _run(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
