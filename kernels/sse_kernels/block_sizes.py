"""Tile widths, warps and pipeline stages of every kernel, measured once per GPU generation.

Filled by kernels/benchmarks/search_blocks.py. The choice follows from GPU, dtype and head width
alone, never from the number of tokens: a sequence's bits must not depend on its company.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class Blocks(NamedTuple):
    """Launch parameters of one kernel."""

    k: int
    """Tile width along Dk."""
    v: int
    """Tile width along Dv."""
    warps: int
    stages: int
    registers: int | None = None
    """Most registers a thread may take, for more programs at a time; None: as it needs."""

    @property
    def options(self) -> dict[str, int]:
        """How to launch, as triton names it; `maxnreg`, which not every backend has, if needed."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# fmt: off
_SAFE = {
    "gla_prepare": {1: Blocks(64, 0, 2, 1), 64: Blocks(64, 0, 4, 1)},
    "gla_prepare_raw": {1: Blocks(64, 0, 2, 1), 64: Blocks(64, 0, 4, 1)},
    "gla_fwd": {
        1: Blocks(0, 64, 2, 1),
        64: Blocks(0, 64, 4, 1),
        128: Blocks(0, 64, 8, 1),
        256: Blocks(0, 32, 4, 1),
    },
    "gla_states": {1: Blocks(64, 64, 2, 1), 64: Blocks(64, 64, 4, 1)},
    "gla_dstates": {1: Blocks(0, 64, 2, 1), 64: Blocks(0, 64, 4, 1), 256: Blocks(0, 32, 4, 1)},
    "gla_dqk": {1: Blocks(64, 64, 2, 1), 64: Blocks(64, 64, 4, 1), 128: Blocks(64, 64, 8, 1)},
    "gdn_prepare": {1: Blocks(64, 0, 2, 1), 64: Blocks(64, 0, 4, 1)},
    "gdn_fwd": {1: Blocks(0, 64, 2, 1), 64: Blocks(0, 64, 4, 1), 128: Blocks(0, 64, 8, 1)},
    "gdn_states": {1: Blocks(0, 64, 2, 1), 64: Blocks(0, 64, 4, 1), 128: Blocks(0, 64, 8, 1)},
    "gdn_dstates": {1: Blocks(0, 64, 2, 1), 64: Blocks(0, 64, 4, 1), 128: Blocks(0, 64, 8, 1)},
    "gdn_dscores": {1: Blocks(0, 64, 2, 1), 64: Blocks(0, 64, 4, 1)},
    "gdn_dqk": {
        1: Blocks(64, 64, 2, 1),
        64: Blocks(64, 64, 4, 1),
        128: Blocks(128, 64, 8, 1),
        256: Blocks(64, 64, 8, 1),
    },
    "gla_step": {1: Blocks(0, 16, 4, 1)},
    "gdn_step": {1: Blocks(0, 16, 4, 1)},
    "layer_step": {1: Blocks(0, 32, 4, 3)},
    "layer_step_half": {1: Blocks(0, 32, 4, 3)},
    "layer_inputs": {1: Blocks(64, 0, 4, 1)},
}
# fmt: on
"""Kernel -> head width from which the entry holds -> launch parameters.

Under a width of 64 the kernels run on 2 warps: on 4, triton 3.6 compiles products with tiles of 32
bf16 columns into warpgroup instructions that read shared memory out of bounds.
"""

MEASURED: dict[int | None, dict[str, dict[int, Blocks]]] = {
    9: {
        "gla_prepare": {64: Blocks(128, 0, 4, 1), 256: Blocks(64, 0, 4, 1, 168)},
        "gla_prepare_raw": {64: Blocks(64, 0, 8, 1, 128)},
        "gla_fwd": {64: Blocks(0, 64, 4, 3), 256: Blocks(0, 64, 4, 1)},
        "gla_states": {64: Blocks(128, 128, 8, 2, 128)},
        "gla_dqk": {64: Blocks(64, 64, 4, 1), 128: Blocks(64, 64, 8, 1, 128)},
        "gla_dstates": {64: Blocks(0, 64, 4, 3), 256: Blocks(0, 64, 4, 1)},
        "gdn_fwd": {64: Blocks(0, 64, 4, 2), 256: Blocks(0, 64, 8, 2)},
        "gdn_states": {64: Blocks(0, 64, 4, 2), 256: Blocks(0, 64, 8, 2)},
        "gdn_dstates": {64: Blocks(0, 64, 4, 2), 256: Blocks(0, 64, 8, 1)},
        "gla_step": {1: Blocks(0, 8, 1, 1)},
        "gdn_step": {1: Blocks(0, 8, 1, 1)},
        "layer_step": {1: Blocks(0, 64, 8, 1)},
    }
}
"""Compute capability (major) -> entries that replace the safe ones."""

_COMPILED = {
    8: {
        "gla_fwd": {256: Blocks(0, 16, 8, 1)},
        "gla_dstates": {128: Blocks(0, 32, 8, 1)},
        "gla_dqk": {64: Blocks(32, 32, 4, 1)},
        "gdn_prepare": {256: Blocks(64, 0, 8, 1)},
        "gdn_fwd": {
            64: Blocks(0, 64, 8, 1),
            128: Blocks(0, 32, 4, 1),
            256: Blocks(0, 16, 8, 1),
        },
        "gdn_states": {256: Blocks(0, 32, 8, 1)},
        "gdn_dstates": {64: Blocks(0, 64, 8, 1), 256: Blocks(0, 16, 8, 1)},
        "gdn_dqk": {64: Blocks(64, 32, 8, 1), 128: Blocks(32, 64, 4, 1)},
    },
    10: {"gla_fwd": {256: Blocks(0, 64, 8, 1)}, "gla_dstates": {256: Blocks(0, 64, 8, 1)}},
}
"""The same where no such GPU was measured, but the safe entries spill registers."""


def block_sizes(kernel: str, x: Tensor, width: int) -> Blocks:
    """Launch parameters of `kernel` on the device of `x` for heads of this width."""
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return blocks_for(kernel, width, None)
    return blocks_for(kernel, width, _generation(x.device))


@functools.cache
def blocks_for(kernel: str, width: int, generation: int | None) -> Blocks:
    """The table's entry for a compute capability's major number; None: the safe entry."""
    for tables in (MEASURED.get(generation, {}), _COMPILED.get(generation or 0, {}), _SAFE):
        table = tables.get(kernel, {})
        fitting = [w for w in table if w <= width]
        if fitting:
            return table[max(fitting)]
    raise ValueError(f"block sizes: no entry of {kernel} for heads of width {width}")


@functools.cache
def _generation(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0]
    if major not in MEASURED:
        _log.warning(
            "no measured block sizes for %s (compute capability %d.x): unmeasured ones serve; "
            "kernels/benchmarks/search_blocks.py finds better ones",
            torch.cuda.get_device_name(device),
            major,
        )
    return major
