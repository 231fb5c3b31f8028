"""The plan of chunks and the choice of partitions, which kernels make on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from sse_kernels.routing_plan import CHUNK, max_chunks, routing_plan
from sse_kernels.triton_route import top_partitions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases")


def plan_by_hand(ids, lengths, partitions):
    """Chunks as lists of rows, and their segments."""
    tokens, k = ids.shape
    members: list[list[int]] = [[] for _ in range((1 + partitions) * len(lengths))]
    t = 0
    for b, length in enumerate(lengths):
        for _ in range(length):
            members[b].append(t)
            for j in range(k):
                segment = (1 + int(ids[t, j])) * len(lengths) + b
                members[segment].append((1 + j) * tokens + t)
            t += 1
    rows, chunks = [], []
    for segment, all_rows in enumerate(members):
        for first in range(0, len(all_rows), CHUNK):
            part = all_rows[first : first + CHUNK]
            rows.append(part + [-1] * (CHUNK - len(part)))
            chunks.append(segment)
    return rows, chunks


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 130]), min_size=1, max_size=5),
    partitions=st.integers(1, 9),
    data=st.data(),
)
def test_a_plan_holds_every_choice_once_and_in_order(lengths, partitions, data):
    k = data.draw(st.integers(1, partitions))
    favourite = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(sum(lengths))
    noise = torch.rand(sum(lengths), partitions, generator=generator)
    ids = (noise * (0 if favourite else 1)).argsort(dim=-1, stable=True)[:, :k].sort(-1).values
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rows, segments, chunks = routing_plan(ids, cu_seqlens, partitions)
    expected_rows, expected_chunks = plan_by_hand(ids, lengths, partitions)
    count = len(expected_chunks)
    assert len(chunks) == max_chunks(len(ids), k, len(lengths), partitions)
    assert rows[:count].tolist() == expected_rows
    assert chunks.tolist() == expected_chunks + [-1] * (len(chunks) - count)
    per_segment = [expected_chunks.count(s) for s in range(segments.shape[1])]
    if len(ids):
        assert segments[0].tolist() == per_segment
        assert segments[1].tolist() == torch.tensor(per_segment).cumsum(0).tolist()


def test_a_wrong_id_stays_inside_the_plan():
    ids, cu_seqlens = torch.tensor([[7], [-3]]), torch.tensor([0, 2])
    rows, _, chunks = routing_plan(ids, cu_seqlens, 2)
    assert chunks.tolist() == [0, 1, 2]
    assert [row[:1].tolist() for row in rows] == [[0], [3], [2]]


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(0, 40), partitions=st.integers(1, 33), data=st.data())
def test_the_largest_logits_win_and_ties_go_to_the_lowest_index(tokens, partitions, data):
    k = data.draw(st.integers(1, partitions))
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randint(-1, 2, (tokens, partitions), generator=generator).float()
    logits[logits < 0] = float("-inf")
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_partitions(logits, k), order[:, :k].sort(-1).values)
