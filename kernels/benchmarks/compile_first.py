"""Compiles the kernels of many calls in several processes, so that one process can measure."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import sse_kernels
import torch
from problems import Problem, Shape

LONGEST = 1024
"""Longer sequences need no kernels of their own."""


class Call(NamedTuple):
    """Forward and backward of one operator at one shape."""

    variant: str
    shape: Shape
    option: str | None = None
    """A flag of the operator that is set."""


def compile_first(calls: Iterable[Call]) -> None:
    """Run every call once, shortened, for the cache that processes share (TRITON_CACHE_DIR)."""
    short = lambda shape: shape._replace(length=min(shape.length, LONGEST))
    distinct = list(dict.fromkeys(call._replace(shape=short(call.shape)) for call in calls))
    processes = min(len(distinct), os.cpu_count() or 1, 14)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        list(pool.map(_run, distinct))


def _run(call: Call) -> None:
    problem = Problem(call.variant, call.shape, option=call.option)
    problem.both(getattr(sse_kernels, f"sse_{call.variant}"))
    torch.cuda.synchronize()
