"""The two passes over a block of logits, in torch: what `triton_rows` does in one launch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Passes over a block of logits, see the functions of these names."""

    reduce: Callable[..., None]
    differentiate: Callable[..., None]


def reduce(z: Tensor, targets: Tensor, temperature: float, stats: Tensor, chosen: Tensor) -> None:
    """Leave what the softmax of whole rows needs of the block's logits z / temperature, [T, W].

    stats [3, T] gets m = max z, s = sum e^(z - m) and sum e^(z - m) (z - m); chosen [T] the logit
    at `targets` [T], which count from the block's first column, in rows whose target is inside. z
    is overwritten.
    """
    z.div_(temperature)
    inside = (targets >= 0) & (targets < z.shape[1])
    at = targets.clamp(0, z.shape[1] - 1)[:, None]
    torch.where(inside, z.gather(1, at)[:, 0], chosen, out=chosen)
    stats[0] = z.amax(1)
    z.sub_(stats[0][:, None])
    e = z.exp()
    stats[1] = e.sum(1)
    stats[2] = e.mul_(z).sum(1)


def differentiate(
    z: Tensor, targets: Tensor, temperature: float, per_row: tuple[Tensor, ...], out: Tensor
) -> None:
    """Write the gradient of the products z [T, W] to `out`, which may be z.

    With per_row = (lse, entropy, dlogprob, dentropy), [T] each, and p the probabilities,
    out = (dlogprob (1[target] - p) - dentropy p (log p + entropy)) / temperature.
    """
    lse, entropy, dlogprob, dentropy = (x[:, None] for x in per_row)
    logp = z.div_(temperature).sub_(lse)
    gradient = logp.exp().mul_(dlogprob + dentropy * (logp + entropy)).neg_()
    inside = ((targets >= 0) & (targets < z.shape[1]))[:, None]
    at = targets.clamp(0, z.shape[1] - 1)[:, None]
    gradient.scatter_add_(1, at, torch.where(inside, dlogprob, 0.0).to(z.dtype))
    torch.div(gradient, temperature, out=out)


TORCH = Rows(reduce, differentiate)
