"""What the SSE-GDN kernels compute alike: a chunk's summed decays, and factors of unit length."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summed_decays(g, at, mask):
    """Log-decays of a chunk's rows summed up to each row, in two parts, and their totals.

    The coarse parts are multiples of 2^-10 and sum without rounding, the fine ones stay below 2^-4:
    differences of the sums are as good as sums of g itself, whatever came before. Decays below
    -30 are cut: e^-30 is 0 beside any fp32 sum.
    """
    b_g = tl.maximum(tl.load(g + at, mask=mask, other=0.0).to(tl.float32), -30.0)
    coarse = tl.floor(b_g * 1024.0) * (1.0 / 1024.0)
    fine = b_g - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def unit_factor(squares, weight, EPS: tl.constexpr, GATE_LAST: tl.constexpr):
    """What a row x with this sum of squares is multiplied with, and p of the norm's backward pass.

    With h the gradient of f x times f, that of x is h - p x (x . h).
    """
    if GATE_LAST:
        inverse = tl.rsqrt(squares + EPS)
        return weight * inverse, inverse * inverse
    else:
        factor = weight * tl.rsqrt(weight * weight * squares + EPS)
        return factor, factor * factor
