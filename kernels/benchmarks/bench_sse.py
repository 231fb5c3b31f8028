"""Times SSE-GLA and SSE-GDN on one GPU beside their baselines, and stores what it found.

    python kernels/benchmarks/bench_sse.py [gla gdn layer kept step] [--reference] [--commit HASH]

Token mixing is everything from activated q1 k1 q2 k2 v, log-decays and router logits to the summed
o: softmax, choice, plan and sweeps. A layer goes from raw projections to what its o_proj takes.
Kept is what lies in memory between forward and backward.
Inputs are random, times are medians, bf16. Baselines, in the same run: the torch form of
`sse_kernels`, the copy bandwidth, and with --reference the authors' algorithm rebuilt on
flash-linear-attention (its first calls tune for minutes).
Writes kernels/benchmarks/results/sse-<device>.json after every part, layers and what is kept into
packed-layer- and kept-<device>.json. Exits with 1 if bits differ or the host waits.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import sse_kernels
import torch
from compile_first import compile_first
from measure import Row, arguments, ceilings, graph_milliseconds, milliseconds, save, shown
from problems import MAIN, Problem, Shape
from properties import RAGGED, error_cases, errors, exactness, kept_memory
from reference import composed_sse_gla_layer, one_stream, reference_sse_gdn, reference_sse_gla

SHAPES = [
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
SHORT = 512
"""Longer sequences need no kernels of their own."""
PARTS: tuple[str, ...] = ("gla", "gdn", "layer", "kept", "step")
BASELINES = {
    "gla": {"torch": sse_kernels.chunk_sse_gla, "reference": reference_sse_gla},
    "gdn": {"torch": sse_kernels.chunk_sse_gdn, "reference": reference_sse_gdn},
    "gla_layer": {"sse_gla and torch": composed_sse_gla_layer},
    "gdn_layer": {},
}


def timed(variant: str, *shapes: Shape, form: str = "triton") -> Iterator[Row]:
    """Forward and forward + backward; of a million tokens, which fill the GPU, forward alone."""
    function = BASELINES[variant].get(form) or getattr(sse_kernels, f"sse_{variant}")
    case = variant.replace("_", " ")
    for shape in shapes:
        problem = Problem(variant, shape)
        torch.cuda.empty_cache()
        ms = milliseconds(functools.partial(problem.forward, function))
        yield Row(f"{case} forward", str(shape), form, ms, "ms")
        # flash-linear-attention 0.6 refuses GDN's backward pass on Hopper with triton 3.4 to 3.7.
        if shape != MILLION and (variant, form) != ("gdn", "reference"):
            ms = milliseconds(functools.partial(problem.both, function))
            yield Row(f"{case} forward+backward", str(shape), form, ms, "ms")


def captured(variant: str) -> Iterator[Row]:
    """The main shape as CUDA graphs."""
    problem, function = Problem(variant, MAIN), getattr(sse_kernels, f"sse_{variant}")
    for name, run in (("forward", problem.forward), ("forward+backward", problem.both)):
        ms = graph_milliseconds(functools.partial(run, function))
        yield Row(f"{variant} {name}", str(MAIN), "triton, CUDA graph", ms, "ms")


def reference(variant: str) -> Iterator[Row]:
    """The rebuilt reference, after a look at its output; for SSE-GLA one stream of fla too."""
    problem = Problem(variant, MAIN)
    o = problem.forward(BASELINES[variant]["reference"]).float()
    expected = problem.forward(getattr(sse_kernels, f"sse_{variant}")).float()
    difference = float((o - expected).norm() / expected.norm())
    assert difference < 2e-2, f"{variant}: the reference differs by {difference}"
    if variant == "gla":
        single = lambda q1, k1, q2, k2, v, g1, *_, cu_seqlens: (
            one_stream(q1, k1, v, g1, cu_seqlens=cu_seqlens),
            None,
        )
        ms = milliseconds(functools.partial(problem.forward, single))
        yield Row("gla forward", str(MAIN), "fla chunk_gla, one stream", ms, "ms")
    del o, expected
    yield from timed(variant, MAIN, form="reference")


def steps(copy_gb_s: float) -> Iterator[Row]:
    """One layer's state update; bytes are the touched states, read and written once."""
    for variant in ("gla", "gdn"):
        for batch in (1, 64, 256):
            for dtype in (torch.float32, torch.bfloat16):
                call, moved = step_call(variant, batch, dtype)
                ms = graph_milliseconds(call)
                shape = f"batch {batch}, H={MAIN.h}, D={MAIN.d}, K={MAIN.k}"
                form = f"triton, {str(dtype).removeprefix('torch.')} state"
                yield Row(f"{variant} step", shape, form, ms * 1e3, "us")
                if batch > 1:
                    share = moved / ms / 1e6 / copy_gb_s
                    yield Row(f"{variant} step", shape, form, share, "of copy bandwidth")


