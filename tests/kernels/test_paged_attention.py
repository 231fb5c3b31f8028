"""Attention over pages: the Triton form against the definition, the definition against SDPA."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sse_kernels import paged_attention, rotate_into_pages
from sse_kernels.attention import triton_rotate
from sse_kernels.attention.naive import naive_paged_attention
from sse_kernels.attention.triton_paged import Tile, triton_paged_attention
from sse_kernels.attention.triton_rotate import triton_rotate_into_pages

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu holds these cases"
)
TOLERANCE = {"rtol": 0, "atol": 2e-6}  # measured 6e-7
SMALL = Tile(16, 16, 4, 1)


def case(contexts, lengths=None, *, heads=4, kv_heads=2, width=16, page=16, spare=0):
    """Random q and pages, every page of a sequence somewhere in the pool; the rest is NaN."""
    torch.manual_seed(0)
    sizes = lengths or [1] * len(contexts)
    needed = [-(-(c + n) // page) for c, n in zip(contexts, sizes, strict=True)]
    k_pages, v_pages = torch.full((2, sum(needed) + 3, page, kv_heads, width), torch.nan)
    order = (1 + torch.randperm(sum(needed))).split(needed)
    table = torch.zeros(len(contexts), max(needed) + spare, dtype=torch.int64)
    for b, pages in enumerate(order):
        table[b, : len(pages)] = pages
        for pool in (k_pages, v_pages):
            tokens = torch.full((len(pages) * page, kv_heads, width), torch.nan)
            tokens[: contexts[b] + sizes[b]] = torch.randn(contexts[b] + sizes[b], kv_heads, width)
            pool[pages] = tokens.view(-1, page, kv_heads, width)
    options = {"context_lens": torch.tensor(contexts)}
    if lengths:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return (torch.randn(sum(sizes), heads, width), k_pages, v_pages, table), options


def test_the_definition_is_sdpa_over_the_gathered_pages():
    (q, k_pages, v_pages, table), options = case([20], [13], heads=4, kv_heads=2)
    o = paged_attention(q, k_pages, v_pages, table, **options)
    k, v = (pages[table[0]].flatten(0, 1)[:33].transpose(0, 1) for pages in (k_pages, v_pages))
    mask = torch.ones(13, 33).tril(20).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(o, expected[0].transpose(0, 1), **TOLERANCE)


@needs_interpreter
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 1, 24), (2, 2, 32)])
def test_decoding_in_parts_is_the_definition(heads, kv_heads, width, window):
    args, options = case([0, 15, 16, 31, 70], heads=heads, kv_heads=kv_heads, width=width)
    expected = naive_paged_attention(*args, **options, window=window)
    for split in (32, 128):
        found = triton_paged_attention(*args, **options, window=window, split=split, tile=SMALL)
        torch.testing.assert_close(found, expected, **TOLERANCE)


@needs_interpreter
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "page"), [(4, 1, 16), (3, 1, 48), (2, 2, 32)])
def test_prefill_in_pieces_is_the_definition(heads, kv_heads, page, window):
    args, options = case([0, 5, 33], [30, 1, 17], heads=heads, kv_heads=kv_heads, page=page)
    expected = naive_paged_attention(*args, **options, window=window)
    found = triton_paged_attention(*args, **options, window=window, split=512, tile=SMALL)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@needs_interpreter
def test_more_parts_than_are_joined_at_once():
    args, options = case([600, 20], heads=1, kv_heads=1)
    expected = naive_paged_attention(*args, **options)
    found = triton_paged_attention(*args, **options, split=32, tile=SMALL)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@needs_interpreter
def test_a_row_has_the_same_bits_in_any_company_and_with_any_block_table():
    (q, k, v, table), options = case([40, 3, 90, 31])
    run = lambda q, table, contexts: triton_paged_attention(
        q, k, v, table, context_lens=contexts, split=32, tile=SMALL
    )
    together = run(q, table, options["context_lens"])
    for b, context in enumerate(options["context_lens"].tolist()):
        pages = context // 16 + 1
        row = slice(b, b + 1)
        alone = run(q[row], table[row, :pages], options["context_lens"][row])
        assert torch.equal(alone, together[row])


@needs_interpreter
def test_a_piece_of_prefill_has_the_same_bits_however_it_is_cut():
    (q, k, v, table), _ = case([0, 0], [50, 20])
    run = lambda q, table, **lengths: triton_paged_attention(
        q, k, v, table, split=512, tile=SMALL,
        **{name: torch.tensor(values) for name, values in lengths.items()},
    )  # fmt: skip
    whole = run(q, table, context_lens=[0, 0], cu_seqlens=[0, 50, 70])
    rest = run(q[23:50], table[:1], context_lens=[23], cu_seqlens=[0, 27])
    assert torch.equal(rest, whole[23:50])


@needs_interpreter
@pytest.mark.parametrize("page", [16, 32, 48])
@pytest.mark.parametrize("lengths", [None, [40, 1]], ids=["decode", "prefill"])
def test_a_tile_of_keys_may_span_pages(lengths, page):
    args, options = case([70, 20], lengths, heads=2, kv_heads=1, page=page)
    expected = naive_paged_attention(*args, **options)
    found = triton_paged_attention(*args, **options, split=128, tile=Tile(16, 64, 4, 1))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@needs_interpreter
@pytest.mark.parametrize("context", [48, 2**40, -20])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lengths", [None, [1, 17, 2]], ids=["decode", "prefill"])
def test_a_sequence_without_room_in_its_table_gives_nan_and_writes_nothing(
    lengths, window, context
):
    (q, *pages, table), options = case([40, 20, 30], lengths, spare=1)
    narrow = table[:, :3]  # three pages hold 48 tokens; the columns behind them are not its own
    options["context_lens"][1] = context
    kept = [x.clone() for x in pages]
    rotated = triton_rotate_into_pages(q, *q.chunk(2, 1), *pages, narrow, theta=1e4, **options)
    bounds = options.get("cu_seqlens", torch.arange(4)).tolist()
    outside, fitting = slice(*bounds[1:3]), table[1]
    for before, after in zip(kept, pages, strict=True):
        assert torch.equal(before[fitting].nan_to_num(), after[fitting].nan_to_num())
    for split in (32, 128):
        o = triton_paged_attention(
            rotated, *pages, narrow, **options, window=window, split=split, tile=SMALL
        )
        assert o[outside].isnan().all()
        options["context_lens"][1] = 0
        rows = torch.cat([o[: outside.start], o[outside.stop :]])
        assert rows.isfinite().all()
        options["context_lens"][1] = context


@needs_interpreter
def test_sequences_end_where_the_tokens_do():
    (q, *pages, table), options = case([5, 20], [3, 4])
    right = triton_paged_attention(q, *pages, table, **options, split=128, tile=SMALL)
    options["cu_seqlens"] = torch.tensor([0, 3, 500])
    found = triton_paged_attention(q, *pages, table, **options, split=128, tile=SMALL)
    assert torch.equal(found, right)


@needs_interpreter
def test_frequencies_made_while_a_graph_is_captured_are_not_kept(monkeypatch):
    made = lambda: triton_rotate._frequencies(16, 123.0, torch.device("cuda"))
    monkeypatch.setattr(triton_rotate, "_kept", {})
    monkeypatch.setattr(triton_rotate, "frequencies", lambda *key: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    of_a_capture = made()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert made() is not of_a_capture and made() is made()


@needs_interpreter
@pytest.mark.parametrize("lengths", [None, [30, 1, 17]])
@pytest.mark.parametrize("width", [16, 24])
def test_rotation_into_pages_is_that_of_torch(lengths, width):
    (q, k_pages, v_pages, table), options = case(
        [0, 5, 33], lengths, width=width, heads=3, kv_heads=1
    )
    k, v = torch.randn(len(q), 2, width).split(1, 1)  # as slices of one product are
    ours, theirs = [k_pages, v_pages], [k_pages.clone(), v_pages.clone()]
    found = triton_rotate_into_pages(q, k, v, *ours, table, theta=1e4, **options)
    expected = rotate_into_pages(q, k, v, *theirs, table, theta=1e4, **options)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(ours, theirs, **TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, r"q must be shape \[T, H, D\], got \[3, 4\]"),
        ({"q": torch.zeros(3, 3, 16)}, r"H must be a multiple of 2, got 3"),
        ({"q": torch.zeros(3, 4, 32)}, r"k_pages must be 32 wide, got 16"),
        ({"q": torch.zeros(3, 4, 16).double()}, r"k_pages must be torch.float64 as q"),
        ({"q": torch.zeros(3, 4, 16).requires_grad_()}, r"q must be without gradients"),
        ({"q": torch.zeros(4, 4, 16)}, r"block_table must be 4 rows, one a sequence, got 3"),
        ({"block_table": torch.zeros(3, 1)}, r"block_table must be int64, got torch.float32"),
        ({"block_table": torch.full((3, 9), 99)}, r"block_table must be in 0..9, got 99..99"),
        (
            {"context_lens": torch.tensor([5, 5, 500])},
            r"block_table must be wide enough for 501 .* got 80",
        ),
        ({"block_table": torch.zeros(3, 0).long()}, r"block_table must be one page wide or more"),
        ({"context_lens": torch.tensor([5, -1, 5])}, r"context_lens must be at least 0, got -1"),
        (
            {"k_pages": torch.zeros(9, 0, 2, 16), "v_pages": torch.zeros(9, 0, 2, 16)},
            r"k_pages' page must be a multiple of 16 tokens, got 0",
        ),
        (
            {"k_pages": torch.zeros(0, 16, 2, 16), "v_pages": torch.zeros(0, 16, 2, 16)},
            r"k_pages must be one page or more",
        ),
        (
            {"cu_seqlens": torch.arange(4).repeat_interleave(2)[::2]},
            r"cu_seqlens must be contiguous, got strides \[2\]",
        ),
        ({"window": 0}, r"window must be an integer of at least 1 or None, got 0"),
        ({"window": 2.5}, r"window must be an integer of at least 1 or None, got 2.5"),
        ({"split": 256.0}, r"split must be a multiple of 128, got 256.0"),
        ({"split": 100}, r"split must be a multiple of 128, got 100"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 5])}, r"cu_seqlens must be from 0 to T = 3"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    (q, k_pages, v_pages, table), options = case([3, 5, 70])
    values = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "block_table": table, **options}
    with pytest.raises((ValueError, TypeError), match=f"paged_attention: {message}"):
        paged_attention(**values | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 16).requires_grad_()}, r"k must be without gradients"),
        ({"v": torch.zeros(3, 2, 16).bfloat16()}, r"v must be torch.float32 as q, got torch.bf"),
        ({"theta": 0.0}, r"theta must be above 0, got 0.0"),
    ],
)
def test_a_wrong_argument_of_the_rotation_is_named(change, message):
    (q, k_pages, v_pages, table), options = case([3, 5, 70])
    values = {"q": q, "k": q[:, :2], "v": q[:, 2:], "block_table": table, "theta": 1e4, **options}
    values |= {"k_pages": k_pages, "v_pages": v_pages}
    with pytest.raises(ValueError, match=f"rotate_into_pages: {message}"):
        rotate_into_pages(**values | change)
    assert not k_pages.requires_grad


@pytest.mark.parametrize("lengths", [None, [30, 1, 17]])
def test_tables_of_32_bits_are_those_of_64(lengths):
    (q, *pages, table), options = case([0, 5, 33], lengths)
    narrow = {name: x.int() for name, x in options.items()}
    found = []
    for at, where in ((table, options), (table.int(), narrow)):
        own = [x.clone() for x in pages]
        rotated = rotate_into_pages(q, q[:, :2], q[:, 2:], *own, at, theta=1e4, **where)
        found.append((rotated, *own, paged_attention(q, *own, at, **where)))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
