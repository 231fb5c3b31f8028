from __future__ import annotations

import numpy as np
import pytest
import torch
from sse_kernels import route

from sse_rl.learner.routing import flips, partition_shares


@pytest.mark.parametrize("partitions,k", [(4, 1), (6, 2), (3, 3)])
def test_flips_are_the_tokens_whose_set_differs(partitions: int, k: int) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(50, partitions) for _ in range(3)]
    routings = [route(layer, k) for layer in logits]
    chosen = torch.stack([r.ids for r in routings], 1).to(torch.uint8)
    other = torch.stack([route(torch.randn(50, partitions), k).ids for _ in logits], 1)
    probs = [r.probs for r in routings]
    assert flips(probs, chosen) == 0
    assert flips(probs, other.to(torch.uint8)) == (chosen != other).any(-1).sum()


def test_shares_count_the_tokens_that_chose() -> None:
    first = np.array([[[0, 1]], [[0, 2]]], np.uint8)
    second = np.array([[[0, 1]], [[1, 3]]], np.uint8)
    shares = partition_shares([first, second], [None, None], num_partitions=4)
    assert shares.tolist() == [[0.75, 0.75, 0.25, 0.25]]