def step_call(
    variant: str, batch: int, dtype: torch.dtype
) -> tuple[Callable[[], torch.Tensor], int]:
    """One step of `batch` sequences, and the bytes that it moves."""
    shape = MAIN._replace(sequences=batch, length=1)
    *tokens, logits = (x.detach() for x in Problem(variant, shape).leaves.values())
    routing = sse_kernels.route(logits, shape.k)
    # Enough slots that the states do not stay in the cache between replays.
    size = (max(batch, 64) + 1, 1 + shape.n, shape.h, shape.d, shape.d)
    state = torch.randn(size, device="cuda").to(dtype)
    slots = torch.randperm(batch, device="cuda") + 1
    step = getattr(sse_kernels, f"sse_{variant}_step")
    moved = 2 * batch * (1 + shape.k) * state[0, 0].numel() * state.element_size()
    return lambda: step(*tokens, routing, state=state, slots=slots), moved


def all_calls(parts: list[str]) -> Iterator[Callable[[], object]]:
    """Whatever needs kernels of its own, for `compile_first`; the slowest first."""
    for variant in (v for v in ("gdn", "gla") if v in parts):
        cases = [(shape, None) for shape in (*SHAPES, MAIN, RAGGED, RAGGED._replace(sequences=1))]
        cases = [(s._replace(length=min(s.length, SHORT)), o) for s, o in cases]
        cases += [(s._replace(length=SHORT), o) for s, o in error_cases(variant)]
        for shape, option in sorted(dict.fromkeys(cases), key=lambda case: -case[0].d):
            yield functools.partial(run_once, variant, shape, option)
    for variant in ("gdn_layer", "gla_layer") if {"layer", "kept"} & set(parts) else ():
        yield functools.partial(run_once, variant, MAIN._replace(length=SHORT), None)
        yield functools.partial(run_once, variant, MAIN._replace(length=SHORT, k=2), None)
    if "step" in parts:
        for variant in ("gla", "gdn"):
            for batch in (1, 64):
                for dtype in (torch.float32, torch.bfloat16):
                    yield functools.partial(step_once, variant, batch, dtype)


def run_once(variant: str, shape: Shape, option: str | None) -> None:
    """Forward and backward."""
    problem = Problem(variant, shape, option=option)
    problem.both(getattr(sse_kernels, f"sse_{variant}"))


def step_once(variant: str, batch: int, dtype: torch.dtype) -> None:
    """One step."""
    step_call(variant, batch, dtype)[0]()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--reference", action="store_true", help="compare with fla-core's kernels")
    parser.add_argument(
        "--processes", type=int, default=min(14, os.cpu_count() or 1),
        help="how many compile before one measures (0: none)",
    )  # fmt: skip
    options = arguments(parser)
    parts: list[str] = options.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"PART must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.processes:
        compile_first(all_calls(parts), options.processes)
    top = ceilings()
    variants = [variant for variant in ("gla", "gdn") if variant in parts]
    work = [("sse", timed(variant, MAIN)) for variant in variants]
    work += [("sse", reference(variant)) for variant in variants if options.reference]
    if "layer" in parts:
        for variant in ("gla_layer", "gdn_layer"):
            work.append(("packed-layer", timed(variant, MAIN, MAIN._replace(k=2))))
        work.append(("packed-layer", timed("gla_layer", MAIN, form="sse_gla and torch")))
    if "kept" in parts:
        work += [("kept", kept_memory(variant)) for variant in BASELINES]
    for variant in variants:
        several = (exactness(variant), errors(variant), timed(variant, *SHAPES), captured(variant))
        work += [("sse", part) for part in several]
    if "step" in parts:
        work.append(("sse", steps(top["copy_gb_s"])))
    work += [("sse", timed(variant, MAIN, form="torch")) for variant in variants]
    work += [("sse", timed(variant, MILLION)) for variant in variants]
    files: dict[str, list[Row]] = {}
    failed = False
    for file, part in work:
        rows = files.setdefault(file, [])
        try:
            shown(part, rows)
        except Exception:  # what was measured stays, the other parts run
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
        save(file, rows, options, ceilings=top)
    rows = [row for found in files.values() for row in found]
    wrong = any(row.value for row in rows if row.unit in ("elements differ", "waits"))
    sys.exit(failed or wrong)


if __name__ == "__main__":
    main()
