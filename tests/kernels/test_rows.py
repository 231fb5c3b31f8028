"""Rows taken many times, once, or never: torch's values, its gradients added in one order."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import select_rows, take_rows

pytest.importorskip("triton")
from sse_kernels.triton_rows import triton_take_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INDICES = {
    "many copies": [3, 0, 3, 3, 1, 0],
    "each once": [2, 0, 1, 4, 3],
    "one of five": [4],
    "none": [],
}


@pytest.mark.parametrize("index", INDICES.values(), ids=list(INDICES))
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1500,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taken_rows_have_the_gradient_of_their_copies(index, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(5, *shape, device=DEVICE).to(dtype).requires_grad_()
    index = torch.tensor(index, dtype=torch.int64, device=DEVICE)
    grad = torch.randn(len(index), *shape, device=DEVICE).to(dtype)
    selection = select_rows(index, len(x))
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact[index], exact, grad.double())
    for take in (lambda x, s: triton_take_rows(x, *s), take_rows):
        y = take(x, selection)
        assert torch.equal(y, x[index])
        (found,) = torch.autograd.grad(y, x, grad)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_gradient_that_is_a_view_is_read_as_it_lies():
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    selection = select_rows(torch.tensor([1, 1, 3], device=DEVICE), 4)
    grad = torch.randn(6, 3, device=DEVICE).T
    (found,) = torch.autograd.grad(triton_take_rows(x, *selection), x, grad)
    torch.testing.assert_close(found[1], grad[0] + grad[1])
    torch.testing.assert_close(found[3], grad[2])
    assert not found[[0, 2]].any()
