"""How SSE-GDN combines the router weight with the L2 norm of queries and keys."""

from __future__ import annotations

from torch import Tensor

NORM_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def sparse_key(x: Tensor, weight: Tensor, gate_after_norm: bool) -> Tensor:
    """A query or key of the sparse stream; `weight` broadcasts against x.

    The released model normalises after the multiplication, which cancels the weight up to eps: the
    router then learns from the auxiliary loss alone. `gate_after_norm` keeps the weight.
    """
    return weight * unit(x) if gate_after_norm else unit(weight * x)
