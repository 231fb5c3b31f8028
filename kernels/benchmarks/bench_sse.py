"""Times SSE-GLA and SSE-GDN on one GPU beside their baselines, and stores what it found.

    python kernels/benchmarks/bench_sse.py [gla gdn step] [--reference] [--commit HASH]

Token mixing is everything from activated q1 k1 q2 k2 v, log-decays and router logits to the summed
o: softmax, choice, plan and sweeps. Inputs are random, times are medians, bf16. Baselines, in the
same run: the torch form of `sse_kernels`, the copy bandwidth, and with --reference the authors'
algorithm rebuilt on flash-linear-attention (its first calls tune for minutes).
Writes kernels/benchmarks/results/sse-<device>.json. Exits with 1 if bits differ or the host waits.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import sse_kernels
import torch
from compile_first import Call, compile_first
from measure import Row, arguments, ceilings, graph_milliseconds, milliseconds, save, shown
from problems import MAIN, Problem
from properties import RAGGED, error_calls, errors, exactness, kept_memory
from reference import one_stream, reference_sse_gdn, reference_sse_gla
from sse_kernels import route

SHAPES = [
    MAIN,
    MAIN._replace(k=2),
    MAIN._replace(n=8),
    MAIN._replace(n=8, k=2, length=8192),
    MAIN._replace(h=8, d=256),
    MAIN._replace(h=32, d=64),
    MAIN._replace(sequences=1, length=16384),
    MAIN._replace(length=8192),
    MAIN._replace(length=32768),
]
MILLION = MAIN._replace(length=131072)
OPERATORS = {"gla": sse_kernels.sse_gla, "gdn": sse_kernels.sse_gdn}
TORCH = {"gla": sse_kernels.chunk_sse_gla, "gdn": sse_kernels.chunk_sse_gdn}
REFERENCE = {"gla": reference_sse_gla, "gdn": reference_sse_gdn}


def calls(variant: str) -> list[Call]:
    """All that needs kernels of its own."""
    shapes = [*SHAPES, RAGGED, RAGGED._replace(sequences=1)]
    return [*(Call(variant, shape) for shape in shapes), *error_calls(variant)]


def sequences(variant: str) -> Iterator[Row]:
    """Forward and forward + backward of token mixing; at the main shape by torch too."""
    ours = OPERATORS[variant]
    for shape in SHAPES:
        problem = Problem(variant, shape)
        for name, run in (("forward", problem.forward), ("forward+backward", problem.both)):
            call, case = functools.partial(run, ours), f"{variant} {name}"
            yield Row(case, str(shape), "triton", milliseconds(call), "ms")
            if shape == MAIN:
                yield Row(case, str(shape), "triton, CUDA graph", graph_milliseconds(call), "ms")
                slow = functools.partial(run, TORCH[variant])
                yield Row(case, str(shape), "torch", milliseconds(slow), "ms")
        del problem, run, call
        torch.cuda.empty_cache()
    problem = Problem(variant, MILLION)
    torch.cuda.empty_cache()
    ms = milliseconds(lambda: problem.forward(ours))
    yield Row(f"{variant} forward", str(MILLION), "triton", ms, "ms")


def reference(variant: str) -> Iterator[Row]:
    """The rebuilt reference, after a look at its output; GDN forward only.

    flash-linear-attention 0.6 refuses GDN's backward pass on Hopper with triton 3.4 to 3.7.
    """
    problem, ours, theirs = Problem(variant, MAIN), OPERATORS[variant], REFERENCE[variant]
    o, expected = problem.forward(theirs).float(), problem.forward(ours).float()
    difference = float((o - expected).norm() / expected.norm())
    assert difference < 2e-2, f"{variant}: the reference differs by {difference}"
    runs = {"forward": problem.forward, "forward+backward": problem.both}
    for name, run in runs.items() if variant == "gla" else [("forward", problem.forward)]:
        ms = milliseconds(functools.partial(run, theirs))
        yield Row(f"{variant} {name}", str(MAIN), "reference", ms, "ms")
    if variant == "gla":
        single = lambda q1, k1, q2, k2, v, g1, *_, cu_seqlens: (
            one_stream(q1, k1, v, g1, cu_seqlens=cu_seqlens),
            None,
        )
        ms = milliseconds(lambda: problem.forward(single))
        yield Row("gla forward", str(MAIN), "fla chunk_gla, one stream", ms, "ms")


def steps(copy_gb_s: float) -> Iterator[Row]:
    """One layer's state update; bytes are the touched states, read and written once."""
    h, d, n, k = 16, 128, 4, 1
    for variant in ("gla", "gdn"):
        step = getattr(sse_kernels, f"sse_{variant}_step")
        for batch in (1, 64, 256):
            for dtype in (torch.float32, torch.bfloat16):
                width = (d,) if variant == "gla" else ()
                normal = lambda *s: torch.randn(batch, h, *s, device="cuda", dtype=torch.bfloat16)  # noqa: B023
                gates = [-torch.rand(batch, h, *width, device="cuda") for _ in range(2)]
                if variant == "gdn":
                    gates = [gates[0], gates[0].exp(), gates[1], gates[1].exp()]
                args = [*(normal(d) for _ in range(5)), *gates]
                routing = route(torch.randn(batch, n, device="cuda"), k)
                # Enough slots that the states do not stay in the cache between replays.
                state = torch.randn(max(batch, 64) + 1, 1 + n, h, d, d, device="cuda", dtype=dtype)
                slots = torch.randperm(batch, device="cuda") + 1
                ms = graph_milliseconds(
                    lambda: step(*args, routing, state=state, slots=slots)  # noqa: B023
                )
                moved = 2 * batch * (1 + k) * h * d * d * state.element_size()
                shape = f"batch {batch}, H={h}, D={d}, K={k}"
                form = f"triton, {str(dtype).removeprefix('torch.')} state"
                yield Row(f"{variant} step", shape, form, ms * 1e3, "us")
                if batch > 1:
                    share = moved / ms / 1e6 / copy_gb_s
                    yield Row(f"{variant} step", shape, form, share, "of copy bandwidth")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help="gla, gdn, step (default: all)")
    parser.add_argument("--reference", action="store_true", help="compare with fla-core's kernels")
    options = arguments(parser)
    parts = options.parts or ["gla", "gdn", "step"]
    if unknown := set(parts) - {"gla", "gdn", "step"}:
        parser.error(f"PART must be gla, gdn or step, got {', '.join(sorted(unknown))}")
    variants = [part for part in parts if part != "step"]
    if variants:
        compile_first(call for variant in variants for call in calls(variant))
    top, rows = ceilings(), []
    for variant in variants:
        for part in (errors, exactness, kept_memory, sequences):
            rows += shown(part(variant))
            torch.cuda.empty_cache()
        if options.reference:
            rows += shown(reference(variant))
    if "step" in parts:
        rows += shown(steps(top["copy_gb_s"]))
    save("sse", rows, options, ceilings=top)
    sys.exit(any(row.value for row in rows if row.unit in ("elements differ", "waits")))


if __name__ == "__main__":
    main()
