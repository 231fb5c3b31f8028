"""Weights on their way from learner to rollout: one flat buffer a version, never torn.

`pack` copies every tensor into one contiguous byte array, so what is published is a snapshot that a
later optimiser step cannot touch. The array travels through Ray's object store, is read there
without a copy, and is refused if its checksum is not the one that the index carries.
"""

from __future__ import annotations

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
    """crc32 of the buffer."""


def pack(tensors: dict[str, torch.Tensor], *, version: int) -> tuple[WeightsIndex, np.ndarray]:
    """Snapshot `tensors` into one uint8 array [nbytes] and the index that reads it back."""
    entries, offset = [], 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), offset))
        offset += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = np.zeros(offset, dtype=np.uint8)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        if tensor.numel():
            source = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
            buffer[entry.offset : entry.offset + source.numel()] = source.numpy()
    return WeightsIndex(version, tuple(entries), offset, zlib.crc32(memoryview(buffer))), buffer  # pyright: ignore[reportArgumentType]


def unpack(index: WeightsIndex, buffer: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors again, as copies that outlive the buffer.

    Raises ValueError if the buffer is not, byte for byte, the one that was packed.
    """
    if buffer.nbytes != index.nbytes or zlib.crc32(memoryview(buffer)) != index.checksum:  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"weights version {index.version} arrived damaged: expected {index.nbytes} bytes with "
            f"checksum {index.checksum:08x}, got {buffer.nbytes} with another"
        )
    tensors = {}
    for entry in index.entries:
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        if tensor.numel():
            target = tensor.view(-1).view(torch.uint8).numpy()
            target[:] = buffer[entry.offset : entry.offset + len(target)]
        tensors[entry.name] = tensor
    return tensors
