"""Compiles the Triton kernels for a GPU that need not be here: registers, spills, shared memory.

    python kernels/benchmarks/compile_kernels.py --capability 90 [--width 128] [KERNEL ...]

Prints one JSON object a kernel. Heads of `width` channels, 16 heads, bf16, K = 1, N = 4;
SSE-GLA over sequences from raw projections.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile

import triton
from sse_kernels import triton_conv, triton_layer_inputs, triton_layer_step
from sse_kernels.block_sizes import Blocks, blocks_for
from sse_kernels.delta import triton_backward as delta_backward
from sse_kernels.delta import triton_dqk as delta_dqk
from sse_kernels.delta import triton_prepare as delta_prepare
from sse_kernels.delta import triton_step as delta_step
from sse_kernels.delta import triton_sweep as delta_sweep
from sse_kernels.delta.gate import NORM_EPS
from sse_kernels.gla import (
    triton_backward,
    triton_forward,
    triton_gradients,
    triton_prepare,
    triton_step,
)
from sse_kernels.head import triton_rows as head_rows
from sse_kernels.head.walk import VOCAB_BLOCK
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

KERNELS = {
    "gla_prepare": triton_prepare.gla_prepare_kernel,
    "gla_prepare_raw": triton_prepare.gla_prepare_kernel,
    "gla_fwd": triton_forward.gla_fwd_kernel,
    "gla_states": triton_backward.gla_states_kernel,
    "gla_dstates": triton_backward.gla_dstates_kernel,
    "gla_dqk": triton_gradients.gla_dqk_kernel,
    "gdn_prepare": delta_prepare.gdn_prepare_kernel,
    "gdn_fwd": delta_sweep.gdn_sweep_kernel,
    "gdn_states": delta_sweep.gdn_sweep_kernel,
    "gdn_dstates": delta_backward.gdn_dstates_kernel,
    "gdn_dscores": delta_dqk.gdn_dscores_kernel,
    "gdn_dqk": delta_dqk.gdn_dqk_kernel,
    "gla_step": triton_step.gla_step_kernel,
    "gdn_step": delta_step.gdn_step_kernel,
    "layer_step": triton_layer_step.layer_step_kernel,
    "layer_inputs": triton_layer_inputs.layer_inputs_kernel,
    "conv_fwd": triton_conv.conv_fwd_kernel,
    "conv_bwd": triton_conv.conv_bwd_kernel,
    "head_reduce": head_rows.head_reduce_kernel,
    "head_differentiate": head_rows.head_differentiate_kernel,
}
HEAD = Blocks(0, 0, head_rows.WARPS, 1)
CONV = Blocks(0, 0, 4, 3)
_INTEGERS = {"T", "B", "M", "S", "COLUMNS", "tokens", "channels", "sequences", "steps"}
_ABSENT = {
    "initial",
    "initial_state",
    "final_state",
    "dfinal",
    "dinitial",
    "a_log",
    "dt_bias",
    "ROW_TOPK",
}
_ABSENT_IN = {
    "gdn_fwd": {"states", "errors"},
    "gdn_states": {"shared", "sparse"},
}
_FP32 = {
    "g1", "g2", "weights", "scales", "norms", "dw", "state",
    "z", "stats", "dweight", "chosen", "lse", "entropy", "dlogprob", "dentropy",
}  # fmt: skip
_FP32_OF_GDN = {
    "shared", "g1", "g2", "beta1", "beta2", "factors", "decays", "dg1", "dg2", "dbeta1", "dbeta2",
}  # fmt: skip
_INDEX = {"rows": "*i32", "segments": "*i32", "chunks": "*i32"}
_INDEX |= {
    "cu_seqlens": "*i64",
    "ids": "*i64",
    "slots": "*i64",
    "targets": "*i64",
    "lowest": "*i64",
}


def compile_kernel(name: str, width: int, capability: int) -> dict[str, object]:
    """Compile with the block sizes that this GPU generation would take."""
    kernel, blocks = KERNELS[name], CONV if name.startswith("conv") else HEAD
    if not name.startswith(("head", "conv")):
        blocks = blocks_for(name, width, capability // 10)
    constants = {
        "H": 16, "HV": 16, "DK": width, "DKP": width, "DV": width, "K": 1, "N": 4, "C": 64,
        "BK": min(blocks.k, width), "BV": min(blocks.v, width), "SCALE": width**-0.5,
        "RAW": name != "gla_prepare", "TOPK": 0, "PRECISION": "tf32", "EPS": NORM_EPS,
        "GATE_LAST": False,
        "DVP": width, "NP": 4, "BETA_SCALE": 1.0, "TEMPERATURE": 16, "UNIT_EPS": NORM_EPS,
        "STAGES": blocks.stages, "D": 16 * width, "NB": 4, "DB": 512, "KEYS": 16 * width,
        "VALUES": 16 * width, "R": width, "RP": width, "RATES": 32, "DR": 16, "DRP": 64, "W": 4,
        "WP": 4, "BM": 32, "BN": blocks.k, "CM": 4, "BLOCK": VOCAB_BLOCK,
        "BT": triton_conv.TOKENS, "BC": triton_conv.CHANNELS, "TILES": triton_conv.TILES,
    }  # fmt: skip
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in _ABSENT | _ABSENT_IN.get(name, set()):
            signature[argument] = "constexpr"
            constexprs[(i,)] = constants.get(argument)
        elif argument in _INTEGERS or argument.startswith("s_"):
            signature[argument] = "i32"
            if argument.startswith("s_") or argument == "channels":
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif argument in ("eps", "inverse_temperature"):
            signature[argument] = "fp32"
        else:
            signature[argument] = _pointer(argument, name)
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=blocks.options,
    )
    registers, spills = assembled(compiled.asm["ptx"])
    return {
        "kernel": name,
        "capability": capability,
        "width": width,
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": compiled.metadata.shared,
    }


def _pointer(argument: str, name: str) -> str:
    if argument.startswith("steep"):
        return "*i8"
    step = name.endswith(("_step", "_inputs"))
    if name.startswith("gdn_") and not step and argument in _FP32_OF_GDN:
        return "*fp32"
    if argument in {"slots", "g1", "g2"} and not step:
        return "*bf16"
    return _INDEX.get(argument) or ("*fp32" if argument in _FP32 else "*bf16")


def assembled(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes of spill stores, from the assembler's report."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    assembler = get_ptxas(int(re.sub(r"\D", "", architecture[1]))).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name", architecture[1], file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None and spills is not None, report
    return int(registers[1]), int(spills[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    for name in arguments.kernels or KERNELS:
        print(json.dumps(compile_kernel(name, arguments.width, arguments.capability)), flush=True)


if __name__ == "__main__":
    main()
