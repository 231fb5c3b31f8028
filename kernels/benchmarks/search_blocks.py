"""Times every kernel with every plausible launch parameter, for the table of block_sizes.py.

    python kernels/benchmarks/search_blocks.py [--width 64 128 256] [--kernel gla_fwd ...]

Prints the three fastest of each kernel and width, in microseconds a call; the fastest goes into the
table by hand. One kernel is searched at a time, the others keep the table's parameters. Tiles
narrower than 64 are left out: see block_sizes.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import sse_kernels
import torch
from problems import MAIN, Problem
from sse_kernels import block_sizes, route
from sse_kernels.block_sizes import Blocks
from torch.profiler import ProfilerActivity, profile

KERNELS = ("gla_prepare", "gla_fwd", "gla_states", "gla_dstates", "gla_dscores", "gla_dqk")
STEPS = ("gla_step", "gdn_step")
_ALONG_K = {"gla_prepare", "gla_states", "gla_dqk"}
_ALONG_V = {"gla_fwd", "gla_states", "gla_dstates", "gla_dscores", "gla_dqk"}


def candidates(kernel: str, width: int) -> Iterator[Blocks]:
    """Tiles of 64 to `width` channels where the kernel has them, 4 or 8 warps, 1 to 3 stages."""
    if kernel in STEPS:
        for v, warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
            yield Blocks(0, v, warps, 1)
        return
    widths = [w for w in (64, 128, 256) if w <= width]
    along_k = widths if kernel in _ALONG_K else [0]
    along_v = [w for w in widths if w <= 128] if kernel in _ALONG_V else [0]
    yield from (Blocks(*x) for x in itertools.product(along_k, along_v, (4, 8), (1, 2, 3)))


def microseconds(kernel: str, call: Callable[[], object], calls: int = 5) -> float:
    """Time a call spends in `kernel`; inf if the parameters do not fit the GPU."""
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        if "out of resource" not in str(error) and "OutOfResources" not in type(error).__name__:
            raise
        return float("inf")
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.key.startswith(f"{kernel}_kernel")]
    return sum(e.device_time_total for e in events) / calls


def workload(kernel: str, width: int) -> Callable[[], object]:
    """A call that launches the kernel at the benchmark's main shape, 2048 channels a token."""
    heads = 2048 // width
    if kernel not in STEPS:
        problem = Problem("gla", MAIN._replace(h=heads, d=width))
        return lambda: problem.both(sse_kernels.sse_gla)
    batch = 64
    normal = lambda *s: torch.randn(batch, heads, *s, device="cuda", dtype=torch.bfloat16)
    channels = (width,) if kernel == "gla_step" else ()
    gates = [-torch.rand(batch, heads, *channels, device="cuda") for _ in range(2)]
    if kernel == "gdn_step":
        gates = [gates[0], gates[0].exp(), gates[1], gates[1].exp()]
    args = [*(normal(width) for _ in range(5)), *gates]
    routing = route(torch.randn(batch, 4, device="cuda"), 1)
    state = torch.randn(batch + 1, 5, heads, width, width, device="cuda")
    slots = torch.arange(batch, device="cuda") + 1
    step = getattr(sse_kernels, f"sse_{kernel}")
    return lambda: step(*args, routing, state=state, slots=slots)


def search(kernel: str, width: int) -> list[tuple[float, Blocks]]:
    """All candidates, fastest first; the table in use is left as it was."""
    generation = torch.cuda.get_device_capability()[0]
    table = block_sizes.MEASURED.setdefault(generation, {})
    before, call, found = table.get(kernel), workload(kernel, width), []
    for blocks in candidates(kernel, width):
        table[kernel] = {1: blocks}
        block_sizes.blocks_for.cache_clear()
        found.append((microseconds(kernel, call), blocks))
    table.pop(kernel)
    if before is not None:
        table[kernel] = before
    block_sizes.blocks_for.cache_clear()
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--kernel", nargs="*", default=[*KERNELS, *STEPS])
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    for kernel, width in itertools.product(arguments.kernel, arguments.width):
        for time, blocks in search(kernel, width)[:3]:
            print(f"{kernel:12s} {width:4d} {time:8.1f} us  {blocks}", flush=True)


if __name__ == "__main__":
    main()
