"""Compiles paged attention for a GPU that need not be here: registers, spills, shared memory.

    python kernels/benchmarks/compile_attention.py --capability 90 [--width 64] [KERNEL ...]

Prints one JSON object a kernel: bf16, groups of 4 heads, pages of 64 tokens.
"""

from __future__ import annotations

import argparse
import json

import torch
import triton
from compile_kernels import assembled
from sse_kernels.attention import triton_paged, triton_rotate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    "decode": triton_paged.paged_attention_kernel,
    "prefill": triton_paged.paged_attention_kernel,
    "join": triton_paged.join_parts_kernel,
    "rotate": triton_rotate.rotate_kernel,
    "rotate_rows": triton_rotate.rotate_rows_kernel,
}
_TYPES = {
    "scale": "fp32", "T": "i32", "B": "i32", "P": "i32", "parts": "i32", "room": "i32",
    "stride": "i32", "q_row": "i32", "k_row": "i32", "v_row": "i32",
    "part": "*fp32", "norm": "*fp32", "frequency": "*fp32",
    "block_table": "*i64", "context_lens": "*i64", "positions": "*i64", "cu_seqlens": "*i64",
}  # fmt: skip


def compile_kernel(
    name: str, width: int, capability: int, tile: triton_paged.Tile | None = None
) -> dict[str, object]:
    """Compile with the tile that is launched, or another one."""
    kernel, decode, group, half = KERNELS[name], name == "decode", 4, width // 2
    if tile is None:
        sizes = triton_paged.prefill_tile if name == "prefill" else triton_paged.decode_tile
        tile = sizes(width, torch.bfloat16)
    queries = 1 if decode else tile.rows // group
    constants = {
        "G": group, "GP": group, "H": 4 * group, "HP": 4 * group, "HKV": 4, "HKVP": 4,
        "D": width, "DP": width, "HALF": half, "HALFP": half, "PAGE": 64, "BQ": queries,
        "BM": tile.rows, "BN": min(tile.keys, 64), "NP": 8, "SPAN": 512, "BS": 16, "WINDOW": 0,
        "SPLIT": 0 if name == "prefill" else 512, "SEVERAL": decode, "PRECISION": "tf32",
        "SIGN": -1,
    }  # fmt: skip
    if decode:
        constants["cu_seqlens"] = None
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = _TYPES.get(argument, "*bf16")
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[(i,)] = constants[argument]
        elif signature[argument].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    few = name in ("join", "rotate", "rotate_rows")
    options = {"num_warps": 4, "num_stages": 1} if few else {
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
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
