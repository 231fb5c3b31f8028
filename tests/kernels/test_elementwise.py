"""What is fused between products equals torch's composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from sse_kernels import add_rms_norm, silu_mul
from sse_kernels.elementwise import can_launch
from sse_kernels.triton_elementwise import (
    differentiable_silu_mul,
    triton_add_rms_norm,
    triton_silu_mul,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 100, 1500])
def test_silu_mul(width, dtype):
    x = torch.randn(5, 2 * width, device=DEVICE).to(dtype)
    a, b = x.chunk(2, -1)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(triton_silu_mul(x), F.silu(a) * b, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(silu_mul(x), F.silu(a) * b, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,width", [(5, 16), (3, 1500), (0, 16)])
def test_the_gradient_of_silu_mul(tokens, width, dtype):
    x = torch.randn(tokens, 2 * width, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(tokens, width, device=DEVICE).to(dtype)
    exact = x.detach().double().requires_grad_()
    a, b = exact.chunk(2, -1)
    (wanted,) = torch.autograd.grad(F.silu(a) * b, exact, dy.double())
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for op in (differentiable_silu_mul, silu_mul):
        (found,) = torch.autograd.grad(op(x), x, dy)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 100, 576])
def test_add_rms_norm(width, dtype):
    x, y = torch.randn(2, 5, width, device=DEVICE).to(dtype)
    weight = torch.rand(width, device=DEVICE).to(dtype)
    normed = F.rms_norm(x + y, (width,), weight, 1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    for found in (triton_add_rms_norm(x, y, weight, 1e-6), add_rms_norm(x, y, weight, eps=1e-6)):
        assert torch.equal(found[0], x + y)
        torch.testing.assert_close(found[1], normed, rtol=tolerance, atol=1e-6)


def test_a_wrong_argument_is_named():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"silu_mul: x must be shape \[T, 2W\], got \[3, 3\]"):
        silu_mul(x[:, :3])
    with pytest.raises(ValueError, match=r"add_rms_norm: y must be \[T, d\] = \[3, 4\]"):
        add_rms_norm(x, x[:2], x[0], eps=1e-6)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 as x, got torch.float64"):
        add_rms_norm(x, x, x[0].double(), eps=1e-6)


def test_no_kernel_runs_where_any_input_wants_a_gradient():
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, device="cuda"), torch.empty(4, device="cuda")
        assert can_launch(x, x, weight)
        weight.requires_grad_()
        assert not can_launch(x, x, weight)
        with torch.no_grad():
            assert can_launch(x, x, weight)
