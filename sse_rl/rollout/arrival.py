"""Tensors on their way from the device to the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Arrival:
    """Copies begun now, behind what the device has still to do; nothing waits before `wait`."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def here(self) -> bool:
        """`wait` would not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> list[np.ndarray]:
        """The tensors as arrays, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [x.numpy() for x in self._host]


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
