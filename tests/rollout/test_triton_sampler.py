"""The sampling kernel draws what `sampler.sample` draws."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from sse_rl.rollout.sampler import Knobs, sample, stream_key, uniforms
from sse_rl.rollout.triton_sampler import SamplerTables, triton_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(logits, temperature, top_k, top_p, min_p):
    """(tokens, log-probs) of the kernel and of the definition, rows on slots in reverse order."""
    rows = len(logits)
    keys = np.array([stream_key(5, i) for i in range(rows)], np.uint64)
    counts = np.arange(rows) * 37
    uniform = uniforms(keys, counts)
    columns = [np.broadcast_to(x, rows) for x in (temperature, top_k, top_p, min_p)]
    expected = sample(logits, Knobs(*columns, uniform))
    slots = np.arange(rows, 0, -1)
    tables = SamplerTables(rows + 1, torch.device(DEVICE))
    for table, values in [
        (tables.temperature, columns[0]), (tables.top_k, columns[1]), (tables.top_p, columns[2]),
        (tables.min_p, columns[3]), (tables.key, keys.view(np.int64)), (tables.count, counts),
    ]:  # fmt: skip
        table[slots] = torch.tensor(values, device=DEVICE).to(table.dtype)
    index = torch.tensor(slots, device=DEVICE)
    found = triton_sample(logits.to(DEVICE), index, tables, block=64)
    assert torch.equal(tables.token[index], found[0]) and (tables.position[index] == 1).all()
    assert (tables.count[index].cpu().numpy() == counts + 1).all() and tables.position[0] == 0
    return [x.cpu() for x in found], expected


def assert_equal(found, expected, *, drawn_apart=0):
    apart = found[0] != expected[0]
    assert apart.sum() <= drawn_apart, (found[0][apart], expected[0][apart])
    torch.testing.assert_close(found[1][~apart], expected[1][~apart], rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_whole_distributions(temperature):
    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    assert_equal(*both(logits, temperature, 0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.1), (9, 0.7, 0.05)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_cut_distributions(top_k, top_p, min_p, ties):
    logits = 3 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    if ties:
        logits = logits.round()
    assert_equal(*both(logits, 0.9, top_k, top_p, min_p))


def test_rows_of_one_batch_have_parameters_of_their_own():
    rng = np.random.default_rng(0)
    logits = (2 * torch.randn(10, 100, generator=torch.Generator().manual_seed(2))).bfloat16()
    options = [rng.choice(x, 10) for x in ([0, 0.6, 1.3], [0, 3, 100, 200], [0.5, 1], [0, 0.2])]
    assert_equal(*both(logits.float(), *options))


def test_impossible_tokens_are_never_drawn_and_logits_that_are_no_numbers_show():
    logits = torch.full((3, 100), -torch.inf)
    logits[0, 70], logits[1, 3], logits[1, 99] = 0.0, 1.0, 1.0
    logits[2] = torch.nan
    found, expected = both(logits, 1.0, 0, 1.0, 0.0)
    assert_equal([x[:2] for x in found], [x[:2] for x in expected])
    assert found[1][2].isnan() and 0 <= found[0][2] < 100
