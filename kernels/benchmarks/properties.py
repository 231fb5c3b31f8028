"""What must hold beside speed: errors against fp64, equal bits, memory kept, no waiting."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import sse_kernels
import torch
from measure import Row
from problems import MAIN, Problem, Shape
from torch import Tensor

SHORT = Shape(4, 148, 2, 128, 4, 1)
LONG = Shape(4, 1000, 2, 128, 4, 1)
RAGGED = MAIN._replace(length=784, k=2)


def errors(variant: str) -> Iterator[Row]:
    """Relative Frobenius errors of bf16 against fp64 on the same rounded inputs.

    Short sequences against the definition, long ones against the torch form, which equals it to
    1e-15.
    """
    for shape, option in error_cases(variant):
        exact = "chunk" if shape.length == LONG.length else "naive"
        problem = Problem(variant, shape, seed=1, option=option)
        right = problem.double().both(getattr(sse_kernels, f"{exact}_sse_{variant}"))
        if variant == "gdn" and not option:
            # The norm cancels the router's weight: this gradient is rounding alone.
            del right["dlogits"]
        found = problem.both(getattr(sse_kernels, f"sse_{variant}"))
        case = f"{variant} error" + (f", {option}" if option else "")
        for name, x in right.items():
            yield Row(case, str(shape), name, _error(found[name], x), "relative")


def error_cases(variant: str) -> list[tuple[Shape, str | None]]:
    """What `errors` compares: K of 1 and 2, for GDN also with the gate after the norm."""
    options = [None, "gate_after_norm"] if variant == "gdn" else [None]
    choices = itertools.product((SHORT, LONG), (1, 2), options)
    return [(shape._replace(k=k), option) for shape, k, option in choices]


def exactness(variant: str) -> Iterator[Row]:
    """Numbers that must be 0: elements that differ, and waits for the device."""
    form = getattr(sse_kernels, f"sse_{variant}")
    problem, shape = Problem(variant, RAGGED), str(RAGGED)
    first = problem.both(form)
    again = problem.both(form)
    differing = sum(_differing(first[name], again[name]) for name in first)
    yield Row(f"{variant} second run", shape, "triton", differing, "elements differ")
    start, end = problem.cu_seqlens[3:5].tolist()
    alone = problem.alone(3).both(form)
    differing = sum(_differing(first[name][start:end], alone[name]) for name in first)
    yield Row(f"{variant} packed beside alone", shape, "triton", differing, "elements differ")
    assert _waits(lambda: problem.cu_seqlens[0].item()), "torch does not report a wait"
    for name, run in (("forward", problem.forward), ("forward+backward", problem.both)):
        yield Row(f"{variant} {name}", shape, "triton", _waits(lambda: run(form)), "waits")  # noqa: B023


def kept_memory(variant: str) -> Iterator[Row]:
    """What lies in memory between forward and backward, in bf16 rows of width H*D a token.

    Inputs count, a layer's gate included; the output does not.
    """
    for shape in (MAIN, MAIN._replace(k=2)):
        case = f"{variant.replace('_', ' ')} kept for backward"
        yield _kept(case, Problem(variant, shape), shape)
        if variant == "gla":  # fp32 log-decays take two rows each
            problem = Problem(variant, shape, decays=torch.bfloat16)
            yield _kept(f"{case}, bf16 decays", problem, shape)


def _kept(case: str, problem: Problem, shape: Shape) -> Row:
    before = torch.cuda.memory_allocated()
    o = problem.output(getattr(sse_kernels, f"sse_{problem.variant}"))
    kept = torch.cuda.memory_allocated() - before - _bytes(o)
    kept += sum(map(_bytes, (*problem.leaves.values(), *problem.named.values())))
    row = shape.sequences * shape.length * shape.h * shape.d * 2
    return Row(case, str(shape), "triton", kept / row, "bf16 rows")


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _differing(x: Tensor, y: Tensor) -> int:
    return int((x != y).sum())


def _waits(call: Any) -> int:
    """How often torch waits for the device in a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
