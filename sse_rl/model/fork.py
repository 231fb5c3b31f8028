"""Prompts that stand once before all of their answers: each answer goes on from its prompt's past.

A recurrent layer hands its state on. What knows whole sequences alone, the short convolution and
softmax attention, reads a longer row in which every answer stands behind what it needs of its
prompt, and each token's value is taken from there. Gradients go all these ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sse_kernels import Selection, select_rows

from sse_rl.model.cache import PackedInputs, packed_inputs


@dataclass(frozen=True, slots=True)
class Unfolded:
    """A row in which answers stand behind their prompts, of tokens of a row where they do not."""

    rows: Selection
    """Of the T tokens, the one at each of the U places."""
    inputs: PackedInputs
    """Of that row."""
    places: Selection
    """Of the U places, the one where each token's value stands."""


@dataclass(frozen=True, slots=True)
class Fork:
    """How the pieces of a row continue each other: the first are prompts, the others answers."""

    prompts: int
    """How many pieces are prompts."""
    prompt_tokens: int
    """And how many tokens."""
    parent: Selection
    """Of the prompts, the one that each answer continues."""
    whole: Unfolded
    """Answers behind their whole prompts."""
    window: Unfolded
    """Answers behind the last tokens of their prompts, as many as the convolution looks back."""


def fork_inputs(
    prompts: Sequence[int],
    answers: Sequence[int],
    parent: Sequence[int],
    *,
    look_back: int,
    device: torch.device | str = "cpu",
) -> Fork:
    """For a row of prompts of these lengths and, behind them, answers that continue `parent`.

    look_back: tokens before its own that the convolution reads, W - 1.
    """

    def select(array: np.ndarray, rows: int) -> Selection:
        return select_rows(torch.from_numpy(array).to(device), rows)

    ends = np.cumsum([*prompts, *answers])

    def unfold(most: int) -> Unfolded:
        """Answers behind the last `most` tokens of their prompts."""
        pieces = [np.arange(end - n, end) for n, end in zip(prompts, ends, strict=False)]
        before = [np.arange(0)] * len(prompts)
        for prompt, n, end in zip(parent, answers, ends[len(prompts) :], strict=True):
            before.append(pieces[prompt][max(len(pieces[prompt]) - most, 0) :])
            pieces.append(np.arange(end - n, end))
        sizes = [len(x) + len(y) for x, y in zip(before, pieces, strict=True)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        places = [
            start + len(x) + np.arange(len(y))
            for start, x, y in zip(starts, before, pieces, strict=False)
        ]
        rows = [part for pair in zip(before, pieces, strict=True) for part in pair]
        return Unfolded(
            rows=select(np.concatenate(rows), ends[-1]),
            inputs=packed_inputs(sizes, device=device),
            places=select(np.concatenate(places), starts[-1]),
        )

    return Fork(
        len(prompts),
        sum(prompts),
        select(np.array(parent, np.int64), len(prompts)),
        unfold(max(prompts)),
        unfold(look_back),
    )
