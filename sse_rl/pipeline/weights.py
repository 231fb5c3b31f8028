"""Weights on their way from learner to rollout: one flat buffer a version, never torn.

`pack` copies every tensor into one contiguous byte array, so what is published is a snapshot that a
later optimiser step cannot touch. The array travels through Ray's object store, is read there
without a copy, and is refused if its checksum is not the one that the index carries.
"""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    dtype: str
    """Name of a torch dtype, e.g. bfloat16."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the buffer, a multiple of ALIGNMENT."""


@dataclass(frozen=True, slots=True)
class WeightsIndex:
    version: int
    """The policy version: how many optimiser batches made these weights."""
    entries: tuple[Entry, ...]
    nbytes: int
    checksum: int
    """Of the buffer."""


def pack(
    tensors: dict[str, torch.Tensor], *, version: int, into: torch.Tensor | None = None
) -> tuple[WeightsIndex, np.ndarray]:
    """Snapshot `tensors` into one uint8 array [nbytes] and the index that reads it back.

    into: memory of an earlier snapshot, taken for this one if it has the size: new memory costs
    more than the copy does. Whatever still reads the earlier one then sees this one.
    """
    entries, offset = [], 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), offset))
        offset += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    if into is None or into.numel() != offset:
        into = torch.zeros(offset, dtype=torch.uint8, pin_memory=on_gpu)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        _view(into, entry).copy_(tensor.detach(), non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    buffer = into.numpy()
    return WeightsIndex(version, tuple(entries), offset, _checksum(buffer)), buffer


def unpack(index: WeightsIndex, buffer: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors again, as views of the buffer, which are not to be written.

    Raises ValueError if the buffer's size or its checksum is not the one that was packed.
    """
    if buffer.nbytes != index.nbytes or _checksum(buffer) != index.checksum:
        raise ValueError(
            f"weights version {index.version} arrived damaged: expected {index.nbytes} bytes with "
            f"checksum {index.checksum:08x}, got {buffer.nbytes} with another"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        whole = torch.from_numpy(buffer)
    return {entry.name: _view(whole, entry) for entry in index.entries}


def _view(buffer: torch.Tensor, entry: Entry) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    nbytes = math.prod(entry.shape) * dtype.itemsize
    return buffer[entry.offset : entry.offset + nbytes].view(dtype).view(entry.shape)


def _checksum(buffer: np.ndarray) -> int:
    """crc32 of the sums of every 4 KiB and of what is left: at the speed of memory."""
    whole = buffer.nbytes // 4096 * 4096
    sums = buffer[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    return zlib.crc32(buffer[whole:].tobytes(), zlib.crc32(sums.tobytes()))
