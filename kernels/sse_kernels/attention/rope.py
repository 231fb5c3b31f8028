"""Rotary positions (RoPE, arXiv 2104.09864), half-split as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect, expect_float, expect_tensor
from ..elementwise import can_launch, has_kernels


def rotate(q: Tensor, k: Tensor, positions: Tensor, *, theta: float) -> tuple[Tensor, Tensor]:
    """Channel i turns with channel i + D/2 by position * theta^(-2i/D).

    q [T, H, D], k [T, Hkv, D], positions [T]; computed in fp32 and rounded once.
    """
    op = "rotate"
    expect_float(op, "q", q)
    even = q.dim() == 3 and q.shape[2] % 2 == 0
    expect(even, op, "q", "shape [T, H, D] with an even D", list(q.shape))
    expect_tensor(op, "k", k, "[T, Hkv, D]", (len(q), *k.shape[1:2], q.shape[2]), q.device)
    expect(positions.shape == q.shape[:1], op, "positions", f"[{len(q)}]", list(positions.shape))
    if has_kernels(q, k):
        try:
            from .triton_rotate import differentiable_rotate, triton_rotate
        except ImportError:
            pass
        else:
            launch = triton_rotate if can_launch(q, k) else differentiable_rotate
            return launch(q, k, positions, theta)
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
