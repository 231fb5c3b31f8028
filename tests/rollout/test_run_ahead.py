"""What is queued before the last tokens are seen changes no completion."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from sse_rl.rollout import graphs
from sse_rl.rollout.graphs import StepGraphs, row_bucket

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/rollout/test_graphs.py")


class PlainSteps(StepGraphs):
    """Steps that run at once instead of being captured; the sampler runs in the interpreter."""

    def step(self, slots, longest):
        self._graphs.clear()
        return super().step(slots, longest)

    def _capture(self, rows, pages):
        outputs = []

        class Replay:
            def replay(_):
                outputs[:] = self._run(rows, pages)

        class Graph(list):
            replay = Replay()

            def __getitem__(_, index):
                return outputs

        return Graph()


@pytest.fixture(autouse=True)
def little_padding(monkeypatch):
    """One row of scratch: each costs the interpreter milliseconds."""
    monkeypatch.setattr(graphs, "row_bucket", lambda rows: rows + 1)


def run_ahead(engine):
    runner = engine._runner
    runner.graphs = PlainSteps(
        runner._step, slots=len(runner._tables), pages=runner._width,
        page_size=runner._page_size, device=runner.device,
    )  # fmt: skip
    engine._ahead = 1
    return engine


def test_completions_are_those_of_an_engine_that_waits(tiny_model, make_engine, make_request):
    model = tiny_model("gdn", use_short_conv=True)
    requests = [
        make_request(0, 70, n=3, max_tokens=6, temperature=0.7),
        make_request(1, 5, n=2, max_tokens=1),
        make_request(2, 64, max_tokens=5, stop_token_ids=tuple(range(20))),
        make_request(3, 1, n=2, max_tokens=5, stop_token_ids=tuple(range(40))),
    ]
    options = {"max_num_seqs": 4, "num_pages": 12}
    waiting = make_engine(model, **options)
    ahead = run_ahead(make_engine(model, **options))
    for ours, theirs in zip(ahead.generate(requests), waiting.generate(requests), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.index, a.finish_reason, a.stop_reason) == (
                b.index, b.finish_reason, b.stop_reason,
            )  # fmt: skip
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.routing, b.routing)
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
    assert ahead.stats.tokens == waiting.stats.tokens
    assert ahead.stats.decode_tokens > waiting.stats.decode_tokens  # fed once too often


def test_steps_run_between_the_layers_of_a_prefill(tiny_model, make_engine, make_request):
    model = tiny_model("gdn")
    requests = [make_request(i, 20, max_tokens=4 + 2 * i, ignore_eos=True) for i in range(6)]
    options = {"max_num_seqs": 2, "num_pages": 99}
    engine, steps = run_ahead(make_engine(model, **options)), []
    inner = engine._runner.prefill

    def prefill(pieces, between):
        before = engine.stats.decode_steps
        fed = inner(pieces, between)
        steps.append(engine.stats.decode_steps - before)
        return fed

    engine._runner.prefill = prefill
    found = engine.generate(requests)
    assert steps[0] == 0 and sum(steps) >= 2 * (len(steps) - 1)
    for [ours], request in zip(found, requests, strict=True):
        [[alone]] = make_engine(model, **options).generate([request])
        np.testing.assert_array_equal(ours.token_ids, alone.token_ids)
        np.testing.assert_array_equal(ours.routing, alone.routing)


def test_an_aborted_request_leaves_nothing_behind(tiny_model, make_engine, make_request):
    model = tiny_model()
    engine = run_ahead(make_engine(model, max_num_seqs=2))
    engine.add(make_request(0, 10, n=2, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert [len(c.token_ids) for c in engine.abort("r0")] == [3, 3]
    [[alone]] = make_engine(model).generate([make_request(1, 10, max_tokens=4)])
    [[after]] = engine.generate([make_request(1, 10, max_tokens=4)])
    np.testing.assert_array_equal(after.token_ids, alone.token_ids)
    np.testing.assert_array_equal(after.routing, alone.routing)


def test_buckets_hold_their_rows_and_waste_little():
    for rows in range(1, 2000):
        assert rows <= row_bucket(rows) < max(33, 3 * rows / 2)
