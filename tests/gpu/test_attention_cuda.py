"""Paged attention on a GPU: bf16 and fp32 at real widths, bits, graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import paged_attention, rotate_into_pages
from sse_kernels.attention.naive import naive_paged_attention

pytestmark = pytest.mark.gpu

# Relative Frobenius error against fp64 on the same rounded inputs.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def case(contexts, lengths=None, *, heads=8, kv_heads=2, width=64, page=64, dtype=torch.bfloat16):
    """Random q, k, v and full pages in random order; the arguments of `paged_attention`."""
    torch.manual_seed(0)
    sizes = lengths or [1] * len(contexts)
    n = max(-(-(c + s) // page) for c, s in zip(contexts, sizes, strict=True)) + 3
    table = torch.randperm(n * len(contexts), device="cuda").view(len(contexts), n)
    pool = (n * len(contexts), page, kv_heads, width)
    k_pages, v_pages = torch.randn(2, *pool, device="cuda").to(dtype)
    q = torch.randn(sum(sizes), heads, width, device="cuda").to(dtype)
    options = {"context_lens": torch.tensor(contexts, device="cuda")}
    if lengths:
        options["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return (q, k_pages, v_pages, table), options


def error(found, args, options):
    q, k, v, table = args
    exact = naive_paged_attention(q.double(), k.double(), v.double(), table, **options)
    return float((found.double() - exact).norm() / exact.norm())


CASES = [
    *((torch.bfloat16, width, None) for width in (16, 32, 64, 96, 128, 256)),
    (torch.float32, 128, None),
    (torch.float16, 64, None),
    *((torch.bfloat16, 64, window) for window in (1, 600)),
]


@pytest.mark.parametrize(("dtype", "width", "window"), CASES, ids=str)
@pytest.mark.parametrize("lengths", [None, [1, 130, 64, 5]], ids=["decode", "prefill"])
def test_errors_stay_at_the_rounding_of_the_dtype(lengths, window, width, dtype):
    args, options = case([0, 63, 64, 1500], lengths, width=width, dtype=dtype)
    options["window"] = window
    assert error(paged_attention(*args, **options), args, options) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "kv_heads", "page"), [(9, 3, 16), (16, 16, 32), (32, 1, 48)])
@pytest.mark.parametrize("lengths", [None, [70, 3]], ids=["decode", "prefill"])
def test_any_group_of_heads_and_any_page(heads, kv_heads, page, lengths):
    args, options = case([1000, 77], lengths, heads=heads, kv_heads=kv_heads, page=page)
    assert error(paged_attention(*args, **options), args, options) < TOLERANCE[torch.bfloat16]


def test_a_row_has_the_same_bits_in_any_company_and_with_any_block_table():
    contexts = [4000, 3, 511, 512, 20000, 90]
    (q, k, v, table), options = case(contexts, width=128)
    together = paged_attention(q, k, v, table, **options)
    assert torch.equal(together, paged_attention(q, k, v, table, **options))
    for b, context in enumerate(contexts):
        row = slice(b, b + 1)
        lengths = {"context_lens": options["context_lens"][row]}
        alone = paged_attention(q[row], k, v, table[row, : context // 64 + 1], **lengths)
        assert torch.equal(alone, together[row]), context


def test_a_piece_of_prefill_has_the_same_bits_however_it_is_cut():
    (q, k, v, table), _ = case([0, 0], [300, 200])
    cuda = lambda *values: torch.tensor(values, device="cuda")
    whole = paged_attention(q, k, v, table, context_lens=cuda(0, 0), cu_seqlens=cuda(0, 300, 500))
    rest = paged_attention(
        q[128:300], k, v, table[:1, :5], context_lens=cuda(128), cu_seqlens=cuda(0, 172)
    )
    assert torch.equal(rest, whole[128:300])


@pytest.mark.parametrize("lengths", [None, [30, 1, 170]], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_into_pages_is_that_of_torch(dtype, lengths):
    (q, *pages, table), options = case([0, 64, 3000], lengths, dtype=dtype)
    k, v = torch.randn(2, len(q), 2, 64, device="cuda").to(dtype)
    arguments = [q, k, v, *pages, table]
    cpu = [x.cpu() for x in arguments]
    found = rotate_into_pages(*arguments, theta=1e4, **options)
    options = {name: x.cpu() for name, x in options.items()}
    expected = rotate_into_pages(*cpu, theta=1e4, **options)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 3.2e-2}
    torch.testing.assert_close(found.cpu(), expected, **tolerance)
    torch.testing.assert_close(pages[0].cpu(), cpu[3], **tolerance)
    assert torch.equal(pages[1].cpu(), cpu[4])


@pytest.mark.parametrize("lengths", [None, [1, 130, 64]], ids=["decode", "prefill"])
def test_a_sequence_without_room_in_its_table_gives_nan_alone(lengths):
    (q, *pages, table), options = case([500, 900, 70], lengths)
    kept, narrow = [x.clone() for x in pages], table[:, :14]  # 896 tokens
    k, v = torch.randn(2, len(q), 2, 64, device="cuda", dtype=torch.bfloat16)
    rotated = rotate_into_pages(q, k, v, *pages, narrow, theta=1e4, **options)
    for before, after in zip(kept, pages, strict=True):
        assert torch.equal(before[table[1]], after[table[1]])
        assert not torch.equal(before[table[0]], after[table[0]])
    rows = slice(*options.get("cu_seqlens", torch.arange(4)).tolist()[1:3])
    outside = torch.zeros(len(q), dtype=torch.bool, device="cuda")
    outside[rows] = True
    for split in (512, 1024):
        o = paged_attention(rotated, *pages, narrow, split=split, **options)
        assert torch.equal(o.flatten(1).isnan().all(1), outside)
        assert o[~outside].isfinite().all()


def test_frequencies_that_a_capture_made_serve_its_graph_alone():
    (q, *pages, table), options = case([5, 700])
    k, v = torch.randn(2, 2, 2, 64, device="cuda", dtype=torch.bfloat16)
    turn = lambda theta: rotate_into_pages(q, k, v, *pages, table, theta=theta, **options)
    turn(1e4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = turn(777.0)
    right = turn(777.0)  # before any replay
    arguments = [x.cpu() for x in (q, k, v, *pages, table)]
    lengths = {name: x.cpu() for name, x in options.items()}
    expected = rotate_into_pages(*arguments, theta=777.0, **lengths)
    torch.testing.assert_close(right.cpu(), expected, rtol=0, atol=3.2e-2)
    graph.replay()
    assert torch.equal(captured, right)


def test_a_captured_step_follows_lengths_and_pages_and_nothing_waits():
    (q, k_pages, v_pages, table), options = case([5, 700, 1300], width=128)
    k, v = torch.randn(2, 3, 2, 128, device="cuda", dtype=torch.bfloat16)
    contexts = options["context_lens"]

    def step():
        rotated = rotate_into_pages(
            q, k, v, k_pages, v_pages, table, theta=1e4, context_lens=contexts
        )
        return paged_attention(rotated, k_pages, v_pages, table, context_lens=contexts)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    contexts.copy_(torch.tensor([90, 64, 1500]))
    table.copy_(table.flip(1))
    graph.replay()
    assert torch.equal(o, step())
