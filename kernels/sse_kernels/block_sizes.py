"""Tile widths, warps and pipeline stages of every kernel, measured once per GPU generation.

Filled by kernels/benchmarks/search_blocks.py. The choice follows from the GPU, the dtype and the head
width alone, never from the number of tokens: a sequence's bits must not depend on its company.
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


_SAFE = {
    "gla_prepare": {16: Blocks(64, 0, 4, 1), 128: Blocks(64, 0, 8, 1)},
    "gla_fwd": {16: Blocks(0, 64, 4, 1), 256: Blocks(0, 32, 8, 1)},
    "gla_states": {16: Blocks(64, 64, 4, 1)},
    "gla_dstates": {16: Blocks(0, 64, 4, 1), 256: Blocks(0, 32, 8, 1)},
    "gla_dscores": {16: Blocks(0, 64, 4, 1)},
    "gla_step": {1: Blocks(0, 16, 4, 1)},
    "gla_dqk": {16: Blocks(64, 64, 4, 1)},
}
"""Kernel -> head width from which the entry holds -> launch parameters."""

_MEASURED: dict[int, dict[str, dict[int, Blocks]]] = {9: {}}
"""Compute capability (major) -> entries that replace the safe ones."""


def block_sizes(kernel: str, x: Tensor, width: int) -> Blocks:
    """Launch parameters of `kernel` on the device of `x` for heads of this width."""
    return _lookup(kernel, x.device, x.dtype == torch.float32, width)


@functools.cache
def _lookup(kernel: str, device: torch.device, single: bool, width: int) -> Blocks:
    table = _SAFE[kernel]
    if device.type == "cuda" and not single:
        major = torch.cuda.get_device_capability(device)[0]
        if major not in _MEASURED:
            _log.warning(
                "no measured block sizes for %s (compute capability %d.x): safe ones serve; "
                "kernels/benchmarks/search_blocks.py finds better ones",
                torch.cuda.get_device_name(device), major,
            )  # fmt: skip
        table = _MEASURED.get(major, {}).get(kernel, table)
    return table[max(w for w in table if w <= width)]
