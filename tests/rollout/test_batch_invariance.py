"""On the CPU a request's result is equal to the bit whatever runs beside it, however it is cut."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from sse_rl.rollout.engine import Engine
from sse_rl.types import Completion

LENGTHS = [1, 5, 64, 65, 130, 2]


def assert_equal(ours: Iterable[Completion], theirs: Iterable[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.request_id, a.index, a.finish_reason) == (b.request_id, b.index, b.finish_reason)
        for name in ("token_ids", "logprobs", "routing", "versions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.fixture(params=[("gla", False), ("gdn", True)], ids=["gla", "gdn-conv"])
def build(request, tiny_model: Callable, make_engine: Callable) -> Callable[..., Engine]:
    kind, conv = request.param
    model = tiny_model(kind, use_short_conv=conv)
    return lambda **options: make_engine(model, **options)


@pytest.fixture
def requests(make_request: Callable) -> list:
    return [make_request(i, length, n=1 + i % 3) for i, length in enumerate(LENGTHS)]


def test_alone_and_in_a_crowd(build, requests):
    crowd = build(max_num_seqs=32, num_pages=99).generate(requests)
    engine = build()
    for request, completions in zip(requests, crowd, strict=True):
        [alone] = engine.generate([request])
        assert_equal(alone, completions)


def test_in_any_order_of_admission(build, requests):
    forward = build(max_num_seqs=32, num_pages=99).generate(requests)
    backward = build(max_num_seqs=32, num_pages=99).generate(requests[::-1])
    for ours, theirs in zip(forward, backward[::-1], strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"max_num_seqs": 1}, {"max_num_seqs": 3}, {"num_pages": 7}], ids=str
)
def test_with_any_number_of_slots_and_pages(build, requests, options):
    wide = build(max_num_seqs=32, num_pages=99).generate(requests)
    tight = build(**options).generate(requests)
    for ours, theirs in zip(wide, tight, strict=True):
        assert_equal(ours, theirs)


def test_with_prompts_in_chunks(build, requests):
    whole = build(max_num_seqs=32, num_pages=99, max_num_batched_tokens=4096).generate(requests)
    for budget in (64, 100):
        engine = build(max_num_seqs=32, num_pages=99, max_num_batched_tokens=budget)
        for ours, theirs in zip(whole, engine.generate(requests), strict=True):
            assert_equal(ours, theirs)
