"""What makes an SSE layer's projections into its operators' inputs; arXiv 2507.16577, section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY_TEMPERATURE = 16


def classify(k: Tensor, row_topk: int | None = None) -> Tensor:
    """GLA's keys: softmax over the Dk state rows in fp32, [..., Dk] in k's dtype.

    With `row_topk`, over each key's that many largest entries only (the others are 0); ties go to
    the lowest row. arXiv 2507.16577, section 3: every state row is a class.
    """
    rows = k.float()
    if row_topk is not None and row_topk < k.shape[-1]:
        order = rows.detach().sort(dim=-1, descending=True, stable=True).indices
        rows = rows.scatter(-1, order[..., row_topk:], float("-inf"))
    return rows.softmax(-1).to(k.dtype)


def gla_log_decay(gk: Tensor) -> Tensor:
    """logsigmoid(gk) / 16 in fp32."""
    return F.logsigmoid(gk.float()) / DECAY_TEMPERATURE


def gdn_log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) softplus(a + dt_bias) in fp32, a [..., Hv], A_log and dt_bias [Hv]."""
    return -A_log.float().exp() * _softplus(a.float() + dt_bias.float())


def gdn_beta(b: Tensor, *, allow_neg_eigval: bool = False) -> Tensor:
    """sigmoid(b) in fp32, doubled with `allow_neg_eigval`."""
    beta = _sigmoid(b.float())
    return 2 * beta if allow_neg_eigval else beta


# On CPU torch's sigmoid and softplus round the last elements of a tensor (a SIMD tail) differently,
# so a row's bits would depend on its company; exp and log1p do not.
def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
