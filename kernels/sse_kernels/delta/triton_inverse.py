"""The inverse of a unit lower triangular matrix, on the chip."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_lower_inverse(x, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + x)^-1 for x [C, C] fp32, strictly lower triangular; C is 16 times a power of two.

    Its diagonal blocks of 16 by elimination, all at once; then blocks twice as large, again and
    again: [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]]. Nothing cancels that
    substitution would keep.
    """
    S: tl.constexpr = 16
    i_b, i_s = tl.arange(0, C // S), tl.arange(0, S)
    diagonal = i_b[:, None, None, None] == i_b[None, None, :, None]
    blocks = tl.reshape(x, [C // S, S, C // S, S])
    blocks = tl.sum(tl.where(diagonal, blocks, 0.0), axis=2)
    eye = tl.where(i_s[None, :, None] == i_s[None, None, :], 1.0, 0.0)
    inverse = eye + tl.zeros([C // S, S, S], tl.float32)
    for j in range(S - 1):
        column = tl.sum(tl.where(i_s[None, None, :] == j, blocks, 0.0), axis=2)
        row = tl.sum(tl.where(i_s[None, :, None] == j, inverse, 0.0), axis=1)
        inverse -= column[:, :, None] * row[:, None, :]
    inverse = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), [C, C])
    return _join(inverse, x, tl.arange(0, C), S, C, PRECISION)


@triton.jit
def _join(inverse, x, i_c, SIZE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of diagonal blocks of SIZE to that of the whole."""
    if SIZE < C:
        row, column = i_c[:, None] // SIZE, i_c[None, :] // SIZE
        between = tl.where((row // 2 == column // 2) & (row != column), x, 0.0)
        step = tl.dot(inverse, between, input_precision=PRECISION)
        inverse -= tl.dot(step, inverse, input_precision=PRECISION)
        inverse = _join(inverse, x, i_c, 2 * SIZE, C, PRECISION)
    return inverse
