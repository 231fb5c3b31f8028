"""The output norm and its gate."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import gated_rms_norm
from torch.nn.functional import rms_norm, silu


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_rms_norm_times_silu_of_the_gate(gated, dtype):
    rng = torch.Generator().manual_seed(0)
    o, gate = torch.randn(2, 7, 3, 16, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(16, generator=rng, dtype=torch.float64).to(dtype)
    exact = rms_norm(o.double(), (16,), weight.double(), 1e-6)
    exact = exact * silu(gate.double()) if gated else exact
    y = gated_rms_norm(o, weight, gate if gated else None, eps=1e-6)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]
    # measured |error| / (1 + |y|): 0, 1.5e-07, 2.2e-03
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_zero_head_has_finite_gradients():
    o = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    gated_rms_norm(o, weight, gate, eps=1e-6).sum().backward()
    for x in (o, gate, weight):
        assert x.grad is not None and x.grad.isfinite().all()
