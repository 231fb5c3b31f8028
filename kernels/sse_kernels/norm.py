"""The output norm of a head, with its optional gate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .checks import expect, expect_float, expect_tensor


def gated_rms_norm(o: Tensor, weight: Tensor, gate: Tensor | None = None, *, eps: float) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * silu(gate), the mean over the last axis.

    o [..., Dv], weight [Dv] shared by all heads, gate like o. In fp32 inside (fp64 if o is), the
    result in o's dtype.
    """
    op = "gated_rms_norm"
    expect_float(op, "o", o)
    fits = o.dim() >= 1 and o.shape[-1] >= 1
    expect(fits, op, "o", "shape [..., Dv] with Dv >= 1", list(o.shape))
    expect_tensor(op, "weight", weight, "[Dv]", (o.shape[-1],), o.device)
    if gate is not None:
        expect_tensor(op, "gate", gate, "the shape of o", tuple(o.shape), o.device)
    if o.is_cuda and o.dtype != torch.float64:
        try:
            from .triton_norm import MAX_WIDTH, triton_gated_rms_norm
        except ImportError:
            pass
        else:
            if o.shape[-1] <= MAX_WIDTH:
                return triton_gated_rms_norm(o, weight, gate, eps=eps)
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    x = o.to(dtype)
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(dtype)
    if gate is not None:
        y = y * silu(gate.to(dtype))
    return y.to(o.dtype)
