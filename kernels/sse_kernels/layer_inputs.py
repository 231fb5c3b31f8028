"""What an SSE layer makes of x before its activations, and the weights behind it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class InputWeights(NamedTuple):
    """What stands between an SSE layer's first products with x and its activations."""

    router: Tensor
    """[N, d]"""
    lora_q: Tensor
    """[H*Dk, r], as lora_k: second halves of low-rank maps, as all below."""
    lora_k: Tensor
    decays: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """SSE-GLA: weight [H*Dk, r'] and bias [H*Dk] of the shared, then of the sparse stream."""
    gate: Tensor | None
    """[Hv*Dv, r]"""
    conv: tuple[Tensor, Tensor] | None
    """[H*Dk, 1, W] of q and of k."""


class LayerInputs(NamedTuple):
    """Arguments of `sse_gla_layer_step` and `sse_gdn_layer_step`, T = B tokens."""

    q1: Tensor
    """[T, H, Dk], as k1, q2 and k2: raw, q1 and k1 after the short convolution."""
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    """[T, Hv, Dv] raw."""
    decays: tuple[Tensor, Tensor]
    """SSE-GLA: gk1, gk2 [T, H, Dk]; SSE-GDN: a, b [T, 2 Hv]."""
    gate: Tensor | None
    """Like v."""
    logits: Tensor
    """[T, N] of the router."""
