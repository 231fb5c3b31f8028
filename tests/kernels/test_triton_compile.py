"""The hot kernels compile for GPUs that are not here, and keep their values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[2] / "kernels/benchmarks"
ONE_VALUE_A_SLOT = """
import triton
from sse_kernels.gla.triton_forward import sum_slots_kernel as kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

constants = {"base": None, "silu_of": None, "S": 2, "GROUP": 1, "D": 1, "ROW": 1, "BLOCK": 2048}
types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
types["tokens"] = "i32"
constants = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
"""
"""SSE-GDN's backward pass of one head, K = 2."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "spills", "kernels"),
    [
        (80, 0, ["gla_fwd", "gla_dstates", "gla_dqk"]),
        (80, 0, ["gdn_prepare", "gdn_fwd", "gdn_dstates", "gdn_dqk"]),
        (90, 0, ["gla_fwd", "gla_dstates", "gla_prepare_raw", "gla_states", "gla_step"]),
        (90, 0, ["layer_step", "layer_inputs"]),
        (90, 24, ["gla_dqk"]),  # 128 registers let two programs share a multiprocessor
        (90, 0, ["head_reduce", "head_differentiate", "conv_fwd", "conv_bwd"]),
        (100, 0, ["gla_fwd", "gla_dqk"]),
        (90, 0, ["gdn_prepare", "gdn_fwd", "gdn_states", "gdn_dstates", "gdn_dqk"]),
        (100, 0, ["gdn_prepare", "gdn_fwd", "gdn_dqk"]),
    ],
)
def test_hot_kernels_do_not_spill(capability, spills, kernels):
    assert_spills("compile_kernels.py", capability, kernels, at_most=spills)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kernels"),
    [(80, ["prefill"]), (90, ["decode", "prefill", "rotate_rows"]), (100, ["decode"])],
)
def test_paged_attention_does_not_spill(capability, kernels):
    assert_spills("compile_attention.py", capability, kernels, at_most=0)


@pytest.mark.slow
def test_slots_of_a_single_value_compile():
    compiler("-c", ONE_VALUE_A_SLOT)


def compiler(*arguments):
    """Standard output of a python that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def assert_spills(script, capability, kernels, *, at_most):
    lines = compiler(str(SCRIPTS / script), "--capability", str(capability), *kernels).splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["kernel"] for report in reports] == kernels
    for report in reports:
        assert report["spill_bytes"] <= at_most, report
        assert report["shared_bytes"] <= 227 * 1024, report
