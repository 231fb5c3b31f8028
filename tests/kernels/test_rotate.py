"""RoPE's kernel against the torch form, which computes fp64 inputs in fp32 and rounds nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sse_kernels import rotate
from sse_kernels.attention.triton_rotate import differentiable_rotate, triton_rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {
    torch.float32: {"rtol": 0, "atol": 4e-6},  # measured 5e-7 in the interpreter
    # One rounding, to the nearest; the interpreter cuts off.
    torch.bfloat16: {"rtol": 2**-8 if DEVICE == "cuda" else 2**-7, "atol": 4e-6},
}
THETA = 1e4
cases = pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(5, 4, 2, 16), (3, 9, 3, 64), (4, 2, 1, 48), (1, 3, 3, 16), (0, 4, 2, 16)],
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
joined = pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])


def problem(tokens, heads, kv_heads, width, dtype, joined):
    """q and k, and likewise gradients of theirs; slices of one product, if joined; positions."""
    torch.manual_seed(0)
    sizes = [heads, kv_heads, kv_heads]
    products = torch.randn(2, tokens, sum(sizes), width, device=DEVICE).to(dtype)
    pairs = [product.split(sizes, 1)[:2] for product in products]
    if not joined:
        pairs = [[x.contiguous() for x in pair] for pair in pairs]
    return pairs[0], pairs[1], torch.randint(40_000, (tokens,), device=DEVICE)


def assert_rounded(found, exact, dtype):
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == dtype and x.is_contiguous()
        torch.testing.assert_close(x.double(), y, **TOLERANCE[dtype])


@cases
@dtypes
@joined
def test_the_kernel_is_the_torch_form(tokens, heads, kv_heads, width, dtype, joined):
    (q, k), _, positions = problem(tokens, heads, kv_heads, width, dtype, joined)
    exact = rotate(q.double(), k.double(), positions, theta=THETA)
    assert_rounded(triton_rotate(q, k, positions, THETA), exact, dtype)
    assert_rounded(rotate(q, k, positions, theta=THETA), exact, dtype)


@cases
@dtypes
@joined
def test_its_gradient_is_that_of_the_torch_form(tokens, heads, kv_heads, width, dtype, joined):
    pair, slopes, positions = problem(tokens, heads, kv_heads, width, dtype, joined)
    q, k = (x.requires_grad_() for x in pair)
    leaves = q64, k64 = [x.detach().double().requires_grad_() for x in pair]
    turned = rotate(q64, k64, positions, theta=THETA)
    exact = torch.autograd.grad(turned, leaves, [x.double() for x in slopes])
    for found in (
        differentiable_rotate(q, k, positions, THETA),
        rotate(q, k, positions, theta=THETA),
    ):
        assert_rounded(torch.autograd.grad(found, (q, k), slopes), exact, dtype)


def test_a_gradient_of_one_of_them_and_one_that_is_no_rows_of_heads():
    (q, k), (dq, _), positions = problem(5, 4, 2, 16, torch.float32, True)
    q = q.requires_grad_()
    plain = q.detach().double().requires_grad_()
    turned, _ = rotate(plain, k.double(), positions, theta=THETA)
    for slope in (dq.mT.contiguous().mT, dq[:1, :1, :1].expand_as(q)):
        found, _ = differentiable_rotate(q, k, positions, THETA)
        (exact,) = torch.autograd.grad(turned, plain, slope.double(), retain_graph=True)
        assert_rounded(torch.autograd.grad(found, q, slope), [exact], torch.float32)


def test_the_operator_is_registered_right():
    (q, k), _, positions = problem(5, 4, 2, 16, torch.float32, True)
    inputs = (q.requires_grad_(), k.requires_grad_(), positions, THETA)
    torch.library.opcheck(differentiable_rotate, inputs)


def test_a_wrong_argument_is_named():
    q, at = torch.zeros(3, 4, 6), torch.arange(3)
    with pytest.raises(ValueError, match=r"rotate: q must be shape \[T, H, D\] with an even D"):
        rotate(q[..., :5], q, at, theta=THETA)
    with pytest.raises(ValueError, match=r"rotate: k must be \[T, Hkv, D\] = \[3, 4, 6\]"):
        rotate(q, q[:2], at, theta=THETA)
    with pytest.raises(ValueError, match=r"rotate: positions must be \[3\], got \[1\]"):
        rotate(q, q, at[:1], theta=THETA)
