from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_rl.learner.packing import pack
from sse_rl.learner.samples import Sample
from sse_rl.types import Trajectory


def sample(prompt: tuple[int, ...], answer: tuple[int, ...], **changes: object) -> Sample:
    size = len(prompt) + len(answer) - 1
    arrays: dict = {
        "token_ids": np.array(answer, np.int32),
        "logprobs": -np.arange(len(answer), dtype=np.float32),
        "routing": np.full((size, 2, 1), len(prompt), np.uint8),
        "versions": np.zeros(len(answer), np.int32),
    }
    trajectory = Trajectory(**(arrays | changes), finish_reason="stop")
    return Sample(prompt, trajectory, advantage=float(len(answer)), scale=1.0)


def test_the_row_is_the_one_of_the_docstring() -> None:
    (row,) = pack([sample((5, 6), (8, 9)), sample((7,), (4,))], max_tokens=100)
    assert row.input_ids.tolist() == [5, 6, 8, 7]
    assert row.cu_seqlens.tolist() == [0, 3, 4]
    assert row.positions.tolist() == [0, 1, 2, 0]
    assert row.predicting.tolist() == [1, 2, 3]
    assert row.targets.tolist() == [8, 9, 4]
    assert row.sequence.tolist() == [0, 0, 1]
    assert row.logprobs.tolist() == [0, -1, 0]
    assert row.lengths.tolist() == [2, 1]
    assert row.routing[:, 0, 0].tolist() == [2, 2, 2, 1]
    assert row.advantages.tolist() == [2, 1]


def test_the_shared_row_is_the_one_of_the_docstring() -> None:
    pair = [sample((5, 6), (8, 9)), sample((5, 6), (4,))]
    (row,) = pack(pair, max_tokens=100, share_prompts=True)
    assert row.input_ids.tolist() == [5, 6, 8]
    assert row.cu_seqlens.tolist() == [0, 2, 3]
    assert row.positions.tolist() == [0, 1, 2]
    assert row.predicting.tolist() == [1, 2, 1]
    assert row.targets.tolist() == [8, 9, 4]
    assert row.parent is not None and row.parent.tolist() == [0]
    assert row.readers is not None and row.readers.tolist() == [2, 2, 1]
    assert row.num_tokens == 5
    assert row.routing[:, 0, 0].tolist() == [2, 2, 2]


def test_a_prompt_routed_otherwise_is_not_shared() -> None:
    other = sample((5, 6), (4, 7), routing=np.ones((3, 2, 1), np.uint8))
    (row,) = pack([sample((5, 6), (8, 9)), other], max_tokens=100, share_prompts=True)
    assert row.input_ids.tolist() == [5, 6, 5, 6, 8, 4]
    assert row.parent is not None and row.parent.tolist() == [0, 1]
    assert row.routing[:, 0, 0].tolist() == [2, 2, 1, 1, 2, 1]


def test_a_longer_trajectory_has_a_row_of_its_own() -> None:
    rows = pack(
        [sample((1,), (1, 2)), sample((1,) * 9, (1,) * 9), sample((1,), (3,))], max_tokens=4
    )
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 17], [0, 2, 3]]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30)


@given(lengths, st.integers(1, 40), st.integers(1, 4))
def test_every_shared_trajectory_can_be_read_from_its_row(sizes, budget, prompts) -> None:
    samples = [sample((i % prompts,) * 3, (i + 10,) * c) for i, (_, c) in enumerate(sizes)]
    seen: list[int] = []
    for row in pack(samples, max_tokens=budget, share_prompts=True):
        assert len(row.input_ids) <= budget or len(row.lengths) == 1
        first = np.cumsum(row.lengths) - row.lengths
        for at, length in zip(first, row.lengths, strict=True):
            index, places = int(row.targets[at]) - 10, row.predicting[at : at + length]
            assert length == sizes[index][1]
            assert row.input_ids[places[0]] == index % prompts
            assert (row.input_ids[places[1:]] == index + 10).all()
            assert row.positions[places].tolist() == list(range(2, 2 + length))
            seen.append(index)
    assert sorted(seen) == list(range(len(sizes)))


@given(lengths, st.integers(1, 40))
def test_every_trajectory_is_in_one_row_within_the_budget(sizes, budget) -> None:
    samples = [sample((i,) * p, (i,) * c) for i, (p, c) in enumerate(sizes)]
    rows = pack(samples, max_tokens=budget)
    seen: list[int] = []
    for row in rows:
        starts = row.cu_seqlens
        assert starts[-1] == len(row.input_ids) == len(row.positions) == len(row.routing)
        assert starts[-1] <= budget or len(starts) == 2
        assert len(row.predicting) == len(row.targets) == row.lengths.sum()
        assert (row.input_ids[row.predicting] == row.targets).all()
        members = row.input_ids[starts[:-1]].tolist()
        assert members == sorted(members)
        assert row.lengths.tolist() == [sizes[i][1] for i in members]
        seen += members
    assert sorted(seen) == list(range(len(sizes)))
    rooms = [budget - len(row.input_ids) for row in rows]
    smallest = [int(np.diff(row.cu_seqlens).min()) for row in rows]
    for later in range(1, len(rows)):
        assert all(smallest[later] > room for room in rooms[:later])


def test_arrays_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 logprobs"):
        pack([sample((1,), (2, 3), logprobs=np.zeros(1, np.float32))], max_tokens=9)
    with pytest.raises(ValueError, match="fed 2 tokens with 3 rows of routing"):
        pack([sample((1,), (2, 3), routing=np.zeros((3, 2, 1), np.uint8))], max_tokens=9)
    with pytest.raises(ValueError, match="0 sampled tokens"):
        pack([sample((1,), (), routing=np.zeros((0, 2, 1), np.uint8))], max_tokens=9)
