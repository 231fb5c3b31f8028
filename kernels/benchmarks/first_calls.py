"""Seconds of the first calls of each public function: nothing compiled, a process of its own each.

    python kernels/benchmarks/first_calls.py [--commit HASH]

A call's seconds hold everything behind it, compilation above all, but no import, no start of the
CUDA context and no making of inputs. The processes run at the same time. Writes
kernels/benchmarks/results/first-calls-<device>.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import sse_kernels
import torch
from measure import Row, arguments, save, shown
from problems import MAIN, Problem

Calls = dict[str, Callable[[], object]]


def sequence_calls(variant: str) -> Calls:
    """Forward, then forward + backward, which finds the forward kernels compiled."""
    problem = Problem(variant, MAIN)
    form = getattr(sse_kernels, f"sse_{variant}")
    # Both under grad mode, so that the second compiles the backward pass alone.
    return {
        "forward": lambda: problem.output(form),
        "backward": lambda: problem.both(form),
    }


def step_calls(variant: str) -> Calls:
    """One token of 64 sequences."""
    shape = MAIN._replace(sequences=64, length=1)
    problem = Problem(variant, shape)
    *tokens, logits = (x.detach() for x in problem.leaves.values())
    state = torch.zeros(65, 1 + shape.n, shape.h, shape.d, shape.d, device="cuda")
    slots = torch.arange(64, device="cuda") + 1
    step = getattr(sse_kernels, f"sse_{variant}_step")
    return {"call": lambda: step(*tokens, sse_kernels.route(logits, 1), state=state, slots=slots)}


FUNCTIONS: dict[str, Callable[[], Calls]] = {
    f"sse_{variant}{suffix}": functools.partial(make, f"{variant}{suffix.removesuffix('_step')}")
    for variant in ("gla", "gdn")
    for suffix, make in (
        ("", sequence_calls),
        ("_layer", sequence_calls),
        ("_step", step_calls),
    )
}


def seconds(function: str) -> dict[str, float]:
    """Seconds of each call of one function, in this process."""
    calls, found = FUNCTIONS[function](), {}
    torch.cuda.synchronize()
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found[name] = time.perf_counter() - start
    return found


def cold(function: str) -> list[Row]:
    """The same in a new process with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        printed = subprocess.run(
            [sys.executable, __file__, "--here", function],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    found = json.loads(printed.splitlines()[-1])
    return [Row(f"{function} first {n}", str(MAIN), "triton", x, "s") for n, x in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--here", choices=FUNCTIONS, help=argparse.SUPPRESS)
    options = arguments(parser)
    if options.here:
        print(json.dumps(seconds(options.here)))
        return
    rows: list[Row] = []
    failed = False
    with ThreadPoolExecutor() as pool:
        for found in [pool.submit(cold, function) for function in FUNCTIONS]:
            try:
                shown(found.result(), rows)
            except subprocess.CalledProcessError as error:  # the others still count
                print(error, file=sys.stderr)
                failed = True
            save("first-calls", rows, options)
    sys.exit(failed)


if __name__ == "__main__":
    main()
