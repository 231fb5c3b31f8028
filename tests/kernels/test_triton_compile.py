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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "spills", "kernels"),
    [
        (80, 256, ["gla_fwd", "gla_dqk"]),  # 8 and 220: no block sizes were searched for it
        (90, 0, ["gla_fwd", "gla_dstates", "gla_dqk", "gla_step", "layer_step", "layer_inputs"]),
        (90, 0, ["head_reduce", "head_differentiate"]),
        (100, 0, ["gla_fwd", "gla_dqk"]),
        (90, 0, ["gdn_prepare", "gdn_fwd", "gdn_states", "gdn_dstates", "gdn_dqk"]),
        (100, 0, ["gdn_prepare", "gdn_fwd", "gdn_dqk"]),
    ],
)
def test_hot_kernels_do_not_spill(capability, spills, kernels):
    assert_spills("compile_kernels.py", capability, kernels, at_most=spills)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kernels"), [(80, ["prefill"]), (90, ["decode", "prefill"]), (100, ["decode"])]
)
def test_paged_attention_does_not_spill(capability, kernels):
    assert_spills("compile_attention.py", capability, kernels, at_most=0)


def assert_spills(script, capability, kernels, *, at_most):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPTS / script), "--capability", str(capability), *kernels]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert [report["kernel"] for report in reports] == kernels
    for report in reports:
        assert report["spill_bytes"] <= at_most, report
        assert report["shared_bytes"] <= 227 * 1024, report
