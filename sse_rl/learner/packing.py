"""Packing: trajectories into rows of a token budget, end to end, without padding."""

from __future__ import annotations

import numpy as np

from sse_rl.learner.samples import Sample
from sse_rl.types import PackedBatch


def pack(
    samples: list[Sample], *, max_tokens: int, share_prompts: bool = False
) -> list[PackedBatch]:
    """Rows of at most `max_tokens` places; a longer trajectory has a row of its own.

    First-fit by falling length, equal lengths in the order given: the same samples make the same
    rows. Within a row the samples keep the order given. With `share_prompts`, samples of one prompt
    stay together, as many as a row holds, and the prompt stands once before them. Raises ValueError
    for a trajectory whose arrays disagree.
    """
    for sample in samples:
        _check(sample)
    bundles = [[i] for i in range(len(samples))]
    if share_prompts:
        bundles = _of_one_prompt(samples, max_tokens)
    sizes = [_size([samples[i] for i in bundle]) for bundle in bundles]
    rows: list[list[int]] = []
    room: list[int] = []
    for bundle in sorted(range(len(bundles)), key=lambda i: -sizes[i]):
        row = next((r for r, free in enumerate(room) if free >= sizes[bundle]), None)
        if row is None:
            rows.append([])
            room.append(max_tokens)
            row = len(rows) - 1
        rows[row] += bundles[bundle]
        room[row] -= sizes[bundle]
    make = _shared_row if share_prompts else _row
    return [make([samples[i] for i in sorted(row)]) for row in rows]


def _of_one_prompt(samples: list[Sample], max_tokens: int) -> list[list[int]]:
    """Samples whose prompt was read alike, in parts of at most `max_tokens` places."""
    found: dict[tuple[tuple[int, ...], bytes], list[list[int]]] = {}
    for i, sample in enumerate(samples):
        parts = found.setdefault(_prompt(sample), [[]])
        if parts[-1] and _size([samples[j] for j in (*parts[-1], i)]) > max_tokens:
            parts.append([])
        parts[-1].append(i)
    return [part for parts in found.values() for part in parts]


def _prompt(sample: Sample) -> tuple[tuple[int, ...], bytes]:
    """A prompt's tokens and how the rollout routed them."""
    ids = sample.prompt_token_ids
    return ids, sample.trajectory.routing[: len(ids)].tobytes()


def _size(samples: list[Sample]) -> int:
    """Places that samples of one prompt take together."""
    prompt = len(samples[0].prompt_token_ids)
    return prompt + sum(sample.size - prompt for sample in samples)


def _row(samples: list[Sample]) -> PackedBatch:
    prompts = np.array([len(s.prompt_token_ids) for s in samples])
    sizes = np.array([s.size for s in samples])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = [p for s in samples for p in (s.prompt_token_ids, s.trajectory.token_ids[:-1])]
    return PackedBatch(
        input_ids=np.concatenate(pieces, dtype=np.int64, casting="unsafe"),
        cu_seqlens=starts.astype(np.int64),
        positions=positions.astype(np.int64),
        routing=np.concatenate([s.trajectory.routing for s in samples]),
        predicting=np.flatnonzero(positions >= np.repeat(prompts - 1, sizes)),
        **_sampled(samples),
    )


def _shared_row(samples: list[Sample]) -> PackedBatch:
    place: dict[tuple[tuple[int, ...], bytes], int] = {}
    of_sample = [place.setdefault(_prompt(sample), len(place)) for sample in samples]
    first = [samples[of_sample.index(prompt)] for prompt in range(len(place))]
    prompts = [np.array(sample.prompt_token_ids) for sample in first]
    ends = np.cumsum([len(prompt) for prompt in prompts])
    readers = np.repeat(np.bincount(of_sample), [len(prompt) for prompt in prompts])
    pieces = list(prompts)
    positions = [np.arange(len(prompt)) for prompt in prompts]
    routing = [s.trajectory.routing[: len(s.prompt_token_ids)] for s in first]
    parent, predicting, filled = [], [], int(ends[-1])
    for sample, prompt in zip(samples, of_sample, strict=True):
        fed = sample.trajectory.token_ids[:-1]
        predicting.append(np.concatenate([[ends[prompt] - 1], filled + np.arange(len(fed))]))
        filled += len(fed)
        if len(fed):
            parent.append(prompt)
            pieces.append(fed)
            positions.append(len(prompts[prompt]) + np.arange(len(fed)))
            routing.append(sample.trajectory.routing[len(prompts[prompt]) :])
    return PackedBatch(
        input_ids=np.concatenate(pieces, dtype=np.int64, casting="unsafe"),
        cu_seqlens=np.cumsum([0, *map(len, pieces)]),
        positions=np.concatenate(positions),
        routing=np.concatenate(routing),
        predicting=np.concatenate(predicting),
        parent=np.array(parent, np.int64),
        readers=np.concatenate([readers, np.ones(filled - ends[-1], np.int64)]),
        **_sampled(samples),
    )


def _sampled(samples: list[Sample]) -> dict[str, np.ndarray]:
    """What a row says of its sampled tokens, in the order of its samples."""
    lengths = np.array([len(s.trajectory.token_ids) for s in samples])
    return {
        "targets": np.concatenate([s.trajectory.token_ids for s in samples], dtype=np.int64),
        "sequence": np.repeat(np.arange(len(samples)), lengths),
        "logprobs": np.concatenate([s.trajectory.logprobs for s in samples], dtype=np.float32),
        "lengths": lengths.astype(np.int64),
        "advantages": np.array([s.advantage for s in samples], np.float32),
        "scales": np.array([s.scale for s in samples], np.float32),
    }


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
