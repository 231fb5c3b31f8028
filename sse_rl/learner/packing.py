"""Packing: trajectories into rows of a token budget, end to end, without padding."""

from __future__ import annotations

import numpy as np

from sse_rl.learner.samples import Sample
from sse_rl.types import PackedBatch


def pack(samples: list[Sample], *, max_tokens: int) -> list[PackedBatch]:
    """Rows of at most `max_tokens` places; a longer trajectory has a row of its own.

    First-fit by falling length, equal lengths in the order given: the same samples make the same
    rows. Within a row the samples keep the order given. Raises ValueError for a trajectory whose
    arrays disagree.
    """
    for sample in samples:
        _check(sample)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: -samples[i].size):
        size = samples[index].size
        row = next((r for r, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([])
            room.append(max_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= size
    return [_row([samples[i] for i in sorted(row)]) for row in rows]


def _row(samples: list[Sample]) -> PackedBatch:
    prompts = np.array([len(s.prompt_token_ids) for s in samples])
    lengths = np.array([len(s.trajectory.token_ids) for s in samples])
    sizes = prompts + lengths - 1
    starts = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = [p for s in samples for p in (s.prompt_token_ids, s.trajectory.token_ids[:-1])]
    return PackedBatch(
        input_ids=np.concatenate(pieces, dtype=np.int64, casting="unsafe"),
        cu_seqlens=starts.astype(np.int64),
        positions=positions.astype(np.int64),
        routing=np.concatenate([s.trajectory.routing for s in samples]),
        completion_mask=positions >= np.repeat(prompts - 1, sizes),
        targets=np.concatenate([s.trajectory.token_ids for s in samples], dtype=np.int64),
        sequence=np.repeat(np.arange(len(samples)), lengths),
        logprobs=np.concatenate([s.trajectory.logprobs for s in samples], dtype=np.float32),
        lengths=lengths.astype(np.int64),
        advantages=np.array([s.advantage for s in samples], np.float32),
        scales=np.array([s.scale for s in samples], np.float32),
    )


def _check(sample: Sample) -> None:
    trajectory, prompt = sample.trajectory, len(sample.prompt_token_ids)
    tokens = len(trajectory.token_ids)
    if prompt == 0 or tokens == 0:
        raise ValueError(f"a trajectory of {prompt} prompt and {tokens} sampled tokens: both >= 1")
    if len(trajectory.logprobs) != tokens:
        raise ValueError(
            f"a trajectory of {tokens} tokens with {len(trajectory.logprobs)} logprobs"
        )
    if len(trajectory.routing) != sample.size:
        raise ValueError(
            f"a trajectory that fed {sample.size} tokens with {len(trajectory.routing)} rows of "
            f"routing: the prompt and all sampled tokens but the last have one each"
        )
