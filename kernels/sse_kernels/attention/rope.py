"""Rotary positions (RoPE, arXiv 2104.09864), half-split as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(q: Tensor, k: Tensor, positions: Tensor, *, theta: float) -> tuple[Tensor, Tensor]:
    """Channel i turns with channel i + D/2 by position * theta^(-2i/D).

    q [T, H, D], k [T, Hkv, D], positions [T]; angles in fp32.
    """
    angle = positions.float()[:, None] * frequencies(q.shape[-1], theta, q.device)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return turn(q), turn(k)


def frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D) for i < D/2, fp32."""
    channel = torch.arange(width // 2, device=device, dtype=torch.float32)
    return theta ** (-channel / (width // 2))
