"""Times every kernel with every plausible launch parameter, for the table of block_sizes.py.

    python kernels/benchmarks/search_blocks.py [--width 64 128 256] [--kernel gla_fwd ...]

Prints the three fastest of each kernel and width, in microseconds a call, after the table's own;
what is clearly faster goes into the table by hand. All candidates are compiled first, by several
processes that also compare their results with the table's; then one process measures, one kernel
at a time. Tiles narrower than 64 are left out: see block_sizes.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import sse_kernels
import torch
from problems import MAIN, Problem
from sse_kernels import block_sizes, route
from sse_kernels.block_sizes import Blocks
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SHORT = 512
"""Length of the sequences on which candidates are compiled: several processes share the memory."""

TOLERANCE = 2e-2
"""Relative difference of results above which a candidate counts as miscompiled."""


class Kernel(NamedTuple):
    """What a kernel's candidates are and how it is reached."""

    call: str
    """The function of `sse_kernels` that launches it."""
    along_k: bool = False
    """Whether it has tiles along Dk, and along Dv."""
    along_v: bool = False
    traced: str = ""
    """Its name in a trace, if it is not the table's."""


KERNELS = {
    "gla_prepare": Kernel("sse_gla", along_k=True),
    "gla_prepare_raw": Kernel("sse_gla_layer", along_k=True, traced="gla_prepare"),
    "gla_fwd": Kernel("sse_gla", along_v=True),
    "gla_states": Kernel("sse_gla", along_k=True, along_v=True),
    "gla_dstates": Kernel("sse_gla", along_v=True),
    "gla_dqk": Kernel("sse_gla", along_k=True, along_v=True),
    "gdn_prepare": Kernel("sse_gdn", along_k=True),
    "gdn_fwd": Kernel("sse_gdn", along_v=True, traced="gdn_sweep"),
    "gdn_states": Kernel("sse_gdn", along_v=True, traced="gdn_sweep"),
    "gdn_dstates": Kernel("sse_gdn", along_v=True),
    "gdn_dscores": Kernel("sse_gdn", along_v=True),
    "gdn_dqk": Kernel("sse_gdn", along_k=True, along_v=True),
    "gla_step": Kernel("sse_gla_step"),
    "gdn_step": Kernel("sse_gdn_step"),
}


class Candidate(NamedTuple):
    """One kernel, heads of one width, one set of launch parameters (None: the table's)."""

    kernel: str
    width: int
    blocks: Blocks | None


def candidates(kernel: str, width: int) -> Iterator[Candidate]:
    """The table's own, then tiles of 64 to `width` channels, 4 or 8 warps, 1 to 3 stages, and
    registers as needed or for one program more on a multiprocessor."""
    yield Candidate(kernel, width, None)
    if KERNELS[kernel].call.endswith("_step"):
        for v, warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
            yield Candidate(kernel, width, Blocks(0, v, warps, 1))
        return
    widths = [w for w in (64, 128, 256) if w <= width]
    along_k = widths if KERNELS[kernel].along_k else [0]
    along_v = [w for w in widths if w <= 128] if KERNELS[kernel].along_v else [0]
    for k, v, (warps, most), stages in itertools.product(
        along_k, along_v, ((4, 168), (8, 128)), (1, 2, 3)
    ):
        for registers in (None, most):
            yield Candidate(kernel, width, Blocks(k, v, warps, stages, registers))


@functools.lru_cache(maxsize=1)
def workload(call: str, width: int, length: int) -> Callable[[], list[Tensor]]:
    """A call with 2048 channels a token, 8 sequences of `length`; returns what it computes."""
    function, heads = getattr(sse_kernels, call), 2048 // width
    variant = call.removeprefix("sse_").removesuffix("_step")
    if not call.endswith("_step"):
        problem = Problem(variant, MAIN._replace(length=length, h=heads, d=width))
        return lambda: list(problem.both(function).values())
    problem = Problem(variant, MAIN._replace(sequences=64, length=1, h=heads, d=width))
    *tokens, logits = (x.detach() for x in problem.leaves.values())
    routing = route(logits, 1)
    before = torch.randn(65, 5, heads, width, width, device="cuda")
    state, slots = before.clone(), torch.arange(64, device="cuda") + 1

    def step() -> list[Tensor]:
        state.copy_(before)
        return [function(*tokens, routing, state=state, slots=slots), state]

    return step


def results(candidate: Candidate, length: int) -> list[Tensor] | None:
    """What the workload computes with a candidate; None if that does not fit the GPU."""
    call = workload(KERNELS[candidate.kernel].call, candidate.width, length)
    table = block_sizes.MEASURED.setdefault(torch.cuda.get_device_capability()[0], {})
    before = table.get(candidate.kernel)
    if candidate.blocks is not None:
        table[candidate.kernel] = {1: candidate.blocks}
        block_sizes.blocks_for.cache_clear()
    try:
        found = call()
        torch.cuda.synchronize()
        return found
    except Exception as error:
        if "out of resource" not in str(error) and "OutOfResources" not in type(error).__name__:
            raise RuntimeError(f"search_blocks: {candidate} fails: {error}") from error
        return None
    finally:
        table.pop(candidate.kernel, None)
        if before is not None:
            table[candidate.kernel] = before
        block_sizes.blocks_for.cache_clear()


@functools.lru_cache(maxsize=1)
def right_results(kernel: str, width: int) -> list[Tensor]:
    """What the table's launch parameters compute."""
    found = results(Candidate(kernel, width, None), SHORT)
    assert found is not None
    return [x.clone() for x in found]


def fits(candidate: Candidate) -> bool:
    """Compile a candidate; whether it fits the GPU and computes what the table's computes."""
    right = right_results(candidate.kernel, candidate.width)
    found = results(candidate, SHORT)
    if found is None:
        return False
    differences = [float((x - y).norm() / y.norm()) for x, y in zip(found, right, strict=True)]
    if not max(differences) < TOLERANCE:
        print(f"wrong results, left out: {candidate}, differences {differences}", flush=True)
        return False
    return True


def microseconds(candidate: Candidate, calls: int = 5) -> float:
    """GPU time a call spends in the candidate's kernel."""
    results(candidate, MAIN.length)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            results(candidate, MAIN.length)
    name = f"{KERNELS[candidate.kernel].traced or candidate.kernel}_kernel"
    events = [e for e in trace.key_averages() if e.key.startswith(name)]
    return sum(e.device_time_total for e in events) / calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--kernel", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args()
    print(torch.cuda.get_device_name())
    pairs = list(itertools.product(options.kernel, options.width))
    everything = [c for kernel, width in pairs for c in candidates(kernel, width)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        fitting = [c for c, fit in zip(everything, pool.map(fits, everything), strict=True) if fit]
    for kernel, width in pairs:
        mine = [c for c in fitting if c[:2] == (kernel, width)]
        timed = sorted((microseconds(c), c.blocks) for c in mine[1:])
        print(f"{kernel:12s} {width:4d} {microseconds(mine[0]):8.1f} us  the table's")
        for time, blocks in timed[:3]:
            print(f"{kernel:12s} {width:4d} {time:8.1f} us  {blocks}", flush=True)


if __name__ == "__main__":
    main()
