"""The short convolution: packed rows, carried windows, decoding."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import causal_conv, causal_conv_step
from sse_kernels.conv import _carries_gradients
from torch.nn.functional import conv1d, pad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
LENGTHS = [1, 63, 0, 2, 64, 3, 65, 130]
CHANNELS = 6


def inputs(width: int, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), CHANNELS, generator=rng, dtype=dtype)
    weight = torch.randn(CHANNELS, 1, width, generator=rng, dtype=dtype)
    initial = torch.randn(len(LENGTHS), CHANNELS, width - 1, generator=rng, dtype=dtype)
    return x, weight, initial, torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_the_convolution_of_each_sequence_after_its_past(width):
    x, weight, initial, cu_seqlens = inputs(width)
    leaves = [t.requires_grad_() for t in (x, weight, initial)]
    y, final = causal_conv(x, weight, cu_seqlens=cu_seqlens, initial=initial, output_final=True)
    expected, ends = [], []
    for b, rows in enumerate(x.split(LENGTHS)):
        past = torch.cat([initial[b], rows.T], dim=1)
        ends.append(past[:, past.shape[1] - (width - 1) :])
        if len(rows):
            expected.append(conv1d(past, weight, groups=CHANNELS).T)
    expected, ends = torch.cat(expected), torch.stack(ends)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)  # measured 8.9e-15 with gradients
    assert torch.equal(final, ends)
    wave = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    ours = torch.autograd.grad((y * wave).sum() + final.sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * wave).sum() + ends.sum(), leaves, allow_unused=True)
    for a, b in zip(ours[: 3 if width > 1 else 2], theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_packed_is_alone_to_the_bit():
    x, weight, _, cu_seqlens = inputs(4, torch.float32)
    packed, _ = causal_conv(x, weight, cu_seqlens=cu_seqlens)
    for rows, y in zip(x.split(LENGTHS), packed.split(LENGTHS), strict=True):
        alone, _ = causal_conv(rows, weight, cu_seqlens=torch.tensor([0, len(rows)]))
        assert torch.equal(alone, y)
        left = conv1d(pad(rows.T, (3, 0)), weight, groups=CHANNELS).T if len(rows) else rows
        torch.testing.assert_close(left, y, rtol=0, atol=4e-6)  # measured 4.8e-07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_convolution_to_the_bit(dtype):
    x, weight, initial, _ = inputs(4, dtype)
    x, initial = x[:20], initial[:2]
    ends = torch.tensor([0, 10, 20])
    y, final = causal_conv(x, weight, cu_seqlens=ends, initial=initial, output_final=True)
    state = torch.zeros(4, CHANNELS, 3, dtype=dtype)
    slots = torch.tensor([2, 1])
    state[slots] = initial
    for t in range(10):
        rows = [t, 10 + t]
        assert torch.equal(causal_conv_step(x[rows], weight, state=state, slots=slots), y[rows])
    assert torch.equal(state[slots], final)
    assert not state[[0, 3]].any()


def test_a_window_can_be_carried_over_any_cut():
    x, weight, initial, _ = inputs(4)
    x, window = x[:9], initial[:1]
    whole, final = causal_conv(
        x, weight, cu_seqlens=torch.tensor([0, 9]), initial=window, output_final=True
    )
    outputs = []
    for piece in x.split([1, 2, 5, 1]):
        y, window = causal_conv(
            piece,
            weight,
            cu_seqlens=torch.tensor([0, len(piece)]),
            initial=window,
            output_final=True,
        )
        outputs.append(y)
    assert torch.equal(torch.cat(outputs), whole)
    assert torch.equal(window, final)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_kernels_are_the_convolution_and_its_gradients(width, dtype):
    triton_causal_conv = pytest.importorskip("sse_kernels.triton_conv").triton_causal_conv
    torch.manual_seed(0)
    x, weight, initial, cu_seqlens = (
        t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in inputs(width)
    )
    initial = initial.mT.contiguous().mT  # of any layout
    carried = {"cu_seqlens": cu_seqlens, "initial": initial, "output_final": True}
    y, final = triton_causal_conv(x, weight, **carried)
    wide = {**carried, "initial": initial.double()}
    expected, ends = causal_conv(x.double(), weight.double(), **wide)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(final.double(), ends)

    alone = {"cu_seqlens": cu_seqlens, "initial": None, "output_final": False}
    dy = torch.randn_like(x)
    found, wanted = [], []
    for form, leaves, gradients in (
        (triton_causal_conv, (x.clone(), weight.clone()), found),
        (causal_conv, (x.double(), weight.double()), wanted),
    ):
        for leaf in leaves:
            leaf.requires_grad_()
        y, final = form(*leaves, **alone)
        assert final is None
        gradients += [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    tolerance = 4e-6 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_the_kernels_take_no_channels_or_tokens():
    triton_causal_conv = pytest.importorskip("sse_kernels.triton_conv").triton_causal_conv
    cu_seqlens = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    initial = torch.randn(2, 5, 3, device=DEVICE)
    x, weight = initial.new_empty(0, 5), torch.randn(5, 1, 4, device=DEVICE)
    carried = {"cu_seqlens": cu_seqlens, "initial": initial, "output_final": True}
    y, final = triton_causal_conv(x, weight, **carried)
    assert y.shape == x.shape and torch.equal(final, initial)
    for leaf in (x, weight):
        leaf.requires_grad_()
    y, _ = triton_causal_conv(x, weight, cu_seqlens=cu_seqlens, initial=None, output_final=False)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (x, weight)))


def test_what_the_kernels_have_no_gradient_of_is_left_to_torch():
    x, weight, initial, _ = inputs(4)
    assert not _carries_gradients(x, weight, initial, True)
    for leaf, alone, after_initial, with_final in ((x, 0, 0, 1), (weight, 0, 1, 0)):
        leaf.requires_grad_()
        assert _carries_gradients(x, weight, None, False) == alone
        assert _carries_gradients(x, weight, initial, False) == after_initial
        assert _carries_gradients(x, weight, None, True) == with_final
        leaf.requires_grad_(False)
    assert _carries_gradients(x, weight, initial.requires_grad_(), False)
    with torch.no_grad():
        assert not _carries_gradients(x, weight, initial, False)
