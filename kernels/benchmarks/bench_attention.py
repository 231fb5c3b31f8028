"""Times paged decode attention on one GPU, and stores what it found.

    python kernels/benchmarks/bench_attention.py [--commit HASH]

One query a sequence, 32 query heads in groups of 4, bf16, random pages of 64 tokens, in a CUDA
graph. The keys and values of several layers take turns, 256 MB at least, so that none stay in the
L2 cache. Baselines, in the same run: the measured copy bandwidth; all pages
gathered and torch's SDPA; and torch's `varlen_attn` on keys and values that lie together, repeated
for every query head, as torch 2.11 needs them (no gather is timed). Where a baseline needs more
memory than there is, its row is missing.
Writes kernels/benchmarks/results/attention-<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from measure import Row, arguments, ceilings, save, shown
from sse_kernels import paged_attention
from sse_kernels.attention.triton_paged import Tile, triton_paged_attention
from torch import Tensor

HEADS, GROUP, PAGE = 32, 4, 64


class Problem:
    """Queries and the pages of several layers; each call reads the next layer's."""

    def __init__(self, batch: int, context: int, width: int) -> None:
        torch.manual_seed(0)
        kv_heads, used = HEADS // GROUP, context // PAGE
        self.bytes = 2 * batch * context * kv_heads * width * 2
        layers = min(max(2**28 // self.bytes, 1), 64)
        pages = batch * used
        shape = (layers, 2, pages, PAGE, kv_heads, width)
        self.pages = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.q = torch.randn(batch, HEADS, width, device="cuda", dtype=torch.bfloat16)
        self.table = torch.randperm(pages, device="cuda").view(batch, used)
        self.context_lens = torch.full((batch,), context - 1, device="cuda")

    def ours(self, *, split: int | None = None, tile: Tile | None = None) -> list[Tensor]:
        lens = self.context_lens
        if split is None:
            ours = paged_attention
            return [ours(self.q, k, v, self.table, context_lens=lens) for k, v in self.pages]
        return [
            triton_paged_attention(
                self.q, k, v, self.table, context_lens=lens, split=split, tile=tile
            )
            for k, v in self.pages
        ]

    def gathered(self) -> list[Tensor]:
        """What the engine did before there was a kernel."""
        outputs = []
        for layer in self.pages:
            k, v = (pages[self.table].flatten(1, 2).transpose(1, 2) for pages in layer)
            seen = torch.arange(k.shape[2], device="cuda") <= self.context_lens[:, None]
            q, mask = self.q[:, :, None], seen[:, None, None]
            outputs.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]
            )
        return outputs

    def varlen(self) -> Callable[[], list[Any]]:
        from torch.nn.attention.varlen import varlen_attn

        batch, used = self.table.shape
        layers = [
            [pages[self.table].flatten(0, 2).repeat_interleave(GROUP, 1) for pages in layer]
            for layer in self.pages
        ]
        one = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
        length = used * PAGE
        return lambda: [varlen_attn(self.q, k, v, one, one * length, 1, length) for k, v in layers]

    def microseconds(self, call: Callable[[], object]) -> float:
        """Of one layer, in a CUDA graph that runs all: the median of ten replays."""
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for _ in range(12):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return 1e3 * statistics.median(times[2:]) / len(self.pages)


def steps(copy_gb_s: float) -> Iterator[Row]:
    """Microseconds of a layer at every size, and the share of the copy bandwidth."""
    for batch, width in ((64, 128), (64, 64), (1, 128), (256, 128)):
        for context in (1024, 4096, 16384):
            yield from size(batch, context, width, copy_gb_s)
            torch.cuda.empty_cache()


def size(batch: int, context: int, width: int, copy_gb_s: float) -> Iterator[Row]:
    problem, case = Problem(batch, context, width), "paged decode attention"
    shape = f"batch {batch}, context {context}, D={width}"
    ours = problem.microseconds(problem.ours)
    yield Row(case, shape, "triton", ours, "us")
    yield Row(case, shape, "triton", problem.bytes / ours / 1e3 / copy_gb_s, "of copy bandwidth")
    if 6 * problem.pages.nbytes > 60e9:  # groups repeated, and what SDPA makes of them
        return
    found = problem.ours()[0].float()
    for form, prepare in {
        "gathered, SDPA": lambda: problem.gathered,
        "varlen_attn, no pages": problem.varlen,
    }.items():
        baseline = prepare()
        difference = float((baseline()[0].float() - found).abs().max())
        assert difference < 2e-2, f"{shape}: {form} differs by {difference}"
        yield Row(case, shape, form, problem.microseconds(baseline), "us")
        del baseline
        torch.cuda.empty_cache()


def main() -> None:
    options = arguments(argparse.ArgumentParser())
    top = ceilings()
    save("attention", shown(steps(top["copy_gb_s"])), options, ceilings=top)


if __name__ == "__main__":
    main()
